"""What stages print.

Invariants: --quiet leaves results, notes and errors, --verbose adds details; only the first process prints; without a
terminal no bar is drawn, by us or by a library, and progress is a line with the estimated end; messages of libraries that
no user can act on are left out, others are not.
"""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import warnings

import pytest
from helpers import ROOT

from minionerec.common import console
from minionerec.common.errors import UserError
from minionerec.common.options import StageOptions, parse


@pytest.fixture(autouse=True)
def undo(monkeypatch):
    """Levels, filters and variables as they were."""
    before = dict(os.environ)
    yield
    console._level = console.NORMAL
    for name in console.NOISE:
        logging.getLogger(name).filters.clear()
    for name in set(os.environ) - set(before):
        del os.environ[name]


def printed(capsys, **level) -> list[str]:
    console.configure(**level)
    console.say("line")
    console.detail("detail")
    console.note("look")
    return capsys.readouterr().out.splitlines()


def test_levels(capsys, monkeypatch):
    assert printed(capsys) == ["line", "note: look"]
    assert printed(capsys, quiet=True) == ["note: look"]
    assert printed(capsys, verbose=True) == ["line", "detail", "note: look"]
    monkeypatch.setenv("RANK", "1")
    assert printed(capsys, verbose=True) == []


def test_every_stage_has_both_options_and_not_at_once():
    assert parse(StageOptions, ["--quiet"]).quiet and parse(StageOptions, ["--verbose"]).verbose
    with pytest.raises(UserError, match="exclude each other"):
        parse(StageOptions, ["--quiet", "--verbose"])


@pytest.mark.parametrize(
    "value, text",
    [(0.0154, ".0154"), (-4.934, "-4.93"), (-0.5, "-.5"), (0.008, ".008"), (0.0, "0"), (1.0, "1"), (12.34, "12.3"), (0.99996, "1"),
     (768, "768"), (123456.7, "123457"), (2e-5, "2e-05"), (float("nan"), "nan"), (10.0, "10")],
)  # fmt: skip
def test_figures_are_short(value, text):
    assert console.short(value) == text
    assert console.figures({"loss": value, "KL": value}) == f"loss {text}  KL {text}"


def test_durations():
    assert [console.duration(s) for s in (0.4, 89, 90, 3000, 11520)] == ["0 s", "89 s", "2 min", "50 min", "3.2 h"]


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    for _ in console.track(range(5), "embedding", unit="batches"):
        now[0] += 20
    lines = ["embedding 2/5 batches  40 s, 60 s left", "embedding 4/5 batches  80 s, 20 s left"]
    assert capsys.readouterr().out.splitlines() == lines
    console.configure(quiet=True)
    assert list(console.track(range(50), "embedding")) == list(range(50)) and capsys.readouterr().out == ""


CHILD = """
import sys
from minionerec.common import console
console.configure(*map(int, sys.argv[1:]))
from tqdm import tqdm
for _ in console.track(range(3), "ours"): console.say("said")
for _ in tqdm(range(3), desc="theirs"): pass
"""


def test_no_bar_in_a_file():
    done = subprocess.run([sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("said\n" * 3, "")


def on_a_terminal(*level: str) -> tuple[str, str]:
    """(standard output, what is drawn on a terminal of 80 columns)"""
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = [sys.executable, "-c", CHILD, *level]
    # Not the variables that `configure` has set in this process, which has no terminal
    environment = {name: value for name, value in os.environ.items() if not re.search("TQDM|PROGRESS_BARS", name)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=terminal, text=True)
    os.write(terminal, b"end")
    drawn = ""
    while not drawn.endswith("end"):
        drawn += os.read(ours, 1 << 16).decode()
    return done.stdout, drawn


def test_a_bar_on_a_terminal():
    said, drawn = on_a_terminal()
    assert said == "said\n" * 3 and "ours 0/3" in drawn and "theirs" in drawn
    assert on_a_terminal("0", "1") == ("", "end")  # --quiet


def test_only_messages_that_nobody_can_act_on_are_left_out(caplog):
    [(name, (beginning, *_)), *_] = console.NOISE.items()
    logger = logging.getLogger(name)
    caplog.set_level(logging.INFO, logger=name)
    console.configure()
    logger.warning(f"{beginning}, and more")
    logger.info("started")
    logger.error("the device has no memory left")
    assert [record.getMessage() for record in caplog.records] == ["the device has no memory left"]
    with warnings.catch_warnings(record=True) as shown:
        console.configure()
        warnings.warn(console.WARNINGS[0] + ", and more", stacklevel=1)
        warnings.warn("the data has no rows", stacklevel=1)
    assert [str(each.message) for each in shown] == ["the data has no rows"]
    logger.filters.clear()
    console.configure(verbose=True)
    logger.warning(beginning)
    assert caplog.records[-1].getMessage() == beginning
