"""RQ-KMeans by faiss, constrained, and RQ-KMeans+: assignments, codebooks, command lines."""

import json

import numpy as np
import pytest
import torch
from helpers import run_stage

from minionerec.catalog.sids import read_index
from minionerec.common.errors import UserError
from rq import generate_indices, rqkmeans_constrained, rqkmeans_faiss, rqkmeans_plus
from rq.balanced import Bounds, flow_assignment, size_bounds, transport_assignment
from rq.checkpoints import load_model
from rq.codebooks import read_codebooks
from rq.collisions import resolve
from rq.models.rq import Codebooks
from rq.models.rqvae import RQKMeansPlus

N, DIM = 300, 10


def points(n=N, dim=DIM, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(20, dim))[rng.integers(20, size=n)] + 0.3 * rng.normal(size=(n, dim))).astype(np.float32)


@pytest.fixture
def embedding_file(tmp_path):
    path = tmp_path / "D.emb-tiny-td.npy"
    np.save(path, points())
    return path


SCRIPTS = {"faiss": rqkmeans_faiss, "constrained": rqkmeans_constrained}


def kmeans(method, data_path, output, **options):
    script = SCRIPTS[method]
    given = {"k": 32, "l": 2, "max_iter": 8, "collision": "none"} | options
    script.main(script.Options(data_path=str(data_path), output_file=str(output), **given))
    return read_codebooks(output.with_name(f"{output.name.split('.')[0]}.codebooks_{method}.npz"), "codebook_path")


# ---- assignments under bounds


@pytest.mark.parametrize(
    ("n", "k", "bounds"), [(1000, 256, (2, 4)), (256, 256, (1, 2)), (300, 256, (1, 2)), (3686, 256, (13, 15))]
)
def test_published_bounds(n, k, bounds):
    assert size_bounds(n, k) == bounds


def cost(x, centers, codes):
    return np.square(x - centers[codes]).sum()


def test_assignments_on_a_line():
    """Six points, two centres, three each: the known answer cuts the crowd at its far end."""
    x, centers = np.array([[0.0], [0.1], [0.2], [0.3], [0.4], [5.0]], dtype=np.float32), np.array([[0.0], [5.0]])
    centers = centers.astype(np.float32)
    expected = [0, 0, 0, 1, 1, 1]
    assert flow_assignment(x, centers, Bounds(3, 3)).tolist() == expected
    codes, _ = transport_assignment(torch.from_numpy(x), torch.from_numpy(centers), Bounds(3, 3))
    assert codes.tolist() == expected


# With one item a cluster the rounding costs more: the transport is for large n.
@pytest.mark.parametrize(("n", "k", "share"), [(1000, 32, 1.03), (150, 64, 1.03), (70, 64, 1.5)])
def test_transport_is_within_bounds_and_near_the_flow(n, k, share):
    x = points(n)
    centers, bounds = x[np.random.default_rng(1).permutation(n)[:k]], size_bounds(n, k)
    exact = flow_assignment(x, centers, bounds)
    codes, prices = transport_assignment(torch.from_numpy(x), torch.from_numpy(centers), bounds)
    for some in (exact, codes.numpy()):
        sizes = np.bincount(some, minlength=k)
        assert bounds.low <= sizes.min() and sizes.max() <= bounds.high
    assert cost(x, centers, exact) <= cost(x, centers, codes.numpy()) * (1 + 1e-6) <= share * cost(x, centers, exact)
    again, _ = transport_assignment(torch.from_numpy(x), torch.from_numpy(centers), bounds, prices=prices)
    assert cost(x, centers, again.numpy()) <= share * cost(x, centers, exact)


def test_transport_on_a_sample_and_in_blocks(monkeypatch):
    """What a million items meet: prices from a sample, distances a block at a time."""
    x, k = points(3000), 16
    monkeypatch.setattr("rq.balanced.BLOCK", 1000)
    monkeypatch.setattr("rq.balanced.KEPT", 0)
    bounds, centers = size_bounds(len(x), k), x[:k]
    codes = transport_assignment(torch.from_numpy(x), torch.from_numpy(centers), bounds)[0].numpy()
    sizes = np.bincount(codes, minlength=k)
    assert bounds.low <= sizes.min() and sizes.max() <= bounds.high
    assert cost(x, centers, codes) <= 1.03 * cost(x, centers, flow_assignment(x, centers, bounds))


def test_transport_of_equal_rows():
    """Nothing to choose by, and still within bounds."""
    bounds = size_bounds(100, 8)
    codes, _ = transport_assignment(torch.ones(100, 3), torch.ones(8, 3), bounds)
    sizes = torch.bincount(codes, minlength=8)
    assert bounds.low <= sizes.min() and sizes.max() <= bounds.high


# ---- residual k-means


