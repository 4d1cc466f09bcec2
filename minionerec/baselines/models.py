"""Next-item models over item ids: SASRec, GRU4Rec and Caser, their losses and their checkpoints.

A model turns a history into a state. An item's score is its output embedding times the state, plus its bias. The output
embeddings are the input embeddings (`tie_embeddings`) or a separate table.

Departures from all three papers: histories are the latest `max_history` items, padded on the left; an item's bias starts
at the logarithm of how often it is a target in train; the loss is softmax cross-entropy over the whole catalog or, as
`bce`, binary cross-entropy of the target and of sampled items; no model has a user embedding, so any history can be
scored.

- SASRec: Kang & McAuley 2018, arXiv 1808.09781. Departures:
    1. pre-norm residuals x + f(norm(x)) with a norm at the end (as in the paper's text; its code normalises only the queries);
    2. attention never sees padding.
- GRU4Rec: Hidasi et al. 2016, arXiv 1511.06939. Departures:
    1. item embeddings as input and a linear output layer, where the paper feeds one-hot items;
    2. rows are windows of one user instead of session-parallel mini-batches; the losses are not BPR or TOP1.
- Caser: Tang & Wang 2018, arXiv 1809.07426. Departures:
    1. no user embedding, and so one fully connected layer instead of two;
    2. one following item is predicted from a window, not the next T.

    model = load_checkpoint("output/sasrec")
    model.scores([[3, 17, 5], [8]])  # histories, oldest item first -> (2, items) float32, higher is better
"""

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn

from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, read_json, require_file, write_json


