"""k-core, sequences and splits, against brute force on random interactions.

Invariants: time order, ties in file order; a sample has the items before its target, nothing later, the latest
`max_history` of them; the k-core is the largest; the splits are those of their definitions; leaks and unseen targets are
counted one by one.
"""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minionerec.common.errors import UserError
from preprocess import splits
from preprocess.dataset import encode, renumber

ROWS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 8), st.integers(0, 9)), min_size=1, max_size=60)
FAST = settings(max_examples=40, deadline=None)


def log_of(rows) -> tuple[splits.Sequences, list[list[tuple]]]:
    """(sequences, [of each user (item, time, row), oldest first]) of (user, item, time) rows, ids made dense."""
    user, item, time = (np.array(column) for column in zip(*rows, strict=True))
    _, user = np.unique(user, return_inverse=True)
    _, item = np.unique(item, return_inverse=True)
    walks = [[] for _ in range(user.max() + 1)]
    for row in sorted(range(len(rows)), key=lambda row: time[row]):  # stable
        walks[user[row]].append((int(item[row]), int(time[row]), row))
    return splits.sequences(user.astype(np.int32), item.astype(np.int32), time), walks


def all_samples(walks) -> list[tuple]:
    """(user, history, target, time, position, from the end) in time order, ties in file order."""
    found = [
        (user, [item for item, *_ in walk[:i]], walk[i][0], walk[i][1], i, len(walk) - 1 - i, walk[i][2])
        for user, walk in enumerate(walks)
        for i in range(1, len(walk))
    ]
    return [sample[:-1] for sample in sorted(found, key=lambda sample: (sample[3], sample[6]))]


def written(log, places, max_history=0) -> list[tuple]:
    return [row for part in splits.samples(log, places, max_history) for row in part.rows()]


