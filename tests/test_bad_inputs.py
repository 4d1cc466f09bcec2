"""Every stage under bad input: one table over wrong options and damaged files.

Invariants: exit code 2; one printable line on stderr, which begins with `error: `, names the file, row, key or option,
says what was found or expected and what to do; the folder is as it was before. The commands without the damage run, and
give the same bytes twice.
"""

import contextlib
import io
import os
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
from bad_inputs import bench, data_files, models, quantizers

from minionerec.common.options import run

CASES = [*data_files.CASES, *quantizers.CASES, *models.CASES]
CASES += [bench.option_case(stage, "unknown option --no_such_flag", no_such_flag=1) for stage in bench.STAGES]
REMEDY = re.compile(
    r"expected |check |give |run |make |made |write |build |lower |raise |choose |required|repair |remove |save |copy |embed |"
    r"train |use |set |add |name |define |compare |leave |needs |nearest |must |install|exclude|rename |select |is for |--help"
)


@pytest.fixture(scope="module")
def original(tmp_path_factory, world, base_model, checkpoint_folder):
    """The folder that cases copy."""
    folder = tmp_path_factory.mktemp("bench")
    before = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            bench.write_bench(folder, world, base_model, checkpoint_folder)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(original, tmp_path, monkeypatch):
    """A copy of the folder, which is the working directory."""
    shutil.copytree(original, tmp_path / "x")
    monkeypatch.chdir(tmp_path / "x")
    return Path()


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """{path: bytes, None for a folder}"""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refusal(stage: str, options: dict) -> str:
    """What a stage writes on stderr before it ends with exit code 2, progress bars left out."""
    module, stderr = bench.module_of(stage), io.StringIO()
    command = [STAGE_FILE.get(stage, stage), *bench.arguments_of(stage, options)]
    with (
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as end,
    ):
        run(module.main, module.Options)
    assert end.value.code == 2, stderr.getvalue()
    return stderr.getvalue()


STAGE_FILE = {stage: module for stage, (module, _) in bench.STAGES.items()}


@pytest.mark.parametrize("case", CASES, ids=[f"{case.stage}-{case.kind}-{i}" for i, case in enumerate(CASES)])
def test_one_line_and_nothing_left_behind(case, here, record_property):
    record_property("stage", case.stage)
    record_property("kind", case.kind)
    if case.damage:
        case.damage()
    before = snapshot(here)
    stderr = refusal(case.stage, case.options)
    lines = [line for line in stderr.splitlines() if line.strip() and not re.search(r"\d+%\||\d+it \[", line)]
    assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].isprintable(), stderr
    for part in case.found:
        assert part in lines[0], lines[0]
    assert REMEDY.search(lines[0]), lines[0]
    assert snapshot(here) == before


NOT_REPEATED = (
    "run.json",
    "training_args.bin",
    "trainer_state.json",
    "results.json",
    "log.jsonl",
    ".html",
    "README.md",
)  # times


@pytest.mark.parametrize("stage", bench.STAGES)
def test_the_commands_without_the_damage_give_the_same_bytes_twice(stage, original, tmp_path, monkeypatch, capsys):
    found = []
    for name in ("one", "two"):
        shutil.copytree(original, tmp_path / name / "x")
        monkeypatch.chdir(tmp_path / name / "x")
        bench.call(stage, {})
        written = snapshot(Path())
        printed = {"stdout": capsys.readouterr().out if stage in ("recommend", "report") else ""}
        found.append(printed | {path: data for path, data in written.items() if not path.endswith(NOT_REPEATED)})
    assert found[0].keys() == found[1].keys()
    assert [path for path in found[0] if found[0][path] != found[1][path]] == []


def test_the_table_is_large_and_covers_every_stage():
    assert len(CASES) >= 150 and {case.stage for case in CASES} == set(bench.STAGES)
