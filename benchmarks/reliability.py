"""How the pipeline survives kills, bad input and hostile data: runs the tests that show it and writes the page of counts.

    python -m benchmarks.reliability --output_file docs/reliability.md

Every figure comes from the results of these tests (their JUnit file); none is typed in. The page names tests that fail,
and the exit code is then 2. `--kills`, `--fuzz_examples` and `--catalog_items` make the tests longer; `--quick` runs a few
tests of each part, to try the command.
"""

import collections
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file
from minionerec.common.options import OUTPUT, StageOptions, option, run

ROOT = Path(__file__).parents[1]
KILL, BAD, FUZZ = "tests/test_kill.py", "tests/test_bad_inputs.py", "tests/test_fuzz_readers.py"
TWO_PROCESSES = {  # test -> what is equal
    "tests/test_sft.py::test_two_processes_train_as_one": "SFT: weights",
    "tests/test_sft.py::test_frozen_llm_on_two_processes": "SFT, only new rows trained: weights",
    "tests/test_rl.py::test_two_processes_train_as_one": "RL: weights",
    "tests/test_evaluate.py::test_two_processes_evaluate_as_one": "evaluation: predictions and metrics",
}
OTHERS = {  # file -> what its tests show
    "tests/test_disks.py": "full disk, read-only disk, a file where a folder should be",
    "tests/test_hostile_data.py": "hostile data through every stage",
    "tests/test_sizes.py": "catalogs of 1, 2 and {items} items; histories of 0 and 10,000; users with one interaction",
}
PARTS = {"kills": [KILL], "bad_input": [BAD], "fuzzing": [FUZZ], "processes": [*TWO_PROCESSES], "others": [*OTHERS]}
QUICK = {
    KILL: "convert_dataset",
    BAD: "report",
    FUZZ: "trie",
    "tests/test_sizes.py": "history",
}  # file -> the part of its tests' names
EXPLAINED = """# Reliability

Written by `python -m benchmarks.reliability`; every figure is counted in the results of the tests that it ran.
"""


@dataclass
class Options(StageOptions):
    output_file: str = option("docs/reliability.md", "the page", role=OUTPUT)
    kills: int = option(20, "kills of each stage")
    fuzz_examples: int = option(60, "files of each kind that the fuzz tests try per test")
    catalog_items: int = option(1_000_000, "items of the largest catalog")
    parts: list[str] = option([*PARTS], f"some of {', '.join(PARTS)}; the page says which were left out")
    quick: bool = option(False, "a few tests of each part only")

    def __post_init__(self):
        super().__post_init__()
        self.check(parts=(set(self.parts) <= set(PARTS), f"some of {', '.join(PARTS)}"))
        self.at_least(1, "kills", "fuzz_examples", "catalog_items")


class Result(NamedTuple):
    """One test: its file, its name with parameters, whether it passed, its seconds, and what it has recorded."""

    file: str
    name: str
    outcome: str  # passed, failed or skipped
    seconds: float
    recorded: dict[str, str]

    @property
    def test(self) -> str:
        return f"{self.file}::{self.name.partition('[')[0]}"


def run_tests(options: Options) -> list[Result]:
    """The results of all tests of the page."""
    files = [file for part in options.parts for file in PARTS[part]]
    selection = []
    if options.quick:
        files = [file for file in QUICK if any(file in PARTS[part] for part in options.parts)]
        selection = ["-k", " or ".join(f"({Path(file).name} and {part})" for file, part in QUICK.items())]
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
        sizes = {"KILLS": options.kills, "FUZZ_EXAMPLES": options.fuzz_examples, "CATALOG_SIZE": options.catalog_items}
        environment = os.environ | {name: str(size) for name, size in sizes.items()}
        done = subprocess.run([*command, f"--junitxml={junit}", *files, *selection], cwd=ROOT, env=environment)
        if not junit.exists() or done.returncode > 1:
            raise UserError(f"pytest ended with exit code {done.returncode}; see its output above and run it again")
        return read_junit(junit)


def read_junit(path: str | Path) -> list[Result]:
    """The tests of a JUnit file of pytest's family xunit1, which has their files and recorded properties."""
    results = []
    for case in ET.parse(path).getroot().iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        recorded = {found.get("name"): found.get("value") for found in case.iter("property")}
        results.append(Result(case.get("file"), case.get("name"), outcome, float(case.get("time")), recorded))
    return results


# ------------------------------------------------------------------------------------------------ the page


