"""The command rq.rqvae: its record, its refusals, the same bytes from the same seed.

Invariants: a finished training is not repeated; other options in its folder are refused, and --overwrite True moves the
old training aside; options that do not shape the result do not count; invalid input is one line and leaves nothing.
"""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT
from rq_helpers import index, refusal, train

from minionerec.catalog.sids import read_index
from minionerec.common.errors import UserError
from rq import rqvae


def test_finished_run_is_kept_and_another_refused(embedding_file, tmp_path, capsys):
    folder = tmp_path / "ckpt"
    train(embedding_file, folder, epochs=2, num_workers=4)
    assert "--num_workers 4 is ignored" in capsys.readouterr().out
    stamp = (folder / "best_loss.safetensors").stat().st_mtime_ns
    (folder / "epoch_2.safetensors").unlink()  # the user may delete what is not the result
    train(embedding_file, folder, epochs=2, save_limit=1)
    assert "nothing to do" in capsys.readouterr().out
    assert (folder / "best_loss.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"another result \(lr is 0.001 there and 0.002 now\)"):
        train(embedding_file, folder, epochs=2, lr=2e-3)
    before = (folder / "best_loss.safetensors").read_bytes()
    train(embedding_file, folder, epochs=2, lr=2e-3, overwrite=True)
    assert json.loads((folder / "run.json").read_text())["settings"]["lr"] == 2e-3
    assert (tmp_path / "ckpt.1" / "best_loss.safetensors").read_bytes() == before


def test_another_training_does_not_touch_the_checkpoints_of_the_old_one(embedding_file, tmp_path):
    """Not even those that are not its result."""
    train(embedding_file, tmp_path / "ckpt", epochs=4, eval_step=1)
    train(embedding_file, tmp_path / "ckpt", epochs=2, eval_step=1, save_limit=1, overwrite=True)
    assert {path.name for path in (tmp_path / "ckpt").glob("epoch_*")} == {"epoch_2.safetensors"}
    assert len(list((tmp_path / "ckpt.1").glob("epoch_*"))) == 4


def test_same_seed_same_bytes(embedding_file, tmp_path):
    for run in ("one", "two"):
        train(embedding_file, tmp_path / run, epochs=5, eval_step=5)
        index(tmp_path / run, embedding_file, tmp_path / f"{run}.index.json", collision="extra_token")
    train(embedding_file, tmp_path / "other", epochs=5, eval_step=5, seed=7)
    index(tmp_path / "other", embedding_file, tmp_path / "other.index.json", collision="extra_token")
    one, two, other = ((tmp_path / f"{run}.index.json").read_bytes() for run in ("one", "two", "other"))
    assert one == two != other
    sids = read_index(tmp_path / "one.index.json")
    assert len(sids) == len(set(sids)) == 96
    report = json.loads((tmp_path / "one.index.quality.json").read_text())
    assert report["after"]["collision_rate"] == 0 < report["before"]["collision_rate"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learner": "lion"}, "--learner lion: expected one of adam"),
        ({"sk_epsilons": [0.0]}, "expected 2 values"),
        ({"sk_epsilons": [0.0, -1.0]}, "expected 2 values of 0 or more"),
        ({"sk_epsilons": [0.0, float("nan")]}, "expected a finite number"),
        ({"dropout_prob": 1.0}, "--dropout_prob 1.0: expected 0 or more and below 1"),
        ({"epochs": 0}, "--epochs 0: expected at least 1"),
        ({"lr": float("inf")}, "--lr inf: expected a finite number"),
        ({"lr": 0.0}, "--lr 0.0: expected more than 0"),
        ({"seed": -1}, "--seed -1: expected 0 to"),
        ({"layers": [16, 0]}, r"--layers \[16, 0\]: expected sizes of at least 1"),
        ({"num_emb_list": []}, "--num_emb_list"),
        ({"num_emb_list": [8, 1]}, "expected 2 to 65536 codes per level"),
        ({"num_emb_list": [256, 256]}, "n=96 rows .* fewer than K=256; lower --num_emb_list"),
        ({"batch_size": 4}, "n=96 rows with --batch_size 4"),
        ({"dead_code_threshold": -1.0}, "--dead_code_threshold -1.0: expected at least 0"),
        ({"ckpt_dir": ""}, "--ckpt_dir is required"),
        ({"data_path": ""}, "--data_path is required"),
    ],
)
def test_bad_options_leave_nothing(embedding_file, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train(**{"data_path": embedding_file, "ckpt_dir": tmp_path / "ckpt", "epochs": 2} | options)
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": True}, "--compile True is for cuda, but the device is cpu"),
        ({"device": "cuda:99"}, "--device cuda:99 is not on this machine"),
        ({"device": "abacus"}, "--device abacus is not on this machine"),
        ({"lr": 1e30, "learner": "sgd", "epochs": 9}, "the loss is (nan|inf) at epoch .*; lower --lr"),
        (
            {"lr": 1e30, "learner": "sgd", "epochs": 1, "batch_size": 96},
            "weights or latents are NaN or Inf at epoch 1; lower --lr",
        ),
        ({"lr": 1e30, "epochs": 1, "batch_size": 96}, "weights or latents are NaN or Inf at epoch 1; lower --lr"),
    ],
)
def test_a_failed_start_does_not_stop_the_corrected_command(embedding_file, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train(embedding_file, tmp_path / "ckpt", **{"epochs": 2} | options)
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} <= {"run.json"}
    train(embedding_file, tmp_path / "ckpt", epochs=1)


def test_command_line_ends_in_one_line(tmp_path):
    line = refusal(rqvae, "--data_path", tmp_path / "none.npy", "--ckpt_dir", tmp_path, "--sk_epsilons", "0", "0", "0")
    assert "none.npy" in line
    assert "unknown option --lion" in refusal(rqvae, "--lion", "1")


def test_help_loads_no_heavy_library():
    """`--help` and the skipping of a finished training take a second."""
    commands = "rqvae rqkmeans_faiss rqkmeans_constrained rqkmeans_plus generate_indices sid_report"
    modules = [f"rq.{name}" for name in commands.split()] + ["rq.text2emb.amazon_text2emb"]
    code = (
        f"import sys, {', '.join(modules)}\n"
        "print([name for name in ('torch', 'sklearn', 'faiss', 'matplotlib', 'polars') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_paths_of_the_wrong_kind_are_one_line(embedding_file, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "ckpt"):
        given = ["--data_path", embedding_file, "--kmeans_init", "False"]
        assert str(tmp_path / "file") in refusal(rqvae, *given, "--ckpt_dir", folder)
    assert "not a .npy array" in refusal(rqvae, "--data_path", tmp_path, "--ckpt_dir", tmp_path / "ckpt")
    assert (tmp_path / "file").read_text() == "not a folder" and not (tmp_path / "ckpt").exists()


def test_an_installed_package_of_the_same_name_is_no_obstacle(tmp_path):
    """A task queue on the package index is also called rq."""
    (tmp_path / "rq").mkdir()
    (tmp_path / "rq" / "__init__.py").write_text("raise ImportError('the other rq')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "rq.rqvae", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "--num_emb_list" in done.stdout, done.stderr
