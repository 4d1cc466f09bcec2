"""Popularity and the Markov chain: scores by hand.

Invariants: scores are log-probabilities; ranks follow counts, and ties popularity; a saved model scores as the counts.
"""

import polars as pl
import pytest
import torch
from helpers import sequences

from minionerec.baselines import counts
from minionerec.baselines.models import load_checkpoint

#          target: 1 three times, 2 twice, 3 once, 0 and 4 never; item 4 is in a history only
TRAIN = sequences(([0], 1), ([0], 1), ([4, 0], 2), ([2], 3), ([3, 1], 2), ([3], 1))


def saved(folder, name: str, train: pl.DataFrame = TRAIN, n_items: int = 5):
    counts.save(folder, name, train, n_items)
    return load_checkpoint(folder, n_items=n_items)


def order(scores: torch.Tensor) -> list[int]:
    """Items best first; of equal scores the lower id."""
    return sorted(range(len(scores)), key=lambda item: (-scores[item].item(), item))


def test_popularity_is_the_share_of_targets(tmp_path):
    scores = saved(tmp_path, "popularity").scores([[0], [3, 2]])
    expected = (torch.tensor([1.0, 4, 3, 2, 1], dtype=torch.float64) / 11).log()
    torch.testing.assert_close(scores, expected.expand(2, -1))
    assert order(scores[0]) == [1, 2, 3, 0, 4]


def test_markov_ranks_by_transitions_from_the_last_item_then_by_popularity(tmp_path):
    model = saved(tmp_path, "markov")
    # from 0: 1 twice, 2 once, then 3 by popularity, then 0 and 4 by id; from 2: 3 once, then 1, 2, 0, 4
    cases = [([0], [1, 2, 3, 0, 4]), ([3, 2], [3, 1, 2, 0, 4]), ([4], [1, 2, 3, 0, 4]), ([], [1, 2, 3, 0, 4])]
    for history, expected in cases:
        assert order(model.scores([history])[0]) == expected, history
    together = model.scores([history for history, _ in cases])
    torch.testing.assert_close(together, torch.cat([model.scores([history]) for history, _ in cases]))


def test_markov_is_a_distribution(tmp_path):
    """(c_ij + p_j) / (c_i + 1) with p the add-one shares."""
    scores = saved(tmp_path, "markov").scores([[0], [4]])
    shares = torch.tensor([1.0, 4, 3, 2, 1], dtype=torch.float64) / 11
    torch.testing.assert_close(scores[0].exp(), (torch.tensor([0, 2, 1, 0, 0]) + shares) / 4)
    torch.testing.assert_close(scores[1].exp(), shares)  # 4 is the last item of no train row


def test_one_transition_outweighs_any_popularity(tmp_path):
    train = sequences(*[([0], 1)] * 50, ([2], 3))
    assert saved(tmp_path, "markov", train, 4).scores([[2]])[0].argmax() == 3


@pytest.mark.parametrize("name", counts.MODELS)
def test_no_history_at_all(tmp_path, name):
    assert saved(tmp_path, name, sequences(([], 1)), 3).scores([[], [2]]).isfinite().all()
