"""Whole sequences with items left out.

Invariants: what stays is in order, with its tokens whole; the two latest items stay; the first item of history stays
history and every other kept item of the answer stays a target; shares are those asked for; draws follow seed and epoch
alone; rows of other tasks do not change; tokens at two levels are refused.
"""

import numpy as np
import pytest

from minionerec.common.errors import UserError
from minionerec.language_model.augmentation import AugmentedLines, level_of_tokens
from minionerec.language_model.batches import BLANK, EpochOrder, Lines
from minionerec.language_model.tokenizing import Rows

PROMPT = [90, 91]
LEVEL = np.full(100, -1)
LEVEL[0:10], LEVEL[10:20], LEVEL[20:30] = 0, 1, 2  # item i is i, 10 + i, and, where i is odd, 20 + i


def tokens_of(items) -> list[int]:
    return [token for i in items for token in ([i, 10 + i, 20 + i] if i % 2 else [i, 10 + i])]


def items_of(tokens) -> list[int]:
    """The items of a row; each must be whole, after the prompt."""
    items = [int(token) for token in tokens if token < 10]
    assert list(tokens) == PROMPT + tokens_of(items)
    return items


def rows(*sequences, targets=None, prompt=PROMPT) -> Rows:
    """Rows whose answer is the last `targets` items, by default all but the first."""
    lines = [prompt + tokens_of(items) for items in sequences]
    answers = [len(tokens_of(items[-targets:] if targets else items[1:])) for items in sequences]
    start = np.concatenate([[0], np.cumsum([len(line) for line in lines])])
    return Rows(np.concatenate(lines), start, np.array(answers))


def lines_of(content: Rows, drop=0.0, crop=0.0, seed=0, epoch=0) -> AugmentedLines:
    lines = AugmentedLines(content, LEVEL, drop, crop)
    lines.order = EpochOrder(lines.lengths, 4, seed, by_length=False)
    lines.order.set_epoch(epoch)
    return lines


def drawn(content: Rows, epochs=200, **values):
    """(items, number of targets) of the first line in each epoch."""
    for epoch in range(epochs):
        [(tokens, answer)] = lines_of(content, epoch=epoch, **values)[0]
        items = items_of(tokens)
        targets = [n for n in range(len(items) + 1) if len(tokens_of(items[len(items) - n :])) == answer]
        assert len(targets) == 1, "the answer begins inside an item"
        yield items, targets[0]


SEQUENCE = [3, 1, 4, 8, 5, 9, 2, 6]


@pytest.mark.parametrize("values", [{"drop": 0.3}, {"crop": 0.5}, {"drop": 0.5, "crop": 1.0}])
def test_items_are_left_out_whole_and_in_order(values):
    lengths = set()
    for items, targets in drawn(rows(SEQUENCE), **values):
        left = iter(SEQUENCE)
        assert all(item in left for item in items) and items[-2:] == SEQUENCE[-2:]
        assert targets == len(items) - 1  # the first has no history
        lengths.add(len(items))
    assert len(lengths) > 3


def test_a_window_keeps_its_context_out_of_the_loss():
    for items, targets in drawn(rows(SEQUENCE, targets=3), drop=0.5, crop=0.5):
        assert targets == min(len([i for i in items if i in SEQUENCE[-3:]]), len(items) - 1)


def test_a_first_item_without_history_stays_a_target():
    content = rows(SEQUENCE)._replace(answer=np.array([len(tokens_of(SEQUENCE))]))
    assert all(targets == len(items) for items, targets in drawn(content, drop=0.5, crop=0.5))


def test_shares_are_those_asked_for():
    sequence = rows(SEQUENCE)
    free = len(SEQUENCE) - 2
    dropped = np.mean([len(SEQUENCE) - len(items) for items, _ in drawn(sequence, 2000, drop=0.25)])
    assert dropped == pytest.approx(0.25 * free, abs=0.1)
    cut = np.array([len(SEQUENCE) - len(items) for items, _ in drawn(sequence, 2000, crop=0.5)])
    assert cut.mean() == pytest.approx(0.5 * np.mean(range(free + 1)), abs=0.15)
    assert all(items == SEQUENCE[-len(items) :] for items, _ in drawn(sequence, crop=0.5))


def test_draws_follow_seed_and_epoch_and_line():
    content = rows(*[SEQUENCE] * 20)

    def draw(**values):
        lines = lines_of(content, drop=0.5, **values)
        return [tuple(lines[i][0][0]) for i in range(20)]

    first = draw()
    lines = lines_of(content, drop=0.5)
    assert first == [tuple(lines[i][0][0]) for i in reversed(range(20))][::-1]
    assert first != draw(epoch=1) and first != draw(seed=1) and len(set(first)) > 10


def test_other_rows_do_not_change():
    short, text = rows([3, 1]), rows(SEQUENCE)
    text.tokens[5] = 95  # a word between the items
    for content in (short, text):
        for epoch in range(20):
            lines = lines_of(content, drop=0.9, crop=1.0, epoch=epoch)
            [(tokens, answer)], [(expected, count)] = lines[0], Lines(content)[0]
            assert (tokens == expected).all() and answer == count
    assert lines[BLANK] == []


def test_levels_come_from_the_tokenizer(policy):
    sids, tokenizer = policy.items.sids, policy.tokenizer
    level = level_of_tokens(sids, tokenizer, len(tokenizer))
    for token, id in tokenizer.get_vocab().items():
        used = any(token in sid for sid in sids) and token.startswith("<") and "_" in token
        assert level[id] == ("abc".index(token[1]) if used else -1)


def test_a_token_at_two_levels_is_refused():
    class Tokenizer:
        def __call__(self, sids, add_special_tokens):
            return {"input_ids": [[1, 2], [2, 3]]}

        def convert_ids_to_tokens(self, id):
            return f"<{id}>"

    with pytest.raises(UserError, match=r"the level token <2> is at two levels of the SIDs"):
        level_of_tokens(["x", "y"], Tokenizer(), 5)
