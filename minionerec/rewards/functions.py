"""Reward functions of RL: from the completions of a batch to one number each.

A reward is called with keyword arguments and takes the ones that it names (registry.py lists them). A batch has
(prompts x num_generations) completions; the completions of a prompt are neighbours, most probable first.

    row               row of each completion in `catalog.sids`; -1 for a text that is no SID of the catalog
    target_row        row of each completion's target
    target_item       item id of the target
    history_items     item ids that the prompt shows, oldest first; empty for a prompt without a history
    num_generations   completions of a prompt: the size of a group
    catalog           `minionerec.catalog.catalog.Catalog`
    embeddings        (items, dim) item embeddings, rows of length 1
    baseline          histories -> scores (histories, items) of a trained baseline

The examples below use the catalog of `>>> catalog = Catalog(["<a_0><b_0>", "<a_0><b_1>", "<a_1><b_0>"])`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from minionerec.catalog.catalog import Catalog

Reward = Callable[..., Sequence[float]]
Scorer = Callable[[Sequence[Sequence[int]]], np.ndarray]  # histories, oldest first -> scores (histories, items)

DENSE_WEIGHT = 0.1  # of the dense term, added to rule and ndcg
SHARES, STEPS = (0, 1 / 3, 2 / 3, 1), (0, 0.2, 0.5, 1)  # dense: share of leading levels that match -> reward


def rule(row: Sequence[int], target_row: Sequence[int], **_) -> np.ndarray:
    """Exact match (ReRe, arXiv 2510.12211): 1 if the SID is the target's, else 0. Range {0, 1}.

    >>> rule(row=[0, 1], target_row=[0, 0]).astype(float)
    array([1., 0.])
    """
    return np.equal(row, target_row)


def ndcg(row: Sequence[int], target_row: Sequence[int], num_generations: int, **_) -> np.ndarray:
    """Rank-aware penalty of wrong completions (ReRe, arXiv 2510.12211).

    In a group that contains the target: −w_i / Σ w for the wrong completion at rank i (from 0), w_i = 1/log2(i + 2),
    the sum over the whole group; 0 for the target. In any other group: 0 for all. Range [−1, 0].

    >>> ndcg(row=[1, 0, 2], target_row=[0, 0, 0], num_generations=3).round(2)
    array([-0.47,  0.  , -0.23])
    """
    hits = rule(row, target_row).reshape(-1, num_generations)  # (groups, completions)
    weights = 1 / np.log2(np.arange(num_generations) + 2)
    wrong_beside_a_hit = ~hits & hits.any(axis=1, keepdims=True)
    return np.where(wrong_beside_a_hit, -weights / weights.sum(), 0.0).ravel()


def prefix(row: Sequence[int], target_row: Sequence[int], catalog: "Catalog", **_) -> np.ndarray:
    """Leading levels that match the target's SID, divided by the levels of the longer of the two SIDs. Range [0, 1].

    1 only for the target's SID; 0 for a text that is no SID.

    >>> prefix(row=[0, 1, 2], target_row=[0, 0, 0], catalog=catalog)
    array([1. , 0.5, 0. ])
    """
    codes = _codes(catalog)
    found, target = codes[np.asarray(row)], codes[np.asarray(target_row)]  # (rows, depth)
    matching = np.cumprod((found == target) & (target >= 0), axis=1).sum(axis=1)
    return matching / np.maximum((found >= 0).sum(axis=1), (target >= 0).sum(axis=1))


def semantic(
    row: Sequence[int], target_item: Sequence[int], catalog: "Catalog", embeddings: np.ndarray, **_
) -> np.ndarray:
    """Cosine of the embeddings of the SID's first item and of the target. Range [−1, 1]; −1 for a text that is no SID.

    >>> semantic(row=[0, 1], target_item=[0, 0], catalog=catalog, embeddings=np.array([[1, 0], [0.6, 0.8], [0, 1]]))
    array([1. , 0.6])
    """
    row = np.asarray(row)
    cosine = (embeddings[_first_items(catalog)[row]] * embeddings[np.asarray(target_item)]).sum(axis=1)
    return np.where(row >= 0, cosine, -1.0)


def sasrec(
    row: Sequence[int], history_items: Sequence[Sequence[int]], catalog: "Catalog", baseline: Scorer, **_
) -> np.ndarray:
    """Log-probability of the SID's first item under a trained baseline (any of sasrec.py's), given the history.

    log softmax over all items of the baseline's scores, in nats. Range (−∞, 0]; the lowest value of the history for a
    text that is no SID. Rows without a history (title2sid) get 0 for every completion: the baseline has no input.
    The normaliser is the same for a whole group, so advantages equal those of the plain scores.

    >>> sasrec(row=[0, 1], history_items=[[2], [2]], catalog=catalog, baseline=lambda h: np.log([[0.5, 0.3, 0.2]]))
    array([-0.69314718, -1.2039728 ])
    """
    row = np.asarray(row)
    scores, history = _scores(history_items, baseline)
    if scores is None:
        return np.zeros(len(row))
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    values = np.where(row >= 0, log_probs[history, _first_items(catalog)[row]], log_probs.min(axis=1)[history])
    return np.where(history >= 0, values, 0.0)


def dense(
    row: Sequence[int],
    target_row: Sequence[int],
    target_item: Sequence[int],
    history_items: Sequence[Sequence[int]],
    num_generations: int,
    catalog: "Catalog",
    baseline: Scorer,
    **_,
) -> np.ndarray:
    """rule + ndcg + 0.1 · [g · p + (1 − g) · s]: a signal also for groups that do not contain the target. Range [−1, 1.1].

    - p: percentile of the completion's first item among its group by the baseline's score: completions with a lower
      score, plus half of the others with the same score, divided by num_generations − 1. Range [0, 1].
    - s: steps by the share of leading levels that match (`prefix`): 0, 0.2, 0.5, 1 at shares 0, 1/3, 2/3, 1, and linear
      between them, so that SIDs of three levels get 0, 0.2, 0.5, 1 and other depths fall between.
    - g = 1 / log2(r + 2), r the number of items that the baseline scores above the target: how far the baseline is
      trusted for this history. Range (0, 1]; 0 for rows without a history.

    >>> scores = lambda histories: np.array([[3.0, 1.0, 2.0]])  # the target, item 0, has r = 0 and g = 1
    >>> dense([1, 2], [0, 0], [0, 0], [[1], [1]], num_generations=2, catalog=catalog, baseline=scores)
    array([0. , 0.1])
    """
    row, first = np.asarray(row), _first_items(catalog)
    steps = np.interp(prefix(row, target_row, catalog), SHARES, STEPS)
    trust, percentile = np.zeros(len(row)), np.zeros(len(row))
    scores, history = _scores(history_items, baseline)
    if scores is not None:
        score = np.where(row >= 0, scores[history, first[row]], -np.inf).reshape(-1, num_generations)
        one, other = score[:, :, None], score[:, None, :]  # (groups, completions, completions)
        same = (one == other).sum(axis=2) - 1
        percentile = (((one > other).sum(axis=2) + same / 2) / (num_generations - 1)).ravel()
        heads = slice(None, None, num_generations)  # a group shares its history and its target
        group_scores = scores[history[heads]]  # (groups, items)
        target = np.take_along_axis(group_scores, np.asarray(target_item)[heads, None], axis=1)
        rank = (group_scores > target).sum(axis=1).repeat(num_generations)
        trust = np.where(history >= 0, 1 / np.log2(rank + 2), 0.0)
    dense_term = trust * percentile + (1 - trust) * steps
    return rule(row, target_row) + ndcg(row, target_row, num_generations) + DENSE_WEIGHT * dense_term


REWARDS: dict[str, Reward] = {f.__name__: f for f in (rule, ndcg, prefix, semantic, sasrec, dense)}
ALIASES = {"ranking": ["rule", "ndcg"], "ranking_only": ["ndcg"]}
NEEDS = {"semantic": "ada_path", "sasrec": "baseline_path", "dense": "baseline_path"}  # the option that a reward needs


def _scores(history_items: Sequence[Sequence[int]], baseline: Scorer) -> tuple[np.ndarray | None, np.ndarray]:
    """Scores of the distinct histories, (histories, items), and which of them each row has, (rows,), -1 for none."""
    distinct = list(dict.fromkeys(tuple(history) for history in history_items if len(history)))
    place = {history: i for i, history in enumerate(distinct)}
    rows = np.array([place.get(tuple(history), -1) for history in history_items], dtype=np.int64)
    scores = np.asarray(baseline([list(h) for h in distinct]), dtype=np.float64) if distinct else None
    return scores, rows


@functools.lru_cache(maxsize=1)
def _first_items(catalog: "Catalog") -> np.ndarray:
    """(sids + 1,) the first item of each SID; the last entry serves row -1 and is not used."""
    return np.array([items[0] for items in catalog.items_of_sid] + [0])


@functools.lru_cache(maxsize=1)
def _codes(catalog: "Catalog") -> np.ndarray:
    """(sids + 1, depth) level tokens as integers, -1 after the end of a SID; the last entry, all -1, serves row -1."""
    return np.pad(catalog.codes, ((0, 1), (0, 0)), constant_values=-1)