@pytest.mark.parametrize("method", ["faiss", "constrained"])
def test_codebooks_equal_a_plain_residual_loop(method, embedding_file, tmp_path):
    found = kmeans(method, embedding_file, tmp_path / "D.index.json")
    left = points().astype(np.float64)
    for book, codes in zip(found.codebooks, found.codes.T, strict=True):
        distances = ((left[:, None] - book[None]) ** 2).sum(-1)
        if method == "faiss":
            np.testing.assert_array_equal(codes, distances.argmin(1))
        else:
            sizes = np.bincount(codes, minlength=32)
            assert size_bounds(N, 32).low <= sizes.min() and sizes.max() <= size_bounds(N, 32).high
        for code in range(32):  # every centre is its cluster's mean
            np.testing.assert_allclose(book[code], left[codes == code].mean(0), atol=2e-2)
        left = left - book[codes]
    model = Codebooks([torch.from_numpy(book) for book in found.codebooks])
    decoded = model.quantizer.decode(torch.from_numpy(found.codes)).numpy()
    np.testing.assert_allclose(decoded, points() - left, atol=1e-5)
    assert read_index(tmp_path / "D.index.json") == [f"<a_{a}><b_{b}>" for a, b in found.codes]


@pytest.mark.parametrize("k", [256, 300, 512, 1024])
def test_any_k(k, tmp_path):
    """Powers of two and others; more than one byte a code."""
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
def test_same_seed_same_bytes(method, options, embedding_file, tmp_path):
    for run, seed in (("one", 1), ("two", 1), ("other", 2)):
        kmeans(method, embedding_file, tmp_path / f"{run}.index.json", seed=seed, collision="extra_token", **options)
    one, two, other = ((tmp_path / f"{run}.index.json").read_bytes() for run in ("one", "two", "other"))
    assert one == two != other


def test_codebooks_are_not_made_twice(embedding_file, tmp_path, capsys):
    output = tmp_path / "D.index.json"
    kmeans("faiss", embedding_file, output)
    stamp = (tmp_path / "D.codebooks_faiss.npz").stat().st_mtime_ns
    kmeans("faiss", embedding_file, output, collision="extra_token")
    assert "made before" in capsys.readouterr().out and len(set(read_index(output))) == N
    assert (tmp_path / "D.codebooks_faiss.npz").stat().st_mtime_ns == stamp
    kmeans("faiss", embedding_file, output, seed=7)
    assert (tmp_path / "D.codebooks_faiss.npz").stat().st_mtime_ns != stamp


def test_published_flags_name_the_files(embedding_file):
    folder = embedding_file.parent
    rqkmeans_faiss.main(rqkmeans_faiss.Options(dataset="D", root=str(folder), k=32, l=3, max_iter=5))
    names = {"D.index.json", "D.codebooks_faiss.npz", "D.index.quality.json", "D.index.quality.png"}
    assert names <= {path.name for path in folder.iterdir()}


# ---- the index from codebooks


def index(ckpt, data, output, **options):
    generate_indices.main(
        generate_indices.Options(
            ckpt_path=str(ckpt), data_path=str(data), output_file=str(output), device="cpu", **options
        )
    )
    return output


def test_index_from_codebooks(embedding_file, tmp_path, capsys):
    """The clusters for the items that codebooks were made of, the nearest codes for others."""
    found = kmeans("constrained", embedding_file, tmp_path / "D.index.json", k=64)
    books = tmp_path / "D.codebooks_constrained.npz"
    nearest = Codebooks([torch.from_numpy(b) for b in found.codebooks]).encode(torch.from_numpy(points())).codes.numpy()
    assert (nearest != found.codes).any(), "these data show the difference"
    again = index(books, embedding_file, tmp_path / "again.index.json", collision="none")
    assert again.read_bytes() == (tmp_path / "D.index.json").read_bytes()
    np.save(tmp_path / "other.npy", np.concatenate([points(), points(1, seed=5)]))
    other = index(books, tmp_path / "other.npy", tmp_path / "other.index.json", collision="none")
    assert "every item takes its nearest codes" in capsys.readouterr().out
    assert read_index(other)[:N] == [f"<a_{a}><b_{b}>" for a, b in nearest]


def test_bounded_codes_move_by_their_own_residuals(embedding_file, tmp_path):
    """nearest_free sees what the last level left of the item's cluster, not of its nearest code."""
    options = {"k": 24, "l": 2, "collision": "nearest_free"}
    found = kmeans("constrained", embedding_file, tmp_path / "D.index.json", **options)
    first, last = found.codebooks
    nearest = Codebooks([torch.from_numpy(b) for b in found.codebooks]).encode(torch.from_numpy(points()))
    left = {"own": points() - first[found.codes[:, 0]], "nearest": nearest.last_residual.numpy()}
    expected = {name: resolve(found.codes, "nearest_free", residuals, last) for name, residuals in left.items()}
    assert (expected["own"] != expected["nearest"]).any(), "these data show the difference"
    assert read_index(tmp_path / "D.index.json") == [f"<a_{a}><b_{b}>" for a, b in expected["own"]]


