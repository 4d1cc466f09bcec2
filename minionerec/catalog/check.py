"""Every fault of a folder in the published layout, with file and row.

    python -m data check DIR

Checks the item, index and info files, the CSVs and, where they are there, `.inter` files and embeddings: each on its own,
and against each other. Prints one line a fault; exits with code 2 if there is one. The readers of the stages stop at the
first fault; this lists all of them.
"""

import ast
import csv
import io
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from minionerec.catalog import sequences
from minionerec.catalog.catalog import Catalog
from minionerec.catalog.items import BRACKETED
from minionerec.catalog.sids import Renaming, is_sid, read_index
from minionerec.common.errors import UserError
from minionerec.common.files import read_json
from minionerec.common.options import run
from minionerec.common.tables import ROW, read_csv, read_text
from minionerec.common.text import printable

KINDS = {  # patterns of the files of a folder, and how many of them there may be
    "item": (["*.item.json", "index/*.item.json"], "one"),
    "index": (["*.index.json", "index/*.index.json"], "one"),
    "info": (["info/*.txt"], "one"),
    "train": (["train/*.csv"], "one"),
    "valid": (["valid/*.csv"], "one"),
    "test": (["test/*.csv"], "one"),
    "inter": (["*.train.inter", "*.valid.inter", "*.test.inter"], "any"),
    "embedding": (["*.npy"], "any"),
}
FLAG = "dir"  # of the one-line errors of readers, which are cut to their first part here


class Form(NamedTuple):
    """What the rows of a CSV or of an .inter file must have."""

    columns: tuple[str, ...]
    user: str
    history: str
    target: str
    pattern: str  # of a history
    expected: str


CSV = Form(
    ("user_id", "history_item_title", "item_title", "history_item_id", "item_id", "history_item_sid", "item_sid"),
    "user_id", "history_item_id", "item_id", sequences._LIST, "a list literal like [3, 7]",
)  # fmt: skip
INTER_COLUMNS = ("user_id:token", "item_id_list:token_seq", "item_id:token")
INTER = Form(INTER_COLUMNS, *INTER_COLUMNS, r"^ *(?:[0-9]+ *)*$", "ids with blanks between them")

Fault = tuple[Path, str]  # the file, and where in it, what was found, what was expected


