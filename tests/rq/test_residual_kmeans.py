"""The commands of residual k-means, rq.rqkmeans_faiss and rq.rqkmeans_constrained.

Invariants: codebooks and codes equal a plain residual loop, with sizes within bounds for the constrained one; any K; the
same seed gives the same bytes; codebooks are made once and used for other collision modes; nothing of another run is
overwritten; invalid input leaves nothing.
"""

import numpy as np
import pytest
import torch
from rq_helpers import DIM, KMEANS, N, kmeans, points

from minionerec.catalog.sids import read_index
from minionerec.common.errors import UserError
from rq import rqkmeans_constrained, rqkmeans_faiss
from rq.balanced import size_bounds
from rq.models.rq import Codebooks


@pytest.mark.parametrize("method", KMEANS)
def test_codebooks_equal_a_plain_residual_loop(method, kmeans_file, tmp_path):
    found = kmeans(method, kmeans_file, tmp_path / "D.index.json")
    left = points().astype(np.float64)
    for book, codes in zip(found.codebooks, found.codes.T, strict=True):
        distances = ((left[:, None] - book[None]) ** 2).sum(-1)
        if method == "faiss":
            np.testing.assert_array_equal(codes, distances.argmin(1))
        else:
            sizes = np.bincount(codes, minlength=32)
            assert size_bounds(N, 32).low <= sizes.min() and sizes.max() <= size_bounds(N, 32).high
        for code in range(32):  # every centre is the mean of its cluster
            np.testing.assert_allclose(book[code], left[codes == code].mean(0), atol=2e-2)
        left = left - book[codes]
    model = Codebooks([torch.from_numpy(book) for book in found.codebooks])
    decoded = model.quantizer.decode(torch.from_numpy(found.codes)).numpy()
    np.testing.assert_allclose(decoded, points() - left, atol=1e-5)
    assert read_index(tmp_path / "D.index.json") == [f"<a_{a}><b_{b}>" for a, b in found.codes]


@pytest.mark.parametrize("k", [256, 300, 512, 1024])
def test_any_k(k, tmp_path):
    """Powers of two and others; more than one byte per code."""
    np.save(tmp_path / "D.npy", points(1100))
    for method, options in (("faiss", {}), ("constrained", {"solver": "transport", "max_iter": 2})):
        if method == "constrained" and k != 300:
            continue
        found = kmeans(method, tmp_path / "D.npy", tmp_path / f"{method}.index.json", k=k, **options)
        assert [book.shape for book in found.codebooks] == [(k, DIM)] * 2
        assert len(np.unique(found.codes[:, 0])) == k


@pytest.mark.parametrize(
    ("method", "options"),
    [("faiss", {}), ("constrained", {"solver": "flow"}), ("constrained", {"solver": "transport"})],
)
def test_same_seed_same_bytes(method, options, kmeans_file, tmp_path):
    for run, seed in (("one", 1), ("two", 1), ("other", 2)):
        kmeans(method, kmeans_file, tmp_path / f"{run}.index.json", seed=seed, collision="extra_token", **options)
    for suffix in ("index.json", f"codebooks_{method}.npz"):
        one, two, other = ((tmp_path / f"{run}.{suffix}").read_bytes() for run in ("one", "two", "other"))
        assert one == two != other


def solvers():
    bounds = size_bounds(N, 16)
    return {
        "faiss": lambda x: rqkmeans_faiss.kmeans(x, 16, 0, 20, False),
        "flow": lambda x: rqkmeans_constrained.kmeans_flow(x, 16, bounds, 0, 20),
        "transport": lambda x: rqkmeans_constrained.kmeans_transport(x, 16, bounds, 0, 20),
    }


@pytest.mark.parametrize("solver", ["faiss", "flow", "transport"])
def test_clusters_do_not_depend_on_unit_and_origin(solver):
    """Power-of-two scales give the same bits; an offset of 3000 gives nearly the same points."""
    x, solve = points(), solvers()[solver]
    centers, codes = solve(x)
    expected = np.square(x - centers[codes]).sum()
    for scale in (2.0**-70, 2.0**70):
        scaled, same = solve(x * np.float32(scale))
        np.testing.assert_array_equal(same, codes)
        np.testing.assert_allclose(scaled.astype(np.float64) / scale, centers, rtol=1e-5, atol=1e-5)
    far, moved = solve(x + np.float32(3000))
    assert np.square(x - (far - 3000)[moved]).sum() == pytest.approx(expected, rel=0.02)


