"""Text embeddings joined with a baseline's item embeddings.

Invariants: each part has rows of length 1 times its weight; items that train never shows get the ridge prediction from
their text; whitened components have variance 1; the file is the same, byte by byte, from the same inputs; what does not
fit is one line, and nothing is written.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rq_helpers import refusal
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from minionerec.baselines import counts
from minionerec.baselines.models import SASRec
from minionerec.catalog.sequences import COLUMNS
from minionerec.common.embeddings import load_embeddings
from minionerec.common.errors import UserError
from rq import fuse_embeddings
from rq.fuse_embeddings import Options, components, fuse, predict_unseen, unit_rows

N, TEXT, WIDTH = 40, 6, 8
UNSEEN = [3, 17, 39]  # in no row of train
DEEP = 5  # only at the beginning of a long history


def normal(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain_units(x: np.ndarray) -> np.ndarray:
    rows = [row - x.mean(axis=0) for row in x]
    return np.stack([row / np.sqrt((row**2).sum()) for row in rows])


def options(**values) -> Options:
    return Options(**values)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """40 items, of which 3 are in no row of train, their text embeddings, and an untrained SASRec."""
    sids = [f"<a_{item // 8}><b_{item % 8}>" for item in range(N)]
    (tmp_path / "info.txt").write_text("".join(f"{sid}\tItem {i}\t{i}\n" for i, sid in enumerate(sids)))
    shown = [item for item in range(N) if item not in (*UNSEEN, DEEP)]
    rows = [([DEEP, *shown[:20]], shown[20])] + [([shown[i - 1]], shown[i]) for i in range(21, len(shown))]
    with open(tmp_path / "train.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(COLUMNS)
        for past, target in rows:
            table.writerow(["u", past, target, [sids[item] for item in past], sids[target]])
    np.save(tmp_path / "D.emb-x-td.npy", normal(N, TEXT))
    torch.manual_seed(0)
    model = SASRec(n_items=N, max_history=5, hidden_size=WIDTH, dropout=0.0, num_layers=1, num_heads=2)
    model.save(tmp_path / "sasrec")
    paths = {"data_path": "D.emb-x-td.npy", "baseline_path": "sasrec", "train_file": "train.csv"}
    paths |= {"info_file": "info.txt", "output_file": "D.emb-fused-td.npy"}
    return {name: str(tmp_path / path) for name, path in paths.items()}


def table_of(files) -> np.ndarray:
    from minionerec.baselines.models import load_checkpoint

    return load_checkpoint(files["baseline_path"]).items.weight[:N].detach().numpy()


# ------------------------------------------------------------------------------------------------ parts


def test_rows_of_length_one_around_the_mean():
    x = normal(9, 4)
    np.testing.assert_allclose(unit_rows(x), plain_units(x), atol=1e-6)
    x = np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])  # the last row is the mean
    assert unit_rows(x).tolist() == [[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("weights", [(1.0, 0.5), (2.0, 0.0), (0.0, 3.0)])
@pytest.mark.parametrize("whiten, dim", [(False, 0), (False, 3), (True, 0), (True, 3)])
def test_parts_have_their_weights(weights, whiten, dim):
    text, behaviour = normal(N, TEXT), normal(N, WIDTH, seed=1)
    given = options(behaviour_weight=weights[0], text_weight=weights[1], whiten=whiten, pca_dim=dim)
    fused = fuse(text, behaviour, np.ones(N, dtype=bool), given)
    widths = [dim or WIDTH, dim or TEXT]
    widths = [width for width, weight in zip(widths, weights, strict=True) if weight]
    assert fused.dtype == np.float32 and fused.shape == (N, sum(widths))
    for part, weight in zip(np.split(fused, np.cumsum(widths)[:-1], axis=1), filter(None, weights), strict=True):
        np.testing.assert_allclose(np.linalg.norm(part, axis=1), weight, rtol=1e-5)


def test_fused_rows_are_the_two_parts_side_by_side():
    text, behaviour = normal(N, TEXT), normal(N, WIDTH, seed=1)
    fused = fuse(text, behaviour, np.ones(N, dtype=bool), options())
    expected = np.concatenate([plain_units(behaviour), 0.5 * plain_units(text)], axis=1)
    np.testing.assert_allclose(fused, expected, atol=1e-5)


@pytest.mark.parametrize("dim", [0, 3])
@pytest.mark.parametrize("whiten", [False, True])
def test_components_are_those_of_pca(whiten, dim):
    x = normal(N, 5) * np.array([5.0, 1.0, 3.0, 0.1, 2.0])
    found = components(x - x.mean(axis=0), dim, whiten)
    if not dim and not whiten:
        assert np.array_equal(found, x - x.mean(axis=0))
        return
    expected = PCA(dim or 5).fit_transform(x)
    if whiten:
        expected = expected / expected.std(axis=0)
        np.testing.assert_allclose(found.std(axis=0), 1.0, rtol=1e-5)
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found, expected * signs, atol=1e-4)


# ------------------------------------------------------------------------------------------------ unseen items


@pytest.mark.parametrize("ridge", [1.0, 0.01])
def test_unseen_items_get_the_ridge_prediction(ridge):
    text, behaviour = unit_rows(normal(N, TEXT)), normal(N, WIDTH, seed=1).astype(np.float64)
    seen = np.ones(N, dtype=bool)
    seen[UNSEEN] = False
    found = predict_unseen(behaviour, text, seen, ridge)
    mean = behaviour[seen].mean(axis=0)
    twin = Ridge(alpha=ridge * seen.sum() / TEXT, fit_intercept=False).fit(text[seen], behaviour[seen] - mean)
    np.testing.assert_allclose(found[UNSEEN], twin.predict(text[UNSEEN]) + mean, atol=1e-6)
    assert np.array_equal(found[seen], behaviour[seen])


def test_where_text_says_all_unseen_items_are_found():
    """Behaviour is a linear map of the text: a small penalty gives unseen items what they would have."""
    text = unit_rows(normal(N, TEXT).astype(np.float64))
    behaviour = text @ normal(TEXT, WIDTH, seed=2)
    seen = np.ones(N, dtype=bool)
    seen[UNSEEN] = False
    hidden = np.where(seen[:, None], behaviour, 99.0)
    np.testing.assert_allclose(predict_unseen(hidden, text, seen, 1e-9), behaviour, atol=0.1)
    one, other = (fuse(normal(N, TEXT), values, seen, options()) for values in (behaviour, hidden))
    assert np.array_equal(one, other)  # what the baseline has for an unseen item does not matter


def test_nothing_to_predict():
    behaviour = normal(N, WIDTH)
    for seen in (np.ones(N, dtype=bool), np.zeros(N, dtype=bool)):
        assert predict_unseen(behaviour, normal(N, TEXT), seen, 1.0) is behaviour


# ------------------------------------------------------------------------------------------------ the command


def test_the_file_and_the_same_bytes_twice(files, tmp_path, capsys):
    fuse_embeddings.main(options(**files))
    # The item that is only at the beginning of a long history is not unseen.
    assert "40 items x 14, 3 of them unseen in train" in capsys.readouterr().out
    seen = np.ones(N, dtype=bool)
    seen[UNSEEN] = False
    text = np.load(files["data_path"])
    expected = fuse(text, table_of(files), seen, options())
    found = load_embeddings(files["output_file"])
    assert np.array_equal(found, expected)
    again = files | {"output_file": str(tmp_path / "again.npy")}
    fuse_embeddings.main(options(**again))
    assert (tmp_path / "again.npy").read_bytes() == (tmp_path / "D.emb-fused-td.npy").read_bytes()
    fuse_embeddings.main(options(**files))
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("least, alone", [(1.0, False), (1.5, True)])
def test_few_interactions_leave_the_text_alone(files, capsys, least, alone):
    """Each item that train shows is there once."""
    fuse_embeddings.main(options(**files, min_interactions=least))
    found, text = np.load(files["output_file"]), plain_units(np.load(files["data_path"]))
    assert ("the median item has 1 interactions in train" in capsys.readouterr().out) == alone
    assert found.shape[1] == TEXT + (0 if alone else WIDTH)
    np.testing.assert_allclose(found[:, -TEXT:], 0.5 * text, atol=1e-5)


def test_few_interactions_need_the_text(files):
    with pytest.raises(UserError, match="nothing is left"):
        fuse_embeddings.main(options(**files, min_interactions=9.0, text_weight=0.0))


def test_a_baseline_over_item_features(files, tmp_path):
    """Its embeddings are projections of the features."""
    features = torch.from_numpy(normal(N, 5, seed=4))
    model = SASRec(
        n_items=N, max_history=5, hidden_size=WIDTH, dropout=0.0, num_layers=1, num_heads=2, features=features
    )
    model.save(tmp_path / "features")
    fuse_embeddings.main(options(**files | {"baseline_path": str(tmp_path / "features"), "text_weight": 0.0}))
    seen = np.ones(N, dtype=bool)
    seen[UNSEEN] = False
    table = model.items(features).detach().numpy()
    expected = fuse(np.load(files["data_path"]), table, seen, options(text_weight=0.0))
    np.testing.assert_allclose(np.load(files["output_file"]), expected, atol=1e-5)


def counted(folder):
    """A Markov chain, which has no embeddings."""
    import polars as pl

    counts.save(folder, "markov", pl.DataFrame({"history": [[0]], "target": [1]}), N)
    return folder


BAD = {
    "weights": ({"text_weight": "0", "behaviour_weight": "0"}, "--text_weight 0 --behaviour_weight 0: nothing is left"),
    "a negative weight": ({"text_weight": "-1"}, "--text_weight -1.0: expected at least 0"),
    "ridge": ({"ridge": "0"}, "--ridge 0.0: expected more than 0"),
    "no embeddings": ({"data_path": "nowhere.npy"}, "nowhere.npy: no such file"),
    "no baseline": ({"baseline_path": "nowhere"}, "nowhere: no such file or folder; check --baseline_path"),
    "a baseline that counts": ({}, "markov has no item embeddings"),
    "another catalog's baseline": ({}, "trained on a catalog of 41 items, and this one has 40"),
    "another catalog's text": ({}, "info.txt"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_line(files, tmp_path, case):
    changes, message = BAD[case]
    if case == "a baseline that counts":
        files["baseline_path"] = str(counted(tmp_path / "markov"))
    elif case == "another catalog's baseline":
        model = SASRec(n_items=N + 1, max_history=5, hidden_size=8, dropout=0.0, num_layers=1, num_heads=2)
        model.save(tmp_path / "sasrec")
    elif case == "another catalog's text":
        lines = (tmp_path / "info.txt").read_text() + "<a_9><b_0>\tItem 40\t40\n"
        (tmp_path / "info.txt").write_text(lines)
    given = [part for name, value in (files | changes).items() for part in (f"--{name}", value)]
    assert message in refusal(fuse_embeddings, *given)
    assert not (tmp_path / "D.emb-fused-td.npy").exists()


def test_a_record_tells_what_the_file_was_made_from(files, tmp_path):
    fuse_embeddings.main(options(**files))
    record = json.loads((tmp_path / "D.emb-fused-td.run.json").read_text())
    assert record["complete"] and set(record["inputs"]) == set(files) - {"output_file"}
    np.save(files["data_path"], normal(N, TEXT, seed=9))
    given = [part for name, value in files.items() for part in (f"--{name}", value)]
    assert "the content of data_path has changed" in refusal(fuse_embeddings, *given)


def test_a_result_that_is_not_finite_is_refused(files, monkeypatch):
    def singular(*_):
        raise np.linalg.LinAlgError

    for fused in (lambda *_: np.array([[np.inf]]), singular):
        monkeypatch.setattr(fuse_embeddings, "fuse", fused)
        with pytest.raises(UserError, match="--ridge 1.0: the fused embeddings are not finite"):
            fuse_embeddings.main(Options(**files))
        assert not Path(files["output_file"]).exists()
