"""Rewards of a generated SID, one function each, and what --reward_type makes of them.

A reward has TRL's signature: it gets `completions` (texts) and, as keyword arguments, the dataset's columns repeated
for each completion (`target_sid`, `target_item`, `history_items`, `task`), and returns one float a completion. Rows
come in whole groups of `num_generations` completions of one prompt, in the order of the beams.
"""

import functools
import math
from collections.abc import Callable

from catalog import canonical_sid
from cli import UserError, not_built

Reward = Callable[..., list[float]]


def rule(completions: list[str], target_sid: list[str], **_) -> list[float]:
    """1 where the SID is the target's, else 0 (ReRe, arXiv 2510.12211)."""
    return [float(canonical_sid(text) == target) for text, target in zip(completions, target_sid, strict=True)]


def ndcg(completions: list[str], target_sid: list[str], num_generations: int, **_) -> list[float]:
    """The rank-aware penalty of ReRe (arXiv 2510.12211): wrong answers cost more the higher they stand.

    In a group that holds the target, the wrong completion at place i (from 0) gets -w_i / sum_j w_j with
    w_i = 1 / log2(i + 2), summed over the whole group, and the target's 0. In any other group all get 0. Range [-1, 0].
    """
    weights = [1 / math.log2(place + 2) for place in range(num_generations)]
    total = sum(weights)
    hits = rule(completions, target_sid)
    rewards = []
    for start in range(0, len(hits), num_generations):
        group = hits[start : start + num_generations]
        rewards += [
            0.0 if hit or not any(group) else -weight / total for hit, weight in zip(group, weights, strict=True)
        ]
    return rewards


REWARD_TYPES: dict[str, list[Reward]] = {"rule": [rule], "ranking": [rule, ndcg], "ranking_only": [ndcg]}


def checked(reward: Reward, **fixed) -> Reward:
    """`reward` with `fixed` arguments; a NaN or infinite value stops the run and names the function and the row."""

    @functools.wraps(reward)
    def wrapper(completions, **columns):
        values = reward(completions=completions, **columns, **fixed)
        for row, value in enumerate(values):
            if not math.isfinite(value):
                raise UserError(
                    f"reward {reward.__name__} returned {value} for row {row} of its batch "
                    f"(target {columns['target_sid'][row]}, completion {completions[row]!r}); it must be finite"
                )
        return values

    return wrapper


def reward_functions(reward_type: str, num_generations: int) -> list[Reward]:
    """The reward functions of a --reward_type."""
    if reward_type in ("semantic", "sasrec"):
        raise not_built("reward_type", reward_type, f"use one of {', '.join(REWARD_TYPES)}")
    if reward_type not in REWARD_TYPES:
        raise UserError(f"--reward_type {reward_type}: expected one of {', '.join(REWARD_TYPES)}")
    return [checked(reward, num_generations=num_generations) for reward in REWARD_TYPES[reward_type]]