class SequentialModel(nn.Module):
    """What the models share: embeddings, padding, scores, losses, saving.

    A model defines `forward(histories, keep)`: states of the last `keep` positions, (rows, keep, hidden), of histories
    (rows, length) that `pad` returned. A position's state depends on the items up to it and not on padding.
    """

    name: str  # as in --model and in config.json
    sizes: tuple[str, ...]  # keyword arguments that only this model has; saved in config.json

    def __init__(
        self, *, n_items: int, max_history: int, hidden_size: int, dropout: float, tie_embeddings: bool = True
    ):
        super().__init__()
        self.n_items, self.max_history, self.dropout = n_items, max_history, dropout
        self.config = {"n_items": n_items, "max_history": max_history, "hidden_size": hidden_size}
        self.config |= {"dropout": dropout, "tie_embeddings": tie_embeddings}
        self.items = nn.Embedding(n_items + 1, hidden_size, padding_idx=n_items)
        self.outputs = None if tie_embeddings else nn.Embedding(n_items, hidden_size)
        self.bias = nn.Parameter(torch.zeros(n_items))
        for embedding in filter(None, (self.items, self.outputs)):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.zeros_(self.items.weight[n_items].detach())

    def start_from_popularity(self, counts: Sequence[int]) -> None:
        """Set each item's bias to the logarithm of its share of targets, with add-one smoothing."""
        counts = torch.tensor(counts, dtype=torch.float64) + 1
        self.bias.data.copy_((counts / counts.mean()).log())

    def pad(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """(rows, max_history): the latest items, padded on the left with `n_items`; `ValueError` for an unknown id."""
        recent = [history[-self.max_history :] for history in histories]
        lengths = np.array([len(history) for history in recent], dtype=np.int64)
        flat = np.fromiter(chain.from_iterable(recent), dtype=np.int64, count=int(lengths.sum()))
        if len(flat) and not 0 <= flat.min() <= flat.max() < self.n_items:
            bad = flat[(flat < 0) | (flat >= self.n_items)][0]
            raise ValueError(f"item {bad} is not in the catalog of 0..{self.n_items - 1} that {self.name} knows")
        padded = np.full((len(recent), self.max_history), self.n_items)
        padded[np.arange(self.max_history) >= self.max_history - lengths[:, None]] = flat
        return torch.from_numpy(padded).to(self.items.weight.device)

    def embed(self, histories: torch.Tensor) -> torch.Tensor:
        """Item ids of any shape -> (..., hidden), zero for padding, whatever its embedding is."""
        real = (histories != self.n_items).unsqueeze(-1)
        return self.items(histories) * math.sqrt(self.items.embedding_dim) * real

    def states_at(self, histories: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """States where `places` (rows, length) is true: (places, hidden)."""
        return self(histories, histories.shape[1])[places]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(..., hidden) -> (..., items)."""
        table = self.items.weight[: self.n_items] if self.outputs is None else self.outputs.weight
        return states @ table.T + self.bias

    @torch.no_grad()
    def scores(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """Score of every item after each history, without dropout.

        histories: item ids, oldest first, of any length; the latest `max_history` are used; a history may be empty.
        Returns (rows, items) float32 on the model's device. If the model was trained by cross-entropy, the softmax of
        a row is its next-item distribution. Raises `ValueError` for an id outside the catalog.
        """
        self.eval()
        return self.logits(self(self.pad(histories), 1)[:, 0])

    def loss(
        self, histories: torch.Tensor, targets: torch.Tensor, *, every_position: bool, negatives: int = 0
    ) -> torch.Tensor:
        """Mean loss over positions in nats; histories: (rows, length) that `pad` returned; targets: (rows,).

        `every_position` predicts each item after the first; otherwise only the target is predicted. Without
        `negatives` the loss is softmax cross-entropy. With them it is binary cross-entropy of the next item plus the
        mean over `negatives` items drawn uniformly from those not in the row (SASRec, equation 6).
        """
        following = torch.cat([histories[:, 1:], targets[:, None]], dim=1)
        if every_position:
            places = histories != self.n_items
        else:
            places = torch.zeros_like(histories, dtype=torch.bool)
            places[:, -1] = True
        states = self.states_at(histories, places) if every_position else self(histories, 1)[:, 0]
        wanted = following[places]
        if not negatives:
            return F.cross_entropy(self.logits(states), wanted)
        row = torch.cat([histories, targets[:, None]], dim=1)
        others = draw_unseen(row.repeat_interleave(places.sum(1), dim=0), self.n_items, negatives)
        candidates = torch.cat([wanted[:, None], others], dim=1)  # (places, 1 + negatives)
        table = self.items if self.outputs is None else self.outputs
        logits = (table(candidates) @ states.unsqueeze(-1))[..., 0] + self.bias[candidates]
        return F.softplus(-logits[:, 0]).mean() + F.softplus(logits[:, 1:]).mean()

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.json`, each atomically."""
        with atomic_file(Path(folder) / "model.safetensors", "wb") as f:
            f.write(to_safetensors({name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}))
        write_json(Path(folder) / "config.json", {"model_type": self.name} | self.config)


def draw_unseen(seen: torch.Tensor, n_items: int, count: int) -> torch.Tensor:
    """(rows, count) items drawn uniformly, with replacement, from those not in `seen` (rows, width).

    Ids of `n_items` and more in `seen` are padding. Each row must leave at least one item; `n_items` > width suffices.
    """
    ordered = seen.sort(dim=1).values
    repeated = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    ordered = ordered.masked_fill(repeated, n_items).sort(dim=1).values  # (rows, width) distinct, then padding
    left = n_items - (ordered < n_items).sum(1, keepdim=True)
    uniform = torch.rand(len(seen), count, dtype=torch.float64, device=seen.device)
    drawn = (uniform * left).long()  # index among unseen items; each seen item at or below it adds one
    for column in ordered.unbind(1):
        drawn += drawn >= column[:, None]
    return drawn


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), for the last `keep` positions."""

    def __init__(self, *, hidden_size: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.attention_norm, self.feed_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.query, self.key_value = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, 2 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.feed = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor, keep: int) -> torch.Tensor:
        """x: (rows, length, hidden); mask: (rows, 1, length, length), True where seen -> (rows, keep, hidden)."""
        normed, x = self.attention_norm(x), x[:, -keep:]
        query = self.query(normed[:, -keep:])
        key, value = self.key_value(normed).chunk(2, dim=-1)
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(query, key, value, mask[:, :, -keep:], dropout)
        x = x + F.dropout(self.output(seen.transpose(1, 2).flatten(-2)), dropout)
        return x + F.dropout(self.feed(self.feed_norm(x)), dropout)


class SASRec(SequentialModel):
    """A causal transformer."""

    name = "sasrec"
    sizes = ("num_layers", "num_heads")

    def __init__(self, *, num_layers: int, num_heads: int, **common):
        super().__init__(**common)
        self.config |= {"num_layers": num_layers, "num_heads": num_heads}
        hidden_size = self.items.embedding_dim
        self.positions = nn.Embedding(self.max_history, hidden_size)  # the last row is the latest item's
        nn.init.normal_(self.positions.weight, std=0.02)
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "dropout": self.dropout}
        self.blocks = nn.ModuleList(Block(**sizes) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, histories: torch.Tensor, keep: int) -> torch.Tensor:
        length = histories.shape[1]
        x = F.dropout(self.embed(histories) + self.positions.weight[-length:], self.dropout, self.training)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        own = torch.eye(length, dtype=torch.bool, device=x.device)  # no empty softmax for padding
        mask = ((histories != self.n_items)[:, None, None] & causal) | own  # (rows, 1, length, length)
        for block in self.blocks[:-1]:
            x = block(x, mask, length)
        return self.norm(self.blocks[-1](x, mask, keep))


class GRU4Rec(SequentialModel):
    """A gated recurrent network over the items, from the oldest to the latest."""

    name = "gru4rec"
    sizes = ("num_layers",)

    def __init__(self, *, num_layers: int, **common):
        super().__init__(**common)
        self.config |= {"num_layers": num_layers}
        hidden_size = self.items.embedding_dim
        between = self.dropout if num_layers > 1 else 0.0  # nn.GRU applies dropout only between layers
        self.gru = nn.GRU(hidden_size, hidden_size, num_layers, batch_first=True, dropout=between)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, histories: torch.Tensor, keep: int) -> torch.Tensor:
        length = histories.shape[1]
        # Items first, padding last, because a later input cannot change an earlier state.
        padding = (histories == self.n_items).sum(1, keepdim=True)
        place = torch.arange(length, device=histories.device).expand_as(histories)
        x = self.embed(histories.gather(1, (place + padding) % length))
        states, _ = self.gru(F.dropout(x, self.dropout, self.training))
        back = ((place - padding) % length)[:, -keep:, None].expand(-1, -1, states.shape[-1])
        return self.output(F.dropout(states.gather(1, back), self.dropout, self.training))


class Caser(SequentialModel):
    """Convolutions over the last `max_history` items as an image (items, hidden)."""

    name = "caser"
    sizes = ("num_filters", "filter_sizes", "num_vertical")

    def __init__(self, *, num_filters: int, filter_sizes: Sequence[int], num_vertical: int, **common):
        super().__init__(**common)
        self.config |= {"num_filters": num_filters, "filter_sizes": list(filter_sizes), "num_vertical": num_vertical}
        hidden_size = self.items.embedding_dim
        self.horizontal = nn.ModuleList(nn.Conv1d(hidden_size, num_filters, height) for height in filter_sizes)
        self.vertical = nn.Linear(self.max_history, num_vertical, bias=False)
        self.output = nn.Linear(num_filters * len(filter_sizes) + num_vertical * hidden_size, hidden_size)

    def windows(self, histories: torch.Tensor) -> torch.Tensor:
        """(rows, length) -> (rows, length, max_history): the items up to each position, padded on the left."""
        return F.pad(histories, (self.max_history - 1, 0), value=self.n_items).unfold(1, self.max_history, 1)

    def encode(self, windows: torch.Tensor) -> torch.Tensor:
        """(n, max_history) -> (n, hidden)."""
        image = self.embed(windows)  # (n, max_history, hidden)
        image = image.transpose(1, 2)
        across = [F.relu(filters(image)).amax(-1) for filters in self.horizontal]  # each (n, filters)
        both = torch.cat([*across, self.vertical(image).flatten(1)], dim=1)
        return F.relu(self.output(F.dropout(both, self.dropout, self.training)))

    def states_at(self, histories: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return self.encode(self.windows(histories)[places])

    def forward(self, histories: torch.Tensor, keep: int) -> torch.Tensor:
        windows = self.windows(histories)[:, -keep:]
        return self.encode(windows.flatten(0, 1)).unflatten(0, windows.shape[:2])


MODELS: dict[str, type[SequentialModel]] = {model.name: model for model in (SASRec, GRU4Rec, Caser)}


def load_checkpoint(folder: str | Path, flag: str = "cf_path", n_items: int | None = None) -> SequentialModel:
    """The model that `SequentialModel.save` wrote, on the CPU, in evaluation mode.

    n_items: size of the catalog that it must match, if known. Raises `UserError`, naming the flag, if the folder has no
    such model or a model of another catalog. Nothing is unpickled.
    """
    weights = require_file(require_file(folder, flag) / "model.safetensors", flag)
    config = read_json(Path(folder) / "config.json", flag)
    try:
        kind = MODELS[config.pop("model_type", None)]
        model = kind(**config)
        model.load_state_dict(load_file(weights))
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: not a model that sasrec.py saved ({error}); check --{flag}") from None
    if n_items is not None and n_items != model.n_items:
        raise UserError(
            f"{folder}: trained on a catalog of {model.n_items} items, and this one has {n_items}; "
            f"train it again on these files (sasrec.sh) or check --{flag}"
        )
    return model.eval()
