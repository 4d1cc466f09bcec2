"""Stage 3: `.inter` samples, item texts and SIDs to the published layout that every later stage reads.

    DATASET_NAME=ml-100k DATA_DIR=output/quickstart/raw OUTPUT_DIR=output/quickstart/raw bash convert_dataset.sh
    TO_INTER=True DATASET_NAME=shop CSV_DIR=published/shop OUTPUT_DIR=output/shop bash convert_dataset.sh

Reads `<D>.item.json`, `<D>.index.json`, `<D>.{train,valid,test}.inter` from `data_dir`; writes into `output_dir`

    train/<D>.csv, valid/<D>.csv, test/<D>.csv    user_id, history_item_title, item_title, history_item_id, item_id,
                                                  history_item_sid, item_sid; list columns are Python list literals
    info/<D>.txt                                  sid \\t title \\t item_id

With `--to_inter`, the other way round: the CSVs of `csv_dir` become `<D>.{train,valid,test}.inter`.

Rows are read, checked and written in parts, so memory does not grow with their number. The files get their names after
all of them are written, so they always belong together: a bad row leaves the old ones.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from minionerec.common import runs
from minionerec.common.console import say
from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, require_file
from minionerec.common.options import OUTPUT, RUNTIME, StageOptions, option, run

SPLITS = ("train", "valid", "test")
COLUMNS = ("user_id:token", "item_id_list:token_seq", "item_id:token")
PART = 4_000_000  # items of histories that are converted at once


@dataclass
class Options(StageOptions):
    dataset_name: str = option("", "<D> of the file names")
    data_dir: str = option(  # the record holds digests of the five files
        "", "folder with <D>.item.json, <D>.index.json and <D>.{train,valid,test}.inter", role=RUNTIME
    )
    output_dir: str = option("", "folder that gets train/ valid/ test/ info/", role=OUTPUT)
    csv_dir: str = option(  # the record holds digests of its files
        "", "folder in the published layout whose train/ valid/ test/*.csv replace the .inter files: gives them new SIDs",
        role=RUNTIME,
    )  # fmt: skip
    to_inter: bool = option(False, "write the CSVs of csv_dir back as .inter files", role=RUNTIME)
    max_history: int = option(
        10, "items of history that a train row keeps, the latest ones; valid and test rows keep all"
    )

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "max_history")
        self.plain_names("dataset_name")
        whole = not self.to_inter or self.max_history == Options.max_history
        self.check(max_history=(whole, "nothing with --to_inter True, which keeps whole histories"))


def read_inter(path: str | Path, n_items: int) -> Iterator:
    """Tables, one after the other, with the columns user, history (list of int, oldest first), target.

    A history may be empty. Raises `UserError` naming the row of a bad cell.
    """
    from minionerec.common.tables import read_csv_parts

    for table in read_csv_parts(path, "data_dir", separator="\t"):
        if table.columns[1:] != [*COLUMNS]:
            raise UserError(
                f"{path}: found columns {table.columns[1:]}, expected {[*COLUMNS]}; run stage 0 (preprocess) again"
            )
        yield _parsed(table, path, n_items)


def _parsed(table, path: str | Path, n_items: int):
    """A table of `read_inter`, with integers of 32 bits."""
    import polars as pl

    from minionerec.common.tables import refuse_rows

    user, history, target = (table[column] for column in COLUMNS)
    words = history.fill_null("").str.split(" ")
    numbers = words.list.eval(pl.element().filter(pl.element() != "")).cast(pl.List(pl.Int64), strict=False)
    known = pl.element().is_between(0, n_items - 1).fill_null(False)
    expected = f"ids of the item file, 0..{n_items - 1}"
    refuse_rows(table, ~numbers.list.eval(known).list.all(), COLUMNS[1], path, f"{expected}, with blanks between them")
    item = target.cast(pl.Int64, strict=False)
    refuse_rows(table, ~item.is_between(0, n_items - 1).fill_null(False), COLUMNS[2], path, f"one of the {expected}")
    return pl.DataFrame({"user": user, "history": numbers.cast(pl.List(pl.Int32)), "target": item})


def read_rows(path: Path, sids: list[str]) -> Iterator:
    """Tables user, history, target of an .inter file or of a CSV, whose SIDs do not matter."""
    import polars as pl

    from minionerec.catalog.sequences import read_sequences

    if path.suffix == ".inter":
        yield from read_inter(path, len(sids))
    else:
        rows = read_sequences(path, sids, "csv_dir", check_sids=False)
        yield rows.select("user", pl.col("seen").alias("history"), "target")


def parts_of(rows) -> Iterator:
    """Slices of `rows` whose histories have about `PART` items."""
    import numpy as np

    part = (rows["history"].list.len().to_numpy().astype(np.int64) + 1).cumsum() // PART
    bounds = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(rows)]
    for first, end in zip(bounds, bounds[1:], strict=False):
        yield rows[first:end]


def to_csv_rows(rows, items):
    """The published columns. `items` has title, sid and their Python literals title_literal, sid_literal, id_literal."""
    import numpy as np
    import polars as pl
    import pyarrow as pa

    length = rows["history"].list.len().to_numpy()
    flat = rows["history"].explode(empty_as_null=False)
    offsets = pl.Series(np.concatenate([[0], length.cumsum(dtype=np.int64)])).to_arrow()

    def lists(column: str) -> pl.Series:
        texts = items[column].gather(flat).to_arrow().cast(pa.large_string())
        return "[" + pl.Series(pa.LargeListArray.from_arrays(offsets, texts)).list.join(", ") + "]"

    target = rows["target"]
    return pl.DataFrame(
        {
            "user_id": rows["user"],
            "history_item_title": lists("title_literal"),
            "item_title": items["title"].gather(target),
            "history_item_id": lists("id_literal"),
            "item_id": target,
            "history_item_sid": lists("sid_literal"),
            "item_sid": items["sid"].gather(target),
        }
    )


def read_items(sources: dict[str, Path]) -> tuple:
    """(the items, the lines of the info file)."""
    import polars as pl

    from minionerec.catalog.items import read_titles
    from minionerec.catalog.sids import read_index

    titles, sids = read_titles(sources["item"], "data_dir"), read_index(sources["index"], "data_dir")
    if len(titles) != len(sids):
        raise UserError(
            f"{sources['index']}: found {len(sids)} items, expected the {len(titles)} of {sources['item'].name}; "
            "build the index from this item file's embedding"
        )
    items = pl.DataFrame(
        {
            "title": titles,
            "sid": sids,
            "title_literal": [repr(title) for title in titles],
            "sid_literal": [repr(sid) for sid in sids],
            "id_literal": [str(item) for item in range(len(sids))],
        }
    )
    lines = [f"{sid}\t{title}\t{item}\n" for item, (sid, title) in enumerate(zip(sids, titles, strict=True))]
    say(f"{len(sids)} items, {len(set(sids))} SIDs")
    return items, lines


def convert_split(source: Path, items, max_history: int | None, f) -> int:
    """Write the rows of one split as CSV, with the last `max_history` items of each history; returns their number."""
    import polars as pl

    count, sids = 0, items["sid"].to_list()
    for rows in read_rows(source, sids):
        if max_history:
            rows = rows.with_columns(pl.col("history").list.tail(max_history))
        for part in parts_of(rows):
            to_csv_rows(part, items).write_csv(f, include_header=not f.tell())
        count += len(rows)
    return count


def split_file(options: Options, split: str) -> Path:
    """Where the samples of a split come from."""
    if not options.csv_dir:
        return Path(options.data_dir, f"{options.dataset_name}.{split}.inter")
    found = sorted(Path(options.csv_dir, split).glob("*.csv"))
    if len(found) != 1:
        raise UserError(f"{options.csv_dir}/{split}: found {len(found)} files *.csv, expected one; check --csv_dir")
    return found[0]


def write_inter(f, rows) -> None:
    """Write rows (user, history, target) as an `.inter` file."""
    import polars as pl

    f.write(("\t".join(COLUMNS) + "\n").encode())
    for part in parts_of(rows):
        history = pl.col("history").list.eval(pl.element().cast(pl.String)).list.join(" ")
        part.select("user", history, "target").write_csv(f, separator="\t", include_header=False, quote_style="never")


def back(options: Options) -> None:
    """The CSVs of a folder in the published layout as .inter files."""
    options.require("dataset_name", "csv_dir", "output_dir")
    infos = sorted(Path(options.csv_dir, "info").glob("*.txt"))
    if len(infos) != 1:
        raise UserError(f"{options.csv_dir}/info: found {len(infos)} files *.txt, expected one; check --csv_dir")
    sources = {split: split_file(options, split) for split in SPLITS} | {"info": infos[0]}
    files = {split: Path(options.output_dir, f"{options.dataset_name}.{split}.inter") for split in SPLITS}
    record = Path(options.output_dir, f"{options.dataset_name}.inter.run.json")
    record = runs.begin(options, "convert back", files=list(files.values()), record=record, inputs=sources)
    if record.complete:
        return
    import polars as pl

    from minionerec.catalog.items import read_info

    sids = read_info(sources["info"], "csv_dir").sids
    tables = {split: pl.concat(read_rows(sources[split], sids)) for split in SPLITS}
    for split, rows in tables.items():
        for user in rows["user"].filter(rows["user"].str.contains("[\t\r\n]")).head(1):
            raise UserError(f"{sources[split]}: user {user[:60]!r} has a tab or a line end; rename it")
    with ExitStack() as stack:
        for split, rows in tables.items():
            f = stack.enter_context(atomic_file(files[split], "wb"))
            write_inter(f, rows.with_columns(pl.col("history").cast(pl.List(pl.Int32))))
            f.flush()
    record.finish()
    say("\n".join(f"{split}: {len(rows)} rows" for split, rows in tables.items()))


def main(options: Options) -> None:
    if options.to_inter:
        back(options)
        return
    options.require("dataset_name", "data_dir", "output_dir")
    data, output, name = Path(options.data_dir), Path(options.output_dir), options.dataset_name
    sources = {kind: data / f"{name}.{kind}.json" for kind in ("item", "index")}
    sources |= {split: split_file(options, split) for split in SPLITS}
    for path in sources.values():
        require_file(path, "data_dir")
    files = {split: output / split / f"{name}.csv" for split in SPLITS}
    info = output / "info" / f"{name}.txt"
    record = runs.begin(
        options, "convert", files=[*files.values(), info], record=output / f"{name}.convert.run.json", inputs=sources
    )
    if record.complete:
        return
    items, lines = read_items(sources)
    counts = {}
    with ExitStack() as stack:  # the files get their names after all of them are written
        for split in SPLITS:
            f = stack.enter_context(atomic_file(files[split], "wb"))
            counts[split] = convert_split(sources[split], items, options.max_history if split == "train" else None, f)
            f.flush()
        f = stack.enter_context(atomic_file(info))
        f.writelines(lines)
        f.flush()
    say(", ".join(f"{split} {rows} rows" for split, rows in counts.items()))
    record.finish()


if __name__ == "__main__":
    run(main, Options)
