"""Residual k-means: codebooks level by level, with any clustering.

r = x                                          (items, dim)
for level l:
    codebook_l, code_l = cluster(r)            (K, dim), (items,)
    r = r - codebook_l[code_l]
"""

import functools
import time
from collections.abc import Callable

import numpy as np

from minionerec.common import runs
from minionerec.common.console import say, short, track
from minionerec.common.embeddings import digest, load_embeddings
from minionerec.common.errors import UserError
from rq.codebooks import CodebookFile, write_codebooks
from rq.options import ClusteringOptions, KMeansOptions, refuse_small_codebooks

Clustering = Callable[..., tuple[np.ndarray, np.ndarray]]
Cluster = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]  # rows (n, dim), seed -> centres (K, dim), (n,)


def standardised(kmeans: Clustering) -> Clustering:
    """`kmeans` on points that are centred and scaled to a root mean square of 1, so that units and origin do not matter.

    kmeans: points (n, dim) float32 and more -> centres (K, dim), codes (n,).
    """

    @functools.wraps(kmeans)
    def run(x: np.ndarray, *arguments) -> tuple[np.ndarray, np.ndarray]:
        center = x.mean(axis=0, dtype=np.float64)
        z = x - center
        spread = np.sqrt(np.square(z).mean()) or 1.0
        centers, codes = kmeans((z / spread).astype(np.float32), *arguments)
        return (centers.astype(np.float64) * spread + center).astype(np.float32), codes

    return run


def read_checked(options: KMeansOptions) -> np.ndarray:
    """The embeddings (items, dim); raises `UserError` where the options do not fit them, or the index is a foreign file."""
    embeddings = load_embeddings(options.data_path, item_meta_path=options.item_meta_path)
    if len(embeddings) < options.k:
        raise UserError(
            f"{options.data_path}: n={len(embeddings)} items are fewer than K={options.k} codes of a level; lower --k"
        )
    refuse_small_codebooks([options.k] * options.l, len(embeddings), options.collision)
    runs.refuse_unknown(options, options.output_file)
    return embeddings


def make_codebooks(options: ClusteringOptions, method: str, embeddings: np.ndarray, cluster: Cluster) -> None:
    """Write the codebooks of embeddings (items, dim) to `--codebook_path`, unless that is done already."""
    record = runs.begin(options, f"rqkmeans_{method}", files=[options.codebook_path])
    if record.complete:
        return
    start, residual, books, codes = time.perf_counter(), embeddings, [], []
    for level in track(range(options.l), f"RQ-KMeans ({method})", unit="levels"):
        centers, code = cluster(residual, options.seed + level)
        residual = residual - centers[code]
        books.append(centers)
        codes.append(code)
        sizes, left = np.bincount(code, minlength=options.k), np.square(residual).mean()
        say(
            f"level {level + 1}/{options.l}  clusters of {sizes.min()} to {sizes.max()} items  mean square left {short(left)}"
        )
    write_codebooks(options.codebook_path, CodebookFile(books, np.stack(codes, axis=1), digest(embeddings)))
    seconds = time.perf_counter() - start
    say(
        f"wrote {options.codebook_path}: {options.l} codebooks of {options.k} x {embeddings.shape[1]} in {seconds:.1f} s"
    )
    record.finish()