def test_codebooks_too_small_for_the_items(embedding_file, tmp_path):
    kmeans("constrained", embedding_file, tmp_path / "D.index.json", k=64, l=1, collision="extra_token")
    with pytest.raises(UserError, match="64 codes make 64 SIDs, fewer than the 300 items; .*extra_token"):
        index(tmp_path / "D.codebooks_constrained.npz", embedding_file, tmp_path / "x.index.json")


# ---- RQ-KMeans+


def plus(data_path, folder, books, **options):
    given = {"layers": [16], "epochs": 20, "batch_size": 100, "warmup_epochs": 2, "lr": 5e-3, "eval_step": 10}
    rqkmeans_plus.main(
        rqkmeans_plus.Options(
            data_path=str(data_path),
            ckpt_dir=str(folder),
            pretrained_codebook_path=str(books),
            device="cpu",
            **given | options,
        )
    )


def test_plus_starts_at_the_constrained_codes_and_gains(embedding_file, tmp_path, monkeypatch, capsys):
    found = kmeans("constrained", embedding_file, tmp_path / "D.index.json", k=32)
    books = tmp_path / "D.codebooks_constrained.npz"
    x = torch.from_numpy(points())
    frozen = Codebooks([torch.from_numpy(book) for book in found.codebooks])
    start = frozen.encode(x).codes

    seen = []
    untrained = rqkmeans_plus.train

    def look(*arguments, prepare, **more):
        def prepare_and_look(model):
            prepare(model)
            seen.append((model.encode(x).codes, model.squared_error(x, start), model(x)))

        return untrained(*arguments, prepare=prepare_and_look, **more)

    monkeypatch.setattr(rqkmeans_plus, "train", look)
    plus(embedding_file, tmp_path / "plus", books)
    codes, error, output = seen[0]
    assert torch.equal(codes, start) and torch.equal(output.codes, start)
    torch.testing.assert_close(error, frozen.squared_error(x, start))
    assert f"{(start.numpy() == found.codes).all(1).mean():.1%} of the items" in capsys.readouterr().out

    model, config = load_model(tmp_path / "plus")
    assert isinstance(model, RQKMeansPlus) and config["architecture"] == "rqkmeans_plus"
    after = model.encode(x).codes
    assert model.squared_error(x, after)[-1] < 0.9 * error[-1], "the start is the codebooks' own error"
    assert len(set(read_index(tmp_path / "plus" / "D.index.json"))) == N

    before = (tmp_path / "plus" / "D.index.json").read_bytes()
    plus(embedding_file, tmp_path / "again", books)
    assert (tmp_path / "again" / "D.index.json").read_bytes() == before, "the same seed"


def test_plus_needs_zero_last_layers():
    """Without them z would not be x: the guard of the test above can fail."""
    torch.manual_seed(0)
    model = RQKMeansPlus(in_dim=6, e_dim=6, layers=[8], num_emb_list=[4], sk_epsilons=[0.0])
    x = torch.randn(5, 6)
    assert torch.equal(model.latent(x), x) and torch.equal(model.reconstruct(x), x)
    torch.nn.init.normal_(model.encoder.steps[-1].weight)
    assert not torch.equal(model.latent(x), x)


# ---- bad input


@pytest.mark.parametrize("method", ["faiss", "constrained"])
@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (np.full((20, 4), np.nan, dtype=np.float32), {}, "NaN or Inf in 20 of 20 rows, first row 0"),
        (np.ones((20, 4), dtype=np.float32), {}, "all 20 rows are equal"),
        (points(10), {}, "n=10 items are fewer than K=16 codes of a level; lower --k"),
        (points(300), {"collision": "nearest_free"}, "16 x 16 codes make 256 SIDs, fewer than the 300 items"),
        (points(300), {"k": 1}, "--k is 1, expected 2 to 65536"),
        (points(300), {"k": 65537}, "--k is 65537, expected 2 to 65536"),
        (points(300), {"l": 0}, "--l is 0"),
        (points(300), {"output_file": "index"}, "expected a name like"),
        (points(300), {"dataset": "D", "root": "."}, "either --dataset and --root, or --data_path"),
    ],
)
def test_bad_input(method, matrix, options, message, tmp_path):
    np.save(tmp_path / "D.npy", matrix)
    given = {"data_path": str(tmp_path / "D.npy"), "output_file": str(tmp_path / "D.index.json"), "k": 16, "l": 2}
    with pytest.raises(UserError, match=message):
        SCRIPTS[method].main(SCRIPTS[method].Options(**given | options))
    assert [path.name for path in tmp_path.iterdir()] == ["D.npy"]


