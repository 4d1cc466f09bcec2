"""Two protocols for the items that a user already has, both reported by every evaluation.

    all      every item of the catalog can be recommended (tables of MiniOneRec, RecBole, LETTER)
    unseen   the user's earlier items are left out (tables of RecTools, eSASRec and most recommenders in use)

`seen` of a row is everything before its target, not the window that a model reads. A target that the user already has
is missed under `unseen`. A SID is left out if all its items are seen.

`by_beams` ranks the targets for a model that lists SIDs, `by_scores` for one that scores every item; `report` turns
either into what `metrics.json` holds:

    {"rows": …,
     "item": {…}, "sid": {…}, "intervals": {…}, "coverage": {…}, "distinct_first": …, "slices": {…},   of all items
     "unseen": {the same keys},                                                                       of unseen items
     "headline": "all" or "unseen", "repeats": {"train": …, "test": …}, "seen": {"longest": …, "looks_cut": …}}

`coverage` is the share of the catalog on the first places of any row, `distinct_first` the number of items on a first
place, `repeats` the share of rows whose target is seen.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from minionerec.catalog.catalog import Catalog, target_counts
from minionerec.common.files import atomic_file
from minionerec.evaluation.metrics import CUTOFFS, MISSED, bootstrap, ranks_of_scores, sid_and_item_ranks, table

PROTOCOLS = ("all", "unseen")
FEW_REPEATS = 0.01  # below this share of repeated targets in train, `unseen` is the headline
TOP = 10  # places for coverage
HISTORY_LENGTHS = {"0": 0, "1-2": 1, "3-5": 3, "6-10": 6, "11-20": 11, "21-50": 21, "51+": 51}  # from this many items
POPULARITY = ("head", "middle", "tail", "new")
LABELS = (*POPULARITY, *HISTORY_LENGTHS)


class Ranks(NamedTuple):
    """Where each row's target is ranked, and what is ranked first."""

    item: np.ndarray  # (rows,) rank of the target among items, MISSED where it is not in the list
    sid: np.ndarray  # (rows,) rank of the target's SID among SIDs
    top: np.ndarray  # (rows, TOP) the first items, -1 where there are fewer


def of_beams(
    predicted: np.ndarray, targets: Sequence[int], catalog: Catalog, seen: Sequence[Sequence[int]] | None = None
) -> Ranks:
    """Ranks from SID lists: predicted (rows, beams) rows of `catalog.sids`, best first, -1 where a list is shorter.

    seen: each row's seen items, under the protocol `unseen`; the lists must come from a search without their SIDs.
    """
    sid, item = sid_and_item_ranks(predicted, targets, catalog, seen)
    top = np.full((len(predicted), TOP), -1, dtype=np.int64)
    for row, sid_rows in enumerate(predicted[:, :TOP].tolist()):  # each SID has at least one item that is ranked
        hidden = set(seen[row]) if seen is not None else ()
        first = [i for s in sid_rows if s >= 0 for i in catalog.items_of_sid[s] if i not in hidden]
        top[row, : len(first[:TOP])] = first[:TOP]
    return Ranks(item, sid, top)


def of_scores(
    scores: np.ndarray, targets: Sequence[int], catalog: Catalog, seen: Sequence[Sequence[int]] | None = None
) -> Ranks:
    """Ranks from scores (rows, items): of equal scores the lower id is first; a SID scores as its best item.

    seen: each row's seen items, under the protocol `unseen`. Raises `ValueError` for NaN.
    """
    targets = np.asarray(targets, dtype=np.int64)
    if seen is not None:
        scores = scores.astype(np.result_type(scores, np.float32))  # a copy
        lengths = [len(items) for items in seen]
        scores[np.repeat(np.arange(len(scores)), lengths), np.concatenate([[], *seen]).astype(np.int64)] = -np.inf
    item = _ranks(scores, targets)
    sid = item if len(catalog.sids) == catalog.n_items else _sid_ranks(scores, targets, catalog)
    return Ranks(item, sid, _first_places(scores))


def _ranks(scores: np.ndarray, targets: np.ndarray, order: np.ndarray | None = None) -> np.ndarray:
    """`ranks_of_scores`, and `MISSED` where the target's score is -inf."""
    missed = scores[np.arange(len(scores)), targets] == -np.inf
    return np.where(missed, MISSED, ranks_of_scores(scores, targets, order))


