"""From a source's interactions and item texts to the files of stage 0.

    read → drop unusable records → dates, ratings, repeats → titles → k-core → numbers → split → files

Users and items that stay are numbered 0, 1, 2, … in the order of their original ids: by value where all are integers,
else by text. The same interactions get the same numbers in whatever order the file has them. `<D>.user2id` and
`<D>.item2id` hold `original <tab> number`. Each step is printed and recorded in `<D>.stats.json`.
"""

import html
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from minionerec.common.console import say
from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, write_json
from minionerec.common.text import printable
from preprocess import splits
from preprocess.options import PreprocessOptions

UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # of a second
TEXTS = ("title", "description", "brand", "categories")
HIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Source(NamedTuple):
    """What a reader returns."""

    log: pl.DataFrame  # user, item (String or Categorical), time (a number), perhaps rating; rows in file order
    texts: pl.DataFrame | None  # item, title, description, brand, categories (String); None: no texts were given
    unit: str  # of time: s, ms, us, ns; "order" for numbers that only order; "" where the source has no times
    faults: "Faults"
    read: dict  # for the statistics: format, files, and what else the reader wants to say


class Faults:
    """Records that cannot be used: how many of each kind, and the first one."""

    def __init__(self):
        self.kinds: dict[str, tuple[int, str]] = {}
        self.records = 0  # usable ones too

    def add(self, kind: str, count: int, first: str) -> None:
        """first: where, what was found, what was expected; used for the first fault of its kind."""
        if count:
            known, where = self.kinds.get(kind, (0, first))
            self.kinds[kind] = known + count, where

    def check(self, max_bad: float) -> None:
        """Print the faults. Raises `UserError` with the first one where they are more than the share `max_bad`."""
        bad = sum(count for count, _ in self.kinds.values())
        for kind, (count, first) in self.kinds.items():
            if bad > max_bad * max(1, self.records):
                more = f"{bad:,} of {self.records:,} records cannot be used; repair them, or raise --max_bad"
                raise UserError(printable(f"{first} ({more})"))
            say(printable(f"left out: {count:,} records, {kind}; the first: {first}"))


# ------------------------------------------------------------------------------------------------ times


def time_of(date: str, unit: str, flag: str) -> int:
    """`"2016-10"` -> the first moment of that month, UTC, in `unit`. Raises `UserError` for anything but a date."""
    if unit not in UNITS:
        raise UserError(f"--{flag} {date}: the source has no dates ({unit or 'no time at all'}); leave the option out")
    for form in ("%Y", "%Y-%m", "%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"):
        try:
            return int(datetime.strptime(date, form).replace(tzinfo=UTC).timestamp()) * UNITS[unit]
        except ValueError:
            continue
    raise UserError(f"--{flag} {date}: expected a date like 2016, 2016-10, 2016-10-31 or 2016-10-31T12:00:00")


