"""Rows of SFT that are whole sequences of SIDs: `prefix SID SID SID …`, with the loss on every target.

Where the answer to a history follows it directly in the template, a user's rows are prefixes of one another, and one
causal pass over the sequence trains all of them: no packing, no tree mask. The loss of a window equals the sum over its
rows, for every target that has the same items before it in both.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from minionerec.catalog.windows import chain, windows
from minionerec.common.errors import UserError
from minionerec.language_model.tokenizing import Rows


def sequence_rows(train: pl.DataFrame, sids: Sequence[str], prefix: str, tokenizer, max_history: int) -> Rows:
    """Windows of at most `max_history` + 1 items over the sequences of `train`; each target is an answer of one window.

    train: columns user, history, target, each user's rows in file order; sids: row i is item i; prefix: the prompt of an
    empty history.
    """
    sequences = chain(train)
    return _rows(sequences.items, *windows(sequences, max_history + 1), sids, prefix, tokenizer)


def single_rows(rows: pl.DataFrame, sids: Sequence[str], prefix: str, tokenizer) -> Rows:
    """One row for each of `rows`, (columns history, target), with the target as its answer."""
    items = rows.select(items=pl.concat_list("history", "target"))["items"]
    lengths = items.list.len().to_numpy().astype(np.int64)
    end = np.cumsum(lengths)
    return _rows(items.explode().to_numpy(), end - lengths, end, lengths - 1, sids, prefix, tokenizer)


def _rows(
    items: np.ndarray, begin: np.ndarray, end: np.ndarray, context: np.ndarray, sids, prefix: str, tokenizer
) -> Rows:
    """Window i is `items[begin[i]:end[i]]`; its items from `context[i]` on are answers."""
    used, items = np.unique(items, return_inverse=True)
    sids = [sids[item] for item in used]
    before = tokenizer(prefix)["input_ids"]
    encoded = tokenizer(sids, add_special_tokens=False)["input_ids"]
    flat = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in [*encoded, before]])
    lengths = np.array([len(ids) for ids in [*encoded, before]])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])

    # Every row as pieces: the prefix, then its items.
    counts = end - begin + 1
    row_start = np.concatenate([[0], np.cumsum(counts)])
    place = np.arange(row_start[-1]) - np.repeat(row_start[:-1], counts)  # of a piece in its row
    item = items[np.repeat(begin - 1, counts) + place]  # at place 0 any item: replaced by the prefix
    piece = np.where(place == 0, len(sids), item)
    answers = np.where(place > np.repeat(context, counts), lengths[piece], 0)
    shift = np.repeat(starts[piece] - np.concatenate([[0], np.cumsum(lengths[piece])[:-1]]), lengths[piece])
    tokens = flat[shift + np.arange(len(shift))]
    return Rows(
        tokens,
        np.concatenate([[0], np.cumsum(np.add.reduceat(lengths[piece], row_start[:-1]))]),
        np.add.reduceat(answers, row_start[:-1]).astype(np.int32),
    )


def check_sequences(train: pl.DataFrame, sids: Sequence[str], prefix: str, tokenizer) -> None:
    """Raise `UserError` unless `tokenizer(text)`, which evaluation prompts with, gives the ids of a sample of prompts."""
    for history in train["history"].head(64).to_list():
        text = prefix + "".join(sids[item] for item in history)
        joined = tokenizer(prefix)["input_ids"] + [
            token for item in history for token in tokenizer(sids[item], add_special_tokens=False)["input_ids"]
        ]
        if tokenizer(text)["input_ids"] != joined:
            raise UserError(
                f"prompt {text[:60]!r}: the tokenizer does not split it at its SIDs, so whole sequences cannot be trained; "
                "use a template with a response marker (--prompt_template config/prompt_upstream.yaml)"
            )
