"""The command rq.rqkmeans_plus.

Invariants: before the first step every code is the nearest code of the codebooks and the error is theirs; training
lowers it; options that contradict the codebooks are refused; the index has a separate record, so that another
collision mode does not train again.
"""

import numpy as np
import pytest
import torch
from rq_helpers import DIM, N, kmeans, normal, plus, points

from minionerec.catalog.sids import read_index
from minionerec.common.errors import UserError
from rq.checkpoints import load_model
from rq.models.rq import Codebooks
from rq.models.rqvae import RQKMeansPlus
from rq.trainer import Trainer


def test_plus_starts_at_the_constrained_codes_and_gains(kmeans_file, tmp_path, monkeypatch, capsys):
    found = kmeans("constrained", kmeans_file, tmp_path / "D.index.json", k=32)
    books = tmp_path / "D.codebooks_constrained.npz"
    x = torch.from_numpy(points())
    frozen = Codebooks([torch.from_numpy(book) for book in found.codebooks])
    start = frozen.encode(x).codes

    seen = []
    fit = Trainer.fit

    def look_and_fit(self, start_by_batch=None):
        seen.append((self.model.encode(x).codes, self.model.squared_error(x, start), self.model(x)))
        return fit(self, start_by_batch)

    monkeypatch.setattr(Trainer, "fit", look_and_fit)
    plus(kmeans_file, tmp_path / "plus", books)
    codes, error, output = seen[0]
    assert torch.equal(codes, start) and torch.equal(output.codes, start)
    torch.testing.assert_close(error, frozen.squared_error(x, start))
    assert f"{(start.numpy() == found.codes).all(1).mean():.1%} of the items" in capsys.readouterr().out

    model = load_model(tmp_path / "plus")
    assert isinstance(model, RQKMeansPlus)
    after = model.encode(x).codes
    assert model.squared_error(x, after)[-1] < 0.9 * error[-1], "it starts at the error of the codebooks"
    assert len(set(read_index(tmp_path / "plus" / "D.index.json"))) == N

    before = (tmp_path / "plus" / "D.index.json").read_bytes()
    plus(kmeans_file, tmp_path / "again", books)
    assert (tmp_path / "again" / "D.index.json").read_bytes() == before, "the same seed"


def test_a_finished_training_makes_other_indexes(kmeans_file, tmp_path, capsys):
    np.savez(tmp_path / "books.npz", codebook_0=normal(32, DIM), codebook_1=normal(32, DIM))
    folder = tmp_path / "plus"
    plus(kmeans_file, folder, tmp_path / "books.npz", epochs=1)
    stamp = (folder / "best_loss.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    plus(kmeans_file, folder, tmp_path / "books.npz", epochs=1)
    assert capsys.readouterr().out.count("nothing to do") == 2, "neither the training nor the index"
    other = tmp_path / "other.index.json"
    plus(kmeans_file, folder, tmp_path / "books.npz", epochs=1, collision="extra_token", output_file=str(other))
    assert len(set(read_index(other))) == N
    with pytest.raises(UserError, match="collision is 'nearest_free' there"):
        plus(kmeans_file, folder, tmp_path / "books.npz", epochs=1, collision="none")
    assert (folder / "best_loss.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"e_dim": 32}, "--e_dim 32: expected 10, the width of the embeddings"),
        ({"num_emb_list": [32, 32, 32]}, r"--num_emb_list \[32, 32, 32\]: expected \[32, 32\]"),
        ({"sk_epsilons": [0.1]}, "2 values of 0 or more"),
        ({"compile": True}, "--compile True is for cuda, but the device is cpu"),
        ({"output_file": "index"}, "--output_file index: expected a name like"),
        ({"pretrained_codebook_path": ""}, "--pretrained_codebook_path is required"),
    ],
)
def test_options_are_checked_against_the_codebooks(options, message, kmeans_file, tmp_path):
    np.savez(tmp_path / "books.npz", codebook_0=normal(32, DIM), codebook_1=normal(32, DIM))
    books = options.pop("pretrained_codebook_path", tmp_path / "books.npz")
    with pytest.raises(UserError, match=message):
        plus(kmeans_file, tmp_path / "plus", books, **options)
