"""Reading and writing an index, `<D>.index.json`: `{"0": ["<a_236>", "<b_231>", "<c_226>"], …}`."""

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
    """The codes (items, depth) of an index file, -1 after the end of a shorter SID.

    Raises `UserError` where the file is no index, a token has the letter of another level, or one SID is a prefix of
    another.
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
            code = int(SID_TOKEN.fullmatch(token).group(2))
            expected = level_token(level, code)
            if token != expected:
                raise UserError(f"{path}: item {item} has {token} at level {level}, expected {expected} there")
            codes[item, level] = code
    return codes


def write_index(path: str | Path, codes: np.ndarray) -> None:
    """Write codes (items, depth), -1 for no token, to `path`, atomically; the same codes give the same bytes."""
    write_json(path, {str(item): sid for item, sid in enumerate(to_sids(codes))}, indent=None)
