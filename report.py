"""The table of a run: what its stages measured on the test rows, side by side.

    python report.py --output_dir output/quickstart

Reads the metrics that each stage of run.sh left in `output_dir` and the seconds in `output_dir/stages`; writes
`results.json`: `{"popularity": {"HR@5": …}, "markov": …, "sasrec": …, "gru4rec": …, "sft": …, "rl": …, "seconds":
{stage: …}}`, by item over the full catalog, and prints it.
"""

from dataclasses import dataclass
from pathlib import Path

from minionerec.common.files import read_json, require_file, write_json
from minionerec.common.options import option, run
from minionerec.evaluation.metrics import format_table

FILES = {
    "popularity": "popularity/metrics.json",
    "markov": "markov/metrics.json",
    "sasrec": "sasrec/metrics.json",
    "gru4rec": "gru4rec/metrics.json",
    "sft": "sft.metrics.json",
    "rl": "rl.metrics.json",
}
CUTOFFS = (5, 10, 20)


@dataclass
class Options:
    output_dir: str = option("", "folder of a finished run of run.sh")


def main(options: Options) -> None:
    folder = require_file(options.output_dir, "output_dir")
    rows = {name: read_json(folder / file, "output_dir")["item"] for name, file in FILES.items()}
    names = [f"{metric}@{k}" for metric in ("HR", "NDCG") for k in CUTOFFS]
    results = {model: {name: row[name] for name in names} for model, row in rows.items()}
    marks = sorted(Path(folder, "stages").glob("*.done"), key=lambda path: path.stat().st_mtime_ns)
    results["seconds"] = {path.stem: int(path.read_text(encoding="utf-8").split("\n", 1)[0]) for path in marks}
    write_json(folder / "results.json", results)
    print(f"test rows, by item, full catalog ({folder})")
    print(format_table({model: results[model] for model in FILES}, CUTOFFS))


if __name__ == "__main__":
    run(main, Options)
