"""TODO."""

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from minionerec.language_model.tokenizing import Rows

BLANK = -1  # the row that fills up an epoch's last batch: no token, no loss
IGNORED = -100  # the label of a position without a loss


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows put together into lines of at most `capacity` tokens: best fit, the longest row first."""
    lines: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, line), sorted
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        at = bisect_left(spaces, (length, -1))
        if at < len(spaces):
            free, line = spaces.pop(at)
            lines[line].append(row)
        else:
            free, line = capacity, len(lines)
            lines.append([row])
        insort(spaces, (free - length, line))
    return lines


class Lines(torch.utils.data.Dataset):
    """What a batch is made of: line i holds the rows `rows_of[i]`, or row i alone. `BLANK` is an empty line."""

    def __init__(self, rows: Rows, capacity: int = 0):
        """`capacity` tokens a line pack several rows into one; 0: a row a line."""
        self.rows, self.packed = rows, capacity > 0
        self.rows_of = pack(rows.lengths, capacity) if self.packed else None
        self.lengths = (
            np.array([rows.lengths[line].sum() for line in self.rows_of]) if self.packed else rows.lengths
        )  # (lines,) tokens

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, line: int) -> list[tuple[np.ndarray, int]]:
        """The rows of a line, each (tokens, tokens of the answer)."""
        if line == BLANK:
            return []
        rows = self.rows_of[line] if self.packed else [line]
        tokens, start, answer = self.rows
        return [(tokens[start[i] : start[i + 1]], int(answer[i])) for i in rows]


class EpochOrder(Sampler):
    """The order of an epoch's lines, by seed and epoch alone: the same on any number of processes and after a kill.

    `by_length` groups lines of about equal length into global batches, in the manner of transformers' length-grouped
    sampling. Blank lines fill the last batch, so that each process gets the same number of forwards and no line twice.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, by_length: bool):
        self.lengths, self.batch_size, self.seed, self.by_length = lengths, batch_size, seed, by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.by_length:
            order = get_length_grouped_indices(self.lengths.tolist(), self.batch_size, generator=generator)
        else:
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
        return order + [BLANK] * (-len(order) % self.batch_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order())

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size) * self.batch_size

    def padding_share(self, micro_batch_size: int) -> float:
        """Share of this epoch's positions, in [0, 1), that hold no token of a row."""
        lengths = np.append(self.lengths, 0)[np.array(self.order())].reshape(-1, micro_batch_size)
        return 1 - self.lengths.sum() / (lengths.max(axis=1).sum() * micro_batch_size)


class Collator:
    """Lines to tensors, padded on the right: input_ids, labels, and position_ids where rows are packed.

    Positions restart at each row of a packed line; with no mask given, transformers takes them for the bounds of rows
    that must not see each other.
    """

    def __init__(self, pad_token_id: int, packed: bool = False):
        self.pad_token_id, self.packed = pad_token_id, packed

    def __call__(self, lines: list[list[tuple[np.ndarray, int]]]) -> dict[str, torch.Tensor]:
        length = max(2, *(sum(len(tokens) for tokens, _ in line) for line in lines))
        shape = (len(lines), length)
        ids, labels = np.full(shape, self.pad_token_id), np.full(shape, IGNORED)
        position = np.zeros(shape, dtype=np.int64)
        for i, line in enumerate(lines):
            end = 0
            for tokens, answer in line:
                begin, end = end, end + len(tokens)
                ids[i, begin:end] = tokens
                labels[i, end - answer : end] = tokens[-answer:]
                position[i, begin:end] = np.arange(len(tokens))
            position[i, end:] = np.arange(length - end)
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        return batch | ({"position_ids": torch.from_numpy(position)} if self.packed else {})
