"""Baselines tuned on valid, then trained with several seeds: mean and spread, next to popularity and the Markov chain.

    python -m benchmarks.baselines --dataset_dir data/industrial --output_dir output/baselines/industrial
    python -m benchmarks.baselines ... --models sasrec --shard 0/8 &  # one of eight processes that divide the work

Each model is trained with every combination of its grid (config/baselines.yaml) and one seed. The combination with
the best valid NDCG@10 is trained with each of `--seeds`, and only its test figures are read. Each training is a run of
sasrec.py in a folder of its settings: a killed command continues, a changed grid trains only what is new, and other
data or another default trains again. With `--shard`, a process trains its part of all grids and ends; the same command
without it then finishes.
"""

import hashlib
import itertools
import json
import os
import statistics
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

import sasrec
from benchmarks.dataset import Files, files_of
from minionerec.baselines.options import COUNTS, TRAINED
from minionerec.common.errors import UserError
from minionerec.common.files import read_json, require_file
from minionerec.common.options import INPUT, OUTPUT, SETTING, option, parse, role_of, run
from minionerec.common.runs import RECORD
from minionerec.evaluation.metrics import format_table

CUTOFFS = (5, 10, 20)
NOT_FOR_GRIDS = ("model", "seed")


@dataclass
class Options:
    dataset_dir: str = option("", "folder with train/*.csv, valid/*.csv, test/*.csv and info/*.txt, one file each")
    output_dir: str = option("", "folder for the trainings", role=OUTPUT)
    models: str = option(",".join(TRAINED), "models to train, separated by commas")
    grid: str = option("config/baselines.yaml", "for each model its settings: an option's value, or a list", role=INPUT)
    seeds: str = option("1,2,3", "seeds of the chosen settings, separated by commas")
    tuning_seed: int = option(1, "seed of every run of the grid")
    shard: str = option("", "i/n: train every n-th setting of the grid, starting at i (from 0), and end")
    device: str = option("", "cpu, cuda, …; default: cuda if there is a GPU")
    json: bool = option(False, "print the results as JSON in the last line")


# ------------------------------------------------------------------------------------------------ options


def parse_list(text: str, flag: str, convert, allowed: str) -> list:
    """The values of an option that are separated by commas; raises `UserError`."""
    try:
        return [convert(part.strip()) for part in text.split(",")]
    except (ValueError, KeyError):
        raise UserError(f"--{flag} {text}: expected {allowed}, separated by commas") from None


def parse_shard(text: str) -> tuple[int, int]:
    """`"1/4"` -> `(1, 4)`; empty means all, `(0, 1)`; raises `UserError`."""
    index, _, count = (text or "0/1").partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard {text}: expected i/n with i from 0 to n - 1, such as 0/4")
    return int(index), int(count)


def settings_of(model: str, values: dict) -> sasrec.Options:
    """Options of sasrec.py; raises `UserError` for an unknown option or an invalid value."""
    return parse(sasrec.Options, [f"--model={model}", *(f"--{name}={value}" for name, value in values.items())])


def read_grid(path: str, models: list[str]) -> dict[str, list[dict]]:
    """For each model, every combination of its settings in the file; raises `UserError` naming the file."""
    try:
        content = yaml.safe_load(require_file(path, "grid").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({error}); check --grid") from None
    allowed = {f.name for f in fields(sasrec.Options) if role_of(f) == SETTING and f.name not in NOT_FOR_GRIDS}
    grid = {}
    for model in models:
        found = content.get(model) if isinstance(content, dict) else None
        if not isinstance(found, dict):
            raise UserError(f"{path}: found no settings of {model}, expected 'option: value' lines under '{model}:'")
        values = {name: value if isinstance(value, list) else [value] for name, value in found.items()}
        for name, choices in values.items():
            if name not in allowed or not choices:
                raise UserError(f"{path}, {model}: found {name}: {choices}, expected values of an option of sasrec.py")
        grid[model] = [dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())]
        for one in grid[model]:
            try:
                settings_of(model, one)
            except UserError as error:
                raise UserError(f"{path}, {model}: {error}") from None
    return grid


