"""Weights of a blend, chosen on valid rows.

Invariants: weights are the best ones on valid, of equal ones the smallest; weights by user are those of all users where
the groups do not differ, and better ones where they do; a group of few rows follows all rows; what metrics.json holds
reads back as the same weights, and anything else is refused.
"""

import itertools
import json

import numpy as np
import pytest

from minionerec.catalog.catalog import Catalog
from minionerec.common.errors import UserError
from minionerec.evaluation import blend_weights
from minionerec.evaluation.blend import Candidates, ranked, ranks
from minionerec.evaluation.blend_weights import Choice, UserWeights, choose_user_weights, choose_weights
from minionerec.evaluation.metrics import table

N_ITEMS = 30


def log_softmax(values: np.ndarray) -> np.ndarray:
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


def candidates(*parts: np.ndarray, confidence: np.ndarray | None = None) -> Candidates:
    """Candidates of the whole catalog. parts: (users, items) of each model; confidence: (users, baselines)."""
    users, n = parts[0].shape
    if confidence is None:
        confidence = np.exp([part.max(axis=1) for part in parts[1:]]).T
    return Candidates(np.tile(np.arange(n), (users, 1)), np.stack(parts, axis=-1), confidence)


def ndcg(found: Candidates, weights, targets) -> float:
    return table(ranks(found, weights, targets))["NDCG@10"]


# ------------------------------------------------------------------------------------------------ one for all


def test_weights_are_the_best_ones_on_valid():
    rng = np.random.default_rng(0)
    targets = rng.integers(N_ITEMS, size=400)
    signal = [rng.normal(size=(400, N_ITEMS)) for _ in range(3)]
    for part, strength in zip(signal, (1.0, 2.0, 0.3), strict=True):
        part[np.arange(400), targets] += strength
    found = candidates(*signal)
    chosen = choose_weights(found, targets)
    values = {weights: ndcg(found, weights, targets) for weights in itertools.product(blend_weights.WEIGHTS, repeat=2)}
    assert values[chosen] == max(values.values()) and chosen[0] > chosen[1]
    assert choose_weights(found, targets, "HR@1") == max(
        values, key=lambda weights: table(ranks(found, weights, targets))["HR@1"]
    )


def test_of_equal_weights_the_smallest_are_taken():
    """A baseline that says nothing gets no weight; a perfect one needs only some."""
    rng = np.random.default_rng(0)
    targets, generative = rng.integers(20, size=50), rng.normal(size=(50, 20))
    assert choose_weights(candidates(generative, np.zeros((50, 20))), targets) == (0.0,)
    perfect = np.full((50, 20), -100.0)
    perfect[np.arange(50), targets] = 0.0
    assert choose_weights(candidates(generative, perfect), targets) == (0.25,)


# ------------------------------------------------------------------------------------------------ one a user


def planted(seed: int, users: int, helps_the_sure: bool) -> tuple[Candidates, np.ndarray]:
    """A baseline that is sure of half of the users. It ranks well for them, and at random for the others, or not.

    The generative model ranks equally well for all. A second baseline says nothing and is equally sure of all.
    """
    rng = np.random.default_rng(seed)
    targets, rows = rng.integers(N_ITEMS, size=users), np.arange(users)
    generative, baseline = rng.normal(size=(users, N_ITEMS)), rng.normal(size=(users, N_ITEMS))
    generative[rows, targets] += 1.0
    sure = rng.random(users) < 0.5
    if helps_the_sure:
        baseline[rows[sure], targets[sure]] += 3.0
        baseline[rows[~sure]] = 2.0 * rng.normal(size=((~sure).sum(), N_ITEMS))
    else:
        baseline[rows, targets] += 1.0
    confidence = np.stack([np.full(users, 0.1), np.where(sure, 0.7, 0.2) + 0.1 * rng.random(users)], axis=1)
    parts = [log_softmax(part) for part in (generative, np.zeros_like(baseline), baseline)]
    return candidates(*parts, confidence=confidence), targets


