"""The results of a run of run.sh: a table of what its stages measured, and report.html, a page with everything.

    python report.py --output_dir output/quickstart
    python report.py --output_dir output/quickstart output/other --report_file output/compare.html

Reads what the stages left in `output_dir`: metrics (`<model>/metrics.json`, `<model>.metrics.json`), ranks next to them,
logs of trainings and the records of runs. Prints the table, writes the page (docs/report.md), and in each folder
`results.json`:

    {"<model>": {"HR@5": …, …}, …,                                   all items, by item
     "unseen": {"<model>": {"HR@5": …, …}, …},                       without the items that the user already has
     "headline": "all" | "unseen", "baseline": "<model>",            the protocol to quote, and its best baseline
     "intervals": {"<model>": {"NDCG@10": [low, high], …}, …},       95 %, of the headline protocol
     "differences": {"<model>": {"NDCG@10": [mean, low, high], …}},  to that baseline, on the same rows
     "seconds": {"<stage>": …}}
"""

import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from minionerec.common import runs
from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, read_json, require_file, write_json
from minionerec.common.options import INPUT, OUTPUT, StageOptions, option, run
from minionerec.common.text import printable

BASELINES = ("popularity", "markov", "sasrec", "gru4rec", "caser")
ORDER = (*BASELINES, "sft", "rl")  # other models follow, by name
CUTOFFS = (5, 10, 20)
COMPARED = ("HR@10", "NDCG@10")
PROTOCOLS = {"all": "all items", "unseen": "unseen items (the user's earlier items leave the ranking)"}
PUBLISHED = Path(__file__).parent / "results" / "published.csv"
TITLE = "MiniOneRec report"
NOT_MODELS = (  # keys of results.json
    "unseen", "headline", "baseline", "intervals", "differences", "rl_minus_sft", "seconds"
)  # fmt: skip


@dataclass
class Options(StageOptions):
    output_dir: list[str] = option([], "folders of runs of run.sh; several are shown side by side", role=INPUT)
    report_file: str = option("", "the page; default: report.html in the first folder", role=OUTPUT)
    published: str = option(
        "", f"add the published rows of this data set, a name in the column data of {PUBLISHED.name}"
    )
    sample_users: int = option(30, "sample users on the page")
    map_items: int = option(2000, "items on the map of semantic IDs, drawn by seed; 0: no map")
    seed: int = option(42, "seed of the paired bootstrap, of the sample users and of the map")

    def __post_init__(self):
        super().__post_init__()
        self.at_least(0, "sample_users", "map_items")


# ------------------------------------------------------------------------------------------------ what is found


def find(folder: Path, pattern: str) -> dict[str, Path]:
    """{model: file} for `<model>/<pattern>` and `<model>.<pattern>`."""
    found = {path.parent.name: path for path in folder.glob(f"*/{pattern}")}
    found |= {path.name.removesuffix(f".{pattern}"): path for path in folder.glob(f"*.{pattern}")}
    return {name: path for name, path in found.items() if is_current(path, folder)}


def is_current(path: Path, folder: Path) -> bool:
    """Whether a file is in `folder` itself, or below it in one that is no older result."""
    return path.parent == folder or not runs.moved_aside(path.parent)


def read_metrics(folder: Path) -> dict[str, dict]:
    """{model: content of its metrics.json}, baselines first."""
    metrics = {name: read_json(path, "output_dir") for name, path in find(folder, "metrics.json").items()}
    metrics = {name: content for name, content in metrics.items() if isinstance(content.get("item"), dict)}
    for name, content in metrics.items():
        path = find(folder, "metrics.json")[name]
        check_metrics(path, content)
        if name in NOT_MODELS:
            raise UserError(f"{path}: a model cannot be named {name!r}, a key of results.json; rename it")
    if not metrics:
        raise UserError(f"{folder}: found no metrics of a model, expected files like sft.metrics.json; run run.sh")
    place = {name: number for number, name in enumerate(ORDER)}
    return {name: metrics[name] for name in sorted(metrics, key=lambda name: (place.get(name, len(ORDER)), name))}


def check_metrics(path: Path, content: dict) -> None:
    """Raise `UserError` where a metrics.json lacks what the table reads, or has it in another form."""
    protocols = [content, *([content["unseen"]] if "unseen" in content else [])]
    right = content.get("headline", "all") in PROTOCOLS
    if not right or not all(map(is_protocol, protocols)):
        raise UserError(f"{path}: not metrics of evaluate.py or sasrec.py; remove it and run that stage again")


