"""The catalog.

Invariants: no SID is a prefix of another; items that share a SID are all kept, most popular first; catalogs of 1, 2 and a
million items work; the module loads without torch.
"""

import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
import torch
from helpers import N_ITEMS, ROOT

from minionerec.catalog.catalog import Catalog, target_counts
from minionerec.catalog.sids import split_sid
from minionerec.common.errors import UserError


def test_a_prefix_is_refused_and_both_items_named():
    with pytest.raises(UserError, match=r"item 1 .*<a_1>.*prefix of item 2's <a_1><b_0>"):
        Catalog(["<a_0><b_0>", "<a_1>", "<a_1><b_0>"])


def test_shared_sids_keep_every_item_most_popular_first():
    catalog = Catalog(["<a_1>", "<a_2>", "<a_1>", "<a_1>"], popularity=[0, 9, 4, 0])
    assert catalog.sids == ["<a_1>", "<a_2>"]
    assert catalog.items_of_sid == [[2, 0, 3], [1]]
    assert catalog.sid_of_item.tolist() == [0, 1, 0, 0]


def test_popularity_counts():
    assert target_counts(pl.DataFrame({"target": [2, 3, 3]}), 4) == [0, 0, 1, 2]


def test_items_are_excluded_with_their_sid_only_together():
    catalog = Catalog(["<a_1>", "<a_2>", "<a_1>", "<a_3>"])
    assert catalog.rows_of([0, 1]) == [1] and catalog.rows_of([2, 0, 3]) == [0, 2] and catalog.rows_of([]) == []


def test_trie_of_a_catalog_uses_the_tokenizers_ids(policy):
    trie = policy.catalog.trie(policy.tokenizer)
    assert trie.n_leaves == N_ITEMS - 1  # two items share a SID
    node = 0
    for token in split_sid(policy.items.sids[17]):
        allowed = trie.allowed(torch.tensor(node))
        place = allowed.token.tolist().index(policy.tokenizer.convert_tokens_to_ids(token))
        node = int(allowed.node[place])
    assert int(trie.leaf[node]) == policy.catalog.sid_of_item[17]


def test_a_tokenizer_without_the_tokens_is_refused(policy):
    with pytest.raises(UserError, match="does not know <a_77>"):
        Catalog(["<a_77><b_0><c_0>"]).trie(policy.tokenizer)


class Tokenizer:
    """Enough of a tokenizer for `Catalog.trie`."""

    unk_token_id = None

    def convert_tokens_to_ids(self, token: str) -> int:
        return 1000 * (ord(token[1]) - ord("a")) + int(token[3:-1])


@pytest.mark.parametrize("sids", [["<a_7>"], ["<a_7><b_0><c_1>"], ["<a_0>", "<a_1><b_0>"], ["<a_0>", "<a_0>"]])
def test_one_item_and_two(sids):
    catalog = Catalog(sids)
    trie = catalog.trie(Tokenizer())
    assert catalog.n_items == len(sids) and trie.n_leaves == len(set(sids))
    for sid, row in catalog.row_of_sid.items():
        tokens = [Tokenizer().convert_tokens_to_ids(token) for token in split_sid(sid)]
        assert trie.leaf[trie.walk(torch.tensor(tokens))[-1]] == row


def test_a_million_items_build_in_seconds():
    codes = np.random.default_rng(0).integers(0, 256, (1_000_000, 3))
    sids = [f"<a_{a}><b_{b}><c_{c}>" for a, b, c in codes.tolist()]
    started = time.process_time()
    catalog = Catalog(sids, popularity=np.zeros(len(sids), dtype=np.int64))
    trie = catalog.trie(Tokenizer())
    assert time.process_time() - started < 30  # 4 s on one quiet core
    assert trie.n_leaves == len(set(sids)) and sum(map(len, catalog.items_of_sid)) == 1_000_000


def test_the_module_loads_without_torch():
    code = "import sys, data, minionerec.catalog.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
