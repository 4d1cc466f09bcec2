"""Launchers and their scripts agree.

Invariants: every variable that a launcher sets is an option (or an alias) of its script, or a variable of the launch;
no launcher repeats a default of its script; where its value differs, the line says why; each prints its usage, also
from another folder; unknown and missing options are one line with exit code 2, and nothing is written.
"""

import dataclasses
import importlib
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import ROOT, run_stage

from minionerec.common.errors import UserError
from minionerec.common.options import arguments_from_variables, parse

LAUNCH_VARIABLES = {"NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_CONFIG"}
LAUNCHERS = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("rq/**/*.sh"), *ROOT.glob("preprocess/*.sh")]
    if path.name not in ("run.sh", "test.sh")
)
LAUNCH = r"^launch .*?(\S+) \"\$@\"$"  # the last line; the script is its last word but one
ASSIGNMENT = re.compile(r"^\s*(?P<name>[A-Z][A-Z0-9_]*)=(?P<value>.*?)(?P<reason>\s+# .*)?$")


class Setting(NamedTuple):
    name: str
    value: str  # empty: the script's default
    reason: str


class Launcher(NamedTuple):
    text: str
    options: type
    settings: list[Setting]


def read(path: str) -> Launcher:
    """A launcher's text, the dataclass of its script, and the variables that it sets."""
    text = (ROOT / path).read_text()
    script = re.search(LAUNCH, text, re.MULTILINE).group(1)
    options = importlib.import_module(script.removesuffix(".py")).Options
    settings = []
    for line in text.splitlines():
        if found := ASSIGNMENT.match(line):
            value = re.fullmatch(rf"\$\{{{found['name']}:-(.*)\}}", found["value"].strip().strip('"'))
            assert value, f"{path}: {line.strip()} does not let the variable override it"
            settings.append(Setting(found["name"], value.group(1), found["reason"] or ""))
    return Launcher(text, options, settings)


def names_of(options: type) -> dict[str, dataclasses.Field]:
    """Every option and alias as a variable."""
    return {
        name.lstrip("-").upper(): field
        for field in dataclasses.fields(options)
        for name in (field.name, *field.metadata.get("aliases", ()))
    }


@pytest.mark.parametrize("path", LAUNCHERS)
def test_a_launcher_sets_options_of_its_script(path):
    launcher = read(path)
    names = names_of(launcher.options)
    for name, value, reason in launcher.settings:
        assert name in names or name in LAUNCH_VARIABLES, f"{path} sets {name}, which {launcher.options} does not have"
        if not value or name in LAUNCH_VARIABLES or "$" in value:
            continue
        field = names[name]
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        try:
            [now] = [
                getattr(parse(launcher.options, arguments_from_variables(launcher.options, {name: value})), field.name)
            ]
        except UserError as refused:  # it needs another option too
            pytest.fail(f"{path}: {name}={value} is refused: {refused}")
        assert now != default, f"{path}: {name}={value} repeats the script's default; leave it empty"
        assert reason, f"{path}: {name}={value} differs from the script's default {default!r}; say why in a comment"


@pytest.mark.parametrize("path", LAUNCHERS)
def test_settings_are_listed_once(path):
    launcher = read(path)
    fields = [names_of(launcher.options)[s.name].name for s in launcher.settings if s.name not in LAUNCH_VARIABLES]
    assert len(fields) == len(set(fields)) and len(fields) >= 3


def test_every_stage_has_a_launcher():
    scripts = {re.search(LAUNCH, (ROOT / path).read_text(), re.MULTILINE).group(1) for path in LAUNCHERS}
    assert {"sft.py", "rl.py", "evaluate.py", "sasrec.py", "convert_dataset.py", "rq.rqvae", "rq.rqkmeans_constrained",
            "rq.rqkmeans_plus", "rq.rqkmeans_faiss", "rq.generate_indices", "rq.text2emb.amazon_text2emb"} <= scripts  # fmt: skip


