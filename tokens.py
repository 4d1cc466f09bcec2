"""SFT rows as tokens: tokenised once, cached, ordered or packed, batched.

A row is a prompt and its answer. Rows lie in flat arrays, not in Python lists. Batches are padded on the right and need
no mask: under causal attention no real token sees what stands after it, and the loss is taken at answers alone.
"""

import hashlib
import re
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from catalog import SID_TOKEN
from cli import UserError, atomic_file
from data import Pair

BLANK = -1  # the row that fills up an epoch's last batch: no token, no loss
IGNORED = -100  # the label of a position without a loss


class Rows(NamedTuple):
    """Token ids of many rows; row i is `tokens[start[i]:start[i + 1]]`, its last `answer[i]` tokens the answer's."""

    tokens: np.ndarray  # (all tokens,) int32
    start: np.ndarray  # (rows + 1,) int64
    answer: np.ndarray  # (rows,) int32, tokens; the end of sequence counts

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.start)

    def trimmed(self, cutoff_len: int) -> "Rows":
        """The rows with at most `cutoff_len` tokens: a longer prompt loses its beginning."""
        if len(self.answer) and self.answer.max() >= cutoff_len:
            raise UserError(
                f"--cutoff_len {cutoff_len} leaves no room beside an answer of {self.answer.max()} tokens; raise it"
            )
        kept = np.minimum(self.lengths, cutoff_len)
        return Rows(_take(self.tokens, self.start[1:] - kept, kept), _starts(kept), self.answer)


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def _take(values: np.ndarray, begin: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`values[begin[i]:begin[i] + lengths[i]]` for every i, one after the other."""
    offset = np.arange(lengths.sum()) - np.repeat(_starts(lengths)[:-1], lengths)
    return values[np.repeat(begin, lengths) + offset]


# ------------------------------------------------------------------------------------------------ tokenising


def tokenize(pairs: Sequence[Pair], tokenizer, suffix: str, separator: str) -> Rows:
    """Rows of (prompt, answer) pairs: prompt, answer, `suffix`, end of sequence; the ids that `tokenizer` gives them.

    Prompts repeat the same SIDs and titles over and over, so each distinct piece is tokenised once. A prompt is cut
    beside SID tokens, where a tokenizer cuts too, and before the space in the `separator` of titles, provided that the
    tokenizer's pre-tokenizer cuts there between all words that meet. Where a sample of prompts shows that pieces do not
    add up (a tokenizer that treats the beginning of a text apart), prompts are tokenised whole.
    """
    prompts, answers = [prompt for prompt, _ in pairs], [answer + suffix for _, answer in pairs]
    cutter = cutter_for(tokenizer, prompts, separator)
    known: dict[str, int] = {}
    pieces, counts = [], []
    for text in prompts:
        parts = cutter.pieces(text) if cutter else [text]
        pieces += [known.setdefault(part, len(known)) for part in parts]
        counts.append(len(parts))
    answer_piece = [known.setdefault(text, len(known)) for text in answers]

    encoded = [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(list(known), add_special_tokens=False)]
    frame = len(encoded)  # the three pieces that stand around every prompt and answer
    encoded += [*_special_ids(tokenizer), [tokenizer.eos_token_id]]
    lengths = np.array([len(ids) for ids in encoded])
    values, begin = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in encoded]), _starts(lengths)[:-1]

    # every row as pieces: what the tokenizer puts first, the prompt's, what it puts last, answer, end of sequence
    counts, n = np.array(counts), len(pairs)
    ends = np.cumsum(counts + 4)
    row_pieces = np.full(counts.sum() + 4 * n, -1)
    row_pieces[ends - counts - 4] = frame
    row_pieces[np.stack([ends - 3, ends - 2, ends - 1])] = np.stack(
        [np.full(n, frame + 1), np.array(answer_piece), np.full(n, frame + 2)]
    )
    row_pieces[row_pieces < 0] = pieces
    row_lengths = np.add.reduceat(lengths[row_pieces], ends - counts - 4)
    answer_lengths = lengths[answer_piece] + 1
    tokens = _take(values, begin[row_pieces], lengths[row_pieces])
    return Rows(tokens, _starts(row_lengths), answer_lengths.astype(np.int32))


SAMPLE = 256  # prompts that are tokenised both ways


def cutter_for(tokenizer, prompts: Sequence[str], separator: str) -> "Cutter | None":
    """How `prompts` may be cut so that their ids are those of the pieces; None: not at all."""
    backend = tokenizer.backend_tokenizer
    cut = re.compile(re.escape(separator[: separator.find(" ")]) + "(?= )") if " " in separator else None
    sids = {token for token in tokenizer.get_added_vocab() if SID_TOKEN.fullmatch(token)}
    cutter = Cutter(sids, cut if cut and _cuts_at(backend, prompts, Cutter(sids, cut)) else None)
    return cutter if _adds_up(backend, prompts[:: max(1, len(prompts) // SAMPLE)], cutter) else None


def _special_ids(tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text of its own accord, such as a beginning of sequence."""
    framed, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    before = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    return framed[:before], framed[before + len(bare) :]


class Cutter:
    """Cuts texts into pieces which, joined, are the text: around the tokens `sids` and behind each match of `cut`."""

    def __init__(self, sids: set[str], cut: re.Pattern | None):
        self.sids, self.cut = sids, cut
        self.beside_sid = re.compile(f"({SID_TOKEN.pattern.replace('(', '(?:')})")

    def segments(self, text: str) -> list[str]:
        """Around SID tokens alone."""
        if "<" not in text:
            return [text]
        parts = [""]
        for part in self.beside_sid.split(text):  # a text that only looks like a SID token stays where it is
            if part in self.sids:
                parts += [part, ""]
            else:
                parts[-1] += part
        return [part for part in parts if part]

    def pieces(self, text: str) -> list[str]:
        parts = []
        for segment in self.segments(text):
            begin = 0
            for match in self.cut.finditer(segment) if self.cut else ():
                parts.append(segment[begin : match.end()])
                begin = match.end()
            parts.append(segment[begin:])
        return [part for part in parts if part]


def _cuts_at(backend, prompts: Sequence[str], cutter: Cutter) -> bool:
    """Whether the pre-tokenizer cuts where `cutter.cut` does, whatever words stand left and right of it here."""
    if backend.pre_tokenizer is None:
        return False
    between_sids = Cutter(set(), cutter.cut)
    neighbours = set()
    for segment in {segment for text in prompts for segment in cutter.segments(text)}:
        neighbours.update(pairwise(between_sids.pieces(segment)))
    words = {(_LAST_WORD.search(a[-64:]).group(), _FIRST_WORD.match(b).group()) for a, b in neighbours}
    for left, right in words:
        if all(begin != len(left) for _, (begin, _) in backend.pre_tokenizer.pre_tokenize_str(left + right)):
            return False
    return True


_LAST_WORD, _FIRST_WORD = re.compile(r"\S*\s*\Z"), re.compile(r"\s*\S*")


def _adds_up(backend, texts: Sequence[str], cutter: Cutter) -> bool:
    """Whether the ids of each text are those of its pieces."""

    def ids(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    cut = [cutter.pieces(text) for text in texts]
    pieces = iter(ids([piece for parts in cut for piece in parts]))
    return all(
        whole == [i for _ in parts for i in next(pieces)] for whole, parts in zip(ids(list(texts)), cut, strict=True)
    )


def tokenize_cached(pairs: Sequence[Pair], tokenizer, suffix: str, separator: str, cache_dir: str | Path) -> Rows:
    """`tokenize`, kept in `cache_dir` under a digest of the texts and the tokenizer; an empty `cache_dir` keeps none."""
    if not cache_dir:
        return tokenize(pairs, tokenizer, suffix, separator)
    digest = hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=16)
    digest.update(f"{tokenizer.eos_token_id}\0{suffix}\0{separator}".encode())
    for pair in pairs:
        digest.update("\0".join(pair).encode())
        digest.update(b"\0\0")
    path = Path(cache_dir) / f"{digest.hexdigest()}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            print(f"{len(pairs):,} rows as tokens from {path}")
            return Rows(**stored)
    rows = tokenize(pairs, tokenizer, suffix, separator)
    with atomic_file(path, "wb") as f:
        np.savez(f, **rows._asdict())
    return rows


# ------------------------------------------------------------------------------------------------ lines of a batch


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
