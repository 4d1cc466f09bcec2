"""Everything read from disk and every prompt: items, sequences, the task table of SFT and RL.

`load` reads a data set's files, checks them against each other and returns a `Data`:

    data = load(info_file="info/X.txt", train="train/X.csv", test="test/X.csv")
    prompts = next_sid_prompts(data.test, data.items, Prompts(category="movies"))

`Prompts.render` makes every prompt of SFT, RL and evaluation from one template file. `TASKS` lists the tasks; a new one is
a function here, a line in `TASKS`, and its wording in config/prompt.yaml. A prompt never shows its answer: titles are
shown without level tokens, and `sid_walk` skips rows without history. A target that a user had before may be in the
history.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl

from minionerec.catalog.catalog import Catalog, target_counts
from minionerec.catalog.items import Items, prompt_titles, read_info, read_titles
from minionerec.catalog.sequences import read_preferences as read_preferences
from minionerec.catalog.sequences import read_sequences
from minionerec.catalog.sids import canonical_sid, read_index
from minionerec.common.console import say
from minionerec.common.errors import UserError
from minionerec.language_model.prompt_template import read_template

PROMPT_FILE = "prompt.yaml"  # the copy of the template in a checkpoint folder
DEFAULT_TEMPLATE = Path(__file__).parent / "config" / PROMPT_FILE
SPLITS = {"train": "train_file", "valid": "eval_file", "test": "test_data_path"}  # and the option that names its CSV


class Data(NamedTuple):
    """A data set: items, catalog, and the samples of the splits that were asked for."""

    items: Items
    catalog: Catalog
    train: pl.DataFrame | None = None  # columns user, history, target, seen: see `read_sequences`
    valid: pl.DataFrame | None = None
    test: pl.DataFrame | None = None


def load(
    *,
    info_file: str | Path = "",
    sid_index_path: str | Path = "",
    item_meta_path: str | Path = "",
    train: str | Path = "",
    valid: str | Path = "",
    test: str | Path = "",
    max_history: int = 10,
    flags: Mapping[str, str] = SPLITS,
) -> Data:
    """Read a data set. Items come from the info file, or from the index and the item file; all three must agree.

    train, valid, test: CSVs, empty for those that are not needed. Popularity, which orders items that share a SID, is
    counted in train. flags: for error messages, the option that names each split's file. Raises `UserError` naming file
    and row for malformed content and for files of another catalog.
    """
    if max_history < 1:
        raise UserError(f"--max_history {max_history}: expected at least 1")
    items = read_items(info_file, sid_index_path, item_meta_path)
    paths = {"train": train, "valid": valid, "test": test}
    splits = {
        name: read_sequences(path, items.sids, flags.get(name, SPLITS[name]), max_history)
        for name, path in paths.items()
        if path
    }
    popularity = target_counts(splits["train"], len(items.sids)) if train else None
    return Data(items, Catalog(items.sids, popularity), **splits)


def read_items(info_file: str | Path, sid_index_path: str | Path = "", item_meta_path: str | Path = "") -> Items:
    """Items of an info file, or of an index and an item file; files that are given together must agree.

    Titles are as prompts show them (`prompt_titles`); what was changed is printed.
    """
    items = read_info(info_file) if info_file else None
    sids = read_index(sid_index_path) if sid_index_path or not items else items.sids
    titles = read_titles(item_meta_path) if item_meta_path or not items else items.titles
    if len(titles) != len(sids):
        raise UserError(
            f"{item_meta_path}: found {len(titles)} items, expected the {len(sids)} of {sid_index_path or info_file}; "
            "make both from one item file"
        )
    if items and sids != items.sids:
        raise UserError(
            f"{sid_index_path}: {len(sids)} items that differ from the {len(items.sids)} of {info_file}; "
            "make both from one index (convert_dataset.sh)"
        )
    titles, notes = prompt_titles(items or Items(sids, titles))
    for note in notes:
        say(f"{info_file or item_meta_path}: {note}")
    return Items(sids, titles)


def drawn(rows: pl.DataFrame, count: int, seed: int) -> pl.DataFrame:
    """`count` rows drawn by `seed`; all of them if there are no more, or if `count` is -1."""
    return rows.sample(count, seed=seed) if 0 <= count < len(rows) else rows


# ------------------------------------------------------------------------------------------------ prompts


class Prompts:
    """The wording of one template, by default `config/prompt.yaml`, for one category."""

    def __init__(self, path: str | Path = DEFAULT_TEMPLATE, category: str = ""):
        """Raises `UserError` naming the key of the template that is missing, unknown or no text."""
        self.path = Path(path)
        template = read_template(path, {name: task.field for name, task in TASKS.items()})
        self.instruction_marker, self.input_marker = template["instruction_marker"], template["input_marker"]
        self.response_marker, self.response_suffix = template["response_marker"], template["response_suffix"]
        self.sid_separator, self.title_separator = template["sid_separator"], template["title_separator"]
        self.tasks = template["tasks"]
        self.category = template["categories"].get(category) or readable(category) or "items"

    def render(self, task: str, **fields: str) -> str:
        """The prompt of `task`; `fields` fill its input. The answer is never among them."""
        if task not in self.tasks:
            raise UserError(f"{self.path}: no wording for task {task!r}, found {sorted(self.tasks)}; add it there")
        wording = self.tasks[task]
        instruction = wording["instruction"].format(category=self.category)
        asked = wording["input"].format(category=self.category, **fields)
        marker = wording.get("response_marker", self.response_marker)
        return f"{self.instruction_marker}{instruction}{self.input_marker}{asked}{marker}"

    @property
    def continues(self) -> bool:
        """Whether the answer of `sid_seq` follows the history directly, so that a user's rows are one sequence."""
        wording = self.tasks["sid_seq"]
        marker = wording.get("response_marker", self.response_marker)
        return not (marker or self.sid_separator or self.response_suffix) and wording["input"].endswith("{history}")

    def sid_history(self, history: Sequence[int], items: Items) -> str:
        return self.sid_separator.join(items.sids[i] for i in history)

    def title_history(self, history: Sequence[int], items: Items) -> str:
        return self.title_separator.join(items.titles[i] for i in history)


