"""Stage 3: `.inter` samples, item texts and SIDs to the published layout that every later stage reads.

    python convert_dataset.py --dataset_name ml-100k --data_dir output/quickstart/data --output_dir output/quickstart/data

Reads `<D>.item.json`, `<D>.index.json`, `<D>.{train,valid,test}.inter` from `data_dir`; writes into `output_dir`
`train/<D>.csv`, `valid/<D>.csv`, `test/<D>.csv` (`user_id, history_item_title, item_title, history_item_id, item_id,
history_item_sid, item_sid`; list columns are Python list literals) and `info/<D>.txt` (`sid \\t title \\t item_id`).
"""

from dataclasses import dataclass
from pathlib import Path

import polars as pl
from transformers.hf_argparser import HfArg

from minionerec.catalog.items import read_titles
from minionerec.catalog.sids import read_index
from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, require_file
from minionerec.common.options import run
from preprocess.splits import SPLITS


@dataclass
class Options:
    dataset_name: str = HfArg(help="<D> of the file names")
    data_dir: str = HfArg(help="folder with <D>.item.json, <D>.index.json and <D>.{train,valid,test}.inter")
    output_dir: str = HfArg(help="folder that gets train/ valid/ test/ info/")
    max_history: int = HfArg(default=10, help="items of history a row keeps: the latest ones")


def read_inter(path: Path, n_items: int, max_history: int) -> pl.DataFrame:
    """user, history (list of int, oldest first), target; raises `UserError` naming the row of a bad cell."""
    table = pl.read_csv(path, separator="\t", infer_schema=False, quote_char=None)
    expected = ["user_id:token", "item_id_list:token_seq", "item_id:token"]
    if table.columns != expected:
        raise UserError(f"{path}: found columns {table.columns}, expected {expected}; run stage 0 (preprocess) again")
    table = table.select(
        user=expected[0],
        history=pl.col(expected[1]).str.split(" ").list.eval(pl.element().cast(pl.Int64, strict=False)),
        target=pl.col(expected[2]).cast(pl.Int64, strict=False),
    ).with_row_index("row", offset=2)
    known = pl.element().is_between(0, n_items - 1).fill_null(False)
    bad = table.filter(
        ~(pl.col("history").list.eval(known).list.all() & pl.col("target").is_between(0, n_items - 1).fill_null(False))
    )
    if len(bad):
        raise UserError(
            f"{path}, line {bad['row'][0]}: an item id outside 0..{n_items - 1}; expected ids of the item file"
        )
    return table.select("user", pl.col("history").list.tail(max_history), "target")


def to_csv_rows(rows: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """The published columns. `items` has item, title, sid and their Python literals title_literal, sid_literal."""

    def list_literal(column: str) -> pl.Expr:
        return "[" + pl.col(column).str.join(", ") + "]"

    histories = (
        rows.with_row_index("row")
        .select("row", "history")
        .explode("history")
        .join(items, left_on="history", right_on="item", how="left", maintain_order="left")
        .with_columns(item_literal=pl.col("history").cast(pl.String))
        .group_by("row", maintain_order=True)
        .agg(
            history_item_title=list_literal("title_literal").first(),
            history_item_id=list_literal("item_literal").first(),
            history_item_sid=list_literal("sid_literal").first(),
        )
    )
    targets = rows.join(items, left_on="target", right_on="item", how="left", maintain_order="left")
    return pl.concat([targets, histories], how="horizontal").select(
        user_id="user",
        history_item_title="history_item_title",
        item_title="title",
        history_item_id="history_item_id",
        item_id="target",
        history_item_sid="history_item_sid",
        item_sid="sid",
    )


def main(options: Options) -> None:
    data, output, name = Path(options.data_dir), Path(options.output_dir), options.dataset_name
    titles = read_titles(data / f"{name}.item.json", "data_dir")
    sids = read_index(data / f"{name}.index.json", "data_dir")
    if len(titles) != len(sids):
        raise UserError(
            f"{data / name}.index.json: found {len(sids)} items, expected the {len(titles)} of {name}.item.json; "
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
    for split in SPLITS:
        path = require_file(data / f"{name}.{split}.inter", "data_dir")
        rows = to_csv_rows(read_inter(path, len(sids), options.max_history), items)
        with atomic_file(output / split / f"{name}.csv", "wb") as f:
            rows.write_csv(f)
        print(f"{split}: {len(rows)} rows")
    with atomic_file(output / "info" / f"{name}.txt") as f:
        f.writelines(f"{sid}\t{title}\t{item}\n" for item, (sid, title) in enumerate(zip(sids, titles, strict=True)))
    print(f"info: {len(sids)} items, {len(set(sids))} SIDs")


if __name__ == "__main__":
    run(main, Options)
