"""SFT rows as token ids, in bulk and cached, equal to what `tokenizer(text)` gives.

Prompts repeat the same SIDs and titles, so they are cut into pieces and each distinct piece is tokenised once. Pieces are
only used where joining their ids gives the ids of the whole prompt (`cut`); otherwise whole prompts are tokenised.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from minionerec.catalog.sids import SID_TOKEN
from minionerec.common.console import note, say
from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file

Pair = tuple[str, str]  # (prompt, answer)


class Rows(NamedTuple):
    """Token ids of many rows; row i is `tokens[start[i]:start[i + 1]]`, its last `answer[i]` tokens the answer's."""

    tokens: np.ndarray  # (all tokens,) int32
    start: np.ndarray  # (rows + 1,) int64
    answer: np.ndarray  # (rows,) int32, tokens, including the end of sequence

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.start)

    def of(self, rows: Sequence[int]) -> "Rows":
        """These of the rows, in this order."""
        lengths = self.lengths[rows]
        return Rows(_take(self.tokens, self.start[rows], lengths), _starts(lengths), self.answer[rows])

    def trimmed(self, cutoff_len: int, pairs: Sequence[Pair] = ()) -> "Rows":
        """The rows with at most `cutoff_len` tokens: a longer prompt loses its beginning.

        Raises `UserError` where an answer leaves no room for a prompt; `pairs`, the rows' texts, are for its message.
        """
        if len(self.answer) and self.answer.max() >= cutoff_len:
            row = int(self.answer.argmax())
            answer = f" {pairs[row][1][:60]!r}" if pairs else ""
            raise UserError(
                f"--cutoff_len {cutoff_len}: the answer{answer} of row {row} has {self.answer[row]} tokens, which leaves no "
                "room for a prompt; raise it, or shorten the text"
            )
        kept = np.minimum(self.lengths, cutoff_len)
        return Rows(_take(self.tokens, self.start[1:] - kept, kept), _starts(kept), self.answer)


def joined(parts: Sequence[Rows]) -> Rows:
    """Several sets of rows as one, in order."""
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([rows.lengths for rows in parts])
    return Rows(np.concatenate([r.tokens for r in parts]), _starts(lengths), np.concatenate([r.answer for r in parts]))


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def _take(values: np.ndarray, begin: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`values[begin[i]:begin[i] + lengths[i]]` for every i, concatenated."""
    shift = np.repeat(begin - _starts(lengths)[:-1], lengths)
    return values[shift + np.arange(len(shift))]


def tokenize(pairs: Sequence[Pair], tokenizer, suffix: str, separator: str) -> Rows:
    """Rows of (prompt, answer) pairs, each `tokenizer(prompt)`, then the ids of answer + `suffix`, then end of sequence.

    separator: the text between the titles of a history, where prompts may be cut.
    """
    prompts = pl.Series([prompt for prompt, _ in pairs])
    answers = pl.Series([answer + suffix for _, answer in pairs])
    found = cut(prompts, tokenizer, separator)
    if found is None:
        whole = Pieces.of(prompts.reshape((-1, 1)).arr.to_list())
        found = whole, _ids(tokenizer, whole.texts)
    pieces, ids = found
    answer_pieces = Pieces.of(answers.reshape((-1, 1)).arr.to_list())

    before, after = _special_ids(tokenizer)
    encoded = [*ids, *_ids(tokenizer, answer_pieces.texts), before, after]
    encoded.append([tokenizer.eos_token_id])
    lengths = np.array([len(ids) for ids in encoded])
    values, begin = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in encoded]), _starts(lengths)[:-1]

    # each row as pieces: the tokenizer's prefix, the prompt's pieces, the tokenizer's suffix, answer, end of sequence
    n, frame = len(pairs), len(encoded) - 3
    ends = np.cumsum(pieces.counts + 4)
    begins = ends - pieces.counts - 4
    row_pieces = np.full(len(pieces.index) + 4 * n, -1)
    row_pieces[begins], row_pieces[ends - 3], row_pieces[ends - 1] = frame, frame + 1, frame + 2
    row_pieces[ends - 2] = len(pieces.texts) + answer_pieces.index
    row_pieces[row_pieces < 0] = pieces.index
    tokens = _take(values, begin[row_pieces], lengths[row_pieces])
    row_lengths = np.add.reduceat(lengths[row_pieces], begins)
    return Rows(tokens, _starts(row_lengths), (lengths[row_pieces[ends - 2]] + 1).astype(np.int32))


def _ids(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def _special_ids(tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer adds before and after a text, such as a beginning of sequence."""
    framed, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    before = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    return framed[:before], framed[before + len(bare) :]


class Pieces(NamedTuple):
    """Texts cut into pieces."""

    texts: list[str]  # the distinct pieces
    index: np.ndarray  # (all pieces,) places in `texts`, text by text
    counts: np.ndarray  # (texts,) pieces of each text

    @classmethod
    def of(cls, parts: pl.Series) -> "Pieces":
        """From a column of lists of strings."""
        encoded = parts.explode().to_arrow().dictionary_encode()
        counts = parts.list.len().to_numpy().astype(np.int64)
        return cls(encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64), counts)


SAMPLE = 256  # prompts that are tokenised whole too, to compare
_MARK = "\x01"  # where a text is cut
_LAST_WORD, _FIRST_WORD = re.compile(r"\S*\s*\Z"), re.compile(r"\s*\S*")


