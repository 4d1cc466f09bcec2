"""Items, their semantic IDs (SIDs), and the token trie over them.

A SID is an item's tuple of level tokens, `("<a_236>", "<b_231>", "<c_226>")`, or the same as one string. Two items may
share a SID: then a leaf holds several items in a fixed order, the most popular in train first, then by id.

The trie is a CSR structure of tensors over token ids, in the manner of "Vectorizing the Trie" (arXiv 2602.22647): no
dictionary is walked while decoding. It starts at its root: the first generated token is a child of node 0, whatever
the prompt was. A node that is not in the trie cannot be named, so nothing can fall out of it into an open vocabulary.
"""

import json
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import safetensors
import safetensors.torch
import torch

from cli import UserError, atomic_file, read_json, require_file

SID_TOKEN = re.compile(r"<([a-z]+)_(\d+)>")
_SID = re.compile(r"(?:<[a-z]+_\d+>)+")


def level_token(level: int, code: int) -> str:
    """The token of `code` at `level` (0-based): `<a_0>`, `<b_17>`, ... `<z_3>`, `<aa_0>`, ..."""
    letters = ""
    level += 1
    while level:
        level, letter = divmod(level - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return f"<{letters}_{code}>"


def canonical_sid(text: str) -> str:
    """The SID in a generated or written text: its level tokens, joined, everything else dropped."""
    return "".join(match.group() for match in SID_TOKEN.finditer(text))


def split_sid(sid: str) -> list[str]:
    """`"<a_1><b_2>"` -> `["<a_1>", "<b_2>"]`; raises `ValueError` if anything but level tokens is in it."""
    if not _SID.fullmatch(sid):
        raise ValueError(f"not a SID: {sid!r}")
    return [match.group() for match in SID_TOKEN.finditer(sid)]


def read_index(path: str | Path, flag: str = "sid_index_path") -> list[str]:
    """SIDs as strings, row i is item i, from an `index.json`; raises `UserError` on a gap or a malformed SID."""
    index = read_json(path, flag)
    sids = []
    for item in range(len(index)):
        tokens = index.get(str(item))
        if tokens is None:
            raise UserError(f"{path}: item {item} is missing, expected ids 0..{len(index) - 1} without gaps")
        if not isinstance(tokens, list) or not tokens or not all(_SID.fullmatch(str(t)) for t in tokens):
            raise UserError(f'{path}: item {item} has {tokens!r}, expected a list like ["<a_1>", "<b_2>", "<c_3>"]')
        sids.append("".join(tokens))
    if not sids:
        raise UserError(f"{path}: no item in it; build the index first (rq/generate_indices.sh)")
    return sids


def codebook_tokens(sids: Sequence[str], used_only: bool = False) -> list[str]:
    """Every level token that the tokenizer must know, level by level, code by code.

    All K codes of every level, so that items added later need no new token; K is the least power of two that holds
    the largest code in use. `used_only` keeps to the tokens that occur.
    """
    used = {token for sid in sids for token in split_sid(sid)}
    codes = [(match.group(1), int(match.group(2))) for match in map(SID_TOKEN.fullmatch, used)]
    letters = sorted({letter for letter, _ in codes}, key=lambda letter: (len(letter), letter))
    if used_only:
        return [f"<{letter}_{code}>" for letter in letters for own, code in sorted(codes) if own == letter]
    size = 1 << max(code for _, code in codes).bit_length()
    return [f"<{letter}_{code}>" for letter in letters for code in range(size)]


def level_codes(sids: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Distinct level tokens, and each SID as (sids, longest) places among them, -1 after the end of a shorter one.

    Raises `ValueError` if anything but level tokens is in a SID.
    """
    column = pl.Series(sids, dtype=pl.String)
    split = column.str.extract_all(SID_TOKEN.pattern)
    for sid in column.filter((split.list.join("") != column) | (split.list.len() == 0)).head(1):
        split_sid(sid)  # raises
    lengths = split.list.len().to_numpy()
    flat = split.explode()
    tokens = flat.unique(maintain_order=True)
    place = flat.replace_strict(tokens, np.arange(len(tokens)), return_dtype=pl.Int64).to_numpy()
    codes = np.full((len(sids), lengths.max()), -1, dtype=np.int64)
    codes[np.arange(codes.shape[1]) < lengths[:, None]] = place
    return tokens.to_list(), codes


class Catalog:
    """Items by id, SIDs by row, and the items that share each SID.

    sids: distinct SIDs, in order of their first item
    sid_of_item: (items,) row of `sids`
    items_of_sid: for each row of `sids`, its items, most popular in train first, then by id
    tokens, codes: the distinct level tokens, and each SID as (sids, depth) places among them, -1 after its end
    """

    def __init__(self, item_sids: Sequence[str], popularity: Sequence[int] | None = None):
        """`item_sids[i]` is item i's SID; `popularity[i]` how often train takes item i (all zero if None)."""
        rows: dict[str, int] = {}
        self.sid_of_item = np.array([rows.setdefault(sid, len(rows)) for sid in item_sids], dtype=np.int64)
        self.sids = list(rows)
        self.row_of_sid = rows
        counts = np.zeros(len(item_sids), dtype=np.int64) if popularity is None else np.asarray(popularity)
        order = np.lexsort((np.arange(len(item_sids)), -counts, self.sid_of_item))
        bounds = np.searchsorted(self.sid_of_item[order], np.arange(1, len(self.sids)))
        ends, order = [0, *bounds.tolist(), len(order)], order.tolist()
        self.items_of_sid = [order[start:end] for start, end in zip(ends, ends[1:], strict=False)]
        self.tokens, self.codes = level_codes(self.sids)
        self._refuse_prefixes()

    def _refuse_prefixes(self) -> None:
        # In sorted token order, a SID that is a prefix of others stands directly before one of them.
        order = np.lexsort(self.codes.T[::-1])
        codes = self.codes[order]
        short = ((codes[:-1] == codes[1:]) | (codes[:-1] < 0)).all(axis=1)
        for place in np.flatnonzero(short)[:1]:
            row, other = order[place], order[place + 1]
            raise UserError(
                f"item {self.items_of_sid[row][0]} has SID {self.sids[row]}, a prefix of item "
                f"{self.items_of_sid[other][0]}'s {self.sids[other]}; SIDs must be prefix-free: build the index again"
            )

    @property
    def n_items(self) -> int:
        return len(self.sid_of_item)

    def leaves_of(self, items: Sequence[int]) -> list[int]:
        """Rows of the SIDs all of whose items are among `items`: what to leave out if those are to be left out."""
        chosen = set(items)
        rows = {int(self.sid_of_item[item]) for item in chosen}
        return sorted(row for row in rows if chosen.issuperset(self.items_of_sid[row]))

    def trie(self, tokenizer) -> "Trie":
        """The trie over this catalog's SIDs in `tokenizer`'s ids; leaf i is row i of `sids`."""
        ids = []
        for token in self.tokens:
            ids.append(tokenizer.convert_tokens_to_ids(token))
            if ids[-1] is None or ids[-1] == tokenizer.unk_token_id:
                raise UserError(f"the tokenizer does not know {token}; use the checkpoint trained on this index")
        return Trie.build(np.array([*ids, -1])[self.codes])  # place -1 is the end's


class Allowed(NamedTuple):
    """What may follow some nodes. All are (..., width), width the most children that a node of the level has."""

    token: torch.Tensor  # token ids; 0 where padded
    node: torch.Tensor  # the child nodes; 0 where padded
    mask: torch.Tensor  # True where there is a child
    column: torch.Tensor  # places of the tokens in `Trie.tokens`; 0 where padded


class Trie(NamedTuple):
    """A token trie as CSR tensors. Node 0 is the root; nodes are numbered level by level, parents in order.

    The children of node i are the edges `start[i]` to `start[i + 1]`, in rising token order; edge e leads by the token
    `child_token[e]` to node e + 1. Below a node lie the leaves `order[first[i]:last[i]]`. `widths` and `columns` are
    facts of each level that the host knows, so that decoding waits for no device.
    """

    start: torch.Tensor  # (nodes + 1,)
    child_token: torch.Tensor  # (edges,)
    child_column: torch.Tensor  # (edges,) place of the token in `tokens`
    tokens: torch.Tensor  # the distinct tokens, in order of the first level that has them
    leaf: torch.Tensor  # (nodes,) row of the sequence that ends here, -1 inside
    order: torch.Tensor  # (leaves,) rows of the sequences in token order
    first: torch.Tensor  # (nodes,) the leaves below a node stand in `order` from here
    last: torch.Tensor  # (nodes,) to before here
    reachable: torch.Tensor  # (nodes,) or (prompts, nodes) leaves below a node that may be generated
    depth: int  # tokens of the longest sequence
    n_leaves: int
    widths: tuple[int, ...]  # the most children of a node, for each level
    columns: tuple[tuple[int, int], ...]  # the range of `tokens` that holds all of a level's, for each level

    @classmethod
    def build(cls, sequences: Sequence[Sequence[int]] | np.ndarray) -> "Trie":
        """From distinct, prefix-free token sequences; leaf i is sequence i. Raises `ValueError` otherwise.

        An array (sequences, depth) of ids is taken as it is, -1 after the end of a shorter one.
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
        """What may follow each of `nodes` (any shape; a row a prompt, where the trie is restricted by prompt).

        Padded to the widest node of `level`, the depth of all of `nodes`, or of the trie. A leaf allows nothing.
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

        leaves: (leaves,), or (prompts, leaves) for a restriction of each prompt's own. Replaces an earlier restriction.
        """
        total = leaves[..., self.order].cumsum(dim=-1)
        total = torch.cat([total.new_zeros((*total.shape[:-1], 1)), total], dim=-1)
        return self._replace(reachable=total[..., self.last] - total[..., self.first])

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
