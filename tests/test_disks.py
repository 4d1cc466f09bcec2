"""Full and read-only disks: each stage ends with one line, and resumes when there is room.

Invariants: exit code 2, one error line that names the disk's problem, no traceback; no result is half-written; the same
command succeeds after space was freed.
"""

import json
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import arguments_of, sft_environment


@pytest.fixture
def run(world, base_model, tmp_path, small_disk, python):
    """A function that runs a stage, which writes to `small_disk`: (exit code, what it has printed)."""
    np.save(tmp_path / "toy.emb-x-td.npy", np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32))
    files = {"TRAIN_FILE": world.train, "VALID_FILE": world.valid, "TEST_FILE": world.test, "INFO_FILE": world.info}
    config = json.loads((base_model / "config.json").read_text())
    small = {k: config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "num_hidden_layers": 2} | small))
    out = small_disk / "out"
    stages = {
        "convert_dataset": {"DATASET_NAME": "toy", "DATA_DIR": world.folder, "OUTPUT_DIR": out},
        "sasrec": files | {"OUTPUT_DIR": out, "HIDDEN_SIZE": 8, "EPOCHS": 1, "DEVICE": "cpu"},
        "rq.rqvae": {
            "DATA_PATH": tmp_path / "toy.emb-x-td.npy", "CKPT_DIR": out, "LAYERS": [64], "NUM_EMB_LIST": [8, 8],
            "EPOCHS": 2, "EVAL_STEP": 1, "WARMUP_EPOCHS": 0,
        },
        "sft": sft_environment(world, base_model, out, SFT_TASKS="sid_seq", NUM_EPOCHS=1),
    }  # fmt: skip

    def start(stage: str) -> SimpleNamespace:
        options = {name.lower(): value for name, value in stages[stage].items() if name != "NPROC"}
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        code, _ = python.run(["-m", stage, *arguments_of(options)], log)
        return SimpleNamespace(returncode=code, printed=log.read_text())

    return start


def files_of(folder) -> dict:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def assert_one_line(done, *found: str) -> None:
    assert done.returncode == 2, done.printed
    lines = [line for line in done.printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.printed, done.printed
    assert any(text in lines[0] for text in found), lines[0]


@pytest.mark.parametrize(
    "stage, kilobytes",
    [
        ("convert_dataset", 4),
        ("sasrec", 4),
        ("rq.rqvae", 4),
        ("rq.rqvae", 60),
        ("sft", 4),
        ("sft", 60),
    ],
)
def test_a_full_disk(run, small_disk, stage, kilobytes):
    """With hardly any room, and with room for some of the files."""
    (small_disk / "filler").write_bytes(b"x" * 1024 * (1024 - kilobytes))
    assert_one_line(run(stage), "No space left on device", "free disk space")
    assert not [name for name in files_of(small_disk) if name.endswith(".tmp")]
    (small_disk / "filler").unlink()
    again = run(stage)
    assert again.returncode == 0, again.printed


@pytest.mark.parametrize("stage", ["convert_dataset", "sasrec", "rq.rqvae", "sft"])
def test_a_read_only_disk(run, small_disk, stage):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert_one_line(run(stage), "Read-only file system")


@pytest.mark.parametrize("stage", ["convert_dataset", "sasrec", "rq.rqvae", "sft"])
def test_a_file_where_a_folder_should_be(run, small_disk, stage):
    (small_disk / "out").write_text("precious")
    assert_one_line(run(stage), "Not a directory", "File exists", "not a folder")
    assert (small_disk / "out").read_text() == "precious"
