"""SFT, RL and baselines side by side: trained, scored on valid and on test, with several seeds, several at a time.

    python -m benchmarks.experiments --plan benchmarks/plans/rl.yaml --dataset_dir data/industrial \\
        --output_dir output/experiments/industrial --bases tiny=output/base --jobs 2

A plan names its runs. Each is a launcher with variables (`env`), and these keys:

    base       SFT: a model of --bases. A run of --models has its model already
    start      RL: the run whose checkpoint it begins with
    baseline   RL: the run whose model its reward uses
    sids       a folder of --sids_dir: the data with other SIDs (benchmarks/sid_variants.py). Its path replaces {sids}
    rows       rows of valid and test that are scored, drawn by seed; default: all

    seeds: [1, 2, 3]
    runs:
      sft:  {stage: sft, base: tiny, env: {SFT_TASKS: sid_seq}}
      gru:  {stage: sasrec, env: {MODEL: gru4rec}}
      rule: {stage: rl, start: sft, env: {REWARD_TYPE: rule}}
      both: {stage: rl, start: sft, baseline: gru, env: {REWARD_TYPE: "rule,sasrec"}}

The stages skip what is finished, so a killed command continues, and a changed plan trains only what it changes. Settings
are compared by valid NDCG@10. Test figures are printed next to it; choosing by them would be choosing on test. Scores are
by item in the headline protocol of the data, with 50 beams. The second table compares each RL run with its start, and each
other SFT run with the first, of the same seed and row by row.
"""

import functools
import json
import os
import statistics
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from benchmarks.dataset import Files, files_of
from minionerec.common.errors import UserError
from minionerec.common.files import read_json, require_file, write_json
from minionerec.common.options import INPUT, OUTPUT, option, run
from minionerec.common.runs import RECORD, read_record
from minionerec.evaluation import metrics

COLUMNS = ["valid NDCG@10", *(f"test {m}@{k}" for m in ("HR", "NDCG") for k in (1, 3, 5, 10, 20, 50))]
METRICS = list(metrics.table(np.zeros(1)))
NEEDS = ("start", "baseline")  # keys of a run that name another run


@dataclass
class Options:
    plan: str = option("", "the runs, a YAML file", role=INPUT)
    dataset_dir: str = option("", "a folder in the published layout, one file of each kind", role=INPUT)
    sids_dir: str = option("", "folder of data set folders with other SIDs, for runs that name `sids`", role=INPUT)
    output_dir: str = option("", "folder for checkpoints, predictions and logs", role=OUTPUT)
    bases: str = option("", "the plan's base models: name=folder, separated by commas")
    models: str = option(
        "", "runs that are scored but not trained: name=folder of the model, for all seeds, separated by commas"
    )
    category: str = option("", "what the prompts call the items")
    seeds: str = option("", "seeds separated by commas; default: the plan's")
    env: str = option("", "variables for all runs, in place of the plan's: NAME=value, separated by commas")
    only: str = option("", "only these runs, separated by commas, and those they start from; default: all")
    jobs: int = option(1, "runs at a time")
    table: bool = option(False, "print the table of what is finished, run nothing")


def read_plan(options: Options) -> tuple[dict, list[int]]:
    """(runs by name, seeds); raises `UserError` naming an invalid run."""
    path = require_file(options.plan, "plan")
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
        runs, seeds = {name: dict(settings) for name, settings in plan["runs"].items()}, plan.get("seeds", [42])
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not a plan ({error!r}); compare it with benchmarks/plans/rl.yaml") from None
    for name, settings in runs.items():
        stage, start, baseline = (settings.get(key) for key in ("stage", *NEEDS))
        known = stage in ("sft", "sasrec", "rl") and (stage == "rl") == (start is not None) >= (baseline is not None)
        if not known or any(other is not None and other not in runs for other in (start, baseline)):
            raise UserError(
                f"{path}: run {name} has stage {stage!r}, start {start!r} and baseline {baseline!r}; expected sft or "
                "sasrec, or rl with another run as its start"
            )
    if options.only:
        wanted = options.only.split(",")
        for name in wanted:
            if name not in runs:
                raise UserError(f"--only {options.only}: no run {name!r} in {path}, expected some of {', '.join(runs)}")
            wanted += [runs[name][key] for key in NEEDS if key in runs[name]]
        runs = {name: settings for name, settings in runs.items() if name in wanted}
    changed = pairs("--env", options.env)
    for settings in runs.values():
        settings["env"] = settings.get("env", {}) | changed
    return runs, [int(seed) for seed in options.seeds.split(",")] if options.seeds else seeds


