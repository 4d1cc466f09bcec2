"""benchmarks/experiments.py: order of runs, what is launched again, tables, invalid plans.

Invariants: a run starts after those that it needs, of the same seed; every stage is launched each time and decides
itself whether there is something to do; the table shows only results of the plan's settings; a failed run is named and
the others are kept; every plan of the repository can be read.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, run_stage

from benchmarks import experiments
from minionerec.common.errors import UserError
from minionerec.evaluation.metrics import MISSED

PLAN = """
seeds: [1, 2]
runs:
  rule: {stage: rl, start: sft, baseline: gru, env: {REWARD_TYPE: "rule,sasrec"}}
  sft: {stage: sft, base: tiny, env: {NUM_EPOCHS: 1}}
  gru: {stage: sasrec, env: {MODEL: gru4rec}}
  few: {stage: sft, base: tiny, env: {NUM_EPOCHS: 1}, rows: 7}
  more: {stage: sft, base: tiny, env: {NUM_EPOCHS: 2}}
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
    """What would be launched. An evaluation writes metrics that depend on the seed, and the ranks of two rows: the target
    of the first is at rank 0 after RL and at rank 2 after SFT, that of the second is missed."""
    calls = []

    def launch(self, script, env, log):
        calls.append((script, env))
        value = 0.01 * int(env["SEED"])
        table = {f"{m}@{k}": value for m in ("HR", "NDCG") for k in (1, 3, 5, 10, 20, 50)}
        nothing = dict.fromkeys(table, 0.0)
        scores = {"item": nothing, "unseen": {"item": table}, "headline": "unseen"}
        folder = Path(env["OUTPUT_DIR"])
        folder.mkdir(parents=True, exist_ok=True)
        if script == "evaluate.sh":
            path = Path(env["RESULT_JSON_DATA"])
            log.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".metrics.json").write_text(json.dumps(scores))
            np.savez(path.with_suffix(".ranks.npz"), unseen_item=[0 if "rule" in env["OUTPUT_DIR"] else 2, MISSED])
        else:
            (folder / "run.json").write_text(json.dumps({"seconds": 7}))
        if script == "sasrec.sh":
            (folder / "metrics.json").write_text(json.dumps(scores | {"valid": table}))

    monkeypatch.setattr(experiments.Experiments, "launch", launch)
    return calls


def test_runs_train_from_their_start_and_are_scored(options, launched, capsys):
    experiments.main(options)
    scripts = [script for script, _ in launched]
    assert [scripts.count(f"{stage}.sh") for stage in ("sft", "rl", "sasrec", "evaluate")] == [6, 2, 2, 16]
    order = [(script, env["SEED"]) for script, env in launched]
    for seed in "12":
        assert max(order.index((needed, seed)) for needed in ("sft.sh", "sasrec.sh")) < order.index(("rl.sh", seed))
    rl = next(env for script, env in launched if script == "rl.sh" and env["SEED"] == "2")
    assert rl["MODEL_PATH"].endswith("out/sft-2/model") and rl["BASELINE_PATH"].endswith("out/gru-2/model")
    assert rl["REWARD_TYPE"] == "rule,sasrec" and rl["NPROC"] == "1" and rl["OVERWRITE"] == "True"
    scored = [env for script, env in launched if script == "evaluate.sh"]
    rows = {env["OUTPUT_DIR"].split("/")[-2][:-2]: env["TEST_ROWS"] for env in scored}
    assert rows == {"few": "7", "sft": "-1", "rule": "-1", "more": "-1"}
    table = capsys.readouterr().out
    assert "| rule | 2 | 150 ±71 |" in table  # mean and standard deviation of .01 and .02, in 1e-4
    assert "| gru | 2 | 150 ±71 |" in table and "| 7 |" in table
    differences = next(line for line in table.splitlines() if line.startswith("| rule minus sft | +"))
    # 1 - 1 / log2(4) of NDCG@10, for one row of two; half of all drawn pairs are that row twice or never
    assert differences.split(" | ")[1:3] == ["+2500 [+0, +5000]", "+5000 [+0, +10000]"]
    assert differences.endswith("| +2500 +2500 |")
    assert "| more minus sft | +0 [+0, +0]" in table and "few minus" not in table  # whose rows differ between seeds


def test_variables_for_all_runs(options, launched):
    options.env, options.only = "NUM_EPOCHS=3,SFT_TASKS=sid_seq", "rule"
    experiments.main(options)
    given = {script: (env["NUM_EPOCHS"], env["SFT_TASKS"]) for script, env in launched}
    assert given["sft.sh"] == given["rl.sh"] == ("3", "sid_seq")
    options.env = "NUM_EPOCHS"
    with pytest.raises(UserError, match="--env NUM_EPOCHS: found 'NUM_EPOCHS', expected name=value"):
        experiments.main(options)


