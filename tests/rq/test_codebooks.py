"""The file of codebooks: a round trip, and that damaged or foreign files are one line for both commands that read it."""

import numpy as np
import pytest
from rq_helpers import DIM, index, normal, plus

from minionerec.common.errors import UserError
from rq.codebooks import CodebookFile, read_codebooks, write_codebooks


def test_round_trip(tmp_path):
    content = CodebookFile([normal(4, 3), normal(5, 3)], np.array([[0, 4], [3, 0]]), "abc")
    for name in ("one.npz", "two.npz"):
        write_codebooks(tmp_path / name, content)
    found = read_codebooks(tmp_path / "one.npz", "ckpt_path")
    for book, expected in zip(found.codebooks, content.codebooks, strict=True):
        np.testing.assert_array_equal(book, expected)
    np.testing.assert_array_equal(found.codes, content.codes)
    assert found.digest == "abc" and found.codes.dtype == np.int64
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_published_files_hold_only_codebooks(tmp_path):
    np.savez(tmp_path / "books.npz", codebook_0=normal(4, 3).astype(np.float64))
    found = read_codebooks(tmp_path / "books.npz", "ckpt_path")
    assert found.codes.shape == (0, 1) and found.digest == "" and found.codebooks[0].dtype == np.float32


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "no such file"),
        (b"text", "not an .npz of codebooks"),
        ({"x": normal(4, 3)}, r"found \['x'\], expected codebook_0"),
        ({"codebook_0": normal(4, DIM), "codebook_1": normal(4, DIM + 1)}, r"codebook_1 is float32 \(4, 11\)"),
        ({"codebook_0": normal(4, DIM) * np.nan}, "expected finite floats"),
        ({"codebook_0": np.float32(1)}, r"codebook_0 is float32 \(\)"),
        ({"codebook_0": np.array([{}] * 4)}, "not an .npz of codebooks"),
        ({"codebook_0": normal(4, DIM), "codes": np.array([[4]])}, r"codes do not fit codebooks of \[4\]"),
        ({"codebook_0": normal(4, DIM), "codes": np.array([[np.nan]])}, r"codes do not fit codebooks of \[4\]"),
        ({"codebook_0": normal(4, DIM), "codes": np.array([["a"]])}, r"codes do not fit codebooks of \[4\]"),
        ({"codebook_0": normal(400, 7)}, "7"),
        ({"codebook_0": normal(4, DIM)}, "4 codes make 4 SIDs, fewer than the 300 items"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("user", ["generate_indices", "plus"])
def test_bad_codebooks(user, arrays, message, kmeans_file, tmp_path):
    path = tmp_path / "books.npz"
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    elif arrays:
        np.savez(path, **arrays)
    with pytest.raises(UserError, match=message) as error:
        if user == "plus":
            plus(kmeans_file, tmp_path / "plus", path)
        else:
            index(path, kmeans_file, tmp_path / "x.index.json")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "plus").exists() and not (tmp_path / "x.index.json").exists()


@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_at_any_byte(tmp_path, compressed):
    """Every shortened file is refused or, where only the archive's own index was cut, complete."""
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "whole.npz", codebook_0=normal(4, 3), codes=np.array([[1], [2]]))
    whole = (tmp_path / "whole.npz").read_bytes()
    for size in range(0, len(whole), 7):
        (tmp_path / "cut.npz").write_bytes(whole[:size])
        with pytest.raises(UserError) as error:
            read_codebooks(tmp_path / "cut.npz", "ckpt_path")
        assert "\n" not in str(error.value) and "cut.npz" in str(error.value)


def test_any_flipped_byte_is_refused_or_harmless(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", codebook_0=normal(4, 3), codes=np.array([[1], [2]]))
    whole = (tmp_path / "whole.npz").read_bytes()
    for place in range(0, len(whole), 3):
        (tmp_path / "bad.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            found = read_codebooks(tmp_path / "bad.npz", "ckpt_path")
        except UserError:
            continue
        np.testing.assert_array_equal(found.codebooks[0], normal(4, 3))
