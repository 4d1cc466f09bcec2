"""Baselines: popularity, a first-order Markov chain, SASRec, GRU4Rec, Caser; with the split and metrics of SFT and RL.

    bash sasrec.sh          or, for one model:
    python sasrec.py --model markov --train_file D/train/X.csv --valid_file D/valid/X.csv --test_file D/test/X.csv \\
        --info_file D/info/X.txt --output_dir output/markov

- popularity: score = how often the item is a target in train, the same for every row.
- markov: score = how often train goes from the last item of the history to the item; ties rank by popularity.
- sasrec, gru4rec, caser: minionerec/baselines/models.py has the models, their losses and their departures from the
  papers. They are trained with AdamW and ranked over the whole catalog, not against 100 sampled negatives.

Every model ranks the whole catalog, once with all items and once without those that the user already has
(minionerec/evaluation/protocols.py). `output_dir` gets `metrics.json`, `ranks.npz`, and the model as `model.safetensors`
and `config.json`, which `load_checkpoint` reads. Hyper-parameters are chosen on valid
only (benchmarks/baselines.py); test is scored once, with the epoch that was best on valid.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from minionerec.baselines.options import TRAINED, BaselineOptions
from minionerec.common import model_card, runs
from minionerec.common.errors import UserError
from minionerec.common.files import read_json, write_json
from minionerec.common.options import INPUT, OUTPUT, option, run

METRICS, RANKS = "metrics.json", "ranks.npz"
STATE = "training.pt"  # of a training that has not finished
FILES = [METRICS, RANKS, "model.safetensors", "config.json", STATE]
FLAGS = {"valid": "valid_file", "test": "test_file"}


@dataclass
class Options(BaselineOptions):
    train_file: str = option("", "train CSV", role=INPUT)
    valid_file: str = option("", "valid CSV: chooses the epoch", role=INPUT)
    test_file: str = option("", "test CSV: scored once", role=INPUT)
    info_file: str = option("", "the catalog: sid, title, item id per line", role=INPUT)
    item_features: str = option(
        "", "trained models: .npy of item vectors (items, dim) that replace item ids, frozen", role=INPUT
    )
    output_dir: str = option("", "folder for metrics.json and a trained model's checkpoint", role=OUTPUT)


def read(options: Options):
    """(the data set, the headline protocol); histories are windows of `max_history` items, `seen` is the whole list."""
    from data import load
    from minionerec.evaluation.protocols import headline

    files = {"train": options.train_file, "valid": options.valid_file, "test": options.test_file}
    data = load(info_file=options.info_file, **files, max_history=options.max_history, flags=FLAGS)
    return data, headline(data.train)


def build_scorer(options: Options, data, protocol: str, run_id: str):
    """The function from histories to scores: counted, or trained, saved and read back. run_id: marks the state file."""
    import torch

    from minionerec.baselines import counts, training
    from minionerec.baselines.models import load_checkpoint
    from minionerec.common.devices import pick_device
    from minionerec.common.embeddings import load_embeddings

    if options.model in TRAINED:
        features = load_embeddings(options.item_features, "item_features") if options.item_features else None
        if features is not None and len(features) != data.catalog.n_items:
            raise UserError(
                f"{options.item_features}: {len(features)} rows, expected the {data.catalog.n_items} items of "
                f"{options.info_file}; check --item_features"
            )
        features = None if features is None else torch.from_numpy(features)
        state = Path(options.output_dir) / STATE
        kept = {"state_file": state, "run_id": run_id}
        fitted = training.fit(
            options, data.train, data.valid, data.catalog, protocol=protocol, features=features, **kept
        )
        fitted.model.save(options.output_dir)
        state.unlink(missing_ok=True)
    else:
        counts.save(options.output_dir, options.model, data.train, data.catalog.n_items)
    model = load_checkpoint(options.output_dir, "output_dir", data.catalog.n_items)  # score what was saved
    return training.scorer(model.to(pick_device(options.device)))


def show(result: dict) -> None:
    """Print the headline protocol of valid and test, by item, and test by SID."""
    from minionerec.evaluation.metrics import format_table

    name = result["headline"]
    test = result if name == "all" else result["unseen"]
    rows = {"valid, by item": result["valid"], "test, by item": test["item"], "test, by SID": test["sid"]}
    print(f"{result['model']}, {name} items\n{format_table(rows, (5, 10, 20))}")


def main(options: Options) -> None:
    options.require("train_file", "valid_file", "test_file", "info_file", "output_dir")
    path = Path(options.output_dir) / METRICS
    record = runs.begin(options, "baseline", folder=options.output_dir, writes=FILES)
    if record.complete:
        return show(read_json(path, "output_dir"))

    from minionerec.evaluation import protocols
    from minionerec.evaluation.metrics import table

    data, headline = read(options)
    score = build_scorer(options, data, headline, record.record["id"])
    test = protocols.by_scores(score, data.test, data.catalog)
    protocols.write_ranks(Path(options.output_dir) / RANKS, test, data.test, data.train, data.catalog.n_items)
    result = {"model": options.model} | protocols.report(test, data.test, data.train, data.catalog, options.seed)
    result["valid"] = table(protocols.by_scores(score, data.valid, data.catalog, names=[headline])[headline].item)
    write_json(path, result)
    model_card.write(record, test=result)
    record.finish()
    show(result)


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # repeatable sums on a GPU
    run(main, Options)
