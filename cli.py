"""What every stage shares at its edges: options from dataclasses, errors in one line, files that appear whole.

A stage is a dataclass of options and a function of it:

    @dataclass
    class Options:
        lr: float = HfArg(default=1e-3, help="peak learning rate")

    def main(options: Options): ...

    if __name__ == "__main__":
        run(main, Options)

Booleans take `True`/`False`; an unknown flag or a bad value ends with one line and exit code 2.
"""

import atexit
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.hf_argparser import HfArg, HfArgumentParser

__all__ = [
    "HfArg",
    "UserError",
    "atomic_file",
    "begin",
    "finish",
    "read_json",
    "require_file",
    "run",
    "write_json",
]


class UserError(Exception):
    """Something the user can mend. The message is one line: where, what was found, what was expected, what to do."""


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise UserError(f"{self.prog}: {message}; `{self.prog} --help` lists the options")


def run(main: Callable, options_class: type) -> None:
    """Parse the command line into `options_class`, call `main`, and turn a `UserError` into one line and exit code 2.

    `--debug` shows the traceback instead.
    """
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        parser = _Parser(options_class, allow_abbrev=False)
        options, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        if unknown:
            parser.error(f"unknown option {unknown[0]}")
        main(options)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        leave_group(2)
        sys.exit(2)
    leave_group(0)


def leave_group(code: int) -> None:
    """End a process that is one of several, without taking Python down: a gloo thread that frees a tensor meanwhile
    aborts it, and DistributedDataParallel keeps gloo's threads alive even when its group is destroyed."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        atexit._run_exitfuncs()  # wandb and others finish there
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def require_file(path: str | Path, flag: str) -> Path:
    """`path` as a `Path`; raises `UserError` naming the flag when nothing readable is there."""
    if not path:
        raise UserError(f"--{flag} is required")
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check --{flag}")
    return path


def read_json(path: str | Path, flag: str) -> dict:
    """The JSON object in `path`; raises `UserError` with the line where parsing stopped."""
    path = require_file(path, flag)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); write it again or check --{flag}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: found a JSON {type(content).__name__}, expected an object; check --{flag}")
    return content


@contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator:
    """Open a temporary neighbour of `path` for writing; it becomes `path` only if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else "") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content, indent: int | None = 2) -> None:
    """Write `content` as JSON, atomically."""
    with atomic_file(path) as f:
        json.dump(content, f, indent=indent, ensure_ascii=False)
        f.write("\n")


# ------------------------------------------------------------------------------------------------ unfinished runs

MARK = "stage.json"
WRITTEN = ("output_dir", "cache_dir")  # options that name folders which a stage writes to


def _fingerprint(options) -> dict:
    """The options, and size and time of every file (or file of a folder) that they name: what a result depends on."""
    values = json.loads(json.dumps(dataclasses.asdict(options)))
    files = {}
    for name, value in values.items():
        if isinstance(value, str) and value and name not in WRITTEN:
            paths = sorted(Path(value).iterdir()) if Path(value).is_dir() else [Path(value)]
            stats = [(path.name, path.stat()) for path in paths if path.is_file()]
            files[name] = [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    return {"options": values, "files": files}


def begin(folder: str | Path, options) -> str:
    """What to do about a stage whose result is `folder`: `"complete"`, `"resume"` or `"fresh"`.

    Complete and resume need the same options and unchanged input files; the folder is marked as begun.
    """
    mark = Path(folder) / MARK
    now = _fingerprint(options)
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if found == now | {"complete": True}:
        print(f"{folder}: complete, made with these options; remove {mark} to make it again")
        return "complete"
    write_json(mark, now | {"complete": False})
    return "resume" if found == now | {"complete": False} else "fresh"


def finish(folder: str | Path, options) -> None:
    """Mark `folder` as complete."""
    write_json(Path(folder) / MARK, _fingerprint(options) | {"complete": True})
