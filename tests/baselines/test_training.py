"""Training of the baselines.

Invariants: whole sequences are trained, each target once; the epoch that is best on valid is kept; training starts at
popularity; the loss reaches what a model can learn; a killed training resumes to the weights of an unbroken one.
"""

import numpy as np
import pytest
import torch
from helpers import sequences

from minionerec.baselines import training
from minionerec.baselines.models import MODELS
from minionerec.baselines.options import BaselineOptions
from minionerec.baselines.training import Batches, build, fit, scorer
from minionerec.catalog.catalog import Catalog
from minionerec.common.errors import UserError
from minionerec.evaluation.protocols import by_scores

every_model = pytest.mark.parametrize("name", MODELS)


def catalog_of(n_items: int) -> Catalog:
    return Catalog([f"<a_{item}><b_0>" for item in range(n_items)])


def cycle(n: int):
    """A user who walks the cycle 0, 1, … n-1, 0 twice, as rows with at most three items of history."""
    walk = [i % n for i in range(2 * n)]
    rows = sequences(*((walk[max(0, i - 3) : i], walk[i]) for i in range(1, len(walk))))
    return rows.with_columns(user=rows["user"].str.replace(".*", "one"))


def options(**changes) -> BaselineOptions:
    values = {"hidden_size": 32, "dropout": 0.1, "device": "cpu", "epochs": 40, "batch_size": 4, "learning_rate": 1e-2}
    return BaselineOptions(**values | {"early_stop": 0, "max_history": 5, "weight_decay": 0.0, **changes})


def ranks_of(model, rows, n: int) -> np.ndarray:
    return by_scores(scorer(model), rows, catalog_of(n))["all"].item


@every_model
def test_before_training_a_model_with_popularity_bias_expects_popularity(name):
    counts = [5, 0, 9, 2, 100, 1, 30]
    model = build(options(model=name, max_history=10), len(counts))
    with torch.no_grad():
        model.items.weight.mul_(1e-4)
    model.start_from_popularity(counts)
    expected = torch.tensor(counts) + 1.0
    torch.testing.assert_close(model.scores([[1, 2]])[0].softmax(0), expected / expected.sum(), rtol=1e-3, atol=0)


def test_batches_have_every_target_once_with_the_items_before_it():
    rows = sequences(([3, 1], 4), ([3, 1, 4], 1), ([], 2), ([7], 8))
    rows = rows.with_columns(user=rows["user"].replace({"1": "0"}))
    batches = Batches(rows, max_history=5, n_items=9, batch_size=2)
    found = []
    torch.manual_seed(0)
    for items, targets in batches.epoch():
        for row, wanted in zip(items.tolist(), targets.tolist(), strict=True):
            found += [(tuple(i for i in row[: p + 1] if i < 9), t) for p, t in enumerate(wanted) if t < 9]
    assert sorted(found) == sorted([((3, 1), 4), ((3, 1, 4), 1), ((), 2), ((7,), 8)])


@every_model
@pytest.mark.parametrize("loss", ["ce", "sampled_softmax", "bce"])
def test_a_model_learns_a_cycle(name, loss):
    n, rows = 20, cycle(20)
    negatives = {"negatives": 4 if loss == "bce" else 64} if loss != "ce" else {}
    max_history = {"max_history": 8} if name == "caser" else {}  # its windows need the height of the largest filter
    trained = fit(
        options(model=name, loss=loss, epochs=40, **negatives, **max_history),
        rows,
        rows,
        catalog_of(n),
    )
    ranks = ranks_of(trained.model, rows, n)
    # Negatives of bce are never of the row, so nothing pushes its items below the target.
    assert (ranks < (6 if loss == "bce" else 1)).mean() >= (0.7 if loss == "bce" else 0.9)
    assert trained.ndcg == pytest.approx(float((1 / np.log2(ranks[ranks < 10] + 2)).sum() / len(ranks)))


@every_model
def test_options_reach_the_model(name):
    values = {"max_history": 7, "hidden_size": 12, "dropout": 0.4, "tie_embeddings": False}
    own = {"sasrec": {"num_layers": 3, "num_heads": 3}, "gru4rec": {"num_layers": 3}}
    own["caser"] = {"num_filters": 5, "filter_sizes": [2, 7], "num_vertical": 3}
    texts = values | own[name] | ({"filter_sizes": "2,7"} if name == "caser" else {})
    model = build(BaselineOptions(model=name, **texts), 9)
    assert model.config == values | own[name] | {"n_items": 9, "feature_dim": 0} and model.outputs is not None


@pytest.mark.parametrize("bias", [True, False])
def test_popularity_bias_is_where_training_starts(bias):
    rows = sequences(*[([0], 3)] * 30, *[([0], 1)] * 10, ([0], 2))
    model = fit(options(epochs=1, learning_rate=1e-12, popularity_bias=bias), rows, rows, catalog_of(4)).model
    shares = torch.tensor([1.0, 11.0, 2.0, 31.0]) / 45  # one added to each count
    expected = shares.log() - shares.log().mean() if bias else torch.zeros(4)
    torch.testing.assert_close(model.bias - model.bias.mean(), expected)


def test_what_is_kept_is_the_best_epoch_on_valid(capsys):
    """Valid runs the other way round: the longer it trains, the worse; an early epoch is kept, and training stops."""
    n, rows = 12, cycle(12)
    against = sequences(*(([i], (i - 1) % n) for i in range(n)))
    trained = fit(options(epochs=60, early_stop=3), rows, against, catalog_of(n))
    assert trained.epoch < 40
    assert capsys.readouterr().out.count("valid NDCG@10") == trained.epoch + 3
    ranks = ranks_of(trained.model, against, n)
    assert trained.ndcg == pytest.approx(float((1 / np.log2(ranks[ranks < 10] + 2)).sum() / len(ranks)))


def test_epochs_are_scored_in_the_headline_protocol():
    """Every target is in its history: without seen items nothing can be hit."""
    rows = sequences(([1, 0], 1), ([2, 1], 2))
    assert fit(options(epochs=2), rows, rows, catalog_of(3), protocol="all").ndcg > 0
    assert fit(options(epochs=2), rows, rows, catalog_of(3), protocol="unseen").ndcg == 0


def test_the_time_budget_ends_training(monkeypatch, capsys):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    fit(options(epochs=50, time_budget=35), cycle(5), cycle(5), catalog_of(5))
    out = capsys.readouterr().out
    assert out.count("valid NDCG@10") == 3 and "--time_budget 35: stopped after 3 epochs" in out


@every_model
def test_a_killed_training_resumes_to_the_same_weights(tmp_path, name, monkeypatch):
    rows, asked = cycle(8), options(model=name, epochs=6, max_history=8)
    whole = fit(asked, rows, rows, catalog_of(8), state_file=tmp_path / "whole.pt").model
    original = training.State.add

    def killed(self, epoch, *rest):
        original(self, epoch, *rest)
        if epoch == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.State, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(asked, rows, rows, catalog_of(8), state_file=tmp_path / "killed.pt")
    monkeypatch.undo()
    resumed = fit(asked, rows, rows, catalog_of(8), state_file=tmp_path / "killed.pt").model
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_a_loss_that_diverges_and_a_catalog_without_negatives_are_refused():
    with pytest.raises(UserError, match="lower --learning_rate"):
        fit(options(learning_rate=1e30, epochs=5), cycle(5), cycle(5), catalog_of(5))
    with pytest.raises(UserError, match="10 items may all be in one row"):
        fit(options(loss="bce"), cycle(10), cycle(10), catalog_of(10))
