"""Cross-entropy of SID tokens, normalised over the tokens that the trie allows.

    loss = -(1 - s) * log p(target) - s * mean over the allowed tokens of log p      s: label smoothing in [0, 1)

A level at which a prefix has one child costs nothing, and only the level's rows of the LM head are multiplied. It is the
distribution that decoding uses in space `catalog` (minionerec/decoding/lm_head.py).
"""

import torch

from minionerec.catalog.trie import Trie
from minionerec.decoding.lm_head import LMHead, allowed_log_probs


def catalog_loss(
    head: LMHead,
    hidden: torch.Tensor,
    trie: Trie,
    node: torch.Tensor,
    child: torch.Tensor,
    level: torch.Tensor,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """The sum over SID tokens, in nats.

    hidden: (tokens, dim), the state that predicts each token; node, child: (tokens,), the trie's nodes before and after
    it; level: (tokens,), its level, from 0.
    """
    total = hidden.new_zeros(())
    for depth in level.unique().tolist():
        own = level == depth
        log_probs, allowed = allowed_log_probs(head, hidden[own], trie, node[own], space="catalog", level=depth)
        finite = log_probs.masked_fill(~allowed.mask, 0.0)  # (tokens, width)
        chosen = (allowed.node == child[own, None]) & allowed.mask
        total = total - (1 - smoothing) * (finite * chosen).sum()
        if smoothing:
            total = total - smoothing * (finite.sum(dim=-1) / allowed.mask.sum(dim=-1)).sum()
    return total
