"""The catalog as a filter of logits, for engines that run the model themselves (vllm_engine.py).

A request begins at a trie node, the root unless it says otherwise, and may have SIDs excluded. Each step, `reach` finds
its node from the tokens generated so far, and `constrain` replaces its logits. Both work on all rows at once, on the
device of their arguments, without waiting for it.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from minionerec.catalog.trie import Trie


class State(NamedTuple):
    """Where each row is in the trie."""

    node: torch.Tensor  # (rows,)
    inside: torch.Tensor  # (rows,) False where the tokens have left the trie


def reach(trie: Trie, start: torch.Tensor, tokens: torch.Tensor) -> State:
    """The nodes after `tokens` (rows, length), -1 where there is none, from the nodes `start` (rows,).

    A leaf keeps its row, whatever follows.
    """
    node, inside = start, torch.ones_like(start, dtype=torch.bool)
    for token in tokens.unbind(1):
        allowed = trie.allowed(node)
        hit = allowed.mask & (allowed.token == token.unsqueeze(1))
        found = hit.any(dim=1)
        inside = inside & (found | (token < 0) | (trie.leaf[node] >= 0))
        node = torch.where(found, (allowed.node * hit).sum(dim=1), node)
    return State(node, inside)


def constrain(
    trie: Trie,
    state: State,
    logits: torch.Tensor,
    temperature: torch.Tensor,
    divisor: torch.Tensor,
    space: str,
    end_token: int,
    excluded: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits that are log-probabilities in nats once the engine has divided them by `divisor`; -inf where forbidden.

    logits: (rows, vocabulary); temperature, divisor: (rows,); excluded: (rows, most) nodes that may not be entered,
    sorted, padded at the end with any number above all nodes. A token t that may follow gets divisor · log p(t), with p
    the softmax of logits / temperature over the vocabulary or over the allowed tokens (`space`). At a leaf, outside the
    trie and where everything is excluded, only `end_token` may follow.
    """
    allowed = trie.allowed(state.node)
    mask = allowed.mask & state.inside.unsqueeze(1)
    if excluded is not None:
        place = torch.searchsorted(excluded, allowed.node).clamp(max=excluded.shape[1] - 1)
        mask = mask & (excluded.gather(1, place) != allowed.node)
    temperature, divisor = temperature.unsqueeze(1), divisor.unsqueeze(1)
    values = logits.gather(1, allowed.token).float() / temperature
    values = values.masked_fill(~mask, -torch.inf)
    total = values if space == "catalog" else logits.float() / temperature
    kept = (divisor * (values - total.logsumexp(dim=1, keepdim=True))).masked_fill(~mask, -torch.inf)
    result = torch.full_like(logits, -torch.inf, dtype=torch.float32)
    result.scatter_reduce_(1, allowed.token, kept, "amax")  # padding is token 0 with -inf
    result[:, end_token] = torch.where(mask.any(dim=1), result[:, end_token], 0.0)
    return result


class Exclusions:
    """The nodes that excluded SIDs close, for the trie of one engine."""

    def __init__(self, trie: Trie):
        children = trie.start[1:] - trie.start[:-1]
        parent = torch.repeat_interleave(torch.arange(len(children)), children.cpu())  # of nodes 1, 2, …
        self.trie, self.parent = trie.to("cpu"), torch.cat([parent.new_zeros(1), parent])
        self.closed = lru_cache(maxsize=1024)(self._closed)

    def _closed(self, rows: tuple[int, ...]) -> torch.Tensor:
        """The topmost nodes below the root that lead only to SIDs of `rows`, in order."""
        left = torch.ones(self.trie.n_leaves, dtype=torch.bool)
        left[list(rows)] = False
        dead = self.trie.restrict(left).reachable == 0
        dead[0] = False
        return (dead & ~dead[self.parent]).nonzero().flatten()

    def table(self, excluded: Sequence[tuple[int, ...]]) -> torch.Tensor | None:
        """The nodes closed for each request as `constrain` takes them; None if nothing is excluded."""
        if not any(excluded):
            return None
        closed = [self.closed(rows) for rows in excluded]
        beyond = len(self.parent)
        return torch.nn.utils.rnn.pad_sequence(closed, batch_first=True, padding_value=beyond)
