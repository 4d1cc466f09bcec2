"""Embeddings, residual quantisation, training, collisions, and the command lines over them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from minionerec.catalog.catalog import Catalog
from minionerec.catalog.sids import read_index
from minionerec.common.devices import pick_device
from minionerec.common.embeddings import load_embeddings
from minionerec.common.errors import UserError
from rq import generate_indices, rqvae
from rq.collisions import MODES, colliding_groups, collision_rate, keys_of, resolve, sinkhorn_last_level
from rq.index_file import to_sids
from rq.models.rq import ResidualQuantizer
from rq.models.rqvae import RQVAE
from rq.models.vq import sinkhorn
from rq.quality import quality
from rq.text2emb.amazon_text2emb import drop_words, item_texts, plain_text
from rq.trainer import Trainer

TINY = {"layers": [16], "e_dim": 4, "num_emb_list": [8, 8], "batch_size": 32, "warmup_epochs": 0, "device": "cpu"}


@pytest.fixture
def clustered() -> np.ndarray:
    """96 points in 12 dimensions around 8 centres."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(8, 12))[rng.integers(8, size=96)] + 0.2 * rng.normal(size=(96, 12))
    return points.astype(np.float32)


@pytest.fixture
def embedding_file(tmp_path, clustered):
    path = tmp_path / "D.emb-tiny-td.npy"
    np.save(path, clustered)
    return path


def train(data_path, ckpt_dir, **options):
    rqvae.main(rqvae.Options(data_path=str(data_path), ckpt_dir=str(ckpt_dir), **{**TINY, **options}))


def index(ckpt, data, output, **options):
    generate_indices.main(
        generate_indices.Options(
            ckpt_path=str(ckpt), data_path=str(data), output_file=str(output), device="cpu", **options
        )
    )


# ---- quantisation


def quantizer(epsilons=(0.0, 0.0, 0.0)) -> ResidualQuantizer:
    torch.manual_seed(1)
    stack = ResidualQuantizer(num_emb_list=[5, 6, 7], dim=3, beta=0.25, sk_epsilons=epsilons, sk_iters=50)
    for level in stack.levels:
        torch.nn.init.normal_(level.codebook)
    return stack


def test_residual_quantisation_equals_a_plain_loop():
    stack, z = quantizer(), torch.randn(20, 3)
    output, encoded = stack(z), stack.encode(z)
    books = [level.codebook.detach().numpy() for level in stack.levels]
    losses = np.zeros(3)
    for row, vector in enumerate(z.numpy()):
        residual = vector
        for i, book in enumerate(books):
            if i == 2:
                np.testing.assert_allclose(encoded.last_residual[row], residual, atol=1e-6)
            code = min(range(len(book)), key=lambda k: ((residual - book[k]) ** 2).sum())
            assert output.codes[row, i] == encoded.codes[row, i] == code
            losses[i] += 1.25 * ((residual - book[code]) ** 2).mean() / len(z)
            residual = residual - book[code]
        np.testing.assert_allclose(output.quantized[row].detach(), vector - residual, atol=1e-6)
    assert output.loss.item() == pytest.approx(losses.mean(), rel=1e-5)
    torch.testing.assert_close(stack.decode(output.codes), output.quantized.detach())


def test_gradient_goes_straight_through():
    stack, z = quantizer(), torch.randn(20, 3, requires_grad=True)
    weight = torch.randn(20, 3)
    (stack(z).quantized * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)
    assert all(level.codebook.grad is None for level in stack.levels)


def test_losses_reach_encoder_and_codebooks():
    stack, z = quantizer(), torch.randn(20, 3, requires_grad=True)
    output = stack(z)
    output.loss.backward()
    residual, expected = z.detach(), torch.zeros(20, 3)
    for i, level in enumerate(stack.levels):
        assert level.codebook.grad.abs().sum() > 0
        residual = residual - level.codebook.detach()[output.codes[:, i]]
        expected += 0.25 * 2 * residual / residual.numel() / 3  # d/dz of beta * mse(r, e), mean over levels
    torch.testing.assert_close(z.grad, expected)


