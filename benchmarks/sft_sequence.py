"""SFT on next SIDs: whole sequences and row by row, tokens and seconds of an epoch side by side.

    python -m benchmarks.sft_sequence --json                        # MovieLens-100K under random SIDs
    python -m benchmarks.sft_sequence --dataset_dir D --json        # any folder in the published layout

Both sides train the same targets of the same users with the model and the prompts of run.sh: a small untrained Qwen2
(config/tiny_qwen2.json) with a tokenizer of the titles. Row by row, each target is a row with its own prompt, in batches
of about equal length; whole sequences are the rows of minionerec/language_model/sid_sequences.py. A step of either side
has about the same number of targets, so both take the same number of steps.

The sides take turns, an epoch each, so that other work on the machine slows both; figures are medians over rounds after
one step of warm-up. `token_ratio` and `time_ratio` are row by row divided by whole sequences; padding is time and no
token.
"""

import json
import random
import statistics
import time
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import movielens_rows
from benchmarks.dataset import files_of
from benchmarks.shared import device_name, finish
from data import Prompts, load
from minionerec.catalog.catalog import Catalog
from minionerec.catalog.items import Items
from minionerec.catalog.sids import codebook_tokens
from minionerec.common.devices import pick_device
from minionerec.common.errors import UserError
from minionerec.common.files import read_json
from minionerec.common.options import option, run
from minionerec.decoding.spaces import SPACES
from minionerec.language_model.base_model import ROOT, train_tokenizer
from minionerec.language_model.batches import Collator, EpochOrder, Lines
from minionerec.language_model.catalog_loss import SidTokens
from minionerec.language_model.new_tokens import add_tokens
from minionerec.language_model.sft_trainer import AnswerLogits
from minionerec.language_model.sid_sequences import sequence_rows, single_rows
from minionerec.language_model.tokenizing import Rows

SIDES = ("rows", "sequences")
VOCABULARY = 2048  # BPE tokens, as of minionerec.language_model.base_model


@dataclass
class Options:
    dataset_dir: str = option("", "folder in the published layout; default: MovieLens-100K under random SIDs")
    device: str = option("", "cpu or cuda; default: cuda if there is a GPU")
    targets: int = option(5000, "users are drawn until they have this many targets; 0: all users")
    max_history: int = option(20, "items of history in a prompt")
    batch_size: int = option(128, "targets per step")
    space: str = option("catalog", "what the loss is normalised over: vocab or catalog")
    rounds: int = option(3, "epochs of each side")
    threads: int = option(0, "CPU threads; 0: torch's default")
    json: bool = option(False, "print the ratios as JSON in the last line")

    def __post_init__(self):
        for name in ("max_history", "batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: expected at least 1")
        if self.space not in SPACES:
            raise UserError(f"--space {self.space}: expected {' or '.join(SPACES)}")


# ------------------------------------------------------------------------------------------------ data and model


def read(options: Options) -> tuple[pl.DataFrame, Items]:
    """(train rows of the drawn users, items)"""
    if options.dataset_dir:
        files = files_of(options.dataset_dir)
        paths = {"info_file": files.info, "sid_index_path": files.index, "item_meta_path": files.items}
        data = load(**paths, train=files.train, max_history=options.max_history)
        train, items = data.train, data.items
    else:
        train, items = movielens_rows.samples(options.max_history, random.Random(0))
    if not options.targets:
        return train, items
    users = train.group_by("user", maintain_order=True).len().sample(fraction=1, shuffle=True, seed=0)
    drawn = users.filter(pl.col("len").cum_sum() - pl.col("len") < options.targets)
    return train.join(drawn, on="user", how="semi", maintain_order="left"), items


def build(items: Items):
    """(model, tokenizer): as minionerec.language_model.base_model makes them, with the SID tokens."""
    tokenizer = train_tokenizer(items.titles, VOCABULARY)
    settings = read_json(ROOT / "config" / "tiny_qwen2.json", "config_file")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings, vocab_size=len(tokenizer)))
    add_tokens(model, tokenizer, codebook_tokens(items.sids))
    return model, tokenizer


# ------------------------------------------------------------------------------------------------ training


class Side:
    """Rows of one side, and a model that is trained on them."""

    def __init__(self, rows: Rows, batch_size: int, model, sids: SidTokens | None, pad_token_id: int):
        self.lines, self.model, self.collator = Lines(rows), model.train(), Collator(pad_token_id)
        self.order = EpochOrder(self.lines.lengths, batch_size, seed=0, by_length=True)
        self.losses, self.optimizer = AnswerLogits(model, sids), torch.optim.AdamW(model.parameters(), lr=1e-3)

    def batches(self) -> list[list[int]]:
        return np.array(self.order.order()).reshape(-1, self.order.batch_size).tolist()

    def step(self, lines: list[int]) -> None:
        """One optimizer step."""
        batch = {
            name: value.to(self.model.device) for name, value in self.collator([self.lines[i] for i in lines]).items()
        }
        labels = batch.pop("labels")
        outputs = self.losses.of(labels, lambda: self.model(**batch, use_cache=False))
        self.losses.loss(outputs, labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def epoch(self, number: int) -> float:
        """Seconds."""
        self.order.set_epoch(number)
        device = str(self.model.device)
        finish(device)
        started = time.perf_counter()
        for lines in self.batches():
            self.step(lines)
        finish(device)
        return time.perf_counter() - started


def main(options: Options) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    train, items = read(options)
    prefix = Prompts(category="items").render("sid_seq", history="")
    sides = {}
    for name in SIDES:
        model, tokenizer = build(items)
        sids = None
        if options.space == "catalog":
            sids = SidTokens(Catalog(items.sids).trie(tokenizer), model.get_input_embeddings().weight.shape[0]).to(
                device
            )
        if name == "rows":
            rows = single_rows(train, items.sids, prefix, tokenizer)
        else:
            rows = sequence_rows(train, items.sids, prefix, tokenizer, options.max_history)
        lines = max(1, round(options.batch_size * len(rows.answer) / len(train)))
        sides[name] = Side(rows, lines, model.to(device), sids, tokenizer.pad_token_id)
    answers = {int(side.lines.rows.answer.sum()) for side in sides.values()}
    assert len(answers) == 1, answers  # the same targets

    for side in sides.values():
        side.step(side.batches()[0])
    seconds = {name: [] for name in SIDES}
    for number in range(options.rounds):
        for name, side in sides.items():
            seconds[name].append(side.epoch(number))

    print(
        f"{device_name(str(device))}, {torch.get_num_threads()} threads; {len(train):,} targets an epoch, loss in {options.space}"
    )
    time_of = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = {name: int(side.lines.lengths.sum()) for name, side in sides.items()}
    for name, side in sides.items():
        padding = side.order.padding_share(side.order.batch_size)
        print(
            f"{name:10}{len(side.lines):8,} lines{tokens[name]:11,} tokens{padding:7.1%} padding"
            f"{len(side.batches()):6} steps{time_of[name]:9.2f} s an epoch"
        )
    ratios = {"token_ratio": tokens["rows"] / tokens["sequences"], "time_ratio": time_of["rows"] / time_of["sequences"]}
    print(
        f"whole sequences take 1/{ratios['token_ratio']:.1f} of the tokens and 1/{ratios['time_ratio']:.1f} of the time"
    )
    if options.json:
        print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    run(main, Options)
