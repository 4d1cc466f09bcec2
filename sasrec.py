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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from scipy.sparse import csr_array
from tqdm import tqdm

from catalog import Catalog
from cli import HfArg, UserError, read_json, require_file, run, write_json
from data import read_info, read_sequences, target_counts
from metrics import CUTOFFS, bootstrap, format_table, ranks_of_scores, table
from rq.embeddings import pick_device
from sequential import LOSSES, MODELS, SequentialModel, load_checkpoint

COUNTS = ("popularity", "markov")
NAMES = (*COUNTS, *MODELS)
INPUTS = ("train_file", "valid_file", "test_file", "info_file")
ROWS_AT_ONCE = 1024  # rows scored at a time: scores are (rows, items)

Scorer = Callable[[Sequence[Sequence[int]]], np.ndarray]  # histories, oldest first -> scores (rows, items)


@dataclass
class Options:
    train_file: str = HfArg(help="CSV of stage 3")
    valid_file: str = HfArg(help="CSV of stage 3: chooses the epoch")
    test_file: str = HfArg(help="CSV of stage 3: scored once")
    info_file: str = HfArg(help="the catalog: sid, title, item id a line")
    output_dir: str = HfArg(help="folder that gets metrics.json, and from a trained model its checkpoint")
    model: str = HfArg(default="sasrec", help=f"one of {', '.join(NAMES)}, in any case; GRU is gru4rec")
    seed: int = HfArg(default=42, help="of initial weights, batches, dropout, negatives and bootstrap")
    max_history: int = HfArg(default=10, help="items of history a row keeps: the latest ones")
    device: str = HfArg(default="", help="cpu, cuda, cuda:1, ...; cuda if there is one when left out")
    # the architecture
    hidden_size: int = HfArg(default=64, aliases=["--hidden_factor"], help="width of embeddings and layers")
    dropout: float = HfArg(default=0.2, aliases=["--dropout_rate"], help="on embeddings and inside the model")
    tie_embeddings: bool = HfArg(default=True, help="score by the input embeddings; False: by a table of their own")
    popularity_bias: bool = HfArg(default=True, help="items' biases start at log popularity; False: at zero")
    num_layers: int = HfArg(default=2, help="sasrec: blocks; gru4rec: layers")
    num_heads: int = HfArg(default=2, help="sasrec: attention heads; divide hidden_size")
    num_filters: int = HfArg(default=16, help="caser: horizontal filters of each height")
    filter_sizes: str = HfArg(default="2,3,4", help="caser: heights of horizontal filters, items; max_history at most")
    num_vertical: int = HfArg(default=4, help="caser: vertical filters")
    # training
    loss: str = HfArg(default="ce", aliases=["--loss_type"], help="ce (over the catalog) or bce (sampled negatives)")
    negatives: int = HfArg(default=1, help="bce: items drawn for each position")
    loss_positions: str = HfArg(default="last", help="predict only the row's target (last) or every position (all)")
    epochs: int = HfArg(default=9, aliases=["--epoch"], help="epochs at most; valid is scored after each")
    sample: int = HfArg(default=30_000, help="train rows drawn for an epoch (windows of a user overlap); -1: all")
    batch_size: int = HfArg(default=64, help="train rows a step")
    learning_rate: float = HfArg(default=1e-3, aliases=["--lr"], help="peak; falls linearly to zero over the epochs")
    weight_decay: float = HfArg(default=0.01, help="AdamW's, on matrices")
    early_stop: int = HfArg(default=5, help="epochs without a better valid NDCG@10 before training ends; 0: never")

    def __post_init__(self):
        self.model = {"gru": "gru4rec"}.get(self.model.lower(), self.model.lower())


def filter_heights(text: str) -> list[int]:
    """`"2,3,4"` or `"[2, 3, 4]"` -> `[2, 3, 4]`; empty if it is neither."""
    parts = text.strip().removeprefix("[").removesuffix("]").split(",")
    return [int(part) for part in parts] if all(part.strip().isdecimal() for part in parts) else []


OWN_FLAGS = {"num_heads": ("sasrec",), "num_layers": ("sasrec", "gru4rec")}
OWN_FLAGS |= dict.fromkeys(("num_filters", "filter_sizes", "num_vertical"), ("caser",))


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


# ------------------------------------------------------------------------------------------------ counts


def popularity(train: pl.DataFrame, n_items: int) -> Scorer:
    """Scores every item by how often it is a target in train, for each history alike."""
    counts = np.array(target_counts(train, n_items), dtype=np.float64)
    return lambda histories: np.tile(counts, (len(histories), 1))


