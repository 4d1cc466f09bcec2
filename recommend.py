r"""Ask a trained model: a history in, the next items out.

    python recommend.py --base_model output/quickstart/sft --info_file output/quickstart/data/info/ml-100k.txt \
        --history "star wars; alien; blade runner"

A history is item ids ("49, 182, 88") or words of titles, separated by `;`, oldest first. Without --history, lines are
read from the keyboard until an empty one. With --jsonl, each line of stdin is a user, `{"history": [49, "blade runner"],
…}`, and each line of stdout the same object with `predict`, a list of `{"item_id", "title", "sid", "score"}`, or with
`error`. A line is answered when no further line is waiting, or --batch_size lines are.

A score is the log-probability of the item's SID in nats: exp(score) is the chance that the model gives it. With
--blend_path it is the weighted sum of the models' log-probabilities.
"""

import json
import math
import queue
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import NamedTuple

from minionerec.common import runs
from minionerec.common.errors import UserError
from minionerec.common.options import INPUT, MOST_WEIGHT, RUNTIME, StageOptions, is_weight, option, run
from minionerec.common.text import json_line, printable
from minionerec.decoding.backends import BACKENDS, require_vllm
from minionerec.decoding.spaces import SPACES

EXAMPLE = 'an object like {"history": [49, "alien"]}, with at least one item'


@dataclass
class Options(StageOptions):
    base_model: str = option("", "folder of the checkpoint", role=INPUT)
    info_file: str = option("", "the catalog: sid, title, item id per line", role=INPUT)
    train_file: str = option(
        "", "train CSV: of several items with these words, or with one SID, the most popular is first", role=INPUT
    )
    # questions
    history: str = option("", "item ids, or words of titles separated by ';', oldest first")
    jsonl: bool = option(False, "read users as JSON lines from stdin, write JSON lines to stdout")
    # answers
    K: int = option(10, "items recommended")
    unseen: bool | None = option(
        None, "recommend no item of the history; default: True where targets of train_file hardly ever repeat, as the "
        "headline of evaluate.py, else False",
        aliases=["--exclude_seen"],
    )  # fmt: skip
    only_items: str = option("", "recommend only these item ids, separated by commas")
    title_words: str = option("", "recommend only items whose titles have all these words")
    # model
    category: str = option("", "what the prompts call the items; default: as the checkpoint was trained")
    max_history: int = option(0, "items of a history in a prompt, the latest; 0: as the checkpoint was trained")
    prompt_template: str = option("", "wording of the prompts; default: the checkpoint's prompt.yaml", role=INPUT)
    space: str = option("", "what scores are normalised over, vocab or catalog; default: as the checkpoint was trained")
    num_beams: int = option(0, "beams; 0: max(50, K)")
    backend: str = option(
        "transformers", "what searches: transformers (tree search), or vllm (docs/vllm.md)", role=RUNTIME
    )
    blend_path: list[str] = option(
        [], "folders of sasrec.sh: rank by the weighted sum of the models' log-probabilities", role=INPUT
    )
    blend_weight: list[str] = option(
        [], "a weight for each, or the .blend.metrics.json of evaluate.py, whose weights are used; default: 1 each"
    )
    batch_size: int = option(8, "most users per forward", role=RUNTIME)

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "K", "batch_size")
        self.at_least(0, "max_history", "num_beams")
        self.check(
            space=(self.space in ("", *SPACES), " or ".join(SPACES)),
            blend_weight=(
                not self.blend_weight
                or bool(self.weights_file and self.blend_path)
                or len(self.blend_weight) == len(self.blend_path)
                and all(map(is_weight, self.blend_weight)),
                f"{len(self.blend_path)} numbers, one for each --blend_path, 0 to {MOST_WEIGHT}, a .json file of evaluate.py, or nothing",
            ),
            backend=(self.backend in BACKENDS, " or ".join(BACKENDS)),
            blend_path=(
                not (self.blend_path and self.backend == "vllm"),
                "nothing with --backend vllm: a blend needs the model itself",
            ),
            num_beams=(not 0 < self.num_beams < self.K, f"at least --K {self.K}, or 0"),
            jsonl=(not (self.jsonl and self.history), "False with --history; with --jsonl give histories on stdin"),
        )

    @property
    def weights_file(self) -> str:
        """The file that --blend_weight names, if it names one."""
        [first, *others] = self.blend_weight or [""]
        return first if first.endswith(".json") and not others else ""


