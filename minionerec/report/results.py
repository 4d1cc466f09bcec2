"""Sections of the report: results with intervals, differences and published rows; and the training curves."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from minionerec.common.errors import UserError
from minionerec.evaluation.metrics import interval_of_mean, values_of
from minionerec.report import figures
from minionerec.report.blocks import Section, Table, Text
from minionerec.report.outputs import Output, curve

PROTOCOLS = {"all": "all items", "unseen": "unseen items (the user's earlier items leave the ranking)"}
COMPARED = ("HR@10", "NDCG@10")


def results_section(outputs: Sequence[Output], published: Path | None, data: str, seed: int) -> Section:
    """The tables of every output, paired differences, and published rows of the data set `data`."""
    blocks = []
    for output in outputs:
        order = sorted(PROTOCOLS, key=lambda name: name != output.headline)
        blocks += [table for name in order if (table := _table(output, name, len(outputs) > 1))]
        found = {
            model: (own["item"]["NDCG@10"], *own["intervals"]["NDCG@10"])
            for model in output.metrics
            if "NDCG@10" in (own := output.of_protocol(model)).get("intervals", {})
        }
        if found:
            blocks.append(figures.intervals(_of(output, outputs, "NDCG@10 with 95 % intervals"), "NDCG@10", found))
        blocks += _differences(output, outputs)
        blocks += _rl_minus_sft(output, outputs)
    blocks += _between(outputs, seed)
    blocks += _published(published, data) if published else []
    lead = (
        "Test rows, by item, over the full catalog: a prediction is a hit only if it is the target item. The headline "
        "protocol is first. Brackets are 95 % bootstrap intervals over test rows; they do not include the seed of the "
        "training. Ties rank by item id."
    )
    return Section("results", "Results", lead, blocks)


def _of(output: Output, outputs: Sequence[Output], title: str) -> str:
    return f"{title}: {output.label}" if len(outputs) > 1 else title


def _table(output: Output, protocol: str, several: bool) -> Table | None:
    tables = {model: output.of_protocol(model, protocol) for model in output.metrics}
    tables = {model: own for model, own in tables.items() if own}
    if not tables:
        return None
    names = [f"{metric}@{k}" for metric in ("HR", "NDCG") for k in (1, 5, 10, 20)]
    names.remove("NDCG@1")  # equals HR@1
    names = [name for name in names if any(name in own["item"] for own in tables.values())]
    rows = []
    for model, own in tables.items():
        content = output.metrics[model]
        beams = content.get("num_beams", "–")
        rows.append([model, content.get("rows", "–"), beams, *(_with_interval(own, name) for name in names)])
    title = f"{'Headline: ' if protocol == output.headline else ''}{PROTOCOLS[protocol]}"
    return Table(f"{title}, {output.label}" if several else title, ["model", "rows", "beams", *names], rows)


def _with_interval(own: Mapping, name: str) -> str:
    """`0.104 [0.085, 0.123]`; the interval only of the compared metrics."""
    if name not in own["item"]:
        return "–"
    value = f"{own['item'][name]:.3f}"
    if name not in COMPARED or name not in own.get("intervals", {}):
        return value
    low, high = own["intervals"][name]
    return f"{value} [{low:.3f}, {high:.3f}]"


def _differences(output: Output, outputs: Sequence[Output]) -> list:
    """The paired differences to the best baseline."""
    compared, baseline = output.results["differences"], output.results["baseline"]
    if not compared:
        return []
    title = _of(output, outputs, f"NDCG@10 minus {baseline}'s, paired on the same test rows")
    values = {model: tuple(compared[model]["NDCG@10"]) for model in output.metrics if model in compared}
    note = f"{baseline} is the best baseline. An interval that contains 0 shows no difference."
    return [figures.intervals(title, "difference of NDCG@10", values, zero=True), Text(note)]


def _rl_minus_sft(output: Output, outputs: Sequence[Output]) -> list:
    """What RL has changed, at every cutoff."""
    changed = output.results["rl_minus_sft"]
    if not changed:
        return []
    cutoffs = [name.removeprefix("HR@") for name in changed if name.startswith("HR@")]
    rows = [[metric, *(_difference(*changed[f"{metric}@{k}"]) for k in cutoffs)] for metric in ("HR", "NDCG")]
    title = _of(output, outputs, "rl minus sft, paired on the same test rows; ~: the interval contains 0")
    return [Table(title, ["metric", *(f"@{k}" for k in cutoffs)], rows)]


def _difference(mean: float, low: float, high: float) -> str:
    return f"{'~ ' if low <= 0 <= high else ''}{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _between(outputs: Sequence[Output], seed: int) -> list:
    """The paired differences of models with one name in the first output and another one, on the same test rows."""
    rows = []
    for other in outputs[1:]:
        first = outputs[0]
        for model, ranks in other.ranked().items():
            reference = first.ranked().get(model)
            targets = [output.ranks[model].get("target") for output in (first, other) if model in output.ranks]
            same = len(targets) == 2 and all(t is not None for t in targets) and np.array_equal(*targets)
            if reference is None or not same or first.headline != other.headline:
                continue
            before, after = values_of(reference, [10]), values_of(ranks, [10])
            cells = []
            for name in COMPARED:
                difference = after[name].astype(float) - before[name]
                low, high = interval_of_mean(difference, seed)
                cells.append(_difference(difference.mean(), low, high))
            rows.append([model, f"{other.label} minus {first.label}", *cells])
    if not rows:
        return [Text("The outputs have no model in common with the same test rows.")] if len(outputs) > 1 else []
    return [Table("Between the outputs, paired; ~: the interval contains 0", ["model", "outputs", *COMPARED], rows)]


def _published(path: Path, data: str) -> list:
    """The published rows of a data set, with their protocol. Raises `UserError` where the file has none."""
    with open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    own = [row for row in rows if row.get("data") == data]
    if not own:
        known = ", ".join(sorted({row.get("data", "") for row in rows}))
        raise UserError(f"--published {data}: {path} has no such data; expected one of {known}")
    header = [name for name in own[0] if name != "data" and any(row[name] for row in own)]
    note = "Compare only rows with one protocol: beams, seen items, ties and the train set decide much of a figure."
    return [
        Table(f"Published for {data}", header, [[row[name] or "not stated" for name in header] for row in own]),
        Text(note),
    ]


# ------------------------------------------------------------------------------------------------ training


def training_section(outputs: Sequence[Output]) -> Section:
    """The curves of every training with a log."""
    blocks = []
    for output in outputs:
        for name, log in output.logs.items():
            curves = [
                (title, y, series) for title, y, series in _curves(log) if any(len(p) > 1 for p in series.values())
            ]
            blocks += [
                figures.lines(_of(output, outputs, f"{name}: {title}"), "step", ylabel, series)
                for title, ylabel, series in curves
            ]
            if not curves:
                blocks.append(Text(f"{name}: fewer than two entries were logged, so there is no curve."))
    if not blocks:
        blocks = [Text("No training has left a log.jsonl here: SFT and RL write it when they end.")]
    lead = "What the trainings have logged. Validation metrics are those by which the weights were chosen."
    return Section("training", "Training", lead, blocks)


def _curves(log: list[dict]) -> list[tuple[str, str, dict]]:
    """(title, y label, {series: points}) of what a log holds."""
    names = list(dict.fromkeys(name for entry in log for name in entry))
    rewards = {name: name.removeprefix("rewards/").removesuffix("/mean") for name in names if _is_reward(name)}
    groups = [
        ("loss", "loss", {"loss": "train", "eval_loss": "valid, nats per answer token"}),
        ("HR@K on valid", "HR@K", _at_cutoffs(names, "HR")),
        ("NDCG@K on valid", "NDCG@K", _at_cutoffs(names, "NDCG")),
        ("reward by function, mean", "reward", rewards),
        ("KL divergence from the reference", "nats per token", {"kl": "mean", "kl_median": "median"}),
        ("groups without signal", "share of groups", {"group/dead": "all rewards equal"}),
        (
            "the target's prefix in its group",
            "share of groups",
            {f"group/prefix_{level}": f"{level} level{'s' if level > 1 else ''}" for level in (1, 2, 3)},
        ),
        ("learning rate", "learning rate", {"learning_rate": "learning rate"}),
    ]
    found = [(title, y, {label: curve(log, name) for name, label in keys.items()}) for title, y, keys in groups]
    return [(title, y, series) for title, y, each in found if (series := {k: v for k, v in each.items() if v})]


def _at_cutoffs(names: Sequence[str], metric: str) -> dict[str, str]:
    """{name in the log: label} of a validation metric at 1, 10 and the largest K."""
    known = (name.removeprefix(f"eval_{metric}@") for name in names if name.startswith(f"eval_{metric}@"))
    found = sorted(int(k) for k in known if k.isdecimal())
    shown = [k for k in found if k in (1, 10) or k == found[-1]]
    return {f"eval_{metric}@{k}": f"{metric}@{k}" for k in shown if metric == "HR" or k > 1}  # NDCG@1 is HR@1


def _is_reward(name: str) -> bool:
    return name.startswith("rewards/") and name.endswith("/mean")
