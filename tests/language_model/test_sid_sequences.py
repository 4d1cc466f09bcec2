"""Rows of SFT that are whole sequences, compared with rows one by one.

Invariants: a row's ids are what the tokenizer makes of prompt and answers; the loss and its gradients summed over the
sequences are those summed over their rows, each with its own prompt, for sequences within the window, in both spaces,
packed or not, for SIDs of one depth and of several; a tokenizer that joins SIDs is refused.
"""

import copy
import random
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from helpers import ROOT
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from data import Prompts, next_sid_prompts
from minionerec.catalog.catalog import Catalog
from minionerec.catalog.items import Items
from minionerec.catalog.windows import chain, windows
from minionerec.common.errors import UserError
from minionerec.language_model.batches import BLANK, Collator, Lines
from minionerec.language_model.catalog_loss import SidTokens
from minionerec.language_model.checkpoints import load_tokenizer
from minionerec.language_model.sft_trainer import AnswerLogits
from minionerec.language_model.sid_sequences import check_sequences, sequence_rows, single_rows

PROMPTS = Prompts(category="Toys_and_Games")
PREFIX = PROMPTS.render("sid_seq", history="")
MAX_HISTORY = 10
MIXED = ["<a_3>", "<a_2><b_1>", "<a_2><b_2>", "<a_2><b_0><c_0>", "<a_2><b_0><c_3>", "<a_1><b_0>", "<a_0><b_0><c_1>"]