def readable(category: str) -> str:
    """`Video_Games` -> `video games`."""
    return re.sub(r"[\W_]+", " ", category).strip().lower()


def template_of(checkpoint: str | Path, given: str = "") -> Path:
    """The template to use with a checkpoint: the one given, else the checkpoint's own copy, else the default."""
    own = Path(checkpoint) / PROMPT_FILE
    return Path(given) if given else own if own.exists() else DEFAULT_TEMPLATE


# ------------------------------------------------------------------------------------------------ tasks


class Example(NamedTuple):
    """One row of a task."""

    prompt: str
    answer: str
    history: list[int]  # item ids that the prompt shows, oldest first; empty for a task about one item
    target: int  # the item that the answer is about; of several, the first


Examples = Callable[[pl.DataFrame, Items, Prompts], Iterator[Example]]


class Task(NamedTuple):
    """A task of SFT. Where `answers_sid`, the answer is the target's SID, and RL can be rewarded for it too."""

    examples: Examples
    field: str  # what fills the input of its wording: history, item or preference
    answers_sid: bool = False
    skips: str = ""  # which rows it cannot use


def next_sid_prompts(sequences: pl.DataFrame, items: Items, prompts: Prompts) -> list[str]:
    """The prompt of each sample for the task `sid_seq`: what evaluation and RL ask."""
    return [prompts.render("sid_seq", history=prompts.sid_history(h, items)) for h in sequences["history"].to_list()]


def _sequence_task(task: str, history: Callable, answers: Callable) -> Examples:
    """A history -> the next item. `history` writes the history into the prompt, `answers` lists the items' answers."""

    def examples(sequences: pl.DataFrame, items: Items, prompts: Prompts) -> Iterator[Example]:
        for past, target in sequences.select("history", "target").iter_rows():
            yield Example(
                prompts.render(task, history=history(prompts, past, items)), answers(items)[target], past, target
            )

    return examples


