"""Next-item models over item ids or item features: SASRec, GRU4Rec and Caser, their losses and their checkpoints.

A model turns a history into a state. An item's score is its output embedding times the state, plus its bias. The output
embeddings are the input embeddings (`tie_embeddings`) or a separate table.

Departures from all three papers: a whole sequence is trained in one pass, its latest `max_history` items and then the
ones before; an item's bias starts at the logarithm of how often it is a target in train; the loss is a softmax over the
catalog or over sampled items shared by the batch (as in gSASRec and RecTools), or binary cross-entropy (`bce`); no model
has a user embedding, so any history can be scored.

- SASRec: Kang & McAuley 2018, arXiv 1808.09781. Departure: pre-norm residuals x + f(norm(x)) with a norm at the end (as in
  the paper's text; its code normalises only the queries).
- GRU4Rec: Hidasi et al. 2016, arXiv 1511.06939. Departure: item embeddings as input and a linear output layer, where the
  paper feeds one-hot items; batches are windows of users, not session-parallel.
- Caser: Tang & Wang 2018, arXiv 1809.07426. Departures: no user embedding, and so one fully connected layer instead of
  two; one following item is predicted from a window, not the next T.

    model = load_checkpoint("output/sasrec")
    model.scores([[3, 17, 5], [8]])  # histories, oldest item first -> (2, items) float32, higher is better
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn

from minionerec.baselines import counts
from minionerec.baselines.options import CASER_WINDOW
from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, read_json, require_file, write_json


class SequentialModel(nn.Module):
    """What the models share: the item table, padding, scores, losses, saving.

    A model defines `forward(items)`: the state at every position, (rows, length, hidden), of item ids (rows, length)
    padded on the right with `n_items`. A state depends on the items up to its position and on no padding.

    features: (items, dim) frozen item vectors; items are then embedded by a trained projection of them, not by id.
    """

    name: str  # as in --model and in config.json
    sizes: tuple[str, ...]  # keyword arguments that only this model takes, all saved in config.json

    def __init__(
        self,
        *,
        n_items: int,
        max_history: int,
        hidden_size: int,
        dropout: float,
        tie_embeddings: bool = True,
        features: torch.Tensor | None = None,
        feature_dim: int = 0,
    ):
        super().__init__()
        feature_dim = feature_dim if features is None else features.shape[1]
        self.n_items, self.max_history, self.dropout = n_items, max_history, dropout
        self.config = {"n_items": n_items, "max_history": max_history, "hidden_size": hidden_size}
        self.config |= {"dropout": dropout, "tie_embeddings": tie_embeddings, "feature_dim": feature_dim}
        self.hidden_size = hidden_size
        if feature_dim:
            self.register_buffer("features", torch.zeros(n_items, feature_dim) if features is None else features)
            self.items = nn.Sequential(
                nn.Linear(feature_dim, 2 * hidden_size), nn.GELU(), nn.Linear(2 * hidden_size, hidden_size)
            )
        else:
            self.items = nn.Embedding(n_items + 1, hidden_size, padding_idx=n_items)
            nn.init.normal_(self.items.weight, std=0.02)
            nn.init.zeros_(self.items.weight[n_items].detach())
        self.outputs = None if tie_embeddings else nn.Embedding(n_items, hidden_size)
        if self.outputs is not None:
            nn.init.normal_(self.outputs.weight, std=0.02)
        self.bias = nn.Parameter(torch.zeros(n_items))

    def start_from_popularity(self, counts: Sequence[int]) -> None:
        """Set each item's bias to the logarithm of its share of targets (add-one): before training, popularity."""
        counts = torch.tensor(counts, dtype=torch.float64) + 1
        self.bias.data.copy_((counts / counts.mean()).log())

    def table(self) -> torch.Tensor:
        """The input embeddings: (items + 1, hidden); the last row is the padding's, zero."""
        if isinstance(self.items, nn.Embedding):
            return self.items.weight
        return F.pad(self.items(self.features), (0, 0, 0, 1))

    def pad(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """(rows, longest): the latest `max_history` items, padded on the right with `n_items`.

        An empty history is one padding item. Raises `ValueError` for an unknown id.
        """
        recent = [history[-self.max_history :] for history in histories]
        lengths = np.array([len(history) for history in recent], dtype=np.int64)
        flat = np.fromiter(itertools.chain.from_iterable(recent), dtype=np.int64, count=int(lengths.sum()))
        if len(flat) and not 0 <= flat.min() <= flat.max() < self.n_items:
            bad = flat[(flat < 0) | (flat >= self.n_items)][0]
            raise ValueError(f"item {bad} is not in the catalog of 0..{self.n_items - 1} that {self.name} knows")
        padded = np.full((len(recent), max(1, lengths.max(initial=0))), self.n_items)
        padded[np.arange(padded.shape[1]) < lengths[:, None]] = flat
        return torch.from_numpy(padded).to(self.bias.device)

    def embed(self, items: torch.Tensor) -> torch.Tensor:
        """Item ids of any shape -> (..., hidden), zero for padding."""
        real = (items != self.n_items).unsqueeze(-1)
        vectors = self.items(items) if isinstance(self.items, nn.Embedding) else self.table()[items]
        return vectors * math.sqrt(self.hidden_size) * real

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(..., hidden) -> (..., items)."""
        table = self.table()[: self.n_items] if self.outputs is None else self.outputs.weight
        return states @ table.T + self.bias

    @torch.no_grad()
    def scores(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """Score of every item after each history, without dropout.

        histories: item ids, oldest first, of any length; the latest `max_history` count, none is allowed. Returns
        (rows, items) float32 on the model's device; the softmax of a row is the model's next-item distribution if it
        was trained with a softmax. Raises `ValueError` for an id outside the catalog.
        """
        self.eval()
        items = self.pad(histories)
        last = (items != self.n_items).sum(dim=1).clamp(min=1) - 1
        return self.logits(self(items)[torch.arange(len(items)), last])

    def loss(self, items: torch.Tensor, targets: torch.Tensor, *, kind: str = "ce", negatives: int = 0) -> torch.Tensor:
        """Mean loss in nats over the positions that have a target.

        items: (rows, length) as of `pad`; targets: (rows, length), the item to predict at each position, `n_items` where
        there is none. kind:

            ce                softmax over the catalog
            sampled_softmax   softmax over the target and `negatives` items drawn uniformly, shared by the batch
            bce               binary cross-entropy of the target and, averaged, of `negatives` items for each position,
                              drawn uniformly from the items that the row does not hold (SASRec, equation 6)
        """
        places = targets != self.n_items
        states, wanted = self(items)[places], targets[places]
        if kind == "ce":
            return F.cross_entropy(self.logits(states), wanted)
        table = self.table() if self.outputs is None else self.outputs.weight
        if kind == "sampled_softmax":
            drawn = torch.randint(self.n_items, (negatives,), device=wanted.device)
            own = (states * table[wanted]).sum(dim=1, keepdim=True) + self.bias[wanted, None]
            others = states @ table[drawn].T + self.bias[drawn]  # (places, negatives)
            others = others.masked_fill(drawn == wanted[:, None], -torch.inf)
            return F.cross_entropy(torch.cat([own, others], dim=1), torch.zeros_like(wanted))
        seen = torch.cat([items, targets], dim=1).repeat_interleave(places.sum(1), dim=0)
        others = draw_unseen(seen, self.n_items, negatives)
        candidates = torch.cat([wanted[:, None], others], dim=1)  # (places, 1 + negatives)
        logits = (table[candidates] @ states.unsqueeze(-1))[..., 0] + self.bias[candidates]
        return F.softplus(-logits[:, 0]).mean() + F.softplus(logits[:, 1:]).mean()

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.json`, each atomically."""
        with atomic_file(Path(folder) / "model.safetensors", "wb") as f:
            f.write(to_safetensors({name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}))
        write_json(Path(folder) / "config.json", {"model_type": self.name} | self.config)


def draw_unseen(seen: torch.Tensor, n_items: int, count: int) -> torch.Tensor:
    """(rows, count) items drawn uniformly, with replacement, from those not in `seen` (rows, width).

    Ids of `n_items` and more in `seen` are padding. Each row must leave an item: `n_items` > width is enough.
    """
    ordered = seen.sort(dim=1).values
    repeated = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    ordered = ordered.masked_fill(repeated, n_items).sort(dim=1).values  # (rows, width) distinct, then padding
    left = n_items - (ordered < n_items).sum(1, keepdim=True)
    uniform = torch.rand(len(seen), count, dtype=torch.float64, device=seen.device)
    drawn = (uniform * left).long()  # the place among the unseen: each seen item not above it moves it up by one
    for column in ordered.unbind(1):
        drawn += drawn >= column[:, None]
    return drawn


# ------------------------------------------------------------------------------------------------ SASRec


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, *, hidden_size: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.attention_norm, self.feed_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.feed = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, length, hidden) -> the same shape; causal. Padding is on the right, where no real item sees it."""
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.query_key_value(self.attention_norm(x)).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        x = x + F.dropout(self.output(seen.transpose(1, 2).flatten(-2)), dropout)
        return x + F.dropout(self.feed(self.feed_norm(x)), dropout)


class SASRec(SequentialModel):
    """A causal transformer."""

    name = "sasrec"
    sizes = ("num_layers", "num_heads")

    def __init__(self, *, num_layers: int, num_heads: int, **common):
        super().__init__(**common)
        self.config |= {"num_layers": num_layers, "num_heads": num_heads}
        self.positions = nn.Embedding(self.max_history, self.hidden_size)  # row i is the i-th item of the window
        nn.init.normal_(self.positions.weight, std=0.02)
        sizes = {"hidden_size": self.hidden_size, "num_heads": num_heads, "dropout": self.dropout}
        self.blocks = nn.Sequential(*(Block(**sizes) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(self.hidden_size)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        x = self.embed(items) + self.positions.weight[: items.shape[1]]
        return self.norm(self.blocks(F.dropout(x, self.dropout, self.training)))


# ------------------------------------------------------------------------------------------------ GRU4Rec


class GRU4Rec(SequentialModel):
    """A gated recurrent network over the items, from the oldest to the latest."""

    name = "gru4rec"
    sizes = ("num_layers",)

    def __init__(self, *, num_layers: int, **common):
        super().__init__(**common)
        self.config |= {"num_layers": num_layers}
        between = self.dropout if num_layers > 1 else 0.0  # nn.GRU has dropout between layers only
        self.gru = nn.GRU(self.hidden_size, self.hidden_size, num_layers, batch_first=True, dropout=between)
        self.output = nn.Linear(self.hidden_size, self.hidden_size)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        states, _ = self.gru(F.dropout(self.embed(items), self.dropout, self.training))
        return self.output(F.dropout(states, self.dropout, self.training))


# ------------------------------------------------------------------------------------------------ Caser


class Caser(SequentialModel):
    """Convolutions over the last `window` items as an image (items, hidden)."""

    name = "caser"
    sizes = ("num_filters", "filter_sizes", "num_vertical")

    def __init__(self, *, num_filters: int, filter_sizes: Sequence[int], num_vertical: int, **common):
        super().__init__(**common)
        self.config |= {"num_filters": num_filters, "filter_sizes": list(filter_sizes), "num_vertical": num_vertical}
        hidden_size = self.hidden_size
        self.window = min(CASER_WINDOW, self.max_history)
        self.horizontal = nn.ModuleList(nn.Conv1d(hidden_size, num_filters, height) for height in filter_sizes)
        self.vertical = nn.Linear(self.window, num_vertical, bias=False)
        self.output = nn.Linear(num_filters * len(filter_sizes) + num_vertical * hidden_size, hidden_size)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        rows, length = items.shape
        windows = F.pad(items, (self.window - 1, 0), value=self.n_items).unfold(1, self.window, 1)
        image = self.embed(windows.flatten(0, 1)).transpose(1, 2)  # (rows * length, hidden, window)
        across = [F.relu(filters(image)).amax(-1) for filters in self.horizontal]  # each (rows * length, filters)
        both = torch.cat([*across, self.vertical(image).flatten(1)], dim=1)
        states = F.relu(self.output(F.dropout(both, self.dropout, self.training)))
        return states.unflatten(0, (rows, length))


# ------------------------------------------------------------------------------------------------ checkpoints

MODELS: dict[str, type[SequentialModel]] = {model.name: model for model in (SASRec, GRU4Rec, Caser)}
LOADABLE = MODELS | counts.MODELS


def load_checkpoint(folder: str | Path, flag: str = "baseline_path", n_items: int | None = None) -> SequentialModel:
    """The model that `SequentialModel.save` wrote, on the CPU, ready for `scores`.

    `n_items` is the size of the catalog it is to serve, if that is known. Raises `UserError`, naming the flag, if the
    folder holds anything else or a model of another catalog. Nothing is unpickled.
    """
    weights = require_file(require_file(folder, flag) / "model.safetensors", flag)
    config = read_json(Path(folder) / "config.json", flag)
    try:
        kind = LOADABLE[config.pop("model_type", None)]
        model = kind(**config)
        model.load_state_dict(load_file(weights))
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: not a model that sasrec.py saved ({error}); check --{flag}") from None
    bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise UserError(f"{folder}: the weight {bad[0]} has NaN or infinite values; train it again or check --{flag}")
    if n_items is not None and n_items != model.n_items:
        raise UserError(
            f"{folder}: trained on a catalog of {model.n_items} items, and this one has {n_items}; "
            f"train it again on these files (sasrec.sh) or check --{flag}"
        )
    return model.eval()
