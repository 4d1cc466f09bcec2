"""Scores of given SIDs by teacher forcing.

Invariants: a score is what beam search gives that SID and what plain forwards of prompt + SID give, in both spaces, for
SIDs of any depth, under any restriction, whatever the padding, the order and the repetition of the SIDs asked for; an
excluded SID and an empty place have -inf.
"""

import numpy as np
import pytest
import torch
from decoding.small_models import CONFIGS, MIXED, catalog_log_prob, log_prob, prompts_of, random_model, random_sids

from minionerec.catalog.trie import Trie
from minionerec.decoding.beam_search import beam_search, left_pad
from minionerec.decoding.scoring import level_scores, score_rows, sid_paths

UNIFORM = random_sids(70)
spaces = pytest.mark.parametrize("space", ["vocab", "catalog"])


def rows_of(sids, prompts: int, n: int, seed: int = 0) -> torch.Tensor:
    """(prompts, n) random SIDs, some twice, some places empty."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-1, len(sids), size=(prompts, n)))


def plain(model, prompt, sid, sids, space) -> float:
    return log_prob(model, prompt, sid) if space == "vocab" else catalog_log_prob(model, prompt, sid, sids)


# ------------------------------------------------------------------------------------------------ paths


@pytest.mark.parametrize("sids", [UNIFORM, MIXED, [(5,)], [(5, 6, 7, 8), (9,)]])
def test_a_path_is_the_walk_from_the_root_and_stays_at_its_leaf(sids):
    trie = Trie.build(sids)
    paths = sid_paths(trie)
    assert paths.shape == (len(sids), trie.depth + 1)
    for sid, path in zip(sids, paths.tolist(), strict=True):
        walk = trie.walk(torch.tensor(sid)).tolist()
        assert path == walk + walk[-1:] * (trie.depth - len(sid))
    allowed = torch.zeros(len(sids), dtype=torch.bool)
    assert torch.equal(sid_paths(trie.restrict(allowed)), paths)


# ------------------------------------------------------------------------------------------------ scores


@spaces
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("sids", [UNIFORM, MIXED])
def test_scores_are_those_of_the_beams(architecture, sids, space):
    model, trie = random_model(CONFIGS[architecture]()), Trie.build(sids)
    ids, mask = prompts_of([4, 9, 6])
    beams = beam_search(model, trie, ids, mask, 20, space=space)
    order = torch.randperm(beams.row.shape[1], generator=torch.Generator().manual_seed(0))
    found = score_rows(model, trie, sid_paths(trie), ids, mask, beams.row[:, order], space)
    torch.testing.assert_close(found, beams.score[:, order], atol=1e-4, rtol=0)


def test_a_level_is_scored_given_the_levels_before():
    model, trie = random_model(CONFIGS["qwen2"]()), Trie.build(MIXED)
    ids, mask = prompts_of([5])
    rows = torch.tensor([[0, -1, len(MIXED) - 1]])
    found = level_scores(model, trie, sid_paths(trie), ids, mask, rows, "vocab")[0]
    for place, sid in ((0, MIXED[0]), (2, MIXED[-1])):
        sums = [log_prob(model, ids[0].tolist(), sid[:length]) for length in range(1, len(sid) + 1)]
        expected = np.diff([0.0, *sums]).tolist() + [0.0] * (trie.depth - len(sid))
        assert found[place].tolist() == pytest.approx(expected, abs=1e-4)
    assert (found[1] == -torch.inf).all()


@spaces
@pytest.mark.parametrize("sids", [UNIFORM, MIXED])
def test_scores_are_those_of_plain_rows(sids, space):
    model, trie = random_model(CONFIGS["qwen2"]()), Trie.build(sids)
    ids, mask = prompts_of([4, 9, 6])
    rows = rows_of(sids, 3, 9)
    found = score_rows(model, trie, sid_paths(trie), ids, mask, rows, space)
    assert found.shape == rows.shape and (rows < 0).any()
    for prompt, line in enumerate(rows.tolist()):
        tokens = ids[prompt][mask[prompt] > 0].tolist()
        for place, row in enumerate(line):
            expected = -np.inf if row < 0 else plain(model, tokens, sids[row], sids, space)
            assert found[prompt, place].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("sids", [UNIFORM, MIXED])
def test_the_catalog_space_is_a_distribution(sids):
    model, trie = random_model(CONFIGS["llama"]()), Trie.build(sids)
    ids, mask = prompts_of([4, 9])
    found = score_rows(model, trie, sid_paths(trie), ids, mask, torch.arange(len(sids)).expand(2, -1))
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(2))


@spaces
@pytest.mark.parametrize("sids", [UNIFORM, MIXED])
@pytest.mark.parametrize("by_prompt", [True, False])
def test_restricted_tries(sids, space, by_prompt):
    """The normaliser of space catalog is over what is left; excluded SIDs have -inf."""
    model, trie = random_model(CONFIGS["qwen2"]()), Trie.build(sids)
    ids, mask = prompts_of([4, 9, 6])
    kept = torch.rand(3 if by_prompt else 1, len(sids), generator=torch.Generator().manual_seed(2)) < 0.4
    kept[:, 0] = True
    kept = kept.expand(3, -1)
    restricted = trie.restrict(kept if by_prompt else kept[0])
    rows = torch.arange(len(sids)).expand(3, -1)
    found = score_rows(model, restricted, sid_paths(trie), ids, mask, rows, space)
    assert torch.equal(found.isfinite(), kept)
    beams = beam_search(model, restricted, ids, mask, len(sids), space=space)
    for prompt in range(3):
        left = beams.row[prompt] >= 0
        expected = beams.score[prompt][left]
        torch.testing.assert_close(found[prompt, beams.row[prompt][left]], expected, atol=1e-4, rtol=0)
        allowed = [sid for sid, keep in zip(sids, kept[prompt].tolist(), strict=True) if keep]
        tokens = ids[prompt][mask[prompt] > 0].tolist()
        last = int(kept[prompt].nonzero()[-1])
        assert found[prompt, last].item() == pytest.approx(plain(model, tokens, sids[last], allowed, space), abs=1e-4)


@spaces
def test_padding_on_either_side_and_batching_do_not_matter(space):
    model, trie = random_model(CONFIGS["gpt2"]()), Trie.build(MIXED)
    prompts = [[1, 2, 3, 4], [5, 6, 7, 8, 9, 1, 2], [3]]
    rows = rows_of(MIXED, 3, 6, seed=1)
    paths = sid_paths(trie)
    left = left_pad(prompts, 0, "cpu")
    longest = left[0].shape[1]
    right = tuple(
        torch.tensor([[value(token) for token in p] + [0] * (longest - len(p)) for p in prompts])
        for value in (lambda token: token, lambda token: 1)
    )
    expected = score_rows(model, trie, paths, *left, rows, space)
    torch.testing.assert_close(score_rows(model, trie, paths, *right, rows, space), expected, atol=1e-4, rtol=0)
    for i, prompt in enumerate(prompts):
        own = left_pad([prompt], 0, "cpu")
        single = score_rows(model, trie, paths, *own, rows[i : i + 1], space)
        torch.testing.assert_close(single[0], expected[i], atol=1e-4, rtol=0)


def test_only_empty_places():
    model, trie = random_model(CONFIGS["qwen2"]()), Trie.build(MIXED)
    rows = torch.full((2, 3), -1)
    found = score_rows(model, trie, sid_paths(trie), *prompts_of([4, 2]), rows)
    assert found.eq(-torch.inf).all()


@pytest.mark.parametrize("sids", [[(10,), (11,), (12,)], [(10, 50, 90)]])
def test_catalogs_of_one_level_or_one_sid(sids):
    model, trie = random_model(CONFIGS["qwen2"]()), Trie.build(sids)
    rows = torch.arange(len(sids))[None]
    ids, mask = prompts_of([5])
    for space in ("vocab", "catalog"):
        found = score_rows(model, trie, sid_paths(trie), ids, mask, rows, space)
        for sid, score in zip(sids, found[0].tolist(), strict=True):
            assert score == pytest.approx(plain(model, ids[0].tolist(), sid, sids, space), abs=1e-4)
