"""Names and aliases of rewards, a user's file, weights, and the check of every value.

Guarded: a reward gets the arguments that it names; what is missing, misnamed, doubled, not finite or of another catalog is
one line that says so; the example of docs/rl.md runs.
"""

import numpy as np
import pytest
from helpers import ROOT

from minionerec.catalog.catalog import Catalog
from minionerec.common.errors import UserError
from minionerec.rewards.functions import REWARDS
from minionerec.rewards.registry import (
    check_files,
    checked,
    names_of,
    parse_weights,
    reward_functions,
    unit_embeddings,
)

SIDS = ["<a_0><b_0>", "<a_0><b_1>", "<a_1><b_0>"]
CATALOG = Catalog(SIDS)
EMBEDDINGS = np.array([[1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
COLUMNS = {  # of two completions, as the trainer hands them over
    "completions": SIDS[:2],
    "prompts": ["", ""],
    "completion_ids": [[1], [2]],
    "row": [0, 1],
    "target_row": [0, 0],
    "target_sid": [SIDS[0]] * 2,
    "target_item": [0, 0],
    "history_items": [[2], [2]],
    "task": ["sid_seq"] * 2,
    "trainer_state": None,
    "log_extra": None,
    "log_metric": None,
}


def scores(histories):
    return np.tile([1.0, 0.0, 2.0], (len(histories), 1))


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "text, names",
    [
        ("rule", ["rule"]),
        ("ranking", ["rule", "ndcg"]),
        ("ranking_only", ["ndcg"]),
        ("semantic", ["semantic"]),
        ("sasrec", ["sasrec"]),
        ("dense", ["dense"]),
        ("ranking, prefix", ["rule", "ndcg", "prefix"]),
    ],
)
def test_types_and_aliases(text, names):
    found = reward_functions(text, 2, CATALOG, EMBEDDINGS, scores)
    assert [function.__name__ for function in found] == names == names_of(text)
    for function in found:
        values = function(**COLUMNS)
        assert len(values) == 2 and all(type(value) is float for value in values)


@pytest.mark.parametrize(
    "text, message",
    [
        ("nonsense", f"no reward 'nonsense', expected some of {', '.join(REWARDS)}, ranking, ranking_only"),
        ("ranking,rule", "named twice"),
        ("", "expected one or more"),
        ("semantic", "needs --ada_path"),
        ("sasrec", "needs --baseline_path"),
        ("rule,dense", "needs --baseline_path"),
    ],
)
def test_types_that_cannot_be_used(text, message):
    with pytest.raises(UserError, match=message):
        reward_functions(text, 2, CATALOG)


def test_files_that_no_reward_reads_or_that_are_missing(tmp_path):
    check_files("ranking", "", "", "")
    check_files("sasrec", "", "", str(tmp_path))
    for arguments, message in (
        (("rule", "", str(tmp_path), ""), "no reward reads it; add semantic to"),
        (("semantic", "", str(tmp_path), str(tmp_path)), "no reward reads it; add sasrec or dense to"),
        (("dense", "", "", ""), "--reward_type dense needs --baseline_path"),
        (("sasrec", "", "", "nowhere"), "nowhere: no such file or folder; check --baseline_path"),
        (("rule", "nowhere.py:f", "", ""), "nowhere.py: no such file or folder; check --reward_module"),
        (("rule", "nowhere.py", "", ""), "expected path.py:name"),
    ):
        with pytest.raises(UserError, match=message):
            check_files(*arguments)


@pytest.mark.parametrize("text", ["1", "1,2,3", "1,x", "1,nan"])
def test_weights(text):
    assert parse_weights("", ["rule", "ndcg"]) == [1, 1] and parse_weights("1,-0.5", ["rule", "ndcg"]) == [1, -0.5]
    with pytest.raises(UserError, match="--reward_weights"):
        parse_weights(text, ["rule", "ndcg"])


# ------------------------------------------------------------------------------------------------ a user's file


def test_rewards_of_a_users_file_get_what_they_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def length(completions, **_):\n    return [len(c) for c in completions]\n"
        "def hits(row, target_row):\n    return [float(r == t) for r, t in zip(row, target_row)]\n"
        "def level(row, catalog, scale=2.0):\n    return [scale * float(catalog.codes[r][0]) for r in row]\n"
    )
    first, *others = reward_functions("rule", 2, CATALOG, reward_module=f"{file}:length,hits, level")
    assert [other.__name__ for other in others] == ["length", "hits", "level"]
    assert first(**COLUMNS) == others[1](**COLUMNS) == [1, 0]
    assert others[0](**COLUMNS) == [10, 10] and others[2](**COLUMNS) == [0, 0]
    [only] = reward_functions("", 2, CATALOG, reward_module=f"{file}:length")
    assert only.__name__ == "length"


@pytest.mark.parametrize(
    "text, module, message",
    [
        ("number = 3", "mine.py:width", "has no function 'width'"),
        ("number = 3", "mine.py:number", "has no function 'number'"),
        ("", "mine.py", "expected path.py:name"),
        ("", "none.py:f", "no such file"),
        ("import no_such_module", "mine.py:f", "ModuleNotFoundError"),
        ("def rule(completions): pass", "mine.py:rule", "of different names"),
        ("def f(completions, leaf): pass", "mine.py:f", "f asks for 'leaf', expected some of prompts, completions"),
    ],
)
def test_a_users_file_that_cannot_be_used(tmp_path, text, module, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message):
        reward_functions("rule", 2, CATALOG, reward_module=f"{tmp_path}/{module}")


def test_the_example_of_the_documentation(tmp_path):
    text = (ROOT / "docs" / "rl.md").read_text(encoding="utf-8")
    [snippet] = [part.split("```")[0] for part in text.split("```python\n")[1:] if "def promoted" in part]
    (tmp_path / "my_rewards.py").write_text(snippet)
    catalog = Catalog([f"<a_{item}>" for item in range(9)])
    [reward] = reward_functions("", 2, catalog, reward_module=f"{tmp_path}/my_rewards.py:promoted")
    assert reward(**COLUMNS | {"row": [3, 0]}) == [1.0, 0.0]


# ------------------------------------------------------------------------------------------------ values and files


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_value_that_is_not_finite_names_function_and_row(bad):
    def broken(completions):
        return [0.0, bad]

    with pytest.raises(UserError, match="reward broken returned (nan|inf) for row 1 .*<a_0><b_0>.*<a_0><b_1>"):
        checked(broken)(**COLUMNS)


def test_a_wrong_number_of_values():
    def short(completions):
        return [0.0]

    with pytest.raises(UserError, match="values of shape .1,. for 2 completions"):
        checked(short)(**COLUMNS)


def test_a_baseline_without_finite_scores_stops_the_run():
    def broken(histories):
        return np.full((len(histories), 3), np.nan)

    [function] = reward_functions("sasrec", 2, CATALOG, baseline=broken)
    with pytest.raises(UserError, match="reward sasrec returned nan for row 0"):
        function(**COLUMNS)


def test_embeddings_of_another_catalog(tmp_path):
    for matrix, message in (
        (EMBEDDINGS[:2], "2 rows, expected the catalog's 3"),
        (EMBEDDINGS * 0 + [[0], [1], [1]], "row 0 is all zeros"),
    ):
        np.save(tmp_path / "e.npy", matrix.astype(np.float32))
        with pytest.raises(UserError, match=message):
            unit_embeddings(tmp_path / "e.npy", 3)
    np.save(tmp_path / "e.npy", EMBEDDINGS * 3)
    assert np.allclose(unit_embeddings(tmp_path / "e.npy", 3), EMBEDDINGS)
