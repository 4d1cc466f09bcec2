import random

import numpy as np
import pytest
import torch
from conftest import N_ITEMS

from catalog import (
    Catalog,
    Trie,
    canonical_sid,
    codebook_tokens,
    level_token,
    read_index,
    split_sid,
)
from cli import UserError


def random_sequences(n, seed):
    """Distinct, prefix-free sequences of depth 1 to 4 over few tokens: a token at depth d says whether it is the last."""
    rng = random.Random(seed)
    sequences = set()
    while len(sequences) < n:
        depth = rng.randint(1, 4)
        sequences.add((*(rng.randrange(6) for _ in range(depth - 1)), 10 + rng.randrange(6)))
    return sorted(sequences, key=lambda s: rng.random())


@pytest.mark.parametrize("seed", range(5))
def test_trie_equals_a_dictionary(seed):
    sequences = random_sequences(80, seed)
    trie = Trie.build(sequences)
    children = {}
    for row, sequence in enumerate(sequences):
        for d in range(len(sequence)):
            children.setdefault(sequence[:d], set()).add(sequence[d])
        children[sequence] = row

    def walk(prefix, node):
        if isinstance(children[prefix], int):
            assert trie.leaf[node] == children[prefix]
            assert not trie.allowed(torch.tensor(node)).mask.any()
            return 1
        allowed = trie.allowed(torch.tensor(node))
        tokens = allowed.token[allowed.mask].tolist()
        assert trie.leaf[node] == -1 and tokens == sorted(children[prefix])
        return sum(walk((*prefix, t), n) for t, n in zip(tokens, allowed.node[allowed.mask].tolist(), strict=True))

    assert walk((), 0) == len(sequences) == trie.n_leaves
    assert trie.depth == max(map(len, sequences))


def test_allowed_pads_and_keeps_shape():
    trie = Trie.build([[5, 6, 7], [5, 6, 8], [5, 9, 7], [4, 1, 1]])
    allowed = trie.allowed(torch.tensor([[0, 1], [2, 3]]))
    assert allowed.token.shape == (2, 2, 2)
    assert allowed.mask.tolist() == [[[True, True], [True, False]], [[True, True], [True, False]]]
    assert allowed.token[~allowed.mask].eq(0).all()


@pytest.mark.parametrize("sequences", [[[1, 2], [1]], [[1, 2], [1, 2]], [[3], [1, 2, 4], [1, 2]]])
def test_trie_refuses_prefixes_and_duplicates(sequences):
    with pytest.raises(ValueError, match="prefix"):
        Trie.build(sequences)


def test_catalog_refuses_a_prefix_and_names_both_items():
    with pytest.raises(UserError, match=r"item 1 .*<a_1>.*prefix of item 2's <a_1><b_0>"):
        Catalog(["<a_0><b_0>", "<a_1>", "<a_1><b_0>"])


def test_shared_sids_keep_every_item_most_popular_first():
    catalog = Catalog(["<a_1>", "<a_2>", "<a_1>", "<a_1>"], popularity=[0, 9, 4, 0])
    assert catalog.sids == ["<a_1>", "<a_2>"]
    assert catalog.items_of_sid == [[2, 0, 3], [1]]
    assert catalog.sid_of_item.tolist() == [0, 1, 0, 0]


def test_level_tokens_and_text_forms():
    assert [level_token(level, 3) for level in (0, 1, 25, 26)] == ["<a_3>", "<b_3>", "<z_3>", "<aa_3>"]
    assert split_sid("<a_1><b_22>") == ["<a_1>", "<b_22>"]
    assert canonical_sid(" <a_1> <b_22>\n<|endoftext|>") == "<a_1><b_22>"
    with pytest.raises(ValueError):
        split_sid("<a_1> <b_2>")


def test_tokenizer_gains_the_whole_codebook_of_any_depth():
    tokens = codebook_tokens(["<a_0><b_5><c_2>", "<a_1><b_0><c_0><d_1>"])
    assert tokens == [f"<{letter}_{code}>" for letter in "abcd" for code in range(8)]
    assert codebook_tokens(["<a_0><b_5>", "<a_1><b_10>"], used_only=True) == ["<a_0>", "<a_1>", "<b_5>", "<b_10>"]


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


@pytest.mark.parametrize(
    "content, found",
    [
        ("{}", "no item"),
        ("[1]", "found a JSON list"),
        ('{"0": ["<a_1>"], "2": ["<a_2>"]}', "item 1 is missing"),
        ('{"0": "<a_1>"}', "item 0 has '<a_1>'"),
        ('{"0": ["a_1"]}', "item 0 has"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_index_files(tmp_path, content, found):
    path = tmp_path / "x.index.json"
    path.write_text(content)
    with pytest.raises(UserError, match=found):
        read_index(path)


def test_a_large_catalog_finds_its_leaves():
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(0, 64, (200_000, 3)) + np.array([0, 64, 128]), axis=0)
    trie = Trie.build(codes.tolist())
    rows = rng.integers(0, len(codes), 100)
    node = torch.zeros(100, dtype=torch.long)
    for level in range(3):
        allowed = trie.allowed(node)
        hit = allowed.mask & (allowed.token == torch.from_numpy(codes[rows, level])[:, None])
        assert hit.sum(1).eq(1).all()
        node = allowed.node[hit]
    assert trie.leaf[node].tolist() == rows.tolist()
