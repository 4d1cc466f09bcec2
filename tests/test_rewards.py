import math

import pytest

from cli import UserError
from rewards import REWARD_TYPES, checked, ndcg, reward_functions, rule

A, B, C, D = "<a_0><b_0>", "<a_0><b_1>", "<a_1><b_0>", "<a_1><b_1>"


def test_rule_compares_with_the_rows_own_target():
    assert rule(completions=[A, B, A, B], target_sid=[A, A, B, B]) == [1, 0, 0, 1]
    assert rule(completions=[" <a_0> <b_0>\n"], target_sid=[A]) == [1]  # white space of a tokenizer's decode
    assert rule(completions=["<a_0>"], target_sid=[A]) == [0]  # a prefix is no hit


def test_ndcg_by_hand():
    w = [1, 1 / math.log2(3), 1 / 2]
    total = sum(w)
    hit_second = [-w[0] / total, 0, -w[2] / total]
    assert ndcg([B, A, C], [A] * 3, num_generations=3) == pytest.approx(hit_second)
    assert ndcg([B, C, D], [A] * 3, num_generations=3) == [0, 0, 0]
    # two groups of a batch do not touch each other; same completions, different targets
    both = ndcg([B, A, C, B, A, C], [A, A, A, D, D, D], num_generations=3)
    assert both == pytest.approx(hit_second + [0, 0, 0])


def test_same_history_different_targets_get_different_rewards():
    assert rule([A, B] * 2, [A, A, B, B]) == [1, 0, 0, 1]


@pytest.mark.parametrize("name", REWARD_TYPES)
def test_every_type_is_finite_and_of_its_range(name):
    for function in reward_functions(name, num_generations=2):
        values = function(completions=[A, B, C, D], target_sid=[A, A, B, B], prompts=[""] * 4, task=["sid_seq"] * 4)
        assert len(values) == 4 and all(-1 <= v <= 1 for v in values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_names_function_and_row(bad):
    def broken(completions, **_):
        return [0.0, bad]

    with pytest.raises(UserError, match="reward broken returned (nan|inf) for row 1 .*<a_0><b_1>"):
        checked(broken)(completions=[A, B], target_sid=[A, B])


def test_what_is_not_built_is_refused():
    for name in ("semantic", "sasrec"):
        with pytest.raises(UserError, match="not built yet"):
            reward_functions(name, 2)
    with pytest.raises(UserError, match="expected one of rule, ranking, ranking_only"):
        reward_functions("nonsense", 2)
