"""Sampling under the trie: draws follow the policy over the catalog, repeat by seed and stay in the nucleus."""

import math

import pytest
import torch
from decoding.small_models import CONFIGS, MIXED, catalog_log_prob, log_prob, prompts_of, random_model

from minionerec.catalog.trie import Trie
from minionerec.decoding.beam_search import Beams, sample


@pytest.mark.parametrize("space", ["vocab", "catalog"])
def test_samples_follow_the_policy_over_the_catalog(space):
    model = random_model(CONFIGS["qwen2"]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.ndim > 1 else 1.0)
    ids, mask = prompts_of([3, 5])
    trie, generator = Trie.build(MIXED), torch.Generator().manual_seed(0)
    parts = [sample(model, trie, ids, mask, 250, temperature=1.3, space=space, generator=generator) for _ in range(12)]
    drawn = Beams(*(torch.cat(values, dim=1) for values in zip(*parts, strict=True)))
    n = drawn.row.shape[1]
    for row, prompt in enumerate((ids[0, 2:].tolist(), ids[1].tolist())):
        share = torch.bincount(drawn.row[row], minlength=len(MIXED)) / n
        for leaf, sid in enumerate(MIXED):
            policy = catalog_log_prob(model, prompt, sid, MIXED, 1.3)
            score = policy if space == "catalog" else log_prob(model, prompt, sid, 1.3)
            assert share[leaf].item() == pytest.approx(math.exp(policy), abs=0.04)
            for found in drawn.score[row][drawn.row[row] == leaf][:3].tolist():
                assert found == pytest.approx(score, abs=1e-4)


def test_samples_repeat_by_seed_and_keep_to_the_nucleus():
    model = random_model(CONFIGS["llama"]())
    ids, mask = prompts_of([3, 5])
    trie = Trie.build(MIXED)
    one, again, other = (
        sample(model, trie, ids, mask, 50, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one.row, again.row) and not torch.equal(one.row, other.row)
    greedy = sample(model, trie, ids, mask, 20, top_p=1e-6)
    for row, prompt in enumerate((ids[0, 2:].tolist(), ids[1].tolist())):
        prefix = ()
        while prefix not in MIXED:  # the likeliest token at each step
            following = sorted({sid[: len(prefix) + 1] for sid in MIXED if sid[: len(prefix)] == prefix})
            logits = model(input_ids=torch.tensor([prompt + list(prefix)])).logits[0, -1]
            prefix = max(following, key=lambda longer, logits=logits: logits[longer[-1]].item())
        assert {MIXED[leaf] for leaf in greedy.row[row].tolist()} == {prefix}
