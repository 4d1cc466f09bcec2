"""The blend of a generative model and baselines beside brute force.

Invariants: with lists as long as the catalog, ranks and first places are those of sorting every item by the weighted sum,
under both protocols, for items that share a SID too and for weights that differ by user; with shorter lists the candidates
are the beams and the baselines' best items, each with its exact score.
"""

import copy
import itertools
import random
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from decoding.small_models import catalog_log_prob

from data import Prompts, next_sid_prompts
from minionerec.baselines import counts
from minionerec.baselines.models import load_checkpoint
from minionerec.catalog.catalog import Catalog
from minionerec.decoding.beam_search import beam_search
from minionerec.decoding.engine import TransformersEngine, recommend
from minionerec.evaluation import blend
from minionerec.evaluation.blend import Candidates, gather, missing_rows, ranked, ranks, top_rows
from minionerec.evaluation.blend_weights import UserWeights
from minionerec.evaluation.metrics import MISSED

N_ITEMS, USERS = 24, 7
PROTOCOLS = ("all", "unseen")


class Fixed:
    """A baseline with random scores for each history, far from a logarithm of probabilities."""

    def __init__(self, seed: int, scale: float = 2.0):
        self.seed, self.scale, self.calls = seed, scale, []

    def scores(self, histories) -> torch.Tensor:
        self.calls += histories
        rows = [np.random.default_rng([self.seed, *history]).normal(size=N_ITEMS) for history in histories]
        return torch.from_numpy(100 + self.scale * np.stack(rows)).float()


@pytest.fixture(scope="module", params=["one depth", "mixed depth"])
def setting(request, policy):
    """A catalog in which items 5, 6 and 7 share a SID, as do 20 and 2; users with histories of different length."""
    sids = list(policy.items.sids[:N_ITEMS])
    if request.param == "mixed depth":
        sids[:2] = "<a_3>", "<a_2><b_1>"
    sids[6] = sids[7] = sids[5]
    sids[20] = sids[2]
    rng = random.Random(0)
    seen = [[rng.randrange(N_ITEMS) for _ in range(length)] for length in (3, 1, 8, 0, 30, 5, 2)]
    seen[5] = [5, 6, 7, 20, 0]  # all items of a SID, and one of two
    targets = [rng.choice([item for item in range(N_ITEMS) if item not in items]) for items in seen]
    targets[2] = seen[2][0]  # a repeated target
    targets[5] = 2
    model = copy.deepcopy(policy.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.ndim > 1 else 1.0)  # flatter, so that both models matter
    catalog = Catalog(sids, popularity=[rng.randrange(3) for _ in sids])
    rows = pl.DataFrame({"history": [items[-4:] for items in seen]}, schema={"history": pl.List(pl.Int64)})
    prompts = next_sid_prompts(rows, SimpleNamespace(sids=sids), Prompts(category="Toys_and_Games"))
    encoded = [tuple(policy.tokenizer(sid, add_special_tokens=False)["input_ids"]) for sid in catalog.sids]
    before = policy.tokenizer(prompts)["input_ids"]
    by_sid = np.array([[catalog_log_prob(model, prompt, ids, encoded) for ids in encoded] for prompt in before])
    return SimpleNamespace(
        model=model, tokenizer=policy.tokenizer, trie=catalog.trie(policy.tokenizer), catalog=catalog, seen=seen,
        targets=targets, prompts=prompts, generative=by_sid[:, catalog.sid_of_item],
    )  # fmt: skip


def collect(setting, baselines, count: int) -> dict[str, Candidates]:
    return blend.collect(
        setting.model, setting.tokenizer, setting.trie, setting.prompts, setting.seen, baselines, setting.catalog,
        count=count, batch_size=3,
    )  # fmt: skip


def log_softmax(baseline, histories) -> np.ndarray:
    return torch.log_softmax(baseline.scores(histories).double(), dim=1).numpy()


def sorted_items(total: np.ndarray, row: int, seen) -> list[int]:
    """Every item that may be recommended, best first; of equal scores the lower id."""
    hidden = set(seen or [])
    return [item for item in np.argsort(-total[row], kind="stable").tolist() if item not in hidden]


def place(listed, wanted) -> int:
    return listed.index(wanted) if wanted in listed else MISSED


# ------------------------------------------------------------------------------------------------ brute force


BINS = ((0.2, 3.0), (1.5, 0.0), (0.0, 0.7))  # weights of two baselines, by how sure the second one is


