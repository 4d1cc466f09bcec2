"""The catalog: items by id, distinct SIDs by row, and the items that share each SID."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from minionerec.catalog.sids import level_codes
from minionerec.common.errors import UserError

if TYPE_CHECKING:
    from minionerec.catalog.trie import Trie


def target_counts(sequences: pl.DataFrame, n_items: int) -> list[int]:
    """How often each item is a target, as a list of length `n_items`: popularity."""
    counts = dict(sequences.group_by("target").len().iter_rows())
    return [counts.get(item, 0) for item in range(n_items)]


class Catalog:
    """Items by id, SIDs by row.

    sids: distinct SIDs, in order of their first item; "row" is a place in this list
    row_of_sid: SID -> row
    sid_of_item: (items,) row of each item's SID
    items_of_sid: for each row its items, most popular in train first, then by id
    tokens, codes: the distinct level tokens, and each SID as (sids, depth) places among them, -1 after its end
    """

    def __init__(self, item_sids: Sequence[str], popularity: Sequence[int] | None = None):
        """`item_sids[i]` is item i's SID; `popularity[i]` how often train takes item i (all zero if None).

        Raises `UserError` naming both items where a SID is a prefix of another.
        """
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
        # In sorted token order, a SID that is a prefix of others comes directly before one of them.
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

    def rows_of(self, items: Sequence[int]) -> list[int]:
        """Rows of the SIDs whose items are all among `items`: what to exclude in order to exclude those items."""
        chosen = set(items)
        rows = {int(self.sid_of_item[item]) for item in chosen}
        return sorted(row for row in rows if chosen.issuperset(self.items_of_sid[row]))

    def trie(self, tokenizer) -> "Trie":
        """The trie over this catalog's SIDs in `tokenizer`'s ids; leaf i is row i of `sids`."""
        from minionerec.catalog.trie import Trie  # imports torch

        ids = []
        for token in self.tokens:
            ids.append(tokenizer.convert_tokens_to_ids(token))
            if ids[-1] is None or ids[-1] == tokenizer.unk_token_id:
                raise UserError(f"the tokenizer does not know {token}; use the checkpoint trained on this index")
        return Trie.build(np.array([*ids, -1])[self.codes])  # place -1 is the end's
