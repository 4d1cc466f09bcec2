"""Item embeddings from disk, checked. Row i of `<D>.emb-<plm>-td.npy`, a float matrix (items, dim), is item i."""

import hashlib
from pathlib import Path

import numpy as np

from minionerec.common.errors import UserError
from minionerec.common.files import read_json, require_file


def load_embeddings(path: str | Path, flag: str = "data_path", item_meta_path: str | Path | None = None) -> np.ndarray:
    """The matrix in `path` as float32 (items, dim), C-contiguous.

    `item_meta_path` names the `<D>.item.json` whose number of items must match. Raises `UserError` where the file is
    missing, is not a 2-D float array, has fewer than two rows, has NaN or Inf, has all rows equal, or does not match.
    """
    path = require_file(path, flag)
    try:
        matrix = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy's header parser raises errors of many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: not a .npy array ({reason}); write it again with rq/text2emb, check --{flag}"
        ) from None
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or not np.issubdtype(matrix.dtype, np.floating):
        found = f"{matrix.dtype} {matrix.shape}" if isinstance(matrix, np.ndarray) else type(matrix).__name__
        raise UserError(f"{path}: found {found}, expected a 2-D float array (items, dim); check --{flag}")
    if item_meta_path:
        n_items = len(read_json(item_meta_path, "item_meta_path"))
        if n_items != len(matrix):
            raise UserError(
                f"{path}: {len(matrix)} rows, but {item_meta_path} has {n_items} items; embed that file again, or give "
                f"the two files that belong together"
            )
    if len(matrix) < 2 or matrix.shape[1] < 1:
        raise UserError(f"{path}: shape {matrix.shape}, expected at least 2 rows and 1 column; check --{flag}")
    matrix = np.ascontiguousarray(matrix, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if len(bad):
        raise UserError(f"{path}: NaN or Inf in {len(bad)} of {len(matrix)} rows, first row {bad[0]}; embed again")
    if (matrix == matrix[0]).all():
        raise UserError(f"{path}: all {len(matrix)} rows are equal, so no code can tell items apart; embed again")
    return matrix


def digest(embeddings: np.ndarray) -> str:
    """A fingerprint of the matrix: 128 bits of BLAKE2 over its bytes, in hexadecimal."""
    return hashlib.blake2b(np.ascontiguousarray(embeddings).data, digest_size=16).hexdigest()
