"""Stage 0 and stage 3 on a generated log: seconds and memory of k-core, split and conversion.

    python -m benchmarks.preprocess --json

The log is a CSV of `interactions` rows in random order, with user activity and item popularity as in shops (log-normal
and Zipf), and an item table with titles; making them is not timed. Each stage is a separate process, started by its
command line: `preprocess.table` (5-core, the split of --split) and `convert_dataset.py` under random SIDs. `--stages
preprocess` leaves the conversion out.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from minionerec.common.errors import UserError
from minionerec.common.options import option, run
from minionerec.common.runs import ROOT

CHUNK = 10_000_000  # rows that are generated at once


@dataclass
class Options:
    interactions: int = option(10_000_000, "rows of the log")
    users: int = option(0, "users; 0: one for every ten interactions")
    items: int = option(0, "items; 0: one for every fifty interactions")
    split: Literal["leave_one_out", "chronological", "time"] = option("leave_one_out", "as in preprocess.table")
    stages: Literal["both", "preprocess"] = option("both", "what is measured")
    folder: str = option("", "where a temporary folder is made; default: the system's")
    json: bool = option(False, "print seconds and gib as JSON in the last line")

    def __post_init__(self):
        if self.interactions < 1000:
            raise UserError(f"--interactions {self.interactions}: expected at least 1000")
        self.users = self.users or self.interactions // 10
        self.items = self.items or self.interactions // 50


def write_log(options: Options, folder: Path) -> None:
    """`log.csv` and `items.csv`."""
    import polars as pl

    rng = np.random.default_rng(0)
    activity = np.cumsum(rng.lognormal(0, 1, options.users))
    popularity = np.cumsum(rng.permutation(1 / np.arange(1, options.items + 1) ** 0.8))
    with open(folder / "log.csv", "wb") as f:
        for first in range(0, options.interactions, CHUNK):
            rows = min(CHUNK, options.interactions - first)
            user = np.searchsorted(activity, rng.random(rows) * activity[-1])
            item = np.searchsorted(popularity, rng.random(rows) * popularity[-1])
            table = pl.DataFrame(
                {"user": user, "item": item, "timestamp": rng.integers(1_400_000_000, 1_600_000_000, rows)}
            )
            texts = {f"{name}_id": name[0].upper() + pl.col(name).cast(pl.String) for name in ("user", "item")}
            table.select(**texts, timestamp="timestamp").write_csv(f, include_header=first == 0)
    words = np.array(["lamp", "steel", "kit", "pack of 2", "red", "cable", "for kitchen", "tool"])
    titles = pl.DataFrame(words[rng.integers(len(words), size=(options.items, 3))]).select(
        pl.concat_str(pl.all(), separator=" ")
    )
    items = pl.DataFrame({"item_id": [f"I{item}" for item in range(options.items)], "title": titles.to_series()})
    items.write_csv(folder / "items.csv")


def write_index(folder: Path) -> int:
    """`log.index.json` with a random SID of three levels for every item that stayed; returns how many those are."""
    items = sum(1 for _ in open(folder / "log.item2id", encoding="utf-8"))
    codes = np.random.default_rng(0).integers(256, size=(items, 3)).tolist()
    index = {
        str(item): [f"<{level}_{code}>" for level, code in zip("abc", row, strict=True)]
        for item, row in enumerate(codes)
    }
    (folder / "log.index.json").write_text(json.dumps(index))
    return items


def timed(*command) -> tuple[float, float, float]:
    """(seconds, seconds of CPU, largest resident set of any child so far in GiB) of a command."""
    environment = os.environ | {"MINIONEREC_VARIABLES": ""}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise UserError(f"{command[0]}: {(done.stderr.splitlines() or ['failed'])[-1]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    return seconds, used, after.ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory(dir=options.folder or None) as name:
        folder = Path(name)
        write_log(options, folder)
        table = ["--file", folder / "log.csv", "--items_file", folder / "items.csv", "--output_dir", folder]
        results = {"preprocess": timed("-m", "preprocess.table", *table, "--k_core", 5, "--split", options.split)}
        statistics = json.loads((folder / "log.stats.json").read_text())
        if options.stages == "both":
            write_index(folder)
            convert = ["--dataset_name", "log", "--data_dir", folder, "--output_dir", folder]
            results["convert"] = timed("convert_dataset.py", *convert)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    left = ", ".join(f"{statistics[name]:,} {name}" for name in ("users", "items", "interactions"))
    print(f"{options.interactions:,} interactions, after the 5-core {left}; {size / 2**30:.1f} GiB of files")
    for stage, (seconds, used, gib) in results.items():
        print(f"{stage:12}{seconds:8.1f} s{used:8.1f} s of CPU{gib:8.2f} GiB")
    seconds, used, peaks = zip(*results.values(), strict=True)
    if options.json:
        figures = {"seconds": round(sum(seconds), 1), "gib": round(max(peaks), 2), "cpu_seconds": round(sum(used), 1)}
        print(json.dumps(figures | {"interactions": statistics["interactions"]}))


if __name__ == "__main__":
    run(main, Options)
