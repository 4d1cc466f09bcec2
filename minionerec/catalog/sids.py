"""The text form of semantic IDs: level tokens, index files, and what the tokenizer must know.

A SID is one level token after another, `<a_12><b_7><c_200>`: the letters say the level, the number is the code. Any
depth is allowed, and depths may differ from item to item.

Published files also write level tokens in other ways: `<item_a_12>`, `<|a_12|>`, `<L0_12>`, `a_12`, or only the code 12.
Readers accept every form that tells level and code: all tokens of a level have the same text before and after the code,
and no other level has that text. They return `<a_12>`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from minionerec.common.errors import UserError
from minionerec.common.files import read_json

SID_TOKEN = re.compile(r"<([a-z]+)_([0-9]+)>")
MAX_CODES = 2**16  # codes of a level that a tokenizer gains at most
_CODE = "(?:0|[1-9][0-9]{0,8})"
_SID = re.compile(rf"(?:<[a-z]+_{_CODE}>)+")
BARE = ("", "")  # a code without any text: its position gives the level
_OTHER_TOKEN = re.compile(r"(.*?)([0-9]+)([^0-9]*)", re.DOTALL)  # text before the code, code, text after it


def level_token(level: int, code: int) -> str:
    """The token of `code` at `level` (0-based): `<a_0>`, `<b_17>`, ... `<z_3>`, `<aa_0>`, ..."""
    letters = ""
    level += 1
    while level:
        level, letter = divmod(level - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return f"<{letters}_{code}>"


def canonical_sid(text: str) -> str:
    """The SID in a generated or written text: its level tokens, joined; everything else is left out."""
    return "".join(match.group() for match in SID_TOKEN.finditer(text))


def split_sid(sid: str) -> list[str]:
    """`"<a_1><b_2>"` -> `["<a_1>", "<b_2>"]`; raises `ValueError` if anything but level tokens is in it."""
    if not _SID.fullmatch(sid):
        raise ValueError(f"not a SID: {sid!r}")
    return [match.group() for match in SID_TOKEN.finditer(sid)]


def is_sid(text: str) -> bool:
    """Whether `text` is level tokens and nothing else."""
    return _SID.fullmatch(text) is not None


# ------------------------------------------------------------------------------------------------ other token forms


class Renaming:
    """Level tokens in the form of some file -> `<a_12>`. The form is learnt from the tokens that are given."""

    def __init__(self):
        self.forms: list[tuple[str, str]] = []  # of each level: text before the code, text after it
        self.names: dict[str, str] = {}  # our token -> theirs

    def sid(self, tokens: Sequence[str | int]) -> str:
        """The SID of one item's tokens; raises `ValueError` saying why a level or a code cannot be told."""
        return "".join(self._token(str(token), level) for level, token in enumerate(tokens))

    def _token(self, token: str, level: int) -> str:
        match = _OTHER_TOKEN.fullmatch(token)
        if match is None or len(match.group(2)) > 9:
            raise ValueError(f"{token[:40]!r} has no code of 1 to 9 digits")
        form = match.group(1), match.group(3)
        if level == len(self.forms):
            if form != BARE and form in self.forms:
                raise ValueError(f"{token[:40]!r} is at level {level + 1}, its form is that of another level")
            self.forms.append(form)
        if form != self.forms[level]:
            raise ValueError(
                f"{token[:40]!r} is at level {level + 1}, where other tokens are {'…'.join(self.forms[level])}"
            )
        name = level_token(level, int(match.group(2)))
        if self.names.setdefault(name, token) != token:
            raise ValueError(f"{token!r} and {self.names[name]!r} have the same level and code")
        return name

    def column(self, texts: pl.Series) -> pl.Series:
        """`texts` with every token of the learnt form renamed."""
        for level, (before, after) in enumerate(self.forms):
            pattern = f"{re.escape(before)}0*([0-9]+){re.escape(after)}"
            texts = texts.str.replace_all(pattern, level_token(level, "${1}"))
        return texts