def cut(prompts: pl.Series, tokenizer, separator: str) -> tuple[Pieces, list[list[int]]] | None:
    """Cut `prompts` so that the joined ids of the pieces are the ids of the prompts.

    Returns the pieces and the ids of each distinct one; None where no such cut is known.

    A tokenizer always splits a text at added tokens, here the SID tokens. It splits before the space of the titles'
    `separator` if its pre-tokenizer does so for any words around it. A sample of prompts is also tokenised whole,
    because some tokenizers treat the beginning of a text differently.
    """
    sids = {token for token in tokenizer.get_added_vocab() if SID_TOKEN.fullmatch(token)}
    if prompts.str.contains(_MARK, literal=True).any():
        return None
    apart = prompts  # marked at every angle bracket; brackets that belong to no SID token are found below
    for found, marked in ((">", f">{_MARK}"), ("<", f"{_MARK}<"), (_MARK * 2, _MARK)):
        apart = apart.str.replace_all(found, marked, literal=True)
    sample = range(0, len(prompts), max(1, len(prompts) // SAMPLE))
    whole = _ids(tokenizer, prompts[list(sample)])

    def tried(marked: pl.Series) -> tuple[Pieces, list[list[int]]] | None:
        pieces = Pieces.of(marked.str.split(_MARK))
        if any(("<" in text or ">" in text) and text not in sids for text in pieces.texts):
            return None  # a bracket that belongs to no SID token
        starts = _starts(pieces.counts)
        if not _pre_tokenizer_agrees(pieces, starts, sids, tokenizer.backend_tokenizer):
            return None
        ids = _ids(tokenizer, pieces.texts)
        joined = [[i for piece in pieces.index[starts[row] : starts[row + 1]] for i in ids[piece]] for row in sample]
        return (pieces, ids) if joined == whole else None

    if " " in separator:
        space = separator.index(" ")
        found = tried(apart.str.replace_all(separator, separator[:space] + _MARK + separator[space:], literal=True))
        if found is not None:
            return found
    return tried(apart)


def _pre_tokenizer_agrees(pieces: Pieces, starts: np.ndarray, sids: set[str], backend) -> bool:
    """Whether the pre-tokenizer splits between all neighbouring pieces of which neither is a SID token.

    Asked for the words at both sides of each cut: every word at least once, with up to four of its neighbours.
    """
    plain = np.array([bool(text) and text not in sids for text in pieces.texts])[pieces.index]
    meets = plain[:-1] & plain[1:]
    meets[starts[1:-1] - 1] = False  # the last piece of one prompt and the first of the next
    if not meets.any():
        return True
    if backend.pre_tokenizer is None:
        return False
    lasts, last = np.unique([_LAST_WORD.search(text[-64:]).group() for text in pieces.texts], return_inverse=True)
    firsts, first = np.unique([_FIRST_WORD.match(text).group() for text in pieces.texts], return_inverse=True)
    pairs = np.unique(last[pieces.index[:-1][meets]] * len(firsts) + first[pieces.index[1:][meets]])
    pairs = pairs[_first_few(pairs // len(firsts)) | _first_few(pairs % len(firsts))]
    left, right = lasts[pairs // len(firsts)].tolist(), firsts[pairs % len(firsts)].tolist()
    spans = backend.pre_tokenizer.pre_tokenize_str("\n".join(a + b for a, b in zip(left, right, strict=True)))
    begins = np.array([begin for _, (begin, _) in spans])
    line = _starts(np.array([len(a) + len(b) + 1 for a, b in zip(left, right, strict=True)]))[:-1]
    return bool(np.isin(line + np.array([len(a) for a in left]), begins).all())


def _first_few(values: np.ndarray, few: int = 4) -> np.ndarray:
    """True at the first `few` occurrences of each value. (n,) -> (n,)."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    mask = np.empty(len(values), dtype=bool)
    mask[order] = np.arange(len(values)) - np.searchsorted(ranked, ranked) < few
    return mask


def tokenize_cached(pairs: Sequence[Pair], tokenizer, suffix: str, separator: str, cache_dir: str | Path) -> Rows:
    """`tokenize`, cached in `cache_dir` under a digest of the texts and the tokenizer; no cache where it is empty."""
    if not cache_dir:
        return tokenize(pairs, tokenizer, suffix, separator)
    digest = hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=16)
    digest.update(f"{tokenizer.eos_token_id}\0{suffix}\0{separator}".encode())
    for pair in pairs:
        digest.update("\0".join(pair).encode())
        digest.update(b"\0\0")
    path = Path(cache_dir) / f"{digest.hexdigest()}.npz"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as stored:
                rows = Rows(**stored)
            say(f"{len(pairs):,} rows as tokens from {path}")
            return rows
        except Exception as error:  # numpy and zipfile raise many kinds for a file that was cut off
            note(f"{path} cannot be read ({type(error).__name__}) and is made again")
    rows = tokenize(pairs, tokenizer, suffix, separator)
    with atomic_file(path, "wb") as f:
        np.savez(f, **rows._asdict())
    return rows


COMPARED = 64  # rows that `check_rows` compares


def check_rows(rows: Rows, pairs: Sequence[Pair], tokenizer, suffix: str) -> None:
    """Compare a sample of rows with `tokenizer(text)`, which is what validation and evaluation prompt with.

    Raises `UserError` at the first row that differs: the model would be trained on prompts that it never gets again.
    """
    for row in range(0, len(pairs), max(1, len(pairs) // COMPARED)):
        prompt, answer = pairs[row]
        expected = tokenizer(prompt)["input_ids"] + tokenizer(answer + suffix, add_special_tokens=False)["input_ids"]
        expected.append(tokenizer.eos_token_id)
        found = rows.tokens[rows.start[row] : rows.start[row + 1]].tolist()
        if found != expected or rows.answer[row] > len(expected):
            raise UserError(
                f"row {row}, prompt {prompt[:60]!r}: tokenised in bulk it has {len(found)} tokens, by the tokenizer "
                f"{len(expected)}, and they differ; empty --cache_dir, and check the tokenizer.json of --base_model"
            )
