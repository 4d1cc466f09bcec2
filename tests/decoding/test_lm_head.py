"""The LM head: scores of heads with scale, cap or bias equal the model's own logits, gradients equal those of full logits."""

import pytest
import torch
from decoding.small_models import (
    CONFIGS,
    MIXED,
    SMALL,
    VOCABULARY,
    catalog_log_prob,
    log_prob,
    random_model,
)
from transformers import CohereConfig, Gemma2Config, GraniteConfig, PhiConfig

from minionerec.catalog.trie import Trie
from minionerec.decoding import lm_head
from minionerec.decoding.beam_search import beam_search
from minionerec.decoding.lm_head import LMHead, allowed_log_probs

HEADS = {
    "gemma2": lambda: Gemma2Config(vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=8, **SMALL),
    "granite": lambda: GraniteConfig(vocab_size=VOCABULARY, num_key_value_heads=2, logits_scaling=3.0, **SMALL),
    "cohere": lambda: CohereConfig(vocab_size=VOCABULARY, num_key_value_heads=2, logit_scale=0.25, **SMALL),
    "phi": lambda: PhiConfig(vocab_size=VOCABULARY, num_key_value_heads=4, **SMALL),  # a bias in the LM head
}


@pytest.mark.parametrize("architecture", HEADS)
def test_heads_that_scale_cap_or_add(architecture):
    model = random_model(HEADS[architecture]())
    if architecture == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    prompt = [3, 4, 5]
    arguments = (model, Trie.build(MIXED), torch.tensor([prompt]), torch.ones(1, 3, dtype=torch.long), 9)
    vocab, catalog = beam_search(*arguments), beam_search(*arguments, space="catalog")
    for leaf, score in zip(vocab.row[0].tolist(), vocab.score[0].tolist(), strict=True):
        assert score == pytest.approx(log_prob(model, prompt, MIXED[leaf]), abs=1e-4)
    for leaf, score in zip(catalog.row[0].tolist(), catalog.score[0].tolist(), strict=True):
        assert score == pytest.approx(catalog_log_prob(model, prompt, MIXED[leaf], MIXED), abs=1e-4)


def test_gradients_of_allowed_log_probs_equal_those_of_full_logits():
    """Nodes of all levels in one call, a leaf among them, in both spaces: values and gradients of hidden states and head."""
    model, trie = random_model(CONFIGS["qwen2"]()), Trie.build(MIXED)
    nodes = torch.arange(len(trie.leaf))
    hidden = torch.randn(len(nodes), 32, generator=torch.Generator().manual_seed(0))
    weight = model.get_output_embeddings().weight
    allowed = trie.allowed(nodes)
    for space in ("vocab", "catalog"):
        gradients = []
        for fast in (True, False):
            state = hidden.clone().requires_grad_()
            if fast:
                found, _ = allowed_log_probs(LMHead.of(model), state, trie, nodes, space=space, temperature=0.7)
            else:
                logits = state @ weight.T / 0.7
                picked = logits.gather(1, allowed.token).masked_fill(~allowed.mask, -1e30)
                found = picked - (logits if space == "vocab" else picked).logsumexp(1, keepdim=True)
            loss = found[allowed.mask].sin().sum()
            gradients.append((loss, *torch.autograd.grad(loss, [state, weight])))
        for one, other in zip(*gradients, strict=True):
            assert one.isfinite().all()
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_normalizer_in_blocks_equals_it_whole(monkeypatch):
    model = random_model(CONFIGS["qwen2"]())
    hidden = torch.randn(3, 2, 32)
    whole = (hidden @ model.lm_head.weight.T / 0.7).logsumexp(-1, keepdim=True)
    for block in (1, 6 * 7, 6 * VOCABULARY):
        monkeypatch.setitem(lm_head.BLOCK, "cpu", block)
        torch.testing.assert_close(LMHead.of(model).log_normalizer(hidden, 0.7), whole)
