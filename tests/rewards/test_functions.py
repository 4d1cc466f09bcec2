"""Every reward function against values computed by hand.

Guarded: rewards depend on the row's own target and history; other depths, shared SIDs and texts that are no SID have the
documented values; groups of a batch do not affect each other; the examples in the docstrings are right.
"""

import doctest
import math

import numpy as np
import pytest

from minionerec.catalog.catalog import Catalog
from minionerec.rewards import functions
from minionerec.rewards.functions import dense, ndcg, prefix, rule, sasrec, semantic

A, B, C, D = "<a_0><b_0>", "<a_0><b_1>", "<a_1><b_0>", "<a_1><b_1>"
DEEP, NONE = "<a_0><b_2><c_0>", "no SID"
# items 0 to 5; items 1 and 4 share B, and train takes 4 more often, so item 4 is first in B
CATALOG = Catalog([A, B, C, D, B, DEEP], popularity=[0, 1, 0, 0, 3, 0])
EMBEDDINGS = np.array([[1, 0], [0, 1], [0.6, 0.8], [-1, 0], [0.8, 0.6], [0, -1]], dtype=np.float32)


def rows(*sids: str) -> list[int]:
    return [CATALOG.row_of_sid.get(sid, -1) for sid in sids]


def scores(histories):
    """Item 3 is first after item 0, item 2 after any other; item 5 is last; the rest is 0."""
    table = np.zeros((len(histories), 6))
    table[range(len(histories)), [3 if history[-1] == 0 else 2 for history in histories]] = 2.0
    table[:, 5] = -1.0
    return table


def test_examples_in_the_docstrings():
    names = {"catalog": Catalog(["<a_0><b_0>", "<a_0><b_1>", "<a_1><b_0>"]), "np": np}
    results = [
        doctest.DocTestRunner().run(test)
        for test in doctest.DocTestFinder().find(functions, extraglobs=names)
        if test.name != functions.__name__  # the module's only defines `catalog`
    ]
    assert sum(result.attempted for result in results) >= 7 and not any(result.failed for result in results)


def test_rule():
    assert rule(rows(A, B, A, B), rows(A, A, B, B)).tolist() == [1, 0, 0, 1]
    assert rule(rows(NONE, DEEP), rows(A, B)).tolist() == [0, 0]


def test_ndcg():
    w = [1, 1 / math.log2(3), 1 / 2]
    total = sum(w)
    hit_second = [-w[0] / total, 0, -w[2] / total]
    assert ndcg(rows(B, A, C), rows(A, A, A), num_generations=3) == pytest.approx(hit_second)
    assert ndcg(rows(B, C, D), rows(A, A, A), num_generations=3).tolist() == [0, 0, 0]
    # two groups of a batch: the same completions, different targets
    both = ndcg(rows(B, A, C, B, A, C), rows(A, A, A, D, D, D), num_generations=3)
    assert both == pytest.approx(hit_second + [0, 0, 0])
    # a sampled group may contain the target twice
    assert ndcg(rows(A, B, A), rows(A, A, A), num_generations=3) == pytest.approx([0, -w[1] / total, 0])


def test_prefix():
    found = prefix(rows(A, B, C, DEEP, NONE, A), rows(A, A, A, A, A, DEEP), catalog=CATALOG)
    assert found == pytest.approx([1, 1 / 2, 0, 1 / 3, 0, 1 / 3])
    assert prefix(rows(DEEP), rows(DEEP), catalog=CATALOG) == [1]


def test_semantic():
    columns = {"catalog": CATALOG, "embeddings": EMBEDDINGS}
    found = semantic(rows(A, B, C, D, NONE), target_item=[0] * 5, **columns)
    assert found == pytest.approx([1, 0.8, 0.6, -1, -1])  # the first item of B is 4, not 1
    # the target is item 1 with SID B, but B recommends item 4 first
    assert semantic(rows(B, A), target_item=[1, 1], **columns) == pytest.approx([0.6, 0])


def test_sasrec():
    norm = math.log(4 + math.exp(2) + math.exp(-1))
    columns = {"catalog": CATALOG, "baseline": scores}
    found = sasrec(rows(C, D, C, D, NONE), history_items=[[1], [1], [1, 0], [1, 0], [0]], **columns)
    # the same completions after other histories; a text that is no SID gets the lowest value, not item 0's
    assert found == pytest.approx([2 - norm, -norm, -norm, 2 - norm, -1 - norm])
    assert sasrec(rows(C, D, A), history_items=[[], [1], []], **columns) == pytest.approx([0, -norm, 0])
    assert sasrec(rows(C), history_items=[[]], **columns).tolist() == [0]
    # the lowest value is that of the own history
    columns["baseline"] = lambda histories: np.array([[0, 0, 0, 0, 0, -1.0 - history[-1]] for history in histories])
    lowest = [low - math.log(5 + math.exp(low)) for low in (-1, -4)]
    assert sasrec(rows(NONE, NONE), history_items=[[0], [3]], **columns) == pytest.approx(lowest)


