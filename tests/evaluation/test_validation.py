"""Validation during training: the metrics of a plain search, also for unseen items and for a process without rows."""

from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator

from minionerec.decoding.engine import TransformersEngine, recommend
from minionerec.evaluation import validation
from minionerec.evaluation.metrics import sid_and_item_ranks, table
from minionerec.evaluation.validation import Validation

PROMPTS = ["<a_1><b_2>", "a title", "Answer:\n"]
TARGETS, SEEN = [5, 6, 20], [[5, 1], [5], []]  # items 5 and 6 share a SID


@pytest.fixture
def trainer(policy):
    accelerator = Accelerator(cpu=True)
    single = SimpleNamespace(
        process_index=0, num_processes=1, autocast=accelerator.autocast, unwrap_model=accelerator.unwrap_model,
        state=accelerator.state,
    )  # fmt: skip
    arguments = SimpleNamespace(per_device_eval_batch_size=2)
    return SimpleNamespace(
        accelerator=single, args=arguments, model_wrapped=policy.model, processing_class=policy.tokenizer
    )


@pytest.mark.parametrize("seen", [None, SEEN])
def test_equals_a_plain_search(policy, trainer, seen):
    trie, catalog = policy.catalog.trie(policy.tokenizer), policy.catalog
    measured = Validation(PROMPTS, TARGETS, catalog, trie, 47, "catalog", seen).measure(trainer)
    engine = TransformersEngine(policy.model, trie, 0, "catalog")
    sid_rows, _ = recommend(engine, policy.tokenizer, PROMPTS, 47, 8)
    expected = table(sid_and_item_ranks(sid_rows, TARGETS, catalog, seen)[1], [1, 3, 5, 10, 20])
    if seen is None:
        assert measured == expected
    else:
        assert measured["HR@20"] <= 2 / 3  # a seen target is missed
        everything = Validation(PROMPTS, TARGETS, catalog, trie, 47, "vocab", seen).measure(trainer)
        sid_rows, _ = recommend(TransformersEngine(policy.model, trie, 0), policy.tokenizer, PROMPTS, 47, 8)
        ranks = sid_and_item_ranks(sid_rows, TARGETS, catalog, seen)[1]
        assert everything == table(ranks, [1, 3, 5, 10, 20])  # removing a SID does not change the others' scores


def test_a_process_without_rows_takes_part(policy, trainer, monkeypatch):
    """One row for two processes: the second one has none and must reach the gathering."""
    trie = policy.catalog.trie(policy.tokenizer)
    one = Validation(PROMPTS[:1], TARGETS[:1], policy.catalog, trie, 20, seen=SEEN[:1])
    alone = one.measure(trainer)
    gathered = []
    monkeypatch.setattr(validation, "gather_object", lambda ranks: gathered.extend(ranks) or gathered)
    for index in (0, 1):
        trainer.accelerator.process_index, trainer.accelerator.num_processes = index, 2
        both = one.measure(trainer)
    assert [len(ranks) for ranks in gathered] == [1, 0] and both == alone
    assert np.concatenate(gathered).dtype == np.int64


def test_seen_items_free_their_beams(policy, trainer):
    """The items of the five best SIDs are seen: the sixth is found by five beams."""
    trie, catalog = policy.catalog.trie(policy.tokenizer), policy.catalog
    best = recommend(TransformersEngine(policy.model, trie, 0), policy.tokenizer, PROMPTS, 6, 8)[0].tolist()
    seen = [[item for sid_row in row[:5] for item in catalog.items_of_sid[sid_row]] for row in best]
    targets = [catalog.items_of_sid[row[5]][0] for row in best]
    assert Validation(PROMPTS, targets, catalog, trie, 5).measure(trainer)["HR@5"] == 0
    assert Validation(PROMPTS, targets, catalog, trie, 5, seen=seen).measure(trainer)["HR@5"] == 1
