"""Checkpoints: whatever does not fit is refused with its file, before anything is written."""

import json

import numpy as np
import pytest
from rq_helpers import index, normal, plus, train

from minionerec.common.errors import UserError


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