# ------------------------------------------------------------------------------------------------ finding items


def is_id(text: str) -> bool:
    """Whether a text is a whole number, and not words of a title; a negative one is the id of no item."""
    return bool(re.fullmatch(r"-?\d+", text.strip()))


class Titles:
    """Items by the words of their titles."""

    def __init__(self, titles: Sequence[str], popularity: Sequence[int]):
        self.titles, self.popularity = titles, popularity
        self.folded = [self._fold(title) for title in titles]

    @staticmethod
    def _fold(text: str) -> str:
        return "".join(f" {word}" for word in re.findall(r"\w+", text.casefold()))

    def matches(self, words: str) -> list[int]:
        """Items whose titles have a word that begins with each of `words`.

        A title of exactly these words is first; then by popularity, then the shortest title, then by id.
        """
        whole = self._fold(words)
        wanted = [f" {word}" for word in whole.split()]
        found = [item for item, title in enumerate(self.folded) if wanted and all(word in title for word in wanted)]
        return sorted(found, key=lambda i: (self.folded[i] != whole, -self.popularity[i], len(self.folded[i]), i))

    def find(self, part: str | int) -> int:
        """The item with this id, or the best match of these words; raises `UserError` if there is none."""
        if isinstance(part, bool) or not isinstance(part, (int, str)):
            raise UserError(f"history: found {str(part)[:60]!r}, expected an item id or words of a title")
        if isinstance(part, int) or is_id(part):
            text = str(part).strip()
            item = int(text) if len(text) < 20 else -1
            if not 0 <= item < len(self.titles):
                last = len(self.titles) - 1
                raise UserError(f"history: no item {text[:40]}, expected ids 0..{last}, or words of a title")
            return item
        found = self.matches(part)
        if not found:
            close = get_close_matches(self._fold(part[:100]), self.folded, n=3, cutoff=0.4)
            hint = "; ".join(printable(self.titles[self.folded.index(title)]) for title in close)
            words = repr(part.strip()[:60])
            raise UserError(
                f"history: no title has the words {words}; " + (f"is it {hint}?" if hint else "give other words")
            )
        return found[0]


def parse_history(text: str, titles: Titles) -> list[int]:
    """`"49, 182"` or `"star wars; 182"` -> item ids, oldest first."""
    only_ids = all(is_id(part) for part in text.replace(";", ",").split(",") if part.strip())
    parts = text.replace(";", ",").split(",") if only_ids else text.split(";")
    found = [titles.find(part) for part in parts if part.strip()]
    if not found:
        raise UserError("--history is empty: give item ids or words of titles")
    return found


def allowed_items(options: Options, titles: Titles) -> set[int] | None:
    """The items that the filters leave, None for all."""
    allowed = None
    if options.only_items:
        allowed = {titles.find(part) for part in options.only_items.split(",") if part.strip()}
    if options.title_words:
        found = set(titles.matches(options.title_words))
        allowed = found if allowed is None else allowed & found
    if allowed is not None and not allowed:
        raise UserError(
            f"no item is left by --title_words {options.title_words!r} --only_items {options.only_items!r}; choose others"
        )
    return allowed


# ------------------------------------------------------------------------------------------------ the model


def weights_of(options: Options):
    """The `UserWeights` of --blend_weight."""
    from minionerec.evaluation.blend_weights import UserWeights, read_weights

    if options.weights_file:
        return read_weights(options.weights_file, "blend_weight", options.blend_path)
    return UserWeights((tuple(map(float, options.blend_weight)) or (1.0,) * len(options.blend_path),))


