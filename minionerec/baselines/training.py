"""Training of the sequential baselines, and the ranks of a baseline's targets.

Every baseline ranks all items of the catalog. Test is scored once, with the epoch that was best on valid.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from tqdm import tqdm

from minionerec.baselines.models import MODELS, SequentialModel
from minionerec.baselines.options import BaselineOptions, filter_heights
from minionerec.catalog.catalog import Catalog, target_counts
from minionerec.common.devices import pick_device
from minionerec.common.errors import UserError
from minionerec.evaluation.metrics import ranks_of_scores, table

ROWS_AT_ONCE = 1024  # rows scored at a time: scores are (rows, items)
Scorer = Callable[[Sequence[Sequence[int]]], np.ndarray]  # histories, oldest first -> scores (rows, items)


class Fit(NamedTuple):
    """A trained model with the weights of its best epoch."""

    model: SequentialModel
    ndcg: float  # valid NDCG@10 by item
    epoch: int  # counted from 1


def build(options: BaselineOptions, n_items: int) -> SequentialModel:
    """The untrained model of `options`; its weights depend only on the seed."""
    torch.manual_seed(options.seed)
    kind = MODELS[options.model]
    values = asdict(options) | {"filter_sizes": filter_heights(options.filter_sizes)}
    common = ("max_history", "hidden_size", "dropout", "tie_embeddings")
    return kind(n_items=n_items, **{name: values[name] for name in (*common, *kind.sizes)})


def fit(options: BaselineOptions, train: pl.DataFrame, valid: pl.DataFrame, catalog: Catalog) -> Fit:
    """Train the model of `options` and keep the epoch with the best valid NDCG@10. Test is not used."""
    negatives = options.negatives if options.loss == "bce" else 0
    if negatives and catalog.n_items <= options.max_history + 1:
        raise UserError(
            f"--loss bce: {catalog.n_items} items may all be in one row, so there may be no negative; use ce"
        )
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
    sample = len(train) if options.rows_per_epoch == -1 else min(options.rows_per_epoch, len(train))
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