def brute_force(walks, kind):
    samples = all_samples(walks)
    if kind == "leave_one_out":
        samples = [sample for sample in samples if len(walks[sample[0]]) >= 3]
        name = {0: "test", 1: "valid"}
        parts = {
            split: [s for s in samples if name.get(s[5], "train") == split] for split in ("train", "valid", "test")
        }
    elif kind == "chronological":
        valid, test = len(samples) * 8 // 10, len(samples) * 9 // 10
        parts = {"train": samples[:valid], "valid": samples[valid:test], "test": samples[test:]}
    else:
        valid, test = (samples[len(samples) * share // 10][3] for share in (8, 9))
        parts = {
            "train": [s for s in samples if s[3] < valid],
            "valid": [s for s in samples if valid <= s[3] < test],
            "test": [s for s in samples if s[3] >= test],
        }
    return parts


SPLITS = {"leave_one_out": splits.leave_one_out, "chronological": splits.chronological, "time": splits.time_split}


@pytest.mark.parametrize("kind", SPLITS)
@FAST
@given(rows=ROWS, max_history=st.integers(1, 5))
def test_splits_equal_brute_force(kind, rows, max_history):
    log, walks = log_of(rows)
    try:
        found = SPLITS[kind](log)
    except UserError:
        if kind == "leave_one_out":
            assert all(len(walk) < 3 for walk in walks)
        elif all_samples(walks):
            assert not all(brute_force(walks, kind).values())
        return
    expected = brute_force(walks, kind)
    for split, samples in expected.items():
        assert written(log, found[split]) == [sample[:3] for sample in samples]
        assert written(log, found[split], max_history) == [(s[0], s[1][-max_history:], s[2]) for s in samples]
        for place, sample in zip(found[split], samples, strict=True):  # nothing later is in a history
            assert log.time[place] == sample[3]
            assert (log.time[log.start[sample[0]] : place] <= sample[3]).all()
    test, train = expected["test"], expected["train"]
    leaked = sum(any(t[3] < other[3] and t[0] != other[0] for other in train) for t in test)
    assert splits.leaks(log, found) == leaked and (kind != "time" or leaked == 0)
    trained = {item for sample in train for item in [*sample[1], sample[2]]}
    assert splits.unseen_targets(log, found) == sum(sample[2] not in trained for sample in test)
    again = splits.repeats(log)
    assert int(again[found["test"]].sum()) == sum(sample[2] in sample[1] for sample in test)


@FAST
@given(rows=ROWS, k=st.integers(1, 4))
def test_k_core_is_the_largest(rows, k):
    user, item, _ = (np.array(column, dtype=np.int32) for column in zip(*rows, strict=True))
    kept = list(range(len(rows)))
    while True:  # one user or item at a time
        too_few = next(
            (
                (column, value)
                for column in (user, item)
                for value in {*column[kept]}
                if (column[kept] == value).sum() < k
            ),
            None,
        )
        if too_few is None:
            break
        kept = [row for row in kept if too_few[0][row] != too_few[1]]
    mask, rounds = splits.k_core(user, item, k)
    assert np.flatnonzero(mask).tolist() == kept and rounds >= 1


def test_a_chain_takes_many_rounds():
    """Each round removes one end of a chain of users and items with two interactions each."""
    user = np.repeat(np.arange(50), 2).astype(np.int32)
    item = (user + np.tile([0, 1], 50)).astype(np.int32)
    mask, rounds = splits.k_core(user, item, 2)
    assert not mask.any() and rounds > 10


@FAST
@given(rows=st.lists(st.sampled_from(["9", "10", "1", "b", "a", "é", "07"]), min_size=1, max_size=30))
def test_numbers_are_dense_and_in_order(rows):
    codes, names = encode(pl.Series(rows))
    integers = all(row in ("9", "10", "1") for row in rows)
    assert names.to_list() == sorted({*rows}, key=int if integers else None)
    assert [names[int(code)] for code in codes] == rows
    part = codes[: len(codes) // 2 + 1]
    again, left = renumber(part, names)
    assert [left[int(code)] for code in again] == rows[: len(part)] and left.to_list() == [
        n for n in names if n in rows[: len(part)]
    ]


def test_by_hand():
    rows = [(0, item, 0) for item in (2, 1, 4, 0)] + [(1, 3, 0), (2, 0, 0), (2, 1, 1)]
    log, _ = log_of(rows)
    found = splits.leave_one_out(log)
    assert {name: written(log, places) for name, places in found.items()} == {
        "train": [(0, [2], 1)],
        "valid": [(0, [2, 1], 4)],
        "test": [(0, [2, 1, 4], 0)],
    }


def test_dates_of_a_time_split():
    log, _ = log_of([(0, item, item) for item in range(9)])
    found = splits.time_split(log, 3, 7)
    assert {name: log.time[places].tolist() for name, places in found.items()} == {
        "train": [1, 2], "valid": [3, 4, 5, 6], "test": [7, 8],
    }  # fmt: skip


@pytest.mark.parametrize(
    "rows, make, found",
    [
        ([(0, 1, 0), (0, 2, 1), (1, 1, 0)], splits.leave_one_out, "none of 2 users has 3 interactions"),
        ([(0, 1, 0), (1, 2, 1)], splits.chronological, "the split of 0 samples has 0 train, 0 valid, 0 test"),
        (
            [(0, item, 5) for item in range(40)],
            splits.time_split,
            "the split of 39 samples has 0 train, 0 valid, 39 test",
        ),
    ],
)
def test_too_few_interactions(rows, make, found):
    with pytest.raises(UserError, match=found):
        make(log_of(rows)[0])


def test_inter_files_in_parts(tmp_path, monkeypatch):
    """Parts of a few items give the bytes of one part; a long history is written whole."""
    rows = [(0, i % 50, i) for i in range(3_000)] + [(user, user % 7, user % 5) for user in range(1, 400)] * 4
    log, _ = log_of(rows)
    found = splits.leave_one_out(log)
    splits.write_inter(tmp_path / "whole" / "x.inter", log, found["train"], 10)
    monkeypatch.setattr(splits, "CHUNK", 500)
    splits.write_inter(tmp_path / "parts.inter", log, found["train"], 10)
    splits.write_inter(tmp_path / "test.inter", log, found["test"])
    whole = (tmp_path / "whole" / "x.inter").read_text()
    assert whole == (tmp_path / "parts.inter").read_text() and whole.startswith(
        "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    )
    assert len(whole.splitlines()) == 1 + 2_997 + 399
    longest = max((tmp_path / "test.inter").read_text().splitlines()[1:], key=len).split("\t")
    assert longest == ["0", " ".join(str(i % 50) for i in range(2_999)), "49"]
