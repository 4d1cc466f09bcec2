"""Baselines tuned on valid, then tested with several seeds: mean and spread beside popularity and the Markov chain.

    python -m benchmarks.baselines --dataset_dir ../shared/data/industrial --output_dir output/baselines/industrial
    python -m benchmarks.baselines ... --models sasrec --shard 0/8 &  # of eight processes that share out the work

Each model is trained with every combination of its grid (config/baselines.yaml) and one seed. The combination with
the best valid NDCG@10 is trained again with each of `--seeds`, and only then is test scored. Every finished training
is a line of `runs.jsonl`: a killed command goes on, and a changed grid trains only what is new. With `--shard`, a
process trains its part of all grids and ends without test; the same command without it then finishes.
"""

import hashlib
import itertools
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import polars as pl
import yaml
from transformers.hf_argparser import HfArg

import sasrec
from data import read_sequences
from minionerec.baselines.counts import markov, popularity
from minionerec.baselines.models import MODELS
from minionerec.baselines.training import Scorer, fit, item_and_sid_ranks, scorer
from minionerec.catalog.catalog import Catalog, target_counts
from minionerec.catalog.items import read_info
from minionerec.common.errors import UserError
from minionerec.common.files import require_file
from minionerec.common.options import run
from minionerec.evaluation.metrics import format_table, table

CUTOFFS = (5, 10, 20)
NOT_FOR_GRIDS = {"train_file", "valid_file", "test_file", "info_file", "output_dir", "model", "seed", "device"}


@dataclass
class Options:
    dataset_dir: str = HfArg(help="folder with train/*.csv, valid/*.csv, test/*.csv and info/*.txt, one file each")
    output_dir: str = HfArg(help="folder that gets runs.jsonl")
    models: str = HfArg(default=",".join(MODELS), help="models to train, by commas")
    grid: str = HfArg(default="config/baselines.yaml", help="for each model its settings: a flag's value, or a list")
    seeds: str = HfArg(default="1,2,3", help="seeds of the chosen settings, by commas")
    tuning_seed: int = HfArg(default=1, help="seed of every run of the grid")
    shard: str = HfArg(default="", help="i/n: train every n-th setting of the grid, from i (counted from 0), and end")
    device: str = HfArg(default="", help="cpu, cuda, ...; cuda if there is one when left out")
    json: bool = HfArg(default=False, help="print the results as JSON in the last line")


# ------------------------------------------------------------------------------------------------ options and files


def parse_list(text: str, flag: str, convert, allowed: str) -> list:
    """The values of a flag that are separated by commas; raises `UserError`."""
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


def fits(value, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


def read_grid(path: str, models: list[str]) -> dict[str, list[dict]]:
    """For each model, every combination of its settings in the file; raises `UserError` naming the flag."""
    try:
        content = yaml.safe_load(require_file(path, "grid").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({error}); check --grid") from None
    allowed = {field.name: field.type for field in fields(sasrec.Options) if field.name not in NOT_FOR_GRIDS}
    settings = {}
    for model in models:
        flags = content.get(model) if isinstance(content, dict) else None
        if not isinstance(flags, dict):
            raise UserError(f"{path}: found no settings of {model}, expected 'flag: value' lines under '{model}:'")
        values = {flag: value if isinstance(value, list) else [value] for flag, value in flags.items()}
        for flag, choices in values.items():
            kind = allowed.get(flag)
            if kind is None or not choices or not all(fits(choice, kind) for choice in choices):
                expected = f"values of type {kind.__name__}" if kind else f"one of {', '.join(allowed)}"
                raise UserError(f"{path}, {model}: found {flag}: {flags[flag]!r}, expected {expected}")
        settings[model] = [dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())]
        for one in settings[model]:
            sasrec.check(sasrec.Options(model=model, **one))
    return settings


def every_flag(model: str, settings: dict) -> dict:
    """The settings with sasrec.py's defaults where they are silent: what a result depends on."""
    options = asdict(sasrec.Options(model=model, **settings))
    return {flag: value for flag, value in options.items() if flag not in NOT_FOR_GRIDS}


class Data:
    """The catalog and the rows of a data set in the published layout."""

    def __init__(self, folder: str):
        self.files = {part: one_file(folder, part) for part in ("train", "valid", "test", "info")}
        digests = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in self.files.values())
        self.digest = hashlib.sha256(digests).hexdigest()[:16]
        self.sids, self.read_before = read_info(self.files["info"], "dataset_dir").sids, {}
        default = sasrec.Options.__dataclass_fields__["max_history"].default
        self.catalog = Catalog(self.sids, target_counts(self.rows("train", default), len(self.sids)))

    def rows(self, part: str, max_history: int) -> pl.DataFrame:
        """The rows of train, valid or test."""
        key = part, max_history
        if key not in self.read_before:
            self.read_before[key] = read_sequences(self.files[part], self.sids, "dataset_dir", max_history)
        return self.read_before[key]


