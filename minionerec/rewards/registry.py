"""TODO."""

import functools
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minionerec.catalog.catalog import Catalog
from minionerec.common.embeddings import load_embeddings
from minionerec.common.errors import UserError
from minionerec.common.files import require_file
from minionerec.rewards.functions import (
    ALIASES,
    REWARDS,
    Reward,
    Scorer,
)


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