def check(folder: str | Path) -> Iterator[Fault]:
    """Every fault. Raises `UserError` where there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one in the published layout")
    files: dict[str, list[Path]] = {}
    for kind, (patterns, number) in KINDS.items():
        files[kind] = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        if number == "one" and len(files[kind]) != 1:
            yield folder, f"found {len(files[kind])} files like {' or '.join(patterns)}, expected one"
    titles, sids = {}, {}
    for path in files["item"][:1]:
        titles, found = _items(path)
        yield from found
    for path in files["index"][:1]:
        sids, found = _index(path)
        yield from found
        if files["item"] and len(sids) != len(titles):
            yield path, f"found {len(sids)} items, expected the {len(titles)} of {files['item'][0].name}"
    for path in files["info"]:
        yield from _info(path, sids, titles)
    items = max(len(titles), len(sids))
    for split in ("train", "valid", "test"):
        for path in files[split]:
            yield from _samples(path, CSV, items, lambda table: _csv(table, sids, titles))
    for path in files["inter"]:
        yield from _samples(path, INTER, items, _inter)
    for path in files["embedding"]:
        yield from _embedding(path, items)


# ------------------------------------------------------------------------------------------------ items


def _read(path: Path, read: Callable) -> tuple[object, list[Fault]]:
    """(content, no fault), or (None, what the reader said)."""
    try:
        return read(path, FLAG), []
    except UserError as error:
        return None, [(path, str(error).removeprefix(str(path)).lstrip(":, ").removesuffix(f"; check --{FLAG}"))]


def _gaps(path: Path, content: dict) -> Iterator[Fault]:
    for item in range(len(content)):
        if str(item) not in content:
            yield path, f"item {item} is missing, expected ids 0..{len(content) - 1} without gaps"
    for key in content:
        if str(number := _number(key)) != key or not 0 <= number < len(content):
            yield path, f"item {key[:40]!r}, expected ids 0..{len(content) - 1}"


def _items(path: Path) -> tuple[dict[int, str], list[Fault]]:
    """(title of each item, faults)."""
    content, faults = _read(path, read_json)
    content = content or {}
    faults += _gaps(path, content)
    titles = {}
    for item, meta in content.items():
        if not isinstance(meta, dict) or not isinstance(meta.get("title"), str):
            faults.append(
                (path, f'item {item[:40]}: found {str(meta)[:60]!r}, expected an object with a string "title"')
            )
        elif not meta["title"].strip():
            faults.append((path, f"item {item[:40]}: the title is empty"))
        titles[_number(item)] = " ".join(str(meta.get("title")).split()) if isinstance(meta, dict) else ""
    return titles, faults


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1


def _index(path: Path) -> tuple[dict[int, str], list[Fault]]:
    """(SID of each item, faults)."""
    sids, faults = _read(path, read_index)
    if sids:
        return dict(enumerate(sids)), [(path, str(error)) for error in _prefixes(sids)]
    content, unreadable = _read(path, read_json)
    if content is None:
        return {}, unreadable
    faults, renaming, sids = list(_gaps(path, content)), Renaming(), {}
    for item, tokens in content.items():
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str | int) for token in tokens):
            faults.append(
                (path, f'item {item[:40]}: found {str(tokens)[:60]!r}, expected a list like ["<a_1>", "<b_2>"]')
            )
            continue
        try:
            sids[_number(item)] = renaming.sid(tokens)
        except ValueError as error:
            faults.append((path, f"item {item[:40]}: found {str(tokens)[:60]!r}: {error}"))
    return sids, faults


def _prefixes(sids: Sequence[str]) -> list[UserError]:
    try:
        Catalog(sids)
    except UserError as error:
        return [error]
    return []


def _info(path: Path, sids: dict[int, str], titles: dict[int, str]) -> Iterator[Fault]:
    text, faults = _read(path, read_text)
    yield from faults
    if text is None:
        return
    known: dict[int, int] = {}
    rows = list(enumerate(text.rstrip("\r\n").split("\n"), start=1))
    renaming = Renaming()
    for number, line in rows:
        sid, _, rest = line.partition("\t")
        title, tab, item = rest.rpartition("\t")
        item = _number(item.strip())
        if not tab or item < 0:
            yield path, f"line {number}: found {line[:80]!r}, expected 'SID<tab>title<tab>item id'"
            continue
        if item in known:
            yield path, f"line {number}: item {item} is also in line {known[item]}, expected each item once"
        known[item] = number
        try:
            written = sid if is_sid(sid) else renaming.sid(BRACKETED.findall(sid))
        except ValueError as error:
            yield path, f"line {number}: {error}"
            continue
        if item in sids and written != sids[item]:
            yield path, f"line {number}: found {written}, expected {sids[item]}, the SID of item {item}"
        if item in titles and " ".join(title.split()) != titles[item]:
            yield path, f"line {number}: found the title {title[:60]!r}, expected {titles[item][:60]!r}"
    for item in sorted({*range(max(len(sids), len(known)))} - known.keys()):
        yield path, f"item {item} is missing"
    for item in sorted(known.keys() - {*range(max(len(sids), len(known)))}):
        yield path, f"line {known[item]}: item {item}, expected ids 0..{max(len(sids), len(known)) - 1}"


# ------------------------------------------------------------------------------------------------ samples

Cells = Iterator[tuple[pl.Series | pl.Expr, str, str]]  # which rows are wrong, the column, what is expected


def _samples(path: Path, form: Form, items: int, more: Callable) -> Iterator[Fault]:
    """Faults of a CSV or an .inter file: its rows, the ids in them, and those that `more(table)` finds."""
    table, faults = _table(path)
    yield from faults
    if table is None:
        return
    if missing := [column for column in form.columns if column not in table.columns]:
        yield path, f"row 1: no column {missing}, found {table.columns[1:]}"
        return
    if not len(table):
        yield path, "no rows"
    known = pl.element().is_between(0, items - 1).fill_null(False)
    target = table[form.target].cast(pl.Int64, strict=False)
    cells = table[form.history].fill_null("" if form is INTER else "x")
    listed = cells.str.contains(form.pattern)
    history = cells.str.extract_all("[0-9]+").cast(pl.List(pl.Int64), strict=False)
    wrong = ~target.is_between(0, items - 1).fill_null(False)
    unknown = listed & ~history.list.eval(known).list.all()
    expected = f"ids of the catalog, 0..{items - 1}"
    yield from _rows(path, table, ~listed, form.history, form.expected)
    yield from _rows(path, table, unknown, form.history, expected)
    yield from _rows(path, table, wrong, form.target, expected)
    yield from _rows(path, table, table[form.user].is_null(), form.user, "a user")
    good = ~wrong & listed & ~unknown
    checked = table.filter(good).with_columns(_target=target.filter(good), _history=history.filter(good))
    for bad, column, expected in more(checked):
        yield from _rows(path, checked, bad, column, expected)


def _rows(path: Path, table: pl.DataFrame, bad, column: str, expected: str) -> Iterator[Fault]:
    for row, cell in table.filter(bad).select(ROW, column).iter_rows():
        yield path, f"row {row}, column {column}: found {(cell or '')[:60]!r}, expected {expected}"


def _table(path: Path) -> tuple[pl.DataFrame | None, list[Fault]]:
    """(the rows that have as many cells as the header, faults)."""
    form = {"separator": "\t", "quote_char": None} if path.suffix == ".inter" else {}
    table, faults = _read(path, lambda path, flag: read_csv(path, flag, **form))
    if table is not None:
        return table, []
    text, unreadable = _read(path, read_text)
    if not text or not text.strip():
        return None, unreadable or faults
    quoting = csv.QUOTE_NONE if form else csv.QUOTE_MINIMAL
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=form.get("separator", ","), quoting=quoting, strict=True
    )
    rows, kept = [], []
    limit, number = csv.field_size_limit(sys.maxsize), 0
    try:
        for number, cells in enumerate(reader, start=1):
            if kept and len(cells) != len(kept[0]) and cells:
                rows.append((path, f"row {number}: found {len(cells)} cells, expected {len(kept[0])} as in the header"))
            elif cells:
                kept.append([str(number), *cells])
            if number == 1:
                kept[0] = cells
    except csv.Error as error:
        rows.append((path, f"row {number + 1}: {error}; the rows from here on are not checked"))
    finally:
        csv.field_size_limit(limit)
    header = [ROW, *kept[0]]
    if len({*header}) < len(header) or not rows:
        return None, rows or faults
    table = pl.DataFrame(kept[1:], schema=dict.fromkeys(header, pl.String), orient="row")
    return table.with_columns(pl.exclude(ROW).replace("", None), pl.col(ROW).cast(pl.UInt32)), rows


def _inter(table: pl.DataFrame) -> Cells:
    yield from ()


def _csv(table: pl.DataFrame, sids: dict[int, str], titles: dict[int, str]) -> Cells:
    """SIDs and titles of rows whose ids are known, against the catalog's."""
    target, history = table["_target"], table["_history"]
    size = max([*sids, *titles], default=-1) + 1
    if sids and len(table):
        sid_of = pl.Series([sids.get(item, "") for item in range(size)])
        written = sequences._with_our_tokens(table)
        same = "the catalog's SID of the item"
        yield written["item_sid"].ne_missing(sid_of.gather(target, null_on_oob=True)), "item_sid", same
        found = written["history_item_sid"].str.extract_all(sequences._SID).list.join(" ").fill_null("")
        yield (
            found != sequences._joined_sids(history, sid_of),
            "history_item_sid",
            "the SIDs of the items of the history",
        )
    if titles:
        title_of = pl.Series([titles.get(item, "") for item in range(size)])
        expected = title_of.gather(target, null_on_oob=True)
        yield _collapsed(table["item_title"]) != expected, "item_title", "the title of the item"
        lists = [[titles.get(item, "") for item in ids] for ids in history.to_list()]
        wrong = [_titles(cell) != ids for cell, ids in zip(table["history_item_title"], lists, strict=True)]
        yield pl.Series(wrong, dtype=pl.Boolean), "history_item_title", "a list literal of the titles of the history"