def test_dense():
    """Two groups with the target A, whose item 0 has rank r = 1 after history [1]: g = 1 / log2(3)."""
    columns = {"catalog": CATALOG, "baseline": scores, "num_generations": 3}
    g = 1 / math.log2(3)
    # without the target: scores 0, 2, 0 give percentiles 1/4, 1, 1/4; B shares half of the levels, D and C none
    half = np.interp(1 / 2, [1 / 3, 2 / 3], [0.2, 0.5])
    miss = [0.1 * (g / 4 + (1 - g) * half), 0.1 * g, 0.1 * g / 4]
    # with the target first: its percentile is that of score 0 among 0, 2 and no SID
    w = [1, 1 / math.log2(3), 1 / 2]
    hit = [1 + 0.1 * (g / 2 + (1 - g)), -w[1] / sum(w) + 0.1 * g, -w[2] / sum(w)]
    found = dense(rows(B, C, D, A, C, NONE), rows(*[A] * 6), [0] * 6, [[1]] * 6, **columns)
    assert found == pytest.approx(miss + hit)


def test_dense_trusts_the_baseline_less_the_lower_it_ranks_the_target():
    columns = {"catalog": CATALOG, "baseline": scores, "num_generations": 2}
    for target, rank in ((2, 0), (0, 1), (5, 5)):
        sid = CATALOG.sids[CATALOG.sid_of_item[target]]
        # D is scored above nothing and below C; it shares no level with A and DEEP
        pair = [C, A] if sid != C else [D, A]
        above, below = dense(rows(*pair), rows(sid, sid), [target] * 2, [[1]] * 2, **columns)
        steps = np.interp(prefix(rows(*pair), rows(sid, sid), catalog=CATALOG), functions.SHARES, functions.STEPS)
        g, p = 1 / math.log2(rank + 2), [1, 0] if pair[0] == C else [0.5, 0.5]
        exact, penalty = rule(rows(*pair), rows(sid, sid)), ndcg(rows(*pair), rows(sid, sid), 2)
        assert [above, below] == pytest.approx(list(exact + penalty + 0.1 * (g * np.array(p) + (1 - g) * steps)))


def test_dense_without_a_history_is_the_prefix_term():
    columns = {"catalog": CATALOG, "baseline": scores, "num_generations": 2}
    found = dense(rows(B, C), rows(A, A), [0, 0], [[], []], **columns)
    assert found == pytest.approx([0.1 * np.interp(1 / 2, [1 / 3, 2 / 3], [0.2, 0.5]), 0])
    # next to a group with a history, whose values do not change
    both = dense(rows(B, C, C, D), rows(*[A] * 4), [0] * 4, [[], [], [1], [1]], **columns)
    assert both[:2] == pytest.approx(found)
    assert both[2:] == pytest.approx(dense(rows(C, D), rows(A, A), [0, 0], [[1], [1]], **columns))


def test_three_levels_get_the_published_steps():
    catalog = Catalog([f"<a_{i > 0:d}><b_{i > 1:d}><c_{i > 2:d}>" for i in range(4)])
    share = prefix([0, 1, 2, 3], [3, 3, 3, 3], catalog=catalog)
    assert np.interp(share, functions.SHARES, functions.STEPS).tolist() == [0, 0.2, 0.5, 1]


def test_same_history_different_targets_get_different_rewards():
    columns = {"catalog": CATALOG, "embeddings": EMBEDDINGS, "num_generations": 2, "baseline": scores}
    columns |= {"history_items": [[3]] * 4, "target_item": [0, 0, 2, 2], "target_row": rows(A, A, C, C)}
    for function in (rule, ndcg, prefix, semantic, dense):
        values = function(row=rows(A, C, A, C), **columns)
        assert values[0] != values[2] and values[1] != values[3]


def test_levels_and_items_belong_to_the_catalog_at_hand():
    other = Catalog([DEEP, "<a_0><b_2><c_1>"])
    assert prefix(rows(A), rows(A), catalog=CATALOG) == [1]
    assert prefix([0], [1], catalog=other) == pytest.approx([2 / 3])
    assert functions._first_items(CATALOG)[CATALOG.row_of_sid[B]] == 4