# ------------------------------------------------------------------------------------------------ runs


class Trainings:
    """Runs sasrec.py, each setting and seed in a folder of its name; finished runs are skipped there."""

    def __init__(self, options: Options):
        files: Files = files_of(options.dataset_dir, sids=False)
        self.folder = Path(options.output_dir)
        self.common = {"train_file": files.train, "valid_file": files.valid, "test_file": files.test}
        self.common |= {"info_file": files.info, "device": options.device, "overwrite": True}

    def run(self, model: str, settings: dict, seed: int) -> dict:
        """`{"valid": …, "test": …, "seconds": …}` of one training: metrics by item, in the headline protocol."""
        words = json.dumps(settings, sort_keys=True)
        folder = self.folder / model / f"{hashlib.blake2b(words.encode(), digest_size=4).hexdigest()}-{seed}"
        print(f"{model}, seed {seed}: {words}", flush=True)
        sasrec.main(replace(settings_of(model, settings), seed=seed, output_dir=str(folder), **self.common))
        metrics = read_json(folder / sasrec.METRICS, "output_dir")
        test = metrics["item"] if metrics["headline"] == "all" else metrics[metrics["headline"]]["item"]
        seconds = read_json(folder / RECORD, "output_dir")["seconds"]
        return {"valid": metrics["valid"], "test": test, "seconds": seconds}


def mean_and_spread(results: list[dict]) -> dict[str, dict]:
    """`{"test": …, "test ±": …, "valid": …, "valid ±": …}`: means and sample standard deviations over seeds."""
    rows = {}
    for part in ("test", "valid"):
        values = {name: [result[part][name] for result in results] for name in results[0][part]}
        rows[part] = {name: statistics.mean(v) for name, v in values.items()}
        rows[f"{part} ±"] = {name: statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in values.items()}
    return rows


def main(options: Options) -> None:
    names = {name: name for name in TRAINED}
    models = parse_list(options.models, "models", names.__getitem__, f"some of {', '.join(TRAINED)}")
    seeds = parse_list(options.seeds, "seeds", int, "whole numbers")
    shard, shards = parse_shard(options.shard)
    if not options.output_dir:
        raise UserError("--output_dir is required")
    grid = read_grid(options.grid, models)
    trainings = Trainings(options)

    if options.shard:  # a part of the grid
        jobs = [(model, settings) for model in models for settings in grid[model]]
        for model, settings in jobs[shard::shards]:
            trainings.run(model, settings, options.tuning_seed)
        return

    # the counts, which have nothing to tune
    results = {}
    for model in COUNTS:
        found = trainings.run(model, {}, options.tuning_seed)
        results[model] = {part: found[part] for part in ("valid", "test")}

    # each model: the grid on valid, then several seeds of its best combination
    for model in models:
        tuned = [trainings.run(model, settings, options.tuning_seed)["valid"]["NDCG@10"] for settings in grid[model]]
        best = grid[model][tuned.index(max(tuned))]
        each = [trainings.run(model, best, seed) for seed in seeds]
        seconds = round(statistics.median(result["seconds"] for result in each), 1)
        results[model] = mean_and_spread(each) | {"settings": best, "seconds": seconds, "grid": tuned}
    show(results, options.dataset_dir, len(seeds))
    if options.json:
        print(json.dumps(results))


def show(results: dict[str, dict], dataset_dir: str, n_seeds: int) -> None:
    """Print a table of valid, one of test, and what was chosen."""
    for part in ("valid", "test"):
        rows = {f"{m}{end}": r[f"{part}{end}"] for m, r in results.items() for end in ("", " ±") if f"{part}{end}" in r}
        print(f"\n{part}, by item, full catalog ({dataset_dir}); trained models: mean and ± of {n_seeds} seeds")
        print(format_table(rows, CUTOFFS))
    for model, result in results.items():
        if "settings" in result:
            tuned = ", ".join(f"{ndcg:.4f}" for ndcg in result["grid"])
            print(f"{model}: {json.dumps(result['settings'])}, {result['seconds']} s a run; grid on valid {tuned}")


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # repeatable sums on a GPU
    run(main, Options)