def _collapsed(texts: pl.Series) -> pl.Series:
    return texts.fill_null("").str.replace_all(r"\s+", " ").str.strip_chars()


def _titles(cell: str | None) -> list[str] | None:
    """The titles in a list literal; None where it is none."""
    try:
        with warnings.catch_warnings(action="ignore"):
            titles = ast.literal_eval(cell or "[]")
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    return [" ".join(str(title).split()) for title in titles] if isinstance(titles, list | tuple) else None


def _embedding(path: Path, items: int) -> Iterator[Fault]:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy's header parser raises errors of many kinds
        yield path, f"not readable as an array ({' '.join(str(error).split())[:200]})"
        return
    if not isinstance(rows, np.ndarray):
        yield path, f"found an .npz file, expected one array of floats ({items}, dim)"
    elif rows.ndim != 2 or rows.dtype.kind != "f" or not rows.shape[1] or (items and len(rows) != items):
        yield path, f"found {rows.dtype} {rows.shape}, expected floats ({items}, dim)"
    elif not all(np.isfinite(rows[first : first + 65_536]).all() for first in range(0, len(rows), 65_536)):
        bad = next(row for row in range(len(rows)) if not np.isfinite(rows[row]).all())
        yield path, f"row {bad} has a number that is not finite"


# ------------------------------------------------------------------------------------------------ the command


def command(arguments: Sequence[str]) -> None:
    """`check DIR`: print every fault. Raises `UserError` for other arguments, and where there is a fault."""
    if len(arguments) != 2 or arguments[0] != "check":
        raise UserError(f"found the arguments {' '.join(arguments)!r}, expected `python -m data check DIR`")
    counts: dict[Path, int] = defaultdict(int)
    for path, fault in check(arguments[1]):
        counts[path] += 1
        print(printable(f"{path}: {fault}"))
    if counts:
        raise UserError(f"{arguments[1]}: {sum(counts.values())} faults in {len(counts)} files, listed above")
    print(f"{arguments[1]}: no faults")


@dataclass
class Options:
    """The command has a word and a folder, and no options."""


def start() -> None:
    """Run the command line."""
    words = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    run(lambda _: command(words), Options)
