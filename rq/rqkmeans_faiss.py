"""RQ-KMeans by faiss: a k-means on the residuals of each level, then the index.

    python -m rq.rqkmeans_faiss --dataset ml-100k --root output/quickstart/raw --k 64

Writes <D>.codebooks_faiss.npz and <D>.index.json with its quality report into --root. faiss's ResidualQuantizer takes
only powers of two. One `faiss.Kmeans` per level is the same greedy quantizer (a beam of 1) for any K.
"""

import numpy as np

from minionerec.common.options import run
from rq import generate_indices
from rq.options import ClusteringOptions, KMeansOptions, part
from rq.residual_kmeans import make_codebooks, read_checked, standardised

Options = KMeansOptions


@standardised
def kmeans(x: np.ndarray, k: int, seed: int, max_iter: int, verbose: bool) -> tuple[np.ndarray, np.ndarray]:
    """Centres (k, dim) and the nearest of them (n,) for x (n, dim); one thread, so that bytes repeat."""
    import faiss
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
    o.name_files("faiss")
    embeddings = read_checked(o)

    def cluster(residual: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return kmeans(residual, o.k, seed, o.max_iter, o.verbose)

    make_codebooks(part(o, ClusteringOptions), "faiss", embeddings, cluster)
    generate_indices.index_of(o, o.codebook_path, o.data_path)


if __name__ == "__main__":
    run(main, Options)
