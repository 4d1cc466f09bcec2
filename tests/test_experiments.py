"""The runner of experiments: starts before what starts from them, resumption, selection's table, bad plans."""

import json
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import experiments
from cli import UserError

PLAN = """
seeds: [1, 2]
runs:
  rule: {stage: rl, start: sft, env: {REWARD_TYPE: rule}}
  sft: {stage: sft, base: tiny, env: {NUM_EPOCHS: 1}, rows: 7}
"""


@pytest.fixture
def options(world, tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    return experiments.Options(
        plan=str(tmp_path / "plan.yaml"), dataset_dir=str(world.folder), output_dir=str(tmp_path / "out"),
        bases="tiny=some/folder", jobs=3,
    )  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    """What would be launched; an evaluation writes metrics that depend on the seed."""
    calls = []

    def launch(self, script, env, log):
        calls.append((script, env))
        if script == "evaluate.sh":
            value = 0.01 * int(env["SEED"])
            metrics = {f"{m}@{k}": value for m in ("HR", "NDCG") for k in (1, 3, 5, 10, 20, 50)}
            Path(env["RESULT_JSON_DATA"]).with_suffix(".metrics.json").write_text(json.dumps({"item": metrics}))

    monkeypatch.setattr(experiments.Experiments, "launch", launch)
    return calls


def test_runs_train_from_their_start_and_are_scored(options, launched, capsys):
    experiments.main(options)
    scripts = [script for script, _ in launched]
    assert scripts.count("sft.sh") == scripts.count("rl.sh") == 2 and scripts.count("evaluate.sh") == 8
    order = [(script, env["SEED"]) for script, env in launched]
    for seed in "12":
        assert order.index(("sft.sh", seed)) < order.index(("rl.sh", seed))
    rl = next(env for script, env in launched if script == "rl.sh" and env["SEED"] == "2")
    assert rl["MODEL_PATH"].endswith("out/sft-2/model") and rl["REWARD_TYPE"] == "rule" and rl["NPROC"] == "1"
    rows = {env["OUTPUT_DIR"].split("/")[-2][:-2]: env["SAMPLE"] for script, env in launched if script == "evaluate.sh"}
    assert rows == {"sft": "7", "rule": "-1"}
    table = capsys.readouterr().out
    assert "| rule | 2 | 150 ±71 |" in table  # mean and standard deviation of .01 and .02, in 1e-4

    launched.clear()
    experiments.main(options)
    assert launched == []  # all of it was done before
    Path(options.plan).write_text(PLAN.replace("NUM_EPOCHS: 1", "NUM_EPOCHS: 2"))
    experiments.main(options)
    assert [script for script, _ in launched].count("rl.sh") == 2  # another start makes another run


def test_a_failed_run_is_named_and_the_others_are_kept(options, monkeypatch, launched):
    usual = experiments.Experiments.launch

    def launch(self, script, env, log):
        if script == "rl.sh" and env["SEED"] == "1":
            raise RuntimeError("rl.sh ended with 1")
        usual(self, script, env, log)

    monkeypatch.setattr(experiments.Experiments, "launch", launch)
    with pytest.raises(UserError, match="1 of 4 runs failed; rule seed 1: rl.sh ended with 1"):
        experiments.main(options)
    assert len((Path(options.output_dir) / "runs.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "plan, message",
    [
        ("runs: {a: {stage: rl}}", "run a has stage 'rl' and start None"),
        ("runs: {a: {stage: sft, start: b}}", "run a has stage 'sft' and start 'b'"),
        ("seeds: [1]", "not a plan"),
        ("runs: {a: {stage: sft, base: other}}", "run a needs other=folder"),
    ],
)
def test_plans_that_cannot_be(options, launched, plan, message):
    Path(options.plan).write_text(plan)
    with pytest.raises(UserError, match=message):
        experiments.main(options)


@pytest.mark.parametrize("plan", sorted((ROOT / "benchmarks" / "plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_here_can_be_read(plan):
    runs, seeds = experiments.read_plan(experiments.Options(plan=str(plan)))
    assert runs and seeds
