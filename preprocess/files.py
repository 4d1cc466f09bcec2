"""Interactions from delimited files and parquet, read by polars in streaming mode, and lines of texts.

Only the columns that are needed are kept, ids as categories: 100 million rows take about 2 GB. Records that cannot be
used (no user, no item, no valid time) are counted in `Faults` with the first one's row. A file whose rows do not fit
together (more cells than columns, an open quote, not UTF-8) is refused, with the row.
"""

import csv
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import polars as pl

from minionerec.common.console import say
from minionerec.common.errors import UserError
from minionerec.common.files import require_file
from preprocess.dataset import UNITS, Faults, unit_of

EARLIEST, LATEST = 1, 4_102_444_799  # seconds: after the start of 1970, which often stands for no time, before 2100
DATES = (
    "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M", "%Y-%m-%d",
    "%Y/%m/%d %H:%M:%S", "%Y/%m/%d",
)  # fmt: skip
DIGITS = r"^(?:19[7-9]\d|20\d\d)(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:(?:[01]\d|2[0-3])(?:[0-5]\d){0,2})?$"
BREAKS = "[\t\r\n]"  # what ids must not have: `<D>.user2id` and `<D>.item2id` hold `id <tab> number` lines
ZONED = "%+"  # with Z or an offset: 2016-10-31T12:00:00Z, 2016-10-31T12:00:00+01:00


class Columns(NamedTuple):
    """The names of the columns of a log; empty for those that it does not have."""

    user: str
    item: str
    time: str = ""
    rating: str = ""


def require_text(path: str | Path, flag: str) -> Path:
    """`path`, if it is one file with something in it that is neither UTF-16 nor binary. May be gzip."""
    path = require_file(path, flag)
    if path.is_dir():
        raise UserError(f"{path}: found a folder, expected a file; check --{flag}")
    with open_binary(path) as f:
        start = f.read(4096)
    if not start.strip():
        raise UserError(f"{path}: the file is empty, expected records; check --{flag}")
    if b"\r" in start[:-1] and b"\n" not in start:
        raise UserError(f"{path}: found line ends CR, expected LF or CR LF; save the file with those")
    if start.startswith((b"\xff\xfe", b"\xfe\xff", b"PK\x03\x04", b"PAR1")) or b"\0" in start:
        raise UserError(f"{path}: found UTF-16 or binary data, expected UTF-8 text; check --{flag}")
    return path


@contextmanager
def open_binary(path: Path) -> Iterator:
    """The bytes of a file, those in it if it is gzip. Raises `UserError` where the gzip file is cut off or damaged."""
    with open(path, "rb") as f:
        packed = f.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rb") if packed else open(path, "rb") as f:
            yield f
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        reason = str(error).rstrip(".")
        raise UserError(f"{path}: found a broken gzip file ({reason}); download it again") from None


def lines(path: Path, flag: str, encoding: str = "utf-8", errors: str = "strict") -> Iterator[tuple[int, str]]:
    """(number, line without its end) of every line that is not blank.

    errors: what other bytes become, as in `bytes.decode`; "strict" raises a `UserError` that names the line.
    """
    with open_binary(require_text(path, flag)) as f:
        number = 0
        try:
            for number, line in enumerate(f, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                line = line.rstrip(b"\r\n")
                if errors == "strict" and b"\r" in line:
                    place = f"{path}, line {number}: found a carriage return inside the line"
                    raise UserError(f"{place}; save the file with line ends LF or CR LF")
                if line.strip():
                    yield number, line.decode(encoding, errors)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, line {number}: found the byte 0x{error.object[error.start]:02x}, which is not UTF-8 there; "
                "save the file as UTF-8"
            ) from None


# ------------------------------------------------------------------------------------------------ delimited files


def scan_delimited(path: Path, flag: str, separator: str, quote_char: str | None, header: list[str] | None = None):
    """A lazy frame of strings, its names cut at a colon (RecBole's `name:type`). header: of a file without one."""
    require_text(path, flag)
    names = {} if header is None else {"has_header": False, "schema": dict.fromkeys(header, pl.String)}
    lazy = pl.scan_csv(path, separator=separator, quote_char=quote_char, infer_schema=False, glob=False, **names)
    try:
        found = lazy.collect_schema().names()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path}: {_reason(path, separator, quote_char, error)}") from None
    if twice := [name for name in found if f"{name}_duplicated_0" in found]:
        raise UserError(f"{path}: column {twice[0]!r} is there twice; remove one")
    return lazy if header else lazy.rename(short_names(found, path))


