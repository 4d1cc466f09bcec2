"""Baselines that only count: popularity and a first-order Markov chain, as models with scores for any history."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from minionerec.catalog.catalog import target_counts
from minionerec.common.files import atomic_file, write_json


class Popularity(nn.Module):
    """Scores an item by the logarithm of its share of train's targets (add-one), the same after every history."""

    name = "popularity"

    def __init__(self, *, n_items: int, **_):
        super().__init__()
        self.n_items = n_items
        self.register_buffer("counts", torch.zeros(n_items, dtype=torch.float64))

    def log_shares(self) -> torch.Tensor:
        """(items,) nats."""
        counts = self.counts + 1
        return (counts / counts.sum()).log()

    @torch.no_grad()
    def scores(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """(rows, items) log-probabilities in nats."""
        return self.log_shares().expand(len(histories), -1).clone()


class Markov(Popularity):
    """Scores an item by how often train goes to it from the last item of the history; ties rank by popularity.

        p(j | i) = (c_ij + p(j)) / (c_i + 1)      c_ij: transitions i -> j in train; c_i: from i; p: popularity's shares

    Without a last item, or without a transition from it, that is popularity.
    """

    name = "markov"

    def __init__(self, *, n_items: int, n_transitions: int):
        super().__init__(n_items=n_items)
        self.register_buffer("pairs", torch.zeros(2, n_transitions, dtype=torch.long))  # from, to
        self.register_buffer("times", torch.zeros(n_transitions, dtype=torch.float64))

    @torch.no_grad()
    def scores(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """(rows, items) log-probabilities in nats."""
        device = self.counts.device
        last = torch.tensor([history[-1] if len(history) else self.n_items for history in histories], device=device)
        start = torch.searchsorted(self.pairs[0], last)  # pairs are sorted
        times = torch.searchsorted(self.pairs[0], last, right=True) - start
        values = self.log_shares().exp().expand(len(histories), -1).clone()
        row = torch.repeat_interleave(torch.arange(len(last), device=device), times)
        within = torch.arange(len(row), device=device) - torch.repeat_interleave(times.cumsum(0) - times, times)
        entry = start[row] + within
        values[row, self.pairs[1, entry]] += self.times[entry]
        return (values / values.sum(dim=1, keepdim=True)).log()


MODELS = {model.name: model for model in (Popularity, Markov)}


def save(folder: str | Path, name: str, train: pl.DataFrame, n_items: int) -> None:
    """Count train and write `model.safetensors` and `config.json`, each atomically."""
    tensors = {"counts": torch.tensor(target_counts(train, n_items), dtype=torch.float64)}
    config = {"model_type": name, "n_items": n_items}
    if name == Markov.name:
        pairs = (
            train.select(last=pl.col("history").list.last(), target="target")
            .drop_nulls()
            .group_by("last", "target")
            .len()
            .sort("last", "target")
        )
        config["n_transitions"] = len(pairs)
        tensors["pairs"] = torch.from_numpy(np.stack([pairs["last"].to_numpy(), pairs["target"].to_numpy()]))
        tensors["times"] = torch.from_numpy(pairs["len"].to_numpy().astype(np.float64))
    with atomic_file(Path(folder) / "model.safetensors", "wb") as f:
        f.write(to_safetensors(tensors))
    write_json(Path(folder) / "config.json", config)