def _sid_ranks(scores: np.ndarray, targets: np.ndarray, catalog: Catalog) -> np.ndarray:
    """As `_ranks`, of the targets' SIDs: the first item of a SID gets the SID's best score, the others none."""
    shared = [items for items in catalog.items_of_sid if len(items) > 1]
    items, starts = np.concatenate(shared), np.cumsum([0] + [len(items) for items in shared[:-1]])
    best = scores.copy()
    best[:, items] = -np.inf
    best[:, items[starts]] = np.maximum.reduceat(scores[:, items], starts, axis=1)
    first = np.array([items[0] for items in catalog.items_of_sid])
    return _ranks(best, first[catalog.sid_of_item[targets]], catalog.sid_of_item)


def _first_places(scores: np.ndarray) -> np.ndarray:
    """The best items of each row, as (rows, TOP); of equal scores the lower id is first, -1 for -inf."""
    top = np.full((len(scores), TOP), -1, dtype=np.int64)
    places = min(TOP, scores.shape[1])
    bound = np.partition(scores, -places, axis=1)[:, -places]
    for row, (values, least) in enumerate(zip(scores, bound, strict=True)):
        found = np.flatnonzero((values >= least) & (values > -np.inf))
        found = found[np.argsort(-values[found], kind="stable")][:places]
        top[row, : len(found)] = found
    return top


def by_beams(predicted: Mapping[str, np.ndarray], rows: pl.DataFrame, catalog: Catalog) -> dict[str, Ranks]:
    """{protocol: Ranks} from the SID lists of each protocol, (rows, beams) each; rows: with columns target and seen."""
    targets, seen = rows["target"].to_list(), {"all": None, "unseen": rows["seen"].to_list()}
    return {name: of_beams(lists, targets, catalog, seen[name]) for name, lists in predicted.items()}


def by_scores(
    score: Callable[[list[list[int]]], np.ndarray],
    rows: pl.DataFrame,
    catalog: Catalog,
    rows_at_once: int = 1024,
    names: Sequence[str] = PROTOCOLS,
) -> dict[str, Ranks]:
    """{protocol: Ranks} from `score`, which maps histories (oldest first) to scores (histories, items).

    rows: with columns history, target and seen; each is scored once. names: the protocols that are wanted.
    """
    parts: dict[str, list[Ranks]] = {name: [] for name in names}
    for part in rows.iter_slices(rows_at_once):
        scores, targets = score(part["history"].to_list()), part["target"].to_list()
        for name, ranks in parts.items():
            seen = part["seen"].to_list() if name == "unseen" else None
            ranks.append(of_scores(scores, targets, catalog, seen))
    return {name: Ranks(*map(np.concatenate, zip(*each, strict=True))) for name, each in parts.items()}


# ------------------------------------------------------------------------------------------------ the headline


def repeats(rows: pl.DataFrame) -> float:
    """The share of rows whose target is among the row's seen items, in [0, 1]."""
    return float(rows.select(pl.col("seen").list.contains(pl.col("target")).mean()).item())


def headline(train: pl.DataFrame | None) -> str:
    """The protocol to quote: `unseen` where targets of train hardly ever repeat, `all` otherwise or without train."""
    return "unseen" if train is not None and repeats(train) < FEW_REPEATS else "all"


def looks_cut(rows: pl.DataFrame) -> bool:
    """Whether the lists of seen items look like a window: at least 1 % of the rows, and 2, have the greatest length."""
    lengths = rows["seen"].list.len()
    return int((lengths == lengths.max()).sum()) >= max(2, 0.01 * len(rows))


# ------------------------------------------------------------------------------------------------ slices of rows