def markov(train: pl.DataFrame, n_items: int) -> Scorer:
    """Scores an item by how often train goes to it from the history's last item; equal counts by popularity."""
    counts = np.array(target_counts(train, n_items), dtype=np.float64)

    def last_items(histories: Sequence[Sequence[int]]) -> list[int]:
        return [history[-1] if len(history) else n_items for history in histories]  # row n_items has no transition

    places = (last_items(train["history"].to_list()), train["target"].to_numpy())
    transitions = csr_array((np.ones(len(train)), places), shape=(n_items + 1, n_items))  # equal places add up
    # One transition outweighs any popularity; whole numbers below 2^53 stay exact in float64.
    return lambda histories: transitions[last_items(histories)].toarray() * (len(train) + 1) + counts


# ------------------------------------------------------------------------------------------------ training


class Fit(NamedTuple):
    """A trained model with the weights of its best epoch."""

    model: SequentialModel
    ndcg: float  # valid NDCG@10 by item
    epoch: int  # counted from 1


def build(options: Options, n_items: int) -> SequentialModel:
    """The untrained model of `options`; weights depend on the seed alone."""
    torch.manual_seed(options.seed)
    kind = MODELS[options.model]
    values = asdict(options) | {"filter_sizes": filter_heights(options.filter_sizes)}
    common = ("max_history", "hidden_size", "dropout", "tie_embeddings")
    return kind(n_items=n_items, **{name: values[name] for name in (*common, *kind.sizes)})


def fit(options: Options, train: pl.DataFrame, valid: pl.DataFrame, catalog: Catalog) -> Fit:
    """Train the model of `options` and keep the epoch with the best valid NDCG@10; test has no part in it."""
    negatives = options.negatives if options.loss == "bce" else 0
    if negatives and catalog.n_items <= options.max_history + 1:
        raise UserError(f"--loss bce: {catalog.n_items} items may all stand in a row, so none is negative; use ce")
    device = pick_device(options.device)
    model = build(options, catalog.n_items)
    if options.popularity_bias:
        model.start_from_popularity(target_counts(train, catalog.n_items))
    model.to(device)
    histories, targets = model.pad(train["history"].to_list()), train["target"].to_torch().to(device)
    parameters = list(model.parameters())
    matrices = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay}]
    vectors = [{"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(matrices + vectors, lr=options.learning_rate)
    sample = len(train) if options.sample == -1 else min(options.sample, len(train))
    steps = math.ceil(sample / options.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (options.epochs * steps))
    print(f"{sum(p.numel() for p in parameters):,} parameters, {steps} steps an epoch, on {device}")

    best, best_epoch, best_state = -1.0, 0, {}
    for epoch in range(1, options.epochs + 1):
        model.train()
        total = torch.zeros((), device=device)
        order = torch.randperm(len(targets))[:sample].to(device)
        for rows in tqdm(
            order.split(options.batch_size), f"epoch {epoch}/{options.epochs}", leave=False, mininterval=1
        ):
            loss = model.loss(
                histories[rows], targets[rows], every_position=options.loss_positions == "all", negatives=negatives
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        if not torch.isfinite(total):
            raise UserError(f"the loss of epoch {epoch} is {total.item()}; lower --learning_rate")
        ndcg = table(item_and_sid_ranks(scorer(model), valid, catalog)[0])["NDCG@10"]
        if ndcg > best:
            best, best_epoch, best_state = ndcg, epoch, {k: t.clone() for k, t in model.state_dict().items()}
        print(f"epoch {epoch}: loss {total.item() / steps:.4f}, valid NDCG@10 {ndcg:.4f} (best {best:.4f})", flush=True)
        if options.early_stop and epoch - best_epoch >= options.early_stop:
            break
    model.load_state_dict(best_state)
    return Fit(model, best, best_epoch)


def scorer(model: SequentialModel) -> Scorer:
    return lambda histories: model.scores(histories).cpu().numpy()


# ------------------------------------------------------------------------------------------------ ranks, main


def item_and_sid_ranks(score: Scorer, rows: pl.DataFrame, catalog: Catalog) -> tuple[np.ndarray, np.ndarray]:
    """(rank of each target among items, rank of its SID among distinct SIDs, whose score is their best item's)."""
    by_sid = np.concatenate(catalog.items_of_sid)
    starts = np.cumsum([0] + [len(items) for items in catalog.items_of_sid[:-1]])
    item_ranks, sid_ranks = [], []
    for part in rows.iter_slices(ROWS_AT_ONCE):
        scores, targets = score(part["history"].to_list()), part["target"].to_numpy()
        item_ranks.append(ranks_of_scores(scores, targets))
        sid_scores = np.maximum.reduceat(scores[:, by_sid], starts, axis=1)
        sid_ranks.append(ranks_of_scores(sid_scores, catalog.sid_of_item[targets]))
    return np.concatenate(item_ranks), np.concatenate(sid_ranks)


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
