"""Sections of the report about the data and about where each result comes from."""

import json
from collections.abc import Sequence

import numpy as np

from minionerec.common.runs import command_line
from minionerec.report import figures
from minionerec.report.blocks import Section, Table, Text, number
from minionerec.report.outputs import Output
from minionerec.report.sids import gini


def data_section(outputs: Sequence[Output]) -> Section:
    """Statistics of the data of each output."""
    blocks = []
    for output in outputs:
        if output.data is not None:
            blocks += _statistics(output, f": {output.label}" if len(outputs) > 1 else "")
    if not blocks:
        blocks = [Text("The data that the stages were given are not there any more.")]
    lead = "Rows are (history, target) samples. A target repeats if it is in its row's history."
    return Section("data", "Data", lead, blocks)


def _statistics(output: Output, suffix: str) -> list:
    data = output.data
    splits, n_items, known = data.splits, len(data.titles), set()
    train = splits.get("train")
    if train is not None:
        known = set(train["target"].to_list()) | set(train["seen"].explode().drop_nulls().to_list())
    rows = []
    for name, split in splits.items():
        lengths, targets = split["seen"].list.len().to_numpy(), split["target"].to_numpy()
        repeats = [target in seen for target, seen in zip(targets.tolist(), split["seen"].to_list(), strict=True)]
        new = np.mean([target not in known for target in targets.tolist()]) if known else None
        rows.append(
            [
                name, number(len(split)), number(split["user"].n_unique()), number(len(np.unique(targets))),
                f"{lengths.mean():.1f} ({int(np.median(lengths))}, {int(lengths.max())})",
                f"{np.mean(repeats):.1%}", "–" if new is None else f"{new:.1%}",
            ]
        )  # fmt: skip
    header = ["split", "rows", "users", "distinct targets", "history, mean (median, most)", "repeats", "not in train"]
    blocks = [Table(f"Splits, {n_items:,} items{suffix}", header, rows)]
    if train is not None:
        counts = np.sort(np.bincount(train["target"].to_numpy(), minlength=n_items))[::-1]
        share = counts.cumsum() / max(counts.sum(), 1)
        places = np.unique(np.linspace(0, n_items - 1, min(n_items, 60)).astype(int))
        points = [(float(100 * (place + 1) / n_items), float(share[place])) for place in places]
        title = f"Popularity: share of train's targets{suffix}"
        blocks.append(figures.lines(title, "% of the items, most popular first", "share of targets", {"items": points}))
        blocks.append(
            Text(
                f"Gini coefficient of the items' counts in train: {number(gini(counts))}. "
                f"{int((counts == 0).sum()):,} items are never a target in train."
            )
        )
    edges = {"0": 0, "1–2": 2, "3–5": 5, "6–10": 10, "11–20": 20, "21–50": 50}
    series = {}
    for name, split in splits.items():
        bins = np.searchsorted(list(edges.values()), split["seen"].list.len().to_numpy())
        series[name] = (np.bincount(bins, minlength=len(edges) + 1) / len(split)).tolist()
    title = f"Length of the history, share of rows{suffix}"
    return [*blocks, figures.bars(title, "items", "share", [*edges, "51+"], series)]


# ------------------------------------------------------------------------------------------------ provenance


def provenance_section(outputs: Sequence[Output]) -> Section:
    """How each result was made, from the records of the runs."""
    blocks = []
    for output in outputs:
        suffix = f": {output.label}" if len(outputs) > 1 else ""
        records = output.records
        overview = [
            [
                name, number(float(record.get("seconds", 0)), 1), record.get("settings", {}).get("seed", "–"),
                record.get("device", "–"), record.get("commit") or record.get("code", "–"),
            ]
            for name, record in records.items()
        ]  # fmt: skip
        header = ["stage", "seconds", "seed", "device", "commit (or digest of the code)"]
        blocks.append(Table(f"Stages{suffix}", header, overview))
        blocks.append(
            Table(f"Commands{suffix}", ["stage", "command"], [[n, command_line(r)] for n, r in records.items()])
        )
        rows = [[name, key, value] for name, record in records.items() for key, value in changed(record)]
        blocks.append(Table(f"Options that differ from their defaults{suffix}", ["stage", "option", "value"], rows))
        inputs = [
            [name, key, value] for name, record in records.items() for key, value in record.get("inputs", {}).items()
        ]
        blocks.append(Table(f"Digests of the inputs (BLAKE2b){suffix}", ["stage", "input", "digest"], inputs))
        found = [record.get("versions", {}) for record in records.values()]
        packages = dict.fromkeys(package for each in found for package in each)
        versions = [[p, ", ".join(dict.fromkeys(each[p] for each in found if p in each))] for p in packages]
        blocks.append(Table(f"Versions{suffix}", ["package", "version"], versions))
    lead = "From the records (run.json) that the stages have left. Seconds are those of the run that finished."
    return Section("provenance", "Provenance", lead, blocks)


def changed(record: dict) -> list[tuple[str, str]]:
    """(option, value) of what was not a default; of a record without that knowledge, all settings."""
    options = record.get("options", record.get("settings", {}))
    return [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in options.items()]
