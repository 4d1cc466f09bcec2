"""Users' histories from the CSVs of stage 3, and their preference texts.

A row is identified by item ids. The SID columns are only compared with the catalog: a CSV that was made from another
index is refused.
"""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from minionerec.catalog.items import BRACKETED
from minionerec.catalog.sids import Renaming
from minionerec.common.errors import UserError
from minionerec.common.files import read_json
from minionerec.common.tables import read_csv, refuse_rows

COLUMNS = ("user_id", "history_item_id", "item_id", "history_item_sid", "item_sid")
_ID = r"""(?:[0-9]+|'[0-9]+'|"[0-9]+")"""
_IDS = rf"\s*(?:{_ID}(?:\s*,\s*{_ID})*\s*,?\s*)?"
_LIST = rf"^\s*(?:\[{_IDS}\]|\({_IDS}\))\s*$"  # a Python list (or tuple) of item ids, quoted or not
_SID = r"(?:<[a-z]+_[0-9]+>)+"


def read_sequences(
    path: str | Path, sids: Sequence[str], flag: str, max_history: int = 10, check_sids: bool = True
) -> pl.DataFrame:
    """The samples of a CSV as columns user (str), history, target (item id) and seen.

    `seen` is the row's whole list of item ids, oldest first; `history` is its last `max_history` items. `sids[i]` is item
    i's SID in the catalog. Raises `UserError` naming row and column for a missing column, a cell that
    is no list literal, an unknown item id, and, if `check_sids`, a SID that is not the catalog's.
    """
    table = read_csv(path, flag)
    for column in COLUMNS:
        if column not in table.columns:
            raise UserError(f"{path}: no column {column!r}, found {table.columns[1:]}; run convert_dataset.sh again")
    if not len(table):
        raise UserError(
            f"{path}: found no rows, expected at least one; the data may have too few interactions per user"
        )

    def refuse(bad: pl.Series, column: str, expected: str) -> None:
        refuse_rows(table, bad, column, path, expected)

    listed = table["history_item_id"].str.contains(_LIST).fill_null(False)
    refuse(~listed, "history_item_id", "a list literal of item ids like [3437, 642]; run convert_dataset.sh again")
    history = table["history_item_id"].str.extract_all("[0-9]+").cast(pl.List(pl.Int64), strict=False)
    target = table["item_id"].cast(pl.Int64, strict=False)

    known = pl.element().is_between(0, len(sids) - 1).fill_null(False)
    ids = f"ids of the catalog, 0..{len(sids) - 1}; check the index or info file"
    refuse(~target.is_between(0, len(sids) - 1).fill_null(False), "item_id", ids)
    refuse(~history.list.eval(known).list.all(), "history_item_id", ids)

    if check_sids:
        written = _with_our_tokens(table)
        same = "the catalog's SIDs of these items; make the CSV again from this index (convert_dataset.sh)"
        sid_of = pl.Series(sids)
        refuse(written["item_sid"].ne_missing(sid_of.gather(target)), "item_sid", same)
        found = written["history_item_sid"].str.extract_all(_SID).list.join(" ").fill_null("")
        refuse(found != _joined_sids(history, sid_of), "history_item_sid", same)
    return pl.DataFrame(
        {
            "user": table["user_id"].fill_null(""),
            "history": history.list.tail(max_history),
            "target": target,
            "seen": history,
        }
    )


def _joined_sids(history: pl.Series, sid_of: pl.Series) -> pl.Series:
    """The SIDs of each history, joined by spaces."""
    rows = pl.DataFrame({"history": history}).with_row_index()
    items = rows.explode("history").drop_nulls()
    joined = items.with_columns(sid=sid_of.gather(items["history"])).group_by("index").agg(pl.col("sid").str.join(" "))
    return rows.join(joined, on="index", how="left", maintain_order="left")["sid"].fill_null("")


def _with_our_tokens(table: pl.DataFrame) -> pl.DataFrame:
    """The SID columns; where another form of level tokens can be learnt from `item_sid`, as `<a_12>`."""
    columns = table.select("item_sid", "history_item_sid")
    distinct = columns["item_sid"].drop_nulls().unique(maintain_order=True)
    if distinct.str.contains(f"^{_SID}$").all():
        return columns
    renaming = Renaming()
    try:
        for sid in distinct:
            renaming.sid(BRACKETED.findall(sid))
    except ValueError:
        return columns  # the comparison with the catalog names the row
    return columns.select(renaming.column(columns[name]) for name in columns.columns)


def read_preferences(path: str | Path, flag: str = "user_preference_file") -> pl.DataFrame:
    """Columns user, preference from a JSON object `{"user id": "what they like", …}`; a user may be missing."""
    content = read_json(path, flag)
    for user, text in content.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: user {user!r} has {str(text)[:60]!r}, expected a text; check --{flag}")
    return pl.DataFrame(
        {"user": list(content), "preference": [" ".join(text.split()) for text in content.values()]},
        schema={"user": pl.String, "preference": pl.String},
    )
