"""k-core, users' sequences, and their split into train, valid and test samples.

A sample is a target with the items that its user had before. Interactions are sorted by time; those with equal time stay
in file order. Users, items and samples are integers in numpy arrays: 100 million interactions take a few gigabytes.

    leave_one_out    a user's last item tests, the one before validates, all earlier ones train (SASRec, arXiv
                     1808.09781); users with fewer than 3 interactions are left out
    chronological    all samples in time order, the first 8/10 train, the next 1/10 valid, the rest test (MiniOneRec,
                     arXiv 2510.24431)
    time             samples before one time train, before a second time valid, the rest test: no test target is
                     earlier than a train target of any user
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file

CHUNK = 8_000_000  # items of histories that are in memory at once


def k_core(user: np.ndarray, item: np.ndarray, k: int) -> tuple[np.ndarray, int]:
    """(mask of the interactions that stay, rounds): the largest part where each user and item has at least k of them."""
    keep = np.ones(len(user), dtype=bool)
    users, items = (int(column.max(initial=-1)) + 1 for column in (user, item))
    rounds, left = 0, -1
    while left != (left := int(keep.sum())):
        for column, size in ((user, users), (item, items)):
            keep &= np.bincount(column[keep], minlength=size)[column] >= k
        rounds += 1
    return keep, rounds


class Sequences(NamedTuple):
    """Interactions user by user, oldest first. A place is an index of these arrays."""

    user: np.ndarray  # (interactions,) int32, ascending
    item: np.ndarray  # (interactions,) int32
    time: np.ndarray  # (interactions,)
    start: np.ndarray  # (users + 1,) place of each user's first interaction, and the end
    by_time: np.ndarray  # (interactions,) int32: all places in time order, ties in file order

    def position(self, places: np.ndarray) -> np.ndarray:
        """How many interactions of the same user are before each place."""
        return places - self.start[self.user[places]]


def sequences(user: np.ndarray, item: np.ndarray, time: np.ndarray) -> Sequences:
    """Interactions in file order, users numbered 0, 1, 2, … without gaps -> each user's sequence."""
    by_time = np.argsort(time, kind="stable").astype(np.int32)
    rows = by_time[np.argsort(user[by_time], kind="stable")]  # of the file, at each place
    place = np.empty(len(rows), dtype=np.int32)
    place[rows] = np.arange(len(rows), dtype=np.int32)
    by_time = place[by_time]
    del place
    start = np.concatenate([[0], np.cumsum(np.bincount(user))])
    return Sequences(user[rows], item[rows], time[rows], start, by_time)


# ------------------------------------------------------------------------------------------------ splits


Split = dict[str, np.ndarray]  # train, valid, test -> places of the targets, in time order


def leave_one_out(log: Sequences) -> Split:
    """Raises `UserError` where no user has 3 interactions."""
    count = np.diff(log.start)
    if not (count >= 3).any():
        raise UserError(
            f"leave-one-out: none of {len(count)} users has 3 interactions, expected at least one; give more data"
        )
    last = log.start[1:][count >= 3] - 1
    kind = np.zeros(len(log.user), dtype=np.int8)
    kind[count[log.user] >= 3] = 1
    kind[log.start[:-1][count >= 3]] = 0  # nothing is before it
    kind[last - 1], kind[last] = 2, 3
    kind = kind[log.by_time]
    return {name: log.by_time[kind == number] for number, name in enumerate(("train", "valid", "test"), start=1)}


