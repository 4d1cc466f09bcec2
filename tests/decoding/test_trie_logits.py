"""The trie as a filter of logits equals the log-probabilities of the tree search, at any node, temperature and divisor.

Excluded SIDs close the nodes that lead only to them; a leaf, and tokens outside the trie, leave only the end token.
"""

import pytest
import torch
from decoding.small_models import MIXED, VOCABULARY, random_sids

from minionerec.catalog.trie import Trie
from minionerec.decoding.trie_logits import Exclusions, State, constrain, reach

SIDS = random_sids(80) + [(30,), (31, 50), (31, 51, 0, 90)]
END = 159


def log_probs_of(logits, children, space, temperature):
    """A plain Python twin: {token: log-probability} over the tokens `children`."""
    scaled = (logits / temperature).tolist()
    over = children if space == "catalog" else range(len(scaled))
    total = torch.tensor([scaled[token] for token in over]).logsumexp(0).item()
    return {token: scaled[token] - total for token in children}


@pytest.mark.parametrize("space", ["vocab", "catalog"])
def test_logits_become_log_probabilities_of_what_may_follow(space):
    trie = Trie.build(SIDS)
    torch.manual_seed(0)
    prefixes = [(), SIDS[0][:1], SIDS[5][:2], (31,), (31, 51), (31, 51, 0)]
    tokens = torch.tensor([[*prefix, *[-1] * (3 - len(prefix))] for prefix in prefixes])
    logits = torch.randn(len(prefixes), VOCABULARY) * 3
    temperature, divisor = torch.linspace(0.5, 1.5, len(prefixes)), torch.linspace(2.0, 0.7, len(prefixes))
    state = reach(trie, torch.zeros(len(prefixes), dtype=torch.long), tokens)
    found = constrain(trie, state, logits, temperature, divisor, space, END) / divisor[:, None]
    for row, prefix in enumerate(prefixes):
        children = sorted({sid[len(prefix)] for sid in SIDS if sid[: len(prefix)] == prefix and len(sid) > len(prefix)})
        expected = torch.full((VOCABULARY,), -torch.inf)
        for token, value in log_probs_of(logits[row], children, space, temperature[row]).items():
            expected[token] = value
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)


def test_only_the_end_follows_a_leaf_and_what_is_outside():
    trie = Trie.build(SIDS)
    tokens = torch.tensor([[30, -1], [30, END], [99, -1], [31, 52]])
    state = reach(trie, torch.zeros(4, dtype=torch.long), tokens)
    assert state.inside.tolist() == [True, True, False, False]
    found = constrain(trie, state, torch.randn(4, VOCABULARY), torch.ones(4), torch.ones(4), "vocab", END)
    assert (found[:, END] == 0).all() and (found > -torch.inf).sum() == 4


def test_tokens_go_on_from_any_node():
    trie = Trie.build(SIDS)
    start = trie.walk(torch.tensor([31]))[-1].repeat(2)
    state = reach(trie, start, torch.tensor([[50, -1, -1], [51, 0, 90]]))
    assert [SIDS[row] for row in trie.leaf[state.node].tolist()] == [(31, 50), (31, 51, 0, 90)]


@pytest.mark.parametrize("sids", [SIDS, MIXED])
def test_excluded_sids_are_closed_as_in_a_restricted_trie(sids):
    trie, generator = Trie.build(sids), torch.Generator().manual_seed(0)
    excluded = [(), (2,), tuple(range(len(sids) - 1)), tuple(range(len(sids))), tuple(range(0, len(sids), 2))]
    table = Exclusions(trie).table(excluded)
    restricted = trie.without(excluded)
    nodes = torch.randint(len(trie.leaf), (len(excluded), 40), generator=generator)
    allowed = restricted.allowed(nodes)
    logits = torch.randn(len(excluded), VOCABULARY, generator=generator)
    ones = torch.ones(len(excluded))
    for column in range(nodes.shape[1]):
        state = State(nodes[:, column], ones.bool())
        found = constrain(trie, state, logits, ones, ones, "catalog", END, table) > -torch.inf
        for row in range(len(excluded)):
            if trie.reachable[nodes[row, column]] and not restricted.reachable[row, nodes[row, column]]:
                continue  # a node that is closed itself is never entered
            tokens = allowed.token[row, column][allowed.mask[row, column]].tolist()
            assert found[row].nonzero().flatten().tolist() == sorted(tokens or [END])
    assert Exclusions(trie).table([(), ()]) is None
