"""The options that every reader of stage 0 has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minionerec.common.errors import UserError
from minionerec.common.options import OUTPUT, StageOptions, option


@dataclass
class PreprocessOptions(StageOptions):
    output_dir: str = option("", "folder for the files that are written", role=OUTPUT)
    dataset_name: str = option("", "<D> of the file names that are written")
    k_core: int = option(0, "keep users and items with at least this many interactions, to a fixed point; 0: all")
    from_time: str = option("", "leave out earlier interactions: 2016, 2016-10 or 2016-10-31 (UTC)", aliases=["--from"])
    to_time: str = option("", "leave out interactions at or after this date", aliases=["--to"])
    min_rating: float = option(0.0, "leave out interactions with a lower rating; 0: keep all")
    drop_repeats: Literal["none", "same_time", "all"] = option(
        "none", "leave out repeats of a user's item: those with the same time, or all but the first"
    )
    split: Literal["leave_one_out", "chronological", "time"] = option(
        "leave_one_out",
        "leave_one_out: a user's last item tests, the one before validates; chronological: all samples in time order, "
        "8:1:1; time: two dates, or the times of 80 and 90 % of the samples",
    )
    valid_from: str = option("", "split time: first date of valid, as --from_time")
    test_from: str = option("", "split time: first date of test")
    max_history: int = option(10, "items of history that a train sample keeps, the latest ones")
    untitled: Literal["refuse", "drop", "keep"] = option(
        "refuse", "items without a title: an error, left out with their interactions, or titled by their id"
    )
    max_bad: float = option(0.0, "share of unusable records that are counted and left out; more is an error")

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "max_history")
        self.at_least(0, "k_core", "min_rating")
        self.plain_names("dataset_name")
        dates = bool(self.valid_from) + bool(self.test_from)
        self.check(
            max_bad=(0 <= self.max_bad <= 1, "0 to 1"),
            test_from=(dates != 1, "both --valid_from and --test_from, or neither"),
            split=(not dates or self.split == "time", "time, where --valid_from is given"),
        )


def refuse_unused(options: PreprocessOptions, needed: str) -> None:
    """Raise `UserError` for an option about item texts, where there are none. needed: what would give some."""
    for name in ("title_column", "description_column", "brand_column", "categories_column"):
        if value := getattr(options, name, ""):
            raise UserError(f"--{name} {value}: there are no item texts; leave it out, or give {needed}")
    if options.untitled == "drop":
        raise UserError(f"--untitled drop: there are no item texts; leave it out, or give {needed}")


def name_of(options: PreprocessOptions, path: str | Path) -> str:
    """<D>: the name given, else that of the first file or folder up to its first dot."""
    name = options.dataset_name or Path(path).resolve().name.split(".")[0]
    if not name:
        raise UserError(f"--dataset_name is required: {path} gives no name")
    return name