def short_names(columns: list[str], path: Path) -> dict[str, str]:
    """RecBole's `name:type` -> `name`. Raises `UserError` where two columns have one name."""
    names = {column: column.split(":")[0].strip("\ufeff") for column in columns}
    for name in names.values():
        same = [other for other in columns if names[other] == name]
        if len(same) > 1:
            raise UserError(
                f"{path}: found the columns {same[:5]}, expected names that differ before the colon; rename one"
            )
    return names


def read_log(
    path: Path,
    flag: str,
    columns: Columns,
    faults: Faults,
    *,
    separator: str = ",",
    quote_char: str | None = '"',
    header: list[str] | None = None,
    unit: str = "",
    earliest: int = EARLIEST,
) -> tuple[pl.DataFrame, str]:
    """(log, unit of its times): columns user, item (Categorical), time and rating of a delimited file, in file order.

    unit: of the times; empty: detected from their form and size; "date": texts like 2016-10-31 or numbers like 20161031.
    earliest: seconds; unless they only order, times must not be before that, and before 2100. header: names of the columns of a
    file without a header. Without a time column all times are 0.
    """
    lazy = scan_delimited(path, flag, separator, quote_char, header)
    require_columns(lazy, columns, path, flag)
    first = 1 if header else 2

    def cell(row: int, name: str) -> str:
        found = lazy.slice(row, 1).select(name).collect().item() or ""
        return f"{path}, row {row + first}, column {name}: found {found[:60]!r}"

    try:
        return usable(lazy, columns, faults, cell, unit, earliest, _all_null())
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path}, {_reason(path, separator, quote_char, error)}; repair it or check --{flag}") from None


def require_columns(lazy: pl.LazyFrame, columns: Columns, path: Path, flag: str) -> None:
    """Raise `UserError` for a column that is not there."""
    found = lazy.collect_schema().names()
    for kind, name in columns._asdict().items():
        if name and name not in found:
            if flag == "file":  # of preprocess.table
                flag = f"{kind}_column" if len(found) > 1 else f"{kind}_column and --separator"
            raise UserError(f"{path}: no column {name!r}, found {found[:20]}; check --{flag}")


def _all_null() -> pl.Expr:
    """Blank lines. Polars notices a row with a cell too many only where all columns are read, as here."""
    return pl.all_horizontal(pl.all().is_null())


def usable(
    lazy: pl.LazyFrame,
    columns: Columns,
    faults: Faults,
    cell: Callable[[int, str], str],
    unit: str,
    earliest: int = EARLIEST,
    blank: pl.Expr | None = None,
) -> tuple[pl.DataFrame, str]:
    """(log, unit of its times): the usable rows of a lazy frame; the others are added to `faults`.

    cell(row, column) says where a cell is and what it holds. blank: rows that are no records.
    """
    blank = pl.lit(False) if blank is None else blank
    if digits := unit in ("", "date") and are_digits(lazy, columns.time):
        say(f"the times of column {columns.time} are read as dates: 20161031 is 2016-10-31")
    dates = unit == "date" or digits or (not unit and _are_dates(lazy, columns.time))
    unit = "digits" if digits else "date" if dates else unit
    chosen = _expressions(lazy, columns, unit)
    table = lazy.select(*chosen, blank=blank).collect(engine="streaming")
    blank = table["blank"]
    table = table.drop("blank")
    unit = "us" if dates else unit
    faults.records += len(table) - int(blank.sum())
    if not columns.time:
        unit = ""
    elif not unit:
        unit = unit_of(table["time"])
    bad = blank.clone()
    checks = [("user", "an id"), ("item", "an id"), ("time", "a time stamp"), ("rating", "a number")]
    for name, expected in checks:
        if name not in table.columns:
            continue
        wrong = table[name].is_null()
        if expected == "an id" and table[name].unique().cast(pl.String).str.contains(BREAKS).any():
            wrong |= table[name].cast(pl.String).str.contains(BREAKS).fill_null(False)
            expected = "an id without tabs and line ends"
        if name in ("time", "rating") and table[name].dtype == pl.Float64:
            wrong |= ~table[name].is_finite().fill_null(False)
        if name == "time" and columns.time:
            expected = f"a time stamp in {unit}" if unit in UNITS else "a number or a date like 2016-10-31"
            expected = "a date like 2016-10-31 or 2016-10-31T12:00:00" if dates else expected
            if unit in UNITS:
                expected += f", {datetime.fromtimestamp(earliest, UTC).year} to 2099"
                wrong |= ~table["time"].is_between(earliest * UNITS[unit], LATEST * UNITS[unit]).fill_null(False)
        wrong &= ~bad
        if count := int(wrong.sum()):
            row = int(wrong.arg_true()[0])
            column = getattr(columns, name)
            faults.add(f"no valid {name}", count, f"{cell(row, column)}, expected {expected}")
        bad |= wrong
    return (table.filter(~bad) if bad.any() else table), unit


