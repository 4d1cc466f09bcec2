"""Names of files: data set names with dots stay apart, and each default path is derived from the right one."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from rq_helpers import plus, points

from minionerec.common.errors import UserError
from minionerec.common.options import OUTPUT, StageOptions, option
from rq import rqkmeans_constrained
from rq.codebooks import read_codebooks
from rq.files import RESULTS, STATE, begin_training, dataset_name, embeddings_of, finish_training


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/D.emb-minilm-td.npy", "D"),
        ("Office.2018.emb-bge-v1.5-td.npy", "Office.2018"),
        ("Office.2018.index.json", "Office.2018"),
        ("Office.2018.json", "Office.2018"),
        ("Office.2018.npy", "Office.2018"),
        ("v1.index/D.index.json", "D"),
        ("D", "D"),
    ],
)
def test_dataset_name(path, name):
    assert dataset_name(path) == name


@pytest.mark.parametrize("name", ["Office.2018", "toy[1]", "a*b", "price $5 and $6"])
def test_the_embeddings_of_a_data_set(tmp_path, name):
    np.save(tmp_path / f"{name}.emb-x.y-td.npy", points(3))
    np.save(tmp_path / "Office.emb-x-td.npy", points(3))
    np.save(tmp_path / "toy1.emb-x-td.npy", points(3))
    np.save(tmp_path / "a1b.emb-x-td.npy", points(3))
    assert embeddings_of(name, str(tmp_path)).name == f"{name}.emb-x.y-td.npy"
    with pytest.raises(UserError, match="found none, expected exactly one"):
        embeddings_of("Off", str(tmp_path))


def test_data_sets_with_dots_have_codebooks_of_their_own(tmp_path):
    """Two data sets in one folder, whose names differ after a dot; RQ-KMeans+ starts from the right codebooks."""
    for seed, name in enumerate(("Office.2014", "Office.2018")):
        np.save(tmp_path / f"{name}.emb-tiny-td.npy", points(seed=seed))
        rqkmeans_constrained.main(rqkmeans_constrained.Options(dataset=name, root=str(tmp_path), k=32, l=2, max_iter=2))
    books = [tmp_path / f"Office.{year}.codebooks_constrained.npz" for year in (2014, 2018)]
    first, second = (read_codebooks(path, "codebook_path") for path in books)
    assert first.digest != second.digest and not np.array_equal(first.codebooks, second.codebooks)
    data = tmp_path / "Office.2018.emb-tiny-td.npy"
    plus(data, tmp_path / "plus", books[1], epochs=1)
    assert len(json.loads((tmp_path / "plus" / "Office.2018.index.json").read_text())) == len(points())
    assert not (tmp_path / "Office.index.json").exists()


@dataclass
class Training(StageOptions):
    ckpt_dir: str = option("", "folder", role=OUTPUT)


def test_a_kill_between_the_record_and_the_state_leaves_no_state(tmp_path, monkeypatch):
    state, options = tmp_path / STATE, Training(ckpt_dir=str(tmp_path))
    record = begin_training(options, "rqvae")
    for name in (*RESULTS, STATE):
        (tmp_path / name).write_text("made")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            finish_training(record)
    assert state.exists() and begin_training(options, "rqvae").complete and not state.exists()
    state.write_text("mine")
    assert begin_training(options, "rqvae").complete and state.read_text() == "mine"
