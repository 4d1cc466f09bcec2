"""Constrained RQ-KMeans: a k-means on the residuals of each level with bounded cluster sizes, then the index.

    python -m rq.rqkmeans_constrained --dataset ml-100k --root output/quickstart/raw --k 64

Writes <D>.codebooks_constrained.npz and <D>.index.json with its quality report into --root. All cluster sizes are in
[max(1, n//K - 1), n//K + 1]. Each iteration of Lloyd's algorithm assigns the items within these bounds (`rq.balanced`):
`--solver flow` at the lowest cost, with time and memory that grow with n * K; `--solver transport` at nearly the lowest
cost, for any n. `auto` takes the flow up to n * K = 2 million.

Departure from the published code, `KMeansConstrained.fit` of `k-means-constrained`: the cost is the squared distance,
which k-means minimises, of points scaled to unit spread. The library rounds 1000 times the plain distance to an integer,
so its clusters depend on the unit of the embeddings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from minionerec.common.options import option, run
from rq import generate_indices
from rq.options import ClusteringOptions, KMeansOptions, part
from rq.residual_kmeans import make_codebooks, read_checked, standardised

# n * K of the largest flow that `auto` takes: n = 7 800 with K = 256; above, transport is twice as fast
MOST_ARCS = 2_000_000
TOLERANCE = 1e-4  # relative gain of an iteration at which Lloyd's iteration stops
START_PER_CODE = 64  # items per centre that k-means++ chooses from


@dataclass
class Clustering(ClusteringOptions):
    solver: Literal["auto", "flow", "transport"] = option("auto", "how items are assigned within the size bounds")


@dataclass
class Options(Clustering, KMeansOptions):
    pass


@standardised
def kmeans_flow(x: np.ndarray, k: int, bounds, seed: int, max_iter: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres (k, dim) and codes (n,) of x (n, dim), every size within `bounds`; each assignment is the cheapest."""
    import torch

    from rq.balanced import flow_assignment

    def assign(rows, centers, _):
        return torch.from_numpy(flow_assignment(rows.numpy(), centers.numpy(), bounds)).long(), None

    return lloyd(x, k, seed, max_iter, assign)


@standardised
def kmeans_transport(x: np.ndarray, k: int, bounds, seed: int, max_iter: int) -> tuple[np.ndarray, np.ndarray]:
    """The same by optimal transport; its prices are kept between iterations."""
    from rq.balanced import transport_assignment

    def assign(rows, centers, prices):
        return transport_assignment(rows, centers, bounds, seed=seed, prices=prices)

    return lloyd(x, k, seed, max_iter, assign)


def lloyd(x: np.ndarray, k: int, seed: int, max_iter: int, assign: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's iteration from k-means++ on a sample: centres (k, dim), which are the means of their clusters, codes (n,).

    assign: rows (n, dim), centres (k, dim), its second result of the iteration before -> codes (n,), any state.
    """
    import torch
    from sklearn.cluster import kmeans_plusplus
    from threadpoolctl import threadpool_limits

    sample = np.random.default_rng(seed).permutation(len(x))[: START_PER_CODE * k]
    with threadpool_limits(limits=1):  # one thread, so that bytes repeat
        centers = torch.from_numpy(kmeans_plusplus(x[sample], k, random_state=seed)[0])
    rows, state, cost = torch.from_numpy(x), None, np.inf
    for _ in range(max_iter):
        codes, state = assign(rows, centers, state)
        sums = torch.zeros_like(centers, dtype=torch.float64).index_add_(0, codes, rows.double())
        centers = (sums / torch.bincount(codes, minlength=k).unsqueeze(1)).to(rows.dtype)
        before, cost = cost, (rows - centers[codes]).square().sum(dtype=torch.float64).item()
        if before - cost <= TOLERANCE * cost:
            break
    return centers.numpy(), codes.numpy()


def main(options: Options) -> None:
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