@pytest.mark.parametrize("epsilon", [0.003, 0.05, 1.0])
def test_sinkhorn_is_balanced(epsilon):
    plan = sinkhorn(torch.rand(60, 6, generator=torch.Generator().manual_seed(0)), epsilon, 2000)
    assert plan.dtype == torch.float64 and torch.isfinite(plan).all()
    torch.testing.assert_close(plan.sum(0), torch.full((6,), 10.0, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(1), torch.ones(60, dtype=torch.float64), atol=2e-2, rtol=0)


def test_sinkhorn_spreads_what_argmin_crowds():
    stack, z = quantizer((0.01, 0.01, 0.01)), torch.randn(60, 3) * 0.1
    used = stack.levels[0].assign(z).unique().numel()
    assert stack.levels[0].assign(z, balanced=True).unique().numel() == 5 > used
    assert torch.equal(stack.eval()(z).codes, stack.encode(z).codes), "balancing belongs to training alone"


def test_sinkhorn_of_a_stack_is_sinkhorn_of_each():
    distances = torch.rand(3, 20, 6, generator=torch.Generator().manual_seed(0))
    each = torch.stack([sinkhorn(d, 0.05, 30) for d in distances])
    torch.testing.assert_close(sinkhorn(distances, 0.05, 30), each)


def test_dead_codes_restart_at_residuals():
    stack, z = quantizer(), torch.randn(20, 3)
    before = [level.codebook.clone() for level in stack.levels]
    counts = [torch.tensor([3, 0, 2, 1, 3]), torch.full((6,), 9), torch.tensor([9, 9, 9, 9, 9, 9, 0])]
    stack.restart_dead_codes(z, counts, threshold=2)
    moved = [(level.codebook != old).any(1).tolist() for level, old in zip(stack.levels, before, strict=True)]
    assert moved == [[False, True, False, True, False], [False] * 6, [False] * 6 + [True]]
    first, *_, last = stack.levels
    assert all((z == first.codebook[code]).all(1).any() for code in (1, 3)), "each is a row of z"
    assert not torch.equal(first.codebook[1], first.codebook[3]), "and not the same row"
    residual = stack.encode(z).last_residual
    assert (residual - last.codebook[6]).abs().sum(1).min() < 1e-5


def test_dead_code_threshold_revives_codes(embedding_file, tmp_path):
    """Without k-means all codes start in one place, and few are ever used."""
    used = []
    for threshold in (0.0, 1.0):
        folder = tmp_path / str(threshold)
        train(embedding_file, folder, epochs=30, kmeans_init=False, num_emb_list=[32], dead_code_threshold=threshold)
        model, _ = generate_indices.load_model(folder / "best_loss.safetensors")
        used.append(model.encode(torch.from_numpy(np.load(embedding_file))).codes.unique().numel())
    assert used[1] > 2 * used[0]


def test_kmeans_start_finds_the_clusters(clustered):
    stack = ResidualQuantizer(num_emb_list=[8], dim=12, beta=0.25, sk_epsilons=[0.0], sk_iters=50)
    z = torch.from_numpy(clustered)
    before = stack(z).loss
    stack.init_by_kmeans(z, iterations=100, seed=0)
    assert stack(z).loss < before / 5


# ---- collisions

CODES = np.array([[0, 0], [0, 0], [0, 0], [0, 1], [1, 2], [1, 2], [2, 0]])
RESIDUALS = np.array([[0.0], [0.9], [0.1], [1.0], [2.0], [2.4], [0.0]], dtype=np.float32)
CODEBOOK = np.array([[0.0], [1.0], [2.0], [3.0]], dtype=np.float32)


# Sinkhorn may move onto an item's code and then moves that item too.
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "sinkhorn"])
def test_untouched_items_keep_their_sids(mode):
    before = CODES.copy()
    after = to_sids(resolve(CODES, mode, RESIDUALS, CODEBOOK))
    np.testing.assert_array_equal(CODES, before)
    assert [after[i] for i in (3, 6)] == [["<a_0>", "<b_1>"], ["<a_2>", "<b_0>"]]
    Catalog(["".join(sid) for sid in after])  # refuses prefixes


def test_nearest_free_takes_the_nearest_free_codes():
    after = resolve(CODES, "nearest_free", RESIDUALS, CODEBOOK)
    # Items 1 and 2 lie nearest to <b_1>, which item 3 has: they take the codes after it, in order of their ids.
    assert after.tolist() == [[0, 0], [0, 2], [0, 3], [0, 1], [1, 2], [1, 3], [2, 0]]
    assert collision_rate(after) == 0


def test_extra_token_goes_to_whole_groups_only():
    after = resolve(CODES, "extra_token", RESIDUALS, CODEBOOK)
    assert after[:, 2].tolist() == [0, 1, 2, -1, 0, 1, -1]
    assert to_sids(after)[1] == ["<a_0>", "<b_0>", "<c_1>"]
    assert collision_rate(after) == 0
    distinct = CODES[[0, 3, 4]]
    assert resolve(distinct, "extra_token", RESIDUALS[:3], CODEBOOK).shape == (3, 2), "no level without a collision"


