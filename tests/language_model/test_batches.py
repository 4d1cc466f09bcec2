"""Lines, the order of an epoch, tensors, and packing.

Invariants: a packed line holds whole rows, each row once; the order depends on seed and epoch only; padding of real rows
stays under a tenth; packed rows get the same logits as single rows, for every architecture, or the model is refused.
"""

import functools

import numpy as np
import pytest
import torch
from helpers import INDUSTRIAL
from language_model.small_models import ARCHITECTURES, plain_loss, random_model, random_rows, rows_of

from data import Prompts, load, sft_pairs
from minionerec.catalog.sids import codebook_tokens
from minionerec.common.errors import UserError
from minionerec.language_model.batches import BLANK, IGNORED, Collator, EpochOrder, Lines, pack, packing_collator

REFUSED = ("bloom", "mamba")


def test_packed_lines_hold_every_row_once():
    lengths = np.random.default_rng(0).integers(2, 60, 500)
    lines = Lines(rows_of(lengths.tolist()), capacity=64)
    assert sorted(row for line in lines.rows_of for row in line) == list(range(500))
    assert lines.lengths.max() <= 64 and lines.lengths.mean() > 0.94 * 64
    assert pack(np.array([3, 3, 2]), 5) == [[0, 2], [1]]


def test_order_depends_on_seed_and_epoch_and_ends_with_blanks():
    lengths = np.random.default_rng(0).integers(5, 100, 1000)
    order = EpochOrder(lengths, 64, seed=1, by_length=True)
    first = order.order()
    assert len(first) == len(order) == 1024
    assert first[1000:] == [BLANK] * 24 and sorted(first[:1000]) == list(range(1000))
    assert first == EpochOrder(lengths, 64, seed=1, by_length=True).order()
    order.set_epoch(1)
    assert order.order() != first
    assert EpochOrder(lengths, 64, seed=2, by_length=True).order() != first
    grouped, shuffled = (EpochOrder(lengths, 64, 1, by_length=by).padding_share(8) for by in (True, False))
    assert grouped < 0.1 < 0.3 < shuffled


@functools.cache
def industrial_rows():
    from language_model.test_tokenizing import smollm2_tokenizer

    from minionerec.language_model.tokenizing import tokenize

    index, items = (next(INDUSTRIAL.glob(f"index/*.{kind}.json")) for kind in ("index", "item"))
    data = load(sid_index_path=index, item_meta_path=items, train=next(INDUSTRIAL.glob("train/*.csv")))
    tokenizer = smollm2_tokenizer()
    tokenizer.add_tokens(codebook_tokens(data.items.sids))
    tasks = dict.fromkeys(("sid_seq", "title2sid", "sid2title", "sid_seq2title", "title_seq2title"), 1)
    pairs = sft_pairs(tasks, data.train, data.items, Prompts(category="Industrial_and_Scientific"), 0)
    return tokenize(pairs[::8], tokenizer, "", "; ").trimmed(512)


@pytest.mark.skipif(not INDUSTRIAL.exists(), reason="the Industrial data set is absent")
@pytest.mark.parametrize("packing", [False, True])
def test_padding_of_real_rows_stays_under_a_tenth(packing):
    lines = Lines(industrial_rows(), 512 if packing else 0)
    assert EpochOrder(lines.lengths, 64, 0, by_length=not packing).padding_share(8) < 0.1


def test_blank_lines_have_no_loss():
    lines = Lines(rows_of([4, 6]))
    batch = Collator(pad_token_id=99)([lines[0], lines[BLANK], lines[1]])
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 99, 99], [99] * 6, [4, 5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, -100, 2, 3, -100, -100], [-100] * 6, [-100] * 4 + [8, 9]]


def test_packed_lines_restart_positions():
    """In padding too: a short line beside a long one has no position that no row has."""
    packed = Collator(99, packed=True)([Lines(rows_of([4, 3, 6]), capacity=8)[1], []])
    assert packed["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6], [99] * 7]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2]]
    assert packed["labels"].tolist() == [[-100, -100, 2, 3, -100, 5, 6], [-100] * 7]


def test_the_mask_shows_each_token_its_row_up_to_itself():
    batch = Collator(99, packed=True, mask=True)([Lines(rows_of([3, 2]), capacity=6)[0]])
    visible = (batch["attention_mask"] == 0)[0, 0].int().tolist()
    assert visible == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


# ------------------------------------------------------------------------------------------------ packing


def packed_loss(model, rows, collator) -> float:
    """Mean loss of the answers in nats per token, by full logits of packed lines."""
    nats = count = 0
    lines = Lines(rows, 40)
    for i in range(len(lines)):
        batch = collator([lines[i]])
        wanted = batch.pop("labels")[:, 1:]
        keep = wanted != IGNORED
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[:, :-1][keep]
        nats += torch.nn.functional.cross_entropy(logits, wanted[keep], reduction="sum").item()
        count += int(keep.sum())
    return nats / count


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in REFUSED])
def test_packed_rows_have_the_loss_that_they_have_alone(name):
    model, rows = random_model(name, 0.3).train(), random_rows()
    collator = packing_collator(model, 0)
    assert model.training and collator.packed and collator.mask == name.startswith("opt")
    model.eval()
    assert packed_loss(model, rows, collator) == pytest.approx(plain_loss(model, rows), abs=1e-4)


def test_without_its_mask_a_model_with_learned_offsets_mixes_packed_rows():
    model, rows = random_model("opt", 0.3), random_rows()
    assert abs(packed_loss(model, rows, Collator(0, packed=True)) - plain_loss(model, rows)) > 0.05


@pytest.mark.parametrize("std", [0, 0.3])  # 0: as initialised, where an error is smallest
@pytest.mark.parametrize("name", REFUSED)
def test_models_that_would_mix_packed_rows_are_refused(name, std):
    with pytest.raises(UserError, match="--packing True: .* gives packed rows other logits than single rows"):
        packing_collator(random_model(name, std), 0)


def test_a_window_is_not_overridden_by_a_mask():
    model = random_model("opt", 0.3)
    model.config.sliding_window = 8
    with pytest.raises(UserError, match="attention window"):
        packing_collator(model, 0)
