"""Whole sequences from the rows of a CSV, and windows of them in which every target counts once.

A user's rows repeat one another: the history of a row is the history of the row before it and that row's target. Chained,
they are one sequence, and one causal pass over it trains what row by row takes a pass for each.

    rows      [1] -> 2, [1, 2] -> 3, [1, 2, 3] -> 4
    sequence  1 2 3 4, targets are 2, 3 and 4
"""

from typing import NamedTuple

import numpy as np
import polars as pl


class Sequences(NamedTuple):
    """Sequence i is `items[start[i]:start[i + 1]]`; its first `context[i]` items are history only, the rest targets."""

    items: np.ndarray  # (all items,) int64
    start: np.ndarray  # (sequences + 1,) int64
    context: np.ndarray  # (sequences,) int64, 0 for a sequence whose first item is a target without a history

    def __len__(self) -> int:
        return len(self.context)

    @property
    def lengths(self) -> np.ndarray:
        """Items of each sequence."""
        return np.diff(self.start)


def chain(rows: pl.DataFrame) -> Sequences:
    """The sequences of samples (columns user, history, target), each user's rows in file order.

    A row continues the sequence of the user's row before it if its history ends in that row's history and target; any
    other row begins a sequence. Every target of `rows` is a target of exactly one sequence.
    """
    rows = rows.sort("user", maintain_order=True)
    before = pl.concat_list("history", "target").shift(1).over("user").list.tail(pl.col("history").list.len())
    rows = rows.with_columns(
        continues=(before == pl.col("history")).fill_null(False) & (pl.col("history").list.len() > 0)
    )
    first = ~rows["continues"].to_numpy()
    first[:1] = True
    # A sequence is the history of its first row and the targets of all its rows.
    parts = rows.select(
        items=pl.when(pl.Series(first)).then(pl.concat_list("history", "target")).otherwise(pl.concat_list("target"))
    )["items"]
    lengths = parts.list.len().to_numpy().astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    start = ends[np.append(np.flatnonzero(first), len(rows))]
    context = rows["history"].list.len().to_numpy().astype(np.int64)[first]
    return Sequences(parts.explode().to_numpy().astype(np.int64), start, context)


class Windows(NamedTuple):
    """Window i is `items[begin[i]:end[i]]` of `Sequences`; its items from `begin[i] + context[i]` on are targets."""

    begin: np.ndarray  # (windows,) int64
    end: np.ndarray  # (windows,) int64
    context: np.ndarray  # (windows,) int64, at least 1 wherever the sequence has a history there


def windows(sequences: Sequences, size: int) -> Windows:
    """Cut sequences into windows of at most `size` items, from the end, so that each target is a target of one window.

    A window after the first of a longer sequence begins with `size // 2` items of context, which are targets of the
    window before it.
    """
    begin, end, context = [], [], []
    stride = size - size // 2
    for first, last, history in zip(sequences.start, sequences.start[1:], sequences.context, strict=False):
        stop, target = int(last), int(first + history)  # targets are at target … stop - 1
        while stop > target:
            start = max(int(first), stop - size)
            # Targets of this window: all of it that the windows before cannot reach with half a window of context.
            own = target if start <= first else max(target, stop - stride)
            begin.append(max(int(first), min(start, own - 1)) if start > first else int(first))
            end.append(stop)
            context.append(own - begin[-1])
            stop = own
    return Windows(*(np.array(values, dtype=np.int64) for values in (begin, end, context)))
