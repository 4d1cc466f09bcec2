"""The table of a run: what its stages measured on the test rows, side by side.

    python report.py --output_dir output/quickstart

Reads what the stages of run.sh left in `output_dir`: metrics, ranks of the targets, run records. Prints a table by item in
the headline protocol (minionerec/evaluation/protocols.py) with the 95 % interval of NDCG@10 over rows, and each model's
paired difference to the best baseline, marked ~ where its 95 % interval contains 0. Writes `results.json`:

    {"headline": "all" or "unseen", "rows": …, "best_baseline": …,
     "sasrec": {"HR@5": …, …, "NDCG@20": …, "interval": {"NDCG@10": [low, high], …},
                "minus_best_baseline": {"NDCG@10": [difference, low, high], …},
                "other": {the same metrics in the other protocol}}, …,
     "seconds": {stage: …}}
"""

from dataclasses import dataclass
from pathlib import Path

from minionerec.common.errors import UserError
from minionerec.common.files import read_json, require_file, write_json
from minionerec.common.options import RUNTIME, option, run

BASELINES = ("popularity", "markov", "sasrec", "gru4rec", "caser")
FILES = {name: (f"{name}/metrics.json", f"{name}/ranks.npz") for name in BASELINES}
FILES |= {name: (f"{name}.metrics.json", f"{name}.ranks.npz") for name in ("sft", "rl")}
FILES["blend"] = ("rl.blend.metrics.json", "rl.blend.ranks.npz")
CUTOFFS = (5, 10, 20)
METRICS = [f"{metric}@{k}" for metric in ("HR", "NDCG") for k in CUTOFFS]
COMPARED = ("HR@10", "NDCG@10", "HR@50")


@dataclass
class Options:
    output_dir: str = option("", "folder of a finished run of run.sh", role=RUNTIME)


def by_item(metrics: dict, protocol: str) -> dict:
    """The part of a metrics file that a table shows."""
    return metrics if protocol == "all" else metrics["unseen"]


def read(folder: Path) -> tuple[dict[str, dict], dict]:
    """(metrics, ranks by item in the headline protocol) of every model that was scored."""
    import numpy as np

    metrics = {
        name: read_json(folder / file, "output_dir") for name, (file, _) in FILES.items() if (folder / file).exists()
    }
    if not metrics:
        raise UserError(f"{folder}: found no metrics of a stage; run run.sh with OUTPUT={folder} first")
    protocol = next(iter(metrics.values()))["headline"]
    ranks = {}
    for name in metrics:
        with np.load(folder / FILES[name][1], allow_pickle=False) as arrays:
            ranks[name] = arrays[f"{protocol}_item"]
    return metrics, ranks


def differences(ranks, best: str, name: str) -> dict[str, list[float]]:
    """`{metric: [difference, low, high]}` of a model's rows less those of `best`; 95 % intervals over rows."""
    import numpy as np

    from minionerec.evaluation.metrics import values_of_rows

    found, rng = {}, np.random.default_rng(0)
    drawn = rng.integers(len(ranks[name]), size=(1000, len(ranks[name])))
    for metric in COMPARED:
        gap = values_of_rows(ranks[name], metric) - values_of_rows(ranks[best], metric)
        low, high = np.percentile(gap[drawn].mean(axis=1), [2.5, 97.5])
        found[metric] = [round(float(x), 6) for x in (gap.mean(), low, high)]
    return found


def results_of(metrics: dict[str, dict], ranks) -> dict:
    """What `results.json` holds, seconds left out."""
    first = next(iter(metrics.values()))
    protocol, other = first["headline"], {"all": "unseen", "unseen": "all"}[first["headline"]]
    known = [name for name in BASELINES if name in metrics]
    best = max(known, key=lambda name: by_item(metrics[name], protocol)["item"]["NDCG@10"]) if known else ""
    results = {"headline": protocol, "rows": first["rows"], "best_baseline": best}
    for name, content in metrics.items():
        shown = by_item(content, protocol)
        results[name] = {metric: shown["item"][metric] for metric in METRICS}
        results[name]["interval"] = {metric: shown["intervals"][metric] for metric in ("HR@10", "NDCG@10")}
        results[name]["other"] = {metric: by_item(content, other)["item"][metric] for metric in METRICS}
        if best and name != best and len(ranks[name]) == len(ranks[best]):
            results[name]["minus_best_baseline"] = differences(ranks, best, name)
    return results


def seconds_of(folder: Path) -> dict[str, float]:
    """Seconds of each stage that left a record, in the order in which they ended."""
    records = [read_json(path, "output_dir") for path in folder.rglob("*run.json") if ".1" not in path.parent.name]
    records = sorted((r for r in records if "seconds" in r), key=lambda r: r["started"] + r["seconds"])
    return {
        f"{r['stage']}{'/' + r['settings']['model'] if r['stage'] == 'baseline' else ''}": r["seconds"] for r in records
    }


def lines_of(results: dict) -> list[str]:
    """The table as text."""
    names = [name for name in FILES if name in results]
    best = results["best_baseline"]
    lines = [" " * 12 + "".join(f"{metric:>9}" for metric in METRICS) + f"{'95 % NDCG@10':>17}{'less ' + best:>20}"]
    for name in names:
        row = results[name]
        low, high = row["interval"]["NDCG@10"]
        cells = "".join(f"{row[metric]:>9.4f}" for metric in METRICS) + f"{f'{low:.4f}-{high:.4f}':>17}"
        if "minus_best_baseline" in row:
            gap, low, high = row["minus_best_baseline"]["NDCG@10"]
            cells += f"{'~ ' * (low <= 0 <= high) + f'{gap:+.4f}':>20}"
        lines.append(f"{name:<12}{cells}")
    return lines


def main(options: Options) -> None:
    folder = require_file(options.output_dir, "output_dir")
    metrics, ranks = read(folder)
    results = results_of(metrics, ranks)
    results["seconds"] = seconds_of(folder)
    write_json(folder / "results.json", results)
    repeats = next(iter(metrics.values()))["repeats"]["train"]
    print(f"{results['rows']} test rows, by item, full catalog, {results['headline']} items ({folder})")
    print("\n".join(lines_of(results)))
    print(
        f"{results['headline']} items, because {repeats:.1%} of train's targets repeat an item of their user; results.json "
        "has the other protocol. ~: within the paired 95 % interval. Digits repeat on one type of processor only."
    )


if __name__ == "__main__":
    run(main, Options)