def test_weights_by_user_win_where_users_differ():
    """On other users than those on which they were chosen."""
    found, targets = planted(0, 1000, helps_the_sure=True)
    chosen = choose_user_weights(found, targets, seed=0)
    by_user = chosen.user_weights
    assert chosen.weights == choose_weights(found, targets) and by_user.baseline == 1
    unsure, sure = by_user.of(Candidates(None, None, np.array([[0.5, 0.21], [0.5, 0.79]])))[:, 1]
    assert sure >= 1.5 and unsure == 0.0
    assert chosen.selection["gain"][0] > 2 * chosen.selection["gain"][1] > 0
    assert sum(chosen.selection["rows"]) == 1000 and len(chosen.selection["rows"]) == len(by_user.weights) == 5
    others, wanted = planted(1, 1000, helps_the_sure=True)
    assert ndcg(others, by_user.of(others), wanted) > ndcg(others, chosen.weights, wanted) + 0.02


def test_the_choice_by_brute_force():
    """The weights of each bin have the largest shrunk mean, computed row by row."""
    found, targets = planted(2, 300, helps_the_sure=True)
    chosen = choose_user_weights(found, targets, seed=3)
    by_user, shrinkage = chosen.user_weights, chosen.selection["shrinkage"]
    confidence = found.confidence[:, by_user.baseline]
    np.testing.assert_allclose(by_user.cuts, np.quantile(confidence, [0.2, 0.4, 0.6, 0.8], method="lower"))
    edges = [-1.0, *by_user.cuts, 2.0]
    options = list(itertools.product(blend_weights.WEIGHTS, repeat=2))
    overall = {weights: ndcg(found, weights, targets) for weights in options}
    for low, high, weights in zip(edges[:-1], edges[1:], by_user.weights, strict=True):
        own = np.flatnonzero((confidence > low) & (confidence <= high))
        part = Candidates(*(values[own] for values in found))
        shrunk = {
            each: (len(own) * ndcg(part, each, targets[own]) + shrinkage * overall[each]) / (len(own) + shrinkage)
            for each in options
        }
        assert shrunk[weights] == pytest.approx(max(shrunk.values()), abs=1e-12)
    assert choose_user_weights(found, targets, seed=3).selection == chosen.selection
    assert choose_user_weights(found, targets, seed=4).selection["gain"] != chosen.selection["gain"]  # other folds


@pytest.mark.parametrize("seed", range(3))
def test_held_out_gains_by_brute_force(seed):
    """Each row's weights come from the rows of the other folds only, in plain loops; many confidences are equal."""
    rng, shrinkage = np.random.default_rng(seed), 5
    values, confidence, fold = rng.random((6, 60)), rng.integers(12, size=60) / 12, rng.permutation(60) % 5
    gains = blend_weights._held_out_gains(values, confidence, shrinkage, fold)
    for row in range(60):
        known = [other for other in range(60) if fold[other] != fold[row]]
        in_order = sorted(confidence[known])
        cuts = {in_order[place] for place in (9, 18, 28, 37)} - {in_order[-1]}  # 20, 40, 60, 80 % of 0 to 47
        number = [sum(value > cut for cut in cuts) for value in confidence]  # of each row's bin
        own = [other for other in known if number[other] == number[row]]
        overall = values[:, known].mean(axis=1)
        shrunk = [
            (sum(v[own]) + shrinkage * mean) / (len(own) + shrinkage) for v, mean in zip(values, overall, strict=True)
        ]
        assert gains[row] == pytest.approx(values[np.argmax(shrunk), row] - values[np.argmax(overall), row])


def test_a_user_at_a_cut_belongs_below_it():
    """Half of the users are at the only cut: the baseline ranks their target last, and that of the others first."""
    targets, unsure = np.full(400, N_ITEMS - 1), np.arange(400) % 2 == 0
    generative, baseline = np.zeros((400, N_ITEMS)), np.zeros((400, N_ITEMS))
    generative[unsure, -1] = 1.0
    baseline[:, -1] = np.where(unsure, -10.0, 10.0)
    found = candidates(generative, baseline, confidence=np.where(unsure, 0.1, 0.9)[:, None])
    chosen = choose_user_weights(found, targets, seed=0)
    assert chosen.user_weights == UserWeights(((0.0,), (0.25,)), (0.1,)) and chosen.selection["rows"] == [200, 200]
    assert np.array_equal(chosen.user_weights.of(found)[:, 0], np.where(unsure, 0.0, 0.25))


