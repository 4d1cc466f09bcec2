"""Augmentation of whole sequences: items are dropped and beginnings cropped, drawn again in every epoch.

    sequence   a b c d e        targets are b, c, d and e
    dropped    a c d e          what follows a is now c
    cropped      b c d e        the history of c is now b only

A row keeps at least its two latest items. Rows of other tasks, whose text is more than a prompt and SIDs, stay as they
are. As in CL4SRec (Xie et al. 2022, arXiv 2010.14395), without its contrastive loss.
"""

import numpy as np

from minionerec.common.errors import UserError
from minionerec.language_model.batches import EpochOrder, Lines
from minionerec.language_model.tokenizing import Rows


class AugmentedLines(Lines):
    """`Lines` whose sequences lose each item with probability `drop`, and with probability `crop` their beginning.

    What a line loses depends only on the seed and the epoch of `order` and on the line: equal for any number of
    processes, and on resume.
    """

    order: EpochOrder  # of these lines; it is made from their lengths, so it comes later

    def __init__(self, rows: Rows, level: np.ndarray, drop: float, crop: float):
        """level: (vocabulary,) the level of each token id in SIDs, -1 for a token that is in none."""
        super().__init__(rows)
        self.level, self.drop, self.crop = level, drop, crop

    def __getitem__(self, line: int) -> list[tuple[np.ndarray, int]]:
        rng = np.random.default_rng([self.order.seed, self.order.epoch, line + 1])  # a blank line is -1
        return [self.augmented(tokens, answer, rng) for tokens, answer in super().__getitem__(line)]

    def augmented(self, tokens: np.ndarray, answer: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """(token ids, tokens of the answer) of a row, with items left out."""
        levels = self.level[tokens]
        begins = np.flatnonzero(levels == 0)  # of the items
        if len(begins) < 3 or (levels[begins[0] :] < 0).any():
            return tokens, answer
        keep = rng.random(len(begins)) >= self.drop
        if rng.random() < self.crop:
            keep[: rng.integers(len(begins) - 1)] = False
        keep[-2:] = True
        item = (levels == 0).cumsum() - 1  # the item of each token, -1 for the prompt's
        kept = np.append(keep, True)[item]
        is_answer = np.arange(len(tokens)) >= len(tokens) - answer
        if begins[0] < len(tokens) - answer:  # the first item is history: it stays history, whichever it now is
            is_answer &= item > np.flatnonzero(keep)[0]
        return tokens[kept], int((kept & is_answer).sum())


def level_of_tokens(sids, tokenizer, vocabulary: int) -> np.ndarray:
    """(vocabulary,) the level of each token id in `sids`, -1 for a token that is in none.

    Raises `UserError` where a token is at two levels: the items of a sequence could not be told apart.
    """
    level = np.full(vocabulary, -1)
    for tokens in tokenizer(list(sids), add_special_tokens=False)["input_ids"]:
        for depth, token in enumerate(tokens):
            if level[token] not in (-1, depth):
                raise UserError(
                    f"--history_drop and --history_crop: the level token {tokenizer.convert_ids_to_tokens(token)} is at two "
                    "levels of the SIDs; use 0, or another index, with tokens like <a_1> <b_1> <c_1>"
                )
            level[token] = depth
    return level
