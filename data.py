"""Everything read from disk and every prompt: items, sequences, SFT tasks, RL prompts.

A row of a CSV is identified by item ids; titles and SIDs come from the item, index or info file by id, so that equal
titles and shared SIDs cannot be confused. The CSV's own SID columns are checked against the catalog: a CSV made from
another index is refused. One function, `Prompts.render`, makes the prompt for SFT, RL and evaluation.
"""

import ast
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import polars as pl
import yaml

from minionerec.catalog.items import Items
from minionerec.common.errors import UserError
from minionerec.common.files import read_json, require_file
from minionerec.language_model.checkpoints import PROMPT_FILE
from minionerec.language_model.tokenizing import Pair

DEFAULT_TEMPLATE = Path(__file__).parent / "config" / PROMPT_FILE


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
    """The samples of a CSV as columns user (str), history (list of item ids, oldest first), target (item id).

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
    return rows.select("user", pl.col("history").list.tail(max_history), "target")


def read_preferences(path: str | Path, flag: str = "user_preference_file") -> pl.DataFrame:
    """Columns user, preference from a JSON object `{"user id": "what they like", …}`; a user may be missing."""
    content = read_json(path, flag)
    for user, text in content.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: user {user!r} has {str(text)[:60]!r}, expected a text; check --{flag}")
    return pl.DataFrame({"user": list(content), "preference": [" ".join(text.split()) for text in content.values()]})


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


def next_sid_prompts(sequences: pl.DataFrame, items: Items, prompts: Prompts) -> list[str]:
    """The SID history -> next SID prompt of each sample: what evaluation and RL ask, and SFT's first task."""
    return [prompts.render("sid_seq", history=prompts.sid_history(h, items)) for h in sequences["history"].to_list()]


def _sequence_task(task: str, history: Callable, answer: Callable) -> Callable:
    def pairs(sequences: pl.DataFrame, items: Items, prompts: Prompts) -> Iterator[Pair]:
        for past, target in sequences.select("history", "target").iter_rows():
            yield prompts.render(task, history=history(prompts, past, items)), answer(items)[target]

    return pairs


def _item_task(task: str, question: Callable, answer: Callable) -> Callable:
    def pairs(sequences: pl.DataFrame, items: Items, prompts: Prompts) -> Iterator[Pair]:
        for asked, answered in zip(question(items), answer(items), strict=True):
            yield prompts.render(task, item=asked), answered

    return pairs


def _sid_walk(sequences: pl.DataFrame, items: Items, prompts: Prompts) -> Iterator[Pair]:
    """The first item of a row -> every later one in order: as many targets in one row as it has items."""
    for past, target in sequences.select("history", "target").iter_rows():
        walk = [*past, target]
        prompt = prompts.render("sid_walk", history=prompts.sid_history(walk[:1], items))
        yield prompt, prompts.sid_history(walk[1:], items)


def _preferences(sequences: pl.DataFrame, items: Items) -> Iterator[tuple[list[int], int, str]]:
    """(history, target, preference) of the samples whose user has one; a preference that names the answer is refused."""
    if "preference" not in sequences.columns:
        raise UserError("the preference tasks need --user_preference_file; give it, or leave them out of --sft_tasks")
    for user, past, target, text in sequences.select("user", "history", "target", "preference").iter_rows():
        if text is not None:
            if items.sids[target] in text:
                raise UserError(
                    f"--user_preference_file: user {user}'s text holds {items.sids[target]}, an answer of theirs"
                )
            yield past, target, text


def _sid_seq2preference(sequences: pl.DataFrame, items: Items, prompts: Prompts) -> Iterator[Pair]:
    for past, _, text in _preferences(sequences, items):
        yield prompts.render("sid_seq2preference", history=prompts.sid_history(past, items)), text


def _preference2sid(sequences: pl.DataFrame, items: Items, prompts: Prompts) -> Iterator[Pair]:
    for _, target, text in _preferences(sequences, items):
        yield prompts.render("preference2sid", preference=text), items.sids[target]


