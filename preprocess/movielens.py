"""Stage 0, MovieLens: ratings and film titles of any release to the files of stage 0.

    python -m preprocess.movielens --output_dir output/quickstart/raw
    python -m preprocess.movielens --input_dir ml-32m --output_dir output/ml-32m/raw

Every rating counts as an interaction (--min_rating leaves low ones out). What is read depends on the files in the folder:

    u.data, u.item, u.genre       100K: tabs, `|`, latin-1
    ratings.dat, movies.dat       1M (latin-1) and 10M: `::`
    ratings.csv, movies.csv       20M, 25M, 32M, latest
    ml-100k.inter, ml-100k.item   RecBole's atomic files

Without a folder, it is the MovieLens-100K of the installed `recbole` wheel (only its files: the package is not
imported). Ratings of a user with the same time stamp, which is in seconds, stay in file order. Films that nobody rated
are left out, users with fewer than 3 ratings have no sample.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from minionerec.common.errors import UserError
from minionerec.common.files import require_file
from minionerec.common.options import RUNTIME, option, run
from preprocess.options import PreprocessOptions
from preprocess.stage import preprocess

LAYOUTS = {  # the files of each release: ratings, films
    "100K": ("u.data", "u.item"),
    "1M or 10M": ("ratings.dat", "movies.dat"),
    "20M, 25M or 32M": ("ratings.csv", "movies.csv"),
}
WHEEL = "ml-100k"  # in the recbole wheel


@dataclass
class Options(PreprocessOptions):
    input_dir: str = option(  # the record holds digests of its files
        "", "folder of a MovieLens release; default: MovieLens-100K of the recbole wheel", role=RUNTIME
    )


def source_files(input_dir: str) -> tuple[str, dict[str, Path]]:
    """(layout, files to read); raises `UserError` where they are missing."""
    folder = Path(input_dir)
    if not input_dir:
        package = importlib.util.find_spec("recbole")
        if package is None:
            raise UserError("recbole is not installed; `pip install --no-deps recbole==1.2.1`, or give --input_dir")
        folder = Path(package.submodule_search_locations[0]) / "dataset_example" / WHEEL
    for layout, (ratings, films) in LAYOUTS.items():
        if (folder / ratings).exists():
            files = {"inter": folder / ratings, "item": require_file(folder / films, "input_dir")}
            if layout == "100K":
                files["genres"] = require_file(folder / "u.genre", "input_dir")
            return layout, files
    return "RecBole", {kind: require_file(folder / f"{WHEEL}.{kind}", "input_dir") for kind in ("inter", "item")}


def read(options: Options, layout: str, files: dict[str, Path]):
    """The `Source` of a release."""
    from preprocess.dataset import Faults, Source

    if layout == "RecBole":
        from preprocess import recbole

        names = vars(options)
        source = recbole.read(recbole.Options(**names), files)
        return source._replace(unit="s", read={"format": "MovieLens in RecBole's files"})
    faults = Faults()
    log, texts = read_ratings(layout, files["inter"], faults), read_films(layout, files)
    return Source(log, texts, "s", faults, {"format": f"MovieLens {layout}", "records": faults.records})


def read_ratings(layout: str, path: Path, faults):
    """Columns user, item, time, rating, in file order."""
    from preprocess.files import Columns, read_log

    columns = Columns("user", "item", "time", "rating")
    form = {"header": [*columns[:2], "rating", "time"], "separator": "\t", "quote_char": None}
    if layout == "1M or 10M":  # `::` is two separators
        form |= {"header": ["user", "_1", "item", "_2", "rating", "_3", "time"], "separator": ":"}
    elif layout == "20M, 25M or 32M":
        columns, form = Columns("userId", "movieId", "timestamp", "rating"), {}
    return read_log(path, "input_dir", columns, faults, unit="s", **form)[0]


def read_films(layout: str, files: dict[str, Path]):
    """Columns item, title, description, brand, categories."""
    import polars as pl

    from minionerec.common.tables import read_csv, refuse_rows
    from preprocess.dataset import TEXTS
    from preprocess.recbole import cleaned

    path = files["item"]
    if layout == "20M, 25M or 32M":
        films = read_csv(path, "input_dir")
        for column in ("movieId", "title", "genres"):
            if column not in films.columns:
                raise UserError(f"{path}: no column {column!r}, found {films.columns[1:]}; check --input_dir")
            refuse_rows(films, pl.col(column).is_null(), column, path, "a text")
        rows = films.select("movieId", "title", "genres").rows()
    else:
        rows = list(_text_rows(layout, files))
    films = pl.DataFrame(rows, schema=dict.fromkeys(("item", "title", "categories"), pl.String), orient="row")
    twice = films.filter(~pl.col("item").is_first_distinct())["item"]
    if len(twice):
        raise UserError(f"{path}: film {twice[0]} is there twice, expected each film once")
    genres = pl.col("categories").replace("(no genres listed)", "").str.replace_all("|", ", ", literal=True)
    films = films.with_columns(genres, description=pl.lit(""), brand=pl.lit(""))
    return cleaned(films.select("item", *TEXTS))


def _text_rows(layout: str, files: dict[str, Path]):
    """(film, title, genres joined by |) of `u.item` and of `movies.dat`."""
    from preprocess.files import lines

    path, encoding = files["item"], "latin-1"
    if layout == "100K":
        names = [line.split("|")[0] for _, line in lines(files["genres"], "input_dir")]
        for number, line in lines(path, "input_dir", encoding):
            cells = line.split("|")
            if len(cells) != 5 + len(names):
                raise UserError(f"{path}, line {number}: found {len(cells)} cells, expected {5 + len(names)}")
            yield cells[0], cells[1], "|".join(name for name, flag in zip(names, cells[5:], strict=True) if flag == "1")
        return
    try:
        path.read_text(encoding="utf-8")
        encoding = "utf-8"
    except UnicodeDecodeError:
        pass
    for number, line in lines(path, "input_dir", encoding):
        film, separator, rest = line.partition("::")
        title, found, genres = rest.rpartition("::")
        if not (separator and found):
            raise UserError(f"{path}, line {number}: found {line[:60]!r}, expected film::title::genres")
        yield film, title, genres


def main(options: Options) -> None:
    options.require("output_dir")
    layout, files = source_files(options.input_dir)
    name = options.dataset_name
    if not name:
        name = WHEEL if layout == "RecBole" else Path(options.input_dir).resolve().name or WHEEL
    preprocess(options, name, files, lambda: read(options, layout, files))


if __name__ == "__main__":
    run(main, Options)