def train_rows(n_items: int, longest: int = MAX_HISTORY + 1, users: int = 9, seed: int = 0) -> pl.DataFrame:
    """Each user's rows, of walks that repeat items; every third user begins with an empty history."""
    rng, rows = random.Random(seed), []
    for user in range(users):
        line = [rng.randrange(n_items) for _ in range(rng.randint(2, longest))]
        rows += [(str(user), line[max(0, i - MAX_HISTORY) : i], line[i]) for i in range(user % 3 > 0, len(line))]
    schema = {"user": pl.String, "history": pl.List(pl.Int64), "target": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")


@pytest.fixture(params=["one depth", "mixed depth"])
def setting(request, policy):
    """Items, their rows, and a copy of the policy that knows their level tokens."""
    sids = policy.items.sids if request.param == "one depth" else MIXED
    items = Items(sids, [f"Item {i}" for i in range(len(sids))])
    model = copy.deepcopy(policy.model).eval()
    return SimpleNamespace(model=model, tokenizer=policy.tokenizer, items=items, train=train_rows(len(sids)))


def ids_of(rows) -> list[list[int]]:
    return [rows.tokens[a:b].tolist() for a, b in zip(rows.start, rows.start[1:], strict=False)]


# ------------------------------------------------------------------------------------------------ ids


@pytest.mark.parametrize("longest", [MAX_HISTORY + 1, 40])
def test_ids_are_the_tokenizers(setting, longest):
    train, tokenizer, sids = train_rows(len(setting.items.sids), longest), setting.tokenizer, setting.items.sids
    rows = sequence_rows(train, sids, PREFIX, tokenizer, MAX_HISTORY)
    sequences = chain(train)
    expected = list(zip(*windows(sequences, MAX_HISTORY + 1), strict=True))
    assert len(rows.answer) == len(expected)
    for ids, answer, (begin, end, context) in zip(ids_of(rows), rows.answer, expected, strict=True):
        texts = [sids[item] for item in sequences.items[begin:end]]
        assert ids == tokenizer(PREFIX + "".join(texts))["input_ids"]
        targets = "".join(texts[context:])
        assert answer == len(tokenizer(targets, add_special_tokens=False)["input_ids"])


def test_single_rows_are_the_prompts_of_evaluation_and_their_targets(setting):
    sids, tokenizer = setting.items.sids, setting.tokenizer
    rows = single_rows(setting.train, sids, PREFIX, tokenizer)
    prompts = next_sid_prompts(setting.train, setting.items, PROMPTS)
    for ids, answer, prompt, target in zip(
        ids_of(rows), rows.answer, prompts, setting.train["target"].to_list(), strict=True
    ):
        assert ids == tokenizer(prompt + sids[target])["input_ids"]
        assert ids[: len(ids) - answer] == tokenizer(prompt)["input_ids"]


def test_a_sequence_counts_each_target_once(setting):
    """More than a window long: as many answer tokens as the rows have, one by one."""
    train = train_rows(len(setting.items.sids), longest=60)
    whole, single = (
        make(train, setting.items.sids, PREFIX, setting.tokenizer, *more)
        for make, more in ((sequence_rows, [MAX_HISTORY]), (single_rows, []))
    )
    assert whole.answer.sum() == single.answer.sum()
    assert whole.lengths.sum() < single.lengths.sum() / 3


def test_a_tokenizer_that_joins_sids_is_refused(setting, base_model):
    """One that has a token for the end of a SID and the beginning of the next."""
    check_sequences(setting.train, setting.items.sids, PREFIX, setting.tokenizer)
    joining = load_tokenizer(base_model, "base_model")
    joining.add_tokens(["><"])
    with pytest.raises(UserError, match="does not split it at its SIDs.*--prompt_template") as refused:
        check_sequences(setting.train, setting.items.sids, PREFIX, joining)
    [template] = [word for word in str(refused.value).replace(")", " ").split() if word.endswith(".yaml")]
    assert not Prompts(ROOT / template).continues  # the remedy is there, and is one


# ------------------------------------------------------------------------------------------------ the loss


def plain_loss(model, tokenizer, train, items, space) -> torch.Tensor:
    """Row by row, each with its own prompt: the sum of -log p of the target's tokens, from whole logits."""
    encoded = [tokenizer(sid, add_special_tokens=False)["input_ids"] for sid in items.sids]
    total = torch.zeros(())
    for prompt, target in zip(next_sid_prompts(train, items, PROMPTS), train["target"].to_list(), strict=True):
        before, answer = tokenizer(prompt)["input_ids"], encoded[target]
        logits = model(input_ids=torch.tensor([before + answer]), use_cache=False).logits[0, len(before) - 1 : -1]
        for depth, token in enumerate(answer):
            allowed = list(range(logits.shape[1]))
            if space == "catalog":
                longer = [ids for ids in encoded if ids[:depth] == answer[:depth] and len(ids) > depth]
                allowed = sorted({ids[depth] for ids in longer})
            total = total + cross_entropy(logits[depth, allowed], torch.tensor(allowed.index(token)))
    return total


def batch_loss(model, rows, sids, capacity: int) -> torch.Tensor:
    """The sum over rows as the trainer computes it, all lines and a blank one in one batch."""
    lines = Lines(rows, capacity)
    batch = Collator(0, packed=capacity > 0)([lines[i] for i in [*range(len(lines)), BLANK]])
    labels, losses = batch.pop("labels"), AnswerLogits(model, sids)
    return losses.loss(losses.of(labels, lambda: model(**batch, use_cache=False)), labels, 1)


def with_gradients(model, loss: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("space", ["vocab", "catalog"])
def test_the_sum_over_sequences_is_the_sum_over_rows(setting, space):
    model, tokenizer, items, train = setting.model, setting.tokenizer, setting.items, setting.train
    vocabulary = model.get_input_embeddings().weight.shape[0]
    sids = SidTokens(Catalog(items.sids).trie(tokenizer), vocabulary) if space == "catalog" else None
    expected, gradients = with_gradients(model, plain_loss(model, tokenizer, train, items, space))
    whole = sequence_rows(train, items.sids, PREFIX, tokenizer, MAX_HISTORY)
    single = single_rows(train, items.sids, PREFIX, tokenizer)
    assert len(whole.answer) == train["user"].n_unique() < len(single.answer)
    for rows, capacity in ((whole, 0), (whole, 80), (single, 0), (single, 80)):
        copied = copy.deepcopy(model)  # hooks stay on what they were put on
        loss, found = with_gradients(copied, batch_loss(copied, rows, sids, capacity))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        scale = max(value.abs().max() for value in gradients.values())
        for name, value in gradients.items():
            torch.testing.assert_close(found[name], value, atol=1e-5 * scale.item(), rtol=1e-4)


def test_packed_sequences_of_another_architecture(policy):
    """An untied Llama: the head's rows of unused tokens get no gradient in space catalog."""
    torch.manual_seed(0)
    vocabulary = policy.model.get_input_embeddings().weight.shape[0]
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, tie_word_embeddings=False)  # fmt: skip
    model, items = LlamaForCausalLM(config).eval(), Items(MIXED, MIXED)
    trie, train = Catalog(MIXED).trie(policy.tokenizer), train_rows(len(MIXED))
    expected = plain_loss(model, policy.tokenizer, train, items, "catalog").item()
    rows = sequence_rows(train, MIXED, PREFIX, policy.tokenizer, MAX_HISTORY)
    loss, gradients = with_gradients(model, batch_loss(model, rows, SidTokens(trie, vocabulary), 60))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    used = np.flatnonzero(gradients["lm_head.weight"].abs().sum(dim=1).numpy())
    assert set(used.tolist()) <= set(trie.tokens.tolist())