@pytest.mark.parametrize("case", ["no difference", "one confidence", "few rows", "one row"])
def test_where_users_do_not_differ_the_ranking_is_that_of_auto(case):
    users = {"few rows": 20, "one row": 1}.get(case, 400)
    found, targets = planted(3, users, helps_the_sure=case == "one confidence")
    if case == "one confidence":
        found = found._replace(confidence=np.full((400, 2), 0.5))
    chosen = choose_user_weights(found, targets, seed=0)
    assert chosen.weights == choose_weights(found, targets)
    assert chosen.user_weights.cuts == () and chosen.user_weights.weights == (chosen.weights,)
    catalog = Catalog([f"<a_{i}>" for i in range(N_ITEMS)])
    by_user = ranked(found, chosen.user_weights.of(found), targets, catalog)
    for own, auto in zip(by_user, ranked(found, chosen.weights, targets, catalog), strict=True):
        assert np.array_equal(own, auto)


@pytest.mark.parametrize("errors, groups", [(0.9, 1), (1.1, 5)])
def test_a_gain_within_its_standard_error_gives_auto(monkeypatch, errors, groups):
    """errors: the cross-validated gain in standard errors."""
    found, targets = planted(0, 1000, helps_the_sure=True)
    noise = np.tile([1.0, -1.0], 500)
    gains = noise + errors / np.sqrt(1000)  # a standard deviation of 1
    lower = np.zeros(1000)  # of the baseline that is equally sure of all
    monkeypatch.setattr(
        blend_weights, "_held_out_gains", lambda _, confidence, *__: gains if np.ptp(confidence) else lower
    )
    chosen = choose_user_weights(found, targets, seed=0)
    assert len(chosen.user_weights.weights) == len(chosen.selection["rows"]) == groups
    assert chosen.selection["gain"] == pytest.approx([errors / np.sqrt(1000), 1 / np.sqrt(1000)])


def test_groups_with_the_weights_of_all_are_one_group(monkeypatch):
    """A gain on held-out rows does not say that the weights on all rows differ."""
    targets, confidence = np.zeros(400, dtype=int), np.random.default_rng(0).random((400, 1))
    same = np.tile(np.linspace(0, -1, N_ITEMS), (400, 1))
    monkeypatch.setattr(blend_weights, "_held_out_gains", lambda *_: np.ones(400))
    chosen = choose_user_weights(candidates(same, same, confidence=confidence), targets, seed=0)
    assert chosen.user_weights == UserWeights((chosen.weights,)) and chosen.selection["rows"] == [400]
    assert chosen.selection["shrinkage"] is None