def one_file(folder: str, part: str) -> Path:
    """The one file of a part of the data set; raises `UserError` if there is none or another."""
    suffix = "txt" if part == "info" else "csv"
    found = sorted((require_file(folder, "dataset_dir") / part).glob(f"*.{suffix}"))
    if len(found) != 1:
        raise UserError(f"{folder}/{part}: found {len(found)} files *.{suffix}, expected one; check --dataset_dir")
    return found[0]


# ------------------------------------------------------------------------------------------------ runs


class Runs:
    """`runs.jsonl`: one line a finished training; a line that a kill cut short is no run."""

    def __init__(self, folder: str):
        self.path = Path(folder) / "runs.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.found = {}
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self.found[json.dumps(entry["key"], sort_keys=True)] = entry["result"]
            except (ValueError, KeyError, TypeError):
                continue
        self.cut = bool(text) and not text.endswith("\n")

    def get_or_make(self, key: dict, make) -> dict:
        """The result under `key`, made by `make()` and appended if it is not there."""
        text = json.dumps(key, sort_keys=True)
        if text not in self.found:
            self.found[text] = make()
            line = json.dumps({"key": key, "result": self.found[text]}) + "\n"
            with open(self.path, "a", encoding="utf-8") as f:  # one write: shards append side by side
                f.write("\n" * self.cut + line)
            self.cut = False
        return self.found[text]


def measure(score: Scorer, data: Data, max_history: int) -> dict:
    """`{"valid": …, "test": …}`: all metrics by item."""
    parts = {part: data.rows(part, max_history) for part in ("valid", "test")}
    return {part: table(item_and_sid_ranks(score, rows, data.catalog)[0]) for part, rows in parts.items()}


def train(data: Data, model: str, settings: dict, seed: int, device: str, test: bool) -> dict:
    """One training: best valid NDCG@10, its epoch, seconds; with `test` also all metrics of valid and test."""
    options = sasrec.Options(model=model, seed=seed, device=device, **settings)
    started = time.perf_counter()
    rows = [data.rows(part, options.max_history) for part in ("train", "valid")]
    trained = fit(options, *rows, data.catalog)
    result = {"valid_ndcg": trained.ndcg, "epoch": trained.epoch, "seconds": round(time.perf_counter() - started, 1)}
    return result | (measure(scorer(trained.model), data, options.max_history) if test else {})


def mean_and_spread(results: list[dict]) -> dict[str, dict]:
    """`{"test": …, "test ±": …, "valid": …, "valid ±": …}`: means and sample standard deviations over seeds."""
    rows = {}
    for part in ("test", "valid"):
        values = {name: [result[part][name] for result in results] for name in results[0][part]}
        rows[part] = {name: statistics.mean(v) for name, v in values.items()}
        rows[f"{part} ±"] = {name: statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in values.items()}
    return rows


def main(options: Options) -> None:
    models = parse_list(options.models, "models", lambda name: MODELS[name].name, "some of " + ", ".join(MODELS))
    seeds = parse_list(options.seeds, "seeds", int, "whole numbers")
    shard, shards = parse_shard(options.shard)
    grid = read_grid(options.grid, models)
    data, runs = Data(options.dataset_dir), Runs(options.output_dir)

    def trained(model: str, settings: dict, seed: int, test: bool) -> dict:
        """One training, from `runs` or made now."""
        key = {"data": data.digest, "model": model, "settings": every_flag(model, settings), "seed": seed, "test": test}
        print(f"{model}, {'test with ' * test}seed {seed}: {json.dumps(settings)}", flush=True)
        return runs.get_or_make(key, lambda: train(data, model, settings, seed, options.device, test))

    if options.shard:  # a part of the grid, on valid
        jobs = [(model, settings) for model in models for settings in grid[model]]
        for model, settings in jobs[shard::shards]:
            trained(model, settings, options.tuning_seed, test=False)
        return

    # the counts, which have nothing to tune
    max_history = sasrec.Options.__dataclass_fields__["max_history"].default
    results = {}
    for name, count in (("popularity", popularity), ("markov", markov)):
        results[name] = measure(count(data.rows("train", max_history), len(data.sids)), data, max_history)

    # each model: the grid on valid, then the best of it on test
    for model in models:
        tuned = [trained(model, settings, options.tuning_seed, test=False)["valid_ndcg"] for settings in grid[model]]
        best = grid[model][tuned.index(max(tuned))]
        each = [trained(model, best, seed, test=True) for seed in seeds]
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
            print(f"{model}: {json.dumps(result['settings'])}, {result['seconds']} s a training; grid on valid {tuned}")


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # repeatable sums on a GPU
    run(main, Options)