def canonical_sids(items: Iterable[Sequence[str | int]], where: Callable[[int], str]) -> list[str]:
    """SIDs of items whose tokens are in any form. Raises `UserError`, where(i) names the place of item i."""
    items = list(items)
    if all(isinstance(token, str) and is_sid(token) for tokens in items for token in tokens):
        return ["".join(tokens) for tokens in items]
    renaming, sids = Renaming(), []
    for place, tokens in enumerate(items):
        try:
            sids.append(renaming.sid(tokens))
        except ValueError as error:
            raise UserError(
                f"{where(place)} has {str(list(tokens))[:80]}: {error}; expected the same form for all items, "
                'like ["<a_1>", "<b_2>", "<c_3>"]'
            ) from None
    return sids


# ------------------------------------------------------------------------------------------------ index files


def read_index(path: str | Path, flag: str = "sid_index_path") -> list[str]:
    """SIDs as strings, row i is item i, from an `index.json`; raises `UserError` on a gap or a malformed SID."""
    index = read_json(path, flag)
    items = []
    for item in range(len(index)):
        tokens = index.get(str(item))
        if tokens is None:
            raise UserError(f"{path}: item {item} is missing, expected ids 0..{len(index) - 1} without gaps")
        if not isinstance(tokens, list) or not tokens or not all(_is_token(token) for token in tokens):
            raise UserError(
                f'{path}: item {item} has {str(tokens)[:80]!r}, expected a list like ["<a_1>", "<b_2>", "<c_3>"]'
            )
        items.append(tokens)
    if not items:
        raise UserError(f"{path}: no item in it; build the index first (rq/generate_indices.sh)")
    return canonical_sids(items, lambda item: f"{path}: item {item}")


def _is_token(token) -> bool:
    return isinstance(token, str) or (type(token) is int and token >= 0)


def codebook_tokens(sids: Sequence[str], used_only: bool = False) -> list[str]:
    """Every level token that the tokenizer must know, level by level, code by code.

    All K codes of every level, so that items added later need no new token; K is the least power of two that holds
    the largest code in use. `used_only` keeps to the tokens that occur. Raises `UserError` naming the item where K
    would exceed `MAX_CODES`.
    """
    used = {token for sid in sids for token in split_sid(sid)}
    codes = [(match.group(1), int(match.group(2))) for match in map(SID_TOKEN.fullmatch, used)]
    letters = sorted({letter for letter, _ in codes}, key=lambda letter: (len(letter), letter))
    if used_only:
        return [f"<{letter}_{code}>" for letter in letters for own, code in sorted(codes) if own == letter]
    letter, largest = max(codes, key=lambda code: code[1])
    if largest >= MAX_CODES:
        token = f"<{letter}_{largest}>"
        item = next(item for item, sid in enumerate(sids) if token in sid)
        raise UserError(
            f"item {item} has {token}, expected codes below {MAX_CODES:,}: all codes up to it become new tokens at each of "
            f"{len(letters)} levels; build the index with a smaller codebook, or add only the tokens in use "
            "(--sid_tokens used)"
        )
    size = 1 << largest.bit_length()
    return [f"<{letter}_{code}>" for letter in letters for code in range(size)]


def level_codes(sids: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Distinct level tokens, and each SID as (sids, longest) places among them, -1 after the end of a shorter one.

    Raises `ValueError` if anything but level tokens is in a SID.
    """
    column = pl.Series(sids, dtype=pl.String)
    split = column.str.extract_all(SID_TOKEN.pattern)
    for sid in column.filter((split.list.join("") != column) | (split.list.len() == 0)).head(1):
        split_sid(sid)  # raises
    lengths = split.list.len().to_numpy()
    flat = split.explode()
    tokens = flat.unique(maintain_order=True)
    place = flat.replace_strict(tokens, np.arange(len(tokens)), return_dtype=pl.Int64).to_numpy()
    codes = np.full((len(sids), lengths.max()), -1, dtype=np.int64)
    codes[np.arange(codes.shape[1]) < lengths[:, None]] = place
    return tokens.to_list(), codes