def chronological(log: Sequences) -> Split:
    """8:1:1 over all samples in time order. Raises `UserError` where a part would be empty."""
    places = _samples(log)
    return _cut(log, places, len(places) * 8 // 10, len(places) * 9 // 10)


def time_split(log: Sequences, valid_from: float | None = None, test_from: float | None = None) -> Split:
    """Samples before valid_from train, before test_from validate; default: the times of 80 and 90 % of the samples.

    Equal times are never separated. Raises `UserError` where a part would be empty.
    """
    places = _samples(log)
    time = log.time[places]
    if valid_from is None and len(time):
        valid_from, test_from = time[len(places) * 8 // 10], time[len(places) * 9 // 10]
    return _cut(log, places, *np.searchsorted(time, [valid_from or 0, test_from or 0]).tolist())


def _samples(log: Sequences) -> np.ndarray:
    return log.by_time[log.position(log.by_time) > 0]


def _cut(log: Sequences, places: np.ndarray, valid: int, test: int) -> Split:
    split = {"train": places[:valid], "valid": places[valid:test], "test": places[test:]}
    sizes = ", ".join(f"{len(part)} {name}" for name, part in split.items())
    if not all(len(part) for part in split.values()):
        raise UserError(
            f"the split of {len(places)} samples has {sizes}; give more data, another --split or other dates"
        )
    return split


def leaks(log: Sequences, split: Split) -> int:
    """How many test targets are earlier than a train target. It is another user's: a user's own train targets come first."""
    if not len(split["train"]):
        return 0
    return int((log.time[split["test"]] < log.time[split["train"]].max()).sum())


def unseen_targets(log: Sequences, split: Split) -> int:
    """How many test targets are in no train sample, neither as target nor in a history."""
    last = np.full(len(log.start) - 1, -1, dtype=np.int64)
    np.maximum.at(last, log.user[split["train"]], split["train"])
    trained = np.zeros(int(log.item.max(initial=-1)) + 1, dtype=bool)
    trained[log.item[np.arange(len(log.user)) <= last[log.user]]] = True
    return int((~trained[log.item[split["test"]]]).sum())


def repeats(log: Sequences) -> np.ndarray:
    """(interactions,) bool: whether the user had the item before."""
    key = log.user.astype(np.int64) * (int(log.item.max(initial=0)) + 1) + log.item
    return ~pl.Series(key).is_first_distinct().to_numpy()


# ------------------------------------------------------------------------------------------------ samples


def samples(log: Sequences, places: np.ndarray, max_history: int = 0) -> Iterator[pl.DataFrame]:
    """user, history (items, oldest first), target of the samples at `places`, in parts.

    max_history: items that a history keeps, the latest ones; 0: all.
    """
    length = log.position(places)
    if max_history:
        length = np.minimum(length, max_history)
    part_of = (np.cumsum(length + 1) - 1) // CHUNK  # (samples,), ascending
    for part in np.split(np.arange(len(places)), np.flatnonzero(np.diff(part_of)) + 1):
        target = places[part].astype(np.int64)
        yield pl.DataFrame(
            {
                "user": log.user[target],
                "history": pl.from_arrow(_histories(log.item, target - length[part], length[part])),
                "target": log.item[target],
            }
        )


def _histories(item: np.ndarray, begin: np.ndarray, length: np.ndarray) -> pa.Array:
    """item[begin[i] : begin[i] + length[i]] of every i, as one array of lists."""
    offsets = np.concatenate([[0], np.cumsum(length)])
    index = np.repeat(begin - offsets[:-1], length) + np.arange(offsets[-1])
    return pa.LargeListArray.from_arrays(pl.Series(offsets).to_arrow(), pl.Series(item[index]).to_arrow())


def write_inter(path: str | Path, log: Sequences, places: np.ndarray, max_history: int = 0) -> None:
    """Write samples as an `.inter` file: `user_id:token  item_id_list:token_seq  item_id:token`, tab-separated."""
    header = ["user_id:token", "item_id_list:token_seq", "item_id:token"]
    with atomic_file(path, "wb") as f:
        f.write(("\t".join(header) + "\n").encode())
        for rows in samples(log, places, max_history):
            texts = pl.col("history").list.eval(pl.element().cast(pl.String)).list.join(" ")
            table = rows.select("user", texts, "target")
            table.write_csv(f, separator="\t", include_header=False)
