"""Ranking metrics from the rank of each row's one target: HR, NDCG, MRR, with bootstrap intervals.

A rank is 0 for the first place, `MISSED` where the target is not in the list. With one relevant item:

    HR@K   = [rank < K]
    NDCG@K = [rank < K] / log2(rank + 2)       (Järvelin & Kekäläinen 2002; the ideal DCG is 1)
    MRR    = 1 / (rank + 1), 0 where missed, over the whole list

For example, the ranks 0 and 3 have HR@3 = 0.5 and NDCG@5 = (1 + 1 / log2(5)) / 2 = 0.715. Sums run in float64 over all
rows at once, so they do not depend on the number of processes.

By SID, any item that shares the target's SID is a hit, as published tables count. By item, a SID with several items
expands in the catalog's fixed order, and only the target is a hit.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from minionerec.catalog.catalog import Catalog  # imports torch

CUTOFFS = (1, 3, 5, 10, 20, 50)
MISSED = np.iinfo(np.int64).max


def cutoffs_of(beams: int) -> list[int]:
    """The K that a list of `beams` places can answer: those of `CUTOFFS` up to `beams`, and min(10, beams)."""
    return sorted({k for k in CUTOFFS if k <= beams} | {min(10, beams)})


def sid_and_item_ranks(
    predicted: np.ndarray,
    targets: Sequence[int],
    catalog: "Catalog",
    seen: Sequence[Sequence[int]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of each row's target in its list of SIDs.

    predicted: (rows, beams) rows of `catalog.sids`, best first, -1 where a list is shorter; targets: (rows,) item ids;
    seen: for each row, items that its SIDs do not expand to (a target among them is missed by item).
    Returns (rank of the target's SID among SIDs, rank of the target among the items that the SIDs expand to).
    """
    targets = np.asarray(targets, dtype=np.int64)
    hits = predicted == catalog.sid_of_item[targets][:, None]
    hit, place = hits.any(axis=1), hits.argmax(axis=1)
    group_size = np.array([len(items) for items in catalog.items_of_sid] + [0])  # [-1] is the padding's
    sizes = group_size[predicted]
    before = sizes.cumsum(axis=1) - sizes
    place_in_group = np.zeros(catalog.n_items, dtype=np.int64)
    for items in catalog.items_of_sid:
        place_in_group[items] = range(len(items))
    item_place = np.take_along_axis(before, place[:, None], axis=1)[:, 0] + place_in_group[targets]
    item_hit = hit.copy()
    for row, items in enumerate(seen if seen is not None else ()):
        others = np.unique(np.asarray(items, dtype=np.int64))
        item_hit[row] &= targets[row] not in others
        sid_row = catalog.sid_of_item[others]
        same_sid = sid_row == catalog.sid_of_item[targets[row]]
        earlier = same_sid & (place_in_group[others] < place_in_group[targets[row]])
        item_place[row] -= int((earlier | np.isin(sid_row, predicted[row, : place[row]])).sum())
    return np.where(hit, place, MISSED), np.where(item_hit, item_place, MISSED)


def illegal(predicted: np.ndarray, catalog: "Catalog") -> int:
    """How many predictions are no SID of the catalog or repeat one of their row; -1 is an empty place."""
    ranked = np.sort(predicted, axis=1)
    repeated = (ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)
    return int(repeated.sum() + ((predicted < -1) | (predicted >= len(catalog.sids))).sum())


def ranks_of_scores(scores: np.ndarray, targets: Sequence[int], order: np.ndarray | None = None) -> np.ndarray:
    """Rank of each target under `scores` (rows, items). Refuses NaN.

    order: (items,) of equal scores the lower value is first; by default the id.
    """
    if scores.size and np.isnan(scores.min()):
        raise ValueError(f"scores of row {int(np.isnan(scores).any(axis=1).argmax())} contain NaN")
    order, targets = np.arange(scores.shape[1]) if order is None else order, np.asarray(targets)
    own = scores[np.arange(len(scores)), targets][:, None]
    return (scores > own).sum(axis=1) + ((scores == own) & (order < order[targets][:, None])).sum(axis=1)


def table(ranks: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """`{"HR@1": …, "NDCG@1": …, …, "MRR": …}`, means over rows, each in [0, 1]."""
    return {name: float(values.mean()) for name, values in values_of(ranks, cutoffs).items()}


def values_of(ranks: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, np.ndarray]:
    """The metrics of each row, (rows,) each: `table` has their means."""
    ranks = np.asarray(ranks)
    with np.errstate(over="ignore"):
        gain = np.where(ranks == MISSED, 0.0, 1.0 / np.log2(np.minimum(ranks, 2**40) + 2.0))
        reciprocal = np.where(ranks == MISSED, 0.0, 1.0 / (np.minimum(ranks, 2**40) + 1.0))
    result = {}
    for k in cutoffs:
        result[f"HR@{k}"] = ranks < k
        result[f"NDCG@{k}"] = gain * (ranks < k)
    return result | {"MRR": reciprocal}


def bootstrap(ranks: np.ndarray, seed: int, cutoffs: Sequence[int] = CUTOFFS, rounds: int = 1000) -> dict[str, list]:
    """95 % percentile intervals `{"HR@1": [low, high], …}` over rows drawn with replacement."""
    rng = np.random.default_rng(seed)
    # Rows with equal ranks are interchangeable: drawing rows is drawing counts of distinct ranks.
    distinct, counts = np.unique(ranks, return_counts=True)
    drawn = rng.multinomial(len(ranks), counts / len(ranks), size=rounds) / len(ranks)  # (rounds, distinct)
    return {
        name: [float(x) for x in np.percentile(drawn @ values, [2.5, 97.5])]
        for name, values in values_of(distinct, cutoffs).items()
    }


def interval_of_mean(values: np.ndarray, seed: int, rounds: int = 1000) -> list[float]:
    """95 % percentile interval of the mean of `values` (rows,) over rows drawn with replacement.

    Of the difference of two models' `values_of` on the same rows, it is the paired interval.
    """
    distinct, counts = np.unique(values, return_counts=True)  # equal values are interchangeable
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=rounds) / len(values)
    return [float(x) for x in np.percentile(drawn @ distinct, [2.5, 97.5])]


def format_table(rows: dict[str, dict[str, float]], cutoffs: Sequence[int]) -> str:
    """A text table with one line for each of `rows`: HR and NDCG at `cutoffs`."""
    names = [f"{metric}@{k}" for metric in ("HR", "NDCG") for k in cutoffs]
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{name:>10}" for name in names)]
    for label, values in rows.items():
        lines.append(f"{label:<{width}}" + "".join(f"{values[name]:>10.4f}" for name in names))
    return "\n".join(lines)
