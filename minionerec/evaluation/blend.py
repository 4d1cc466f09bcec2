"""A generative model and collaborative baselines, blended: the sum of weighted log-probabilities over candidates.

    score(item) = log p_generative(SID of item) + sum over baselines b of w_b * log p_b(item)

Candidates of a user are the items of the generative model's beams and the best items of each baseline. The generative
scores of candidates that are in no beam are computed exactly (minionerec/decoding/scoring.py). Weights are chosen on
valid rows. Adding the scores of models with equal weights is EnsRec's blend (arXiv 2512.17820).
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minionerec.catalog.catalog import Catalog
from minionerec.evaluation.metrics import MISSED, table

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)  # tried for each baseline


class Candidates(NamedTuple):
    """Candidate items of each user and their log-probabilities under each model."""

    items: np.ndarray  # (users, candidates) item ids, -1 where there are no more
    scores: np.ndarray  # (users, candidates, models) nats, the generative model first; -inf where there are no more


def top_rows(scores: np.ndarray, catalog: Catalog, count: int, excluded: Sequence[Sequence[int]] | None) -> np.ndarray:
    """The SIDs of the `count` best items: (users, count) rows of `catalog.sids`; `excluded` items are left out."""
    scores = scores.copy()
    if excluded is not None:
        _mask(scores, excluded)
    count = min(count, scores.shape[1])
    best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    return catalog.sid_of_item[best]


def _mask(scores: np.ndarray, excluded: Sequence[Sequence[int]]) -> None:
    row = np.repeat(np.arange(len(excluded)), [len(items) for items in excluded])
    scores[row, np.array([item for items in excluded for item in items], dtype=np.int64)] = -np.inf


def missing_rows(beams: np.ndarray, others: np.ndarray, n_rows: int) -> np.ndarray:
    """Rows of `others` (users, m) that are not among `beams` (users, n), each once: (users, widest), -1 padded."""
    wanted = np.zeros((len(beams), n_rows + 1), dtype=bool)
    np.put_along_axis(wanted, others, True, axis=1)
    np.put_along_axis(wanted, beams, False, axis=1)  # the padding -1 is the last column
    counts = wanted[:, :n_rows].sum(axis=1)
    found = np.full((len(beams), max(1, counts.max())), -1)
    found[np.arange(found.shape[1]) < counts[:, None]] = np.nonzero(wanted[:, :n_rows])[1]
    return found


def gather(
    rows: np.ndarray,
    scores: np.ndarray,
    baselines: Sequence[np.ndarray],
    catalog: Catalog,
    excluded: Sequence[Sequence[int]] | None,
) -> Candidates:
    """Expand SIDs to items.

    rows, scores: (users, n) SIDs, -1 padded, and their log-probabilities; baselines: each (users, items) scores, whose
    softmax is the baseline's distribution; excluded: items that no user gets.
    """
    dense = np.full((len(rows), len(catalog.sids) + 1), -np.inf)
    np.put_along_axis(dense, rows, np.where(rows >= 0, scores, -np.inf), axis=1)
    generative = dense[:, catalog.sid_of_item]  # (users, items)
    if excluded is not None:
        _mask(generative, excluded)
    counts = np.isfinite(generative).sum(axis=1)
    items = np.full((len(rows), max(1, counts.max())), -1)
    items[np.arange(items.shape[1]) < counts[:, None]] = np.nonzero(np.isfinite(generative))[1]
    parts = [generative]
    for values in baselines:
        shifted = values - values.max(axis=1, keepdims=True)
        parts.append(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
    taken = [np.take_along_axis(part, np.maximum(items, 0), axis=1) for part in parts]
    return Candidates(items, np.where(items[..., None] >= 0, np.stack(taken, axis=-1), -np.inf))


def ranks(candidates: Candidates, weights: Sequence[float], targets: np.ndarray) -> np.ndarray:
    """The rank of each target under the blend, `MISSED` where it is no candidate; ties rank by item id."""
    total = blended(candidates, weights)
    own = candidates.items == np.asarray(targets)[:, None]
    value = np.where(own, total, -np.inf).max(axis=1, keepdims=True)
    earlier = (total == value) & (candidates.items < np.asarray(targets)[:, None]) & (candidates.items >= 0)
    rank = ((total > value) | earlier).sum(axis=1)
    return np.where(own.any(axis=1), rank, MISSED)


def blended(candidates: Candidates, weights: Sequence[float]) -> np.ndarray:
    """(users, candidates) blended scores; the generative model's weight is 1."""
    real = candidates.items >= 0
    parts = np.where(real[..., None], candidates.scores, 0.0)
    return np.where(real, parts @ np.array([1.0, *weights]), -np.inf)


def choose_weights(candidates: Candidates, targets: np.ndarray, metric: str = "NDCG@10") -> tuple[float, ...]:
    """The weights with the best `metric` on validation rows; of equal ones the smallest."""
    options = list(itertools.product(WEIGHTS, repeat=candidates.scores.shape[-1] - 1))
    values = [table(ranks(candidates, weights, targets))[metric] for weights in options]
    return options[int(np.argmax(values))]
