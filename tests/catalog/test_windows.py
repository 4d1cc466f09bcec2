"""Sequences from rows and windows over them.

Invariants: every target of the rows is a target of exactly one sequence and of exactly one window, after the same items;
rows whose histories were cut at a window give back each user's whole sequence; a window has at most `size` items, lies in
its sequence, and gives each target half a window of context where the sequence has it.
"""

import random

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minionerec.catalog.windows import Sequences, chain, windows

items = st.integers(0, 3)  # few, so that histories repeat items and resemble one another
history = st.lists(items, max_size=6)


def frame(rows) -> pl.DataFrame:
    """Rows (user, history, target)."""
    schema = {"user": pl.String, "history": pl.List(pl.Int64), "target": pl.Int64}
    return pl.DataFrame(list(rows), schema=schema, orient="row")


def listed(sequences: Sequences) -> list[tuple[list[int], int]]:
    """(items, context) of each sequence."""
    bounds = zip(sequences.start, sequences.start[1:], sequences.context, strict=False)
    return [(sequences.items[first:last].tolist(), int(context)) for first, last, context in bounds]


def targets_of(sequences: Sequences) -> list[tuple[list[int], int]]:
    """(all items before, target) of each target, in order."""
    return [(line[:i], line[i]) for line, context in listed(sequences) for i in range(context, len(line))]


def user_rows(user: str, line: list[int], context: int, max_history: int):
    """The rows of the targets of `line` after its first `context` items, histories cut at `max_history`."""
    return [(user, line[max(0, i - max_history) : i], line[i]) for i in range(context, len(line))]


def interleaved(parts: list[list], seed: int) -> list:
    """Rows of several users in random order, each user's in its own order."""
    rng, left = random.Random(seed), [list(part) for part in parts]
    order = [place for place, part in enumerate(parts) for _ in part]
    rng.shuffle(order)
    return [left[place].pop(0) for place in order]


# ------------------------------------------------------------------------------------------------ sequences


@given(st.lists(st.tuples(st.sampled_from("uvw"), history, items), max_size=25))
def test_every_target_is_a_target_of_one_sequence(rows):
    """Whatever the rows: the k-th target of the sequences is the k-th row by user, after its history."""
    found = targets_of(chain(frame(rows)))
    expected = sorted(rows, key=lambda row: row[0])  # stable
    assert [target for _, target in found] == [target for _, _, target in expected]
    for (before, _), (_, past, _) in zip(found, expected, strict=True):
        assert before[len(before) - len(past) :] == past and len(before) >= len(past)


@given(
    st.lists(st.tuples(st.lists(items, min_size=1, max_size=20), st.integers(0, 3)), min_size=1, max_size=5),
    st.integers(1, 8),
    st.integers(0, 99),
)
def test_cut_histories_of_interleaved_users_give_back_whole_sequences(users, max_history, seed):
    users = [(line, min(context, len(line) - 1, max_history)) for line, context in users]
    parts = [user_rows(str(user), line, context, max_history) for user, (line, context) in enumerate(users)]
    assert listed(chain(frame(interleaved(parts, seed)))) == users


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([([1], 2), ([1, 2], 3), ([1, 2, 3], 4)], [([1, 2, 3, 4], 1)]),
        ([([1, 2], 3), ([2, 3], 4)], [([1, 2, 3, 4], 2)]),  # cut at two items
        ([([1], 1), ([1, 1], 1)], [([1, 1, 1], 1)]),
        ([([], 5), ([5], 6)], [([5, 6], 0)]),
        ([([], 5)], [([5], 0)]),
        ([([], 5), ([], 6)], [([5], 0), ([6], 0)]),  # an empty history continues nothing
        ([([1], 2), ([3], 4)], [([1, 2], 1), ([3, 4], 1)]),  # another history
        ([([2], 3), ([1, 2, 3], 4)], [([2, 3], 1), ([1, 2, 3, 4], 3)]),  # longer than what is known
        ([([1, 2], 3), ([1, 2], 4)], [([1, 2, 3], 2), ([1, 2, 4], 2)]),  # another target after the same history
        ([([1], 2), ([1, 2, 9], 3)], [([1, 2], 1), ([1, 2, 9, 3], 3)]),  # an item that no row has as its target
        ([], []),
    ],
)
def test_sequences_by_hand(rows, expected):
    assert listed(chain(frame(("u", *row) for row in rows))) == expected


def test_users_are_apart():
    """What follows from another user's row begins a sequence."""
    assert listed(chain(frame([("u", [1], 2), ("v", [1, 2], 3), ("u", [1, 2], 4)]))) == [([1, 2, 4], 1), ([1, 2, 3], 2)]


# ------------------------------------------------------------------------------------------------ windows


def sequences_of(lines: list[tuple[int, int]]) -> Sequences:
    """Sequences of given (length, context), whose items count up from 0."""
    lengths = np.array([length for length, _ in lines], dtype=np.int64)
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Sequences(np.arange(start[-1]), start, np.array([context for _, context in lines], dtype=np.int64))


lines = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 39)).map(lambda x: (x[0], min(x[1], x[0] - 1))))


@given(lines, st.integers(2, 15))
def test_every_target_is_in_one_window_with_its_context(lines, size):
    sequences = sequences_of(lines)
    bounds = list(zip(sequences.start.tolist(), sequences.start.tolist()[1:], sequences.context.tolist(), strict=False))
    found = []
    for begin, end, context in zip(*windows(sequences, size), strict=True):
        [(first, last, _)] = [each for each in bounds if each[0] <= begin < each[1]]
        assert end <= last and 1 <= end - begin <= size and 0 <= context < end - begin
        assert context >= min(size // 2, begin + context - first)  # half a window, or all that there is
        found += range(begin + context, end)
    assert sorted(found) == [i for first, last, context in bounds for i in range(first + context, last)]


@given(lines, st.integers(2, 15))
def test_a_sequence_that_fits_is_one_window(lines, size):
    fitting = [(length, context) for length, context in lines if length <= size]
    sequences = sequences_of(fitting)
    begin, end, context = windows(sequences, size)
    assert begin.tolist() == sequences.start[:-1].tolist() and end.tolist() == sequences.start[1:].tolist()
    assert context.tolist() == sequences.context.tolist()


@pytest.mark.parametrize(
    "line, size, expected",
    [
        ((10, 1), 4, [(6, 10, 2), (4, 8, 2), (2, 6, 2), (0, 4, 1)]),
        ((9, 1), 4, [(5, 9, 2), (3, 7, 2), (1, 5, 2), (0, 3, 1)]),
        ((10, 1), 5, [(5, 10, 2), (2, 7, 2), (0, 4, 1)]),  # three targets and two items of context
        ((50, 1), 21, [(29, 50, 10), (18, 39, 10), (7, 28, 10), (0, 17, 1)]),  # as of run.sh
        ((5, 0), 3, [(2, 5, 1), (0, 3, 0)]),
        ((5, 0), 2, [(3, 5, 1), (2, 4, 1), (1, 3, 1), (0, 2, 0)]),  # one item of history
        ((9, 7), 4, [(5, 9, 2)]),  # a history longer than a window
        ((9, 8), 4, [(5, 9, 3)]),
        ((3, 0), 5, [(0, 3, 0)]),
        ((1, 0), 5, [(0, 1, 0)]),
    ],
)
def test_windows_by_hand(line, size, expected):
    assert list(zip(*(values.tolist() for values in windows(sequences_of([line]), size)), strict=True)) == expected


def test_windows_of_nothing():
    assert [len(values) for values in windows(chain(frame([])), 5)] == [0, 0, 0]
