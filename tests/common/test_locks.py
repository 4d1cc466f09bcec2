"""Locks of results.

Invariants: while a process lives, no other one begins the same result, and the message names the process; a lock ends with
its process, also where a child of it lives on; without a place for locks there are none.
"""

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import pytest
from helpers import ROOT

from minionerec.common import locks, runs
from minionerec.common.errors import UserError
from minionerec.common.locks import hold, release

HOLDER = """
import os, sys, time
from pathlib import Path
from minionerec.common.locks import hold
hold(Path(sys.argv[1]))
if sys.argv[2] != "child" or os.fork():
    print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def start(tmp_path):
    """Starts processes that hold the lock of a path."""
    started = []

    def start(path, kind=""):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path), kind], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def test_one_process_at_a_time(start, tmp_path):
    path = tmp_path / "run.json"
    other = start(path)
    with pytest.raises(UserError) as refused:
        hold(path, seconds=0.2)
    assert str(path) in str(refused.value) and f"process {other.pid} is still writing" in str(refused.value)
    hold(tmp_path / "other.run.json", seconds=0)
    release(tmp_path / "other.run.json")
    other.kill()
    hold(path)
    hold(path)  # of this process
    release(path)
    start(path)


def test_a_child_does_not_keep_the_lock_of_a_killed_parent(start, tmp_path):
    path = tmp_path / "run.json"
    parent = start(path, "child")
    parent.kill()
    parent.wait()
    hold(path, seconds=1)
    release(path)


def test_names_of_one_file_are_one_lock(start, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    start(tmp_path / "run.json")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "link" / "run.json", "run.json"):
        with pytest.raises(UserError):
            hold(path, seconds=0)


def test_nothing_stays_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    hold(tmp_path / "run.json")
    assert [path.read_text() for path in tmp_path.glob("*/*")] == [str(os.getpid())]
    release(tmp_path / "run.json")
    assert not list(tmp_path.glob("*/*"))


def test_without_a_place_there_is_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    hold(tmp_path / "run.json")
    assert locks._file_of(tmp_path / "run.json") not in locks._HELD
    release(tmp_path / "run.json")


@dataclass
class Options:
    overwrite: bool = False


def test_a_run_holds_its_record_until_it_ends(start, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "hold", lambda path: hold(path, seconds=0))
    other = start(tmp_path / "run.json")
    with pytest.raises(UserError, match="is still writing this result"):
        runs.begin(Options(), "sft", folder=tmp_path, writes=["*.safetensors"])
    assert not list(tmp_path.iterdir())
    other.kill()
    other.wait()
    run = runs.begin(Options(), "sft", folder=tmp_path, writes=["*.safetensors"])
    assert locks._file_of(tmp_path / "run.json") in locks._HELD
    run.finish()
    assert runs.begin(Options(), "sft", folder=tmp_path, writes=["*.safetensors"]).complete
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="holds another result"):
        runs.begin(Options(), "rl", folder=tmp_path, writes=["*.safetensors"])
    begun = runs.begin(Options(overwrite=True), "rl", folder=tmp_path, writes=["*.safetensors"])
    begun.withdraw()
    start(tmp_path / "run.json")  # every one of them has given the lock back
