"""One process among several: one error line, and an end that cannot abort.

Invariants: an error is one line, printed here or left for the launcher; a function of the main process runs once and
its result or error reaches every process; a process of a group exits with `os._exit` after its exit handlers, and ends with
a launcher that is killed.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT
from tqdm import tqdm

from minionerec.common.processes import ERRORS, leave_group, on_main_process, one_line, report_error


def test_an_error_is_one_line(capsys, monkeypatch):
    monkeypatch.delenv(ERRORS, raising=False)
    report_error("x.csv, row 3:\n  found\t'a'")
    assert capsys.readouterr().err == "error: x.csv, row 3: found 'a'\n"


def test_an_error_starts_a_line(capsys, monkeypatch):
    monkeypatch.delenv(ERRORS, raising=False)
    bar = tqdm(total=3)  # as a trainer that was interrupted leaves it
    bar.update()
    report_error("wrong")
    assert capsys.readouterr().err.splitlines()[-1] == "error: wrong" and bar.disable


def test_under_a_launcher_the_line_is_left_for_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv(ERRORS, str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    report_error("wrong")
    assert capsys.readouterr().err == "" and (tmp_path / "1").read_text() == "error: wrong"


def test_one_process_calls_the_function_itself():
    assert on_main_process(lambda: 3) == 3
    leave_group(2)  # returns: no process group


SEVERAL = """
import os, sys
import torch.distributed
from minionerec.common.errors import UserError
from minionerec.common.processes import on_main_process, one_line

rank, kind = int(sys.argv[1]), sys.argv[2]
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[3]}
from accelerate import PartialState
PartialState(cpu=True)

def function():
    print("called")
    if kind == "user":
        raise UserError("wrong")
    if kind == "system":
        open("/nowhere/x")
    return rank

try:
    print("result", on_main_process(function))
except Exception as error:
    print(type(error).__name__, error)
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind, line",
    [
        ("none", "result 0"),
        ("user", "UserError wrong"),
        ("system", "FileNotFoundError [Errno 2] No such file or directory: '/nowhere/x'"),
    ],
)
def test_the_main_process_works_for_all(kind, line, free_port):
    command = [sys.executable, "-c", SEVERAL]
    started = [
        subprocess.Popen([*command, rank, kind, free_port], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    output = [process.communicate(timeout=120)[0].splitlines() for process in started]
    assert output == [["called", line], [line]]


LAUNCHER = '''
import os, subprocess, sys, time
worker = """
import time
from minionerec.common.processes import end_with_launcher
end_with_launcher()
print(1, flush=True)
time.sleep(60)
"""
started = subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE, start_new_session=True)
started.stdout.readline()
print(started.pid, flush=True)
time.sleep(60)
'''


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent has ended")
@pytest.mark.parametrize("variables, lives", [({"TORCHELASTIC_RUN_ID": "none"}, False), ({}, True)])
def test_processes_end_with_a_launcher_that_is_killed(variables, lives):
    """Those of torchrun and accelerate, which are in sessions of their own."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"} | variables
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    worker = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()

    def running() -> bool:
        status = Path(f"/proc/{worker}/stat")
        return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"

    deadline = time.monotonic() + (1 if lives else 30)
    while running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running() == lives
    if lives:
        os.kill(worker, signal.SIGKILL)


ONE_OF_SEVERAL = """
import atexit, os, sys
import torch.distributed
from dataclasses import dataclass
from minionerec.common.errors import UserError
from minionerec.common.options import StageOptions, option, run

class Aborts:
    def __del__(self, abort=os.abort):  # as a gloo thread does that frees a tensor while the interpreter shuts down
        abort()

@dataclass
class Options(StageOptions):
    wrong: bool = option(False, "raise an error")

def main(options):
    sys.aborts = Aborts()
    torch.distributed.init_process_group("gloo", init_method=f"file://{os.environ['STORE']}", rank=0, world_size=1)
    atexit.register(lambda: print("tracker finished, group", torch.distributed.is_initialized()))
    print("result")
    if options.wrong:
        raise UserError("wrong")

run(main, Options)
"""


@pytest.mark.parametrize("wrong", [False, True])
def test_a_process_of_a_group_ends_without_interpreter_shutdown(tmp_path, wrong):
    done = subprocess.run(
        [sys.executable, "-c", ONE_OF_SEVERAL, "--wrong", str(wrong)],
        env=os.environ | {"STORE": str(tmp_path / "store")},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == (2 if wrong else 0), done.stderr
    assert done.stdout.split("\n") == ["result", "tracker finished, group True", ""]
    assert done.stderr.endswith("error: wrong\n" if wrong else "")


def test_an_error_is_one_printable_line_of_bounded_length():
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("x\x1b[31m\u202e\ud800 é😀") == r"x\x1b[31m\u202e\ud800 é😀"
    line = one_line(f"x.csv: found {'9' * 10_000}; check --flag")
    assert len(line) < 1000 and line.startswith("x.csv: found 999") and line.endswith("9; check --flag")
