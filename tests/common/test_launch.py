"""Several processes started by torchrun or accelerate: the error line once, with exit code 2.

Invariants: an error that every process finds is printed once, without a traceback; errors that differ are all printed;
a defect keeps its traceback and exit code 1; a stop signal ends with 128 + its number.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

from minionerec.common import launch
from minionerec.common.processes import ERRORS, report_error

SCRIPT = """
import os, sys, time
from dataclasses import dataclass
from minionerec.common.errors import UserError
from minionerec.common.options import StageOptions, option, run

@dataclass
class Options(StageOptions):
    kind: str = option("", "how to end")

def main(options):
    if options.kind == "all":
        raise UserError("wrong")
    if options.kind == "first" and os.environ["RANK"] == "0":
        raise UserError("wrong")
    if options.kind == "defect":
        raise KeyError("defect")
    if options.kind in ("first", "sleep"):
        print("started", flush=True)
        time.sleep(100)
    print(os.environ["WORLD_SIZE"])

run(main, Options)
"""
TOOLS = {
    "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2"],
    "accelerate": [
        "accelerate",
        "--config_file",
        "config/cpu.yaml",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ],
}


def start(tool, tmp_path, kind):
    (tmp_path / "script.py").write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, "-m", "minionerec.common.launch", *TOOLS[tool], str(tmp_path / "script.py"), "--kind", kind],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.distributed
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("kind", ["", "all", "first", "defect"])
def test_errors_of_two_processes(tmp_path, tool, kind):
    process = start(tool, tmp_path, kind)
    output, errors = process.communicate(timeout=120)
    if kind == "":
        assert process.returncode == 0 and output.split() == ["2", "2"]
    elif kind == "defect":
        assert process.returncode == 1 and "KeyError: 'defect'" in errors and "Traceback" in errors
    else:
        assert process.returncode == 2 and errors == "error: wrong\n"


@pytest.mark.distributed
def test_a_stop_signal(tmp_path):
    process = start("torchrun", tmp_path, "sleep")
    assert process.stdout.readline() == "started\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in errors


@pytest.mark.parametrize(
    "content, found",
    [
        (None, "no such file"),
        ("{", "not a configuration of accelerate (while parsing"),
        ("", "not a configuration of accelerate"),
        ("- 1", "not a configuration of accelerate"),
        ("num_processes: 1", "not a configuration of accelerate (A `distributed_type` must be specified"),
        ("distributed_type: MANY", "not a configuration of accelerate ('MANY' is not a valid DistributedType"),
        ("distributed_type: 'NO'\nmany: 1", "not a configuration of accelerate"),
        ("\x00\xff", "not a configuration of accelerate"),
    ],
)
def test_a_wrong_file_of_accelerate_is_one_line(content, found, tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    monkeypatch.setattr(sys, "argv", ["launch", "accelerate", "--config_file", str(path), "rl.py"])
    assert launch.main() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: {found}") and error.count("\n") == 1 and "check ACCELERATE_CONFIG" in error


def test_a_lock_of_a_killed_compiler_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    launch.note_locks()
    assert capsys.readouterr().out == ""
    lock.touch()
    launch.note_locks()
    assert f"{lock}: a process compiles here" in capsys.readouterr().out
    assert lock.exists()


def test_a_process_that_is_ended_while_it_reports_leaves_no_line(monkeypatch, capsys):
    def start(tool, arguments):
        folder = Path(os.environ[ERRORS])
        monkeypatch.setenv("RANK", "0")
        report_error("no such file")
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setattr(os, "replace", lambda *_: sys.exit("ended"))  # torchrun ends the others when one has failed
        with pytest.raises(SystemExit):
            report_error("no such file")
        (folder / ".1.99.tmp").write_text("error: no s")
        raise subprocess.CalledProcessError(1, tool)

    monkeypatch.setenv(ERRORS, "")  # which `main` sets
    monkeypatch.setattr(sys, "argv", ["launch", "torchrun"])
    monkeypatch.setattr(launch, "start", start)
    assert launch.main() == 2 and capsys.readouterr().err == "error: no such file\n"
