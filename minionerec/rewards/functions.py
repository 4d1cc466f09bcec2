"""TODO."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from minionerec.catalog.catalog import Catalog
from minionerec.catalog.sids import canonical_sid, split_sid

Reward = Callable[..., Sequence[float]]
Scorer = Callable[[Sequence[Sequence[int]]], np.ndarray]  # histories, oldest first -> scores (rows, items), any array


def rule(completions: list[str], target_sid: list[str], **_) -> np.ndarray:
    """1 where the SID is the target's, else 0 (ReRe, arXiv 2510.12211)."""
    return np.array([canonical_sid(text) for text in completions]) == np.array(target_sid)


def ndcg(completions: list[str], target_sid: list[str], num_generations: int, **_) -> np.ndarray:
    """The rank-aware penalty of ReRe (arXiv 2510.12211): wrong answers cost more the higher they stand.

    In a group that holds the target, the wrong completion at place i (from 0) gets -w_i / sum_j w_j with
    w_i = 1 / log2(i + 2), summed over the whole group, and the target's 0. In any other group all get 0. Range [-1, 0].
    """
    hits = rule(completions, target_sid).reshape(-1, num_generations)  # (groups, completions)
    weights = 1 / np.log2(np.arange(num_generations) + 2)
    wrong_beside_a_hit = ~hits & hits.any(axis=1, keepdims=True)
    return np.where(wrong_beside_a_hit, -weights / weights.sum(), 0.0).ravel()


def prefix(completions: list[str], target_sid: list[str], catalog: Catalog, **_) -> np.ndarray:
    """Leading levels that the SID shares with the target's, over the levels of the longer one. Range [0, 1].

    1 for the target's SID alone; 0 for a text that is no SID of the catalog.
    """
    levels = _levels(catalog)
    found, target = levels[_rows(completions, catalog)], levels[_rows(target_sid, catalog)]  # (rows, depth)
    shared = np.cumprod((found == target) & (target >= 0), axis=1).sum(axis=1)
    return shared / np.maximum((found >= 0).sum(axis=1), (target >= 0).sum(axis=1))


def semantic(
    completions: list[str], target_item: list[int], catalog: Catalog, embeddings: np.ndarray, **_
) -> np.ndarray:
    """Cosine of the text embeddings of the SID's first item and of the target item. Range [-1, 1]; no item: -1.

    embeddings: (items, dim), rows of length 1.
    """
    rows = _rows(completions, catalog)
    cosine = (embeddings[_first_items(catalog)[rows]] * embeddings[np.asarray(target_item)]).sum(axis=1)
    return np.where(rows >= 0, cosine, -1.0)


def sasrec(
    completions: list[str], history_items: list[list[int]], catalog: Catalog, collaborative: Scorer, **_
) -> np.ndarray:
    """log softmax over the catalog of the collaborative model's score of the SID's first item, given the history.

    Nats, range (-inf, 0]; no item: the least value of any item for this history. The logarithm of the normaliser is
    the same for a whole group, so advantages are those of the plain scores. A row without history (title -> SID) gets
    0 for every completion: nothing collaborative is known of it.
    """
    rows = _rows(completions, catalog)
    histories = {tuple(history): None for history in history_items if len(history)}
    place = {history: i for i, history in enumerate(histories)}
    if not histories:
        return np.zeros(len(rows))
    scores = np.asarray(collaborative([list(history) for history in histories]), dtype=np.float64)  # (histories, items)
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    history = np.array([place.get(tuple(history), -1) for history in history_items])
    values = np.where(rows >= 0, log_probs[history, _first_items(catalog)[rows]], log_probs.min(axis=1)[history])
    return np.where(history >= 0, values, 0.0)


REWARDS: dict[str, Reward] = {f.__name__: f for f in (rule, ndcg, prefix, semantic, sasrec)}
ALIASES = {"ranking": ["rule", "ndcg"], "ranking_only": ["ndcg"]}


def _rows(sids: Sequence[str], catalog: Catalog) -> np.ndarray:
    """Rows of `catalog.sids`, -1 for a text that is none of them."""
    return np.array([catalog.row_of_sid.get(canonical_sid(sid), -1) for sid in sids], dtype=np.int64)


@functools.lru_cache(maxsize=1)
def _first_items(catalog: Catalog) -> np.ndarray:
    """(sids + 1,) the item that each row stands for; the last is the place of row -1 and never used."""
    return np.array([items[0] for items in catalog.items_of_sid] + [0])


@functools.lru_cache(maxsize=1)
def _levels(catalog: Catalog) -> np.ndarray:
    """(sids + 1, depth) a number for each level token, -1 after the end; the last row is that of no SID."""
    numbers: dict[str, int] = {}
    codes = [[numbers.setdefault(token, len(numbers)) for token in split_sid(sid)] for sid in catalog.sids]
    levels = np.full((len(codes) + 1, max(map(len, codes))), -1)
    for row, code in enumerate(codes):
        levels[row, : len(code)] = code
    return levels