class Experiments:
    """Runs a plan. Each run and seed has a folder with its model, predictions, log and, once scored, its settings."""

    def __init__(self, options: Options, runs: dict, seeds: list[int]):
        self.options, self.runs, self.seeds = options, runs, seeds
        for name in runs:
            self.data(name)  # a missing folder is better named now
        self.folder = Path(options.output_dir)
        self.bases = pairs("--bases", options.bases)
        self.models = pairs("--models", options.models)
        for name, folder in self.models.items():
            if name not in runs:
                raise UserError(f"--models: no run {name!r}, expected some of {', '.join(runs)}")
            needed = "metrics.json" if runs[name]["stage"] == "sasrec" else "config.json"
            require_file(str(Path(folder) / needed), "models")

    def settings(self, name: str) -> dict:
        """All that the plan says of a run, the settings of the runs that it needs included."""
        own = self.runs[name] | ({"model": self.models[name]} if name in self.models else {})
        return own | {key: self.settings(own[key]) for key in NEEDS if key in own}

    def data(self, name: str) -> Files:
        """The files of a run: those of its `sids`, or of the run that it starts from, or of --dataset_dir."""
        settings = self.runs[name]
        if "start" in settings:
            return self.data(settings["start"])
        if "sids" in settings:
            return files_of(str(Path(self.options.sids_dir) / settings["sids"]), "sids_dir")
        return files_of(self.options.dataset_dir)

    def place(self, name: str, seed: int) -> Path:
        return self.folder / f"{name}-{seed}"

    def model(self, name: str, seed: int) -> Path:
        return Path(self.models.get(name, self.place(name, seed) / "model"))

    # ---------------------------------------------------------------------------------------- running

    def environment(self, name: str, seed: int) -> dict[str, str]:
        """The variables of a run's launcher."""
        settings, data = self.runs[name], self.data(name)
        env = {
            "TRAIN_FILE": data.train, "EVAL_FILE": data.valid, "INFO_FILE": data.info, "VALID_FILE": data.valid,
            "TEST_FILE": data.test, "SID_INDEX_PATH": data.index, "ITEM_META_PATH": data.items, "NPROC": 1,
            "CATEGORY": self.options.category, "SEED": seed,
            "OUTPUT_DIR": self.model(name, seed), "OVERWRITE": True,
        }  # fmt: skip
        if settings["stage"] == "sft":
            if settings["base"] not in self.bases and name not in self.models:
                raise UserError(f"--bases {self.options.bases}: run {name} needs {settings['base']}=folder")
            env["BASE_MODEL"] = self.bases.get(settings["base"], "")
        if settings["stage"] == "rl":
            env["MODEL_PATH"] = self.model(settings["start"], seed)
            env["BASELINE_PATH"] = self.model(settings["baseline"], seed) if "baseline" in settings else ""
            env["ACCELERATE_CONFIG"] = "config/ddp.yaml" if _has_gpu() else "config/cpu.yaml"
        sids = str(Path(data.index).parent)
        return {key: str(value).replace("{sids}", sids) for key, value in (env | settings.get("env", {})).items()}

    def launch(self, script: str, env: dict[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as f:
            code = subprocess.run(["bash", script], env=os.environ | env, stdout=f, stderr=subprocess.STDOUT).returncode
        if code:
            raise RuntimeError(f"{script} exited with code {code}; see {log}")

    def train_and_score(self, name: str, seed: int, needed: list[Future]) -> None:
        for future in needed:
            future.result()
        settings, folder, env = self.settings(name), self.place(name, seed), self.environment(name, seed)
        log = folder / "log.txt"
        if name not in self.models:
            self.launch(f"{settings['stage']}.sh", env, log)
        if settings["stage"] != "sasrec":  # which scores itself
            for split in ("valid", "test"):
                scoring = {
                    "BASE_MODEL": env["OUTPUT_DIR"], "TEST_DATA_PATH": getattr(self.data(name), split), "NUM_BEAMS": "50",
                    "BATCH_SIZE": "64", "RESULT_JSON_DATA": str(folder / f"{split}.json"),
                    "TEST_ROWS": str(settings.get("rows", -1)), "SAMPLE": "",
                }  # fmt: skip
                self.launch("evaluate.sh", env | scoring, log)
        write_json(folder / "settings.json", settings)
        found = self.found(name, seed)
        print(
            f"{name} seed {seed}: valid NDCG@10 {found['valid']['NDCG@10']:.4f}, {found['seconds']:.0f} s", flush=True
        )

    def all(self) -> None:
        futures: dict[tuple[str, int], Future] = {}
        with ThreadPoolExecutor(self.options.jobs) as pool:
            # Runs without a start first, so that no waiting run takes a place from the run that it waits for.
            for name in sorted(self.runs, key=lambda name: "start" in self.runs[name]):
                for seed in self.seeds:
                    needed = [futures[self.runs[name][key], seed] for key in NEEDS if key in self.runs[name]]
                    futures[name, seed] = pool.submit(self.train_and_score, name, seed, needed)
        failed = [f"{name} seed {seed}: {f.exception()}" for (name, seed), f in futures.items() if f.exception()]
        if failed:
            raise UserError(f"{len(failed)} of {len(futures)} runs failed; {failed[0]}")

    # ---------------------------------------------------------------------------------------- tables

    def found(self, name: str, seed: int) -> dict | None:
        """{"valid": metrics, "test": metrics, "seconds": of training}; None if it is not finished with these settings."""
        folder = self.place(name, seed)
        if read_record(folder / "settings.json") != json.loads(json.dumps(self.settings(name))):
            return None
        if self.runs[name]["stage"] == "sasrec":
            scores = read_json(self.model(name, seed) / "metrics.json", "output_dir")
            parts = {"valid": scores["valid"], "test": by_item(scores)}
        else:
            parts = {s: by_item(read_json(folder / f"{s}.metrics.json", "output_dir")) for s in ("valid", "test")}
        return parts | {"seconds": read_record(self.model(name, seed) / RECORD).get("seconds", 0)}

    def table(self) -> str:
        """Mean and standard deviation over seeds, in units of 1e-4, one line per run."""
        lines = ["| run | seeds | " + " | ".join(COLUMNS) + " | s |", "|---" * (len(COLUMNS) + 3) + "|"]
        for name in self.runs:
            found = list(filter(None, (self.found(name, seed) for seed in self.seeds)))
            if not found:
                continue
            cells = []
            for column in COLUMNS:
                split, metric = column.split()
                values = [result[split][metric] * 1e4 for result in found]
                spread = f" ±{statistics.stdev(values):.0f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.0f}{spread}")
            seconds = statistics.mean(result["seconds"] for result in found)
            lines.append(f"| {name} | {len(found)} | " + " | ".join(cells) + f" | {seconds:.0f} |")
        return "\n".join(lines)

    def differences(self) -> str:
        """RL minus its start and SFT minus the first SFT: means over seeds, with 95 % intervals over the rows."""
        lines = ["| run minus other | " + " | ".join(COLUMNS) + " | seeds' test NDCG@10 |"]
        lines += ["|---" * (len(COLUMNS) + 2) + "|"]
        first = next((name for name, settings in self.runs.items() if settings["stage"] == "sft"), None)
        for name, settings in self.runs.items():
            other = settings.get("start", first)
            if other == name or settings["stage"] == "sasrec":
                continue
            seeds = [seed for seed in self.seeds if self.found(name, seed) and self.found(other, seed)]
            drawn = any(self.runs[run].get("rows") for run in (name, other))
            if not seeds or drawn and len(seeds) > 1:  # rows that are drawn differ between seeds
                continue
            cells = []
            for column in COLUMNS:
                split, metric = column.split()
                gains = [self.gains(name, seed, split) - self.gains(other, seed, split) for seed in seeds]
                gains = np.stack(gains)[:, :, METRICS.index(metric)] * 1e4  # (seeds, rows)
                drawn = np.random.default_rng(0).integers(gains.shape[1], size=(1000, gains.shape[1]))
                low, high = np.percentile(gains.mean(axis=0)[drawn].mean(axis=1), [2.5, 97.5])
                cells.append(f"{gains.mean():+.0f} [{low:+.0f}, {high:+.0f}]")
                if column == "test NDCG@10":
                    each = " ".join(f"{gain:+.0f}" for gain in gains.mean(axis=1))
            lines.append(f"| {name} minus {other} | " + " | ".join(cells) + f" | {each} |")
        return "\n".join(lines) if len(lines) > 2 else ""

    @functools.cache  # noqa: B019 an object lives as long as the process
    def gains(self, name: str, seed: int, split: str) -> np.ndarray:
        """(rows, METRICS): the metrics of each single row, by item."""
        place = self.place(name, seed)
        protocol = read_json(place / f"{split}.metrics.json", "output_dir")["headline"]
        with np.load(place / f"{split}.ranks.npz") as arrays:
            distinct, inverse = np.unique(arrays[f"{protocol}_item"], return_inverse=True)
        return np.array([list(metrics.table(np.array([rank])).values()) for rank in distinct])[inverse]


def pairs(name: str, text: str) -> dict[str, str]:
    """The option `name` with the value "a=b,c=d" as {"a": "b", "c": "d"}."""
    parts = [part.split("=", 1) for part in text.split(",") if part]
    if wrong := [part[0] for part in parts if len(part) == 1]:
        raise UserError(f"{name} {text}: found {wrong[0]!r}, expected name=value")
    return dict(parts)


def by_item(scores: dict) -> dict[str, float]:
    """The metrics by item in the headline protocol, of what an evaluation has written."""
    return scores["unseen"]["item"] if scores["headline"] == "unseen" else scores["item"]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main(options: Options) -> None:
    if not options.output_dir:
        raise UserError("--output_dir is required")
    experiments = Experiments(options, *read_plan(options))
    try:
        if not options.table:
            experiments.all()
    finally:
        print(experiments.table())
        print(f"\n{experiments.differences()}".rstrip())


if __name__ == "__main__":
    run(main, Options)
