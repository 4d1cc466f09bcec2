"""Stage 0, any table of interactions: CSV, TSV or parquet, one interaction a row, columns named by options.

    python -m preprocess.table --file log.csv --user_column who --item_column what --time_column when \\
        --items_file catalog.csv --title_column name --output_dir output/mine/raw

Delimited files may be gzip. The items are a second table, one item a row, with the column --item_column too; without it
an item's title is its id. Nothing else of the tables is read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minionerec.common.errors import UserError
from minionerec.common.files import require_file
from minionerec.common.options import RUNTIME, option, run
from preprocess.options import PreprocessOptions, name_of, refuse_unused
from preprocess.recbole import USUAL, cleaned, column_of
from preprocess.stage import preprocess

SEPARATORS = {"comma": ",", "tab": "\t", "semicolon": ";", "pipe": "|", "blank": " "}


@dataclass
class Options(PreprocessOptions):
    file: str = option("", "table of interactions", role=RUNTIME)  # the record holds digests of both files
    items_file: str = option("", "table of items; default: titles are ids", role=RUNTIME)
    user_column: str = option("user_id", "column of the user")
    item_column: str = option("item_id", "column of the item, in both tables")
    time_column: str = option("timestamp", "column of the time; none: rows are in time order")
    time_unit: Literal["auto", "s", "ms", "us", "ns", "date"] = option(
        "auto",
        "of the time column; auto: detected from its values; date: like 2016-10-31, 2016-10-31T12:00:00Z or 20161031",
    )
    rating_column: str = option("rating", "column of the rating, used by --min_rating")
    title_column: str = option("", "column of the title; default: a usual name")
    description_column: str = option("", "column of the description")
    brand_column: str = option("", "column of the brand")
    categories_column: str = option("", "column of the categories")
    column_names: list[str] = option([], "names of all columns of --file, if it has no header")
    separator: Literal["auto", "comma", "tab", "semicolon", "pipe", "blank"] = option(
        "auto",
        "between cells; auto: tab for .tsv, .txt and .inter, else comma, or semicolon if the first line has no comma",
    )


def is_parquet(path: Path) -> bool:
    with open(path, "rb") as f:
        return f.read(4) == b"PAR1"


def form_of(options: Options, path: Path, flag: str) -> dict:
    """Separator and quote of a delimited file. Tabs come without quotes, all others with them."""
    from preprocess.files import open_binary, require_text

    name = path.name.removesuffix(".gz")
    separator = SEPARATORS.get(options.separator, ",")
    if options.separator == "auto":
        with open_binary(require_text(path, flag)) as f:
            first = f.read(4096).partition(b"\n")[0]  # what `require_text` could read
        if name.endswith((".tsv", ".txt", ".inter")):
            separator = "\t"
        elif b";" in first and b"," not in first:
            separator = ";"
    return {"separator": separator, "quote_char": None if separator == "\t" else '"'}


def read_interactions(options: Options, faults):
    """(log, unit of its times) of --file."""
    import polars as pl

    from preprocess.files import Columns, are_digits, read_log, require_columns, usable

    path = Path(options.file)
    time = "" if options.time_column == "none" else options.time_column
    rating = options.rating_column if options.min_rating > 0 else ""
    columns = Columns(options.user_column, options.item_column, time, rating)
    unit = "" if options.time_unit == "auto" else options.time_unit
    if not is_parquet(path):
        form = form_of(options, path, "file") | {"header": options.column_names or None}
        return read_log(path, "file", columns, faults, unit=unit, **form)

    def cell(row: int, name: str) -> str:
        return f"{path}, row {row + 1}, column {name}: found {lazy.slice(row, 1).select(name).collect().item()!r:.60}"

    try:
        lazy = pl.scan_parquet(path, glob=False)
        require_columns(lazy, columns, path, "file")
        temporal = bool(time) and lazy.collect_schema()[time].is_temporal()
        numbers = bool(time) and not temporal and lazy.collect_schema()[time] != pl.String
        if unit == "date" and numbers and not are_digits(lazy, time):
            raise UserError(f"{path}: column {time!r} holds numbers, not dates; give another --time_unit")
        return usable(lazy, columns, faults, cell, "us" if temporal else unit)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path}: not readable as parquet ({str(error).splitlines()[0]}); write it again") from None


def read_items(options: Options):
    """Columns item and texts of --items_file. Raises `UserError` for an item that is there twice."""
    import polars as pl

    from minionerec.common.tables import ROW, read_csv, refuse_rows

    path = Path(options.items_file)
    if is_parquet(path):
        try:
            table = pl.read_parquet(path, glob=False).with_row_index(ROW, offset=1)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise UserError(f"{path}: not readable as parquet ({str(error).splitlines()[0]})") from None
        joined = [name for name, kind in table.schema.items() if kind == pl.List(pl.String)]
        table = table.with_columns(pl.col(joined).list.join(", ")).cast(pl.String, strict=False)
    else:
        table = read_csv(path, "items_file", **form_of(options, path, "items_file"))
    item, found = options.item_column, table.columns[1:]
    if item not in found:
        raise UserError(
            f"{path}: no column {item!r}, found {found}; check --item_column; the ids need the same name in both tables"
        )
    refuse_rows(table, pl.col(item).is_null(), item, path, "an id")
    refuse_rows(table, ~pl.col(item).is_first_distinct(), item, path, "each item once")
    columns = {name: column_of(name, options, found, path) for name in USUAL}
    if not columns["title"]:
        raise UserError(f"{path}: no column of titles, found {found}; give --title_column")
    return cleaned(table.select(item=pl.col(item), **{n: pl.col(c) if c else pl.lit("") for n, c in columns.items()}))


def main(options: Options) -> None:
    options.require("output_dir", "file")
    files = {"file": require_file(options.file, "file")}
    if options.items_file:
        files["items"] = require_file(options.items_file, "items_file")
    for path, flag in zip(files.values(), ("file", "items_file"), strict=False):
        if path.is_dir():
            raise UserError(f"{path}: found a folder, expected a file; check --{flag}")
    if not options.items_file:
        refuse_unused(options, "--items_file")
    if options.column_names and is_parquet(files["file"]):
        raise UserError(f"--column_names: {options.file} is parquet, which names its columns; leave the option out")
    if options.separator != "auto" and all(map(is_parquet, files.values())):
        raise UserError(f"--separator {options.separator}: {options.file} is parquet; leave the option out")

    def read():
        from preprocess.dataset import Faults, Source

        faults = Faults()
        log, unit = read_interactions(options, faults)
        texts = read_items(options) if options.items_file else None
        return Source(log, texts, unit, faults, {"format": "table", "records": faults.records})

    preprocess(options, name_of(options, options.file), files, read)


if __name__ == "__main__":
    run(main, Options)
