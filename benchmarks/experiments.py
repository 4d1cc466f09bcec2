"""SFT, RL and baselines side by side: trained, scored on valid and on test, with several seeds, several at a time.

    python -m benchmarks.experiments --plan benchmarks/plans/rl.yaml --dataset_dir ../shared/data/industrial \
        --output_dir output/experiments/industrial --bases tiny=output/base --jobs 2

A plan names its runs. Each is a launcher with variables; `base` names a model of --bases, `start` the run whose
checkpoint an RL run begins with, `cf` the one whose model its sasrec reward asks, `rows` how many rows of valid and
test are scored (all, if it is left out):

    seeds: [1, 2, 3]
    runs:
      sft:  {stage: sft, base: tiny, env: {SFT_TASKS: sid_seq}}
      gru:  {stage: sasrec, env: {MODEL: gru4rec}}
      rule: {stage: rl, start: sft, env: {REWARD_TYPE: rule}}
      both: {stage: rl, start: sft, cf: gru, env: {REWARD_TYPE: "rule,sasrec"}}

Every finished run is a line of `runs.jsonl`: a killed command goes on. Settings are compared by valid NDCG@10; test
figures stand beside it, and choosing by them would be choosing on test. Scores are by item, with 50 beams. The second
table sets each RL run against the start of the same seed, row by row.
"""

import functools
import json
import os
import statistics
import subprocess
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import yaml
from transformers.hf_argparser import HfArg

from minionerec.common.errors import UserError
from minionerec.common.files import require_file
from minionerec.common.options import run
from minionerec.evaluation import metrics

COLUMNS = ["valid NDCG@10", *(f"test {m}@{k}" for m in ("HR", "NDCG") for k in (1, 3, 5, 10, 20, 50))]
METRICS = list(metrics.table(np.zeros(1)))
NEEDS = ("start", "cf")  # keys of a run that name another run


@dataclass
class Options:
    plan: str = HfArg(default="", help="the runs, a YAML file")
    dataset_dir: str = HfArg(default="", help="a folder in the published layout, one file of each kind")
    output_dir: str = HfArg(default="", help="folder for checkpoints, logs and runs.jsonl")
    bases: str = HfArg(default="", help="the plan's base models: name=folder, by commas")
    category: str = HfArg(default="", help="what the prompts call the items")
    seeds: str = HfArg(default="", help="seeds by commas; default: the plan's")
    only: str = HfArg(default="", help="these runs alone, by commas, and those they start from; default: all")
    jobs: int = HfArg(default=1, help="runs at a time")
    table: bool = HfArg(default=False, help="print the table of what is finished, run nothing")


class Data:
    """The files of a data set as the launchers' variables."""

    def __init__(self, folder: str):
        self.folder = require_file(folder, "dataset_dir")
        self.train, self.valid, self.test = (self._one(f"{split}/*.csv") for split in ("train", "valid", "test"))
        self.info = self._one("info/*.txt")
        self.index, self.items = (self._one(f"*.{kind}.json", f"index/*.{kind}.json") for kind in ("index", "item"))

    def _one(self, *patterns: str) -> str:
        found = [path for pattern in patterns for path in self.folder.glob(pattern)]
        if len(found) != 1:
            raise UserError(f"{self.folder}: found {len(found)} files like {' or '.join(patterns)}, expected one")
        return str(found[0])


def read_plan(options: Options) -> tuple[dict, list[int]]:
    """(runs by name, seeds); raises `UserError` naming the run that cannot be."""
    path = require_file(options.plan, "plan")
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
        runs, seeds = plan["runs"], plan.get("seeds", [42])
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a plan ({error!r}); compare it with benchmarks/plans/rl.yaml") from None
    for name, settings in runs.items():
        stage, start, cf = (settings.get(key) for key in ("stage", *NEEDS))
        known = stage in ("sft", "sasrec", "rl") and (stage == "rl") == (start is not None) >= (cf is not None)
        if not known or any(other is not None and other not in runs for other in (start, cf)):
            raise UserError(
                f"{path}: run {name} has stage {stage!r}, start {start!r} and cf {cf!r}; expected sft or sasrec, or rl "
                "with another run as its start"
            )
    if options.only:
        wanted = options.only.split(",")
        for name in wanted:
            if name not in runs:
                raise UserError(f"--only {options.only}: no run {name!r} in {path}, expected some of {', '.join(runs)}")
            wanted += [runs[name][key] for key in NEEDS if key in runs[name]]
        runs = {name: settings for name, settings in runs.items() if name in wanted}
    return runs, [int(seed) for seed in options.seeds.split(",")] if options.seeds else seeds


