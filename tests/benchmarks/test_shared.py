"""What the benchmarks share, and that each of them has a smoke test.

Invariants: random SIDs are distinct and of the vocabulary's last tokens; every module in benchmarks/ has a test file.
"""

import numpy as np
import pytest
from helpers import ROOT

from benchmarks import shared
from minionerec.common.errors import UserError


def test_every_benchmark_has_a_test():
    modules = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert modules == {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "benchmarks").glob("test_*.py")}


def test_random_sids():
    sids = shared.random_sids(500, 1000)
    assert sids.shape == (500, shared.LEVELS) and len(np.unique(sids, axis=0)) == 500
    assert sids.min() >= shared.first_sid_token(1000) == 232 and sids.max() < 1000
    assert all(len(np.unique(level // shared.CODES)) <= 2 for level in sids.T)  # each level has its tokens
    np.testing.assert_array_equal(shared.random_sids(500, 1000), sids)


def test_names():
    assert (
        shared.dtype_of("bfloat16").itemsize == 2 and shared.peak_memory("cpu") > 1 << 20 and shared.device_name("cpu")
    )
    with pytest.raises(UserError, match="--dtype float64: expected float32 or bfloat16"):
        shared.dtype_of("float64")
