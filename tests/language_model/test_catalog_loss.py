"""Cross-entropy over the trie compared with plain Python.

Invariants: the loss and its gradients are those of a softmax over the allowed tokens only, with or without label
smoothing, for any depth and any LM head; a level with one child costs exactly nothing; answers of text in the same batch
keep the softmax over the vocabulary; measured losses are not smoothed.
"""

import random

import pytest
import torch
from decoding.small_models import CONFIGS, SMALL, VOCABULARY, random_model, random_sids
from torch.nn.functional import cross_entropy
from transformers import CohereConfig, Gemma2Config, PhiConfig

from minionerec.catalog.trie import Trie
from minionerec.common.errors import UserError
from minionerec.decoding.lm_head import LMHead
from minionerec.language_model.batches import IGNORED, Collator
from minionerec.language_model.catalog_loss import SidTokens, catalog_loss
from minionerec.language_model.sft_trainer import AnswerLogits

UNIFORM = random_sids(60)
MIXED = [(10, 50), (10, 51, 90), (10, 51, 91, 120), (11,), (12, 50, 90), (12, 50, 91), (13, 52, 90), (13, 52, 91)]
HEADS = {
    "qwen2": CONFIGS["qwen2"],
    "cohere": lambda: CohereConfig(vocab_size=VOCABULARY, num_key_value_heads=2, logit_scale=0.25, **SMALL),
    "gemma2": lambda: Gemma2Config(vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=8, **SMALL),  # caps logits
    "phi": lambda: PhiConfig(vocab_size=VOCABULARY, num_key_value_heads=4, **SMALL),  # a bias
}


def allowed_after(sids, prefix) -> list[int]:
    return sorted({sid[len(prefix)] for sid in sids if sid[: len(prefix)] == prefix and len(sid) > len(prefix)})


def plain_loss(logits, chosen, sids, smoothing) -> torch.Tensor:
    """The sum over the tokens of SIDs `chosen`, whose logits over the vocabulary are the rows of `logits`, in a loop."""
    total, row = torch.zeros(()), 0
    for sid in chosen:
        for depth, token in enumerate(sid):
            allowed = allowed_after(sids, sid[:depth])
            log_probs = torch.log_softmax(logits[row, allowed], dim=0)
            own = log_probs[allowed.index(token)]
            total = total - (1 - smoothing) * own - smoothing * log_probs.mean()
            row += 1
    return total


