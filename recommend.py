"""Ask a trained model: a history in, the next items out.

    python recommend.py --base_model output/quickstart/sft --info_file output/quickstart/data/info/ml-100k.txt \
        --category movies --history "star wars; alien; blade runner"

A history is item ids ("49, 182, 88") or words to find titles by, parts separated by `;`, oldest first. Without one, lines
are read from the keyboard until an empty one. With `--jsonl`, each line of stdin is one user,
`{"history": [49, "blade runner"], …}`, and each line of stdout the same object with `predict` added: a list of
`{"item_id", "title", "sid", "score"}`. Scores are log-probabilities in nats; in space `catalog`, over the whole catalog,
exp(score) is the chance that the model gives the SID.
"""

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import islice

import polars as pl
import torch
from transformers.hf_argparser import HfArg
from transformers.utils.logging import disable_progress_bar

from data import Prompts, next_sid_prompts, read_sequences, template_of
from minionerec.catalog.catalog import Catalog, target_counts
from minionerec.catalog.items import Items, read_info
from minionerec.common.devices import device_has_bf16
from minionerec.common.errors import UserError
from minionerec.common.files import require_file
from minionerec.common.options import run
from minionerec.decoding.beam_search import recommend
from minionerec.decoding.lm_head import SPACES
from minionerec.language_model.checkpoints import load_model, load_tokenizer


@dataclass
class Options:
    base_model: str = HfArg(default="", help="folder of the checkpoint")
    info_file: str = HfArg(default="", help="info file: the catalog")
    category: str = HfArg(default="", help="what the prompts call the items")
    history: str = HfArg(default="", help="item ids, or words of titles, parts separated by ';', oldest first")
    jsonl: bool = HfArg(default=False, help="read users as JSON lines from stdin, write JSON lines to stdout")
    K: int = HfArg(default=10, help="items recommended")
    exclude_seen: bool = HfArg(default=False, help="recommend no item of the history")
    only_items: str = HfArg(default="", help="recommend only these item ids, separated by commas")
    title_words: str = HfArg(default="", help="recommend only items whose titles have all these words")
    train_file: str = HfArg(
        default="", help="train CSV: of several items found or sharing a SID the most popular first"
    )
    num_beams: int = HfArg(default=0, help="beams; 0: at least 50, and K")
    space: str = HfArg(default="catalog", help="vocab: scores over the whole vocabulary; catalog: over what may follow")
    batch_size: int = HfArg(default=8, help="users a forward")
    max_history: int = HfArg(default=10, help="items of history in a prompt: the last ones")
    prompt_template: str = HfArg(default="", help="wording of the prompts; default: the checkpoint's own")

    def check(self) -> None:
        for flag in ("base_model", "info_file"):
            require_file(getattr(self, flag), flag)
        for flag in ("K", "batch_size", "max_history"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag} {getattr(self, flag)}: expected at least 1")
        if self.space not in SPACES:
            raise UserError(f"--space {self.space}: expected one of {', '.join(SPACES)}")
        if 0 < self.num_beams < self.K:
            raise UserError(f"--num_beams {self.num_beams}: expected at least --K {self.K}, or 0")
        if self.jsonl and self.history:
            raise UserError("--history and --jsonl exclude each other: give histories on stdin")


# ------------------------------------------------------------------------------------------------ finding items


class Titles:
    """Items by the words of their titles."""

    def __init__(self, items: Items, popularity: Sequence[int]):
        self.titles, self.popularity = items.titles, popularity
        self.folded = [self._fold(title) for title in items.titles]

    @staticmethod
    def _fold(text: str) -> str:
        return "".join(f" {word}" for word in re.findall(r"\w+", text.casefold()))

    def matches(self, words: str) -> list[int]:
        """Items whose titles have a word beginning with each of `words`.

        The title that is just these words stands first, then the most popular, then the shortest, then by id.
        """
        whole = self._fold(words)
        wanted = [f" {word}" for word in whole.split()]
        found = [item for item, title in enumerate(self.folded) if wanted and all(word in title for word in wanted)]
        return sorted(found, key=lambda i: (self.folded[i] != whole, -self.popularity[i], len(self.folded[i]), i))

    def find(self, part: str | int) -> int:
        """The item with this id, or the best match of these words; raises `UserError` if there is none."""
        if isinstance(part, bool) or not isinstance(part, (int, str)):
            raise UserError(f"history: found {part!r}, expected an item id or words of a title")
        if isinstance(part, int) or part.strip().isdecimal():
            item = int(part)
            if not 0 <= item < len(self.titles):
                raise UserError(f"history: no item {item}, expected ids 0..{len(self.titles) - 1}, or words of a title")
            return item
        found = self.matches(part)
        if not found:
            close = get_close_matches(self._fold(part), self.folded, n=3, cutoff=0.4)
            hint = "; ".join(self.titles[self.folded.index(title)] for title in close)
            raise UserError(f"history: no title has the words {part.strip()!r}" + (f"; is it {hint}?" if hint else ""))
        return found[0]


def parse_history(text: str, titles: Titles) -> list[int]:
    """`"49, 182"` or `"star wars; 182"` -> item ids, oldest first."""
    ids_alone = all(part.strip().isdecimal() for part in text.replace(";", ",").split(",") if part.strip())
    parts = [part for part in (text.replace(";", ",").split(",") if ids_alone else text.split(";")) if part.strip()]
    if not parts:
        raise UserError("--history is empty: give item ids or words of titles")
    return [titles.find(part) for part in parts]


