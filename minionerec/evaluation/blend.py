"""A generative model and collaborative baselines, blended: the sum of weighted log-probabilities over candidates.

    score(item) = log p_generative(SID of item) + sum over baselines b of w_b * log p_b(item)

Candidates of a user are the items of the generative model's beams and the best items of each baseline. The generative
scores of candidates that are in no beam are computed exactly (minionerec/decoding/scoring.py), so with lists as long as
the catalog the blend ranks every item. Weights are the same for all users or differ by user, and are chosen on valid rows
(blend_weights.py). Adding the scores of two models with equal weights is EnsRec's blend (arXiv 2512.17820).

Generative scores are those without exclusions, in space `catalog`; a seen item leaves the candidates of its user.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from minionerec.catalog.catalog import Catalog
from minionerec.catalog.trie import Trie
from minionerec.decoding.beam_search import beam_search, left_pad, length_batches
from minionerec.decoding.scoring import score_rows, sid_paths
from minionerec.evaluation.metrics import MISSED
from minionerec.evaluation.protocols import TOP, Ranks


class Candidates(NamedTuple):
    """Candidate items of each user and their log-probabilities under each model."""

    items: np.ndarray  # (users, candidates) item ids, -1 where there are no more
    scores: np.ndarray  # (users, candidates, models) nats, the generative model first; -inf where there are no more
    confidence: np.ndarray  # (users, baselines) the largest probability that each baseline gives any item


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
    confidence = np.exp([part.max(axis=1) for part in parts[1:]], dtype=np.float64).reshape(-1, len(rows)).T
    return Candidates(items, np.where(items[..., None] >= 0, np.stack(taken, axis=-1), -np.inf), confidence)


@torch.no_grad()
def collect(
    model,
    tokenizer,
    trie: Trie,
    prompts: Sequence[str],
    histories: Sequence[Sequence[int]],
    baselines: Sequence,
    catalog: Catalog,
    *,
    count: int = 50,
    batch_size: int = 32,
    hidden: Sequence[Sequence[int]] | None = None,
    beams: tuple[np.ndarray, np.ndarray] | None = None,
    progress: Callable[[int], object] = lambda users: None,
) -> dict[str, Candidates]:
    """Candidates of each user under each protocol: `{"all": …, "unseen": …}`, in the order of `prompts`.

    histories: all items that each user has, oldest first; baselines: models with `scores(histories)`, (users, items);
    count: beams, and best items of each baseline, under either protocol; hidden: items that users do not get under
    "unseen", by default those of their histories; beams: (rows, scores) of each prompt, (users, n), where a search without
    exclusions in space `catalog` has found them before; progress: called with the users of each batch.
    """
    tokens = tokenizer(list(prompts))["input_ids"]
    paths, device, parts = sid_paths(trie), model.device, {"all": {}, "unseen": {}}
    model.eval()
    for batch in length_batches([len(t) for t in tokens], batch_size, 1 << 14):
        ids, mask = left_pad([tokens[user] for user in batch], tokenizer.pad_token_id or 0, device)
        seen = [histories[user] for user in batch]
        out = seen if hidden is None else [hidden[user] for user in batch]
        if beams is None:
            best = beam_search(model, trie, ids, mask, count, space="catalog")
            rows, scores = best.row.cpu().numpy(), best.score.cpu().numpy()
        else:
            rows, scores = (each[batch] for each in beams)
        others = [baseline.scores(seen).cpu().numpy() for baseline in baselines]
        tops = [top_rows(each, catalog, count, excluded) for each in others for excluded in (None, out)]
        missing = missing_rows(rows, np.concatenate(tops, axis=1), len(catalog.sids))
        forced = score_rows(model, trie, paths, ids, mask, torch.from_numpy(missing).to(device)).cpu().numpy()
        rows, scores = np.concatenate([rows, missing], axis=1), np.concatenate([scores, forced], axis=1)
        for name, excluded in (("all", None), ("unseen", out)):
            found = gather(rows, scores, others, catalog, excluded)
            parts[name] |= {user: tuple(part[i] for part in found) for i, user in enumerate(batch)}
        progress(len(batch))
    return {name: _stacked(users) for name, users in parts.items()}


def _stacked(users: Mapping[int, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Candidates:
    """Candidates of single users as arrays, padded to the longest list."""
    width, models = max(len(items) for items, *_ in users.values()), next(iter(users.values()))[1].shape[-1]
    items = np.full((len(users), width), -1)
    scores = np.full((len(users), width, models), -np.inf)
    confidence = np.zeros((len(users), models - 1))
    for user, (own, values, confidence[user]) in users.items():
        items[user, : len(own)], scores[user, : len(own)] = own, values
    return Candidates(items, scores, confidence)


def ranked(
    candidates: Candidates, weights: np.ndarray | Sequence[float], targets: Sequence[int], catalog: Catalog
) -> Ranks:
    """Ranks of the targets by item and by SID (that of its best item), and the first items of each user."""
    targets = np.asarray(targets)
    total = blended(candidates, weights)
    order = np.argsort(-total, axis=1, kind="stable")
    items = np.take_along_axis(candidates.items, order, axis=1)
    sid_rows = np.where(items >= 0, catalog.sid_of_item[items], -1)
    hits = sid_rows == catalog.sid_of_item[targets][:, None]
    first = hits.argmax(axis=1)
    before = np.array([len(set(row[:place].tolist())) for row, place in zip(sid_rows, first, strict=True)])
    top = np.full((len(items), TOP), -1)
    top[:, : min(TOP, items.shape[1])] = items[:, :TOP]
    return Ranks(ranks(candidates, weights, targets), np.where(hits.any(axis=1), before, MISSED), top)


def ranks(candidates: Candidates, weights: np.ndarray | Sequence[float], targets: np.ndarray) -> np.ndarray:
    """The rank of each target under the blend, `MISSED` where it is no candidate; ties rank by item id."""
    total = blended(candidates, weights)
    own = candidates.items == np.asarray(targets)[:, None]
    value = np.where(own, total, -np.inf).max(axis=1, keepdims=True)
    earlier = (total == value) & (candidates.items < np.asarray(targets)[:, None]) & (candidates.items >= 0)
    rank = ((total > value) | earlier).sum(axis=1)
    return np.where(own.any(axis=1), rank, MISSED)


def blended(candidates: Candidates, weights: np.ndarray | Sequence[float]) -> np.ndarray:
    """(users, candidates) blended scores; the generative model's weight is 1.

    weights: one for each baseline, (baselines,), or for each user and baseline, (users, baselines).
    """
    real = candidates.items >= 0
    parts = np.where(real[..., None], candidates.scores, 0.0)
    n_baselines = parts.shape[2] - 1
    weights = np.broadcast_to(np.asarray(weights, dtype=float), (len(parts), n_baselines))
    total = parts[..., 0].copy()
    for baseline in range(n_baselines):
        total += weights[:, baseline, None] * parts[..., 1 + baseline]
    return np.where(real, total, -np.inf)
