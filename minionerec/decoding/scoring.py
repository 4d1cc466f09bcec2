"""Log-probabilities of given SIDs after each prompt, by teacher forcing: the prompt is encoded once for all of them."""

import torch

from minionerec.catalog.trie import Trie
from minionerec.decoding.lm_head import LMHead, allowed_log_probs
from minionerec.decoding.tree_attention import PromptTree, require_tree_attention


def score_rows(
    model,
    trie: Trie,
    paths: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    rows: torch.Tensor,
    space: str = "catalog",
) -> torch.Tensor:
    """Log-probabilities in nats of the SIDs `rows` (prompts, n) after each prompt: (prompts, n), -inf where a row is -1.

    The sums of `level_scores` over levels.
    """
    return level_scores(model, trie, paths, input_ids, attention_mask, rows, space).sum(dim=2)


@torch.no_grad()
def level_scores(
    model,
    trie: Trie,
    paths: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    rows: torch.Tensor,
    space: str = "catalog",
) -> torch.Tensor:
    """Log-probabilities in nats of each level of the SIDs `rows` (prompts, n) given the levels before: (prompts, n, depth).

    0 after the end of a shorter SID, -inf where a row is -1. paths: (SIDs, depth + 1) the trie's nodes along each SID, as
    of `sid_paths`; input_ids, attention_mask: (prompts, length), padded on either side. A restriction of the trie by prompt
    is part of the normaliser in space `catalog`, as it is in `beam_search`; a SID that it excludes has -inf.
    """
    require_tree_attention(model)
    trie, head = trie.to(input_ids.device), LMHead.of(model)
    tree = PromptTree(model, input_ids, attention_mask)
    nodes = paths.to(rows.device)[rows.clamp(min=0)]  # (prompts, n, depth + 1)
    found = torch.zeros(*rows.shape, trie.depth, device=rows.device)
    own = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    for depth in range(trie.depth):
        node, child = nodes[..., depth], nodes[..., depth + 1]
        running = trie.leaf[node] < 0
        log_probs, allowed = allowed_log_probs(
            head, tree.hidden, trie, node[:, : tree.hidden.shape[1]], space=space, level=depth
        )
        width = (*rows.shape, log_probs.shape[-1])
        chosen = (allowed.node.expand(width) == child.unsqueeze(-1)) & allowed.mask.expand(width)
        value = log_probs.expand(width).masked_fill(~chosen, -torch.inf).amax(dim=-1)
        found[..., depth] = value.masked_fill(~running, 0.0)
        if depth + 1 < trie.depth:
            token = (allowed.token.expand(width) * chosen).sum(dim=-1)
            tree.grow(token, own if depth else torch.zeros_like(own))
    return found.masked_fill((rows < 0).unsqueeze(-1), -torch.inf)


def sid_paths(trie: Trie) -> torch.Tensor:
    """The nodes along each SID, root first: (SIDs, depth + 1); a shorter SID repeats its leaf."""
    parent = torch.repeat_interleave(torch.arange(len(trie.leaf)), (trie.start[1:] - trie.start[:-1]).cpu())
    parent = torch.cat([parent.new_zeros(1), parent])  # of each node; edge e leads to node e + 1
    node = torch.empty(trie.n_leaves, dtype=torch.long)
    ends = (trie.leaf >= 0).nonzero().squeeze(1).cpu()
    node[trie.leaf.cpu()[ends]] = ends
    level = torch.zeros(len(parent), dtype=torch.long)
    for _ in range(trie.depth):  # a node is one level below its parent; the root stays at 0
        level[1:] = level[parent[1:]] + 1
    path = [node]
    for _ in range(trie.depth):
        path.append(parent[path[-1]])
    # path: leaf, parent, …, root, root …; a SID of length n has its root at place n
    stacked = torch.stack(path, dim=1)  # (SIDs, depth + 1)
    place = level[node][:, None] - torch.arange(trie.depth + 1)
    return stacked.gather(1, place.clamp(min=0))
