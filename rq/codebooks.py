"""Residual k-means: codebooks level by level, their file, and what its two commands share.

    r = x                                          (items, dim)
    for level l:
        codebook_l, code_l = cluster(r)            (K, dim), (items,)
        r = r - codebook_l[code_l]

`<D>.codebooks_<method>.npz` holds codebook_0 ... codebook_{L-1}, each (K, dim), `codes` (items, L), the clusters that
the items were put in, and `meta`, a JSON text of every hyper-parameter and a digest of the embeddings. Where cluster
sizes are bounded, an item's cluster is not always its nearest: `codes` then belong to these items alone, while other
embeddings, and the warm start of RQ-KMeans+, take the nearest codes of the codebooks.
"""

import json
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from minionerec.common.embeddings import digest, load_embeddings
from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, require_file
from rq.build_index import build_index
from rq.collisions import refuse_small_codebooks
from rq.models.rq import Codebooks

MOST_CODES = 1 << 16


@dataclass
class KMeansOptions:
    """What both commands take; `--dataset` and `--root` are the published way to name `--data_path`."""

    # files
    dataset: str = HfArg(default="", help="<D>: the embeddings are <root>/<D>.emb-*-td.npy")
    root: str = HfArg(default="", help="folder of the embeddings, and of what is written")
    data_path: str = HfArg(default="", help="embeddings, instead of --dataset and --root: any float (items, dim)")
    output_file: str = HfArg(default="", help="the index; default <D>.index.json beside the embeddings")
    codebook_path: str = HfArg(default="", help="default <D>.codebooks_<method>.npz beside the index")
    item_meta_path: str = HfArg(default="", help="<D>.item.json, to check the number of rows against")
    # clustering
    k: int = HfArg(default=256, help="codes of a level, 2 to 65536")
    l: int = HfArg(default=3, help="levels")  # noqa: E741 (the published name)
    max_iter: int = HfArg(default=100, help="most iterations of a level's k-means")
    seed: int = HfArg(default=42, help="seed of the starting centres")
    verbose: bool = HfArg(default=False, help="say more of each level")
    # SIDs
    collision: Literal["none", "sinkhorn", "nearest_free", "extra_token"] = HfArg(
        default="nearest_free", help="what becomes of items with equal codes"
    )

    def __post_init__(self):
        if bool(self.dataset and self.root) == bool(self.data_path):
            raise UserError("give either --dataset and --root, or --data_path")
        for flag, least, most in (("k", 2, MOST_CODES), ("l", 1, 26), ("max_iter", 1, 10**9), ("seed", 0, 2**31 - 1)):
            if not least <= getattr(self, flag) <= most:
                raise UserError(f"--{flag} is {getattr(self, flag)}, expected {least} to {most}")
        if self.output_file and not self.output_file.endswith(".json"):
            raise UserError(f"--output_file is {self.output_file!r}, expected a name like <D>.index.json")

    def embedding_file(self) -> Path:
        if self.data_path:
            return require_file(self.data_path, "data_path")
        found = sorted(require_file(self.root, "root").glob(f"{self.dataset}.emb-*-td.npy"))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise UserError(
                f"{self.root}: found {names}, expected exactly one {self.dataset}.emb-<plm>-td.npy; give --data_path"
            )
        return found[0]


