"""Samples and splits.

Invariants: time order, ties in row order; a sample has the items before its target, the latest `max_history` of them; a
user's last item tests, the one before validates; users with fewer than 3 interactions are left out.
"""

import random

import polars as pl
import pytest

from minionerec.common.errors import UserError
from preprocess.splits import leave_one_out, samples, write_inter


def frame(rows):
    return pl.DataFrame(rows, schema={"user": pl.String, "item": pl.Int64, "time": pl.Float64}, orient="row")


@pytest.mark.parametrize("max_history", [1, 3, 10_000])
def test_samples_equal_a_loop(max_history):
    rng = random.Random(max_history)
    rows = [(f"u{rng.randrange(20)}", rng.randrange(50), float(rng.randrange(8))) for _ in range(400)]
    ordered = sorted(rows, key=lambda row: row[2])  # stable, as the split must be
    lists: dict[str, list[int]] = {}
    expected = []
    for user, item, time in ordered:
        past = lists.setdefault(user, [])
        if past:
            expected.append([user, past[-max_history:], item, time])
        past.append(item)
    found = samples(frame(rows), max_history)
    assert found.columns == ["user", "history", "target", "time", "from_end"]
    assert [list(row[:4]) for row in found.iter_rows()] == expected
    last = found.filter(pl.col("from_end") == 0)
    assert {user: items[-1] for user, items in lists.items() if len(items) > 1} == dict(
        last["user", "target"].iter_rows()
    )


def test_leave_one_out():
    rows = [("a", i, 0.0) for i in (5, 3, 9, 1)] + [("b", 7, 0.0), ("c", 1, 0.0), ("c", 2, 1.0)]
    splits = leave_one_out(frame(rows), 2)
    found = {name: split.select("user", "history", "target").rows() for name, split in splits.items()}
    assert found == {
        "train": [("a", [5], 3)],
        "valid": [("a", [5, 3], 9)],
        "test": [("a", [5, 3, 9], 1)],
    }  # the whole history


def test_too_few_interactions():
    with pytest.raises(UserError, match="none of 2 users has 3 interactions"):
        leave_one_out(frame([("a", 1, 0.0), ("a", 2, 1.0), ("b", 1, 0.0)]))
    with pytest.raises(UserError, match="none of 0 users"):
        leave_one_out(frame([]))


def test_inter_files(tmp_path):
    write_inter(tmp_path / "new" / "x.inter", samples(frame([("é", 1, 0.0), ("é", 2, 1.0), ("é", 3, 2.0)]), 10))
    assert (tmp_path / "new" / "x.inter").read_text(encoding="utf-8").splitlines() == [
        "user_id:token\titem_id_list:token_seq\titem_id:token",
        "é\t1\t2",
        "é\t1 2\t3",
    ]


def test_a_long_history_is_fast():
    """A user with 10 000 interactions among others with one."""
    rows = [("a", i % 50, float(i)) for i in range(10_000)] + [(f"u{i}", 1, 0.0) for i in range(1_000)]
    splits = leave_one_out(frame(rows), 10)
    assert {name: len(split) for name, split in splits.items()} == {"train": 9_997, "valid": 1, "test": 1}
    assert splits["test"]["history"].to_list() == [[i % 50 for i in range(9_999)]]
    assert splits["train"]["history"][-1].to_list() == [i % 50 for i in range(9_987, 9_997)]