def test_sinkhorn_separates_what_differs_and_not_what_does_not():
    codes, residuals = np.zeros((2, 2), dtype=int), np.array([[0.0], [0.6]])
    assert collision_rate(resolve(codes, "sinkhorn", residuals, CODEBOOK)) == 0
    assert collision_rate(resolve(codes, "sinkhorn", residuals * 0, CODEBOOK)) == 0.5
    assert collision_rate(resolve(codes, "nearest_free", residuals * 0, CODEBOOK)) == 0


def test_sinkhorn_goes_on_where_it_moves_onto_another_item():
    """Item 1 leaves item 0 for item 2's code, both move from there, and only the third round tells all apart."""
    codes, residuals = np.array([[0, 0], [0, 0], [0, 2]]), np.array([[0.0], [0.9], [3.0]])
    rounds = [sinkhorn_last_level(codes, residuals, CODEBOOK, rounds=n)[:, 1].tolist() for n in (1, 2, 3)]
    assert rounds == [[0, 2, 2], [0, 0, 3], [0, 2, 3]]
    assert resolve(codes, "sinkhorn", residuals, CODEBOOK)[:, 1].tolist() == rounds[-1]


def test_nearest_free_on_many_random_collisions():
    rng = np.random.default_rng(3)
    codes, residuals = rng.integers(4, size=(300, 3)), rng.normal(size=(300, 5))
    codebook = rng.normal(size=(32, 5))
    after = resolve(codes, "nearest_free", residuals, codebook)
    assert collision_rate(codes) > 0.5 and collision_rate(after) == 0
    np.testing.assert_array_equal(after[:, :2], codes[:, :2])
    firsts = np.unique(codes, axis=0, return_index=True)[1]
    np.testing.assert_array_equal(after[firsts], codes[firsts])


def test_full_prefix_recommends_the_extra_token():
    with pytest.raises(UserError, match=r"prefix <a_0> holds 5 items .* 4 codes; use --collision extra_token"):
        resolve(np.zeros((5, 2), dtype=int), "nearest_free", np.zeros((5, 1)), CODEBOOK)


def test_quality_figures():
    assert [group.tolist() for group in colliding_groups(CODES)] == [[0, 1, 2], [4, 5]]
    figures = quality(CODES)
    assert (figures["n_items"], figures["distinct_sids"], figures["max_items_per_sid"]) == (7, 4, 3)
    assert figures["collision_rate"] == pytest.approx(3 / 7)
    assert figures["codes_used"] == [3, 3]
    share = np.array([4, 2, 1]) / 7
    assert figures["perplexity"][0] == pytest.approx(np.exp(-(share * np.log(share)).sum()), abs=0.01)
    assert quality(np.array([[0], [1], [2], [3]]))["perplexity"] == [4.0]


def test_keys_order_like_rows():
    rng = np.random.default_rng(0)
    for codes in (rng.integers(-1, 5, size=(200, 4)), rng.integers(2**16, size=(200, 6)), np.zeros((3, 0), dtype=int)):
        codes = np.concatenate([codes, codes[:3]])
        keys = keys_of(codes)
        _, expected = np.unique(codes, axis=0, return_inverse=True)
        np.testing.assert_array_equal(np.unique(keys, return_inverse=True)[1].reshape(-1), expected.reshape(-1))


# ---- training


def test_reconstruction_falls(clustered, embedding_file, tmp_path):
    train(embedding_file, tmp_path / "ckpt", epochs=80, lr=5e-3, eval_step=40, save_limit=1)
    data = torch.from_numpy(clustered)
    config = json.loads((tmp_path / "ckpt" / "config.json").read_text())
    torch.manual_seed(2024)
    model = RQVAE(**config["model"])
    model.init_by_kmeans(data, iterations=100, seed=2024)
    before = model(data).reconstruction_loss.item()
    trained, _ = generate_indices.load_model(tmp_path / "ckpt" / "best_loss.safetensors")
    assert trained(data).reconstruction_loss.item() < 0.5 * before
    names = sorted(path.name for path in (tmp_path / "ckpt").iterdir())
    assert names == [
        "best_collision.safetensors",
        "best_loss.safetensors",
        "config.json",
        "epoch_80.safetensors",
        "result.json",
    ]