class Recommender:
    """A checkpoint and its catalog: histories in, lists of items out."""

    def __init__(self, options: Options):
        from data import Prompts, load, template_of
        from minionerec.catalog.catalog import target_counts
        from minionerec.evaluation.protocols import headline
        from minionerec.language_model.checkpoints import resolve_settings

        self.options = options
        given = {"category": options.category, "max_history": options.max_history, "space": options.space}
        self.settings = resolve_settings(options.base_model, **given)
        files = {"info_file": options.info_file, "train": options.train_file}
        data = load(**files, max_history=self.settings.max_history)
        self.items, self.catalog = data.items, data.catalog
        n_items = data.catalog.n_items
        popularity = [0] * n_items if data.train is None else target_counts(data.train, n_items)
        self.titles = Titles(self.items.titles, popularity)
        self.allowed = allowed_items(options, self.titles)
        self.unseen = headline(data.train) == "unseen" if options.unseen is None else options.unseen
        self.prompts = Prompts(template_of(options.base_model, options.prompt_template), self.settings.category)
        self.weights = weights_of(options) if options.blend_path else None

    @cached_property
    def loaded(self) -> tuple:
        """(engine, tokenizer), loaded on first use, so that a history that names nothing is refused before."""
        import torch
        from transformers.utils.logging import disable_progress_bar

        from minionerec.common.devices import device_has_bf16
        from minionerec.decoding.engine import TransformersEngine, vllm_engine
        from minionerec.language_model.checkpoints import load_model, load_tokenizer

        disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device_has_bf16() else torch.float32
        tokenizer = load_tokenizer(self.options.base_model, "base_model")
        trie, space = self.catalog.trie(tokenizer), self.settings.space
        if self.options.backend == "vllm":
            return vllm_engine(self.options.base_model, trie, tokenizer.eos_token_id, space, dtype=dtype), tokenizer
        model = load_model(self.options.base_model, "base_model", dtype).to(device)
        return TransformersEngine(model, trie.to(device), tokenizer.pad_token_id, space), tokenizer

    def __call__(self, histories: Sequence[Sequence[int]]) -> list[list[dict]]:
        """For each history the best K items, as `{"item_id", "title", "sid", "score"}`."""
        import polars as pl

        from data import next_sid_prompts
        from minionerec.decoding.engine import recommend

        options = self.options
        hidden = [self._hidden(history) for history in histories]
        rows = pl.DataFrame({"history": [list(history[-self.settings.max_history :]) for history in histories]})
        texts = next_sid_prompts(rows, self.items, self.prompts)
        if options.blend_path:
            return self._blended(texts, histories, hidden)
        sid_rows, scores = recommend(
            *self.loaded,
            texts,
            options.num_beams or max(50, options.K),
            options.batch_size,
            excluded=[self.catalog.rows_of(items) for items in hidden] if any(hidden) else None,
        )
        return [self._expand(*row) for row in zip(sid_rows, scores, hidden, strict=True)]

    @cached_property
    def baselines(self) -> list:
        """The models of --blend_path, loaded on first use."""
        from minionerec.baselines.models import load_checkpoint

        return [load_checkpoint(path, "blend_path", self.catalog.n_items) for path in self.options.blend_path]

    def _blended(self, texts: list[str], histories, hidden) -> list[list[dict]]:
        """As `__call__`, ranked by the blend; a score is the weighted sum of log-probabilities."""
        import numpy as np

        from minionerec.evaluation import blend

        options, count = self.options, self.options.num_beams or max(50, self.options.K)
        engine, tokenizer = self.loaded
        arguments = (engine.model, tokenizer, engine.trie, texts, histories, self.baselines, self.catalog)
        found = blend.collect(*arguments, count=count, hidden=[sorted(items) for items in hidden])["unseen"]
        total = blend.blended(found, self.weights.of(found))
        best = np.argsort(-total, axis=1, kind="stable")[:, : options.K]
        return [
            [
                self._entry(int(found.items[user, place]), total[user, place])
                for place in places
                if found.items[user, place] >= 0
            ]
            for user, places in enumerate(best)
        ]

    def _entry(self, item: int, score: float) -> dict:
        title, sid = self.items.titles[item], self.items.sids[item]
        return {"item_id": item, "title": title, "sid": sid, "score": round(float(score), 4)}

    def _hidden(self, history: Sequence[int]) -> set[int]:
        """The items that this user must not get."""
        hidden = set(history) if self.unseen else set()
        return hidden if self.allowed is None else hidden | set(range(self.catalog.n_items)) - self.allowed

    def _expand(self, sid_rows, scores, hidden: set[int]) -> list[dict]:
        found = []
        for sid_row, score in zip(sid_rows.tolist(), scores.tolist(), strict=True):
            for item in self.catalog.items_of_sid[sid_row] if sid_row >= 0 else ():
                if item not in hidden:
                    found.append(self._entry(item, score))
        return found[: self.options.K]


# ------------------------------------------------------------------------------------------------ tables


