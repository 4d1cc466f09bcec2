"""Baselines that only count: popularity and a first-order Markov chain."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from scipy.sparse import csr_array

from minionerec.baselines.training import Scorer
from minionerec.catalog.catalog import target_counts


def popularity(train: pl.DataFrame, n_items: int) -> Scorer:
    """Scores every item by how often it is a target in train, whatever the history."""
    counts = np.array(target_counts(train, n_items), dtype=np.float64)
    return lambda histories: np.tile(counts, (len(histories), 1))


def markov(train: pl.DataFrame, n_items: int) -> Scorer:
    """Scores an item by how often train goes to it from the history's last item; equal counts by popularity."""
    counts = np.array(target_counts(train, n_items), dtype=np.float64)

    def last_items(histories: Sequence[Sequence[int]]) -> list[int]:
        return [history[-1] if len(history) else n_items for history in histories]  # row n_items has no transition

    places = (last_items(train["history"].to_list()), train["target"].to_numpy())
    transitions = csr_array((np.ones(len(train)), places), shape=(n_items + 1, n_items))  # equal places add up
    # One transition outweighs any popularity. Integers below 2^53 are exact in float64.
    return lambda histories: transitions[last_items(histories)].toarray() * (len(train) + 1) + counts
