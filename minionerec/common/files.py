"""Reading and writing files: checked, and atomic."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minionerec.common.errors import UserError


def require_file(path: str | Path, flag: str) -> Path:
    """`path` as a `Path`; raises `UserError` naming the flag when nothing readable is there."""
    if not path:
        raise UserError(f"--{flag} is required")
    path = Path(path)
    if not path.exists():
        where = "" if path.is_absolute() else f" (in {Path.cwd()})"
        raise UserError(f"{path}: no such file or folder; check --{flag}{where}")
    return path


def read_json(path: str | Path, flag: str) -> dict:
    """The JSON object in `path`.

    Raises `UserError` with the line where parsing stopped, for a key that is there twice, and for half of a surrogate
    pair, which no file could hold.
    """
    path = require_file(path, flag)
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=_unique)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); write it again or check --{flag}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: found a JSON {type(content).__name__}, expected an object; check --{flag}")
    return content


def _unique(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {key!r} is there twice")
    return content


@contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator:
    """Open a temporary neighbour of `path` for writing; it becomes `path` only if the block ends without an error.

    Folders that are missing are made, and removed after an error if they are empty.
    """
    path = Path(path)
    made = [parent for parent in path.parents if not parent.exists()]  # the innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else "") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is found while writing, where no name is known
        raise
    finally:
        temporary.unlink(missing_ok=True)
        for folder in () if path.exists() else made:
            with suppress(OSError):
                folder.rmdir()


def write_json(path: str | Path, content, indent: int | None = 2) -> None:
    """Write `content` as JSON, atomically."""
    with atomic_file(path) as f:
        f.write(json.dumps(content, indent=indent, ensure_ascii=False) + "\n")  # json.dump takes four times as long