def is_protocol(content) -> bool:
    """Whether metrics under one protocol have the form that `minionerec.evaluation.protocols.report` gives them."""
    parts = [content.get(name, {}) for name in ("item", "intervals", "slices")] if isinstance(content, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or "item" not in content:
        return False
    item, intervals, slices = parts
    tables = [table for kind in slices.values() for table in (kind.values() if isinstance(kind, dict) else [None])]
    return (
        are_numbers(item.values())
        and all(isinstance(pair, list) and len(pair) == 2 and are_numbers(pair) for pair in intervals.values())
        and all(isinstance(table, dict) and are_numbers(table.values()) and is_slice(table) for table in tables)
    )


def is_slice(table: Mapping) -> bool:
    return "rows" in table and any(name.startswith("HR@") for name in table)


def are_numbers(values: Iterable) -> bool:
    return all(isinstance(value, int | float) for value in values)


def check_record(path: Path, record: dict) -> None:
    """Raise `UserError` where a record lacks what the report reads, or has it in another form."""
    kinds = {"stage": str, "started": int | float, "seconds": int | float}
    kinds |= {name: dict for name in ("settings", "inputs", "options", "versions") if name in record}
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            raise UserError(
                f"{path}: {name} is {str(record.get(name))[:60]}, not the record of a stage; remove it and run that stage "
                "again"
            )


def check_ranks(path: Path, arrays: Mapping) -> None:
    """Raise `UserError` where arrays of a ranks.npz are not those of `minionerec.evaluation.protocols.write_ranks`."""
    for name, array in arrays.items():
        is_label, dimensions = name.startswith("slice_"), 2 if name.endswith("_top") else 1
        right = array.ndim == dimensions and (is_label or array.dtype.kind in "iu")
        if not right or not len(array) or len(array) != len(next(iter(arrays.values()))):
            raise UserError(
                f"{path}: {name} has shape {array.shape} of {array.dtype}, expected {dimensions} dimension(s) of whole "
                "numbers, a row for each test row; remove it and run that stage again"
            )


def read_records(folder: Path) -> dict[str, dict]:
    """{stage: record} of the finished runs, in the order in which they began.

    A stage that ran once is its record's stage; one that ran several times is the name of the model's folder, or the
    name before .run.json and the stage (`sft_evaluate`).
    """
    paths = [
        path for depth in ("", "*/") for name in (runs.RECORD, f"*.{runs.RECORD}") for path in folder.glob(depth + name)
    ]
    records = [(path, runs.read_record(path)) for path in paths if is_current(path, folder)]
    records = [(path, record) for path, record in records if record.get("complete")]
    for path, record in records:
        check_record(path, record)
    records.sort(key=lambda pair: pair[1]["started"])
    times = Counter(record["stage"] for _, record in records)

    def name(path: Path, stage: str) -> str:
        if times[stage] == 1:
            return stage
        return path.parent.name if path.name == runs.RECORD else f"{path.name.removesuffix(f'.{runs.RECORD}')}_{stage}"

    return {name(path, record["stage"]): record for path, record in records}


def read_seconds(folder: Path) -> dict[str, float]:
    """{stage: seconds} of the finished runs."""
    return {name: record["seconds"] for name, record in read_records(folder).items()}


def read_ranks(folder: Path) -> dict[str, dict]:
    """{model: the arrays of its ranks.npz} of the models that have stored them."""
    import numpy as np

    ranks = {}
    for name, path in find(folder, "ranks.npz").items():
        try:
            with np.load(path, allow_pickle=False) as content:
                ranks[name] = dict(content)
        except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path}: a damaged .npz ({error}); remove it and run that stage again") from None
        check_ranks(path, ranks[name])
    return ranks


# ------------------------------------------------------------------------------------------------ the results


def rows_of(metrics: Mapping[str, dict], protocol: str) -> dict[str, dict[str, float]]:
    """{model: metrics by item} under a protocol, at the cutoffs that every model has."""
    found = {name: content if protocol == "all" else content.get("unseen") for name, content in metrics.items()}
    tables = {name: content["item"] for name, content in found.items() if content}
    names = [f"{metric}@{k}" for metric in ("HR", "NDCG") for k in CUTOFFS]
    names = [name for name in names if all(name in table for table in tables.values())]
    return {model: {name: table[name] for name in names} for model, table in tables.items()}


