"""benchmarks/baselines.py: chosen on valid, trained once for each seed, killed and continued, refusals.

Invariants: the best combination on valid is the one that is trained with every seed; figures are those of sasrec.py;
finished trainings are not repeated, those of other data or settings are; a wrong grid is one line and trains nothing.
"""

import json
import shutil
import statistics

import pytest
import yaml
from helpers import run_stage

import sasrec
from benchmarks import baselines
from benchmarks.baselines import Options
from minionerec.baselines import training
from minionerec.baselines.options import TRAINED
from minionerec.common.errors import UserError

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
    done, fit = [], training.fit
    monkeypatch.setattr(training, "fit", lambda o, *rest, **named: done.append(o) or fit(o, *rest, **named))
    return done


def in_headline(metrics: dict, part: str) -> dict:
    """The metrics of `part`, "valid" or "test", by item, in the headline protocol, of a metrics.json."""
    if part == "valid":
        return metrics["valid"]
    return metrics["item"] if metrics["headline"] == "all" else metrics["unseen"]["item"]


def table_of(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_best_on_valid_is_trained_with_every_seed(options, trainings, world, tmp_path, capsys):
    baselines.main(options)
    results = table_of(capsys)
    assert list(results) == ["popularity", "markov", "sasrec", "gru4rec"]
    assert len(trainings) == 2 + 2 + 2 * 2
    assert results["sasrec"]["settings"]["learning_rate"] == 0.02  # the other hardly moves
    for model in ("sasrec", "gru4rec"):
        assert results[model]["settings"] in baselines.read_grid(options.grid, [model])[model]
        assert len(results[model]["grid"]) == 2
        own = [o for o in trainings if o.model == model and o.seed in (4, 5)]
        found = [json.loads(open(f"{o.output_dir}/metrics.json").read()) for o in own]
        assert len(found) == 2
        for part in ("valid", "test"):
            values = [in_headline(metrics, part)["NDCG@10"] for metrics in found]
            assert results[model][part]["NDCG@10"] == pytest.approx(statistics.mean(values))
            assert results[model][f"{part} ±"]["NDCG@10"] == pytest.approx(statistics.stdev(values))

    # the same figures as the script's
    files = {f"{name}_file": str(getattr(world, name)) for name in ("train", "valid", "test", "info")}
    common = files | {"output_dir": str(tmp_path / "script"), "device": "cpu", "overwrite": True}
    sasrec.main(sasrec.Options(**common, model="sasrec", seed=5, **results["sasrec"]["settings"]))
    script = json.loads((tmp_path / "script" / "metrics.json").read_text())
    [run] = [o.output_dir for o in trainings if (o.model, o.seed) == ("sasrec", 5) and "script" not in o.output_dir]
    found = json.loads(open(f"{run}/metrics.json").read())
    assert (found["item"], found["valid"]) == (script["item"], script["valid"])
    sasrec.main(sasrec.Options(**common, model="markov"))
    markov = json.loads((tmp_path / "script" / "metrics.json").read_text())
    assert results["markov"]["test"] == in_headline(markov, "test")


def test_a_killed_command_continues_to_the_same_end(options, trainings, capsys):
    class Killed(BaseException):
        """Not caught by anything."""

    baselines.main(options)
    whole = table_of(capsys)
    shutil.rmtree(options.output_dir)
    fit, left = training.fit, [3]

    def dies(*arguments, **named):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return fit(*arguments, **named)

    training.fit = dies
    with pytest.raises(Killed):
        baselines.main(options)
    training.fit = fit
    del trainings[:]
    baselines.main(options)
    again = table_of(capsys)
    assert len(trainings) == 8 - 3
    for result in (*whole.values(), *again.values()):
        result.pop("seconds", None)
    assert again == whole
    del trainings[:]
    baselines.main(options)
    assert not trainings


def test_shards_divide_the_grid(options, trainings, capsys):
    for options.shard, done in (("0/3", 2), ("1/3", 3), ("2/3", 4)):
        baselines.main(options)
        assert len(trainings) == done
    assert {o.seed for o in trainings} == {1}
    options.shard = ""
    baselines.main(options)
    assert len(trainings) == 8


def test_other_data_or_settings_are_trained_again(options, world, trainings, tmp_path):
    options.models, options.seeds = "gru4rec", "4"
    baselines.main(options)
    assert len(trainings) == 3
    shutil.copytree(world.folder, tmp_path / "copy")
    lines = (tmp_path / "copy" / "test" / "toy.csv").read_text().splitlines(keepends=True)
    (tmp_path / "copy" / "test" / "toy.csv").write_text("".join(lines[:-1]))
    options.dataset_dir = str(tmp_path / "copy")
    baselines.main(options)
    assert len(trainings) == 6
    [first, *_] = (tmp_path / "out" / "gru4rec").glob("*-1.1/metrics.json")  # the old ones moved aside
    assert first.exists()


def test_the_grid_of_the_repository_is_valid_and_has_every_model():
    for name, models in (("baselines", TRAINED), ("baselines_movielens", TRAINED)):
        grid = baselines.read_grid(f"config/{name}.yaml", list(models))
        assert set(grid) == set(models) and all(grid.values())


BAD = {
    "model": ({"models": "sasrec,bert"}, "--models sasrec,bert: expected some of"),
    "seeds": ({"seeds": "1,x"}, "--seeds 1,x"),
    "shard": ({"shard": "3/3"}, "--shard 3/3"),
    "folder": ({"dataset_dir": "nowhere"}, "nowhere: no such file"),
    "grid": ({"grid": "nowhere.yaml"}, "nowhere.yaml: no such file"),
    "output": ({"output_dir": ""}, "--output_dir is required"),
    "no settings": ("gru4rec: {}", "found no settings of sasrec"),
    "unknown option": ("sasrec: {depth: 2}", "found depth: [2], expected values of an option of sasrec.py"),
    "not for grids": ("sasrec: {seed: 2}", "found seed: [2], expected values"),
    "no setting": ("sasrec: {output_dir: x}", "found output_dir: ['x'], expected values"),
    "no value": ("sasrec: {epochs: []}", "found epochs: []"),
    "type": ("sasrec: {hidden_size: [8, wide]}", "invalid int value: 'wide'"),
    "value": ("sasrec: {num_heads: 5}", "a multiple of --num_heads 5"),
    "yaml": ("sasrec: {", "not YAML"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_options_train_nothing(options, case, tmp_path, trainings):
    changes, message = BAD[case]
    if isinstance(changes, str):
        (tmp_path / "grid.yaml").write_text(changes)
        changes = {}
    for name, value in changes.items():
        setattr(options, name, value)
    with pytest.raises(UserError) as refused:
        baselines.main(options)
    assert message in str(refused.value) and not trainings and not (tmp_path / "out").exists()


def test_the_command(options, tmp_path):
    (tmp_path / "grid.yaml").write_text("caser: {hidden_size: 4, epochs: 1, filter_sizes: '2'}")
    given = {"dataset_dir": options.dataset_dir, "output_dir": options.output_dir, "grid": options.grid}
    given |= {"models": "caser", "seeds": "1", "json": "True", "device": "cpu"}
    done = run_stage("benchmarks.baselines", *(f"--{name}={value}" for name, value in given.items()))
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["caser"]["test ±"]["HR@10"] == 0 and set(results) == {"popularity", "markov", "caser"}