def test_beams_that_were_found_before_are_taken(setting):
    """The same candidates as with a search; of other beams, those beams, whose scores are not computed again."""
    arguments = (
        setting.model,
        setting.tokenizer,
        setting.trie,
        setting.prompts,
        setting.seen,
        [Fixed(1)],
        setting.catalog,
    )
    engine = TransformersEngine(setting.model, setting.trie, setting.tokenizer.pad_token_id, "catalog")
    rows, scores = recommend(engine, setting.tokenizer, setting.prompts, 3, batch_size=2)
    expected = collect(setting, [Fixed(1)], count=3)
    found = blend.collect(*arguments, count=3, batch_size=3, beams=(rows, scores))
    other = blend.collect(*arguments, count=3, batch_size=3, beams=(rows, scores - 1))
    for name, each in expected.items():
        assert np.array_equal(found[name].items, each.items)
        np.testing.assert_allclose(found[name].scores, each.scores, atol=1e-4)
        assert not np.allclose(other[name].scores[..., 0], each.scores[..., 0], atol=1e-4)


@pytest.mark.parametrize("weights", [(0.0,), (0.7,), (1.0, 0.4), BINS])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_whole_lists_rank_as_brute_force(setting, weights, protocol):
    baselines = [Fixed(1), Fixed(2, scale=5.0)][: 2 if weights is BINS else len(weights)]
    found = collect(setting, baselines, count=N_ITEMS)[protocol]
    parts = [log_softmax(baseline, setting.seen) for baseline in baselines]
    by_user = [weights] * USERS
    if weights is BINS:
        sure = np.exp(parts[1].max(axis=1))
        low, high = np.sort(sure)[[1, 4]] + 1e-5
        by_user = [BINS[0 if p <= low else 1 if p <= high else 2] for p in sure]
        weights = UserWeights(BINS, (low, high), baseline=1).of(found)
        assert [by_user.count(each) for each in BINS] == [2, 3, 2]
    total = setting.generative.copy()
    for row, own in enumerate(by_user):
        total[row] += sum(weight * part[row] for weight, part in zip(own, parts, strict=True))
    total = total.round(3)  # items that share a SID may tie exactly, others do not
    result = ranked(found, weights, setting.targets, setting.catalog)
    sid_of_item = setting.catalog.sid_of_item
    for row, target in enumerate(setting.targets):
        items = sorted_items(total, row, setting.seen[row] if protocol == "unseen" else None)
        sids = list(dict.fromkeys(sid_of_item[items].tolist()))  # each at its best item
        assert result.item[row] == place(items, target)
        assert result.sid[row] == place(sids, int(sid_of_item[target]))
        assert result.top[row].tolist() == (items[:10] + [-1] * 10)[:10]
    assert np.flatnonzero(result.item == MISSED).tolist() == [2] * (protocol == "unseen")  # the repeated target
    assert result.sid[5] < MISSED  # item 2's SID stays although 20 is seen


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scores_of_whole_lists_are_each_models(setting, protocol):
    baselines = [Fixed(1), Fixed(2)]
    items, scores, confidence = collect(setting, baselines, count=N_ITEMS)[protocol]
    parts = [setting.generative, *(log_softmax(baseline, setting.seen) for baseline in baselines)]
    for row, seen in enumerate(setting.seen):
        kept = sorted(set(range(N_ITEMS)) - set(seen if protocol == "unseen" else []))
        assert items[row].tolist() == kept + [-1] * (items.shape[1] - len(kept))
        for place, part in enumerate(parts):
            np.testing.assert_allclose(scores[row, : len(kept), place], part[row, kept], atol=1e-3)
        assert (scores[row, len(kept) :] == -np.inf).all()
        largest = [np.exp(part[row].max()) for part in parts[1:]]  # seen items included, under both protocols
        np.testing.assert_allclose(confidence[row], largest, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 3])
def test_short_lists_have_exact_scores(setting, count):
    """Candidates: the items of the beams and of the SIDs of each baseline's best items, with and without seen ones."""
    baselines = [Fixed(1), Fixed(2)]
    found = collect(setting, baselines, count)
    sid_of_item, baseline_scores = setting.catalog.sid_of_item, [log_softmax(each, setting.seen) for each in baselines]
    for row, seen in enumerate(setting.seen):
        ids = torch.tensor(setting.tokenizer(setting.prompts[row])["input_ids"])[None]
        beams = beam_search(setting.model, setting.trie, ids, torch.ones_like(ids), count, space="catalog")
        wanted = set(beams.row[0].tolist())
        for scores, hidden in itertools.product(baseline_scores, ([], seen)):
            best = [item for item in np.argsort(-scores[row]).tolist() if item not in hidden][:count]
            wanted |= set(sid_of_item[best].tolist())
        for protocol, hidden in (("all", []), ("unseen", seen)):
            items = [i for i in range(N_ITEMS) if sid_of_item[i] in wanted and i not in hidden]
            listed, scores = found[protocol].items[row], found[protocol].scores[row]
            assert [item for item in listed.tolist() if item >= 0] == items
            np.testing.assert_allclose(scores[: len(items), 0], setting.generative[row, items], atol=1e-3)
            for place, part in enumerate(baseline_scores, start=1):
                np.testing.assert_allclose(scores[: len(items), place], part[row, items], atol=1e-3)


