"""Stage 0, MovieLens-100K: ratings and film titles to `ml-100k.item.json` and `ml-100k.{train,valid,test}.inter`.

    python -m preprocess.movielens --output_dir output/quickstart/raw

Reads `ml-100k.inter` and `ml-100k.item` in RecBole's atomic-file form, by default from the installed `recbole` wheel
(only its files: the package is not imported). Every rating counts as an interaction. Ratings of a user with the same
time stamp, which is in seconds, stay in file order. Items that nobody rated are left out; the others are numbered 0, 1,
2, … in the order of their original ids. Users with fewer than 3 ratings are left out.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from minionerec.common import runs
from minionerec.common.console import say
from minionerec.common.errors import UserError
from minionerec.common.files import require_file, write_json
from minionerec.common.options import OUTPUT, RUNTIME, StageOptions, option, run

NAME = "ml-100k"
COLUMNS = {  # of each source
    "inter": ["user_id", "item_id", "timestamp"],
    "item": ["item_id", "movie_title", "release_year", "class"],
}


@dataclass
class Options(StageOptions):
    output_dir: str = option("", "folder for the .item.json and .inter files", role=OUTPUT)
    input_dir: str = option(  # the record holds digests of the two files
        "", "folder with ml-100k.inter and ml-100k.item; default: the recbole wheel", role=RUNTIME
    )
    max_history: int = option(10, "items of history that a train sample keeps, the latest ones")

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "max_history")


def source_files(input_dir: str) -> dict[str, Path]:
    """The two files that are read; raises `UserError` if one is missing."""
    folder = Path(input_dir)
    if not input_dir:
        package = importlib.util.find_spec("recbole")
        if package is None:
            raise UserError("recbole is not installed; `pip install --no-deps recbole==1.2.1`, or give --input_dir")
        folder = Path(package.submodule_search_locations[0]) / "dataset_example" / NAME
    return {kind: require_file(folder / f"{NAME}.{kind}", "input_dir") for kind in COLUMNS}


def read_atomic(path: Path, columns: list[str]):
    """A RecBole atomic file as strings, its `name:type` headers cut to names; refuses a file without `columns`."""
    from minionerec.common.tables import read_csv

    table = read_csv(path, "input_dir", separator="\t", quote_char=None)
    table = table.rename({column: column.split(":")[0] for column in table.columns})
    for column in columns:
        if column not in table.columns:
            raise UserError(f"{path}: no column {column!r}, found {table.columns[1:]}; expected RecBole's {NAME} files")
    return table


def read_ratings(path: Path):
    """Columns user, original (the item's id in the source) and time, in file order."""
    import polars as pl

    from minionerec.common.tables import refuse_rows

    table = read_atomic(path, COLUMNS["inter"])
    time = table["timestamp"].cast(pl.Float64, strict=False)
    for column in ("user_id", "item_id"):
        refuse_rows(table, pl.col(column).is_null(), column, path, "an id")
    refuse_rows(table, ~time.is_finite().fill_null(False), "timestamp", path, "a time stamp in seconds")
    return table.select(user="user_id", original="item_id", time=time)


def read_films(path: Path):
    """The item file, one row an item, with its number as `order`."""
    import polars as pl

    from minionerec.common.tables import refuse_rows

    table = read_atomic(path, COLUMNS["item"])
    order = table["item_id"].cast(pl.Int64, strict=False)
    refuse_rows(table, order.is_null(), "item_id", path, "an integer")
    refuse_rows(table, ~pl.col("item_id").is_first_distinct(), "item_id", path, "each item once")
    refuse_rows(table, pl.col("movie_title").is_null(), "movie_title", path, "a title")
    return table.with_columns(order=order)


def item_text(film: dict) -> dict[str, str]:
    """An entry of `.item.json`."""
    year = f" ({film['release_year']})" if film["release_year"] else ""
    return {
        "title": film["movie_title"] + year,
        "description": "",
        "brand": "",
        "categories": ", ".join((film["class"] or "").split()),
    }


def main(options: Options) -> None:
    options.require("output_dir")
    sources, output = source_files(options.input_dir), Path(options.output_dir)
    files = {split: output / f"{NAME}.{split}.inter" for split in ("train", "valid", "test")}
    items_file = output / f"{NAME}.item.json"
    record = runs.begin(
        options,
        "preprocess",
        files=[*files.values(), items_file],
        record=output / f"{NAME}.preprocess.run.json",
        inputs=sources,
    )
    if record.complete:
        return

    import polars as pl

    from preprocess.splits import leave_one_out, write_inter

    ratings, films = read_ratings(sources["inter"]), read_films(sources["item"])
    films = films.join(ratings.select(item_id="original").unique(), on="item_id", how="semi").sort("order")
    films = films.with_columns(item=pl.int_range(pl.len()))
    numbers = films.select("item", original="item_id")
    interactions = ratings.join(numbers, on="original", how="inner", maintain_order="left")
    if len(interactions) < len(ratings):
        missing = ratings.join(numbers, on="original", how="anti", maintain_order="left")["original"]
        raise UserError(
            f"{sources['inter']}: {len(missing)} ratings of items that {sources['item'].name} lacks, the first of item "
            f"{missing[0]}; give files that belong together"
        )
    splits = leave_one_out(interactions, options.max_history)
    items = {str(film["item"]): item_text(film) for film in films.to_dicts()}

    for split, rows in splits.items():
        write_inter(files[split], rows)
        say(f"{split}: {len(rows)} samples")
    write_json(items_file, items)
    say(f"{len(items)} items, {interactions['user'].n_unique()} users, {len(interactions)} interactions")
    record.finish()


if __name__ == "__main__":
    run(main, Options)
