"""Constrained RQ-KMeans: a k-means on the residuals of each level with bounded cluster sizes, then the index.

    python -m rq.rqkmeans_constrained --dataset ml-100k --root output/quickstart/data --k 64

Writes <D>.codebooks_constrained.npz and <D>.index.json with its quality report into --root. All cluster sizes are in
[max(1, n//K - 1), n//K + 1]. `--solver flow` is `k-means-constrained`, whose time and memory grow with n * K.
`--solver transport` is Lloyd's iteration with `rq.balanced.transport_assignment`, for any n. `auto` takes the flow up
to n * K = 5.2 million.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from minionerec.common.options import option, run
from rq import generate_indices
from rq.options import ClusteringOptions, KMeansOptions, part

MOST_ARCS = 5_200_000  # n * K of the largest flow that `auto` takes: n = 20 000 with K = 256
TOLERANCE = 1e-4  # relative gain of an iteration at which Lloyd's iteration stops
START_PER_CODE = 64  # items per centre that k-means++ chooses from


@dataclass
class Clustering(ClusteringOptions):
    solver: Literal["auto", "flow", "transport"] = option("auto", "how items are assigned within the size bounds")


@dataclass
class Options(Clustering, KMeansOptions):
    pass


def kmeans_flow(x: np.ndarray, k: int, bounds, seed: int, max_iter: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres (k, dim) and codes (n,) of x (n, dim), every size within `bounds`, by `k-means-constrained`."""
    from k_means_constrained import KMeansConstrained
    from threadpoolctl import threadpool_limits

    clustering = KMeansConstrained(
        k, size_min=bounds.low, size_max=bounds.high, n_init=1, max_iter=max_iter, random_state=seed, n_jobs=1
    )
    with threadpool_limits(limits=1):  # one thread, so that bytes repeat
        clustering.fit(x)
    return clustering.cluster_centers_.astype(np.float32), clustering.labels_.astype(np.int64)


def kmeans_transport(x: np.ndarray, k: int, bounds, seed: int, max_iter: int) -> tuple[np.ndarray, np.ndarray]:
    """The same by optimal transport: centres start by k-means++ on a sample, prices are kept between iterations."""
    import torch
    from sklearn.cluster import kmeans_plusplus
    from threadpoolctl import threadpool_limits

    from rq.balanced import transport_assignment

    sample = np.random.default_rng(seed).permutation(len(x))[: START_PER_CODE * k]
    with threadpool_limits(limits=1):
        centers = torch.from_numpy(kmeans_plusplus(x[sample], k, random_state=seed)[0])
    rows, prices, cost = torch.from_numpy(x), None, np.inf
    for _ in range(max_iter):
        codes, prices = transport_assignment(rows, centers, bounds, seed=seed, prices=prices)
        sums = torch.zeros_like(centers, dtype=torch.float64).index_add_(0, codes, rows.double())
        centers = (sums / torch.bincount(codes, minlength=k).unsqueeze(1)).to(rows.dtype)
        before, cost = cost, (rows - centers[codes]).square().sum(dtype=torch.float64).item()
        if before - cost <= TOLERANCE * cost:
            break
    return centers.numpy(), codes.numpy()


def main(options: Options) -> None:
    from rq.residual_kmeans import make_codebooks, read_checked

    o = options
    o.name_files("constrained")
    embeddings = read_checked(o)

    def cluster(residual: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        from rq.balanced import size_bounds

        by_flow = o.solver == "flow" or (o.solver == "auto" and len(residual) * o.k <= MOST_ARCS)
        solve = kmeans_flow if by_flow else kmeans_transport
        return solve(residual, o.k, size_bounds(len(residual), o.k), seed, o.max_iter)

    make_codebooks(part(o, Clustering), "constrained", embeddings, cluster)
    generate_indices.index_of(o, o.codebook_path, o.data_path)


if __name__ == "__main__":
    run(main, Options)
