"""Item embeddings from disk: any float matrix becomes float32, everything else is one line.

Invariants: the values of a float file arrive as contiguous float32; objects and pickles are never loaded; a matrix that
cannot carry codes (NaN, equal rows, another number of items) names the file and what to do; equal bytes, equal digest.
"""

import json

import numpy as np
import pytest

from minionerec.common.embeddings import digest, load_embeddings
from minionerec.common.errors import UserError


@pytest.fixture
def matrix():
    return np.random.default_rng(0).normal(size=(4, 3))


def save(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    return tmp_path / "x.npy"


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", ">f4", "fortran"])
def test_any_float_becomes_float32(tmp_path, matrix, kind):
    array = np.asfortranarray(matrix) if kind == "fortran" else matrix.astype(kind)
    loaded = load_embeddings(save(tmp_path, array))
    assert loaded.dtype == np.float32 and loaded.flags.c_contiguous
    np.testing.assert_array_equal(loaded, array.astype(np.float32))


BAD = {
    "integers": (lambda m: m.astype(int), "found int64"),
    "one dimension": (lambda m: m[0], "expected a 2-D float array"),
    "one row": (lambda m: m[:1], "expected at least 2 rows"),
    "no column": (lambda m: m[:, :0], "expected at least 2 rows and 1 column"),
    "NaN": (lambda m: np.where(np.arange(12).reshape(4, 3) == 7, np.nan, m), "NaN or Inf in 1 of 4 rows, first row 2"),
    "overflow": (lambda m: m * 1e300, "NaN or Inf in 4 of 4 rows, first row 0"),
    "equal rows": (lambda m: np.ones_like(m), "all 4 rows are equal"),
    "objects": (lambda m: np.array([{"a": 1}, None]), "not a .npy array"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("case", BAD)
def test_a_bad_matrix_names_its_file(tmp_path, matrix, case):
    change, message = BAD[case]
    with pytest.raises(UserError) as refused:
        load_embeddings(save(tmp_path, change(matrix)))
    assert str(tmp_path / "x.npy") in str(refused.value) and message in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY\x01\x00"])
def test_a_file_of_another_kind(tmp_path, content):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(UserError, match="not a .npy array"):
        load_embeddings(tmp_path / "x.npy")


def test_the_number_of_items_must_match(tmp_path, matrix):
    items = tmp_path / "D.item.json"
    items.write_text(json.dumps({str(i): {} for i in range(4)}))
    assert len(load_embeddings(save(tmp_path, matrix), item_meta_path=items)) == 4
    with pytest.raises(UserError, match="3 rows, but .*D.item.json has 4 items"):
        load_embeddings(save(tmp_path, matrix[:3]), item_meta_path=items)


def test_digest(matrix):
    assert digest(matrix) == digest(np.asfortranarray(matrix)) != digest(matrix + 1)
    assert len(digest(matrix)) == 32