def test_baselines_get_whole_histories_in_the_order_of_prompts(setting):
    """The generative model reads a window, a baseline all that the user has."""
    baseline = Fixed(1)
    collect(setting, [baseline], count=2)
    assert sorted(baseline.calls) == sorted(setting.seen)


def test_counted_baselines(setting, tmp_path):
    """Popularity and Markov as sasrec.py saves them: their scores are log-probabilities already."""
    rows = pl.DataFrame(
        {"history": [items[:-1] for items in setting.seen if items], "target": [items[-1] for items in setting.seen if items]},
        schema={"history": pl.List(pl.Int64), "target": pl.Int64},
    )  # fmt: skip
    baselines = []
    for name in counts.MODELS:
        counts.save(tmp_path / name, name, rows, N_ITEMS)
        baselines.append(load_checkpoint(tmp_path / name, "blend_path", N_ITEMS))
    items, scores, _ = collect(setting, baselines, count=N_ITEMS)["all"]
    for part, baseline in enumerate(baselines, start=1):
        expected = baseline.scores(setting.seen).numpy()
        np.testing.assert_allclose(np.exp(expected).sum(axis=1), 1.0)
        np.testing.assert_allclose(scores[..., part], expected, atol=1e-6)
    assert np.array_equal(items, np.tile(np.arange(N_ITEMS), (USERS, 1)))


# ------------------------------------------------------------------------------------------------ lists


@pytest.mark.parametrize("seed", range(5))
def test_missing_rows_are_those_of_no_beam(seed):
    rng = np.random.default_rng(seed)
    beams = np.stack([rng.permutation(20)[:6] for _ in range(9)])
    beams[0, 3:] = -1  # a shorter list
    others = rng.integers(0, 20, size=(9, 8))
    others[1] = beams[1, 0]  # nothing is missing
    found = missing_rows(beams, others, 20)
    for row, own, listed in zip(found, beams, others, strict=True):
        expected = sorted(set(listed.tolist()) - set(own.tolist()))
        assert row.tolist() == expected + [-1] * (len(row) - len(expected))
    assert missing_rows(beams, beams, 20).tolist() == [[-1]] * 9


def test_the_best_items_of_a_baseline():
    catalog = Catalog(["<a_0>", "<a_1>", "<a_0>", "<a_2>", "<a_3>"])
    scores = np.array([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    before = scores.copy()
    assert [set(row) for row in top_rows(scores, catalog, 2, None).tolist()] == [{0, 1}, {2, 3}]
    assert [set(row) for row in top_rows(scores, catalog, 2, [[0, 1], []]).tolist()] == [{0, 2}, {2, 3}]
    assert top_rows(scores, catalog, 9, None).shape == (2, 5)
    assert np.array_equal(scores, before)


def test_items_of_an_empty_list():
    """A user whose SIDs are all seen has no candidate, and every target is missed."""
    catalog = Catalog(["<a_0>", "<a_1>", "<a_2>"])
    found = gather(np.array([[0, -1], [1, 2]]), np.zeros((2, 2)), [np.zeros((2, 3))], catalog, [[0], [1]])
    assert found.items.tolist() == [[-1], [2]] and found.scores[0].tolist() == [[-np.inf] * 2]
    result = ranked(found, (1.0,), [0, 2], catalog)
    assert result.item.tolist() == [MISSED, 0] == result.sid.tolist()
    assert result.top[:, :2].tolist() == [[-1, -1], [2, -1]]


# ------------------------------------------------------------------------------------------------ ties


def test_ties_rank_by_item():
    items, catalog = np.tile(np.arange(4), (4, 1)), Catalog([f"<a_{i}>" for i in range(4)])
    found = Candidates(items, np.zeros((4, 4, 1)), np.zeros((4, 0)))
    assert ranks(found, (), np.arange(4)).tolist() == [0, 1, 2, 3]
    assert ranked(found, (), [0, 1, 2, 3], catalog).item.tolist() == [0, 1, 2, 3]
