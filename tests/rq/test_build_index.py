"""Building an index: the index is written before its picture, and a quantizer that gives NaN is refused."""

import json

import numpy as np
import pytest
import torch
from rq_helpers import index, kmeans, normal, points

from minionerec.common.errors import UserError
from rq import build_index as module
from rq.models.rq import Codebooks
from rq.models.rqvae import RQVAE


@pytest.mark.parametrize("name", ["a$b", "$_$", "$\\alpha", "50% & more"])
def test_any_name_can_be_drawn(name, kmeans_file, tmp_path):
    kmeans("faiss", kmeans_file, tmp_path / f"{name}.index.json")
    assert len(json.loads((tmp_path / f"{name}.index.json").read_text())) == len(points())
    assert (tmp_path / f"{name}.index.quality.png").read_bytes().startswith(b"\x89PNG")


def test_the_index_is_written_before_its_picture(kmeans_file, tmp_path, monkeypatch):
    np.savez(tmp_path / "books.npz", codebook_0=normal(32, 10), codebook_1=normal(32, 10))
    output = tmp_path / "D.index.json"
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_report", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            index(tmp_path / "books.npz", kmeans_file, output)
    before = output.read_bytes()
    index(tmp_path / "books.npz", kmeans_file, output)
    assert output.read_bytes() == before and output.with_suffix(".quality.png").exists()


def test_a_quantizer_that_overflows_is_refused(tmp_path):
    """Its weights are finite, its latents are not, and all items would get the same codes."""
    torch.manual_seed(0)
    model = RQVAE(in_dim=10, layers=[8], e_dim=4, num_emb_list=[32, 32], sk_epsilons=[0.0, 0.0])
    for parameter in model.encoder.parameters():
        parameter.data.fill_(1e30)
    with pytest.raises(UserError, match="gives NaN or Inf for 185 items, first item 0"):
        module.build_index(model, torch.from_numpy(points()), tmp_path / "D.index.json", "none")
    assert not list(tmp_path.iterdir())


def test_codes_replace_the_nearest_ones(tmp_path):
    x = torch.tensor([[0.0], [1.0], [2.0]])
    model = Codebooks([torch.tensor([[0.0], [1.0], [2.0]])])
    module.build_index(model, x, tmp_path / "D.index.json", "none", codes=np.array([[2], [1], [0]]))
    assert json.loads((tmp_path / "D.index.json").read_text()) == {"0": ["<a_2>"], "1": ["<a_1>"], "2": ["<a_0>"]}