def popularity_of_items(train: pl.DataFrame, n_items: int) -> np.ndarray:
    """`head`, `middle` or `tail`, each with a third of train's targets, or `new` for items that train never has.

    Items are sorted by count; an item belongs to the third in which it begins. For example, counts of 4, 3, 1, 1 and 0
    give head, middle, tail, tail, and new for the last one unless it is in a history.
    """
    counts = np.array(target_counts(train, n_items))
    order = np.argsort(-counts, kind="stable")
    before = np.empty_like(counts)
    before[order] = counts[order].cumsum() - counts[order]
    third = np.minimum(3 * before // max(counts.sum(), 1), 2)
    known = np.zeros(n_items, dtype=bool)
    known[train["seen"].explode().drop_nulls().unique().to_numpy()] = True
    return np.where((counts > 0) | known, np.array(POPULARITY[:3])[third], "new")


def slices_of(rows: pl.DataFrame, train: pl.DataFrame | None, n_items: int) -> dict[str, np.ndarray]:
    """Labels of each row: `history` (number of seen items) and, where train is given, `popularity` of the target."""
    edges = list(HISTORY_LENGTHS.values())
    lengths = rows["seen"].list.len().to_numpy()
    labels = {"history": np.array(list(HISTORY_LENGTHS))[np.digitize(lengths, edges) - 1]}
    if train is not None:
        labels["popularity"] = popularity_of_items(train, n_items)[rows["target"].to_numpy()]
    return labels


# ------------------------------------------------------------------------------------------------ the report


def report(
    ranks: Mapping[str, Ranks],
    rows: pl.DataFrame,
    train: pl.DataFrame | None,
    catalog: Catalog,
    seed: int,
    cutoffs: Sequence[int] = CUTOFFS,
) -> dict:
    """What `metrics.json` holds. ranks: by protocol, `all` at least; rows, train: with the columns target and seen."""
    labels = slices_of(rows, train, catalog.n_items)
    found = {name: _of_protocol(ranks[name], labels, catalog, seed, cutoffs) for name in PROTOCOLS if name in ranks}
    result = {"rows": len(rows)} | found["all"]
    if "unseen" in found:
        result["unseen"] = found["unseen"]
    return result | {
        "headline": headline(train) if "unseen" in found else "all",
        "repeats": {"train": None if train is None else repeats(train), "test": repeats(rows)},
        "seen": {"longest": int(rows["seen"].list.len().max()), "looks_cut": looks_cut(rows)},
    }


def _of_protocol(
    ranks: Ranks, labels: Mapping[str, np.ndarray], catalog: Catalog, seed: int, cutoffs: Sequence[int]
) -> dict:
    shown, first = (np.unique(items[items >= 0]) for items in (ranks.top, ranks.top[:, 0]))
    sids = np.unique(catalog.sid_of_item[shown])
    return {
        "item": table(ranks.item, cutoffs),
        "sid": table(ranks.sid, cutoffs),
        "intervals": bootstrap(ranks.item, seed, cutoffs),
        "coverage": {f"items@{TOP}": len(shown) / catalog.n_items, f"sids@{TOP}": len(sids) / len(catalog.sids)},
        "distinct_first": len(first),
        "slices": {kind: _slices(ranks.item, values, cutoffs) for kind, values in labels.items()},
    }


def _slices(ranks: np.ndarray, labels: np.ndarray, cutoffs: Sequence[int]) -> dict[str, dict]:
    """`{label: {"rows", "HR@10", "NDCG@10"}}`, for fewer than 10 places at the last cutoff."""
    k = max(cutoff for cutoff in cutoffs if cutoff <= TOP)
    result = {}
    for name in LABELS:
        own = ranks[labels == name]
        if len(own):
            values = table(own, [k])
            result[name] = {"rows": len(own), f"HR@{k}": values[f"HR@{k}"], f"NDCG@{k}": values[f"NDCG@{k}"]}
    return result


# ------------------------------------------------------------------------------------------------ ranks on disk


def write_ranks(
    path: str | Path, ranks: Mapping[str, Ranks], rows: pl.DataFrame, train: pl.DataFrame | None, n_items: int
) -> None:
    """Write the test rows for paired comparisons and the report, in row order.

    `<protocol>_item`, `<protocol>_sid` (rows,) and `<protocol>_top` (rows, TOP) of each protocol, the targets as `target`,
    and the labels of the slices as `slice_<kind>`.
    """
    arrays = {f"{name}_{kind}": getattr(each, kind) for name, each in ranks.items() for kind in ("item", "sid")}
    arrays |= {f"{name}_top": each.top.astype(np.int32) for name, each in ranks.items()}
    arrays |= {f"slice_{kind}": labels for kind, labels in slices_of(rows, train, n_items).items()}
    arrays["target"] = rows["target"].to_numpy()
    with atomic_file(path, "wb") as f:
        np.savez_compressed(f, **arrays)