def unit_of(times: pl.Series) -> str:
    """The unit that the median of the times must have; "order" for numbers that are no time stamps."""
    some = times.gather_every(len(times) // 10**6 + 1)
    usual = some.filter(some.is_finite() & (some > 0)).median() or 0
    return next((unit for unit in ("ns", "us", "ms", "s") if usual > UNITS[unit] * 10**8), "order")


def as_date(value: float, unit: str) -> str | float | None:
    """For the statistics: a date, or the number itself where the unit is no unit of time."""
    if unit not in UNITS:
        return None if not unit else value
    try:
        return datetime.fromtimestamp(float(value) / UNITS[unit], UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        return float(value)


# ------------------------------------------------------------------------------------------------ numbers


def encode(column: pl.Series) -> tuple[np.ndarray, pl.Series]:
    """(codes, names): `names` are the distinct values in the order of their numbers, and column[i] is names[codes[i]].

    In order of value where all are integers in the usual form, else in order of their text.
    """
    if column.dtype != pl.Categorical:
        column = column.cast(pl.String).cast(pl.Categorical(pl.Categories.random()))
    values = column.unique()
    table = pl.DataFrame({"code": values.to_physical(), "name": values.cast(pl.String)})
    if table["name"].str.contains(r"^(?:0|[1-9][0-9]{0,17})$").all():
        table = table.sort(pl.col("name").cast(pl.Int64))
    else:
        table = table.sort("name")
    number = np.zeros(int(table["code"].max() or 0) + 1, dtype=np.int32)
    number[table["code"].to_numpy()] = np.arange(len(table), dtype=np.int32)
    return number[column.to_physical().to_numpy()], table["name"]


def renumber(codes: np.ndarray, names: pl.Series) -> tuple[np.ndarray, pl.Series]:
    """The same without the names that no code has, in the same order."""
    used = np.bincount(codes, minlength=len(names)) > 0
    return (np.cumsum(used, dtype=np.int32) - 1)[codes], names.filter(pl.Series(used))


# ------------------------------------------------------------------------------------------------ the stage


class _Steps:
    """The interactions after each step, printed and kept for the statistics."""

    def __init__(self):
        self.log: list[dict] = []

    def add(self, step: str, user: np.ndarray, item: np.ndarray, **more) -> None:
        """user, item: codes of the interactions that are left."""
        left = {"users": _distinct(user), "items": _distinct(item), "interactions": len(user)}
        if self.log:
            left["dropped"] = self.log[-1]["interactions"] - len(user)
        self.log.append({"step": step} | left | more)
        said = ", ".join(f"{value:,} {name}" for name, value in (left | more).items())
        say(f"{step}: {said}")
        if not len(user):
            raise UserError(f"{step}: no interaction is left; loosen the options above or give more data")


def _distinct(codes: np.ndarray) -> int:
    return int((np.bincount(codes) > 0).sum()) if len(codes) else 0


def build(options: PreprocessOptions, source: Source, files: dict[str, Path]) -> None:
    """Filter, number and split `source`, and write `files` (see `preprocess.stage`)."""
    source.faults.check(options.max_bad)
    user, users, item, items, time, steps = filtered(options, source)
    steps_log = steps.log
    (user, users), (item, items) = renumber(user, users), renumber(item, items)
    log = splits.sequences(user, item, time)
    split = split_of(options, log, source.unit)
    statistics = {
        "source": source.read,
        "left_out": [
            {"reason": kind, "records": count, "first": first} for kind, (count, first) in source.faults.kinds.items()
        ],
        "steps": steps_log,
    } | describe(options, log, split, source.unit)
    texts = texts_of(source.texts, items)

    for name, places in split.items():
        splits.write_inter(files[name], log, places, options.max_history if name == "train" else 0)
    for kind, names in (("user2id", users), ("item2id", items)):
        _write_ids(files[kind], names)
    _write_items(files["item.json"], texts)
    write_json(files["stats.json"], statistics)


def filtered(options: PreprocessOptions, source: Source):
    """(user codes, user names, item codes, item names, times, steps) of the interactions that stay, in file order."""
    log, steps = source.log, _Steps()
    (user, users), (item, items) = encode(log["user"]), encode(log["item"])
    time = log["time"].to_numpy()
    steps.add("read", user, item)

    def keep(step: str, mask: np.ndarray, **more) -> None:
        nonlocal user, item, time, rating
        user, item, time = user[mask], item[mask], time[mask]
        rating = rating[mask] if rating is not None else None
        steps.add(step, user, item, **more)

    rating = log["rating"].to_numpy() if "rating" in log.columns else None
    if options.from_time:
        keep(f"from {options.from_time}", time >= time_of(options.from_time, source.unit, "from_time"))
    if options.to_time:
        keep(f"before {options.to_time}", time < time_of(options.to_time, source.unit, "to_time"))
    if options.min_rating > 0:
        if rating is None:
            raise UserError(f"--min_rating {options.min_rating}: the source has no ratings; leave the option out")
        keep(f"rating at least {options.min_rating:g}", rating >= options.min_rating)
    rating = None
    if options.drop_repeats != "none":
        keep(f"without repeats ({options.drop_repeats})", _first(user, item, time, options.drop_repeats, source.unit))
    if source.texts is not None:
        titled = _titled(options, source.texts, items, item)
        if options.untitled == "keep":
            say(f"{int((~titled).sum())} of {len(titled)} items have no title; their ids are their titles")
        elif not titled.all():
            keep("with a title", titled[item])
    if options.k_core > 1:
        mask, rounds = splits.k_core(user, item, options.k_core)
        keep(f"{options.k_core}-core", mask, rounds=rounds)
    return user, users, item, items, time, steps


def _first(user: np.ndarray, item: np.ndarray, time: np.ndarray, which: str, unit: str) -> np.ndarray:
    """Mask of the interactions that are no repeats. Of repeats, the earliest stays, of equal times the first row."""
    table = pl.DataFrame({"user": user, "item": item, "time": time}).with_row_index("row")
    if which == "same_time":
        if not unit:
            raise UserError("--drop_repeats same_time: the source has no times; expected none or all")
        return table.select(pl.struct("user", "item", "time").is_first_distinct()).to_series().to_numpy()
    rows = table.sort("time", maintain_order=True).unique(["user", "item"], keep="first")["row"].to_numpy()
    mask = np.zeros(len(user), dtype=bool)
    mask[rows] = True
    return mask


def _titled(options: PreprocessOptions, texts: pl.DataFrame, items: pl.Series, item: np.ndarray) -> np.ndarray:
    """Which of `items` have a title.

    Raises `UserError` where none has, and where --untitled is refuse and an interaction's item has none.
    """
    known = texts.filter(pl.col("title").str.strip_chars() != "")["item"]
    titled = items.is_in(known.implode()).to_numpy()
    if not titled.any() and len(items) and len(texts):
        raise UserError(
            f"none of the {len(items)} items has a title; the first is {items[0]}, the first with a text {texts['item'][0]}; "
            "give item texts with the same ids"
        )
    if options.untitled == "refuse" and not (found := titled[item]).all():
        first = items[int(item[~found][0])]
        raise UserError(
            f"{int((~found).sum())} interactions are of items without a title, the first of item {first}; give item "
            "texts that belong to these interactions, or --untitled drop or keep"
        )
    return titled


def split_of(options: PreprocessOptions, log: splits.Sequences, unit: str) -> splits.Split:
    """The split that the options ask for. Raises `UserError` where the source has no times for it."""
    if options.split == "leave_one_out":
        return splits.leave_one_out(log)
    if not unit:
        raise UserError(f"--split {options.split}: the source has no times; expected leave_one_out")
    if options.split == "chronological":
        return splits.chronological(log)
    dates = (options.valid_from, "valid_from"), (options.test_from, "test_from")
    return splits.time_split(log, *(time_of(date, unit, flag) if date else None for date, flag in dates))


def describe(options: PreprocessOptions, log: splits.Sequences, split: splits.Split, unit: str) -> dict:
    """The statistics of the interactions that stay and of their split, printed too."""
    users, items, count = len(log.start) - 1, int(log.item.max()) + 1, len(log.item)
    lengths, again = np.diff(log.start), splits.repeats(log)
    same_time = (np.diff(log.time) == 0) & (np.diff(log.user) == 0)
    test = split["test"]
    leaked = splits.leaks(log, split) if unit else None
    found = {
        "users": users,
        "items": items,
        "interactions": count,
        "density": count / users / items,
        "time": {"unit": unit, "first": as_date(log.time.min(), unit), "last": as_date(log.time.max(), unit)},
        "interactions_per_user": {
            "min": int(lengths.min()),
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "max": int(lengths.max()),
        },
        "repeats": int(again.sum()),
        "equal_times": int(same_time.sum()) if unit else None,
        "ties": "file order",
        "split": {
            "kind": options.split,
            "samples": {name: len(places) for name, places in split.items()},
            "users_left_out": int((lengths < (3 if options.split == "leave_one_out" else 2)).sum()),
            "test_targets_not_in_train": splits.unseen_targets(log, split),
            "test_targets_in_history": int(again[test].sum()),
            "test_targets_before_train_targets_of_others": leaked,
        },
    }
    _say(found)
    return found


def _say(found: dict) -> None:
    time, lengths, split = found["time"], found["interactions_per_user"], found["split"]
    say(
        f"{found['items']} items, {found['users']} users, {found['interactions']} interactions, density "
        f"{found['density']:.3%}, {lengths['min']} to {lengths['max']} per user, mean {lengths['mean']:.1f}, "
        f"{found['repeats']} repeats"
    )
    if time["unit"]:
        say(
            f"time: {time['first']} to {time['last']}; {found['equal_times']} interactions have the time of the user's "
            "interaction before; ties stay in file order"
        )
    else:
        say("the source has no times: interactions stay in file order")
    say(f"split {split['kind']}; {split['users_left_out']} users have too few interactions for it")
    say("\n".join(f"{name}: {count} samples" for name, count in split["samples"].items()))
    if not split["samples"]["train"]:
        say("warning: no train samples; the later stages need users with more interactions")
    tested = max(1, split["samples"]["test"])
    say(
        f"test targets: {split['test_targets_not_in_train'] / tested:.1%} not in train, "
        f"{split['test_targets_in_history'] / tested:.1%} in the user's history"
    )
    if leaked := split["test_targets_before_train_targets_of_others"]:
        say(
            f"warning: {leaked} of {split['samples']['test']} test targets ({leaked / tested:.1%}) are earlier than a "
            "train target of another user; --split time has none"
        )


# ------------------------------------------------------------------------------------------------ texts and files


def clean(text: str) -> str:
    """HTML entities as characters, tags and control characters left out, white space collapsed."""
    text = html.unescape(text) if "&" in text else text
    text = re.sub(r"<(?:/?[a-zA-Z][^<>]*|!--.*?--)>", " ", text, flags=re.S) if "<" in text else text
    return " ".join(HIDDEN.sub(" ", text).split())


def texts_of(texts: pl.DataFrame | None, items: pl.Series) -> pl.DataFrame:
    """One row an item, in the order of their numbers. An item without a title is titled by its original id."""
    table = pl.DataFrame({"item": items})
    if texts is not None:
        table = table.join(texts, on="item", how="left", maintain_order="left")
    missing = [pl.lit("").alias(name) for name in TEXTS if name not in table.columns]
    table = table.with_columns(missing).with_columns(pl.col(*TEXTS).fill_null(""))
    untitled = pl.col("title").str.strip_chars() == ""
    return table.with_columns(title=pl.when(untitled).then(pl.col("item")).otherwise(pl.col("title")))


def _write_items(path: Path, texts: pl.DataFrame) -> None:
    with atomic_file(path) as f:
        f.write("{\n")
        for number, row in enumerate(texts.select(TEXTS).iter_rows(named=True)):
            end = ",\n" if number < len(texts) - 1 else "\n"
            f.write(f'"{number}": {json.dumps(row, ensure_ascii=False)}{end}')
        f.write("}\n")


def _write_ids(path: Path, names: Sequence[str]) -> None:
    table = pl.DataFrame({"original": names}).with_row_index("number").select("original", "number")
    with atomic_file(path, "wb") as f:
        table.write_csv(f, separator="\t", include_header=False, quote_style="never")
