"""Rewards of a generated SID, one function each, and what --reward_type makes of them.

A reward has TRL's signature: it gets `completions` (texts) and, as keyword arguments, the dataset's columns repeated
for each completion (`target_sid`, `target_item`, `history_items`, `task`), and returns one float a completion. Rows
come in whole groups of `num_generations` completions of one prompt, the most probable first. Besides, each function is
given `num_generations`, `catalog`, `embeddings` and `collaborative` (see `reward_functions`) and takes what it needs.

A SID that several items share stands for its first one, `catalog.items_of_sid[row][0]`: the most popular in train, then
the lowest id, which is the item that evaluation puts first. A text that is no SID of the catalog has no item: `semantic`
and `sasrec` give it the least value that any item could have, never another item's.
"""

import functools
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from catalog import Catalog, canonical_sid, split_sid
from cli import UserError, require_file
from rq.embeddings import load_embeddings

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


# ------------------------------------------------------------------------------------------------ SIDs and items


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


# ------------------------------------------------------------------------------------------------ choice


def names_of(reward_type: str) -> list[str]:
    """`"ranking,prefix"` -> `["rule", "ndcg", "prefix"]`; raises `UserError` for an unknown or a double name."""
    names = []
    for part in filter(None, (part.strip() for part in reward_type.split(","))):
        if part not in ALIASES and part not in REWARDS:
            raise UserError(
                f"--reward_type {reward_type}: no reward {part!r}, expected some of {', '.join([*REWARDS, *ALIASES])}"
            )
        names += ALIASES.get(part, [part])
    if len(set(names)) < len(names):
        raise UserError(f"--reward_type {reward_type}: a reward is named twice ({', '.join(names)}); name each once")
    return names


def user_rewards(module: str) -> list[Reward]:
    """The functions of `path.py:name` or `path.py:name,other`: the user's own code, run because the flag names it."""
    path, _, names = module.rpartition(":")
    if not path or not names:
        raise UserError(f"--reward_module {module}: expected path.py:name, a file and a function in it")
    file = require_file(path, "reward_module")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None:
        raise UserError(f"--reward_module {module}: {file} is not a Python file, expected one that ends with .py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, loaded)  # dataclasses and the like look their own module up
    try:
        spec.loader.exec_module(loaded)
    except Exception as error:
        raise UserError(f"--reward_module {module}: {file} fails with {type(error).__name__}: {error}") from error
    found = [getattr(loaded, name.strip(), None) for name in names.split(",")]
    for name, function in zip(names.split(","), found, strict=True):
        if not callable(function):
            raise UserError(f"--reward_module {module}: {file} has no function {name.strip()!r}; define it there")
    return found


def parse_weights(text: str, names: Sequence[str]) -> list[float]:
    """`"1,0.5"` -> `[1.0, 0.5]`, one for each of `names`; all 1 where none is given."""
    if not text:
        return [1.0] * len(names)
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--reward_weights {text}: expected numbers as in 1,0.5") from None
    if len(weights) != len(names) or not all(map(math.isfinite, weights)):
        raise UserError(
            f"--reward_weights {text}: found {len(weights)} weights, expected {len(names)} finite ones, in order of "
            f"{', '.join(names)}"
        )
    return weights


def unit_embeddings(path: str | Path, n_items: int) -> np.ndarray:
    """The item embeddings of --ada_path as rows of length 1, (items, dim); raises `UserError` for another catalog's."""
    matrix = load_embeddings(path, "ada_path")
    if len(matrix) != n_items:
        raise UserError(f"{path}: {len(matrix)} rows, expected the catalog's {n_items} items; check --ada_path")
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    if not lengths.all():
        raise UserError(f"{path}: row {int(lengths.argmin())} is all zeros and has no direction; embed again")
    return matrix / lengths


def checked(reward: Reward, **fixed) -> Reward:
    """`reward` with `fixed` arguments, as a list of floats.

    The run stops, with function and row named, at a value that is not finite and at a wrong number of values.
    """

    @functools.wraps(reward)
    def wrapper(completions, **columns):
        values = np.asarray(reward(completions=completions, **columns, **fixed), dtype=np.float64)
        if values.shape != (len(completions),):
            raise UserError(
                f"reward {reward.__name__} returned values of shape {values.shape} for {len(completions)} completions; "
                "it must return one number a completion"
            )
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            row = bad[0]
            raise UserError(
                f"reward {reward.__name__} returned {values[row]} for row {row} of its batch "
                f"(target {columns['target_sid'][row]}, completion {completions[row]!r}); it must be finite"
            )
        return values.tolist()

    return wrapper


def reward_functions(
    reward_type: str,
    num_generations: int,
    catalog: Catalog | None = None,
    embeddings: np.ndarray | None = None,
    collaborative: Scorer | None = None,
    reward_module: str = "",
) -> list[Reward]:
    """The functions of a --reward_type and a --reward_module, in that order, ready for TRL.

    embeddings: (items, dim) of `unit_embeddings`; collaborative: histories -> scores (rows, items).
    """
    functions = [REWARDS[name] for name in names_of(reward_type)]
    functions += user_rewards(reward_module) if reward_module else []
    names = [function.__name__ for function in functions]
    if not functions or len(set(names)) < len(names):
        raise UserError(
            f"--reward_type {reward_type!r} --reward_module {reward_module!r}: found rewards {names}, expected one or "
            f"more of different names; built in are {', '.join([*REWARDS, *ALIASES])}"
        )
    if "semantic" in names and embeddings is None:
        raise UserError("--reward_type semantic needs the item embeddings: name the .npy file with --ada_path")
    if "sasrec" in names and collaborative is None:
        raise UserError("--reward_type sasrec needs a collaborative model: name sasrec.sh's folder with --cf_path")
    fixed = {"num_generations": num_generations, "catalog": catalog, "embeddings": embeddings}
    return [checked(function, **fixed, collaborative=collaborative) for function in functions]