def _item_task(task: str, questions: Callable, answers: Callable) -> Examples:
    """One name of an item -> its other name, for every item of the catalog."""

    def examples(sequences: pl.DataFrame, items: Items, prompts: Prompts) -> Iterator[Example]:
        for item, (asked, answered) in enumerate(zip(questions(items), answers(items), strict=True)):
            yield Example(prompts.render(task, item=asked), answered, [], item)

    return examples


def _sid_walk(sequences: pl.DataFrame, items: Items, prompts: Prompts) -> Iterator[Example]:
    """The first item of a row -> all later ones, in order: one row trains as many targets as it has later items."""
    for past, target in sequences.select("history", "target").iter_rows():
        if not past:  # the prompt would show the target
            continue
        walk = [*past, target]
        prompt = prompts.render("sid_walk", history=prompts.sid_history(walk[:1], items))
        yield Example(prompt, prompts.sid_history(walk[1:], items), walk[:1], walk[1])


def _preferences(sequences: pl.DataFrame, items: Items) -> Iterator[tuple[list[int], int, str]]:
    """(history, target, preference) of the samples whose user has a preference text.

    Raises `UserError` where a text contains the answer.
    """
    if "preference" not in sequences.columns:
        raise UserError("the preference tasks need --user_preference_file; give it, or leave them out of --sft_tasks")
    for user, past, target, text in sequences.select("user", "history", "target", "preference").iter_rows():
        if text is not None:
            if items.sids[target] in canonical_sid(text):
                raise UserError(
                    f"--user_preference_file: the text of user {user} contains {items.sids[target]}, which is a target "
                    "of this user; remove it from the text"
                )
            yield past, target, text


def _sid_seq2preference(sequences: pl.DataFrame, items: Items, prompts: Prompts) -> Iterator[Example]:
    for past, target, text in _preferences(sequences, items):
        yield Example(
            prompts.render("sid_seq2preference", history=prompts.sid_history(past, items)), text, past, target
        )


def _preference2sid(sequences: pl.DataFrame, items: Items, prompts: Prompts) -> Iterator[Example]:
    for past, target, text in _preferences(sequences, items):
        yield Example(prompts.render("preference2sid", preference=text), items.sids[target], past, target)


def _sids(items: Items) -> list[str]:
    return items.sids


def _titles(items: Items) -> list[str]:
    return items.titles


TASKS: dict[str, Task] = {
    "sid_seq": Task(_sequence_task("sid_seq", Prompts.sid_history, _sids), "history", answers_sid=True),
    "title2sid": Task(_item_task("title2sid", _titles, _sids), "item", answers_sid=True),
    "sid2title": Task(_item_task("sid2title", _sids, _titles), "item"),
    "sid_seq2title": Task(_sequence_task("sid_seq2title", Prompts.sid_history, _titles), "history"),
    "title_seq2title": Task(_sequence_task("title_seq2title", Prompts.title_history, _titles), "history"),
    "title_seq2sid": Task(_sequence_task("title_seq2sid", Prompts.title_history, _sids), "history", answers_sid=True),
    "sid_walk": Task(_sid_walk, "history", skips="without history"),
    "sid_seq2preference": Task(_sid_seq2preference, "history", skips="of users without a preference text"),
    "preference2sid": Task(_preference2sid, "preference", answers_sid=True, skips="of users without a preference text"),
}
RL_TASKS = [name for name, task in TASKS.items() if task.answers_sid and name != "preference2sid"]
DEFAULT_TASKS = "sid_seq,title2sid,sid2title,sid_seq2title,title_seq2title"


