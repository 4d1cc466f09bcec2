"""Everything read from disk and every prompt: items, sequences, the task table of SFT and RL.

`load` is the one entry: it reads a data set's files, checks them against each other and returns a `Data`.

A row of a CSV is identified by item ids; titles and SIDs come from the item, index or info file by id, so that equal
titles and shared SIDs cannot be confused. The CSV's own SID columns are checked against the catalog: a CSV made from
another index is refused. One function, `Prompts.render`, makes the prompt for SFT, RL and evaluation.
"""

import ast
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl
import yaml

from minionerec.catalog.catalog import Catalog, target_counts
from minionerec.catalog.items import Items, read_info, read_titles
from minionerec.catalog.sids import read_index
from minionerec.common.errors import UserError
from minionerec.common.files import read_json, require_file

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
    and row for whatever is malformed or belongs to another catalog.
    """
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
    """Items of an info file, or of an index and an item file; files that are given beside each other must agree."""
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
    return items or Items(sids, titles)


def drawn(rows: pl.DataFrame, count: int, seed: int) -> pl.DataFrame:
    """`count` rows drawn by `seed`; all of them if there are no more, or if `count` is -1."""
    return rows.sample(count, seed=seed) if 0 <= count < len(rows) else rows


# ------------------------------------------------------------------------------------------------ sequences


def _list_column(table: pl.DataFrame, column: str, path: Path) -> pl.Series:
    """A column of Python list literals of item ids as lists of integers.

    Plain `[1, 2, 3]` cells are parsed in one pass; any other cell goes through `ast.literal_eval` alone.
    """
    cells = table[column]
    plain = cells.str.contains(r"^\[\s*(\d+(\s*,\s*\d+)*)?\s*\]$").fill_null(False)
    lists = cells.str.extract_all(r"\d+").cast(pl.List(pl.Int64))
    if plain.all():
        return lists
    parsed = lists.to_list()
    for row in (~plain).arg_true():
        try:
            value = ast.literal_eval(cells[row] or "")
            parsed[row] = [int(item) for item in value]
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise UserError(
                f"{path}, row {row + 2}, column {column}: found {str(cells[row])[:60]!r}, "
                "expected a list literal of item ids like [3437, 642]; run convert_dataset.sh again"
            ) from None
    return pl.Series(column, parsed, dtype=pl.List(pl.Int64))


def read_sequences(path: str | Path, sids: Sequence[str], flag: str, max_history: int = 10) -> pl.DataFrame:
    """The samples of a CSV as columns user (str), history, target (item id) and seen.

    `seen` is the row's whole `history_item_id` list, oldest first; `history` is its last `max_history` items.
    Raises `UserError` naming row and column for a missing column, a cell that is no literal, an unknown item id, or a
    SID that differs from `sids`, the catalog's (row i is item i).
    """
    path = require_file(path, flag)
    table = pl.read_csv(path, infer_schema=False)
    for column in ("user_id", "history_item_id", "item_id", "history_item_sid", "item_sid"):
        if column not in table.columns:
            raise UserError(f"{path}: no column {column!r}, found {table.columns}; run convert_dataset.sh again")
    if not len(table):
        raise UserError(f"{path}: found no rows, expected at least one; run convert_dataset.sh again")
    rows = pl.DataFrame(
        {
            "user": table["user_id"],
            "history": _list_column(table, "history_item_id", path),
            "target": table["item_id"].cast(pl.Int64, strict=False),
            "row": range(2, len(table) + 2),  # as an editor counts, the header is row 1
        }
    )

    def refuse(bad: pl.DataFrame, column: str, expected: str) -> None:
        if len(bad):
            row = int(bad["row"][0])
            raise UserError(
                f"{path}, row {row}, column {column}: found {str(table[column][row - 2])[:60]!r}, {expected}"
            )

    known = pl.element().is_between(0, len(sids) - 1)
    advice = f"expected ids of the catalog, 0..{len(sids) - 1}; check the index or info file"
    refuse(rows.filter(~pl.col("target").is_between(0, len(sids) - 1).fill_null(False)), "item_id", advice)
    refuse(rows.filter(~pl.col("history").list.eval(known).list.all()), "history_item_id", advice)

    advice = "which is not this catalog's SID of the item; make the CSV again from this index (convert_dataset.sh)"
    sid_of = pl.Series(sids)
    refuse(rows.filter(table["item_sid"] != sid_of.gather(rows["target"])), "item_sid", advice)
    written = table["history_item_sid"].str.extract_all(r"(?:<[a-z]+_\d+>)+").list.join(" ").fill_null("")
    items = rows.select("row", item="history").explode("item").drop_nulls()
    joined = (
        items.with_columns(sid=sid_of.gather(items["item"]))
        .group_by("row", maintain_order=True)
        .agg(pl.col("sid").str.join(" "))
    )
    expected = rows.select("row").join(joined, on="row", how="left", maintain_order="left")["sid"].fill_null("")
    refuse(rows.filter(written != expected), "history_item_sid", advice)
    return rows.select("user", pl.col("history").list.tail(max_history), "target", seen="history")


def read_preferences(path: str | Path, flag: str = "user_preference_file") -> pl.DataFrame:
    """Columns user, preference from a JSON object `{"user id": "what they like", …}`; a user may be missing."""
    content = read_json(path, flag)
    for user, text in content.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: user {user!r} has {str(text)[:60]!r}, expected a text; check --{flag}")
    return pl.DataFrame({"user": list(content), "preference": [" ".join(text.split()) for text in content.values()]})


# ------------------------------------------------------------------------------------------------ prompts


class Prompts:
    """The wording of `config/prompt.yaml` for one category."""

    def __init__(self, path: str | Path = DEFAULT_TEMPLATE, category: str = ""):
        self.path = require_file(path, "prompt_template")
        try:
            template = yaml.safe_load(self.path.read_text(encoding="utf-8"))
            self.instruction_marker = template["instruction_marker"]
            self.input_marker = template["input_marker"]
            self.response_marker = template["response_marker"]
            self.response_suffix = template["response_suffix"]
            self.sid_separator = template["sid_separator"]
            self.title_separator = template["title_separator"]
            self.tasks = template["tasks"]
            categories = template["categories"]
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}: not a prompt template ({error!r}); compare it with config/prompt.yaml"
            ) from None
        self.category = categories.get(category) or readable(category) or "items"

    def render(self, task: str, **fields: str) -> str:
        """The prompt of `task`; `fields` fill its instruction and input. The answer is never among them."""
        if task not in self.tasks:
            raise UserError(f"{self.path}: no wording for task {task!r}, found {sorted(self.tasks)}; add it there")
        wording = self.tasks[task]
        instruction = wording["instruction"].format(category=self.category)
        return (
            self.instruction_marker
            + instruction
            + self.input_marker
            + wording["input"].format(**fields)
            + self.response_marker
        )

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
    answers_sid: bool


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
            if items.sids[target] in text:
                raise UserError(
                    f"--user_preference_file: user {user}'s text holds {items.sids[target]}, an answer of theirs"
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
    "sid_seq": Task(_sequence_task("sid_seq", Prompts.sid_history, _sids), True),
    "title2sid": Task(_item_task("title2sid", _titles, _sids), True),
    "sid2title": Task(_item_task("sid2title", _sids, _titles), False),
    "sid_seq2title": Task(_sequence_task("sid_seq2title", Prompts.sid_history, _titles), False),
    "title_seq2title": Task(_sequence_task("title_seq2title", Prompts.title_history, _titles), False),
    "title_seq2sid": Task(_sequence_task("title_seq2sid", Prompts.title_history, _sids), True),
    "sid_walk": Task(_sid_walk, False),
    "sid_seq2preference": Task(_sid_seq2preference, False),
    "preference2sid": Task(_preference2sid, True),
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


def sft_pairs(
    weights: Mapping[str, float], sequences: pl.DataFrame, items: Items, prompts: Prompts, seed: int
) -> list[tuple[str, str]]:
    """(prompt, answer) of every task, each task's rows taken `weight` times (a fraction is drawn by seed)."""
    rows = []
    for name, weight in weights.items():
        pairs = [(example.prompt, example.answer) for example in TASKS[name].examples(sequences, items, prompts)]
        rows += pairs * int(weight)
        extra = round((weight - int(weight)) * len(pairs))
        rows += random.Random(f"{seed} {name}").sample(pairs, extra)
    return rows


def parse_rl_tasks(text: str) -> dict[str, int | None]:
    """`"sid_seq,title2sid:1000"` -> `{"sid_seq": None, "title2sid": 1000}`: the most rows of a task, None for all."""
    caps: dict[str, int | None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, cap = part.partition(":")
        if name not in RL_TASKS or name in caps:
            raise UserError(f"--rl_tasks {text}: found {name!r}, expected some of {', '.join(RL_TASKS)}, each once")
        if cap and not (cap.isdecimal() and int(cap) > 0):
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