def drawn(sids, count=40, seed=0) -> tuple[list, torch.Tensor]:
    """(SIDs, their tokens one after the other)"""
    chosen = random.Random(seed).choices(sids, k=count)
    return chosen, torch.tensor([token for sid in chosen for token in sid])


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("sids", [UNIFORM, MIXED])
def test_loss_and_gradients_equal_plain_ones(architecture, smoothing, sids):
    model = random_model(HEADS[architecture]())
    if architecture == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    head, (chosen, tokens) = LMHead.of(model), drawn(sids)
    hidden = torch.randn(len(tokens), 32, generator=torch.Generator().manual_seed(1))
    found = []
    for fast in (True, False):
        states = hidden.clone().requires_grad_()
        model.zero_grad()
        if fast:
            loss = catalog_loss(head, states, tokens, SidTokens(Trie.build(sids), VOCABULARY), smoothing)
        else:
            loss = plain_loss(head.logits(states), chosen, sids, smoothing)
        loss.backward()
        found.append((loss.detach(), states.grad, head.weight.grad.clone()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_a_level_with_one_child_costs_nothing(smoothing):
    """Each of these SIDs is decided by its first token."""
    sids = [(10 + i, 50 + i, 90 + i) for i in range(8)]
    model, (_, tokens) = random_model(CONFIGS["qwen2"]()), drawn(sids)
    states = torch.randn(len(tokens), 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    catalog_loss(LMHead.of(model), states, tokens, SidTokens(Trie.build(sids), VOCABULARY), smoothing).backward()
    by_token = states.grad.view(-1, 3, 32).abs().sum(dim=2)
    assert (by_token[:, 0] > 0).all() and (by_token[:, 1:] == 0).all()
    only = [(10, 50, 90)]
    sure = catalog_loss(LMHead.of(model), states[:3], torch.tensor(only[0]), SidTokens(Trie.build(only), VOCABULARY))
    assert sure.item() == 0.0


def test_no_token_has_no_loss():
    head = LMHead.of(random_model(CONFIGS["qwen2"]()))
    none = torch.zeros(0, dtype=torch.long)
    assert catalog_loss(head, torch.zeros(0, 32), none, SidTokens(Trie.build(MIXED), VOCABULARY), 0.1).item() == 0.0


# ------------------------------------------------------------------------------------------------ places in the trie


@pytest.mark.parametrize("sids", [UNIFORM, MIXED, [(7,)]])
def test_paths_are_walks_from_the_root(sids):
    trie = Trie.build(sids)
    chosen, tokens = drawn(sids)
    before, after, level = SidTokens(trie, VOCABULARY).paths(tokens)
    walks = [trie.walk(torch.tensor(sid)).tolist() for sid in chosen]
    assert before.tolist() == [node for walk in walks for node in walk[:-1]]
    assert after.tolist() == [node for walk in walks for node in walk[1:]]
    assert level.tolist() == [depth for sid in chosen for depth in range(len(sid))]


def test_levels_of_tokens():
    level = SidTokens(Trie.build(MIXED), VOCABULARY).level
    assert level.shape == (VOCABULARY,)
    expected = {token: depth for sid in MIXED for depth, token in enumerate(sid)}
    assert {token: depth for token, depth in enumerate(level.tolist()) if depth >= 0} == expected


def test_a_token_at_two_levels_is_refused():
    """Its level could not be told from the token; an index may be written so."""
    for sids in ([(10, 50), (11, 10)], [(10, 10), (11, 11)], [(10, 50, 90), (11, 51, 50)]):
        with pytest.raises(UserError, match="--train_space catalog: a level token is at two levels of the SIDs"):
            SidTokens(Trie.build(sids), VOCABULARY)


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_answers_of_text_and_of_sids_in_one_batch(smoothing):
    """Text has the softmax over the vocabulary, SIDs that over the trie; a blank line and SIDs in prompts cost nothing."""
    model, trie = random_model(CONFIGS["qwen2"]()), Trie.build(MIXED)
    rows = [([3, 10, 51, 90], [11, 12, 50, 91]), ([5, 6], [7, 8, 9, 1]), ([4, 4, 4], [10, 51, 91, 120, 1])]
    batch = Collator(0)([[(torch.tensor(prompt + answer).numpy(), len(answer))] for prompt, answer in rows] + [[]])
    labels = batch.pop("labels")
    losses = AnswerLogits(model, SidTokens(trie, VOCABULARY), smoothing)
    outputs = losses.of(labels, lambda: model(**batch, use_cache=False))
    assert outputs.logits.shape == (5, VOCABULARY)  # those of text only

    expected = {True: torch.zeros(()), False: torch.zeros(())}  # smoothed or not
    for prompt, answer in rows:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        sids = {(11, 12, 50, 91): [(11,), (12, 50, 91)], (10, 51, 91, 120, 1): [(10, 51, 91, 120)]}.get(
            tuple(answer), []
        )
        n = sum(map(len, sids))
        for smooth in expected:
            share = smoothing if smooth else 0.0
            expected[smooth] = expected[smooth] + plain_loss(logits[:n], sids, MIXED, share)
            if n < len(answer):
                text = torch.tensor(answer[n:])
                expected[smooth] += cross_entropy(logits[n:], text, reduction="sum", label_smoothing=share)
    for smooth, value in expected.items():
        torch.testing.assert_close(losses.loss(outputs, labels, 1, smooth=smooth), value, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(losses.loss(outputs, labels, smooth=smooth), value / 13, atol=1e-4, rtol=1e-5)
    weight = model.get_output_embeddings().weight
    blank = labels.new_full((2, 5), IGNORED)
    none = losses.of(blank, lambda: model(input_ids=torch.ones_like(blank), use_cache=False))
    loss = losses.loss(none, blank)
    loss.backward()
    assert loss.item() == 0.0 and weight.grad is not None and not weight.grad.any()