class Experiments:
    """Runs a plan; `runs.jsonl` in the output folder says what is finished."""

    def __init__(self, options: Options, runs: dict, seeds: list[int]):
        self.options, self.runs, self.seeds = options, runs, seeds
        self.data = Data(options.dataset_dir)
        self.folder = Path(options.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.bases = dict(part.split("=", 1) for part in options.bases.split(",") if "=" in part)
        self.lock = threading.Lock()
        self.log = self.folder / "runs.jsonl"
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        self.done = {(line["run"], line["seed"]): line for line in map(json.loads, lines)}

    def key(self, name: str) -> dict:
        """All that makes a run's result, the settings of the runs that it needs included."""
        settings = self.runs[name]
        return settings | {key: self.key(settings[key]) for key in NEEDS if key in settings}

    def environment(self, name: str, seed: int, place: int) -> dict[str, str]:
        settings, folder = self.runs[name], self.folder / f"{name}-{seed}"
        env = {
            "TRAIN_FILE": self.data.train, "EVAL_FILE": self.data.valid, "INFO_FILE": self.data.info,
            "VALID_FILE": self.data.valid, "TEST_FILE": self.data.test,
            "SID_INDEX_PATH": self.data.index, "ITEM_META_PATH": self.data.items, "CATEGORY": self.options.category,
            "OUTPUT_DIR": folder / "model", "SEED": seed, "NPROC": 1, "MASTER_PORT": 29600 + place,
        }  # fmt: skip
        if settings["stage"] == "sft":
            if settings["base"] not in self.bases:
                raise UserError(f"--bases {self.options.bases}: run {name} needs {settings['base']}=folder")
            env["BASE_MODEL"] = self.bases[settings["base"]]
        if settings["stage"] == "rl":
            env["MODEL_PATH"] = self.folder / f"{settings['start']}-{seed}" / "model"
            env["CF_PATH"] = self.folder / f"{settings['cf']}-{seed}" / "model" if "cf" in settings else ""
            env["ACCELERATE_CONFIG"] = "config/ddp.yaml" if _has_gpu() else "config/cpu.yaml"
        return {key: str(value) for key, value in (env | settings.get("env", {})).items()}

    def launch(self, script: str, env: dict[str, str], log: Path) -> None:
        with open(log, "a", encoding="utf-8") as f:
            code = subprocess.run(["bash", script], env=os.environ | env, stdout=f, stderr=subprocess.STDOUT).returncode
        if code:
            raise RuntimeError(f"{script} ended with {code}; see {log}")

    def train_and_score(self, name: str, seed: int, place: int, needed: list[Future]) -> None:
        for future in needed:
            future.result()
        settings = self.key(name)
        if (self.done.get((name, seed)) or {}).get("settings") == settings:
            return
        started, folder = time.time(), self.folder / f"{name}-{seed}"
        folder.mkdir(exist_ok=True)
        env = self.environment(name, seed, place)
        self.launch(f"{self.runs[name]['stage']}.sh", env, folder / "log.txt")
        trained = time.time() - started
        line = {"run": name, "seed": seed, "settings": settings, "seconds": round(trained)}
        for split in ("valid", "test"):
            if settings["stage"] == "sasrec":
                scores = json.loads((Path(env["OUTPUT_DIR"]) / "metrics.json").read_text(encoding="utf-8"))
                line[split] = scores["valid" if split == "valid" else "item"]
                continue
            result = folder / f"{split}.json"
            scoring = {"BASE_MODEL": env["OUTPUT_DIR"], "TEST_DATA_PATH": getattr(self.data, split), "NUM_BEAMS": "50"}
            scoring |= {"BATCH_SIZE": "64", "RESULT_JSON_DATA": str(result), "SAMPLE": str(settings.get("rows", -1))}
            self.launch("evaluate.sh", env | scoring, folder / "log.txt")
            line[split] = json.loads(result.with_suffix(".metrics.json").read_text(encoding="utf-8"))["item"]
        with self.lock:
            self.done[name, seed] = line
            with open(self.log, "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
        print(f"{name} seed {seed}: valid NDCG@10 {line['valid']['NDCG@10']:.4f}, {trained:.0f} s", flush=True)

    def all(self) -> None:
        futures: dict[tuple[str, int], Future] = {}
        with ThreadPoolExecutor(self.options.jobs) as pool:
            # What is needed first: a run that waits for another then never keeps that one from a free place.
            for name in sorted(self.runs, key=lambda name: "start" in self.runs[name]):
                for seed in self.seeds:
                    needed = [futures[self.runs[name][key], seed] for key in NEEDS if key in self.runs[name]]
                    futures[name, seed] = pool.submit(self.train_and_score, name, seed, len(futures), needed)
        failed = [f"{name} seed {seed}: {f.exception()}" for (name, seed), f in futures.items() if f.exception()]
        if failed:
            raise UserError(f"{len(failed)} of {len(futures)} runs failed; {failed[0]}")

    def table(self) -> str:
        """Mean and standard deviation over seeds, in units of 1e-4, a line for each run."""
        lines = ["| run | seeds | " + " | ".join(COLUMNS) + " | s |", "|---" * (len(COLUMNS) + 3) + "|"]
        for name in self.runs:
            found = [self.done[name, seed] for seed in self.seeds if (name, seed) in self.done]
            if not found:
                continue
            cells = []
            for column in COLUMNS:
                split, metric = column.split()
                values = [line[split][metric] * 1e4 for line in found]
                spread = f" ±{statistics.stdev(values):.0f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.0f}{spread}")
            seconds = statistics.mean(line["seconds"] for line in found)
            lines.append(f"| {name} | {len(found)} | " + " | ".join(cells) + f" | {seconds:.0f} |")
        return "\n".join(lines)

    def differences(self) -> str:
        """RL less its start, the mean over seeds, with 95 % intervals over the rows and each seed's NDCG@10."""
        lines = ["| run less its start | " + " | ".join(COLUMNS) + " | seeds' test NDCG@10 |"]
        lines += ["|---" * (len(COLUMNS) + 2) + "|"]
        for name, settings in self.runs.items():
            start = settings.get("start")
            seeds = [seed for seed in self.seeds if {(name, seed), (start, seed)} <= self.done.keys()]
            if not start or not seeds or settings.get("rows") or self.runs[start].get("rows"):
                continue  # rows drawn by seed are others for each seed
            cells = []
            for column in COLUMNS:
                split, metric = column.split()
                gains = [self.gains(name, seed, split) - self.gains(start, seed, split) for seed in seeds]
                gains = np.stack(gains)[:, :, METRICS.index(metric)] * 1e4  # (seeds, rows)
                drawn = np.random.default_rng(0).integers(gains.shape[1], size=(1000, gains.shape[1]))
                low, high = np.percentile(gains.mean(axis=0)[drawn].mean(axis=1), [2.5, 97.5])
                cells.append(f"{gains.mean():+.0f} [{low:+.0f}, {high:+.0f}]")
                if column == "test NDCG@10":
                    each = " ".join(f"{gain:+.0f}" for gain in gains.mean(axis=1))
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {each} |")
        return "\n".join(lines) if len(lines) > 2 else ""

    @functools.cache  # noqa: B019 an object lives as long as the process
    def gains(self, name: str, seed: int, split: str) -> np.ndarray:
        """(rows, METRICS): the metrics of each row by itself, by item."""
        rows = pl.read_parquet(self.folder / f"{name}-{seed}" / f"{split}.parquet")
        ranks = []
        for groups, target in zip(rows["predict_item_id"].to_list(), rows["item_id"].to_list(), strict=True):
            items = [item for group in groups for item in group]
            ranks.append(items.index(target) if target in items else metrics.MISSED)
        distinct, inverse = np.unique(ranks, return_inverse=True)
        return np.array([list(metrics.table(np.array([rank])).values()) for rank in distinct])[inverse]


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
