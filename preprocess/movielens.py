"""Stage 0, MovieLens-100K: ratings and film titles to `ml-100k.item.json` and `ml-100k.{train,valid,test}.inter`.

    python -m preprocess.movielens --output_dir output/quickstart/data

Reads `ml-100k.inter` and `ml-100k.item` in RecBole's atomic-file form, by default from the installed `recbole` wheel
(only the files: the package is not imported). Every rating counts as an interaction. A user's ratings often carry the
same second; they stay in file order. Items that nobody rated are left out, the rest are numbered in order of their
original ids.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from transformers.hf_argparser import HfArg

from minionerec.common.errors import UserError
from minionerec.common.files import require_file, write_json
from minionerec.common.options import run
from preprocess.splits import leave_one_out, write_inter

NAME = "ml-100k"


@dataclass
class Options:
    output_dir: str = HfArg(help="folder for the .item.json and .inter files")
    input_dir: str = HfArg(default="", help="folder with ml-100k.inter and ml-100k.item; default: the recbole wheel")
    max_history: int = HfArg(default=10, help="items of history a sample keeps")


def bundled_folder() -> Path:
    """Where the installed `recbole` wheel keeps ml-100k; raises `UserError` if it is not installed."""
    package = importlib.util.find_spec("recbole")
    if package is None:
        raise UserError("recbole is not installed; `pip install --no-deps recbole==1.2.1`, or give --input_dir")
    return Path(package.submodule_search_locations[0]) / "dataset_example" / NAME


def read_atomic(path: Path, columns: list[str]) -> pl.DataFrame:
    """A RecBole atomic file as strings, its `name:type` headers cut to names; refuses a file without `columns`."""
    table = pl.read_csv(path, separator="\t", infer_schema=False, quote_char=None)
    table = table.rename({column: column.split(":")[0] for column in table.columns})
    for column in columns:
        if column not in table.columns:
            raise UserError(f"{path}: no column {column!r}, found {table.columns}; expected RecBole's ml-100k files")
    return table


def main(options: Options) -> None:
    folder = Path(options.input_dir) if options.input_dir else bundled_folder()
    ratings = read_atomic(
        require_file(folder / f"{NAME}.inter", "input_dir"), ["user_id", "item_id", "timestamp"]
    ).select(user="user_id", original="item_id", time=pl.col("timestamp").cast(pl.Float64))
    films = (
        read_atomic(require_file(folder / f"{NAME}.item", "input_dir"), ["item_id", "movie_title"])
        .rename({"item_id": "original"})
        .join(ratings.select("original").unique(), on="original", how="semi")
        .sort(pl.col("original").cast(pl.Int64))
        .with_columns(item=pl.int_range(pl.len()))
    )
    interactions = ratings.join(films.select("original", "item"), on="original", how="inner", maintain_order="left")
    if len(interactions) < len(ratings):
        raise UserError(f"{folder}: {len(ratings) - len(interactions)} ratings name items that {NAME}.item lacks")

    output = Path(options.output_dir)
    for split, rows in leave_one_out(interactions, options.max_history).items():
        write_inter(output / f"{NAME}.{split}.inter", rows)
        print(f"{split}: {len(rows)} samples")
    items = {
        str(film["item"]): {
            "title": f"{film['movie_title']} ({film['release_year']})" if film["release_year"] else film["movie_title"],
            "description": "",
            "brand": "",
            "categories": ", ".join((film["class"] or "").split()),
        }
        for film in films.to_dicts()
    }
    write_json(output / f"{NAME}.item.json", items)
    print(f"{len(items)} items, {interactions['user'].n_unique()} users, {len(interactions)} interactions")


if __name__ == "__main__":
    run(main, Options)