def parse_tasks(text: str) -> dict[str, float]:
    """`"sid_seq,title2sid:0.5"` -> `{"sid_seq": 1.0, "title2sid": 0.5}`; a weight is how often a row is taken."""
    weights = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, weight = part.partition(":")
        if name not in TASKS:
            raise UserError(f"--sft_tasks {text}: no task {name!r}, expected some of {', '.join(TASKS)}")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise UserError(
                f"--sft_tasks {text}: {weight!r} is no weight, expected a number as in {name}:0.5"
            ) from None
        if not 0 < weights[name] < 1000:
            raise UserError(f"--sft_tasks {text}: weight {weight} of {name}, expected more than 0 and less than 1000")
    if not weights:
        raise UserError(f"--sft_tasks: no task given, expected some of {', '.join(TASKS)}")
    return weights


def taken(count: int, weight: float, name: str, seed: int) -> list[int]:
    """Which of a task's `count` rows are trained in an epoch: each `weight` times, a fraction of them drawn by seed."""
    extra = round((weight - int(weight)) * count)
    places = [*range(count)] * int(weight) + random.Random(f"{seed} {name}").sample(range(count), extra)
    if count and not places:
        raise UserError(f"--sft_tasks {name}:{weight:g}: none of {count:,} rows is left; give a larger weight")
    return places


def sft_pairs(
    weights: Mapping[str, float], sequences: pl.DataFrame, items: Items, prompts: Prompts, seed: int
) -> list[tuple[str, str]]:
    """(prompt, answer) of every task, each task's rows taken `weight` times (a fraction is drawn by seed)."""
    rows = []
    for name, weight in weights.items():
        pairs = [(example.prompt, example.answer) for example in TASKS[name].examples(sequences, items, prompts)]
        if TASKS[name].skips and len(pairs) < len(sequences):
            say(
                f"{name}: {len(sequences) - len(pairs):,} of {len(sequences):,} rows are left out, those {TASKS[name].skips}"
            )
        rows += [pairs[place] for place in taken(len(pairs), weight, name, seed)]
    if not rows:
        raise UserError(f"--sft_tasks {','.join(weights)}: no row is left; give another task or a larger weight")
    return rows


def parse_rl_tasks(text: str) -> dict[str, int | None]:
    """`"sid_seq,title2sid:1000"` -> `{"sid_seq": None, "title2sid": 1000}`: the most rows of a task, None for all."""
    caps: dict[str, int | None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, cap = part.partition(":")
        if name not in RL_TASKS or name in caps:
            raise UserError(f"--rl_tasks {text}: found {name!r}, expected some of {', '.join(RL_TASKS)}, each once")
        if cap and not (cap.isdecimal() and len(cap) < 10 and int(cap) > 0):
            raise UserError(f"--rl_tasks {text}: {cap!r} is no number of rows, expected one as in {name}:1000")
        caps[name] = int(cap) if cap else None
    if not caps:
        raise UserError(f"--rl_tasks: no task given, expected some of {', '.join(RL_TASKS)}")
    return caps


def rl_rows(
    sequences: pl.DataFrame,
    items: Items,
    prompts: Prompts,
    caps: Mapping[str, int | None] | None = None,
    seed: int = 0,
) -> dict[str, list]:
    """Columns of the RL dataset: prompt, target_sid, target_item, history_items, task.

    Each row carries its own target: nothing is looked up by prompt text. caps: the most rows of each task, drawn by
    seed, None for all; by default `sid_seq` only.
    """
    columns: dict[str, list] = {name: [] for name in ("prompt", "target_sid", "target_item", "history_items", "task")}
    for task, cap in (caps or {"sid_seq": None}).items():
        examples = list(TASKS[task].examples(sequences, items, prompts))
        if cap is not None and cap < len(examples):
            examples = [
                examples[row] for row in sorted(random.Random(f"{seed} {task}").sample(range(len(examples)), cap))
            ]
        for prompt, answer, history, target in examples:
            for name, value in zip(columns, (prompt, answer, target, history, task), strict=True):
                columns[name].append(value)
    return columns


if __name__ == "__main__":
    from minionerec.catalog import check

    check.start()  # python -m data check DIR