@pytest.mark.parametrize("learner", ["Adam", "adamw", "SGD", "adagrad", "RMSprop"])
def test_every_learner_moves_every_weight(embedding_file, tmp_path, learner):
    train(
        embedding_file, tmp_path / "ckpt", epochs=2, learner=learner, bn=True, lr_scheduler_type="linear", eval_step=1
    )
    first, _ = generate_indices.load_model(tmp_path / "ckpt" / "epoch_1.safetensors")
    second, _ = generate_indices.load_model(tmp_path / "ckpt" / "epoch_2.safetensors")
    frozen = [n for (n, a), b in zip(first.named_parameters(), second.parameters(), strict=True) if torch.equal(a, b)]
    assert not [name for name in frozen if "bias" not in name]  # a bias before batch norm has no gradient


def test_killed_and_resumed_equals_unbroken(embedding_file, tmp_path, monkeypatch):
    options = {
        "epochs": 6,
        "eval_step": 1,
        "dropout_prob": 0.2,
        "dead_code_threshold": 2.0,
        "lr_scheduler_type": "linear",
        "warmup_epochs": 2,
    }
    train(embedding_file, tmp_path / "unbroken", **options)
    save_state = Trainer.save_state

    def save_then_die(self):
        save_state(self)
        if self.epoch == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save_state", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        train(embedding_file, tmp_path / "killed", **options)
    assert not (tmp_path / "killed" / "result.json").exists()
    monkeypatch.undo()
    torch.rand(7)  # the random state of the process that resumes is another one
    train(embedding_file, tmp_path / "killed", **options)
    for name in ("best_loss.safetensors", "best_collision.safetensors", "epoch_6.safetensors"):
        assert (tmp_path / "unbroken" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_finished_run_is_kept_and_another_refused(embedding_file, tmp_path, capsys):
    train(embedding_file, tmp_path / "ckpt", epochs=2)
    stamp = (tmp_path / "ckpt" / "best_loss.safetensors").stat().st_mtime_ns
    train(embedding_file, tmp_path / "ckpt", epochs=2, num_workers=4)
    output = capsys.readouterr().out
    assert "nothing to do" in output and "--num_workers 4 has nothing to load" in output
    assert (tmp_path / "ckpt" / "best_loss.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"other hyper-parameters \(training.lr is 0.001 there and 0.002 now\)"):
        train(embedding_file, tmp_path / "ckpt", epochs=2, lr=2e-3)
    train(embedding_file, tmp_path / "ckpt", epochs=2, lr=2e-3, overwrite=True)
    assert json.loads((tmp_path / "ckpt" / "config.json").read_text())["training"]["lr"] == 2e-3


def test_same_seed_same_bytes(embedding_file, tmp_path):
    for run in ("one", "two"):
        train(embedding_file, tmp_path / run, epochs=5, eval_step=5)
        index(tmp_path / run, embedding_file, tmp_path / f"{run}.index.json", collision="extra_token")
    train(embedding_file, tmp_path / "other", epochs=5, eval_step=5, seed=7)
    index(tmp_path / "other", embedding_file, tmp_path / "other.index.json", collision="extra_token")
    one, two, other = ((tmp_path / f"{run}.index.json").read_bytes() for run in ("one", "two", "other"))
    assert one == two != other
    sids = read_index(tmp_path / "one.index.json")
    assert len(sids) == len(set(sids)) == 96
    report = json.loads((tmp_path / "one.index.quality.json").read_text())
    assert report["after"]["collision_rate"] == 0 < report["before"]["collision_rate"]


# ---- text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        ("", ""),
        ("[]", ""),
        ("  a\n b ", "a b"),
        (["a", "", ["b"]], "a b"),
        ("['it''s', \"b\"]", "its b"),
        ("[not a list]", "[not a list]"),
        ("__import__('os')", "__import__('os')"),
        ("5 &lt; 6 &amp; <b>bold</b>", "5 < 6 & bold"),
    ],
)
def test_plain_text(value, text):
    assert plain_text(value) == text


def test_item_texts(tmp_path):
    path = tmp_path / "D.item.json"
    path.write_text(
        '{"1": {"title": "", "description": "[]"}, "0": {"title": "T", "brand": "B", "description": ["x"]}}'
    )
    assert item_texts(path) == ["T x B", "item 1"]
    path.write_text('{"0": {"title": "T"}, "2": {"title": "U"}}')
    with pytest.raises(UserError, match="item 1 is missing, expected ids 0..1"):
        item_texts(path)


def test_drop_words():
    text = " ".join(map(str, range(1000)))
    (kept,) = drop_words([text], 0.3, seed=0)
    assert 600 < len(kept.split()) < 800 and drop_words([text], 0.3, seed=0) == [kept]
    assert drop_words(["word"], 0.999, seed=0) == ["word"]


