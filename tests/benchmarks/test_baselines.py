"""benchmarks/baselines.py: chosen on valid, tested once for each seed, killed and continued, refusals."""

import dataclasses
import json
import shutil
import statistics
import sys

import pytest
import yaml

import sasrec
from benchmarks import baselines
from benchmarks.baselines import Options
from minionerec.baselines.training import fit

GRID = {"sasrec": {"hidden_size": 8, "epochs": 15, "learning_rate": [1e-5, 0.02]}}
GRID["gru4rec"] = {"hidden_size": [8, 4], "num_layers": 1, "epochs": 1, "max_history": 3}


@pytest.fixture
def options(world, tmp_path):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID))
    sizes = {"models": "sasrec,gru4rec", "seeds": "4,5", "device": "cpu", "grid": str(tmp_path / "grid.yaml")}
    return Options(dataset_dir=str(world.folder), output_dir=str(tmp_path / "out"), json=True, **sizes)


@pytest.fixture
def trainings(monkeypatch):
    """The options of every training that happens."""
    done, fit = [], fit
    monkeypatch.setattr(sasrec, "fit", lambda o, *rest: done.append(o) or fit(o, *rest))
    return done


def table_of(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def lines_of(options) -> list[dict]:
    return [json.loads(line) for line in open(f"{options.output_dir}/runs.jsonl")]


def test_the_best_on_valid_is_tested_with_every_seed(options, trainings, capsys):
    baselines.main(options)
    results, runs = table_of(capsys), lines_of(options)
    assert list(results) == ["popularity", "markov", "sasrec", "gru4rec"]
    assert len(trainings) == 2 + 2 + 2 * 2
    for model in ("sasrec", "gru4rec"):
        tuned = [r for r in runs if r["key"]["model"] == model and not r["key"]["test"]]
        tested = [r for r in runs if r["key"]["model"] == model and r["key"]["test"]]
        assert all("test" not in r["result"] and r["key"]["seed"] == 1 for r in tuned)
        best = max(tuned, key=lambda r: r["result"]["valid_ndcg"])["key"]["settings"]
        assert len({json.dumps(r["key"]["settings"]) for r in tuned}) == 2
        assert [(r["key"]["settings"], r["key"]["seed"]) for r in tested] == [(best, 4), (best, 5)]
        assert results[model]["settings"].items() <= best.items()
        for part in ("valid", "test"):
            values = [r["result"][part]["NDCG@10"] for r in tested]
            assert results[model][part]["NDCG@10"] == pytest.approx(statistics.mean(values))
            assert results[model][f"{part} ±"]["NDCG@10"] == pytest.approx(statistics.stdev(values))
            assert all(r["result"]["valid"]["NDCG@10"] == r["result"]["valid_ndcg"] for r in tested)
    assert results["sasrec"]["settings"]["learning_rate"] == 0.02  # the other hardly moves


def test_its_numbers_are_those_of_the_script(options, world, tmp_path, capsys):
    baselines.main(options)
    results, runs = table_of(capsys), lines_of(options)
    files = {f"{name}_file": str(getattr(world, name)) for name in ("train", "valid", "test", "info")}
    common = files | {"output_dir": str(tmp_path / "script"), "device": "cpu"}
    sasrec.main(sasrec.Options(**common, model="sasrec", seed=5, **results["sasrec"]["settings"]))
    script = json.loads((tmp_path / "script" / "metrics.json").read_text())
    [run] = [r["result"] for r in runs if r["key"]["test"] and r["key"]["model"] == "sasrec" and r["key"]["seed"] == 5]
    assert run["test"] == script["item"] and run["valid"] == script["valid"]
    sasrec.main(sasrec.Options(**common, model="markov"))
    assert results["markov"]["test"] == json.loads((tmp_path / "script" / "metrics.json").read_text())["item"]


def test_a_killed_command_goes_on_to_the_same_end(options, trainings, capsys):
    baselines.main(options)
    whole, path = table_of(capsys), f"{options.output_dir}/runs.jsonl"
    text = open(path).read()
    open(path, "w").write(text[: text.index("\n", len(text) // 2) + 30])  # half the lines, and a piece of one
    kept = text[: text.index("\n", len(text) // 2)].count("\n") + 1
    del trainings[:]
    baselines.main(options)
    again = table_of(capsys)
    assert len(trainings) == 8 - kept
    for result in (*whole.values(), *again.values()):
        result.pop("seconds", None)
    assert again == whole
    del trainings[:]
    baselines.main(options)
    assert not trainings


def test_shards_share_the_grid_and_leave_test_alone(options, trainings, capsys):
    for options.shard, done in (("0/3", 2), ("1/3", 3), ("2/3", 4)):
        baselines.main(options)
        assert len(trainings) == len(lines_of(options)) == done
    assert not any(r["key"]["test"] for r in lines_of(options))
    options.shard = ""
    baselines.main(options)
    assert len(trainings) == 8


def test_other_data_or_settings_are_trained_anew(options, world, trainings, tmp_path, monkeypatch):
    options.models, options.seeds = "gru4rec", "4"
    baselines.main(options)
    assert len(trainings) == 3
    shutil.copytree(world.folder, tmp_path / "copy")
    lines = (tmp_path / "copy" / "test" / "toy.csv").read_text().splitlines(keepends=True)
    (tmp_path / "copy" / "test" / "toy.csv").write_text("".join(lines[:-1]))
    options.dataset_dir = str(tmp_path / "copy")
    baselines.main(options)
    assert len(trainings) == 6
    monkeypatch.setattr(sasrec.Options.__init__, "__defaults__", with_default("dropout", 0.4))
    baselines.main(options)  # what the grid leaves out counts too
    assert len(trainings) == 9 and trainings[-1].dropout == 0.4


def with_default(flag: str, value) -> tuple:
    """The defaults of sasrec.Options with one changed."""
    names = [f.name for f in dataclasses.fields(sasrec.Options) if f.default is not dataclasses.MISSING]
    return tuple(
        value if n == flag else old for n, old in zip(names, sasrec.Options.__init__.__defaults__, strict=True)
    )


def test_the_grid_of_the_repository_is_valid_and_holds_every_model():
    grid = baselines.read_grid("config/baselines.yaml", list(baselines.MODELS))
    assert set(grid) == set(baselines.MODELS) and all(grid.values())


BAD = {
    "model": ({"models": "sasrec,bert"}, "--models sasrec,bert: expected some of"),
    "seeds": ({"seeds": "1,x"}, "--seeds 1,x"),
    "shard": ({"shard": "3/3"}, "--shard 3/3"),
    "folder": ({"dataset_dir": "nowhere"}, "nowhere: no such file"),
    "grid": ({"grid": "nowhere.yaml"}, "nowhere.yaml: no such file"),
    "no settings": ("gru4rec: {}", "found no settings of sasrec"),
    "unknown flag": ("sasrec: {depth: 2}", "found depth: 2, expected one of"),
    "not a flag for grids": ("sasrec: {seed: 2}", "found seed: 2, expected one of"),
    "type": ("sasrec: {hidden_size: [8, wide]}", "expected values of type int"),
    "text number": ("sasrec: {learning_rate: 1e-3}", "expected values of type float"),
    "value": ("sasrec: {num_heads: 3}", "a multiple of --num_heads 3"),
    "yaml": ("sasrec: {", "not YAML"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line(options, case, tmp_path, monkeypatch, capsys, trainings):
    changes, message = BAD[case]
    if isinstance(changes, str):
        (tmp_path / "grid.yaml").write_text(changes)
        changes = {}
    flags = {name: getattr(options, name) for name in ("dataset_dir", "output_dir", "models", "grid")} | changes
    monkeypatch.setattr(sys, "argv", ["baselines", *(p for f, v in flags.items() for p in (f"--{f}", v))])
    with pytest.raises(SystemExit) as stopped:
        baselines.run(baselines.main, Options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1 and message in error, error
    assert not trainings
