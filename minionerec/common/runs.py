"""TODO."""

import dataclasses
import json
from pathlib import Path

from minionerec.common.files import write_json

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