def test_bins_with_the_same_weights_rank_as_auto():
    """To the last bit: a sum in another order could break a tie differently."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(50, N_ITEMS)).round(1) for _ in range(3)]  # many ties
    found, targets = candidates(*parts, confidence=rng.random((50, 2))), rng.integers(N_ITEMS, size=50)
    same = UserWeights(((0.75, 1.5),) * 3, (0.3, 0.6), 1)
    catalog = Catalog([f"<a_{i}>" for i in range(N_ITEMS)])
    for own, auto in zip(
        ranked(found, same.of(found), targets, catalog), ranked(found, (0.75, 1.5), targets, catalog), strict=True
    ):
        assert np.array_equal(own, auto)


def test_a_bin_of_few_rows_follows_all_rows():
    """Two rows that prefer the second combination do not outvote 98 that prefer the first; 500 such rows do."""
    few = np.tile([[1.0], [0.0]], (1, 100))
    few[:, 98:] = [[0.0], [1.0]]
    assert blend_weights._best_of_bins(few, np.arange(100) // 98, 2, shrinkage=100) == [0, 0]
    many = np.tile([[1.0], [0.0]], (1, 1100))
    many[:, 600:] = [[0.0], [1.0]]
    assert blend_weights._best_of_bins(many, np.arange(1100) // 600, 2, shrinkage=100) == [0, 1]
    assert blend_weights._best_of_bins(many, np.zeros(1100, dtype=int), 3, shrinkage=100) == [0, 0, 0]  # empty bins


def test_cuts_leave_no_bin_empty():
    assert blend_weights._cuts(np.full(7, 0.5)).tolist() == []
    assert blend_weights._cuts(np.array([0.1] * 6 + [0.9])).tolist() == [0.1]
    confidence = np.array([0.1] * 3 + [0.9] * 4)
    bins = np.searchsorted(blend_weights._cuts(confidence), confidence)
    assert set(np.bincount(bins)) == {3, 4}


# ------------------------------------------------------------------------------------------------ on disk

CHOSEN = Choice(UserWeights(((0.25, 1.0), (2.0, 0.0)), (0.123456789,), 1), (1.0, 0.5), {"shrinkage": 300})


def written(tmp_path, change=None, **content) -> str:
    content = {"blend_path": ["run/sasrec", "run/markov"]} | content
    if change:
        change(content["user_weights"])
    (tmp_path / "x.blend.metrics.json").write_text(json.dumps(content))
    return str(tmp_path / "x.blend.metrics.json")


def test_weights_read_back(tmp_path):
    path = written(tmp_path, **blend_weights.record(CHOSEN, ["run/sasrec", "run/markov"]))
    content = json.loads((tmp_path / "x.blend.metrics.json").read_text())
    assert content["weights"] == [1.0, 0.5] and content["user_weights"]["confidence_of"] == "run/markov"
    found = blend_weights.read_weights(path, "blend_weight", ["elsewhere/sasrec", "elsewhere/markov/"])
    assert found == CHOSEN.user_weights
    plain = written(tmp_path, weights=[1, 0.5])
    assert blend_weights.read_weights(plain, "blend_weight", ["sasrec", "markov"]) == UserWeights(((1.0, 0.5),))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda user: user.update(cuts=[0.1, 0.2]), "has 2 cuts, 2 lists of weights"),
        (lambda user: user.update(cuts=["a"]), "user_weights.cuts is .*expected a list of finite numbers"),
        (lambda user: user.update(weights=[[1.0], [1.0]]), "user_weights.weights is .*list of 2 finite numbers"),
        (lambda user: user.update(weights=[[1e308, 1.0]] * 2), "user_weights.weights is .*from 0 to 1000"),
        (lambda user: user.update(weights=None), "has 1 cuts, 0 lists of weights"),
        (lambda user: user.update(cuts=[0.2, 0.1], weights=[[1, 1]] * 3), "expected increasing cuts"),
        (lambda user: user.update(confidence_of="run/caser"), "confidence_of 'run/caser'"),
    ],
)
def test_other_weights_are_refused(tmp_path, change, message):
    path = written(tmp_path, change, **blend_weights.record(CHOSEN, ["run/sasrec", "run/markov"]))
    with pytest.raises(UserError, match=message):
        blend_weights.read_weights(path, "blend_weight", ["run/sasrec", "run/markov"])


def test_weights_of_other_baselines_are_refused(tmp_path):
    path = written(tmp_path, weights=[1.0, 2.0])
    for folders in (["run/markov", "run/sasrec"], ["run/sasrec"]):
        with pytest.raises(UserError, match="has weights for run/sasrec, run/markov, found --blend_path run/"):
            blend_weights.read_weights(path, "blend_weight", folders)
    with pytest.raises(UserError, match="weights is None, expected a list of 2 finite numbers"):
        blend_weights.read_weights(written(tmp_path), "blend_weight", ["sasrec", "markov"])
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(UserError, match="has weights for no baseline"):
        blend_weights.read_weights(str(tmp_path / "empty.json"), "blend_weight", ["sasrec"])
