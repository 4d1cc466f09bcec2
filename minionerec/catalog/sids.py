"""TODO."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from minionerec.common.errors import UserError
from minionerec.common.files import read_json

SID_TOKEN = re.compile(r"<([a-z]+)_(\d+)>")
_SID = re.compile(r"(?:<[a-z]+_\d+>)+")


def level_token(level: int, code: int) -> str:
    """The token of `code` at `level` (0-based): `<a_0>`, `<b_17>`, ... `<z_3>`, `<aa_0>`, ..."""
    letters = ""
    level += 1
    while level:
        level, letter = divmod(level - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return f"<{letters}_{code}>"


def canonical_sid(text: str) -> str:
    """The SID in a generated or written text: its level tokens, joined, everything else dropped."""
    return "".join(match.group() for match in SID_TOKEN.finditer(text))


def split_sid(sid: str) -> list[str]:
    """`"<a_1><b_2>"` -> `["<a_1>", "<b_2>"]`; raises `ValueError` if anything but level tokens is in it."""
    if not _SID.fullmatch(sid):
        raise ValueError(f"not a SID: {sid!r}")
    return [match.group() for match in SID_TOKEN.finditer(sid)]


def read_index(path: str | Path, flag: str = "sid_index_path") -> list[str]:
    """SIDs as strings, row i is item i, from an `index.json`; raises `UserError` on a gap or a malformed SID."""
    index = read_json(path, flag)
    sids = []
    for item in range(len(index)):
        tokens = index.get(str(item))
        if tokens is None:
            raise UserError(f"{path}: item {item} is missing, expected ids 0..{len(index) - 1} without gaps")
        if not isinstance(tokens, list) or not tokens or not all(_SID.fullmatch(str(t)) for t in tokens):
            raise UserError(f'{path}: item {item} has {tokens!r}, expected a list like ["<a_1>", "<b_2>", "<c_3>"]')
        sids.append("".join(tokens))
    if not sids:
        raise UserError(f"{path}: no item in it; build the index first (rq/generate_indices.sh)")
    return sids


def codebook_tokens(sids: Sequence[str], used_only: bool = False) -> list[str]:
    """Every level token that the tokenizer must know, level by level, code by code.

    All K codes of every level, so that items added later need no new token; K is the least power of two that holds
    the largest code in use. `used_only` keeps to the tokens that occur.
    """
    used = {token for sid in sids for token in split_sid(sid)}
    codes = [(match.group(1), int(match.group(2))) for match in map(SID_TOKEN.fullmatch, used)]
    letters = sorted({letter for letter, _ in codes}, key=lambda letter: (len(letter), letter))
    if used_only:
        return [f"<{letter}_{code}>" for letter in letters for own, code in sorted(codes) if own == letter]
    size = 1 << max(code for _, code in codes).bit_length()
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
