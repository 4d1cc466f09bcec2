"""Stage 0, RecBole's atomic files: `<D>.inter` and, if it is there, `<D>.item`, tab-separated with `name:type` headers.

    python -m preprocess.recbole --input_dir dataset/ml-1m --output_dir output/ml-1m/raw

The folder holds one `.inter` file and at most one `.item` file, or --dataset_name says which. It may be the output folder
too: `<D>.{train,valid,test}.inter` next to others are results. Columns are found by RecBole's usual names, or named by
options.
"""

from dataclasses import dataclass
from pathlib import Path

from minionerec.common.errors import UserError
from minionerec.common.files import require_file
from minionerec.common.options import RUNTIME, option, run
from preprocess.options import PreprocessOptions, name_of, refuse_unused
from preprocess.stage import SPLITS, preprocess

WRITTEN = tuple(f".{split}.inter" for split in SPLITS)
USUAL = {  # the names of RecBole's own data sets, in order of preference
    "title": ("title", "movie_title", "item_title", "name", "item_name", "product_name", "book_title", "track_name"),
    "description": ("description", "item_description", "summary", "abstract", "text"),
    "brand": ("brand", "store", "artist", "author", "publisher"),
    "categories": ("categories", "category", "class", "genre", "genres", "tags"),
}


@dataclass
class Options(PreprocessOptions):
    input_dir: str = option("", "folder with <D>.inter and <D>.item", role=RUNTIME)  # the record holds their digests
    user_column: str = option("user_id", "column of the user in the .inter file")
    item_column: str = option("item_id", "column of the item in both files")
    time_column: str = option("timestamp", "column of the time; none: the file has no times")
    rating_column: str = option("rating", "column of the rating, used by --min_rating")
    title_column: str = option("", "column of the title in the .item file; default: a usual name")
    description_column: str = option("", "column of the description")
    brand_column: str = option("", "column of the brand")
    categories_column: str = option("", "column of the categories")


def source_files(options: Options) -> dict[str, Path]:
    """The .inter file, and the .item file if there is one. Raises `UserError` where it is not clear which."""
    folder = require_file(options.input_dir, "input_dir")
    files = {}
    for kind in ("inter", "item"):
        found = sorted(folder.glob(f"*.{kind}"))
        named = [path for path in found if path.name == f"{options.dataset_name}.{kind}"]
        found = named or [path for path in found if not path.name.endswith(WRITTEN)] or found
        if len(found) > 1 or (kind == "inter" and not found):
            raise UserError(
                f"{folder}: found {len(found)} files *.{kind}, expected one; check --input_dir or give --dataset_name"
            )
        if found:
            files[kind] = found[0]
    return files


def read_items(path: Path, options: Options):
    """Columns item and texts of an .item file. Raises `UserError` for an item that is there twice."""
    import polars as pl

    from minionerec.common.tables import read_csv, refuse_rows
    from preprocess.files import short_names

    table = read_csv(path, "input_dir", separator="\t", quote_char=None)
    table = table.rename(short_names(table.columns, path))
    item = options.item_column
    if item not in table.columns:
        raise UserError(f"{path}: no column {item!r}, found {table.columns[1:]}; check --item_column")
    refuse_rows(table, pl.col(item).is_null(), item, path, "an id")
    refuse_rows(table, ~pl.col(item).is_first_distinct(), item, path, "each item once")
    columns = {name: column_of(name, options, table.columns, path) for name in USUAL}
    if not columns["title"]:
        raise UserError(f"{path}: no column of titles, found {table.columns[1:]}; give --title_column")
    texts = {name: pl.col(column) if column else pl.lit("") for name, column in columns.items()}
    year = pl.concat_str(pl.lit(" ("), pl.col("release_year"), pl.lit(")")).fill_null("")
    if columns["title"] == "movie_title" and "release_year" in table.columns:
        texts["title"] = pl.col("movie_title") + year
    if columns["categories"]:
        texts["categories"] = texts["categories"].str.split(" ").list.join(", ")
    return cleaned(table.select(item=pl.col(item), **texts))


def column_of(name: str, options, found: list[str], path: Path) -> str:
    """The column of a text: the one that an option names, else the first usual name that is there, else none."""
    given = getattr(options, f"{name}_column")
    if given and given not in found:
        raise UserError(f"{path}: no column {given!r}, found {found}; check --{name}_column")
    return given or next((usual for usual in USUAL[name] if usual in found), "")


def cleaned(texts):
    """The table with every text cleaned; nothing is an empty text."""
    import polars as pl

    from preprocess.dataset import TEXTS, clean

    columns = {name: [clean(text) if text else "" for text in texts[name].cast(pl.String)] for name in TEXTS}
    return texts.with_columns(pl.Series(name, values, dtype=pl.String) for name, values in columns.items())


def read(options: Options, files: dict[str, Path]):
    """The `Source` of the files."""
    from preprocess.dataset import Faults, Source
    from preprocess.files import Columns, read_log, scan_delimited

    faults = Faults()
    found = scan_delimited(files["inter"], "input_dir", "\t", None).collect_schema().names()
    rating = options.rating_column if options.rating_column in found and options.min_rating else ""
    time = "" if options.time_column == "none" else options.time_column
    columns = Columns(options.user_column, options.item_column, time, rating)
    log, unit = read_log(files["inter"], "input_dir", columns, faults, separator="\t", quote_char=None)
    texts = read_items(files["item"], options) if "item" in files else None
    return Source(log, texts, unit, faults, {"format": "RecBole", "records": faults.records})


def main(options: Options) -> None:
    options.require("output_dir", "input_dir")
    files = source_files(options)
    if "item" not in files:
        refuse_unused(options, "a folder with <D>.item")
    preprocess(options, name_of(options, files["inter"]), files, lambda: read(options, files))


if __name__ == "__main__":
    run(main, Options)