def _sids(items: Items) -> list[str]:
    return items.sids


def _titles(items: Items) -> list[str]:
    return items.titles


# name -> function from (sequences, items, prompts) to (prompt, answer) pairs
SFT_TASKS: dict[str, Callable[[pl.DataFrame, Items, Prompts], Iterator[Pair]]] = {
    "sid_seq": _sequence_task("sid_seq", Prompts.sid_history, _sids),
    "title2sid": _item_task("title2sid", _titles, _sids),
    "sid2title": _item_task("sid2title", _sids, _titles),
    "sid_seq2title": _sequence_task("sid_seq2title", Prompts.sid_history, _titles),
    "title_seq2title": _sequence_task("title_seq2title", Prompts.title_history, _titles),
    "title_seq2sid": _sequence_task("title_seq2sid", Prompts.title_history, _sids),
    "sid_walk": _sid_walk,
    "sid_seq2preference": _sid_seq2preference,
    "preference2sid": _preference2sid,
}
DEFAULT_TASKS = "sid_seq,title2sid,sid2title,sid_seq2title,title_seq2title"


def parse_tasks(text: str) -> dict[str, float]:
    """`"sid_seq,title2sid:0.5"` -> `{"sid_seq": 1.0, "title2sid": 0.5}`; a weight is how often a row is taken."""
    weights = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, weight = part.partition(":")
        if name not in SFT_TASKS:
            raise UserError(f"--sft_tasks {text}: no task {name!r}, expected some of {', '.join(SFT_TASKS)}")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise UserError(
                f"--sft_tasks {text}: {weight!r} is no weight, expected a number as in {name}:0.5"
            ) from None
        if not 0 < weights[name] < 1000:
            raise UserError(f"--sft_tasks {text}: weight {weight} of {name}, expected more than 0 and less than 1000")
    if not weights:
        raise UserError(f"--sft_tasks: no task given, expected some of {', '.join(SFT_TASKS)}")
    return weights


def sft_pairs(
    weights: dict[str, float], sequences: pl.DataFrame, items: Items, prompts: Prompts, seed: int
) -> list[Pair]:
    """The (prompt, answer) pairs of every task, each task's rows taken `weight` times (a fraction is drawn by seed)."""
    rows = []
    for name, weight in weights.items():
        pairs = list(SFT_TASKS[name](sequences, items, prompts))
        rows += pairs * int(weight)
        extra = round((weight - int(weight)) * len(pairs))
        rows += random.Random(f"{seed} {name}").sample(pairs, extra)
    return rows


RL_TASKS = ("sid_seq", "title2sid", "title_seq2sid")


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
    caps: dict[str, int | None] | None = None,
    seed: int = 0,
) -> dict[str, list]:
    """Columns of the RL dataset. Each row carries its own target: nothing is looked up by prompt text.

    caps: the most rows of each task, drawn by seed, None for all; by default SID history -> SID alone. An item's title
    asks for that item and has no history; a history asks for the sample's target.
    """
    columns: dict[str, list] = {name: [] for name in ("prompt", "target_sid", "target_item", "history_items", "task")}
    histories, targets = sequences["history"].to_list(), sequences["target"].to_list()
    for task, cap in (caps or {"sid_seq": None}).items():
        by_item = task == "title2sid"
        rows = range(len(items.sids) if by_item else len(targets))
        if cap is not None and cap < len(rows):
            rows = sorted(random.Random(f"{seed} {task}").sample(rows, cap))
        for row in rows:
            history, target = ([], row) if by_item else (histories[row], targets[row])
            if task == "sid_seq":
                fields = {"history": prompts.sid_history(history, items)}
            elif task == "title_seq2sid":
                fields = {"history": prompts.title_history(history, items)}
            else:
                fields = {"item": items.titles[target]}
            columns["prompt"].append(prompts.render(task, **fields))
            columns["target_sid"].append(items.sids[target])
            columns["target_item"].append(target)
            columns["history_items"].append(history)
            columns["task"].append(task)
    return columns
