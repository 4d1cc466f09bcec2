"""TODO."""

from pathlib import Path

import numpy as np

from minionerec.catalog.catalog import Catalog
from minionerec.catalog.sids import SID_TOKEN, level_token, read_index, split_sid
from minionerec.common.errors import UserError
from minionerec.common.files import write_json


def to_sids(codes: np.ndarray) -> list[list[str]]:
    """The level tokens of each item: [[3, 1], [3, -1]] -> [["<a_3>", "<b_1>"], ["<a_3>"]]."""
    return [[level_token(level, code) for level, code in enumerate(row) if code >= 0] for row in codes.tolist()]


def read_codes(path: str | Path, flag: str) -> np.ndarray:
    """The codes (items, depth) of an index file, -1 beyond the end of a shorter SID.

    Raises `UserError` where the file is no index, a token stands at another level than its letter says, or a SID is a
    prefix of another.
    """
    sids = read_index(path, flag)
    try:
        Catalog(sids)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    split = [split_sid(sid) for sid in sids]
    codes = np.full((len(split), max(map(len, split))), -1, dtype=np.int64)
    for item, tokens in enumerate(split):
        for level, token in enumerate(tokens):
            codes[item, level] = int(SID_TOKEN.fullmatch(token).group(2))
            if token != level_token(level, codes[item, level]):
                expected = level_token(level, codes[item, level])
                raise UserError(f"{path}: item {item} has {token} at level {level}, expected {expected} there")
    return codes


def write_index(path: str | Path, codes: np.ndarray) -> None:
    """Write `{"0": ["<a_1>", ...], ...}`, atomically; the same codes give the same bytes."""
    write_json(path, {str(item): sid for item, sid in enumerate(to_sids(codes))}, indent=None)