def headline_of(metrics: Mapping[str, dict]) -> str:
    """`unseen` where every model has that protocol and one has chosen it from train, else `all`."""
    has_both = all("unseen" in content for content in metrics.values())
    return "unseen" if has_both and any(m.get("headline") == "unseen" for m in metrics.values()) else "all"


def paired(own, reference, names: Iterable[str], seed: int) -> dict[str, list[float]]:
    """{metric: [mean, low, high]} of the differences of two models' ranks on the same rows."""
    from minionerec.evaluation.metrics import interval_of_mean, values_of

    one, two = values_of(own), values_of(reference)
    differences = {name: one[name].astype(float) - two[name] for name in names}
    return {name: [float(d.mean()), *interval_of_mean(d, seed)] for name, d in differences.items()}


def compare(ranks: Mapping, baseline: str, seed: int) -> dict[str, dict[str, list[float]]]:
    """{model: {metric: [mean, low, high]}} of the differences to `baseline` on the same rows."""
    reference = ranks.get(baseline, ())
    same = {model: own for model, own in ranks.items() if model != baseline and len(own) == len(reference)}
    return {model: paired(own, reference, COMPARED, seed) for model, own in same.items()}


def rl_minus_sft(ranks: Mapping, metrics: Mapping[str, dict], seed: int) -> dict[str, list[float]]:
    """What RL has changed, {metric: [mean, low, high]}, at every cutoff of HR and NDCG that both models have."""
    if not {"sft", "rl"} <= ranks.keys() or len(ranks["sft"]) != len(ranks["rl"]):
        return {}
    names = [name for name in metrics["sft"]["item"] if name in metrics["rl"]["item"] and "@" in name]
    return paired(ranks["rl"], ranks["sft"], names, seed)


def results_of(folder: Path, seed: int) -> dict:
    """The content of results.json."""
    metrics = read_metrics(folder)
    headline = headline_of(metrics)
    tables = {protocol: rows_of(metrics, protocol) for protocol in PROTOCOLS}
    best = [name for name in tables[headline] if name in BASELINES and "NDCG@10" in tables[headline][name]]
    baseline = max(best, key=lambda name: tables[headline][name]["NDCG@10"], default="")
    content = {name: m if headline == "all" else m["unseen"] for name, m in metrics.items()}
    intervals = {
        name: {metric: own["intervals"][metric] for metric in COMPARED if metric in own.get("intervals", {})}
        for name, own in content.items()
    }
    stored = read_ranks(folder).items()
    ranks = {name: arrays[f"{headline}_item"] for name, arrays in stored if f"{headline}_item" in arrays}
    return tables["all"] | {
        "unseen": tables["unseen"],
        "headline": headline,
        "baseline": baseline,
        "intervals": intervals,
        "differences": compare(ranks, baseline, seed),
        "rl_minus_sft": rl_minus_sft(ranks, content, seed),
        "seconds": read_seconds(folder),
    }


# ------------------------------------------------------------------------------------------------ the table


def tables_of(results: dict) -> str:
    """The results as text: a table for each protocol, the headline first, with intervals and differences."""
    from minionerec.evaluation.metrics import format_table

    tables = {"all": {name: row for name, row in results.items() if name not in NOT_MODELS}}
    tables |= {"unseen": results["unseen"]} if results["unseen"] else {}
    parts = []
    for protocol, rows in sorted(tables.items(), key=lambda pair: pair[0] != results["headline"]):
        cutoffs = [k for k in CUTOFFS if f"HR@{k}" in next(iter(rows.values()))]
        lines = format_table(rows, cutoffs).split("\n")
        if protocol == results["headline"]:
            lines = [line + cell for line, cell in zip(lines, cells(results, rows), strict=True)]
        parts.append("\n".join([PROTOCOLS[protocol], *lines]))
    if changed := results["rl_minus_sft"]:
        parts.append(f"rl minus sft, on the same test rows: {in_words(changed)}")
    if results["differences"]:
        parts.append("Intervals are 95 %. ~ marks a difference within its interval, on the same test rows.")
    return "\n\n".join(parts)