def table(recommender: Recommender, history: list[int]) -> str:
    """The history and the recommended items."""
    titles = recommender.items.titles
    last = len(history) - recommender.settings.max_history  # items before this place are not in the prompt
    lines = ["", "history"]
    for place, item in enumerate(history):
        note = "  (too long ago: not in the prompt)" if place < last else ""
        lines.append(f"{item:>8}  {printable(titles[item])}{note}")
    blended = bool(recommender.options.blend_path)
    lines += ["", f"{'item':>8}  {'score' if blended else 'chance':>7}  next"]
    for found in recommender([history])[0]:
        note = "  (in the history)" if found["item_id"] in history else ""
        score = f"{found['score']:>7.2f}" if blended else f"{math.exp(found['score']):>7.2%}"
        lines.append(f"{found['item_id']:>8}  {score}  {printable(found['title'])}{note}")
    return "\n".join(lines)


def ask(recommender: Recommender) -> None:
    """Answer lines from the keyboard until an empty one."""
    print("A history: item ids, or words of titles separated by ';', oldest first. An empty line ends.")
    for line in iter(lambda: sys.stdin.readline().strip(), ""):
        try:
            print(table(recommender, parse_history(line, recommender.titles)) + "\n")
        except UserError as error:
            print(f"  {error}")


# ------------------------------------------------------------------------------------------------ JSON lines


class User(NamedTuple):
    """A line of input: its object, and its history as item ids or what is wrong with it."""

    number: int
    object: dict
    history: list[int]
    error: str


def read_user(number: int, line: str, titles: Titles) -> User:
    try:
        content = json.loads(line.removeprefix("\ufeff"))  # a file from Windows begins with this mark
        json.dumps(content, allow_nan=False)  # NaN and Infinity, which Python reads, are not JSON
    except (ValueError, RecursionError):
        content = None
    user = content if isinstance(content, dict) else {}
    parts = user.get("history")
    if not isinstance(parts, list) or not parts:
        return User(number, user, [], f"found {line.strip()[:60]!r}, expected {EXAMPLE}")
    try:
        return User(number, user, [titles.find(part) for part in parts], "")
    except UserError as error:
        return User(number, user, [], str(error))


def waiting_lines(stream: Iterable[str], most: int) -> Iterator[list[tuple[int, str]]]:
    """(number, line) of a stream in lists of at most `most`. A list waits for its first line, and takes what is there."""
    lines: queue.Queue = queue.Queue(maxsize=4 * most)

    def read() -> None:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                lines.put((number, line))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (first := lines.get()) is not None:
        batch = [first]
        while len(batch) < most and not lines.empty():
            if (line := lines.get()) is None:
                lines.put(None)  # the end, also for the outer loop
                break
            batch.append(line)
        yield batch


def answers(recommender: Recommender, users: Sequence[User]) -> list[dict]:
    """What each user's object gains: `predict`, or `error` and the number of the line."""
    asked = [user for user in users if not user.error]
    try:
        found = iter(recommender([user.history for user in asked]) if asked else [])
    except UserError as error:
        if len(users) > 1:
            return [answers(recommender, [user])[0] for user in users]
        return [{"line": users[0].number, "error": str(error)}]
    return [{"line": user.number, "error": user.error} if user.error else {"predict": next(found)} for user in users]


def serve(recommender: Recommender) -> None:
    """Answer JSON lines of stdin on stdout."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(
            encoding="utf-8", errors="surrogateescape"
        )  # bytes that are no text: an error of one line
    refused = 0
    for batch in waiting_lines(sys.stdin, recommender.options.batch_size):
        users = [read_user(number, line, recommender.titles) for number, line in batch]
        for user, answer in zip(users, answers(recommender, users), strict=True):
            refused += "error" in answer
            kept = {key: value for key, value in user.object.items() if key not in ("predict", "error")}
            print(json_line(json.dumps(kept | answer, ensure_ascii=False)), flush=True)
    if refused:
        print(f"note: {refused} lines have an error instead of an answer", file=sys.stderr)


def main(options: Options) -> None:
    options.require("base_model", "info_file")
    runs.require_finished(options.base_model)
    if options.backend == "vllm":
        require_vllm("backend")
    with redirect_stdout(sys.stderr) if options.jsonl else nullcontext():  # stdout is for answers
        recommender = Recommender(options)
    if options.jsonl:
        serve(recommender)
    elif options.history:
        print(table(recommender, parse_history(options.history, recommender.titles)))
    else:
        ask(recommender)


if __name__ == "__main__":
    run(main, Options)