def table(header: Iterable[str], rows: Iterable[Iterable]) -> str:
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kill_section(results: list[Result]) -> str:
    """A row a stage: kills, starts, finished runs with the bytes of an unbroken one."""
    rows = []
    for result in results:
        counts = [result.recorded.get(name, "0") for name in ("kills", "starts", "finished")]
        rows.append([result.name.partition("[")[2].rstrip("]"), *counts, result.outcome])
    kills = sum(int(row[1]) for row in rows if row[-1] == "passed")
    text = f"""## Kills

`{KILL}` ends each stage with SIGKILL at random moments and starts it again with the same command. Each finished run has
the bytes of an unbroken one. {kills} kills survived.
"""
    return f"{text}\n{table(('stage', 'kills', 'starts', 'finished runs', 'all equal'), rows)}"


def bad_input_section(results: list[Result]) -> str:
    """A row a class: cases, and those that end with one line, exit code 2 and nothing left behind."""
    cases = [result for result in results if "kind" in result.recorded]
    passed = collections.Counter(result.recorded["kind"] for result in cases if result.outcome == "passed")
    every = collections.Counter(result.recorded["kind"] for result in cases)
    stages = {result.recorded["stage"] for result in cases}
    text = f"""## Bad input

`{BAD}` gives {len(cases)} bad inputs to {len(stages)} commands. Right is exit code 2, one line that names the file, row,
key or option and says what to do, and a folder that is as it was before.
"""
    rows = [[kind, every[kind], passed[kind]] for kind in sorted(every)]
    return f"{text}\n{table(('class', 'cases', 'right'), rows)}"


def fuzz_section(results: list[Result]) -> str:
    """Executions and minutes of the fuzz tests, by reader."""
    counts = collections.Counter()
    for result in results:
        if result.outcome == "passed":
            for reader, count in result.recorded.items():
                counts[reader] += int(count)
    minutes = sum(result.seconds for result in results) / 60
    failed = sum(result.outcome == "failed" for result in results)
    text = f"""## Fuzzing

`{FUZZ}` gives edited, truncated and random files to the readers: {sum(counts.values()):,} files in {minutes:.1f} minutes,
{failed} tests failed. A reader accepts a file or refuses it in one printable line within 10 seconds; nothing is executed.
"""
    return f"{text}\n{table(('reader', 'files'), sorted(counts.items()))}"


def process_section(results: list[Result]) -> str:
    """A row a test: what two processes make equal to one."""
    rows = [[TWO_PROCESSES[result.test], f"`{result.name}`", result.outcome] for result in results]
    return f"## Two processes\n\n{table(('equal to one process', 'test', 'result'), rows)}"


def other_section(results: list[Result]) -> str:
    counts = {file: collections.Counter(r.outcome for r in results if r.file == file) for file in OTHERS}
    items = next((f"{int(r.recorded['items']):,}" for r in results if "items" in r.recorded), "many")
    rows = [
        [what.format(items=items), f"`{file}`", counts[file]["passed"], counts[file]["failed"], counts[file]["skipped"]]
        for file, what in OTHERS.items()
    ]
    return f"## Also\n\n{table(('what', 'tests', 'passed', 'failed', 'skipped'), rows)}"


def page(results: list[Result], commit: str, parts: Iterable[str] = PARTS) -> str:
    """The whole page, with the sections of `parts`."""

    def of(*files: str) -> list[Result]:
        return [result for result in results if result.file in files or result.test in files]

    machine = f"{os.cpu_count()} cores ({platform.machine()})"
    failed = [f"- `{result.file}::{result.name}`" for result in results if result.outcome == "failed"]
    sections = {"kills": kill_section, "bad_input": bad_input_section, "fuzzing": fuzz_section}
    sections |= {"processes": process_section, "others": other_section}
    left_out = [part for part in PARTS if part not in parts]
    texts = [
        EXPLAINED,
        f"Commit {commit}, {datetime.date.today()}, {machine}, {len(results)} tests, {len(failed)} failed."
        + (f" Left out: {', '.join(left_out)}." if left_out else ""),
        *(sections[part](of(*PARTS[part])) for part in PARTS if part in parts),
    ]
    if failed:
        texts.append("## Failed\n\n" + "\n".join(failed))
    return "\n".join(f"{text.rstrip()}\n" for text in texts)


def commit_of() -> str:
    """The commit of the working tree, `-dirty` where files differ from it; unknown outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main(options: Options) -> None:
    commit = commit_of()
    results = run_tests(options)
    with atomic_file(options.output_file) as f:
        f.write(page(results, commit, options.parts))
    failed = [result for result in results if result.outcome == "failed"]
    print(f"wrote {options.output_file}: {len(results)} tests, {len(failed)} failed")
    if failed:
        raise UserError(f"{options.output_file}: {len(failed)} tests failed, such as {failed[0].name}; repair them")


if __name__ == "__main__":
    run(main, Options)
