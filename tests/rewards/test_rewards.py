"""Every reward against values computed by hand: ties, shared SIDs, other depths, texts that are no SID."""

import math

import numpy as np
import pytest
from helpers import ROOT

from minionerec.catalog.catalog import Catalog
from minionerec.common.errors import UserError
from minionerec.rewards.functions import _first_items, ndcg, prefix, rule, sasrec, semantic
from minionerec.rewards.registry import checked, parse_weights, reward_functions, unit_embeddings

A, B, C, D = "<a_0><b_0>", "<a_0><b_1>", "<a_1><b_0>", "<a_1><b_1>"
DEEP, NONE = "<a_0><b_2><c_0>", "<a_0><b_9>"
# items 0..5; items 1 and 4 share B, and train takes 4 more often: B stands for item 4
CATALOG = Catalog([A, B, C, D, B, DEEP], popularity=[0, 1, 0, 0, 3, 0])
EMBEDDINGS = np.array([[1, 0], [0, 1], [0.6, 0.8], [-1, 0], [0.8, 0.6], [0, -1]], dtype=np.float32)


def test_rule_compares_with_the_rows_own_target():
    assert rule(completions=[A, B, A, B], target_sid=[A, A, B, B]).tolist() == [1, 0, 0, 1]
    assert rule(completions=[" <a_0> <b_0>\n"], target_sid=[A]) == [1]  # white space of a tokenizer's decode
    assert rule(completions=["<a_0>", "", DEEP], target_sid=[A, A, "<a_0><b_2>"]).tolist() == [0, 0, 0]  # no prefix


def test_ndcg_by_hand():
    w = [1, 1 / math.log2(3), 1 / 2]
    total = sum(w)
    hit_second = [-w[0] / total, 0, -w[2] / total]
    assert ndcg([B, A, C], [A] * 3, num_generations=3) == pytest.approx(hit_second)
    assert ndcg([B, C, D], [A] * 3, num_generations=3).tolist() == [0, 0, 0]
    # two groups of a batch do not touch each other; same completions, different targets
    both = ndcg([B, A, C, B, A, C], [A, A, A, D, D, D], num_generations=3)
    assert both == pytest.approx(hit_second + [0, 0, 0])
    # a sampled group may hold the target twice
    assert ndcg([A, B, A], [A] * 3, num_generations=3) == pytest.approx([0, -w[1] / total, 0])


def test_prefix_by_hand():
    found = prefix([A, B, C, DEEP, NONE, "", A], [A, A, A, A, A, A, DEEP], catalog=CATALOG)
    assert found == pytest.approx([1, 1 / 2, 0, 1 / 3, 0, 0, 1 / 3])
    assert prefix([DEEP], [DEEP], catalog=CATALOG) == [1]  # not what follows the end of A


def test_semantic_by_hand():
    columns = {"catalog": CATALOG, "embeddings": EMBEDDINGS}
    found = semantic([A, B, C, D, NONE], target_item=[0] * 5, **columns)
    assert found == pytest.approx([1, 0.8, 0.6, -1, -1])  # B is item 4's, not item 1's 0
    # the target is item 1 and B its SID, but B would recommend item 4 first
    assert semantic([B, A], target_item=[1, 1], **columns) == pytest.approx([0.6, 0])


def scores(histories):
    """Item 3 after item 0, item 2 after any other; the rest is 0."""
    table = np.zeros((len(histories), 6))
    table[range(len(histories)), [3 if history[-1] == 0 else 2 for history in histories]] = 2.0
    table[:, 5] = -1.0
    return table


def test_sasrec_by_hand():
    norm = math.log(4 + math.exp(2) + math.exp(-1))
    columns = {"catalog": CATALOG, "collaborative": scores}
    found = sasrec([C, D, C, D, NONE], history_items=[[1], [1], [1, 0], [1, 0], [0]], **columns)
    # the same completions after other histories; an unknown SID gets the least score, not item 0's
    assert found == pytest.approx([2 - norm, -norm, -norm, 2 - norm, -1 - norm])
    assert sasrec([C, D, A], history_items=[[], [1], []], **columns) == pytest.approx([0, -norm, 0])
    assert sasrec([C], history_items=[[]], **columns).tolist() == [0]


def test_same_history_different_targets_get_different_rewards():
    columns = {"catalog": CATALOG, "embeddings": EMBEDDINGS, "num_generations": 2}
    columns |= {"history_items": [[3]] * 4, "target_item": [0, 0, 2, 2], "target_sid": [A, A, C, C]}
    for function in (rule, ndcg, prefix, semantic):
        values = function([A, C] * 2, **columns)
        assert values[0] != values[2] and values[1] != values[3]


