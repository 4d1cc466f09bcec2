"""Baselines: popularity, a first-order Markov chain, SASRec; the language models' files, split, history and metrics.

    bash sasrec.sh          or, for one model:
    python sasrec.py --model markov --train_file D/train/X.csv --valid_file D/valid/X.csv --test_file D/test/X.csv \\
        --info_file D/info/X.txt --output_dir output/markov

- popularity: how often train takes the item as a target, for every row alike. First items of histories, which are
  nobody's target, do not count.
- markov: how often train goes from the last item of the history to the item; equal counts rank by popularity.
- sasrec: Kang & McAuley 2018, arXiv 1808.09781. Departures from the paper:
    1. softmax cross-entropy over the whole catalog instead of binary cross-entropy with one sampled negative;
    2. ranks are over the whole catalog instead of 100 sampled negatives;
    3. pre-norm residuals x + f(norm(x)) with a norm at the end (the paper's text; its code normalises queries alone);
    4. a row is a window of at most `max_history` items; its target and, with `--loss_positions all`, each item of its
       history after the first are predicted from the items before;
    5. AdamW.

Every model ranks all items of the catalog, those of the history included. `output_dir` gets `metrics.json`, and from
sasrec also `model.safetensors` and `config.json`, which `SASRec.load` reads. Hyper-parameters are chosen on valid
alone; test is scored once, with the epoch that was best on valid.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from scipy.sparse import csr_array
from torch import nn
from tqdm import tqdm

from catalog import Catalog
from cli import HfArg, UserError, atomic_file, not_built, read_json, require_file, run, write_json
from data import read_info, read_sequences, target_counts
from metrics import CUTOFFS, bootstrap, format_table, ranks_of_scores, table
from rq.embeddings import pick_device

MODELS = ("popularity", "markov", "sasrec")
INPUTS = ("train_file", "valid_file", "test_file", "info_file")
ROWS_AT_ONCE = 1024  # rows scored at a time: scores are (rows, items)

Scorer = Callable[[Sequence[Sequence[int]]], np.ndarray]  # histories, oldest first -> scores (rows, items)


@dataclass
class Options:
    train_file: str = HfArg(help="CSV of stage 3")
    valid_file: str = HfArg(help="CSV of stage 3: chooses the epoch")
    test_file: str = HfArg(help="CSV of stage 3: scored once")
    info_file: str = HfArg(help="the catalog: sid, title, item id a line")
    output_dir: str = HfArg(help="folder that gets metrics.json, and from sasrec model.safetensors and config.json")
    model: str = HfArg(default="sasrec", help="popularity, markov or sasrec")
    seed: int = HfArg(default=42, help="of initial weights, batches, dropout and bootstrap")
    max_history: int = HfArg(default=10, help="items of history a row keeps: the latest ones")
    device: str = HfArg(default="", help="cpu, cuda, cuda:1, ...; cuda if there is one when left out")
    # sasrec: the architecture
    hidden_size: int = HfArg(default=64, help="width of embeddings and blocks")
    num_layers: int = HfArg(default=2, help="blocks")
    num_heads: int = HfArg(default=2, help="attention heads; divide hidden_size")
    dropout: float = HfArg(default=0.2, help="on embeddings, attention weights and both branches of a block")
    # sasrec: training
    loss_positions: str = HfArg(default="all", help="predict only the row's target (last) or every position (all)")
    epochs: int = HfArg(default=9, help="epochs at most; valid is scored after each")
    sample: int = HfArg(default=10_000, help="train rows drawn for an epoch (windows of a user overlap); -1: all")
    batch_size: int = HfArg(default=64, help="train rows a step")
    learning_rate: float = HfArg(default=1e-3, help="peak; falls linearly to zero over the epochs")
    weight_decay: float = HfArg(default=0.01, help="AdamW's, on matrices")
    early_stop: int = HfArg(default=5, help="epochs without a better valid NDCG@10 before training ends; 0: never")


def check(options: Options) -> None:
    """Refuse, before anything is read, what no data could make right; raises `UserError`."""
    o = options
    if o.model in ("gru4rec", "caser"):
        raise not_built("model", o.model, f"use one of {', '.join(MODELS)}")
    heads = max(o.num_heads, 1)
    multiples = [n for n in (o.hidden_size // heads * heads, (o.hidden_size // heads + 1) * heads) if n > 0]
    rules = [("model", o.model in MODELS, f"one of {', '.join(MODELS)}")]
    rules += [("loss_positions", o.loss_positions in ("last", "all"), "last or all")]
    sizes = ("max_history", "hidden_size", "num_layers", "num_heads", "epochs", "batch_size")
    rules += [(flag, getattr(o, flag) >= 1, "1 or more") for flag in sizes]
    rules += [(flag, 0 <= getattr(o, flag) < 2**32, "0 or more") for flag in ("weight_decay", "early_stop", "seed")]
    rules += [("sample", o.sample >= 1 or o.sample == -1, "1 or more, or -1 for all")]
    rules += [("learning_rate", 0 < o.learning_rate < math.inf, "more than 0")]
    rules += [("dropout", 0 <= o.dropout < 1, "at least 0 and less than 1")]
    rules += [("hidden_size", o.hidden_size % heads == 0, f"a multiple of --num_heads {heads}, such as {multiples}")]
    rules += [("output_dir", not Path(o.output_dir).is_file(), "a folder, and a file stands there")]
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


# ------------------------------------------------------------------------------------------------ SASRec


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), for the last `keep` positions."""

    def __init__(self, *, hidden_size: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.attention_norm, self.feed_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.query, self.key_value = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, 2 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.feed = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor, keep: int) -> torch.Tensor:
        """x: (rows, length, hidden); mask: (rows, 1, length, length), True where seen -> (rows, keep, hidden)."""
        normed, x = self.attention_norm(x), x[:, -keep:]
        query = self.query(normed[:, -keep:])
        key, value = self.key_value(normed).chunk(2, dim=-1)
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(query, key, value, mask[:, :, -keep:], dropout)
        x = x + F.dropout(self.output(seen.transpose(1, 2).flatten(-2)), dropout)
        return x + F.dropout(self.feed(self.feed_norm(x)), dropout)


