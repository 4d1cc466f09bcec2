"""Stage 3: `.inter` samples, item texts and SIDs to the published layout that every later stage reads.

    DATASET_NAME=ml-100k DATA_DIR=output/quickstart/raw OUTPUT_DIR=output/quickstart/raw bash convert_dataset.sh

Reads `<D>.item.json`, `<D>.index.json`, `<D>.{train,valid,test}.inter` from `data_dir`; writes into `output_dir`

    train/<D>.csv, valid/<D>.csv, test/<D>.csv    user_id, history_item_title, item_title, history_item_id, item_id,
                                                  history_item_sid, item_sid; list columns are Python list literals
    info/<D>.txt                                  sid \\t title \\t item_id

Everything is read and checked before anything is written, so the four files always belong together.
"""

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
    max_history: int = option(
        10, "items of history that a train row keeps, the latest ones; valid and test rows keep all"
    )

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "max_history")


def read_inter(path: str | Path, n_items: int):
    """Columns user, history (list of int, oldest first), target; raises `UserError` naming the row of a bad cell.

    A history may be empty.
    """
    import polars as pl

    from minionerec.common.tables import read_csv, refuse_rows

    table = read_csv(path, "data_dir", separator="\t", quote_char=None)
    if table.columns[1:] != [*COLUMNS]:
        raise UserError(
            f"{path}: found columns {table.columns[1:]}, expected {[*COLUMNS]}; run stage 0 (preprocess) again"
        )
    user, history, target = (table[column] for column in COLUMNS)
    lists = history.fill_null("").str.extract_all("[^ ]+").cast(pl.List(pl.Int64), strict=False)
    known = pl.element().is_between(0, n_items - 1).fill_null(False)
    expected = f"ids of the item file, 0..{n_items - 1}"
    refuse_rows(table, ~lists.list.eval(known).list.all(), COLUMNS[1], path, f"{expected}, with blanks between them")
    numbers = target.cast(pl.Int64, strict=False)
    refuse_rows(table, ~numbers.is_between(0, n_items - 1).fill_null(False), COLUMNS[2], path, f"one of the {expected}")
    return pl.DataFrame({"user": user, "history": lists, "target": numbers})


def read_rows(path: Path, sids: list[str]):
    """Columns user, history, target of an .inter file or of a CSV, whose SIDs do not matter."""
    import polars as pl

    from minionerec.catalog.sequences import read_sequences

    if path.suffix == ".inter":
        return read_inter(path, len(sids))
    rows = read_sequences(path, sids, "csv_dir", check_sids=False)
    return rows.select("user", pl.col("seen").alias("history"), "target")


def to_csv_rows(rows, items):
    """The published columns. `items` has item, title, sid and their Python literals title_literal, sid_literal."""
    import polars as pl

    def list_literal(column: str) -> pl.Expr:
        return "[" + pl.col(column).str.join(", ") + "]"

    rows = rows.with_row_index("row")
    histories = (
        rows.select("row", item="history")
        .explode("item")
        .drop_nulls()
        .join(items, on="item", how="left", maintain_order="left")
        .with_columns(item_literal=pl.col("item").cast(pl.String))
        .group_by("row", maintain_order=True)
        .agg(
            history_item_title=list_literal("title_literal").first(),
            history_item_id=list_literal("item_literal").first(),
            history_item_sid=list_literal("sid_literal").first(),
        )
    )
    return (
        rows.join(items, left_on="target", right_on="item", how="left", maintain_order="left")
        .join(histories, on="row", how="left", maintain_order="left")
        .with_columns(pl.col("^history_item_.*$").fill_null("[]"))
        .select(
            user_id="user",
            history_item_title="history_item_title",
            item_title="title",
            history_item_id="history_item_id",
            item_id="target",
            history_item_sid="history_item_sid",
            item_sid="sid",
        )
    )


def read_all(options: Options, sources: dict[str, Path]) -> tuple[dict, list[str]]:
    """The table of each split, and the lines of the info file."""
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
            "item": range(len(sids)),
            "title": titles,
            "sid": sids,
            "title_literal": [repr(title) for title in titles],
            "sid_literal": [repr(sid) for sid in sids],
        }
    )
    tables = {}
    for split in SPLITS:
        rows = read_rows(sources[split], sids)
        if split == "train":
            rows = rows.with_columns(pl.col("history").list.tail(options.max_history))
        tables[split] = to_csv_rows(rows, items)
    lines = [f"{sid}\t{title}\t{item}\n" for item, (sid, title) in enumerate(zip(sids, titles, strict=True))]
    say(f"{len(sids)} items, {len(set(sids))} SIDs")
    return tables, lines


def split_file(options: Options, split: str) -> Path:
    """Where the samples of a split come from."""
    if not options.csv_dir:
        return Path(options.data_dir, f"{options.dataset_name}.{split}.inter")
    found = sorted(Path(options.csv_dir, split).glob("*.csv"))
    if len(found) != 1:
        raise UserError(f"{options.csv_dir}/{split}: found {len(found)} files *.csv, expected one; check --csv_dir")
    return found[0]


def main(options: Options) -> None:
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
    tables, lines = read_all(options, sources)
    with ExitStack() as stack:  # the files get their names after all of them are written
        for split, table in tables.items():
            f = stack.enter_context(atomic_file(files[split], "wb"))
            table.write_csv(f)
            f.flush()
        f = stack.enter_context(atomic_file(info))
        f.writelines(lines)
        f.flush()
    say(", ".join(f"{split} {len(table)} rows" for split, table in tables.items()))
    record.finish()


if __name__ == "__main__":
    run(main, Options)