Cluster = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def run_kmeans(options: KMeansOptions, method: str, cluster: Cluster, **more) -> None:
    """Codebooks by `cluster` (rows (n, dim), seed -> centres (K, dim), codes (n,)) on each level, then the index.

    `more` are the method's own hyper-parameters. Codebooks that were made with the same ones are not made again.
    """
    o = options
    path = o.embedding_file()
    embeddings = load_embeddings(path, item_meta_path=o.item_meta_path)  # (items, dim)
    if len(embeddings) < o.k:
        raise UserError(f"{path}: n={len(embeddings)} items are fewer than K={o.k} codes of a level; lower --k")
    refuse_small_codebooks([o.k] * o.l, len(embeddings), o.collision)
    output = Path(o.output_file or path.with_name(f"{path.name.split('.emb-')[0]}.index.json"))
    books_path = Path(o.codebook_path or output.with_name(f"{output.name.split('.')[0]}.codebooks_{method}.npz"))

    meta = {"method": method, "k": o.k, "l": o.l, "max_iter": o.max_iter, "seed": o.seed, **more}
    meta["digest"] = digest(embeddings)
    if books_path.exists() and (there := read_codebooks(books_path, "codebook_path")).meta == meta:
        print(f"{books_path}: made before with these hyper-parameters")
    else:
        start = time.perf_counter()
        books, codes, residual = [], [], embeddings
        for level in tqdm(range(o.l), desc=f"RQ-KMeans ({method})", unit="level"):
            centers, code = cluster(residual, o.seed + level)
            residual = residual - centers[code]
            books.append(centers)
            codes.append(code)
            if o.verbose:
                sizes = np.bincount(code, minlength=o.k)
                print(
                    f"level {level}: sizes {sizes.min()} to {sizes.max()}, mean square left {np.square(residual).mean():.3g}"
                )
        there = CodebookFile(books, np.stack(codes, axis=1), meta)
        write_codebooks(books_path, there)
        print(
            f"wrote {books_path}: {o.l} codebooks of {o.k} x {embeddings.shape[1]} in {time.perf_counter() - start:.1f} s"
        )
    build_index(
        Codebooks([torch.from_numpy(book) for book in there.codebooks]),
        torch.from_numpy(embeddings),
        output,
        o.collision,
        codes=torch.from_numpy(there.codes),
    )


# ------------------------------------------------------------------------------------------------ the file


class CodebookFile(NamedTuple):
    """What a `.npz` of codebooks holds."""

    codebooks: Sequence[np.ndarray]  # each (K, dim) float32
    codes: np.ndarray  # (items, levels) int64; no rows where the file has none
    meta: dict  # hyper-parameters and digest of the embeddings; empty where the file has none


def write_codebooks(path: str | Path, content: CodebookFile) -> None:
    """Write `content` to `path`, atomically."""
    arrays = {f"codebook_{level}": book.astype(np.float32) for level, book in enumerate(content.codebooks)}
    with atomic_file(path, "wb") as f:
        np.savez(f, codes=content.codes.astype(np.int32), meta=np.array(json.dumps(content.meta)), **arrays)


def read_codebooks(path: str | Path, flag: str) -> CodebookFile:
    """The codebooks in `path`. Raises `UserError` if it is no such file, or has shapes that do not fit together."""
    path = require_file(path, flag)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        meta = json.loads(str(arrays.get("meta", "{}")))
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not an .npz of codebooks ({error}); make it again, check --{flag}") from None
    books = []
    while f"codebook_{len(books)}" in arrays:
        books.append(arrays[f"codebook_{len(books)}"])
    if not books:
        raise UserError(f"{path}: found {sorted(arrays)}, expected codebook_0, codebook_1, ...; check --{flag}")
    for level, book in enumerate(books):
        fits = book.ndim == 2 and np.issubdtype(book.dtype, np.floating) and book.shape[1:] == books[0].shape[1:]
        if not fits or len(book) < 2 or not np.isfinite(book).all():
            raise UserError(
                f"{path}: codebook_{level} is {book.dtype} {book.shape}, expected finite floats (K, dim) of the same dim "
                f"as codebook_0 {books[0].shape}; make it again, check --{flag}"
            )
    codes = arrays.get("codes", np.zeros((0, len(books)), dtype=np.int64)).astype(np.int64)
    sizes = [len(book) for book in books]
    if codes.ndim != 2 or codes.shape[1] != len(books) or (codes < 0).any() or (codes >= sizes).any():
        raise UserError(f"{path}: codes do not fit codebooks of {sizes}; make it again, check --{flag}")
    return CodebookFile([book.astype(np.float32) for book in books], codes, meta)
