"""RQ-KMeans by faiss: a k-means on the residuals of the levels before, then the index.

    python -m rq.rqkmeans_faiss --dataset Industrial_and_Scientific --root data

Writes <D>.codebooks_faiss.npz and <D>.index.json with its quality report into --root. faiss's own ResidualQuantizer
takes powers of two alone; a `faiss.Kmeans` a level is the same greedy quantiser (its beam of 1) for any K.
"""

import numpy as np

from minionerec.common.options import run
from rq.codebooks import KMeansOptions, run_kmeans

Options = KMeansOptions  # nothing beyond what both k-means commands take


def kmeans(x: np.ndarray, k: int, seed: int, max_iter: int, verbose: bool) -> tuple[np.ndarray, np.ndarray]:
    """Centres (k, dim) and the nearest of them (n,) for x (n, dim); one thread, so that bytes repeat."""
    import faiss  # here, since it is slow to import
    from threadpoolctl import threadpool_limits

    threads = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(1)
        with threadpool_limits(limits=1):
            clustering = faiss.Kmeans(
                x.shape[1],
                k,
                niter=max_iter,
                seed=seed,
                verbose=verbose,
                min_points_per_centroid=1,
                max_points_per_centroid=len(x),
            )
            clustering.train(x)
            return clustering.centroids, clustering.index.search(x, 1)[1][:, 0]
    finally:
        faiss.omp_set_num_threads(threads)


def main(options: Options) -> None:
    o = options
    run_kmeans(o, "faiss", lambda residual, seed: kmeans(residual, o.k, seed, o.max_iter, o.verbose))


if __name__ == "__main__":
    run(main, Options)