@pytest.mark.parametrize(
    "name, functions",
    [
        ("rule", ["rule"]),
        ("ranking", ["rule", "ndcg"]),
        ("ranking_only", ["ndcg"]),
        ("semantic", ["semantic"]),
        ("sasrec", ["sasrec"]),
        ("ranking, prefix", ["rule", "ndcg", "prefix"]),
    ],
)
def test_types_and_aliases(name, functions):
    found = reward_functions(name, 2, CATALOG, EMBEDDINGS, scores)
    assert [function.__name__ for function in found] == functions
    for function in found:
        columns = {"target_sid": [A, A, B, B], "target_item": [0, 0, 1, 1], "history_items": [[0]] * 4}
        values = function(completions=[A, B, C, D], prompts=[""] * 4, task=["sid_seq"] * 4, **columns)
        assert len(values) == 4 and all(type(value) is float and value <= 1 for value in values)


def test_rewards_of_a_users_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def length(completions, **_):\n    return [len(c) for c in completions]\nnumber = 3\n")
    columns = {"completions": [A, DEEP], "target_sid": [A, A]}
    first, second = reward_functions("rule", 2, CATALOG, reward_module=f"{file}:length")
    assert first(**columns) == [1, 0] and second(**columns) == [len(A), len(DEEP)]
    [alone] = reward_functions("", 2, CATALOG, reward_module=f"{file}:length")
    assert alone.__name__ == "length"
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    (tmp_path / "rule.py").write_text("def rule(completions, **_):\n    return [0.0]\n")
    for module, message in {
        f"{file}:width": "has no function 'width'",
        f"{file}:number": "has no function 'number'",
        f"{file}": "expected path.py:name",
        f"{tmp_path}/none.py:length": "no such file",
        f"{tmp_path}/broken.py:length": "ModuleNotFoundError",
        f"{tmp_path}/rule.py:rule": "of different names",
    }.items():
        with pytest.raises(UserError, match=message):
            reward_functions("rule", 2, CATALOG, reward_module=module)
    with pytest.raises(UserError, match="values of shape .1,. for 2 completions"):
        reward_functions("", 2, CATALOG, reward_module=f"{tmp_path}/rule.py:rule")[0](**columns)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_reward_that_is_not_finite_names_function_and_row(bad):
    def broken(completions, **_):
        return [0.0, bad]

    with pytest.raises(UserError, match="reward broken returned (nan|inf) for row 1 .*<a_0><b_1>"):
        checked(broken)(completions=[A, B], target_sid=[A, B])


def test_a_collaborative_model_without_finite_scores_stops_the_run():
    def broken(histories):
        return np.full((len(histories), 6), np.nan)

    [function] = reward_functions("sasrec", 2, CATALOG, collaborative=broken)
    with pytest.raises(UserError, match="reward sasrec returned nan for row 0"):
        function(completions=[A, B], target_sid=[A, A], history_items=[[1], [1]])


def test_what_cannot_be_rewarded_is_refused(tmp_path):
    for name, message in {
        "nonsense": "no reward 'nonsense', expected some of rule, ndcg, prefix, semantic, sasrec, ranking, ranking_only",
        "ranking,rule": "named twice",
        "": "expected one or more",
        "semantic": "--ada_path",
        "sasrec": "--cf_path",
    }.items():
        with pytest.raises(UserError, match=message):
            reward_functions(name, 2, CATALOG)
    assert parse_weights("", ["rule", "ndcg"]) == [1, 1] and parse_weights("1,-0.5", ["rule", "ndcg"]) == [1, -0.5]
    for text in ("1", "1,2,3", "1,x", "1,nan"):
        with pytest.raises(UserError, match="--reward_weights"):
            parse_weights(text, ["rule", "ndcg"])
    for matrix, message in (
        (EMBEDDINGS[:5], "5 rows, expected the catalog's 6"),
        (EMBEDDINGS * 0 + [[0], [1], [1], [1], [1], [1]], "row 0 is all zeros"),
    ):
        np.save(tmp_path / "e.npy", matrix.astype(np.float32))
        with pytest.raises(UserError, match=message):
            unit_embeddings(tmp_path / "e.npy", 6)
    np.save(tmp_path / "e.npy", EMBEDDINGS * 3)
    assert np.allclose(unit_embeddings(tmp_path / "e.npy", 6), EMBEDDINGS)


def test_levels_belong_to_the_catalog_at_hand():
    other = Catalog([DEEP, "<a_0><b_2><c_1>"])
    assert prefix([A], [A], catalog=CATALOG) == [1]
    assert prefix([DEEP], ["<a_0><b_2><c_1>"], catalog=other) == pytest.approx([2 / 3])
    assert _first_items(CATALOG)[CATALOG.row_of_sid[B]] == 4


def test_the_readmes_own_reward(tmp_path):
    snippets = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    [snippet] = [text.split("```")[0] for text in snippets if "def promoted" in text]
    (tmp_path / "my_rewards.py").write_text(snippet)
    [reward] = reward_functions("", 2, CATALOG, reward_module=f"{tmp_path}/my_rewards.py:promoted")
    sids = [CATALOG.sids[CATALOG.sid_of_item[item]] for item in (3, 0)]
    columns = {"target_sid": sids, "target_item": [3, 0], "history_items": [[], []], "task": ["sid_seq"] * 2}
    expected = [float(CATALOG.items_of_sid[CATALOG.row_of_sid[sid]][0] in (3, 5, 8)) for sid in sids]
    assert reward(completions=sids, **columns) == expected == [1.0, 0.0]
