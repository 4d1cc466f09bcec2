"""The token trie.

Invariants: it allows exactly what a Python dictionary of the sequences allows, restricted or not; duplicates and prefixes
are refused; a million sequences build in seconds; a saved trie loads as it was, and another file is refused.
"""

import random
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from minionerec.catalog.trie import Trie
from minionerec.common.errors import UserError


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


def test_a_million_items_build_in_seconds_and_load_as_saved(tmp_path):
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(0, 256, (1_050_000, 3)), axis=0)[:1_000_000] + np.array([0, 256, 512])
    started = time.process_time()
    trie = Trie.build(codes)
    assert time.process_time() - started < 10  # 1 s on one quiet core
    trie.save(tmp_path / "trie.safetensors")
    loaded = Trie.load(tmp_path / "trie.safetensors")
    for name, value in trie._asdict().items():
        other = getattr(loaded, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value, name
    assert [path.name for path in tmp_path.iterdir()] == ["trie.safetensors"]


def test_loading_another_file_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"no trie at all")
    save_file({"start": torch.zeros(2)}, tmp_path / "y", {"trie": "{}"})
    save_file({"start": torch.zeros(2)}, tmp_path / "z")
    for name in "xyz":
        with pytest.raises(UserError, match="not a saved trie"):
            Trie.load(tmp_path / name)


def reachable_sequences(trie, prompt=None):
    """The rows of all leaves that `allowed` leads to, one node at a time."""
    found, nodes = [], [0]
    for node in nodes:
        one = torch.tensor([[node]] if prompt is None else [[node]] * len(trie.reachable))
        allowed = trie.allowed(one)
        row = (0 if prompt is None else prompt, 0)
        nodes += allowed.node[row][allowed.mask[row]].tolist()
        found += [int(trie.leaf[node])] if trie.leaf[node] >= 0 else []
    return sorted(found)


@pytest.mark.parametrize("seed", range(3))
def test_restricting_leaves_the_subset(seed):
    trie, rng = Trie.build(random_sequences(60, seed)), np.random.default_rng(seed)
    for share in (0.0, 0.1, 0.5, 1.0):
        kept = torch.from_numpy(rng.random(60) < share)
        if kept.any():  # an empty trie's root allows nothing
            assert reachable_sequences(trie.restrict(kept)) == kept.nonzero()[:, 0].tolist()
        assert int(trie.restrict(kept).reachable[0]) == int(kept.sum())
    per_prompt = torch.from_numpy(rng.random((3, 60)) < 0.3)
    restricted = trie.restrict(per_prompt)
    for prompt, kept in enumerate(per_prompt):
        assert reachable_sequences(restricted, prompt) == kept.nonzero()[:, 0].tolist()
    assert reachable_sequences(restricted.restrict(torch.ones(60, dtype=torch.bool))) == list(range(60))


def test_each_prompt_loses_its_excluded_rows():
    trie = Trie.build(random_sequences(60, 0))
    restricted = trie.without([[3, 59], [], range(50)])
    for prompt, left in enumerate([sorted({*range(60)} - {3, 59}), list(range(60)), list(range(50, 60))]):
        assert reachable_sequences(restricted, prompt) == left
    assert trie.without(None) is trie and trie.without([[], []]) is trie


def test_walking_sequences_back():
    sequences = random_sequences(60, seed=4)
    trie = Trie.build(sequences)
    padded = torch.tensor([list(s) + [0] * (4 - len(s)) for s in sequences])
    nodes = trie.walk(padded)
    assert nodes.shape == (60, 5) and nodes[:, 0].eq(0).all()
    assert trie.leaf[nodes[:, -1]].tolist() == list(range(60))
    for sequence, path in zip(sequences, nodes.tolist(), strict=True):
        for token, node, child in zip(sequence, path, path[1:], strict=False):
            assert int(trie.child_token[child - 1]) == token
            assert int(trie.start[node]) <= child - 1 < int(trie.start[node + 1])
    with pytest.raises(ValueError, match="not in the trie"):
        trie.walk(torch.tensor([[99, 1]]))


def test_levels_know_their_widths_and_tokens():
    trie = Trie.build([[5, 6, 7], [5, 6, 8], [5, 9, 7], [4, 1, 1]])
    assert trie.widths == (2, 2, 2)
    for level, tokens in enumerate(({4, 5}, {1, 6, 9}, {1, 7, 8})):
        low, high = trie.columns[level]
        assert tokens <= set(trie.tokens[low:high].tolist())
    assert trie.tokens[trie.child_column].equal(trie.child_token)
