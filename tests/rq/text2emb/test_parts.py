"""Parts and batches of texts, and the matrix that they fill.

Invariants: every text is in one batch; no batch exceeds its budget unless it is one text; parts do not depend on the
number of processes; a full disk is an error before anything is computed.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minionerec.common.errors import UserError
from rq.text2emb.parts import LARGEST_PART, SMALLEST_PART, PartialMatrix, batches, part_size


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 200), st.integers(1, 9))
def test_batches(lengths, budget, most):
    found = batches(lengths, budget, most)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert sorted(lengths, reverse=True) == [lengths[i] for batch in found for i in batch]
    for batch in found:
        longest = max(lengths[i] for i in batch)
        assert len(batch) <= most and (len(batch) == 1 or len(batch) * longest <= budget)
    for one, other in zip(found, found[1:], strict=False):  # no batch could have taken one text more
        assert len(one) == most or (len(one) + 1) * lengths[one[0]] > budget or not other


def test_part_size():
    assert part_size(1) == part_size(3000) == SMALLEST_PART and part_size(10_000_000) == LARGEST_PART
    assert part_size(64 * 1000) == 1000


def test_rows_and_progress(tmp_path):
    matrix = PartialMatrix(tmp_path / "x.npy", {"a": 1}, (4, 2))
    assert matrix.open(resume=True) == 0
    matrix.write(np.array([3, 0]), np.array([[3, 3], [0, 1]], dtype=np.float32), 1)
    again = PartialMatrix(tmp_path / "x.npy", {"a": 1}, (4, 2))
    assert again.open(resume=True) == 1 and again.matrix.tolist() == [[0, 1], [0, 0], [0, 0], [3, 3]]
    assert PartialMatrix(tmp_path / "x.npy", {"a": 2}, (4, 2)).open(resume=True) == 0
    assert not (tmp_path / "x.npy").exists()


def test_nan_is_refused_with_its_item(tmp_path):
    matrix = PartialMatrix(tmp_path / "x.npy", {}, (4, 2))
    matrix.open(resume=False)
    with pytest.raises(UserError, match="NaN or Inf for 2 items, first item 1; use another encoder or --dtype float32"):
        matrix.write(np.array([3, 0, 1]), np.array([[np.inf, 0], [1, 1], [0, np.nan]], dtype=np.float32), 1)


def test_a_full_disk(small_disk):
    with pytest.raises(OSError) as found:
        PartialMatrix(small_disk / "x.npy", {}, (100_000, 16)).open(resume=False)
    assert found.value.filename == str(small_disk / "x.npy") and not list(small_disk.iterdir())
