"""What the stages have left in an output folder of run.sh, read for the report. What is missing is empty."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minionerec.common import runs
from minionerec.common.tracking import LOG_FILE, read_log

if TYPE_CHECKING:
    import polars as pl


class Dataset(NamedTuple):
    """Titles by item, and the rows of the splits that are there, as of `read_sequences`."""

    titles: Sequence[str]
    splits: Mapping[str, "pl.DataFrame"]


@dataclass
class Output:
    """One output folder.

    results: content of results.json; metrics: {model: content of its metrics.json}; ranks: {model: arrays of its
    ranks.npz}; records: {stage: its run record, with "path"}.
    """

    label: str
    folder: Path
    results: dict
    metrics: Mapping[str, dict]
    ranks: Mapping[str, dict[str, np.ndarray]]
    records: Mapping[str, dict] = field(default_factory=dict)

    @property
    def headline(self) -> str:
        return self.results["headline"]

    def of_protocol(self, model: str, protocol: str = "") -> dict:
        """A model's metrics under a protocol, by default the headline; empty where it has none."""
        content = self.metrics[model]
        return content if (protocol or self.headline) == "all" else content.get("unseen", {})

    def ranked(self, kind: str = "item") -> dict[str, np.ndarray]:
        """{model: its array `<headline>_<kind>`} of the models that have it."""
        name = f"{self.headline}_{kind}"
        return {model: arrays[name] for model, arrays in self.ranks.items() if name in arrays}

    @cached_property
    def logs(self) -> dict[str, list[dict]]:
        """{training: what it has logged}, in the order in which they began."""
        folders = [
            path.parent for path in sorted(self.folder.glob(f"*/{LOG_FILE}")) if not runs.moved_aside(path.parent)
        ]
        began = {folder: runs.read_record(folder / runs.RECORD).get("started", 0) for folder in folders}
        return {folder.name: read_log(folder) for folder in sorted(folders, key=began.get)}

    @cached_property
    def indexes(self) -> dict[str, Path]:
        """{name: index file}, the one that SFT used first."""
        found = {str(path.relative_to(self.folder)): path for path in sorted(self.folder.glob("*/*.index.json"))}
        used = self.file("sid_index_path")
        if used and not any(path.resolve() == used.resolve() for path in found.values()):
            found[used.name] = used
        of_sft = used.resolve() if used else None
        return dict(sorted(found.items(), key=lambda pair: pair[1].resolve() != of_sft))

    def file(self, *names: str) -> Path | None:
        """The file that a stage was given by one of these options, if it still exists; evaluations are asked first."""
        order = sorted(self.records.values(), key=lambda record: record.get("stage") not in ("evaluate", "sft"))
        for name in names:
            for record in order:
                value = record.get("options", {}).get(name)
                for base in (Path(), runs.ROOT) if isinstance(value, str) and value else ():
                    if (base / value).is_file():
                        return base / value
        return None

    @cached_property
    def data(self) -> Dataset | None:
        """The data that the stages were given; None without a catalog. Raises `UserError` where a file is malformed.

        Items are read by their ids: baselines and language models may have had different SIDs.
        """
        from minionerec.catalog.items import read_info
        from minionerec.catalog.sequences import read_sequences

        info = self.file("info_file")
        if info is None:
            return None
        items = read_info(info)
        names = {"train": ["train_file"], "valid": ["eval_file", "valid_file"], "test": ["test_data_path", "test_file"]}
        paths = {split: self.file(*options) for split, options in names.items()}
        splits = {
            split: read_sequences(path, items.sids, names[split][0], max_history=10**6, check_sids=False)
            for split, path in paths.items()
            if path
        }
        return Dataset(items.titles, splits)


def curve(log: list[dict], name: str) -> list[tuple[float, float]]:
    """(step, value) of what was logged under `name`."""
    numbers = [entry for entry in log if isinstance(entry.get(name), int | float)]
    return [(entry["step"], entry[name]) for entry in numbers if np.isfinite(entry[name])]