def _expressions(lazy: pl.LazyFrame, columns: Columns, unit: str) -> list[pl.Expr]:
    """user, item, time and rating as one of their types each, null where a cell is none."""
    schema = lazy.collect_schema()
    ids = [
        pl.col(getattr(columns, name)).cast(pl.String).replace("", None).cast(pl.Categorical(pl.Categories.random()))
        for name in ("user", "item")
    ]
    chosen = [expression.alias(name) for name, expression in zip(("user", "item"), ids, strict=True)]
    time = pl.col(columns.time) if columns.time else None
    if time is None:
        chosen.append(pl.lit(0, pl.Int64).alias("time"))
    elif schema[columns.time].is_temporal():
        chosen.append(time.cast(pl.Datetime("us")).to_physical().alias("time"))
    elif unit == "digits":
        text = _whole(time).str.pad_end(14, "0")
        chosen.append(text.str.strptime(pl.Datetime("us"), "%Y%m%d%H%M%S", strict=False).to_physical().alias("time"))
    elif unit == "date":
        texts = [time.str.strptime(pl.Datetime("us"), form, strict=False) for form in DATES]
        texts.append(time.str.strptime(pl.Datetime("us", "UTC"), ZONED, strict=False).dt.replace_time_zone(None))
        chosen.append(pl.coalesce(texts).to_physical().alias("time"))
    else:
        chosen.append(time.cast(_number_type(lazy, columns.time), strict=False).alias("time"))
    if columns.rating:
        chosen.append(pl.col(columns.rating).cast(pl.Float64, strict=False).alias("rating"))
    return chosen


def _are_dates(lazy: pl.LazyFrame, column: str) -> bool:
    """Whether the first time that is there is a text like 2016-10-31."""
    if not column or lazy.collect_schema()[column] != pl.String:
        return False
    first = lazy.select(column).drop_nulls().head(1).collect()
    return bool(first[column].str.contains(r"^\d{4}[-/]\d\d?[-/]\d").any())


def are_digits(lazy: pl.LazyFrame, column: str) -> bool:
    """Whether nine of ten of the first times are dates without separators: 20161031, 2016103112, 20161031120000."""
    if not column or lazy.collect_schema()[column].is_temporal():
        return False
    first = lazy.select(_whole(pl.col(column))).drop_nulls().head(1000).collect().to_series()
    return (first.str.contains(DIGITS).mean() or 0) > 0.9


def _whole(number: pl.Expr) -> pl.Expr:
    """A number, or a text of one, as the text of a whole number."""
    return number.cast(pl.Float64, strict=False).cast(pl.Int64, strict=False).cast(pl.String)


def _number_type(lazy: pl.LazyFrame, column: str) -> pl.DataType:
    """Float64; Int64 for nanoseconds, which do not fit into a float."""
    head = lazy.select(pl.col(column).cast(pl.Int64, strict=False)).head(1000).collect().to_series()
    return pl.Int64() if (head.max() or 0) > 2**53 else pl.Float64()


def _reason(path: Path, separator: str, quote_char: str | None, error: Exception) -> str:
    """The first row that breaks the rules of the file, in words; else polars' own words."""
    with open_binary(path) as f:  # whole, since a broken gzip file is the cause of the rows that it breaks
        while f.read(1 << 24):
            pass
    quoting = csv.QUOTE_MINIMAL if quote_char else csv.QUOTE_NONE
    limit, row, width = csv.field_size_limit(sys.maxsize), 0, 0
    try:
        with open_binary(path) as f, io.TextIOWrapper(f, encoding="utf-8", newline="") as text:
            reader = csv.reader(text, delimiter=separator, quotechar=quote_char or '"', quoting=quoting, strict=True)
            for row, cells in enumerate(reader, start=1):
                width = width or len(cells)
                if cells and len(cells) > width:
                    return f"row {row}: found {len(cells)} cells, expected {width}"
    except csv.Error as wrong:
        return f"row {row + 1}: found a cell whose quotes are not closed or not doubled ({wrong})"
    except UnicodeDecodeError:
        for number, _ in lines(path, "file"):  # raises, and names the line
            row = number
    finally:
        csv.field_size_limit(limit)
    return f"the table cannot be read ({str(error).splitlines()[0]})"
