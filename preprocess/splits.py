"""Interactions in time order to (history, target) samples, split into train, valid and test.

Leave-one-out: a user's last item tests, the one before validates, all earlier ones train (SASRec, arXiv 1808.09781).
Every position with something before it is one sample. A train sample's history is at most the `max_history` items before
it; valid and test samples keep all of them, so that an evaluation knows which items a user has.

Interactions with equal time stay in the order of their rows.
"""

from pathlib import Path

import polars as pl

from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file


def samples(interactions: pl.DataFrame, max_history: int) -> pl.DataFrame:
    """Every (history, target) sample of `interactions` (user, item, time), in time order, ties in row order.

    Returns user, history (list of items, oldest first), target, time, and `from_end`: 0 for a user's last item.
    """
    ordered = interactions.sort("time", maintain_order=True).with_columns(
        position=pl.int_range(pl.len(), dtype=pl.Int64).over("user"), length=pl.len().over("user")
    )
    before = ordered.rolling("position", period=f"{max_history}i", closed="left", group_by="user")
    histories = before.agg(history=pl.col("item"))
    return (
        ordered.filter(pl.col("position") > 0)
        .join(histories, on=["user", "position"], how="left", maintain_order="left")
        .select("user", "history", "time", target="item", from_end=pl.col("length") - 1 - pl.col("position"))
        .select("user", "history", "target", "time", "from_end")
    )


def leave_one_out(interactions: pl.DataFrame, max_history: int = 10) -> dict[str, pl.DataFrame]:
    """The samples of each split. Users with fewer than 3 interactions cannot be split and are left out."""
    enough = interactions.filter(pl.len().over("user") >= 3)
    if not len(enough):
        raise UserError(
            f"leave-one-out: none of {interactions['user'].n_unique()} users has 3 interactions, expected at least one"
        )
    rows = samples(enough, max_history)
    whole = enough.sort("time", maintain_order=True).group_by("user", maintain_order=True).agg(whole="item")
    held_out = rows.filter(pl.col("from_end") < 2).join(whole, on="user", how="left", maintain_order="left")
    before = pl.col("whole").list.head(pl.col("whole").list.len() - 1 - pl.col("from_end"))
    held_out = held_out.with_columns(history=before).drop("whole")
    return {
        "train": rows.filter(pl.col("from_end") >= 2),
        "valid": held_out.filter(pl.col("from_end") == 1),
        "test": held_out.filter(pl.col("from_end") == 0),
    }


def write_inter(path: str | Path, rows: pl.DataFrame) -> None:
    """Write samples as an `.inter` file: `user_id:token  item_id_list:token_seq  item_id:token`, tab-separated."""
    table = rows.select(
        pl.col("user").cast(pl.String).alias("user_id:token"),
        pl.col("history").list.eval(pl.element().cast(pl.String)).list.join(" ").alias("item_id_list:token_seq"),
        pl.col("target").cast(pl.String).alias("item_id:token"),
    )
    with atomic_file(path, "wb") as f:
        table.write_csv(f, separator="\t")
