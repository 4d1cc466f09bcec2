"""Training of the sequential baselines on whole sequences.

Invariants: an epoch trains every target once, after its history; each model learns a cycle by each loss, from item ids and
from item vectors; the best epoch on valid is kept, in the headline protocol; patience and time end a training; a killed
training that resumes ends as an unbroken one, and the seed decides the result.
"""

from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch

from minionerec.baselines import training
from minionerec.baselines.models import MODELS
from minionerec.baselines.options import BaselineOptions
from minionerec.baselines.training import Batches, build, fit, scorer
from minionerec.catalog.catalog import Catalog
from minionerec.common.errors import UserError
from minionerec.evaluation.metrics import table
from minionerec.evaluation.protocols import by_scores

every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on shared cores make tiny models take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sequences(*rows: tuple[list[int], int], users: list | None = None) -> pl.DataFrame:
    """Samples of one user each, unless `users` says whose they are; all items of a history are seen."""
    history, target = zip(*rows, strict=True)
    columns = {"user": [str(user) for user in users or range(len(rows))], "history": history, "target": target}
    kinds = {"history": pl.List(pl.Int64)}
    return pl.DataFrame(columns, schema_overrides=kinds).with_columns(seen=pl.col("history"))


def catalog_of(n_items: int) -> Catalog:
    return Catalog([f"<a_{item}><b_0>" for item in range(n_items)])


def options(**changes) -> BaselineOptions:
    defaults = {"max_history": 5, "hidden_size": 32, "dropout": 0.1, "batch_size": 16, "learning_rate": 1e-2}
    return BaselineOptions(**defaults | {"early_stop": 0, "device": "cpu"} | changes)


def cycle(n: int) -> pl.DataFrame:
    """Each user goes round 0, 1, … n - 1, 0 from another item on: four samples a user."""
    rows, users = [], []
    for first in range(n):
        line = [(first + step) % n for step in range(5)]
        rows += [(line[:i], line[i]) for i in range(1, 5)]
        users += [first] * 4
    return sequences(*rows, users=users)


# ------------------------------------------------------------------------------------------------ batches


def lines_of(batches: Batches) -> list[tuple[tuple, int]]:
    """(items before, target) of every target of an epoch."""
    found = []
    for items, targets in batches.epoch():
        assert items.shape == targets.shape and len(items) >= 1
        for row, wanted in zip(items.tolist(), targets.tolist(), strict=True):
            real = [item for item in row if item != batches.n_items]
            assert row == real + [batches.n_items] * (len(row) - len(real))  # padding is on the right
            for place, target in enumerate(wanted):
                if target != batches.n_items:
                    found.append((tuple(row[: place + 1]) if real else (), target))
    return found