def in_words(differences: Mapping[str, list[float]]) -> str:
    """The differences beyond their intervals, and the names of the others."""
    beyond = [
        f"{m} {mean:+.4f} ({low:+.4f} to {high:+.4f})" for m, (mean, low, high) in differences.items() if low * high > 0
    ]
    within = [name for name, (_, low, high) in differences.items() if low <= 0 <= high]
    parts = [", ".join(beyond), f"within the interval: {', '.join(within)}" if within else ""]
    return "; ".join(filter(None, parts))


def cells(results: dict, models: Iterable[str]) -> list[str]:
    """Of NDCG@10 the interval and the difference to the best baseline: a header, then a cell for each model."""
    compared = results["differences"]
    found = [f"{'interval of NDCG@10':>23}" + (f"   NDCG@10 − {results['baseline']}'s" if compared else "")]
    for model in models:
        interval = results["intervals"][model].get("NDCG@10")
        cell = f"{interval[0]:>14.4f} – {interval[1]:.4f}" if interval else " " * 23
        if model in compared:
            mean, low, high = compared[model]["NDCG@10"]
            cell += f"   {'~' if low <= 0 <= high else ' '}{mean:+.4f} ({low:+.4f} to {high:+.4f})"
        found.append(cell)
    return found


# ------------------------------------------------------------------------------------------------ the page


def outputs_of(results: Mapping[Path, dict]) -> list:
    """The `Output` of each folder; results: {folder: content of its results.json}."""
    from minionerec.report.outputs import Output

    labels = labels_of(list(results))
    outputs = []
    for folder, own in results.items():
        metrics, ranks = read_metrics(folder), read_ranks(folder)
        ranks = {name: ranks[name] for name in metrics if name in ranks}
        outputs.append(Output(labels[folder], folder, own, metrics, ranks, read_records(folder)))
    return outputs


def page_of(outputs: list, options: Options) -> str:
    """The page of these outputs."""
    from minionerec.report import facts, page, rows, sids
    from minionerec.report import results as tables

    sections = [
        tables.results_section(outputs, PUBLISHED if options.published else None, options.published, options.seed),
        tables.training_section(outputs),
        sids.sids_section(outputs, options.map_items, options.seed),
        rows.slices_section(outputs),
        rows.ranks_section(outputs),
        rows.users_section(outputs, options.sample_users, options.seed),
        facts.data_section(outputs),
        facts.provenance_section(outputs),
    ]
    return page.render(TITLE, ", ".join(output.label for output in outputs), sections)


def is_results(path: Path) -> bool:
    """Whether a file is a results.json of an earlier call."""
    return {"headline", "baseline", "seconds"} <= runs.read_record(path).keys()


def is_page(path: Path) -> bool:
    """Whether a file is a page of an earlier call."""
    with open(path, "rb") as f:
        return f"<title>{TITLE}</title>".encode() in f.read(4096)


def labels_of(folders: list[Path]) -> dict[Path, str]:
    """A short name for each folder: its last part, or the whole path where two share that."""
    times = Counter(folder.resolve().name for folder in folders)
    return {folder: folder.resolve().name if times[folder.resolve().name] == 1 else str(folder) for folder in folders}


def main(options: Options) -> None:
    if not options.output_dir:
        raise UserError("--output_dir is required")
    folders = list(dict.fromkeys(require_file(folder, "output_dir") for folder in options.output_dir))
    results = {folder: results_of(folder, options.seed) for folder in folders}
    tables = {folder / "results.json": own for folder, own in results.items()}
    path = Path(options.report_file or folders[0] / "report.html")
    if path.resolve() in [table.resolve() for table in tables]:
        raise UserError(
            f"--report_file {path}: the table goes there, expected another name; choose one like report.html"
        )

    def make_room() -> None:
        runs.make_room(options, lambda file: is_results(file) if file in tables else is_page(file), path, *tables)

    if not options.overwrite:
        make_room()  # refuses before the page, which may take minutes, is made
    for folder, own in results.items():
        print(f"test rows, by item, full catalog ({printable(str(folder))})")
        print(tables_of(own))
    page = page_of(outputs_of(results), options)
    make_room()
    for file, own in tables.items():
        write_json(file, own)
    with atomic_file(path) as f:
        f.write(page)
    print(f"\nreport       {printable(str(path))}")


if __name__ == "__main__":
    run(main, Options)
