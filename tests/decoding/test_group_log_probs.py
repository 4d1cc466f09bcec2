"""Pieces of the shared-prompt log-probabilities; tests/test_minionerec_trainer.py compares the whole with plain rows.

Guarded: a branch sees its prompt and itself only, at the positions of a plain row; rows are grouped only where whole
blocks of neighbours are equal.
"""

import doctest

import torch

from minionerec.decoding import group_log_probs
from minionerec.decoding.group_log_probs import run_lengths_gcd
from minionerec.decoding.tree_attention import branch_mask_and_positions, positions


def test_run_lengths():
    assert doctest.testmod(group_log_probs).failed == 0
    rows = torch.tensor([[1], [1], [1], [1], [2], [2]])
    assert run_lengths_gcd(rows) == 2 and run_lengths_gcd(rows[:4]) == 4 and run_lengths_gcd(rows[3:]) == 1


def test_a_branch_sees_its_prompt_and_itself():
    trunk = torch.tensor([[0, 1, 1], [1, 1, 1]])
    mask, position_ids = branch_mask_and_positions(trunk, branches=2, length=2, dtype=torch.float32)
    visible = mask[:, 0] == 0
    assert position_ids.tolist() == [[0, 0, 1, 2, 3, 2, 3], [0, 1, 2, 3, 4, 3, 4]]
    assert visible[0, 3].tolist() == [False, True, True, True, False, False, False]
    assert visible[0, 6].tolist() == [False, True, True, False, False, True, True]
    assert visible[0, 0].tolist() == [True] + [False] * 6  # padding sees itself, so that its softmax is defined
    assert positions(trunk).tolist() == [[0, 0, 1], [0, 1, 2]]