def allowed_items(options: Options, titles: Titles) -> set[int] | None:
    """The items that the filters leave, None for all."""
    allowed = None
    if options.only_items:
        allowed = {titles.find(part) for part in options.only_items.split(",") if part.strip()}
    if options.title_words:
        found = set(titles.matches(options.title_words))
        allowed = found if allowed is None else allowed & found
    if allowed is not None and not allowed:
        raise UserError(f"no item is left by --title_words {options.title_words!r} --only_items {options.only_items!r}")
    return allowed


# ------------------------------------------------------------------------------------------------ the model


class Recommender:
    """A checkpoint and its catalog: histories in, lists of items out."""

    def __init__(self, options: Options):
        self.options = options
        self.items = read_info(options.info_file)
        popularity = [0] * len(self.items.sids)
        if options.train_file:
            train = read_sequences(options.train_file, self.items.sids, "train_file", options.max_history)
            popularity = target_counts(train, len(self.items.sids))
        self.titles = Titles(self.items, popularity)
        self.catalog = Catalog(self.items.sids, popularity)
        self.allowed = allowed_items(options, self.titles)
        self.prompts = Prompts(template_of(options.base_model, options.prompt_template), options.category)

    @cached_property
    def loaded(self) -> tuple:
        """(model, tokenizer, trie), on first use: a history that names nothing is refused before."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device_has_bf16() else torch.float32
        tokenizer = load_tokenizer(self.options.base_model, "base_model")
        model = load_model(self.options.base_model, "base_model", dtype).to(device)
        return model, tokenizer, self.catalog.trie(tokenizer).to(device)

    def __call__(self, histories: Sequence[Sequence[int]]) -> list[list[dict]]:
        """For each history the best K items, as `{"item_id", "title", "sid", "score"}`."""
        options = self.options
        hidden = [self._hidden(history) for history in histories]
        rows = pl.DataFrame({"history": [list(history[-options.max_history :]) for history in histories]})
        leaves, scores = recommend(
            *self.loaded,
            next_sid_prompts(rows, self.items, self.prompts),
            options.num_beams or max(50, options.K),
            options.batch_size,
            space=options.space,
            excluded=[self.catalog.rows_of(items) for items in hidden] if any(hidden) else None,
        )
        return [self._expand(*row) for row in zip(leaves, scores, hidden, strict=True)]

    def _hidden(self, history: Sequence[int]) -> set[int]:
        """The items that this user must not get."""
        hidden = set(history) if self.options.exclude_seen else set()
        return hidden if self.allowed is None else hidden | set(range(self.catalog.n_items)) - self.allowed

    def _expand(self, leaves, scores, hidden: set[int]) -> list[dict]:
        found = []
        for leaf, score in zip(leaves.tolist(), scores.tolist(), strict=True):
            for item in self.catalog.items_of_sid[leaf] if leaf >= 0 else ():
                if item not in hidden:
                    title, sid = self.items.titles[item], self.items.sids[item]
                    found.append({"item_id": item, "title": title, "sid": sid, "score": round(score, 4)})
        return found[: self.options.K]


# ------------------------------------------------------------------------------------------------ in and out


def answer(recommender: Recommender, history: list[int]) -> str:
    """The history and the recommended items as a table."""
    titles, catalog_space = recommender.items.titles, recommender.options.space == "catalog"
    last = len(history) - recommender.options.max_history  # items before this place are not in the prompt
    lines = ["", "history"]
    for place, item in enumerate(history):
        lines.append(f"{item:>8}  {titles[item]}" + ("  (too long ago: not in the prompt)" if place < last else ""))
    lines += ["", f"{'item':>8}  {'chance' if catalog_space else 'nats':>7}  next"]
    for found in recommender([history])[0]:
        score = f"{math.exp(found['score']):>7.2%}" if catalog_space else f"{found['score']:>7.2f}"
        lines.append(f"{found['item_id']:>8}  {score}  {found['title']}")
    return "\n".join(lines)


def read_users(lines: Iterable[str], titles: Titles) -> Iterator[tuple[dict, list[int]]]:
    """(the object, its history as item ids) of each JSON line; empty lines are passed over."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            user = json.loads(line)
            history = [titles.find(part) for part in user["history"]]
        except UserError as error:
            raise UserError(f"stdin, line {number}: {error}") from None
        except (json.JSONDecodeError, KeyError, TypeError):
            history = None
        if not history or isinstance(user["history"], str):
            raise UserError(
                f'stdin, line {number}: found {line.strip()[:60]!r}, expected an object like {{"history": [49, "alien"]}}'
            )
        yield user, history


def main(options: Options) -> None:
    options.check()
    disable_progress_bar()
    recommender = Recommender(options)
    if options.jsonl:
        incoming = read_users(sys.stdin, recommender.titles)
        while users := list(islice(incoming, options.batch_size)):
            found = recommender([history for _, history in users])
            for (user, _), items in zip(users, found, strict=True):
                print(json.dumps(user | {"predict": items}, ensure_ascii=False), flush=True)
    elif options.history:
        print(answer(recommender, parse_history(options.history, recommender.titles)))
    else:
        print("A history: item ids, or words of titles separated by ';', oldest first. An empty line ends.")
        for line in iter(lambda: sys.stdin.readline().strip(), ""):
            try:
                print(answer(recommender, parse_history(line, recommender.titles)) + "\n")
            except UserError as error:
                print(f"  {error}")


if __name__ == "__main__":
    run(main, Options)
