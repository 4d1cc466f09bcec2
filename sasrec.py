"""Baselines: popularity, a first-order Markov chain, SASRec, GRU4Rec, Caser; with the split and metrics of SFT and RL.

    bash sasrec.sh          or, for one model:
    python sasrec.py --model markov --train_file D/train/X.csv --valid_file D/valid/X.csv --test_file D/test/X.csv \\
        --info_file D/info/X.txt --output_dir output/markov

- popularity: score = how often the item is a target in train, the same for every row.
- markov: score = how often train goes from the last item of the history to the item; ties rank by popularity.
- sasrec, gru4rec, caser: minionerec/baselines/models.py has the models, their losses and their departures from the
  papers. They are trained with AdamW and ranked over the whole catalog, not against 100 sampled negatives.

Every model ranks all items of the catalog, including those of the history. `output_dir` gets `metrics.json`, and for
trained models `model.safetensors` and `config.json`, which `load_checkpoint` reads. Hyper-parameters are chosen on valid
only (benchmarks/baselines.py); test is scored once, with the epoch that was best on valid.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from minionerec.baselines.options import TRAINED, BaselineOptions
from minionerec.common import runs
from minionerec.common.files import read_json, write_json
from minionerec.common.options import INPUT, OUTPUT, option, run

METRICS = "metrics.json"
FLAGS = {"valid": "valid_file", "test": "test_file"}


@dataclass
class Options(BaselineOptions):
    train_file: str = option("", "train CSV", role=INPUT)
    valid_file: str = option("", "valid CSV: chooses the epoch", role=INPUT)
    test_file: str = option("", "test CSV: scored once", role=INPUT)
    info_file: str = option("", "the catalog: sid, title, item id per line", role=INPUT)
    output_dir: str = option("", "folder for metrics.json and a trained model's checkpoint", role=OUTPUT)


def build_scorer(options: Options, data):
    """The function from histories to scores: counted, or trained, saved and read back."""
    from minionerec.baselines import counts, training
    from minionerec.baselines.models import load_checkpoint
    from minionerec.common.devices import pick_device

    if options.model not in TRAINED:
        return getattr(counts, options.model)(data.train, data.catalog.n_items)
    training.fit(options, data.train, data.valid, data.catalog).model.save(options.output_dir)
    model = load_checkpoint(options.output_dir, "output_dir", data.catalog.n_items)  # score what was saved
    return training.scorer(model.to(pick_device(options.device)))


def show(result: dict) -> None:
    """Print valid and test by item, and test by SID."""
    from minionerec.evaluation.metrics import format_table

    rows = {"valid, by item": result["valid"], "test, by item": result["item"], "test, by SID": result["sid"]}
    print(f"{result['model']}\n{format_table(rows, (5, 10, 20))}")


def main(options: Options) -> None:
    options.require("train_file", "valid_file", "test_file", "info_file", "output_dir")
    path = Path(options.output_dir) / METRICS
    record = runs.begin(
        options, "baseline", folder=options.output_dir, writes=[METRICS, "model.safetensors", "config.json"]
    )
    if record.complete:
        return show(read_json(path, "output_dir"))

    from data import load
    from minionerec.baselines.training import item_and_sid_ranks
    from minionerec.evaluation.metrics import CUTOFFS, bootstrap, table

    data = load(
        info_file=options.info_file,
        train=options.train_file,
        valid=options.valid_file,
        test=options.test_file,
        max_history=options.max_history,
        flags=FLAGS,
    )
    score = build_scorer(options, data)
    valid_ranks, _ = item_and_sid_ranks(score, data.valid, data.catalog)
    item_ranks, sid_ranks = item_and_sid_ranks(score, data.test, data.catalog)
    result = {"model": options.model, "item": table(item_ranks), "sid": table(sid_ranks)}
    result |= {"intervals": bootstrap(item_ranks, options.seed, CUTOFFS), "valid": table(valid_ranks)}
    write_json(path, result)
    record.finish()
    show(result)


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # repeatable sums on a GPU
    run(main, Options)