class SASRec(nn.Module):
    """A causal transformer over item ids; an item's score is its embedding times the last hidden state."""

    def __init__(
        self, *, n_items: int, max_history: int, hidden_size: int, num_layers: int, num_heads: int, dropout: float
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.n_items, self.max_history, self.dropout = n_items, max_history, dropout
        self.items = nn.Embedding(n_items + 1, hidden_size, padding_idx=n_items)
        self.positions = nn.Embedding(max_history, hidden_size)  # the last row is the latest item's
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "dropout": dropout}
        self.blocks = nn.ModuleList(Block(**sizes) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        for embedding in (self.items, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.zeros_(self.items.weight[n_items].detach())

    def pad(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """(rows, max_history): the latest items, padded on the left with `n_items`; `ValueError` for an unknown id."""
        recent = [history[-self.max_history :] for history in histories]
        lengths = np.array([len(history) for history in recent])
        flat = np.fromiter(chain.from_iterable(recent), dtype=np.int64, count=int(lengths.sum()))
        if len(flat) and not 0 <= flat.min() <= flat.max() < self.n_items:
            bad = flat[(flat < 0) | (flat >= self.n_items)][0]
            raise ValueError(f"item {bad} is not in the catalog of 0..{self.n_items - 1} that SASRec was trained on")
        padded = np.full((len(recent), self.max_history), self.n_items)
        padded[np.arange(self.max_history) >= self.max_history - lengths[:, None]] = flat
        return torch.from_numpy(padded).to(self.items.weight.device)

    def forward(self, histories: torch.Tensor, keep: int = 1) -> torch.Tensor:
        """Hidden states of the last `keep` positions; histories: (rows, length) as of `pad` -> (rows, keep, hidden)."""
        length = histories.shape[1]
        x = self.items(histories) * math.sqrt(self.items.embedding_dim) + self.positions.weight[-length:]
        x = F.dropout(x, self.dropout, self.training)  # (rows, length, hidden)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        own = torch.eye(length, dtype=torch.bool, device=x.device)  # padding sees itself: a softmax needs something
        mask = ((histories != self.n_items)[:, None, None] & causal) | own  # (rows, 1, length, length)
        for block in self.blocks[:-1]:
            x = block(x, mask, length)
        return self.norm(self.blocks[-1](x, mask, keep))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., hidden) -> (..., items)."""
        return hidden @ self.items.weight[: self.n_items].T

    @torch.no_grad()
    def scores(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """Score of every item after each history (item ids, oldest first), without dropout: (rows, items)."""
        self.eval()
        return self.logits(self(self.pad(histories))[:, 0])

    def loss(self, histories: torch.Tensor, targets: torch.Tensor, every_position: bool) -> torch.Tensor:
        """Mean cross-entropy, nats; histories: (rows, length) as of `pad`; targets: (rows,)."""
        if not every_position:
            return F.cross_entropy(self.logits(self(histories)[:, 0]), targets)
        following = torch.cat([histories[:, 1:], targets[:, None]], dim=1)
        real = histories != self.n_items
        return F.cross_entropy(self.logits(self(histories, histories.shape[1])[real]), following[real])

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.json`, each atomically."""
        with atomic_file(Path(folder) / "model.safetensors", "wb") as f:
            f.write(to_safetensors({name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}))
        write_json(Path(folder) / "config.json", {"model_type": "sasrec"} | self.config)

    @classmethod
    def load(cls, folder: str | Path, flag: str = "cf_path") -> "SASRec":
        """The model that `save` wrote, ready to score; raises `UserError` if the folder holds anything else."""
        weights = require_file(require_file(folder, flag) / "model.safetensors", flag)
        config = read_json(Path(folder) / "config.json", flag)
        try:
            if config.pop("model_type", None) != "sasrec":
                raise ValueError("config.json is no SASRec's")
            model = cls(**config)
            model.load_state_dict(load_file(weights))
        except (TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: not a SASRec that sasrec.py saved ({error}); check --{flag}") from None
        return model.eval()


def sasrec(train: pl.DataFrame, valid: pl.DataFrame, catalog: Catalog, options: Options) -> Scorer:
    """Train, keep the epoch with the best valid NDCG@10, save it, and return its scores."""
    torch.manual_seed(options.seed)
    device = pick_device(options.device)
    sizes = {k: getattr(options, k) for k in ("max_history", "hidden_size", "num_layers", "num_heads", "dropout")}
    model = SASRec(n_items=catalog.n_items, **sizes).to(device)
    histories, targets = model.pad(train["history"].to_list()), train["target"].to_torch().to(device)
    parameters = list(model.parameters())
    matrices = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay}]
    vectors = [{"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(matrices + vectors, lr=options.learning_rate)
    sample = len(train) if options.sample == -1 else min(options.sample, len(train))
    steps = math.ceil(sample / options.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (options.epochs * steps))
    print(f"{sum(p.numel() for p in parameters):,} parameters, {steps} steps an epoch, on {device}")

    def score(histories: Sequence[Sequence[int]]) -> np.ndarray:
        return model.scores(histories).cpu().numpy()

    best, best_epoch, best_state = -1.0, 0, {}
    for epoch in range(1, options.epochs + 1):
        model.train()
        total = torch.zeros((), device=device)
        order = torch.randperm(len(targets))[:sample].to(device)
        for rows in tqdm(
            order.split(options.batch_size), f"epoch {epoch}/{options.epochs}", leave=False, mininterval=1
        ):
            loss = model.loss(histories[rows], targets[rows], options.loss_positions == "all")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        if not torch.isfinite(total):
            raise UserError(f"the loss of epoch {epoch} is {total.item()}; lower --learning_rate")
        ndcg = table(item_and_sid_ranks(score, valid, catalog)[0])["NDCG@10"]
        if ndcg > best:
            best, best_epoch, best_state = ndcg, epoch, {k: t.clone() for k, t in model.state_dict().items()}
        print(f"epoch {epoch}: loss {total.item() / steps:.4f}, valid NDCG@10 {ndcg:.4f} (best {best:.4f})", flush=True)
        if options.early_stop and epoch - best_epoch >= options.early_stop:
            break
    model.load_state_dict(best_state)
    model.save(options.output_dir)
    return score


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
    if options.model == "sasrec":
        score = sasrec(train, valid, catalog, options)
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
