"""`--help` of every entry script comes without heavy imports.

The bound is CPU seconds of the process, not seconds on the clock, so other work on the machine does not matter; it is
generous (the aim is 1.5 s on an idle machine). What is checked exactly is that no heavy package is imported.
"""

import re
import resource
import subprocess
import sys

import pytest
from helpers import ROOT

ROOMS = ("minionerec", "rq", "preprocess", "benchmarks")
HEAVY = (
    "torch",
    "transformers",
    "polars",
    "trl",
    "datasets",
    "accelerate",
    "faiss",
    "sklearn",
    "scipy",
    "matplotlib",
    "wandb",
)
MOST_SECONDS = 3.0
SLOW = {  # benchmarks that import what they measure before they read their options
    f"benchmarks.{name}" for name in ("data", "decode", "grpo_step", "sft_sequence", "sft_step", "sid", "sid_table")
}
SCRIPTS = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for path in [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    if re.search(r"^    run\(main, Options\)", path.read_text(encoding="utf-8"), re.M)
)
CHILD = """
import atexit, runpy, sys
atexit.register(lambda: print("imported:", *(name for name in {heavy} if name in sys.modules)))
sys.path.insert(0, "")
sys.argv = [{script!r}, *{arguments!r}]
runpy.run_module({script!r}, run_name="__main__", alter_sys=True)
"""


def started(script: str, *arguments: str) -> tuple[str, str, float]:
    """(output, heavy packages that were imported, CPU seconds)"""
    code = CHILD.format(heavy=HEAVY, script=script, arguments=arguments)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    text, _, heavy = done.stdout.rpartition("imported:")
    return text, heavy.strip(), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_all_entry_scripts_are_found():
    assert {"sft", "rl", "evaluate", "recommend", "sasrec", "report", "rq.rqvae", "benchmarks.decode"} <= {*SCRIPTS}


@pytest.mark.parametrize("script", sorted({*SCRIPTS} - SLOW))
def test_help_is_fast(script):
    text, heavy, seconds = started(script, "--help")
    assert "usage:" in text and heavy == "" and seconds < MOST_SECONDS