def user_rows(line: list[int], max_history: int, first: int) -> list[tuple[list[int], int]]:
    return [(line[max(0, i - max_history) : i], line[i]) for i in range(first, len(line))]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_an_epoch_has_every_target_once_after_its_history(batch_size, first):
    """Sequences within the window: as the rows have them. Users begin without a history or with one item."""
    rng, rows, users = np.random.default_rng(0), [], []
    for user in range(9):
        own = user_rows(rng.integers(0, 7, rng.integers(1 + first, 7)).tolist(), 5, first)
        rows, users = rows + own, users + [user] * len(own)
    batches = Batches(sequences(*rows, users=users), 5, 7, batch_size)
    assert Counter(lines_of(batches)) == Counter((tuple(history), target) for history, target in rows)
    assert len(list(batches.epoch())) == len(batches) == -(-9 // batch_size)


@pytest.mark.parametrize("first", [0, 1])
def test_long_sequences_are_cut_into_windows(first):
    """Each target once, after at least half a window, and never after more than max_history items."""
    line = list(range(40))
    batches = Batches(sequences(*user_rows(line, 5, first), users=[0] * (40 - first)), 5, 40, 3)
    found = lines_of(batches)
    assert sorted(target for _, target in found) == line[first:]
    for before, target in found:
        assert list(before) == list(range(target - len(before), target))
        assert min(target, 3) <= len(before) <= 5


@every_model
def test_a_full_window_and_an_empty_history_in_one_batch(name):
    """The item without a history takes no place of the other sequence's positions."""
    rows = sequences(*user_rows([0, 1, 2, 3, 4, 5], 5, 1), ([], 6), users=[0] * 5 + [1])
    batches = Batches(rows, 5, 7, 8)
    [(items, targets)] = batches.epoch()
    assert items.shape[1] == 5
    model = build(options(model=name), 7).eval()
    scores = model.scores([*rows["history"].to_list()]).log_softmax(1)
    expected = -scores[range(6), rows["target"].to_list()].mean()
    torch.testing.assert_close(model.loss(items, targets), expected)


def test_batches_are_shuffled_and_of_about_equal_length():
    rows, users = [], []
    for user in range(200):
        own = user_rows([user % 7] * (2 + user % 40), 50, 1)
        rows, users = rows + own, users + [user] * len(own)
    batches = Batches(sequences(*rows, users=users), 50, 7, 10)
    torch.manual_seed(1)
    epochs = [[tuple(items.shape) for items, _ in batches.epoch()] for _ in range(2)]
    assert epochs[0] != epochs[1] and len(epochs[0]) == 20
    widths = [width for _, width in epochs[0]]
    assert widths != sorted(widths, reverse=True)
    real = batches.windows.end - batches.windows.begin - 1
    assert sum(real) > 0.8 * sum(10 * width for width in widths)
    torch.manual_seed(1)
    assert [tuple(items.shape) for items, _ in batches.epoch()] == epochs[0]


# ------------------------------------------------------------------------------------------------ learning


@every_model
@pytest.mark.parametrize("loss", ["ce", "sampled_softmax", "bce"])
def test_a_model_learns_a_cycle(name, loss):
    n, rows = 20, cycle(20)
    negatives = {} if loss == "ce" else {"negatives": 16}
    trained = fit(options(model=name, loss=loss, epochs=60, **negatives), rows, rows, catalog_of(n))
    ranks = by_scores(scorer(trained.model), rows, catalog_of(n))["all"].item
    # Negatives of bce are never of the row, so nothing keeps its other items, up to four, below the target.
    assert (ranks < (5 if loss == "bce" else 1)).mean() >= 0.95
    assert trained.ndcg == pytest.approx(table(ranks)["NDCG@10"])


@every_model
def test_a_model_learns_a_cycle_from_item_vectors(name):
    n, rows = 20, cycle(20)
    features = torch.randn(n, 24, generator=torch.Generator().manual_seed(0))
    trained = fit(options(model=name, epochs=40, learning_rate=3e-3), rows, rows, catalog_of(n), features=features)
    ranks = by_scores(scorer(trained.model), rows, catalog_of(n))["all"].item
    assert (ranks == 0).mean() >= 0.95 and torch.equal(trained.model.features, features)


@every_model
@pytest.mark.parametrize("loss", ["ce", "sampled_softmax"])
def test_a_softmax_trains_a_distribution(name, loss):
    """From 0 to 1 in three of four rows and to 2 in one: so says the softmax of the scores, exactly by ce; sampled items keep the order."""
    rows = sequences(*[([0], 1)] * 48, *[([0], 2)] * 16)
    model = build(options(model=name, dropout=0.0), 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        for items, targets in Batches(rows, 5, 5, 64).epoch():
            optimizer.zero_grad()
            model.loss(items, targets, kind=loss, negatives=3).backward()
            optimizer.step()
    probs = model.scores([[0]])[0].softmax(0)
    if loss == "ce":
        assert probs[1].item() == pytest.approx(0.75, abs=0.03) and probs[2].item() == pytest.approx(0.25, abs=0.03)
    assert probs[1] > 1.3 * probs[2] > 10 * probs[[0, 3, 4]].max()


def test_the_loss_by_default(capsys):
    rows = cycle(20)
    fit(options(epochs=1), rows, rows, catalog_of(20))
    assert "loss ce" in capsys.readouterr().out
    fit(options(epochs=1, negatives=7), rows, rows, catalog_of(training.SAMPLED_FROM))
    assert "loss sampled_softmax" in capsys.readouterr().out
    with pytest.raises(UserError, match="--loss bce: 10 items may all be in one row"):
        fit(options(epochs=1, loss="bce"), cycle(10), cycle(10), catalog_of(10))


@pytest.mark.parametrize("bias", [True, False])
def test_popularity_bias_is_where_training_starts(bias):
    rows = sequences(*[([0], 3)] * 30, *[([0], 1)] * 10, ([0], 2))
    given = options(epochs=1, learning_rate=1e-12, popularity_bias=bias)
    model = fit(given, rows, rows, catalog_of(4)).model
    shares = torch.tensor([1.0, 11.0, 2.0, 31.0]) / 45  # one added to each count
    expected = shares.log() - shares.log().mean() if bias else torch.zeros(4)
    torch.testing.assert_close(model.bias - model.bias.mean(), expected)


@every_model
def test_options_reach_the_model(name):
    common = {"max_history": 7, "hidden_size": 12, "dropout": 0.4, "tie_embeddings": False}
    own = {"sasrec": {"num_layers": 3, "num_heads": 3}, "gru4rec": {"num_layers": 3}}
    own["caser"] = {"num_filters": 5, "filter_sizes": [2, 7], "num_vertical": 3}
    values = common | own[name]
    texts = values | ({"filter_sizes": "2,7"} if name == "caser" else {})
    model = build(BaselineOptions(model=name, **texts), 9)
    assert model.config == values | {"n_items": 9, "feature_dim": 0} and model.outputs is not None


def test_weights_decay_but_not_biases():
    """A decay so strong that nothing else matters: matrices shrink to zero, biases stay near popularity."""
    rows = sequences(*[([0], 3)] * 30, ([0], 1))
    given = options(epochs=1, weight_decay=90.0, batch_size=1, dropout=0.0)
    model = fit(given, rows, rows, catalog_of(4)).model
    assert all(p.abs().max() < 0.05 for p in model.parameters() if p.dim() > 1)
    assert model.bias.abs().max() > 0.5


def test_a_step_is_adamws_with_a_clipped_gradient(monkeypatch):
    """Gradients (3000, 4000), clipped to the norm 5, then (1, 1); betas 0.9 and 0.98."""
    gradients = iter([[3000.0, 4000.0], [1.0, 1.0]])
    monkeypatch.setattr(MODELS["sasrec"], "loss", lambda self, *_, **__: self.bias[:2] @ torch.tensor(next(gradients)))
    rows = sequences(([0], 1), ([1], 0))
    given = options(epochs=1, batch_size=1, learning_rate=0.1, popularity_bias=False)
    model = fit(given, rows, rows, catalog_of(3)).model
    # The first step is 1; the second m / (1 - 0.9²) / √(v / (1 - 0.98²)), with m = 0.9 · 0.1 · 3 + 0.1 · 1, and so on.
    second = [0.37 / 0.19 / (0.1964 / 0.0396) ** 0.5, 0.46 / 0.19 / (0.3336 / 0.0396) ** 0.5]
    expected = torch.tensor([-0.1 * (1 + second[0]), -0.1 * (1 + second[1]), 0.0])
    torch.testing.assert_close(model.bias.detach(), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ epochs


def against(n: int) -> pl.DataFrame:
    """Valid rows that go round the other way: the longer a model trains, the worse it does."""
    return sequences(*(([i], (i - 1) % n) for i in range(n)))


def test_what_is_kept_is_the_best_epoch_on_valid(capsys):
    trained = fit(options(epochs=30, early_stop=3, batch_size=2), cycle(12), against(12), catalog_of(12))
    ranks = by_scores(scorer(trained.model), against(12), catalog_of(12))["all"].item
    assert trained.epoch < 15
    assert capsys.readouterr().out.count("valid NDCG@10") == trained.epoch + 3  # the patience
    assert trained.ndcg == pytest.approx(table(ranks)["NDCG@10"])


@pytest.mark.parametrize("protocol", ["all", "unseen"])
def test_epochs_are_scored_in_the_headline_protocol(protocol):
    """Rows whose seen items are all that popularity ranks first."""
    rows = sequences(*[([0], 1)] * 30, *[([1], 2)] * 20, ([2], 3))
    valid = sequences(([1, 2], 3), ([2, 1], 0))
    trained = fit(options(epochs=1, learning_rate=1e-12), rows, valid, catalog_of(5), protocol=protocol)
    # Of all items the order is 1, 2, 3, 0, 4; of unseen ones 3, 0, 4.
    expected = {"all": [2, 3], "unseen": [0, 1]}[protocol]
    assert trained.ndcg == pytest.approx(table(np.array(expected))["NDCG@10"])


def test_valid_rows_are_drawn(monkeypatch):
    asked, plain = [], by_scores
    monkeypatch.setattr(
        training, "by_scores", lambda score, rows, *a, **k: asked.append(rows) or plain(score, rows, *a, **k)
    )
    rows = cycle(20)
    for eval_rows in (7, -1, 1000):
        fit(options(epochs=2, eval_rows=eval_rows), rows, rows, catalog_of(20))
    assert [len(each) for each in asked] == [7, 7, 80, 80, 80, 80]
    assert asked[0].equals(asked[1]) and not asked[0].equals(rows.head(7))


@pytest.mark.parametrize("budget, epochs", [(0.0, 6), (1000.0, 6), (3.5, 3), (0.5, 1)])
def test_the_time_budget(monkeypatch, capsys, budget, epochs):
    """Epochs of one second: another one is begun only if it ends within the budget, the first one always."""
    clock = iter(np.arange(0.0, 100.0))
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    rows = cycle(20)
    fit(options(epochs=6, time_budget=budget), rows, rows, catalog_of(20))
    shown = capsys.readouterr().out
    assert shown.count("valid NDCG@10") == epochs
    assert (f"--time_budget {budget:.0f}: stopped after {epochs} epochs" in shown) == (epochs < 6)


def test_a_loss_that_diverges_is_refused():
    with pytest.raises(UserError, match=r"epoch [12]: the loss is .*lower --learning_rate"):
        fit(options(epochs=5, learning_rate=1e30, weight_decay=0.0), cycle(20), cycle(20), catalog_of(20))


# ------------------------------------------------------------------------------------------------ kill and resume


class Killed(Exception):
    pass


@every_model
@pytest.mark.parametrize("loss", ["ce", "sampled_softmax"])
def test_a_killed_training_ends_as_an_unbroken_one(tmp_path, monkeypatch, name, loss):
    """Killed inside the third epoch, after its first steps."""
    rows, plain, calls = cycle(20), MODELS[name].loss, []
    given = options(model=name, loss=loss, epochs=5, dropout=0.3, **({"negatives": 5} if loss != "ce" else {}))

    def train(file: str):
        return fit(given, rows, rows, catalog_of(20), state_file=tmp_path / file)

    def dying(model, *arguments, **named):
        calls.append(1)
        if len(calls) > 5:
            raise Killed
        return plain(model, *arguments, **named)

    unbroken = train("one.pt")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(MODELS[name], "loss", dying)
        train("two.pt")
    resumed = train("two.pt")
    assert resumed.epoch == unbroken.epoch and resumed.ndcg == unbroken.ndcg
    for key, value in unbroken.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_a_training_that_had_ended_gives_its_result_again(tmp_path, capsys):
    given, rows = options(epochs=3, early_stop=2), cycle(20)
    first = fit(given, rows, rows, catalog_of(20), state_file=tmp_path / "state.pt")
    shown = capsys.readouterr().out.count("valid NDCG@10")
    again = fit(given, rows, rows, catalog_of(20), state_file=tmp_path / "state.pt")
    assert shown == 3 and "resumed after epoch 3" in (text := capsys.readouterr().out) and "valid NDCG@10" not in text
    assert again.epoch == first.epoch
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


@every_model
def test_the_seed_decides(name):
    rows = cycle(20)
    models = [fit(options(model=name, epochs=2, seed=seed), rows, rows, catalog_of(20)).model for seed in (1, 1, 2)]
    scores = [model.scores([[1, 2]]) for model in models]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])
