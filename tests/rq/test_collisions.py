"""SID collisions and how they are resolved.

Invariants: items without a collision keep their SIDs (except that `sinkhorn` may move an item whose code another item
takes); no SID becomes a prefix of another; `nearest_free` and `extra_token` end without a collision; equal embeddings
stay together under `sinkhorn`; the input is not changed.
"""

import numpy as np
import pytest

from minionerec.catalog.catalog import Catalog
from minionerec.common.errors import UserError
from rq.collisions import MODES, colliding_groups, collision_rate, keys_of, resolve, sinkhorn_last_level
from rq.index_file import to_sids

CODES = np.array([[0, 0], [0, 0], [0, 0], [0, 1], [1, 2], [1, 2], [2, 0]])
RESIDUALS = np.array([[0.0], [0.9], [0.1], [1.0], [2.0], [2.4], [0.0]], dtype=np.float32)
CODEBOOK = np.array([[0.0], [1.0], [2.0], [3.0]], dtype=np.float32)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "sinkhorn"])
def test_untouched_items_keep_their_sids(mode):
    before = CODES.copy()
    after = to_sids(resolve(CODES, mode, RESIDUALS, CODEBOOK))
    np.testing.assert_array_equal(CODES, before)
    assert [after[i] for i in (3, 6)] == [["<a_0>", "<b_1>"], ["<a_2>", "<b_0>"]]
    Catalog(["".join(sid) for sid in after])  # refuses prefixes


def test_nearest_free_takes_the_nearest_free_codes():
    after = resolve(CODES, "nearest_free", RESIDUALS, CODEBOOK)
    # Items 1 and 2 are nearest to <b_1>, which item 3 has: they take the codes after it, in order of their ids.
    assert after.tolist() == [[0, 0], [0, 2], [0, 3], [0, 1], [1, 2], [1, 3], [2, 0]]
    assert collision_rate(after) == 0


def test_extra_token_goes_to_whole_groups_only():
    after = resolve(CODES, "extra_token", RESIDUALS, CODEBOOK)
    assert after[:, 2].tolist() == [0, 1, 2, -1, 0, 1, -1]
    assert to_sids(after)[1] == ["<a_0>", "<b_0>", "<c_1>"]
    assert collision_rate(after) == 0
    distinct = CODES[[0, 3, 4]]
    assert resolve(distinct, "extra_token", RESIDUALS[:3], CODEBOOK).shape == (3, 2), "no level without a collision"


def test_sinkhorn_separates_what_differs_and_not_what_does_not():
    codes, residuals = np.zeros((2, 2), dtype=int), np.array([[0.0], [0.6]])
    assert collision_rate(resolve(codes, "sinkhorn", residuals, CODEBOOK)) == 0
    assert collision_rate(resolve(codes, "sinkhorn", residuals * 0, CODEBOOK)) == 0.5
    assert collision_rate(resolve(codes, "nearest_free", residuals * 0, CODEBOOK)) == 0


def test_sinkhorn_continues_where_it_moves_an_item_onto_another():
    """Item 1 leaves item 0 for item 2's code, both move from there, and the third round separates all."""
    codes, residuals = np.array([[0, 0], [0, 0], [0, 2]]), np.array([[0.0], [0.9], [3.0]])
    rounds = [sinkhorn_last_level(codes, residuals, CODEBOOK, rounds=n)[:, 1].tolist() for n in (1, 2, 3)]
    assert rounds == [[0, 2, 2], [0, 0, 3], [0, 2, 3]]
    assert resolve(codes, "sinkhorn", residuals, CODEBOOK)[:, 1].tolist() == rounds[-1]


def test_sinkhorn_never_adds_collisions():
    """Groups of one prefix that share their candidates push each other around without end."""
    rng, worse = np.random.default_rng(0), 0
    for _ in range(60):
        codes, residuals = rng.integers(2, size=(6, 2)), rng.normal(size=(6, 1)).round(1)
        codebook = rng.normal(size=(3, 1))
        after = [sinkhorn_last_level(codes, residuals, codebook, rounds=n) for n in range(1, 6)]
        rates = [collision_rate(some) for some in (codes, *after)]
        assert all(later <= earlier for earlier, later in zip(rates, rates[1:], strict=False))
        worse += rates[1] == rates[0]
    assert worse, "these data show the difference"


def test_nearest_free_on_many_random_collisions():
    rng = np.random.default_rng(3)
    codes, residuals = rng.integers(4, size=(300, 3)), rng.normal(size=(300, 5))
    codebook = rng.normal(size=(32, 5))
    after = resolve(codes, "nearest_free", residuals, codebook)
    assert collision_rate(codes) > 0.5 and collision_rate(after) == 0
    np.testing.assert_array_equal(after[:, :2], codes[:, :2])
    firsts = np.unique(codes, axis=0, return_index=True)[1]
    np.testing.assert_array_equal(after[firsts], codes[firsts])


def test_full_prefix_recommends_the_extra_token():
    with pytest.raises(UserError, match=r"prefix <a_0> has 5 items .* 4 codes; use --collision extra_token"):
        resolve(np.zeros((5, 2), dtype=int), "nearest_free", np.zeros((5, 1)), CODEBOOK)


def test_colliding_groups():
    assert [group.tolist() for group in colliding_groups(CODES)] == [[0, 1, 2], [4, 5]]


def test_keys_order_like_rows():
    rng = np.random.default_rng(0)
    for codes in (rng.integers(-1, 5, size=(200, 4)), rng.integers(2**16, size=(200, 6)), np.zeros((3, 0), dtype=int)):
        codes = np.concatenate([codes, codes[:3]])
        keys = keys_of(codes)
        _, expected = np.unique(codes, axis=0, return_inverse=True)
        np.testing.assert_array_equal(np.unique(keys, return_inverse=True)[1].reshape(-1), expected.reshape(-1))
