"""Popularity and the Markov chain beside counts by hand.

Invariants: scores are log-probabilities; popularity is the same after every history; the chain ranks what followed the
last item, then by popularity; both are on disk what they were when counted.
"""

from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch
from helpers import INDUSTRIAL

from data import read_sequences
from minionerec.baselines import counts
from minionerec.baselines.models import load_checkpoint
from minionerec.baselines.training import scorer
from minionerec.catalog.catalog import Catalog
from minionerec.catalog.items import read_info
from minionerec.evaluation.protocols import by_scores


def sequences(*rows: tuple[list[int], int]) -> pl.DataFrame:
    history, target = zip(*rows, strict=True)
    return pl.DataFrame(
        {"history": history, "target": target}, schema={"history": pl.List(pl.Int64), "target": pl.Int64}
    )


@pytest.fixture
def counted(tmp_path):
    """counted(name, rows, items): the model as it is read from disk."""

    def make(name: str, rows: pl.DataFrame, n_items: int):
        counts.save(tmp_path / name, name, rows, n_items)
        return load_checkpoint(tmp_path / name, n_items=n_items)

    return make


#          target: 1 three times, 2 twice, 3 once, 0 and 4 never; item 4 is in a history only
TRAIN = sequences(([0], 1), ([0], 1), ([4, 0], 2), ([2], 3), ([3, 1], 2), ([3], 1))


def ranking(model, history: list[int]) -> list[int]:
    """Items, best first; of equal scores the lower id."""
    return np.argsort(-model.scores([history])[0].numpy(), kind="stable").tolist()


def test_popularity_by_hand(counted):
    model = counted("popularity", TRAIN, 5)
    expected = torch.tensor([[1, 4, 3, 2, 1]] * 2).double() / 11  # one added to each count
    torch.testing.assert_close(model.scores([[0], [3, 2]]).exp(), expected)
    assert ranking(model, []) == [1, 2, 3, 0, 4]


def test_markov_by_hand(counted):
    """p(j | i) = (c_ij + p(j)) / (c_i + 1): from 0 to 1 twice, to 2 once; from 2 to 3 once; from 4 nothing."""
    model = counted("markov", TRAIN, 5)
    p = np.array([1, 4, 3, 2, 1]) / 11
    expected = [(p + [0, 2, 1, 0, 0]) / 4, (p + [0, 0, 0, 1, 0]) / 2, p, p, (p + [0, 1, 0, 0, 0]) / 2]
    found = model.scores([[3, 0], [2], [4], [], [0, 2, 3]]).exp()
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-12)


@pytest.mark.parametrize(
    "history, expected",
    [([0], [1, 2, 3, 0, 4]), ([3, 2], [3, 1, 2, 0, 4]), ([4], [1, 2, 3, 0, 4]), ([], [1, 2, 3, 0, 4])],
)
def test_markov_ranks_by_transitions_from_the_last_item_then_by_popularity(counted, history, expected):
    assert ranking(counted("markov", TRAIN, 5), history) == expected


def test_one_transition_outweighs_any_popularity(counted):
    assert ranking(counted("markov", sequences(*[([0], 1)] * 50, ([2], 3)), 4), [2])[0] == 3


def test_rows_without_a_history_are_no_transition(counted):
    model = counted("markov", sequences(([], 1), ([], 1), ([2], 3)), 4)
    assert model.times.tolist() == [1.0] and model.pairs.tolist() == [[2], [3]]
    assert ranking(model, []) == [1, 3, 0, 2]
    alone = counted("markov", sequences(([], 1)), 4)
    assert ranking(alone, [1]) == [1, 0, 2, 3]


@pytest.mark.parametrize("name", counts.MODELS)
def test_scores_are_distributions_whatever_the_batch(counted, name):
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 20, rng.integers(0, 5)).tolist(), int(rng.integers(20))) for _ in range(200)]
    model = counted(name, sequences(*rows), 20)
    histories = [history for history, _ in rows]
    together = model.scores(histories)
    torch.testing.assert_close(together.exp().sum(1), torch.ones(200, dtype=torch.float64))
    assert torch.equal(together, torch.cat([model.scores([history]) for history in histories]))
    assert model.scores([]).shape == (0, 20)


@pytest.mark.parametrize("name", counts.MODELS)
def test_everything_is_on_the_models_device(counted, name):
    """Here the CPU, while another device is the default one."""
    model = counted(name, TRAIN, 5)
    expected = model.scores([[0], [2], []])
    with torch.device("meta"):
        assert torch.equal(model.scores([[0], [2], []]), expected)


@pytest.mark.skipif(not INDUSTRIAL.exists(), reason="the Industrial data set is absent")
def test_reference_numbers_on_industrial(counted):
    """Measured by another program. Of equal transition counts it takes the first seen in train, ours the most popular,
    which is stronger: .1052; a slow twin below has both."""
    name = "Industrial_and_Scientific_5_2016-10-2018-11"
    sids = read_info(INDUSTRIAL / "info" / f"{name}.txt").sids
    train, test = (read_sequences(INDUSTRIAL / s / f"{name}.csv", sids, s) for s in ("train", "test"))
    catalog, targets = Catalog(sids), test["target"].to_list()

    def hr_at_10(name: str) -> float:
        score = scorer(counted(name, train, len(sids)))
        return float((by_scores(score, test, catalog, names=["all"])["all"].item < 10).mean())

    times = Counter(train["target"].to_list())
    most_popular = sorted(range(len(sids)), key=lambda item: -times[item])[:40]
    following = {}
    for history, target in train.select("history", "target").iter_rows():
        following.setdefault(history[-1], Counter())[target] += 1

    def slow_hr_at_10(order) -> float:
        hits = 0
        for history, target in zip(test["history"].to_list(), targets, strict=True):
            known = order(following.get(history[-1], Counter()))
            hits += target in (known + [item for item in most_popular if item not in known])[:10]
        return hits / len(targets)

    def by_popularity(counter: Counter) -> list[int]:
        return sorted(counter, key=lambda item: (-counter[item], -times[item], item))

    assert hr_at_10("popularity") == pytest.approx(0.0609, abs=0.002)
    assert slow_hr_at_10(lambda counter: [item for item, _ in counter.most_common()]) == pytest.approx(0.1026, abs=1e-4)
    assert hr_at_10("markov") == pytest.approx(slow_hr_at_10(by_popularity), abs=1e-9)
    assert hr_at_10("markov") == pytest.approx(0.1052, abs=1e-4)