def test_data_set_with_two_embeddings(embedding_file):
    np.save(embedding_file.with_name("D.emb-other-td.npy"), points())
    with pytest.raises(UserError, match="found D.emb-other-td.npy, D.emb-tiny-td.npy, expected exactly one"):
        rqkmeans_faiss.main(rqkmeans_faiss.Options(dataset="D", root=str(embedding_file.parent)))


def book(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "no such file"),
        (b"text", "not an .npz of codebooks"),
        ({"x": book(4, 3)}, r"found \['x'\], expected codebook_0"),
        ({"codebook_0": book(4, DIM), "codebook_1": book(4, DIM + 1)}, r"codebook_1 is float32 \(4, 11\)"),
        ({"codebook_0": book(4, DIM) * np.nan}, "expected finite floats"),
        ({"codebook_0": np.array([{}] * 4)}, "not an .npz of codebooks"),
        ({"codebook_0": book(4, DIM), "codes": np.array([[4]])}, r"codes do not fit codebooks of \[4\]"),
        ({"codebook_0": book(400, 7)}, "7"),
        ({"codebook_0": book(4, DIM)}, "4 codes make 4 SIDs, fewer than the 300 items"),
    ],
)
@pytest.mark.parametrize("user", ["generate_indices", "plus"])
def test_bad_codebooks(user, arrays, message, embedding_file, tmp_path):
    path = tmp_path / "books.npz"
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    elif arrays:
        np.savez(path, **arrays)
    with pytest.raises(UserError, match=message) as error:
        if user == "plus":
            plus(embedding_file, tmp_path / "plus", path)
        else:
            index(path, embedding_file, tmp_path / "x.index.json")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "plus").exists() and not (tmp_path / "x.index.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"e_dim": 32}, "--e_dim is 32, expected 10, the width of the embeddings"),
        ({"num_emb_list": [32, 32, 32]}, r"--num_emb_list is \[32, 32, 32\], expected \[32, 32\]"),
        ({"sk_epsilons": [0.1]}, "2 values of 0 or more"),
        ({"compile": True}, "--compile True is for cuda, but the device is cpu"),
    ],
)
def test_plus_checks_its_flags_against_the_codebooks(options, message, embedding_file, tmp_path):
    np.savez(tmp_path / "books.npz", codebook_0=book(32, DIM), codebook_1=book(32, DIM))
    with pytest.raises(UserError, match=message):
        plus(embedding_file, tmp_path / "plus", tmp_path / "books.npz", **options)


def test_checkpoint_of_the_other_architecture(embedding_file, tmp_path):
    np.savez(tmp_path / "books.npz", codebook_0=book(32, DIM), codebook_1=book(32, DIM))
    plus(embedding_file, tmp_path / "plus", tmp_path / "books.npz", epochs=1)
    config = json.loads((tmp_path / "plus" / "config.json").read_text())
    (tmp_path / "plus" / "config.json").write_text(
        json.dumps(config | {"architecture": "rqvae", "model": {"in_dim": 9}})
    )
    with pytest.raises(UserError, match="does not fit its config.json"):
        index(tmp_path / "plus", embedding_file, tmp_path / "x.index.json")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rqkmeans_faiss", "rqkmeans_constrained", "rqkmeans_plus"])
def test_launchers(name, embedding_file, tmp_path):
    output = tmp_path / "o.index.json"
    environment = {"K": 32, "L": 2, "MAX_ITER": 3, "COLLISION": "extra_token"}
    environment |= {"DATA_PATH": embedding_file, "OUTPUT_FILE": output}
    if name == "rqkmeans_plus":
        np.savez(tmp_path / "books.npz", codebook_0=book(32, DIM), codebook_1=book(32, DIM))
        environment |= {"PRETRAINED_CODEBOOK_PATH": tmp_path / "books.npz", "CKPT_DIR": tmp_path / "plus"}
        environment |= {"EPOCHS": 2, "LAYERS": "8", "WARMUP_EPOCHS": 0, "DEVICE": "cpu"}
    run_stage(f"rq/{name}.sh", env=environment)
    assert len(set(read_index(output))) == N
    if name == "rqkmeans_constrained":  # what a launcher of the index makes of the codebooks, items added
        np.save(tmp_path / "more.npy", np.concatenate([points(), points(3, seed=5)]))
        environment = {"CKPT_PATH": tmp_path / "o.codebooks_constrained.npz", "DATA_PATH": tmp_path / "more.npy"}
        environment |= {"OUTPUT_FILE": tmp_path / "more.index.json", "APPEND": output, "COLLISION": "extra_token"}
        run_stage("rq/generate_indices.sh", env=environment)
        assert read_index(tmp_path / "more.index.json")[:N] == read_index(output)
