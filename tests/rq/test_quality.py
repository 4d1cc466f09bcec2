"""Quality figures: hand-counted collisions, use of codes and perplexity; fitted error of hand-set codes."""

import numpy as np
import pytest
import torch

from rq.quality import fitted_error, quality

CODES = np.array([[0, 0], [0, 0], [0, 0], [0, 1], [1, 2], [1, 2], [2, 0]])


def test_quality_figures():
    figures = quality(CODES)
    assert (figures["n_items"], figures["distinct_sids"], figures["max_items_per_sid"]) == (7, 4, 3)
    assert figures["collision_rate"] == pytest.approx(3 / 7)
    assert figures["codes_used"] == [3, 3]
    share = np.array([4, 2, 1]) / 7
    assert figures["perplexity"][0] == pytest.approx(np.exp(-(share * np.log(share)).sum()), abs=0.01)
    assert quality(np.array([[0], [1], [2], [3]]))["perplexity"] == [4.0]


def test_fitted_error_of_hand_set_codes():
    x = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
    variance = sum((v - 6) ** 2 for v in (0, 2, 10, 12))
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    assert fitted_error(x, codes) == pytest.approx([4 / variance, 0], abs=1e-6)
    mixed = np.column_stack([codes[:, :1], [0, 1, -1, -1]])
    assert fitted_error(x, mixed) == pytest.approx([4 / variance], abs=1e-6)
