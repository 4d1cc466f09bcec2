"""Baselines: popularity, a first-order Markov chain, SASRec, GRU4Rec, Caser; the language models' split and metrics.

    bash sasrec.sh          or, for one model:
    python sasrec.py --model markov --train_file D/train/X.csv --valid_file D/valid/X.csv --test_file D/test/X.csv \\
        --info_file D/info/X.txt --output_dir output/markov

- popularity: how often train takes the item as a target, for every row alike. First items of histories, which are
  nobody's target, do not count.
- markov: how often train goes from the last item of the history to the item; equal counts rank by popularity.
- sasrec, gru4rec, caser: sequential.py has the models, their losses and their departures from the papers. Here they
  are trained by AdamW and ranked over the whole catalog instead of against 100 sampled negatives.

Every model ranks all items of the catalog, those of the history included. `output_dir` gets `metrics.json`, and from
the last three also `model.safetensors` and `config.json`, which `load_checkpoint` reads. Hyper-parameters are chosen
on valid alone (benchmarks/baselines.py); test is scored once, with the epoch that was best on valid.
"""

import hashlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from data import read_sequences
from minionerec.baselines.counts import markov, popularity
from minionerec.baselines.models import LOSSES, MODELS, load_checkpoint
from minionerec.baselines.training import (
    NAMES,
    OWN_FLAGS,
    BaselineOptions,
    filter_heights,
    fit,
    item_and_sid_ranks,
    scorer,
)
from minionerec.catalog.catalog import Catalog, target_counts
from minionerec.catalog.items import read_info
from minionerec.common.devices import pick_device
from minionerec.common.errors import UserError
from minionerec.common.files import read_json, require_file, write_json
from minionerec.common.options import run
from minionerec.evaluation.metrics import CUTOFFS, bootstrap, format_table, table

INPUTS = ("train_file", "valid_file", "test_file", "info_file")


@dataclass
class Options(BaselineOptions):
    train_file: str = HfArg(default="", help="CSV of stage 3")
    valid_file: str = HfArg(default="", help="CSV of stage 3: chooses the epoch")
    test_file: str = HfArg(default="", help="CSV of stage 3: scored once")
    info_file: str = HfArg(default="", help="the catalog: sid, title, item id a line")
    output_dir: str = HfArg(default="", help="folder that gets metrics.json, and from a trained model its checkpoint")


def check(options: Options) -> None:
    """Refuse, before anything is read, what no data could make right; raises `UserError`."""
    o = options
    heads, heights = max(o.num_heads, 1), filter_heights(o.filter_sizes)
    multiples = [n for n in (o.hidden_size // heads * heads, (o.hidden_size // heads + 1) * heads) if n > 0]
    rules = [("model", o.model in NAMES, f"one of {', '.join(NAMES)}")]
    rules += [("loss", o.loss in LOSSES, " or ".join(LOSSES))]
    rules += [("loss_positions", o.loss_positions in ("last", "all"), "last or all")]
    sizes = ("max_history", "hidden_size", "num_layers", "num_heads", "num_filters", "num_vertical", "negatives")
    rules += [(flag, getattr(o, flag) >= 1, "1 or more") for flag in (*sizes, "epochs", "batch_size")]
    rules += [(flag, 0 <= getattr(o, flag) < 2**32, "0 or more") for flag in ("weight_decay", "early_stop", "seed")]
    rules += [("sample", o.sample >= 1 or o.sample == -1, "1 or more, or -1 for all")]
    rules += [("learning_rate", 0 < o.learning_rate < math.inf, "more than 0")]
    rules += [("dropout", 0 <= o.dropout < 1, "at least 0 and less than 1")]
    if o.model == "sasrec":
        rules += [
            ("hidden_size", o.hidden_size % heads == 0, f"a multiple of --num_heads {heads}, such as {multiples}")
        ]
    if o.model == "caser":
        fits = bool(heights) and 1 <= min(heights) and max(heights) <= o.max_history
        rules += [("filter_sizes", fits, f"heights like 2,3,4, each from 1 to --max_history {o.max_history}")]
    rules += [("output_dir", not Path(o.output_dir).is_file(), "a folder, and a file stands there")]
    if o.model in MODELS:  # a flag that would be ignored; run.sh gives the counts every model's variables
        own = OWN_FLAGS | {"negatives": tuple(MODELS) if o.loss == "bce" else ()}
        defaults = {name: field.default for name, field in Options.__dataclass_fields__.items()}
        unused = {flag for flag, models in own.items() if o.model not in models}
        what = f"nothing: {o.model} with --loss {o.loss} does not use it"
        rules += [(flag, getattr(o, flag) == defaults[flag], what) for flag in sorted(unused)]
    for flag, kept, expected in rules:
        if not kept:
            raise UserError(f"--{flag} {getattr(o, flag)}: expected {expected}")


def show(result: dict) -> None:
    """Print valid and test by item, and test by SID."""
    rows = {"valid, by item": result["valid"], "test, by item": result["item"], "test, by SID": result["sid"]}
    print(f"{result['model']}\n{format_table(rows, (5, 10, 20))}")


def finished(path: Path, made_from: dict) -> dict | None:
    """The result in `path` if it was made from the same options and the same files, else None."""
    if not path.exists():
        return None
    result = read_json(path, "output_dir")
    return result if all(result.get(key) == value for key, value in made_from.items()) else None


def main(options: Options) -> None:
    check(options)
    started, path = time.perf_counter(), Path(options.output_dir) / "metrics.json"
    files = {flag: require_file(getattr(options, flag), flag) for flag in INPUTS}
    digests = {flag: hashlib.sha256(file.read_bytes()).hexdigest() for flag, file in files.items()}
    made_from = {"options": json.loads(json.dumps(asdict(options))), "inputs": digests}
    if result := finished(path, made_from):
        print(f"{path}: finished before, with these options and files")
        return show(result)
    path.unlink(missing_ok=True)

    sids = read_info(options.info_file).sids
    train, valid, test = (read_sequences(files[flag], sids, flag, options.max_history) for flag in INPUTS[:3])
    catalog = Catalog(sids, target_counts(train, len(sids)))
    if options.model in MODELS:
        trained = fit(options, train, valid, catalog)
        trained.model.save(options.output_dir)
        model = load_checkpoint(options.output_dir, "output_dir", catalog.n_items)  # what is scored is what was saved
        score = scorer(model.to(pick_device(options.device)))
    else:
        score = {"popularity": popularity, "markov": markov}[options.model](train, len(sids))

    valid_ranks, _ = item_and_sid_ranks(score, valid, catalog)
    item_ranks, sid_ranks = item_and_sid_ranks(score, test, catalog)
    result = {"model": options.model, "item": table(item_ranks), "sid": table(sid_ranks)}
    result |= {"intervals": bootstrap(item_ranks, options.seed, CUTOFFS), "valid": table(valid_ranks)}
    write_json(path, result | made_from | {"seconds": round(time.perf_counter() - started, 1)})
    show(result)


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # repeatable sums on a GPU
    run(main, Options)