def test_constrained_clusters_are_cheapest_by_squared_distance():
    """Balanced groups that are far apart are found in each of several units."""
    rng, k, n = np.random.default_rng(0), 12, 240
    truth = np.repeat(np.arange(k), n // k)
    x = (rng.normal(size=(k, 8))[truth] * 6 + rng.normal(size=(n, 8))).astype(np.float32)
    for scale in (1, 1e-5, 1e6):
        for solve in (rqkmeans_constrained.kmeans_flow, rqkmeans_constrained.kmeans_transport):
            codes = solve(x * np.float32(scale), k, size_bounds(n, k), 0, 100)[1]
            pairs = {(int(a), int(b)) for a, b in zip(truth, codes, strict=True)}
            assert len(pairs) == k, "one cluster per group"


def test_equal_residuals_are_no_error():
    """From the second level on, a residual can be zero everywhere."""
    x = np.zeros((40, 3), dtype=np.float32)
    for solve in (rqkmeans_constrained.kmeans_flow, rqkmeans_constrained.kmeans_transport):
        centers, codes = solve(x, 8, size_bounds(40, 8), 0, 5)
        assert (centers == 0).all() and np.bincount(codes, minlength=8).max() <= 6


def test_codebooks_are_made_once(kmeans_file, tmp_path, capsys):
    output, books = tmp_path / "D.index.json", tmp_path / "D.codebooks_faiss.npz"
    kmeans("faiss", kmeans_file, output)
    stamp = books.stat().st_mtime_ns
    with pytest.raises(UserError, match="collision is 'none' there and 'extra_token' now"):
        kmeans("faiss", kmeans_file, output, collision="extra_token")
    kmeans("faiss", kmeans_file, output, collision="extra_token", overwrite=True)
    assert f"{books}: complete" in capsys.readouterr().out and len(set(read_index(output))) == N
    assert books.stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="seed is 42 there and 7 now"):
        kmeans("faiss", kmeans_file, output, seed=7, collision="extra_token")
    assert books.stat().st_mtime_ns == stamp
    kmeans("faiss", kmeans_file, output, seed=7, collision="extra_token", overwrite=True)
    assert books.stat().st_mtime_ns != stamp
    assert (tmp_path / "D.codebooks_faiss.npz.1").stat().st_mtime_ns == stamp, "the old one is moved aside"


def test_published_flags_name_the_files(kmeans_file):
    folder = kmeans_file.parent
    rqkmeans_faiss.main(rqkmeans_faiss.Options(dataset="D", root=str(folder), k=32, l=3, max_iter=5))
    names = {"D.index.json", "D.codebooks_faiss.npz", "D.index.quality.json", "D.index.quality.png"}
    assert names <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("method", KMEANS)
@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (np.full((20, 4), np.nan, dtype=np.float32), {}, "NaN or Inf in 20 of 20 rows, first row 0"),
        (np.ones((20, 4), dtype=np.float32), {}, "all 20 rows are equal"),
        (points(10), {}, "n=10 items are fewer than K=16 codes of a level; lower --k"),
        (points(300), {"collision": "nearest_free"}, "16 x 16 codes make 256 SIDs, fewer than the 300 items"),
        (points(300), {"k": 1}, "--k 1: expected 2 to 65536"),
        (points(300), {"k": -3}, "--k -3: expected 2 to 65536"),
        (points(300), {"k": 65537}, "--k 65537: expected 2 to 65536"),
        (points(300), {"l": 0}, "--l 0: expected 1 to 26"),
        (points(300), {"l": -1}, "--l -1: expected 1 to 26"),
        (points(300), {"seed": -1}, "--seed -1: expected 0 to"),
        (points(300), {"seed": 2**31 - 1}, "--seed 2147483647: expected 0 to 2147483646"),
        (points(300), {"max_iter": 0}, "--max_iter 0: expected at least 1"),
        (points(300), {"output_file": "index"}, "--output_file index: expected a name like"),
        (points(300), {"dataset": "D", "root": "."}, "either --dataset and --root, or --data_path, is required"),
        (points(300), {"data_path": ""}, "either --dataset and --root, or --data_path, is required"),
    ],
)
def test_bad_input(method, matrix, options, message, tmp_path):
    np.save(tmp_path / "D.npy", matrix)
    given = {"data_path": str(tmp_path / "D.npy"), "output_file": str(tmp_path / "D.index.json"), "k": 16, "l": 2}
    with pytest.raises(UserError, match=message):
        KMEANS[method].main(KMEANS[method].Options(**given | options))
    assert [path.name for path in tmp_path.iterdir()] == ["D.npy"]


def test_data_set_with_two_embeddings(kmeans_file):
    np.save(kmeans_file.with_name("D.emb-other-td.npy"), points())
    with pytest.raises(UserError, match="found D.emb-other-td.npy, D.emb-tiny-td.npy, expected exactly one"):
        rqkmeans_faiss.main(rqkmeans_faiss.Options(dataset="D", root=str(kmeans_file.parent)))