def test_given_models_are_scored_but_not_trained(options, launched, tmp_path, capsys):
    options.models, options.only, options.seeds = f"sft={tmp_path / 'sft'},gru={tmp_path / 'gru'}", "rule", "1"
    for name in ("sft", "gru"):
        (tmp_path / name).mkdir()
    (tmp_path / "sft" / "config.json").write_text("{}")
    table = {f"{m}@{k}": 0.5 for m in ("HR", "NDCG") for k in (1, 3, 5, 10, 20, 50)}
    scores = {"item": table, "unseen": {"item": table}, "headline": "unseen", "valid": table}
    (tmp_path / "gru" / "metrics.json").write_text(json.dumps(scores))
    experiments.main(options)
    assert [script for script, _ in launched] == ["evaluate.sh"] * 2 + ["rl.sh"] + ["evaluate.sh"] * 2
    rl = next(env for script, env in launched if script == "rl.sh")
    assert (rl["MODEL_PATH"], rl["BASELINE_PATH"]) == (str(tmp_path / "sft"), str(tmp_path / "gru"))
    assert {env["BASE_MODEL"] for _, env in launched[:2]} == {str(tmp_path / "sft")}
    out = capsys.readouterr().out
    assert "| gru | 1 | 5000 |" in out and "| rule minus sft | +2500 " in out
    options.models = "sft"
    with pytest.raises(UserError, match="--models sft: found 'sft', expected name=value"):
        experiments.main(options)
    options.models = f"gru={tmp_path / 'nowhere'}"
    with pytest.raises(UserError, match="nowhere/metrics.json: no such file or folder; check --models"):
        experiments.main(options)
    options.models = "few=x"
    with pytest.raises(UserError, match="--models: no run 'few', expected some of rule, sft, gru"):
        experiments.main(options)


def test_the_table_shows_only_results_of_the_plan(options, launched, capsys):
    experiments.main(options)
    launched.clear()
    capsys.readouterr()
    options.table = True
    experiments.main(options)
    assert launched == [] and "| rule | 2 | 150 ±71 |" in capsys.readouterr().out
    Path(options.plan).write_text(PLAN.replace("NUM_EPOCHS: 1", "NUM_EPOCHS: 2"))
    experiments.main(options)
    table = capsys.readouterr().out
    assert "| gru | 2 |" in table and "| sft |" not in table and "| rule |" not in table  # rule has another start now


def test_a_failed_run_is_named_and_the_others_are_kept(options, monkeypatch, launched, capsys):
    usual = experiments.Experiments.launch

    def launch(self, script, env, log):
        if script == "rl.sh" and env["SEED"] == "1":
            raise RuntimeError("rl.sh exited with code 1")
        usual(self, script, env, log)

    monkeypatch.setattr(experiments.Experiments, "launch", launch)
    with pytest.raises(UserError, match="1 of 10 runs failed; rule seed 1: rl.sh exited with code 1"):
        experiments.main(options)
    assert "| rule | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "plan, message",
    [
        ("runs: {a: {stage: rl}}", "run a has stage 'rl', start None"),
        ("runs: {a: {stage: sft, start: b}}", "run a has stage 'sft', start 'b'"),
        ("runs: {a: {stage: sasrec, baseline: a}}", "run a has stage 'sasrec', start None and baseline 'a'"),
        ("runs: {a: {stage: sft, base: x}, b: {stage: rl, start: a, baseline: c}}", "start 'a' and baseline 'c'"),
        ("seeds: [1]", "not a plan"),
        ("runs: [a]", "not a plan"),
        ("runs: {a: sft}", "not a plan"),
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


def test_the_command(world, tmp_path):
    """Real launchers, tiny: nothing is trained twice."""
    plan = "runs: {markov: {stage: sasrec, env: {MODEL: markov}}, pop: {stage: sasrec, env: {MODEL: popularity}}}"
    (tmp_path / "plan.yaml").write_text(plan)
    arguments = ["--plan", tmp_path / "plan.yaml", "--dataset_dir", world.folder, "--output_dir", tmp_path / "out"]
    first = run_stage("benchmarks.experiments", *arguments, "--jobs", "2")
    assert "| markov | 1 |" in first.stdout and "| pop | 1 |" in first.stdout
    assert run_stage("benchmarks.experiments", *arguments, "--table").stdout.splitlines()[-1] in first.stdout
    run_stage("benchmarks.experiments", *arguments)
    assert "nothing to do" in (tmp_path / "out" / "markov-42" / "log.txt").read_text()
