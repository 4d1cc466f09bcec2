"""Which rewards a run uses: their names and aliases, a user's file, weights, and a check of every value."""

import functools
import importlib.util
import inspect
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minionerec.common.embeddings import load_embeddings
from minionerec.common.errors import UserError
from minionerec.common.files import require_file
from minionerec.rewards.functions import ALIASES, NEEDS, REWARDS, Reward, Scorer

if TYPE_CHECKING:
    from minionerec.catalog.catalog import Catalog

# The arguments that a reward function may name. The first line is TRL's, the second the trainer's and the dataset's
# columns, one value per completion; the third is the same for all.
ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
ARGUMENTS += ("row", "target_row", "target_sid", "target_item", "history_items", "task")
ARGUMENTS += ("num_generations", "catalog", "embeddings", "baseline")


def names_of(reward_type: str) -> list[str]:
    """`"ranking,prefix"` -> `["rule", "ndcg", "prefix"]`; raises `UserError` for an unknown or repeated name."""
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


def split_module(module: str) -> tuple[Path, str]:
    """`"path.py:name,other"` -> (the file, `"name,other"`); raises `UserError` for another form or a missing file."""
    path, _, names = module.rpartition(":")
    if not path or not names:
        raise UserError(f"--reward_module {module}: expected path.py:name, a file and a function in it")
    return require_file(path, "reward_module"), names


def require_needs(reward_type: str, **given: bool) -> None:
    """Raise `UserError` for a reward whose option (`NEEDS`) is not among the given ones."""
    what = {"ada_path": "the .npy file of item embeddings", "baseline_path": "a folder that sasrec.sh trained"}
    for name in names_of(reward_type):
        if name in NEEDS and not given[NEEDS[name]]:
            raise UserError(f"--reward_type {name} needs --{NEEDS[name]}: {what[NEEDS[name]]}")


def check_files(reward_type: str, reward_module: str, ada_path: str, baseline_path: str) -> None:
    """Raise `UserError` for a file that a reward needs and that is not there, and for one that no reward reads."""
    paths = {"ada_path": ada_path, "baseline_path": baseline_path}
    require_needs(reward_type, **{flag: bool(path) for flag, path in paths.items()})
    for flag, path in paths.items():
        readers = [name for name, needed in NEEDS.items() if needed == flag]
        if path and not {*readers} & {*names_of(reward_type)} and not reward_module:
            raise UserError(
                f"--{flag} {path}: no reward reads it; add {' or '.join(readers)} to --reward_type or leave it out"
            )
        if path:
            require_file(path, flag)
    if reward_module:
        split_module(reward_module)


def user_rewards(module: str) -> list[Reward]:
    """The functions of `path.py:name` or `path.py:name,other`. Their file is run: the option names the user's own code."""
    file, names = split_module(module)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None:
        raise UserError(f"--reward_module {module}: {file} is not a Python file, expected one that ends with .py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, loaded)  # dataclasses look up their own module there
    try:
        spec.loader.exec_module(loaded)
    except Exception as error:
        raise UserError(
            f"--reward_module {module}: {file} fails with {type(error).__name__}: {error}; repair it"
        ) from error
    found = [getattr(loaded, name.strip(), None) for name in names.split(",")]
    for name, function in zip(names.split(","), found, strict=True):
        if not callable(function):
            raise UserError(f"--reward_module {module}: {file} has no function {name.strip()!r}; define it there")
        for argument in inspect.signature(function).parameters.values():
            variadic = argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
            if argument.name not in ARGUMENTS and argument.default is argument.empty and not variadic:
                raise UserError(
                    f"--reward_module {module}: {name.strip()} asks for {argument.name!r}, expected some of "
                    f"{', '.join(ARGUMENTS)}"
                )
    return found


def parse_weights(text: str, names: Sequence[str]) -> list[float]:
    """`"1,0.5"` -> `[1.0, 0.5]`, one for each of `names`; all 1 if `text` is empty."""
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
    """`reward` as TRL calls it: it gets the arguments that it names, `fixed` ones included, and returns a list of floats.

    Raises `UserError` with function and row for a value that is not finite, and for a wrong number of values.
    """
    parameters = inspect.signature(reward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    @functools.wraps(reward)
    def wrapper(**columns):
        completions = columns["completions"]
        arguments = columns | fixed
        named = arguments if takes_all else {name: arguments[name] for name in parameters if name in arguments}
        values = np.asarray(reward(**named), dtype=np.float64)
        if values.shape != (len(completions),):
            raise UserError(
                f"reward {reward.__name__} returned values of shape {values.shape} for {len(completions)} completions; "
                "it must return one number per completion"
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
    catalog: "Catalog | None" = None,
    embeddings: np.ndarray | None = None,
    baseline: Scorer | None = None,
    reward_module: str = "",
) -> list[Reward]:
    """The functions of a --reward_type and a --reward_module, in that order, ready for TRL.

    embeddings: (items, dim) of `unit_embeddings`; baseline: histories -> scores (histories, items).
    """
    functions = [REWARDS[name] for name in names_of(reward_type)]
    functions += user_rewards(reward_module) if reward_module else []
    names = [function.__name__ for function in functions]
    if not functions or len(set(names)) < len(names):
        raise UserError(
            f"--reward_type {reward_type!r} --reward_module {reward_module!r}: found rewards {names}, expected one or "
            f"more of different names; built in are {', '.join([*REWARDS, *ALIASES])}"
        )
    require_needs(reward_type, ada_path=embeddings is not None, baseline_path=baseline is not None)
    fixed = {"num_generations": num_generations, "catalog": catalog, "embeddings": embeddings, "baseline": baseline}
    return [checked(function, **fixed) for function in functions]
