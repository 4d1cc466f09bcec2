"""Batches of SFT: rows packed into lines, the order of an epoch, and tensors.

A line is one sequence of a batch. It holds one row, or with packing as many rows as fit; packed rows do not attend to
each other.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from minionerec.common.errors import UserError
from minionerec.decoding.lm_head import unwrap_adapter
from minionerec.decoding.tree_attention import additive, attention_window
from minionerec.language_model.tokenizing import Rows

BLANK = -1  # the line that fills an epoch's last batch: no token, no loss
IGNORED = -100  # the label of a position without a loss


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows packed into lines of at most `capacity` tokens by best fit, longest row first: lists of rows."""
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
    """The lines of a data set. Line i holds the rows `rows_of[i]`, or without packing row i. `BLANK` is an empty line."""

    def __init__(self, rows: Rows, capacity: int = 0):
        """capacity: tokens of a packed line; 0: one row per line."""
        self.rows, self.packed = rows, capacity > 0
        self.rows_of = pack(rows.lengths, capacity) if self.packed else None
        self.lengths = (
            np.array([rows.lengths[line].sum() for line in self.rows_of]) if self.packed else rows.lengths
        )  # (lines,) tokens

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, line: int) -> list[tuple[np.ndarray, int]]:
        """The rows of a line, each (token ids, number of tokens of the answer)."""
        if line == BLANK:
            return []
        rows = self.rows_of[line] if self.packed else [line]
        tokens, start, answer = self.rows
        return [(tokens[start[i] : start[i + 1]], int(answer[i])) for i in rows]


class EpochOrder(Sampler):
    """The order of an epoch's lines. It depends only on seed and epoch: equal for any number of processes, and on resume.

    `by_length` groups lines of about equal length into global batches, as transformers' length-grouped sampling does.
    Blank lines fill the last batch, so that each process runs the same number of forwards and no line repeats.
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
        """Share of this epoch's positions that are padding, in [0, 1)."""
        lengths = np.append(self.lengths, 0)[np.array(self.order())].reshape(-1, micro_batch_size)
        return 1 - self.lengths.sum() / (lengths.max(axis=1).sum() * micro_batch_size)


class Collator:
    """Lines to tensors, padded on the right: input_ids, labels, and for packed lines position_ids.

    Positions restart at each row of a packed line. From them, and where no mask is given, most models of transformers
    derive which rows must not attend to each other. For others, `mask` adds an explicit 4-D attention mask.
    """

    def __init__(self, pad_token_id: int, packed: bool = False, mask: bool = False):
        self.pad_token_id, self.packed, self.mask = pad_token_id, packed, mask

    def __call__(self, lines: list[list[tuple[np.ndarray, int]]]) -> dict[str, torch.Tensor]:
        length = max(2, *(sum(len(tokens) for tokens, _ in line) for line in lines))
        shape = (len(lines), length)
        ids, labels = np.full(shape, self.pad_token_id), np.full(shape, IGNORED)
        position = np.zeros(shape, dtype=np.int64)
        longest = max((len(tokens) for line in lines for tokens, _ in line), default=1)
        for i, line in enumerate(lines):
            end = 0
            for tokens, answer in line:
                begin, end = end, end + len(tokens)
                ids[i, begin:end] = tokens
                labels[i, end - answer : end] = tokens[-answer:]
                position[i, begin:end] = np.arange(len(tokens))
            position[i, end:] = np.arange(length - end) % longest  # a model may have no position beyond that of a row
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if self.packed:
            batch["position_ids"] = torch.from_numpy(position)
        if self.mask:
            row = (batch["position_ids"] == 0).cumsum(dim=1)  # (lines, length) the number of the row in its line
            same = row.unsqueeze(2) == row.unsqueeze(1)
            batch["attention_mask"] = additive(same.tril(), torch.float32)  # (lines, 1, length, length)
        return batch


# ------------------------------------------------------------------------------------------------ the probe of packing

TOLERANCE = 1e-4  # of packed logits, relative to the largest logit; float32 sums differ by about 1e-6


@torch.no_grad()
def packing_collator(model, pad_token_id: int) -> Collator:
    """The collator with which `model` gives packed rows the same logits as single rows.

    Two rows of random tokens go through the model singly and packed: with position ids only, else with a 4-D mask too.
    Raises `UserError` where neither agrees: the model's mask or positions cannot be given (ALiBi, recurrence).
    """
    lengths, vocabulary = np.array([5, 7]), model.get_input_embeddings().weight.shape[0]
    tokens = np.random.default_rng(0).integers(vocabulary, size=lengths.sum()).astype(np.int32)
    rows = Rows(tokens, np.concatenate([[0], np.cumsum(lengths)]), np.ones(2, dtype=np.int32))

    def logits(lines: Lines, collator: Collator) -> torch.Tensor:
        """Logits of all tokens of all lines. (tokens, vocabulary)"""
        batches = [collator([lines[i]]) for i in range(len(lines))]
        inputs = [{name: value.to(model.device) for name, value in b.items() if name != "labels"} for b in batches]
        return torch.cat([model(**each, use_cache=False).logits[0] for each in inputs])

    alone = Lines(rows)
    alone.rows_of, alone.packed = [[1], [0]], True  # in the order of the packed line, longest row first
    was_training, errors = model.training, []
    model.eval()
    try:
        expected = logits(alone, Collator(pad_token_id))
        for collator in (Collator(pad_token_id, packed=True), Collator(pad_token_id, packed=True, mask=True)):
            if collator.mask and attention_window(unwrap_adapter(model).config):
                errors.append("it would override the model's attention window")
                continue
            try:
                difference = (logits(Lines(rows, 12), collator) - expected).abs().max() / expected.abs().max()
            except Exception as error:  # a model that does not take the mask says so in its own way
                errors.append(str(error).split("\n")[0][:100])
                continue
            if not difference > TOLERANCE:
                return collator
            errors.append(f"relative error {difference:.2g}")
    finally:
        model.train(was_training)
    raise UserError(
        f"--packing True: {type(unwrap_adapter(model)).__name__} gives packed rows other logits than single rows, without a "
        f"mask ({errors[0]}) and with one ({errors[1]}), so rows would affect each other; use --packing False"
    )
