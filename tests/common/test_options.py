"""Options: the command line and variables of a launcher fill the same dataclass, and an error of the user is one line.

Invariants: a variable sets the option (or alias) of its name, an empty one is the default, the command line overrides
it; unknown options, abbreviations and numbers that are not finite are refused; `--help` shows the first paragraph of
the script's docstring; errors of the operating system, polars and safetensors are one line with exit code 2.
"""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import polars as pl
import pytest
import safetensors
import torch
from helpers import ROOT, run_stage
from safetensors.torch import load_file

from minionerec.common.errors import UserError
from minionerec.common.options import (
    INPUT,
    OUTPUT,
    SETTING,
    StageOptions,
    arguments_from_variables,
    message_of,
    option,
    parse,
    role_of,
)


@dataclass
class Options(StageOptions):
    train_file: str = option("", "train CSV", role=INPUT)
    lr: float = option(1e-3, "peak learning rate, 100 % of it", aliases=["--learning_rate", "--rate"])
    layers: list[int] = option([256, 128], "hidden sizes")
    tied: bool = option(True, "tie the embeddings")
    seen: bool | None = option(None, "default: as the model says")
    loss: Literal["mse", "l1"] = option("mse", "reconstruction loss")
    seed: int = option(42, "seed")
    output_dir: str = option("", "folder", role=OUTPUT)


@dataclass
class Named(StageOptions):
    column: list[str] = option([], "names")


@pytest.fixture
def variables(monkeypatch):
    """Set variables as a launcher exports them."""

    def set_all(**values):
        monkeypatch.setenv("MINIONEREC_VARIABLES", "1")
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


# ------------------------------------------------------------------------------------------------ values


def test_roles():
    assert {field.name: role_of(field) for field in fields(Options) if role_of(field) != SETTING} == {
        "overwrite": "runtime", "verbose": "runtime", "quiet": "runtime", "train_file": "input", "output_dir": "output",
    }  # fmt: skip


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"LR": "0.5"}, {"lr": 0.5}),
        ({"LEARNING_RATE": "0.5"}, {"lr": 0.5}),
        ({"LR": "0.5", "LEARNING_RATE": "0.1", "RATE": "0.2"}, {"lr": 0.5}),  # the name overrides its aliases
        ({"LR": "", "RATE": "0.2"}, {"lr": 0.2}),
        ({"LR": ""}, {"lr": 1e-3}),  # empty: the default
        ({"LAYERS": "64"}, {"layers": [64]}),
        ({"LAYERS": "64 32  16"}, {"layers": [64, 32, 16]}),
        ({"LAYERS": ""}, {"layers": [256, 128]}),
        ({"TIED": "False"}, {"tied": False}),
        ({"TIED": "true"}, {"tied": True}),
        ({"TIED": "0", "SEEN": "no"}, {"tied": False, "seen": False}),
        ({"TRAIN_FILE": "a folder/$(x) '--lr'.csv"}, {"train_file": "a folder/$(x) '--lr'.csv"}),
        ({"TRAIN_FILE": "--lr"}, {"train_file": "--lr"}),
        ({"lr": "0.5", "UNKNOWN": "1"}, {}),
    ],
)
def test_variables_set_options(variables, values, expected):
    variables(**values)
    assert parse(Options, []) == Options(**expected)


def test_parts_of_a_list_with_blanks_are_quoted(variables):
    variables(COLUMN="'a b' c \"d e\"")
    assert arguments_from_variables(Named, {"COLUMN": os.environ["COLUMN"]}) == ["--column", "a b", "c", "d e"]
    variables(COLUMN="'a b")
    with pytest.raises(UserError, match="COLUMN is .*, expected parts between blanks"):
        parse(Named, [])


def test_the_command_line_overrides_variables(variables):
    variables(LR="0.5", LAYERS="64 32", TIED="False", SEED="7")
    options = parse(Options, ["--rate", "0.25", "--layers", "8", "--tied"])
    assert (options.lr, options.layers, options.tied, options.seed) == (0.25, [8], True, 7)


def test_spellings():
    """With dashes, `--no_` for a true default, a bool without a value."""
    options = parse(Options, ["--train-file", "x", "--no_tied", "--seen", "--output_dir=a=b", "--learning_rate=-1"])
    assert options == Options(train_file="x", tied=False, seen=True, output_dir="a=b", lr=-1.0)
    assert parse(Options, ["--no-tied"]).tied is False


def test_variables_count_only_under_a_launcher(monkeypatch):
    monkeypatch.delenv("MINIONEREC_VARIABLES", raising=False)
    monkeypatch.setenv("LR", "0.5")
    assert parse(Options, []).lr == 1e-3


