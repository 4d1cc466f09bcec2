"""The log of a training, and trackers.

Invariants: `log.jsonl` has every entry once, also after a kill; a tracker is imported only if it is asked for, gets the
same names from every stage, and one that is missing or refuses to start is a one-line error.
"""

import importlib.util
import json
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from minionerec.baselines.options import BaselineOptions
from minionerec.common import tracking
from minionerec.common.errors import UserError
from minionerec.common.options import parse
from minionerec.common.tracking import TrackedOptions, TrainingLog, read_log

ENTRY = {"step": 3, "epoch": 1.5, "loss": 0.5, "eval_NDCG@10": 0.25, "note": "text"}


def test_the_log_has_every_entry_once(tmp_path):
    log = TrainingLog(TrackedOptions(), tmp_path)
    for step in range(5):
        log.add({"step": step, "loss": step / 2 if step else float("nan")})
    (tmp_path / "log.jsonl").open("a").write('{"step": 5, "lo')  # killed while writing
    resumed = TrainingLog(TrackedOptions(), tmp_path, read_log(tmp_path, last_step=3))
    resumed.add({"step": 4, "loss": 7.0})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 0, "loss": None},
        *({"step": s, "loss": s / 2} for s in (1, 2, 3)),
        {"step": 4, "loss": 7.0},
    ]
    assert read_log(tmp_path / "none", 3) == []


def test_no_entry_no_file(tmp_path):
    """A start that is refused leaves nothing; one over an old log empties it."""
    TrainingLog(TrackedOptions(), tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "log.jsonl").write_text("{}")
    TrainingLog(TrackedOptions(), tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == ""


@pytest.mark.parametrize("content", ["words\n", '{"step": 1}\n[1]\n', '{"loss": 1}\n'])
def test_a_file_that_is_no_log_is_not_overwritten(tmp_path, content):
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(UserError, match="log.jsonl: no log of a training, and would be overwritten; move it or choose"):
        TrainingLog(TrackedOptions(), tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == content
    assert len(read_log(tmp_path)) == content.count("step")


@pytest.mark.parametrize("script", ["sft", "rl", "sasrec", "rq.rqvae", "rq.rqkmeans_plus"])
def test_every_training_takes_the_same_options(script):
    options = importlib.import_module(script).Options
    assert issubclass(options, TrackedOptions)
    with pytest.raises(UserError, match="--report_to paper: expected one of none, wandb, tensorboard, trackio"):
        parse(options, ["--report_to", "paper"])
    assert parse(options, []).report_to == "none"


def test_a_project_means_wandb(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert TrackedOptions(wandb_project="mine").report_to == "wandb"
    assert TrackedOptions(wandb_project="mine", report_to="trackio").report_to == "trackio"


@pytest.mark.parametrize("name, package", [("wandb", "wandb"), ("tensorboard", "tensorboard"), ("trackio", "trackio")])
def test_a_tracker_that_is_not_installed(name, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"^--report_to {name}: not installed; pip install {package}$"):
        BaselineOptions(report_to=name)


def test_nothing_is_imported_unless_asked_for(tmp_path):
    code = f"""
import sys
from minionerec.common.tracking import TrackedOptions, TrainingLog
log = TrainingLog(TrackedOptions(), {str(tmp_path)!r})
log.add({ENTRY!r})
log.close()
print([name for name in ("wandb", "trackio", "tensorboard", "tensorboardX", "torch") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def tracked(options, folder) -> None:
    log = TrainingLog(options, folder, [{"step": 1, "loss": 1.0}])
    log.add(ENTRY)
    log.close()


def test_wandb_offline(tmp_path, monkeypatch, capfd):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracked(TrackedOptions(report_to="wandb", wandb_project="mine", wandb_run_name="first"), tmp_path)
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    words, wait_until = (b"train/loss", b"eval/NDCG@10", b"mine", b"first"), time.monotonic() + 20
    while not all(word in file.read_bytes() for word in words):  # its service writes a moment later
        assert time.monotonic() < wait_until
        time.sleep(0.1)
    printed = capfd.readouterr()
    assert wandb.run is None and printed.out == f"wandb: offline, {file.parent}\n" and printed.err == ""


def test_wandb_that_refuses_is_one_line(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.\nmore")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match="^--report_to wandb: No API key configured.; run `wandb login` first, or set"):
        TrainingLog(TrackedOptions(report_to="wandb"), tmp_path)


def test_tensorboard(tmp_path):
    if not any(map(importlib.util.find_spec, tracking.PACKAGES["tensorboard"])):
        pytest.skip("needs tensorboard or tensorboardX")
    tracked(TrackedOptions(report_to="tensorboard"), tmp_path)
    [file] = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes() and b"eval/NDCG_10" in file.read_bytes()  # its tags have no @


def test_trackio(tmp_path, monkeypatch):
    """With a stand-in that records the calls: the package itself is optional."""
    (tmp_path / "trackio.py").write_text(
        "calls = []\n"
        "def init(**given): calls.append(given)\n"
        "def log(figures, step): calls.append((figures, step))\n"
        "def finish(): calls.append('finish')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tracked(TrackedOptions(report_to="trackio"), tmp_path)
    given, *logged = sys.modules.pop("trackio").calls
    assert (given["project"], given["name"], given["config"]["report_to"]) == ("minionerec", str(tmp_path), "trackio")
    assert logged == [({"train/loss": 0.5, "eval/NDCG@10": 0.25}, 3), "finish"]
