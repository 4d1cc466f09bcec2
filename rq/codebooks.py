"""Codebooks on disk: `<D>.codebooks_<method>.npz`.

The file holds codebook_0 … codebook_{L-1}, each (K, dim); `codes` (items, L), the clusters of the items that the
codebooks were made from; and `digest`, a digest of these items' embeddings. Where cluster sizes are bounded, an item's
cluster is not always its nearest code: `codes` are then valid for these embeddings only. Other embeddings, and the warm
start of RQ-KMeans+, take the nearest codes. Published files hold only the codebooks.
"""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, require_file


class CodebookFile(NamedTuple):
    """What a `.npz` of codebooks holds."""

    codebooks: Sequence[np.ndarray]  # each (K, dim) float32
    codes: np.ndarray  # (items, levels) int64; no rows where the file has none
    digest: str = ""  # of the embeddings (`minionerec.common.embeddings.digest`); empty where the file has none


def write_codebooks(path: str | Path, content: CodebookFile) -> None:
    """Write `content` to `path`, atomically; the same content gives the same bytes."""
    arrays = {f"codebook_{level}": book.astype(np.float32) for level, book in enumerate(content.codebooks)}
    with atomic_file(path, "wb") as f:
        np.savez(f, codes=content.codes.astype(np.int32), digest=np.array(content.digest), **arrays)


def read_codebooks(path: str | Path, flag: str) -> CodebookFile:
    """The codebooks in `path`. Raises `UserError` where the file is no such archive or its shapes do not match."""
    path = require_file(path, flag)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
    except (ValueError, OSError, EOFError, AttributeError, TypeError, KeyError, MemoryError) as error:
        raise UserError(f"{path}: not an .npz of codebooks ({error}); make it again, check --{flag}") from None
    except (NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: a damaged .npz ({error}); make it again, check --{flag}") from None
    books = []
    while f"codebook_{len(books)}" in arrays:
        books.append(arrays[f"codebook_{len(books)}"])
    if not books:
        raise UserError(f"{path}: found {sorted(arrays)}, expected codebook_0, codebook_1, …; check --{flag}")
    for level, book in enumerate(books):
        fits = book.ndim == 2 and np.issubdtype(book.dtype, np.floating) and book.shape[1:] == books[0].shape[1:]
        if not fits or len(book) < 2 or not np.isfinite(book).all():
            raise UserError(
                f"{path}: codebook_{level} is {book.dtype} {book.shape}, expected finite floats (K, dim) of the same dim "
                f"as codebook_0 {books[0].shape}; make it again, check --{flag}"
            )
    codes = arrays.get("codes", np.zeros((0, len(books)), dtype=np.int64))
    sizes = [len(book) for book in books]
    fits = np.issubdtype(codes.dtype, np.integer) and codes.ndim == 2 and codes.shape[1] == len(books)
    if not fits or (codes < 0).any() or (codes >= sizes).any():
        raise UserError(f"{path}: codes do not fit codebooks of {sizes}; make it again, check --{flag}")
    digest = str(arrays.get("digest", ""))
    return CodebookFile([book.astype(np.float32) for book in books], codes.astype(np.int64), digest)
