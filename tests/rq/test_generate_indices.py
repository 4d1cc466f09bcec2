"""The command rq.generate_indices.

Invariants: the items that codebooks were made from get their clusters, others the nearest codes; items that move do so
by their own residuals; a finished index is not made again and another one is not overwritten; appended items leave old
SIDs as they are.
"""

import numpy as np
import pytest
import torch
from rq_helpers import index, kmeans, points, refusal, train

from minionerec.catalog.sids import read_index
from minionerec.common.errors import UserError
from rq import generate_indices
from rq.collisions import resolve
from rq.models.rq import Codebooks


def test_index_from_codebooks(kmeans_file, tmp_path, capsys):
    """The clusters for the items that codebooks were made from, the nearest codes for others."""
    found = kmeans("constrained", kmeans_file, tmp_path / "D.index.json", k=64)
    books = tmp_path / "D.codebooks_constrained.npz"
    nearest = Codebooks([torch.from_numpy(b) for b in found.codebooks]).encode(torch.from_numpy(points())).codes.numpy()
    assert (nearest != found.codes).any(), "these data show the difference"
    again = index(books, kmeans_file, tmp_path / "again.index.json", collision="none")
    assert again.read_bytes() == (tmp_path / "D.index.json").read_bytes()
    np.save(tmp_path / "other.npy", np.concatenate([points(), points(1, seed=5)]))
    other = index(books, tmp_path / "other.npy", tmp_path / "other.index.json", collision="none")
    assert "every item takes its nearest codes" in capsys.readouterr().out
    assert read_index(other)[: len(points())] == [f"<a_{a}><b_{b}>" for a, b in nearest]


def test_bounded_codes_move_by_their_own_residuals(kmeans_file, tmp_path):
    """nearest_free uses the residual of the item's cluster, not of its nearest code."""
    options = {"k": 24, "l": 2, "collision": "nearest_free"}
    found = kmeans("constrained", kmeans_file, tmp_path / "D.index.json", **options)
    first, last = found.codebooks
    nearest = Codebooks([torch.from_numpy(b) for b in found.codebooks]).encode(torch.from_numpy(points()))
    left = {"own": points() - first[found.codes[:, 0]], "nearest": nearest.last_residual.numpy()}
    expected = {name: resolve(found.codes, "nearest_free", residuals, last) for name, residuals in left.items()}
    assert (expected["own"] != expected["nearest"]).any(), "these data show the difference"
    assert read_index(tmp_path / "D.index.json") == [f"<a_{a}><b_{b}>" for a, b in expected["own"]]


def test_codebooks_too_small_for_the_items(kmeans_file, tmp_path):
    """Only where each item must get a SID of the codebooks; elsewhere items may share one."""
    kmeans("constrained", kmeans_file, tmp_path / "D.index.json", k=64, l=1, collision="extra_token")
    books = tmp_path / "D.codebooks_constrained.npz"
    with pytest.raises(UserError, match="64 codes make 64 SIDs, fewer than the 300 items; .*extra_token"):
        index(books, kmeans_file, tmp_path / "x.index.json")
    assert not list(tmp_path.glob("x.*"))
    for mode in ("none", "sinkhorn"):
        sids = read_index(index(books, kmeans_file, tmp_path / f"{mode}.index.json", collision=mode))
        assert len(sids) == 300 and len(set(sids)) <= 64


def test_the_same_command_twice_gives_the_same_bytes(kmeans_file, tmp_path):
    for name in ("one", "two"):
        kmeans("faiss", kmeans_file, tmp_path / name / "D.index.json", collision="sinkhorn")
    for path in (tmp_path / "one").iterdir():
        if not path.name.endswith("run.json"):
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_paths_of_the_wrong_kind_are_one_line(kmeans_file, tmp_path):
    np.savez(tmp_path / "books.npz", codebook_0=points(32), codebook_1=points(32, seed=1))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.index.json").mkdir()
    given = ["--data_path", kmeans_file, "--device", "cpu"]
    books = ["--ckpt_path", tmp_path / "books.npz"]
    output = ["--output_file", tmp_path / "D.index.json"]
    for arguments, found in (
        ([*given, *books, "--output_file", tmp_path / "file" / "D.index.json"], "file"),
        ([*given, *books, "--output_file", tmp_path / "folder.index.json"], "folder.index.json"),
        ([*given, *output, "--ckpt_path", tmp_path], "best_collision.safetensors: no such file"),
        ([*given, *output, "--ckpt_path", tmp_path / "file"], "config.json: no such file"),
        ([*books, *output, "--data_path", tmp_path], "not a .npy array"),
        ([*given, *books, *output, "--append", tmp_path], "directory"),
        ([*given, *books], "--output_file is required"),
    ):
        assert found in refusal(generate_indices, *arguments)
    assert not (tmp_path / "D.index.json").exists()


def test_a_finished_index_is_kept_and_another_refused(embedding_file, tmp_path, capsys):
    train(embedding_file, tmp_path / "ckpt", epochs=2, eval_step=1, num_emb_list=[16, 16])
    output = index(tmp_path / "ckpt", embedding_file, tmp_path / "D.index.json", collision="extra_token")
    before, stamp = output.read_bytes(), output.stat().st_mtime_ns
    (tmp_path / "ckpt" / "epoch_1.safetensors").unlink()  # not what the index was made from
    index(tmp_path / "ckpt", embedding_file, output, collision="extra_token")
    assert "nothing to do" in capsys.readouterr().out and output.stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="collision is 'extra_token' there and 'none' now"):
        index(tmp_path / "ckpt", embedding_file, output, collision="none")
    index(tmp_path / "ckpt", embedding_file, output, collision="none", overwrite=True)
    assert (tmp_path / "D.index.json.1").read_bytes() == before != output.read_bytes()
    output.with_suffix(".quality.json").unlink()
    index(tmp_path / "ckpt", embedding_file, output, collision="none")
    assert output.with_suffix(".quality.json").exists(), "what is missing is made again"
    foreign = tmp_path / "foreign.index.json"
    foreign.write_text("{}")
    with pytest.raises(UserError, match="foreign.index.json was not made by this stage"):
        index(tmp_path / "ckpt", embedding_file, foreign)
    assert foreign.read_text() == "{}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch_size 0: expected at least 1"),
        ({"append_tokens": "used"}, "--append_tokens used: expected codebook without --append"),
        ({"output_file": "D.json", "append": "./D.json"}, "--output_file D.json: expected another file than --append"),
        ({"output_file": "D"}, "--output_file D: expected a name like"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        generate_indices.Options(**options)
