"""Checkpoints that are damaged, foreign, not finite or unfinished: one line with the file; no index is written."""

import json
import os

import numpy as np
import pytest
import torch
from rq_helpers import index, normal, plus, train
from safetensors.torch import load_file, save_file

from minionerec.common.errors import UserError
from rq.trainer import Trainer


def test_bad_checkpoints(embedding_file, tmp_path):
    train(embedding_file, tmp_path / "ckpt", epochs=1)
    output = tmp_path / "D.index.json"
    np.save(tmp_path / "wide.npy", normal(96, 13))
    with pytest.raises(UserError, match="13 columns, but .* was trained on 12"):
        index(tmp_path / "ckpt", tmp_path / "wide.npy", output)
    config = json.loads((tmp_path / "ckpt" / "config.json").read_text())
    for change, message in (
        ({"architecture": "transformer"}, "architecture 'transformer', expected one of"),
        ({"model": {**config["model"], "e_dim": 5}}, "does not fit its config.json"),
        ({"model": {**config["model"], "loss_type": "l3"}}, "does not fit its config.json"),
        ({"model": {**config["model"], "layers": "big"}}, "does not fit its config.json"),
        ({"model": None}, "expected model with in_dim and num_emb_list"),
        ({"model": {**config["model"], "num_emb_list": [8, "8"]}}, "expected model with in_dim and num_emb_list"),
    ):
        (tmp_path / "ckpt" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message) as error:
            index(tmp_path / "ckpt", embedding_file, output, collision="extra_token")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        index(tmp_path / "nowhere", embedding_file, output)
    assert not output.exists()


def test_checkpoint_of_another_architecture(kmeans_file, tmp_path):
    np.savez(tmp_path / "books.npz", codebook_0=normal(32, 10), codebook_1=normal(32, 10))
    plus(kmeans_file, tmp_path / "plus", tmp_path / "books.npz", epochs=1)
    config = json.loads((tmp_path / "plus" / "config.json").read_text())
    config |= {"architecture": "rqvae", "model": {"in_dim": 10, "num_emb_list": [32, 32]}}
    (tmp_path / "plus" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit its config.json"):
        index(tmp_path / "plus", kmeans_file, tmp_path / "x.index.json")


def with_nan(weights, path):
    weights["quantizer.levels.1.codebook"][3] = torch.nan
    save_file(weights, path)


DAMAGE = {
    "NaN": (with_nan, "NaN or Inf in 1 of 10 tensors, first quantizer.levels.1.codebook"),
    "truncated": (lambda _, path: os.truncate(path, path.stat().st_size - 9), "not a file of weights"),
    "empty": (lambda _, path: path.write_bytes(b""), "not a file of weights"),
    "text": (lambda _, path: path.write_text("weights"), "not a file of weights"),
    "another model's": (lambda _, path: save_file({"lm_head.weight": torch.ones(2, 2)}, path), "does not fit its"),
    "a folder": (lambda _, path: (path.unlink(), path.mkdir()), "best_collision.safetensors: no such file"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_weights(case, embedding_file, tmp_path):
    train(embedding_file, tmp_path / "ckpt", epochs=1, num_emb_list=[16, 16])
    change, message = DAMAGE[case]
    path = tmp_path / "ckpt" / "best_collision.safetensors"
    change(load_file(path), path)
    with pytest.raises(UserError, match=message) as error:
        index(path if case == "a folder" else tmp_path / "ckpt", embedding_file, tmp_path / "D.index.json")
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / "D.index.json").exists()


def test_an_unfinished_training_is_refused(embedding_file, tmp_path, monkeypatch):
    save_state = Trainer.save_state

    def save_then_die(self):
        save_state(self)
        raise KeyboardInterrupt

    options = {"epochs": 4, "eval_step": 2, "num_emb_list": [16, 16]}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "save_state", save_then_die)
        train(embedding_file, tmp_path / "ckpt", **options)
    output = tmp_path / "D.index.json"
    for record in (True, False):  # also where the record was lost
        with pytest.raises(UserError, match="has not finished; run it again to resume it, or give one of its files"):
            index(tmp_path / "ckpt", embedding_file, output)
        if record:
            (tmp_path / "ckpt" / "run.json").rename(tmp_path / "run.json")
    (tmp_path / "run.json").rename(tmp_path / "ckpt" / "run.json")
    index(tmp_path / "ckpt" / "epoch_2.safetensors", embedding_file, tmp_path / "half.index.json")
    train(embedding_file, tmp_path / "ckpt", **options)
    index(tmp_path / "ckpt", embedding_file, output)


@pytest.mark.parametrize("damage", ["truncated", "of another model"])
def test_a_damaged_state_is_one_line(damage, embedding_file, tmp_path, monkeypatch):
    save_state = Trainer.save_state

    def save_then_die(self):
        save_state(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "save_state", save_then_die)
        train(embedding_file, tmp_path / "ckpt", epochs=2, eval_step=1)
    state = tmp_path / "ckpt" / "last.pt"
    if damage == "truncated":
        os.truncate(state, state.stat().st_size // 2)
    else:
        torch.save({"epoch": 1, "best": {}, "model": {}}, state)
    with pytest.raises(UserError, match="last.pt: cannot be resumed from .*; remove it to train from the start"):
        train(embedding_file, tmp_path / "ckpt", epochs=2, eval_step=1)
    state.unlink()
    train(embedding_file, tmp_path / "ckpt", epochs=2, eval_step=1)