# ---- bad input: one line each


def rows(n=10, dim=12):
    return np.random.default_rng(0).normal(size=(n, dim)).astype(np.float32)


def with_bad_rows():
    matrix = rows()
    matrix[3, 1], matrix[7, 0] = np.nan, np.inf
    return matrix


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (None, "no such file"),
        (b"text", "not a .npy array"),
        (np.array([{"a": 1}], dtype=object), "not a .npy array"),
        (np.zeros((3, 4), dtype=np.int64), "expected a 2-D float array"),
        (np.zeros(3, dtype=np.float32), "expected a 2-D float array"),
        (with_bad_rows(), "NaN or Inf in 2 of 10 rows, first row 3"),
        (np.ones((5, 4), dtype=np.float32), "all 5 rows are equal"),
        (rows(1), "at least 2 rows"),
        (rows(9), "9 rows, but .* has 10 items"),
    ],
)
def test_bad_embeddings(tmp_path, matrix, message):
    path, items = tmp_path / "D.npy", tmp_path / "D.item.json"
    items.write_text(json.dumps({str(i): {"title": "t"} for i in range(10)}))
    if isinstance(matrix, bytes):
        path.write_bytes(matrix)
    elif matrix is not None:
        np.save(path, matrix, allow_pickle=True)
    with pytest.raises(UserError, match=message) as error:
        load_embeddings(path, item_meta_path=items if matrix is not None and len(matrix) == 9 else None)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learner": "lion"}, "--learner is 'lion', expected one of adam"),
        ({"sk_epsilons": [0.0]}, "expected 2 values"),
        ({"dropout_prob": 1.0}, "--dropout_prob"),
        ({"epochs": 0}, "--epochs is 0, expected at least 1"),
        ({"num_emb_list": [256, 256]}, "n=96 rows .* fewer than K=256; lower --num_emb_list"),
        ({"batch_size": 4}, "n=96 rows with --batch_size 4"),
        ({"dead_code_threshold": -1.0}, "--dead_code_threshold is -1.0, expected 0 or more"),
        ({"compile": True}, "--compile True is for cuda, but the device is cpu"),
        ({"device": "cuda:99"}, "--device cuda:99 is not on this machine"),
        ({"device": "abacus"}, "--device abacus is not on this machine"),
        ({"lr": 1e30, "learner": "sgd", "epochs": 9}, "the loss is"),
    ],
)
def test_bad_training_options(embedding_file, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train(embedding_file, tmp_path / "ckpt", **{"epochs": 2, **options})


def test_bad_checkpoints(embedding_file, tmp_path):
    train(embedding_file, tmp_path / "ckpt", epochs=1)
    output = tmp_path / "D.index.json"
    np.save(tmp_path / "wide.npy", rows(96, 13))
    with pytest.raises(UserError, match="13 columns, but .* was trained on 12"):
        index(tmp_path / "ckpt", tmp_path / "wide.npy", output)
    config = json.loads((tmp_path / "ckpt" / "config.json").read_text())
    for change, message in (
        ({"architecture": "transformer"}, "architecture 'transformer', expected one of"),
        ({"model": {**config["model"], "e_dim": 5}}, "does not fit its config.json"),
        ({"model": None}, "does not fit its config.json"),
    ):
        (tmp_path / "ckpt" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message):
            index(tmp_path / "ckpt", embedding_file, output)
    with pytest.raises(UserError, match="no such file"):
        index(tmp_path / "nowhere", embedding_file, output)
    assert not output.exists()


def test_command_line_ends_in_one_line(tmp_path):
    arguments = ["--data_path", str(tmp_path / "none.npy"), "--ckpt_dir", str(tmp_path), "--sk_epsilons", "0", "0", "0"]
    done = subprocess.run([sys.executable, "-m", "rq.rqvae", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "none.npy" in done.stderr


LAUNCHERS = "rqvae generate_indices rqkmeans_faiss rqkmeans_constrained rqkmeans_plus text2emb/amazon_text2emb"


@pytest.mark.parametrize("name", LAUNCHERS.split())
def test_launchers_refuse_what_they_do_not_know(name):
    def launch(*arguments):
        return subprocess.run(["bash", f"rq/{name}.sh", *arguments], capture_output=True, text=True)

    assert "writes" in launch("--help").stdout
    for done in (launch("--lr"), launch()):
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_default_device_exists():
    assert pick_device("").type in ("cpu", "cuda")