def test_every_option_can_be_a_variable():
    names = {field.name.upper(): "1" for field in fields(Options)}
    arguments = arguments_from_variables(Options, names)
    assert {argument.split("=")[0] for argument in arguments if argument != "1"} == {f"--{n.lower()}" for n in names}


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--nonsense", "1"], "unknown option --nonsense"),
        (["stray"], "unknown option stray"),
        (["--output", "x"], "unknown option --output"),  # no abbreviations
        (["--lr", "fast"], "argument --lr/--learning_rate/--rate: invalid float value: 'fast'"),
        (["--lr", "nan"], "--lr nan: expected a finite number"),
        (["--lr=-1e300"], "--lr -1e+300: expected at most 1e+30"),
        (["--lr", "1e999"], "--lr inf: expected a finite number"),
        (["--layers", "8", "x"], "invalid int value: 'x'"),
        (["--seed", "-1"], "--seed -1: expected 0 to 4294967295"),
        (["--seed", "4294967296"], "--seed 4294967296: expected 0 to"),
        (["--seed", "9" * 5000], "invalid int value"),
        (["--layers", "8", "2147483648"], "--layers [8, 2147483648]: expected at most 2147483647"),
        (["--layers", "-2147483648"], "--layers [-2147483648]: expected at most 2147483647"),
        (["--tied", "maybe"], "maybe"),
        (["--loss", "l2"], "invalid choice: 'l2' (choose from 'mse', 'l1')"),
        (["--lr"], "expected one argument"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(UserError) as refused:
        parse(Options, arguments)
    assert message in str(refused.value)


def test_a_wrong_variable_is_named(variables):
    variables(LR="fast")
    with pytest.raises(UserError, match="argument --lr.*'fast'"):
        parse(Options, [])


def test_require_and_checks(tmp_path):
    with pytest.raises(UserError, match="--output_dir is required"):
        Options().require("output_dir")
    with pytest.raises(UserError, match="--train_file is required"):
        Options().require("train_file")
    missing = str(tmp_path / "none.csv")
    with pytest.raises(UserError, match=f"{missing}: no such file or folder; check --train_file"):
        Options(train_file=missing).require("train_file")
    with pytest.raises(UserError, match="--lr 0.001: expected at least 1"):
        Options().at_least(1, "seed", "lr")
    Options().at_least(1, "seed")
    with pytest.raises(UserError, match="--seed 42: expected 41"):
        Options().check(lr=(True, "nothing"), seed=(False, "41"))


# ------------------------------------------------------------------------------------------------ help


def test_help(capsys, monkeypatch):
    paragraph = "Train a model,\nin two lines.\n\n    python x.py --lr 1\n"
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", paragraph)
    with pytest.raises(SystemExit) as done:
        parse(Options, ["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    assert "Train a model, in two lines.\n" in text and "python x.py" not in text
    assert "--lr, --learning_rate, --rate float" in text and "100 % of it (default: 0.001)" in text
    assert "--train_file str" in text and "(default: )" not in text and "--no_tied" not in text
    assert (
        "--tied True|False" in text
        and "--loss mse|l1" in text
        and "--layers int …" in text
        and "--train-file" not in text
    )


# ------------------------------------------------------------------------------------------------ errors of others


def raised(function, *arguments) -> Exception:
    with pytest.raises(Exception) as error:
        function(*arguments)
    return error.value


def test_errors_of_libraries_are_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "ragged.csv").write_text('a,b\n1,2,3\n4,"5\n')
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    cases = [
        (raised(open, tmp_path / "none"), f"{tmp_path / 'none'}: No such file or directory; check the path"),
        (raised((tmp_path / "file" / "x").mkdir), "Not a directory; check the path"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; check the path, its permissions"),
        (raised(pl.read_csv, tmp_path / "ragged.csv"), "a table could not be read or written"),
        (raised(load_file, tmp_path / "model.safetensors"), "a file of weights could not be read or written"),
        (raised(torch.empty, 10**15), "not enough memory"),
        (raised(np.empty, 10**15), "not enough memory"),
        (safetensors.SafetensorError("I/O error: No space left on device"), "free disk space"),
        (RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos\n more"), "free disk space"),
    ]
    for error, expected in cases:
        assert expected in message_of(error) and "\n" not in message_of(error)
    assert message_of(RuntimeError("a defect")) is None and message_of(KeyError("x")) is None


SCRIPT = """
import sys
from dataclasses import dataclass
from minionerec.common.options import StageOptions, option, run

@dataclass
class Options(StageOptions):
    error: str = option("", "what to raise")

def main(options):
    print("result")
    if options.error == "defect":
        raise KeyError("defect")
    if options.error == "stopped":
        raise KeyboardInterrupt
    if options.error == "lines":
        raise OSError(5, "a message\\nof two lines", "x")
    if options.error == "pipe":
        raise BrokenPipeError

run(main, Options)
"""


@pytest.mark.parametrize("error, code", [("", 0), ("lines", 2), ("defect", 1), ("stopped", 130), ("pipe", 141)])
def test_exit_codes(error, code):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "--error", error], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == code and done.stdout == "result\n"
    assert ("Traceback" in done.stderr) == (error == "defect")
    if error == "lines":
        assert done.stderr == (
            "error: x: a message of two lines; check the path, its permissions and the free disk space\n"
        )


def test_debug_adds_the_traceback():
    done = run_stage("sasrec.py", "--train_file", "none", "--debug", check=False)
    assert done.returncode == 2 and "Traceback" in done.stderr
    assert done.stderr.endswith(f"error: none: no such file or folder; check --train_file (in {ROOT})\n")
