"""Items, their semantic IDs (SIDs), and the token trie over them.

A SID is an item's tuple of level tokens, `("<a_236>", "<b_231>", "<c_226>")`, or the same as one string. Two items may
share a SID: then a leaf holds several items in a fixed order, the most popular in train first, then by id.

The trie is a CSR structure of tensors over token ids, in the manner of "Vectorizing the Trie" (arXiv 2602.22647): no
dictionary is walked while decoding. It starts at its root: the first generated token is a child of node 0, whatever
the prompt was. A node that is not in the trie cannot be named, so nothing can fall out of it into an open vocabulary.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cli import UserError, read_json

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


class Catalog:
    """Items by id, SIDs by row, and the items that share each SID.

    sids: distinct SIDs, in order of their first item
    sid_of_item: (items,) row of `sids`
    items_of_sid: for each row of `sids`, its items, most popular in train first, then by id
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
        self.items_of_sid = [group.tolist() for group in np.split(order, bounds)]
        self._refuse_prefixes()

    def _refuse_prefixes(self) -> None:
        # In sorted token order, a SID that is a prefix of others stands directly before one of them.
        split = sorted((tuple(split_sid(sid)), row) for row, sid in enumerate(self.sids))
        for (short, row), (long, other) in zip(split, split[1:], strict=False):
            if long[: len(short)] == short:
                raise UserError(
                    f"item {self.items_of_sid[row][0]} has SID {self.sids[row]}, a prefix of item "
                    f"{self.items_of_sid[other][0]}'s {self.sids[other]}; SIDs must be prefix-free: build the index again"
                )

    @property
    def n_items(self) -> int:
        return len(self.sid_of_item)

    def trie(self, tokenizer) -> "Trie":
        """The trie over this catalog's SIDs in `tokenizer`'s ids; leaf i is row i of `sids`."""
        ids = {}
        for token in {token for sid in self.sids for token in split_sid(sid)}:
            ids[token] = tokenizer.convert_tokens_to_ids(token)
            if ids[token] is None or ids[token] == tokenizer.unk_token_id:
                raise UserError(f"the tokenizer does not know {token}; use the checkpoint trained on this index")
        return Trie.build([[ids[token] for token in split_sid(sid)] for sid in self.sids])


class Allowed(NamedTuple):
    """What may follow some nodes. All are (..., width), width the most children of one of the nodes."""

    token: torch.Tensor  # token ids; 0 where padded
    node: torch.Tensor  # the child nodes; 0 where padded
    mask: torch.Tensor  # True where there is a child


class Trie(NamedTuple):
    """A token trie as CSR tensors. Node 0 is the root; nodes are numbered level by level.

    The children of node i are `child_token[start[i]:start[i + 1]]`, in rising token order, and as nodes
    `child_node[start[i]:start[i + 1]]`.
    """

    start: torch.Tensor  # (nodes + 1,)
    child_token: torch.Tensor  # (edges,)
    child_node: torch.Tensor  # (edges,)
    leaf: torch.Tensor  # (nodes,) row of the sequence that ends here, -1 inside
    depth: int  # tokens of the longest sequence
    n_leaves: int

    @classmethod
    def build(cls, sequences: Sequence[Sequence[int]]) -> "Trie":
        """From distinct, prefix-free token sequences; leaf i is sequence i. Raises `ValueError` otherwise."""
        depth = max(map(len, sequences))
        lengths = np.array([len(s) for s in sequences])
        tokens = np.full((len(sequences), depth), -1, dtype=np.int64)
        tokens[np.arange(depth) < lengths[:, None]] = np.concatenate([np.asarray(s) for s in sequences])
        order = np.lexsort(tokens.T[::-1])
        tokens, lengths = tokens[order], lengths[order]

        child_token, parents, leaves = [], [], [np.array([-1])]
        node = np.zeros(len(sequences), dtype=np.int64)  # each sequence's node at the level above
        new_prefix = np.zeros(len(sequences), dtype=bool)
        new_prefix[0] = True
        n_nodes = 1
        for level in range(depth):
            alive = lengths > level
            new_prefix = new_prefix | np.concatenate([[True], tokens[1:, level] != tokens[:-1, level]])
            first = new_prefix & alive  # the first sequence under each node of this level
            parents.append(node[first])
            child_token.append(tokens[first, level])
            node = n_nodes + np.cumsum(first) - 1
            n_nodes += int(first.sum())
            leaf = np.full(int(first.sum()), -1)
            ends = lengths == level + 1
            leaf[np.cumsum(first)[ends] - 1] = order[ends]
            leaves.append(leaf)
        leaf = np.concatenate(leaves)
        children = np.bincount(np.concatenate(parents), minlength=n_nodes)
        if (leaf >= 0).sum() != len(sequences) or (children[leaf >= 0] > 0).any():
            raise ValueError("sequences must be distinct and none may be a prefix of another")
        return cls(
            start=torch.from_numpy(np.concatenate([[0], np.cumsum(children)])),
            child_token=torch.from_numpy(np.concatenate(child_token)),
            child_node=torch.arange(1, n_nodes),  # level by level, parents in order: the edges come in node order
            leaf=torch.from_numpy(leaf),
            depth=depth,
            n_leaves=len(sequences),
        )

    def to(self, device) -> "Trie":
        return self._replace(**{k: v.to(device) for k, v in self._asdict().items() if isinstance(v, torch.Tensor)})

    def allowed(self, nodes: torch.Tensor) -> Allowed:
        """What may follow each of `nodes` (any shape), padded to the widest of them; a leaf allows nothing."""
        begin, end = self.start[nodes], self.start[nodes + 1]
        width = max(int((end - begin).max()), 1)
        edge = begin.unsqueeze(-1) + torch.arange(width, device=nodes.device)
        mask = edge < end.unsqueeze(-1)
        edge = edge.masked_fill(~mask, 0)
        return Allowed(self.child_token[edge] * mask, self.child_node[edge] * mask, mask)
