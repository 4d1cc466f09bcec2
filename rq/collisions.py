"""SID collisions: several items with equal codes, and four ways to resolve them.

    none          items share the SID
    sinkhorn      the last codes of each colliding group are chosen again by Sinkhorn, as in LC-Rec (arXiv 2311.09049);
                  items with equal embeddings still collide
    nearest_free  all items of a group except the first take the nearest free code of the last level
    extra_token   each item of a colliding group gets one more token, as in TIGER (arXiv 2305.05065)

`nearest_free` and `extra_token` always end without a collision.
"""

from collections.abc import Iterator
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from minionerec.common.errors import UserError
from rq.index_file import to_sids
from rq.models.vq import sinkhorn, squared_distances
from rq.options import Collision

MODES = get_args(Collision)
SINKHORN_EPSILON, SINKHORN_ITERATIONS, SINKHORN_ROUNDS = 0.003, 50, 20
SINKHORN_BLOCK = 1 << 22  # distances computed at a time


def keys_of(codes: np.ndarray) -> np.ndarray:
    """One int64 per row of codes (items, depth), with the same order and equalities: numbers sort faster than rows.

    Without columns, all keys are 0.
    """
    keys, span = np.zeros(len(codes), dtype=np.int64), 1
    for column in codes.T:
        width = int(column.max()) + 2
        if span * width >= 2**62:
            keys = np.unique(keys, return_inverse=True)[1].reshape(-1)
            span = len(codes)
        keys, span = keys * width + column + 1, span * width
    return keys


def collision_rate(codes: np.ndarray) -> float:
    """1 - distinct SIDs / items, in [0, 1)."""
    return 1 - len(np.unique(keys_of(codes))) / len(codes)


def colliding_groups(codes: np.ndarray) -> Iterator[np.ndarray]:
    """The items of each shared SID, by id; groups in order of their SIDs."""
    keys = keys_of(codes)
    order = np.argsort(keys, kind="stable")
    first = np.flatnonzero(np.diff(keys[order], prepend=keys[order[0]] - 1))
    sizes = np.diff(first, append=len(keys))
    for start, size in zip(first[sizes > 1], sizes[sizes > 1], strict=True):
        yield order[start : start + size]


def resolve(codes: np.ndarray, mode: str, residuals: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """A copy of codes (items, levels) with collisions resolved by `mode`, one of `MODES`.

    residuals: (items, dim), input of the last level; codebook: (K, dim) of the last level.
    """
    if mode == "none":
        return codes.copy()
    if mode == "extra_token":
        return extra_token(codes)
    return {"sinkhorn": sinkhorn_last_level, "nearest_free": nearest_free}[mode](codes, residuals, codebook)


def _distances(residuals: np.ndarray, codebook: np.ndarray) -> Tensor:
    """Squared distances (rows, K) in float64."""
    return squared_distances(torch.from_numpy(residuals).double(), torch.from_numpy(codebook).double())


def sinkhorn_last_level(
    codes: np.ndarray, residuals: np.ndarray, codebook: np.ndarray, rounds: int = SINKHORN_ROUNDS
) -> np.ndarray:
    """The last codes of each colliding group chosen again by Sinkhorn over the group, at most `rounds` times.

    Items with equal residuals get equal codes, so exact duplicates still collide afterwards. If an item moves onto the
    code of another, both are a colliding group in the next round, so a round can also add collisions: the result is that
    of the round with the fewest (the input counts as one; of equal rounds the latest).
    """
    best, fewest = codes, collision_rate(codes)
    codes = codes.copy()
    for _ in range(rounds):
        before = codes.copy()
        by_size: dict[int, list[np.ndarray]] = {}
        for items in colliding_groups(codes):
            by_size.setdefault(len(items), []).append(items)
        for size, groups in sorted(by_size.items()):
            step = max(1, SINKHORN_BLOCK // (size * len(codebook)))
            for start in range(0, len(groups), step):
                items = np.stack(groups[start : start + step])  # (groups, size): one problem each
                distances = _distances(residuals[items.reshape(-1)], codebook).reshape(*items.shape, -1)
                plan = sinkhorn(distances, SINKHORN_EPSILON, SINKHORN_ITERATIONS)
                codes[items, -1] = plan.argmax(dim=-1).numpy()
        if np.array_equal(codes, before):  # no group is left, or none moves
            break
        if (rate := collision_rate(codes)) <= fewest:
            best, fewest = codes.copy(), rate
    return best.copy()


def nearest_free(codes: np.ndarray, residuals: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """The first item of each colliding group keeps its SID; each other item takes its nearest free last code.

    A code is free if no item with the same prefix has it. Within a group, items move in order of their ids. Raises
    `UserError` where a prefix has more items than the last level has codes.
    """
    codes = codes.copy()
    groups = list(colliding_groups(codes))
    if not groups:
        return codes
    _, prefix = np.unique(keys_of(codes[:, :-1]), return_inverse=True)
    prefix = prefix.reshape(-1)
    sizes = np.bincount(prefix)
    if sizes.max() > len(codebook):
        items = np.flatnonzero(prefix == sizes.argmax())
        name = "".join(to_sids(codes[items[:1], :-1])[0]) or "of length 0"
        raise UserError(
            f"prefix {name} has {len(items)} items (the first is item {items[0]}) but the last level has only "
            f"{len(codebook)} codes; use --collision extra_token, or larger codebooks"
        )
    crowded = np.unique(prefix[np.concatenate(groups)])
    slot = np.searchsorted(crowded, prefix)  # row of `taken`, for items of crowded prefixes
    taken = np.zeros((len(crowded), len(codebook)), dtype=bool)
    inside = np.isin(prefix, crowded)
    taken[slot[inside], codes[inside, -1]] = True
    for items in groups:
        moved = items[1:]
        for item, distances in zip(moved, _distances(residuals[moved], codebook).numpy(), strict=True):
            code = np.where(taken[slot[item]], np.inf, distances).argmin()
            taken[slot[item], code] = True
            codes[item, -1] = code
    return codes


def extra_token(codes: np.ndarray) -> np.ndarray:
    """Codes with one more level (items, levels + 1): 0, 1, 2, … in each colliding group, -1 for all other items.

    Without a collision, no level is added.
    """
    extra = np.full(len(codes), -1, dtype=codes.dtype)
    for items in colliding_groups(codes):
        extra[items] = np.arange(len(items))
    return np.column_stack([codes, extra]) if (extra >= 0).any() else codes.copy()
