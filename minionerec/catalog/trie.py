"""A token trie as CSR tensors: which tokens may follow a prefix, on the device, for many prefixes in one call.

In the manner of "Vectorizing the Trie" (STATIC, arXiv 2602.22647), with the leaves below each node, so that the trie can
be restricted to some of its sequences without building it again.

    trie = Trie.build([[5, 6, 7], [5, 6, 8], [4, 1, 1]])
    trie.allowed(torch.tensor(0)).token        # tensor([4, 5]): what may come first
"""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch

from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, require_file


class Allowed(NamedTuple):
    """What may follow some nodes. All are (..., width); width is the most children that a node of the level has."""

    token: torch.Tensor  # token ids; 0 where padded
    node: torch.Tensor  # the child nodes; 0 where padded
    mask: torch.Tensor  # True where there is a child
    column: torch.Tensor  # places of the tokens in `Trie.tokens`; 0 where padded


class Trie(NamedTuple):
    """A token trie as CSR tensors. Node 0 is the root; nodes are numbered level by level, parents in order.

    The children of node i are the edges `start[i]` to `start[i + 1]`, sorted by token; edge e leads by the token
    `child_token[e]` to node e + 1. The leaves below node i are `order[first[i]:last[i]]`. `widths` and `columns` are kept
    on the host, so that decoding never waits for the device.
    """

    start: torch.Tensor  # (nodes + 1,)
    child_token: torch.Tensor  # (edges,)
    child_column: torch.Tensor  # (edges,) place of the token in `tokens`
    tokens: torch.Tensor  # the distinct tokens, in order of the first level that has them
    leaf: torch.Tensor  # (nodes,) row of the sequence that ends here, -1 inside
    order: torch.Tensor  # (leaves,) rows of the sequences in token order
    first: torch.Tensor  # (nodes,) where the leaves below a node begin in `order`
    last: torch.Tensor  # (nodes,) where they end (exclusive)
    reachable: torch.Tensor  # (nodes,) or (prompts, nodes) leaves below a node that may be generated
    depth: int  # tokens of the longest sequence
    n_leaves: int
    widths: tuple[int, ...]  # the most children of a node, for each level
    columns: tuple[tuple[int, int], ...]  # the range of `tokens` that holds all of a level's, for each level

    @classmethod
    def build(cls, sequences: Sequence[Sequence[int]] | np.ndarray) -> "Trie":
        """From distinct, prefix-free token sequences; leaf i is sequence i. Raises `ValueError` otherwise.

        An array (sequences, depth) of ids is used unchanged, -1 after the end of a shorter one.
        """
        tokens = sequences if isinstance(sequences, np.ndarray) else _padded(sequences)
        n, depth = tokens.shape
        order = np.lexsort(tokens.T[::-1])
        tokens = tokens[order]
        lengths = (tokens >= 0).sum(axis=1)

        child_token, parents, leaves, first_leaf, below = [], [], [np.array([-1])], [np.array([0])], [np.array([n])]
        node = np.zeros(n, dtype=np.int64)  # each sequence's node at the level above
        new_prefix = np.zeros(n, dtype=bool)
        new_prefix[0] = True
        n_nodes, bounds = 1, [0, 1]  # bounds: nodes of level l are bounds[l] to bounds[l + 1]
        for level in range(depth):
            alive = lengths > level
            new_prefix = new_prefix | np.concatenate([[True], tokens[1:, level] != tokens[:-1, level]])
            first = new_prefix & alive  # the first sequence under each node of this level
            parents.append(node[first])
            child_token.append(tokens[first, level])
            place = np.cumsum(first) - 1
            node = n_nodes + place
            n_nodes += int(first.sum())
            leaf = np.full(int(first.sum()), -1)
            ends = lengths == level + 1
            leaf[place[ends]] = order[ends]
            leaves.append(leaf)
            first_leaf.append(np.flatnonzero(first))
            below.append(np.bincount(place[alive], minlength=int(first.sum())))
            bounds.append(n_nodes)
        leaf = np.concatenate(leaves)
        children = np.bincount(np.concatenate(parents), minlength=n_nodes)
        if (leaf >= 0).sum() != n or (children[leaf >= 0] > 0).any():
            raise ValueError("sequences must be distinct and none may be a prefix of another")

        distinct, first_edge, column = np.unique(np.concatenate(child_token), return_index=True, return_inverse=True)
        by_level = np.argsort(first_edge, kind="stable")  # edges come level by level
        column = np.argsort(by_level)[column]
        levels = [slice(bounds[i] - 1, bounds[i + 1] - 1) for i in range(1, depth + 1)]  # edges into each level
        first_leaf, below = np.concatenate(first_leaf), np.concatenate(below)
        tensors = {
            "start": np.concatenate([[0], np.cumsum(children)]),
            "child_token": np.concatenate(child_token),
            "child_column": column,
            "tokens": distinct[by_level],
            "leaf": leaf,
            "order": order,
            "first": first_leaf,
            "last": first_leaf + below,
            "reachable": below,
        }
        return cls(
            **{name: torch.from_numpy(array.astype(np.int64)) for name, array in tensors.items()},
            depth=depth,
            n_leaves=n,
            widths=tuple(int(children[bounds[i] : bounds[i + 1]].max()) for i in range(depth)),
            columns=tuple((int(column[edges].min()), int(column[edges].max()) + 1) for edges in levels),
        )

    def save(self, path: str | Path) -> None:
        """Write the trie and its restriction as safetensors, atomically."""
        fields = self._asdict()
        tensors = {name: value.contiguous() for name, value in fields.items() if isinstance(value, torch.Tensor)}
        facts = {name: value for name, value in fields.items() if name not in tensors}
        with atomic_file(path, "wb") as f:
            f.write(safetensors.torch.save(tensors, {"trie": json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | Path, flag: str = "trie") -> "Trie":
        """The trie that `save` wrote, on the CPU; raises `UserError` for any other file."""
        try:
            with safetensors.safe_open(require_file(path, flag), "pt") as f:
                facts = json.loads(f.metadata()["trie"])
                facts["columns"] = tuple(map(tuple, facts["columns"]))
                facts["widths"] = tuple(facts["widths"])
                return cls(**{name: f.get_tensor(name) for name in f.keys()}, **facts)
        except (safetensors.SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"{path}: not a saved trie ({error}); save it again or check --{flag}") from None

    def to(self, device) -> "Trie":
        return self._replace(**{k: v.to(device) for k, v in self._asdict().items() if isinstance(v, torch.Tensor)})

    def reachable_below(self, nodes: torch.Tensor) -> torch.Tensor:
        """How many leaves below each of `nodes` may be generated. (...) or, restricted by prompt, (prompts, ...)."""
        if self.reachable.ndim == 1:
            return self.reachable[nodes]
        return self.reachable.gather(1, nodes.flatten(1)).view(nodes.shape)

    def allowed(self, nodes: torch.Tensor, level: int | None = None) -> Allowed:
        """What may follow each of `nodes` (any shape; where the trie is restricted by prompt, one row a prompt).

        level: the depth of all of `nodes`; the result is padded to the widest node of that level, or of the whole trie if
        it is None. A leaf allows nothing.
        """
        begin, end = self.start[nodes], self.start[nodes + 1]
        width = max(self.widths) if level is None else self.widths[level]
        edge = begin.unsqueeze(-1) + torch.arange(width, device=nodes.device)
        mask = edge < end.unsqueeze(-1)
        edge = edge.masked_fill(~mask, 0)
        mask = mask & (self.reachable_below(edge + 1) > 0)
        return Allowed(self.child_token[edge] * mask, (edge + 1) * mask, mask, self.child_column[edge] * mask)

    def restrict(self, leaves: torch.Tensor) -> "Trie":
        """The same trie, in which only the leaves marked True may be generated; nothing is built again.

        leaves: (leaves,), or (prompts, leaves) to restrict each prompt differently. Replaces an earlier restriction.
        """
        total = leaves[..., self.order].cumsum(dim=-1)
        total = torch.cat([total.new_zeros((*total.shape[:-1], 1)), total], dim=-1)
        return self._replace(reachable=total[..., self.last] - total[..., self.first])

    def without(self, excluded: Sequence[Sequence[int]] | None) -> "Trie":
        """The trie without the leaves `excluded` of each prompt, rows of SIDs; None, or nothing but empty lists: itself."""
        if not any(excluded or ()):
            return self
        left = torch.ones(len(excluded), self.n_leaves, dtype=torch.bool)
        for prompt, rows in enumerate(excluded):
            left[prompt, rows] = False
        return self.restrict(left.to(self.order.device))

    def walk(self, tokens: torch.Tensor) -> torch.Tensor:
        """The node before each token of each sequence, and the one after the last.

        tokens: (..., length) from the root; anything may follow a leaf. Returns (..., length + 1); raises `ValueError`
        where a sequence leaves the trie.
        """
        node = torch.zeros(tokens.shape[:-1], dtype=torch.long, device=tokens.device)
        nodes, lost = [node], torch.zeros_like(node, dtype=torch.bool)
        for token in tokens.unbind(-1):
            allowed = self.allowed(node)
            hit = allowed.mask & (allowed.token == token.unsqueeze(-1))
            at_leaf = self.leaf[node] >= 0
            lost |= ~hit.any(-1) & ~at_leaf
            node = torch.where(at_leaf, node, (allowed.node * hit).sum(-1))
            nodes.append(node)
        if lost.any():
            raise ValueError(f"{int(lost.sum())} sequences are not in the trie, the first {tokens[lost][0].tolist()}")
        return torch.stack(nodes, dim=-1)


def _padded(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """(sequences, longest) int64, -1 after the end of a shorter one."""
    lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    tokens = np.full((len(sequences), int(lengths.max())), -1, dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(sequences), dtype=np.int64, count=int(lengths.sum()))
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = flat
    return tokens