@pytest.mark.parametrize("path", LAUNCHERS)
def test_help(path, tmp_path):
    """From another folder: the launcher's own text, then the options of the script."""
    done = subprocess.run(
        ["bash", os.path.relpath(ROOT / path, tmp_path), "--help"],
        cwd=tmp_path,
        env=os.environ | {"LR": "not a number", "EPOCHS": "x", "BATCH_SIZE": "x"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    launcher = read(path)
    first = re.sub(r"^# ?", "", launcher.text.splitlines()[1])
    assert done.stdout.startswith(f"{first}\n") and f"bash {path}" in done.stdout.split("usage:")[0]
    for field in dataclasses.fields(launcher.options):
        assert f"--{field.name}" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", LAUNCHERS)
@pytest.mark.parametrize("arguments, found", [(["--nonsense", "1"], "unknown option --nonsense"), ([], "is required")])
def test_unknown_and_missing_options_are_one_line(path, arguments, found, tmp_path):
    before = {path.name for path in ROOT.iterdir()}
    done = run_stage(path, *arguments, env={"NPROC": 1, "ACCELERATE_CONFIG": ""}, check=False, fresh=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and found in done.stderr
    assert "output" in before or not (ROOT / "output").exists()


@pytest.mark.parametrize("path", LAUNCHERS)
def test_a_wrong_number_of_processes_is_one_line(path):
    if " python " in re.search(r"^launch .*", read(path).text, re.MULTILINE).group():
        pytest.skip("one process")
    done = run_stage(path, env={"NPROC": 0}, check=False, fresh=True)
    assert done.returncode == 2 and done.stderr == "error: NPROC is '0', expected a number of processes, at least 1\n"


@pytest.mark.parametrize("path", ["sft.sh", "rl.sh"])
def test_a_wrong_file_of_accelerate_is_one_line(path):
    done = run_stage(path, env={"NPROC": 1, "ACCELERATE_CONFIG": "nowhere.yaml"}, check=False, fresh=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: nowhere.yaml: no such file; check ACCELERATE_CONFIG")


WRONG_PATHS = {
    "sft.sh": "BASE_MODEL TRAIN_FILE EVAL_FILE SID_INDEX_PATH ITEM_META_PATH OUTPUT_DIR",
    "rl.sh": "MODEL_PATH TRAIN_FILE EVAL_FILE INFO_FILE BASELINE_PATH OUTPUT_DIR",
    "evaluate.sh": "BASE_MODEL TEST_DATA_PATH INFO_FILE RESULT_JSON_DATA",
}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
@pytest.mark.parametrize("path", WRONG_PATHS)
def test_a_wrong_path_is_one_line(path, processes, tmp_path):
    variables = {name: tmp_path / "nowhere" / name.lower() for name in WRONG_PATHS[path].split()}
    done = run_stage(
        path,
        env=variables | {"NPROC": processes, "ACCELERATE_CONFIG": "", "OMP_WAIT_POLICY": "PASSIVE"},
        check=False,
        fresh=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(rf"error: {tmp_path}/nowhere/\w+: no such file or folder; check --\w+\n", done.stderr)
    assert not list(tmp_path.iterdir())


def test_a_variable_that_is_not_listed_reaches_the_script_and_arguments_override_it(world, tmp_path):
    environment = {
        "TRAIN_FILE": world.train, "VALID_FILE": world.valid, "TEST_FILE": world.test, "INFO_FILE": world.info,
        "MODEL": "caser", "EARLY_STOP": "1", "EPOCHS": "2", "LR": "0.5", "NUM_FILTERS": "3",
        "OUTPUT_DIR": tmp_path / "out",
    }  # fmt: skip
    run_stage("sasrec.sh", "--epochs", "1", "--hidden_size", "8", env=environment, fresh=True)
    record = Path(tmp_path / "out" / "run.json").read_text()
    for found in ('"early_stop": 1', '"epochs": 1', '"learning_rate": 0.5', '"num_filters": 3', '"hidden_size": 8'):
        assert found in record
