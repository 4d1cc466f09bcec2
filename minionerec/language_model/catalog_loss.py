"""Cross-entropy of SID tokens, normalised over the tokens that the trie allows.

    loss = -(1 - s) * log p(target) - s * mean over the allowed tokens of log p      s: label smoothing in [0, 1)

A level at which a prefix has one child costs nothing, and only the level's rows of the LM head are multiplied. It is the
distribution that decoding uses in space `catalog` (minionerec/decoding/lm_head.py).
"""

import torch

from minionerec.catalog.trie import Trie
from minionerec.common.errors import UserError
from minionerec.decoding.lm_head import LMHead, allowed_log_probs


class SidTokens:
    """The levels and trie nodes of SID tokens, found from the tokens of whole SIDs."""

    def __init__(self, trie: Trie, vocabulary: int):
        """Raises `UserError` where a token is at two levels: its level could not be told from the token."""
        self.trie, self.vocabulary = trie, vocabulary
        self.level = torch.full((vocabulary,), -1)  # of each token id, -1 for one that is in no SID
        for level, (low, high) in enumerate(trie.columns):
            own = trie.tokens[low:high].cpu()
            if (self.level[own] >= 0).any():
                raise UserError(
                    "--train_space catalog: a level token is at two levels of the SIDs; use --train_space vocab, or "
                    "another index, with tokens like <a_1> <b_1> <c_1>"
                )
            self.level[own] = level
        parent = torch.repeat_interleave(torch.arange(len(trie.leaf)), (trie.start[1:] - trie.start[:-1]).cpu())
        self.edges = parent * vocabulary + trie.child_token.cpu()  # sorted: edge e goes to node e + 1

    def to(self, device) -> "SidTokens":
        self.trie, self.level, self.edges = self.trie.to(device), self.level.to(device), self.edges.to(device)
        return self

    def paths(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(node before, node after, level) of each of `tokens` (n,), the tokens of whole SIDs one after the other."""
        level = self.level[tokens]
        before, after = torch.zeros_like(tokens), torch.zeros_like(tokens)
        for depth in range(self.trie.depth):
            own = (level == depth).nonzero().squeeze(1)
            if depth:
                before[own] = after[own - 1]
            after[own] = torch.searchsorted(self.edges, before[own] * self.vocabulary + tokens[own]) + 1
        return before, after, level


def catalog_loss(
    head: LMHead, hidden: torch.Tensor, tokens: torch.Tensor, sids: SidTokens, smoothing: float = 0.0
) -> torch.Tensor:
    """The sum over SID tokens, in nats.

    hidden: (n, dim), the states that predict `tokens` (n,), which are those of whole SIDs, one after the other.
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    before, after, levels = sids.paths(tokens)
    for level in range(sids.trie.depth):
        own = levels == level
        log_probs, allowed = allowed_log_probs(head, hidden[own], sids.trie, before[own], space="catalog", level=level)
        finite = log_probs.masked_fill(~allowed.mask, 0.0)  # (tokens of the level, width)
        chosen = (allowed.node == after[own, None]) & allowed.mask
        total = total - (1 - smoothing) * (finite * chosen).sum()
        if smoothing:
            total = total - smoothing * (finite.sum(dim=-1) / allowed.mask.sum(dim=-1)).sum()
    return total
