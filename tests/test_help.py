"""`--help` of every entry script, and the first line of every stage, come without heavy imports.

The bound is CPU seconds of the process, not seconds on the clock, so other work on the machine does not matter; it is
generous (the aim is 1.5 s on an idle machine). What is checked exactly is that no heavy package is imported.
`PYTHONPATH=.:tests python tests/test_help.py` prints the median of three runs for every script.
"""

import re
import resource
import statistics
import subprocess
import sys

import numpy as np
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
    f"benchmarks.{name}"
    for name in ("data", "decode", "grpo_step", "sft_sequence", "sft_step", "sid", "sid_table", "text2emb")
}
SCRIPTS = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for path in [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    if re.search(r"^    run\(main, Options\)", path.read_text(encoding="utf-8"), re.M)
)
STAGES = {  # options with a value that exists; {folder} is the world's
    "convert_dataset": "--dataset_name toy --data_dir {folder} --output_dir {out}",
    "evaluate": "--base_model {folder} --test_data_path {folder}/test/toy.csv --info_file {folder}/info/toy.txt "
    "--result_json_data {out}/x.json",
    "rl": "--model_path {folder} --train_file {folder}/train/toy.csv --eval_file {folder}/valid/toy.csv "
    "--info_file {folder}/info/toy.txt --output_dir {out} --reward_type ranking",
    "rq.rqvae": "--data_path {folder}/toy.npy --ckpt_dir {out} --num_emb_list 8 8",
    "rq.rqkmeans_constrained": "--data_path {folder}/toy.npy --output_file {out}/toy.index.json --k 8",
    "sasrec": "--train_file {folder}/train/toy.csv --valid_file {folder}/valid/toy.csv --test_file {folder}/test/toy.csv "
    "--info_file {folder}/info/toy.txt --output_dir {out}",
    "sft": "--base_model {folder} --train_file {folder}/train/toy.csv --eval_file {folder}/valid/toy.csv "
    "--sid_index_path {folder}/toy.index.json --item_meta_path {folder}/toy.item.json --output_dir {out}",
}
CHILD = """
import atexit, runpy, sys
atexit.register(lambda: print("imported:", *(name for name in {heavy} if name in sys.modules)))
sys.path.insert(0, "")
if {stop}:  # once the first line is printed
    from minionerec.common import runs
    runs.identity_of = lambda *_: sys.exit()
sys.argv = [{script!r}, *{arguments!r}]
runpy.run_module({script!r}, run_name="__main__", alter_sys=True)
"""


def started(script: str, *arguments: str, stop: bool = False) -> tuple[str, str, float]:
    """(output, heavy packages that were imported, CPU seconds)"""
    code = CHILD.format(heavy=HEAVY, script=script, arguments=arguments, stop=stop)
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
    assert "usage:" in text and seconds < MOST_SECONDS
    assert heavy == ("polars" if script == "benchmarks.sid_variants" else "")


@pytest.mark.parametrize("script", STAGES)
def test_the_first_line_of_a_stage_is_fast(script, world, tmp_path):
    np.save(world.folder / "toy.npy", np.random.default_rng(0).normal(size=(48, 4)).astype(np.float32))
    arguments = STAGES[script].format(folder=world.folder, out=tmp_path).split()
    text, heavy, seconds = started(script, *arguments, stop=True)
    assert re.fullmatch(r"\w+: reads [^\n]*toy[^\n]*\n", text) and seconds < MOST_SECONDS
    assert heavy in ("", "polars")


if __name__ == "__main__":
    for name in SCRIPTS:
        print(f"{name:45} {statistics.median(started(name, '--help')[2] for _ in range(3)):.2f}", flush=True)
