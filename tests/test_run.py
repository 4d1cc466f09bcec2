"""run.sh: every stage is called each time, and decides itself what to do.

Invariants: a stage gets the recipe and the files of run.sh, and none of run.sh's own variables; nothing finished runs
again; a changed variable, input or template, or a deleted result, runs what depends on it, and the old result is kept.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from helpers import ROOT, run_stage

# ------------------------------------------------------------------------------------------------ what stages get

LAUNCHERS = ["sft.sh", "rl.sh", "evaluate.sh", "sasrec.sh", "convert_dataset.sh", "rq/rqvae.sh"]
LAUNCHERS += ["rq/generate_indices.sh", "rq/text2emb/amazon_text2emb.sh"]
FAKE_LAUNCHER = """#!/usr/bin/env bash
{ echo "STAGE=$0"; env; echo END; } >>calls.txt
if [ "${FAILS:-}" = "$0" ]; then echo "error: wrong" >&2; exit 2; fi
"""
FAKE_PYTHON = """#!/usr/bin/env bash
case $1 in
    -c) echo /encoder ;;
    -m) { echo "STAGE=$2"; env; echo END; } >>calls.txt ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A folder with run.sh whose stages only write down their variables."""
    for name in LAUNCHERS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(FAKE_LAUNCHER)
    (tmp_path / "shell").mkdir()
    (tmp_path / "shell" / "environment.sh").write_text("prepare_environment() { :; }\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(FAKE_PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    shutil.copy(ROOT / "run.sh", tmp_path)
    return tmp_path


def run_fake(project, **variables):
    """(completed process, [(stage, its variables), …])"""
    (project / "calls.txt").unlink(missing_ok=True)
    outside = {"PATH": f"{project / 'bin'}:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        ["bash", "run.sh"], cwd=project, env=outside | variables, capture_output=True, text=True
    )  # fmt: skip
    text = (project / "calls.txt").read_text() if (project / "calls.txt").exists() else ""
    calls = []
    for part in text.split("\nEND\n")[:-1]:
        pairs = dict(line.split("=", 1) for line in part.split("\n") if "=" in line)
        stage = Path(pairs.pop("STAGE")).name
        calls.append((stage, pairs))
    return done, calls


QUICKSTART = [
    ("preprocess.movielens", {"OUTPUT_DIR": "output/quickstart/data"}),
    ("amazon_text2emb.sh", {
        "DATASET": "ml-100k", "ROOT": "output/quickstart/data", "PLM_NAME": "minilm", "PLM_CHECKPOINT": "/encoder/model",
    }),
    ("rqvae.sh", {
        "LAYERS": "256", "LR": "3e-3", "EPOCHS": "60", "BATCH_SIZE": "512", "EVAL_STEP": "20", "WARMUP_EPOCHS": "5",
        "LR_SCHEDULER_TYPE": "linear", "QUANT_LOSS_WEIGHT": "0.1", "NUM_EMB_LIST": "256 256",
        "SK_EPSILONS": "0.01 0.01", "SK_ITERS": "30", "CKPT_DIR": "output/quickstart/rqvae",
        "DATA_PATH": "output/quickstart/data/ml-100k.emb-minilm-td.npy",
    }),
    ("generate_indices.sh", {"COLLISION": "nearest_free", "OUTPUT_FILE": "output/quickstart/data/ml-100k.index.json"}),
    ("convert_dataset.sh", {"DATASET_NAME": "ml-100k", "OUTPUT_DIR": "output/quickstart/data"}),
    ("sasrec.sh", {"MODEL": "popularity", "OUTPUT_DIR": "output/quickstart/popularity"}),
    ("sasrec.sh", {"MODEL": "markov"}),
    ("sasrec.sh", {"MODEL": "sasrec", "VALID_FILE": "output/quickstart/data/valid/ml-100k.csv"}),
    ("sasrec.sh", {"MODEL": "gru4rec", "HIDDEN_SIZE": "64", "NUM_LAYERS": "1", "LEARNING_RATE": "2e-3"}),
    ("minionerec.language_model.base_model", {"KIND": "tiny", "OUTPUT_DIR": "output/quickstart/base"}),
    ("sft.sh", {
        "BASE_MODEL": "output/quickstart/base", "TRAIN_FROM_SCRATCH": "True", "BATCH_SIZE": "64",
        "MICRO_BATCH_SIZE": "64", "NUM_EPOCHS": "1", "LEARNING_RATE": "2e-3", "OUTPUT_DIR": "output/quickstart/sft",
        "SFT_TASKS": "sid_walk:0.7,sid_seq:0.7,title2sid,sid2title,sid_seq2title:0.02,title_seq2title:0.02",
    }),
    ("evaluate.sh", {"BASE_MODEL": "output/quickstart/sft", "RESULT_JSON_DATA": "output/quickstart/sft.json"}),
    ("rl.sh", {
        "MODEL_PATH": "output/quickstart/sft", "BASELINE_PATH": "output/quickstart/gru4rec", "TRAIN_ROWS": "12288",
        "TRAIN_BATCH_SIZE": "512", "GRADIENT_ACCUMULATION_STEPS": "1", "OUTPUT_DIR": "output/quickstart/rl",
    }),
    ("evaluate.sh", {"BASE_MODEL": "output/quickstart/rl", "RESULT_JSON_DATA": "output/quickstart/rl.json"}),
]  # fmt: skip


def test_the_quickstart(project):
    done, calls = run_fake(project)
    assert done.returncode == 0, done.stderr
    assert [stage for stage, _ in calls] == [stage for stage, _ in QUICKSTART]
    for (stage, given), (_, expected) in zip(calls, QUICKSTART, strict=True):
        assert {name: given.get(name) for name in expected} == expected, stage
        everywhere = {
            "SEED": "42",
            "CATEGORY": "movies",
            "OVERWRITE": "True",
            "MINIONEREC_VARIABLES": "1",
            "NPROC": "1",
        }
        assert everywhere.items() <= given.items()
        own = {"DATASET", "BASE_MODEL", "OUTPUT", "BETA", "NUM_GENERATIONS"} - expected.keys()
        assert not any(given.get(name) for name in own), stage


def test_a_data_set_of_the_published_layout(project, world):
    variables = {"DATASET": str(world.folder), "BASE_MODEL": "some/model", "OUTPUT": "there", "SEED": "7"}
    done, calls = run_fake(project, **variables, RL_BETA="0.5", SFT_EPOCHS="3", NUM_BEAMS="10", NPROC="2")
    assert done.returncode == 0, done.stderr
    assert [stage for stage, _ in calls] == ["sasrec.sh"] * 4 + ["sft.sh", "evaluate.sh", "rl.sh", "evaluate.sh"]
    for stage, given in calls:
        assert (given["SEED"], given["CATEGORY"], given["NUM_BEAMS"], given["NPROC"]) == ("7", "toy", "10", "2")
        assert "DATASET" not in given and "OUTPUT" not in given
        assert given["TRAIN_FILE"] == str(world.train) and given["INFO_FILE"] == str(world.info), stage
    (_, sasrec), (_, gru4rec), (_, sft), _, (_, rl), _ = calls[2:]
    assert sasrec["HIDDEN_SIZE"] == "256" and gru4rec["EPOCHS"] == "12"
    assert sft["BASE_MODEL"] == "some/model" and not sft["TRAIN_FROM_SCRATCH"] and sft["NUM_EPOCHS"] == "3"
    assert rl["BASELINE_PATH"] == "there/sasrec" and rl["BETA"] == "0.5" and "BASE_MODEL" not in rl


def test_a_failed_stage_ends_the_run(project, world):
    done, calls = run_fake(project, DATASET=str(world.folder), FAILS="sft.sh")
    assert done.returncode == 2 and done.stderr == "error: wrong\n"
    assert [stage for stage, _ in calls][-1] == "sft.sh" and "results" not in done.stdout


def test_help_and_wrong_input(tmp_path):
    helped = run_stage("run.sh", "--help")
    assert helped.stdout.startswith("Runs every stage") and "DATASET" in helped.stdout and "set -e" not in helped.stdout
    wrong = run_stage("run.sh", "--sft", check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: unknown argument --sft;")


@pytest.mark.parametrize(
    "files, message",
    [
        (None, "no such folder; check DATASET"),
        ([], "found 0 files for index.json, expected exactly one like"),
        (["a.index.json", "index/b.index.json"], "found 2 files for index.json"),
        (["a.index.json", "a.item.json", "info/a.txt", "train/a.csv", "valid/a.csv"], "found 0 files for test"),
    ],
)
def test_a_folder_that_is_no_data_set(project, files, message):
    for name in files or []:
        (project / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (project / "data" / name).touch()
    if files is not None:
        (project / "data").mkdir(exist_ok=True)
    done, calls = run_fake(project, DATASET="data")
    assert done.returncode == 2 and not calls
    assert done.stderr.startswith("error: data: ") and message in done.stderr and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------ real stages


@pytest.mark.slow
def test_what_changed_runs_again(world, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(world.folder, data)
    environment = {"DATASET": data, "OUTPUT": out, "SFT_BATCH_SIZE": 16, "SFT_MICRO_BATCH_SIZE": 16, "RL_ROWS": 32}
    environment |= {"SFT_TASKS": "sid_seq", "EPOCHS": 1, "NUM_BEAMS": 20}

    def run(**more) -> tuple[str, list[str]]:
        """(output, the stages that had something to do)"""
        done = run_stage("run.sh", env=environment | more, timeout=1200)
        parts = done.stdout.split("\n[")[1:]
        assert len(parts) == 9
        return done.stdout, [part.split("]")[0] for part in parts if "nothing to do" not in part]

    def results():
        return json.loads((out / "results.json").read_text())

    stages = ["popularity", "markov", "sasrec", "gru4rec", "base_model", "sft", "sft_evaluate", "rl", "rl_evaluate"]
    output, ran = run()
    assert ran == stages
    first = results()
    for model in ("popularity", "markov", "sasrec", "gru4rec", "sft", "rl"):
        assert f"{first[model]['HR@10']:.4f}" in output

    started = time.monotonic()
    _, ran = run()
    assert ran == [] and results() == first and time.monotonic() - started < 30

    # a deleted result: only it is made again, because what it is made from is the same
    before = (out / "rl.json").read_bytes()
    (out / "rl.json").unlink()
    shutil.rmtree(out / "markov")
    _, ran = run()
    assert ran == ["markov", "rl_evaluate"] and (out / "rl.json").read_bytes() == before

    # another setting of two stages, and beams that end before the table's longest list
    _, ran = run(USE_LORA="True", NUM_BEAMS=10)
    assert ran == ["sft", "sft_evaluate", "rl", "rl_evaluate"]
    assert json.loads((out / "sft.1" / "run.json").read_text())["settings"]["use_lora"] is False
    assert (out / "rl.json.1").read_bytes() == before

    # one cell of a train CSV
    lines = (data / "train" / "toy.csv").read_text().splitlines(keepends=True)
    (data / "train" / "toy.csv").write_text("".join([lines[0], lines[1].replace("train0", "train0x"), *lines[2:]]))
    _, ran = run()
    assert ran == [stage for stage in stages if stage != "base_model"]
    assert (out / "sasrec.1" / "metrics.json").exists()
