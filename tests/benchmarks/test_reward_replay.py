"""benchmarks/reward_replay.py beside counts by hand and beside rl.py.

Invariants: the share of groups with a signal under exact match is the share of groups that contain the target; every
reward scores the same groups; a group is the one that rl.py trains on, so its first step counts as many dead groups.
"""

import json

import numpy as np
import polars as pl
import pytest
from helpers import N_ITEMS, run_stage
from scipy.stats import spearmanr

import rl
from benchmarks import reward_replay
from minionerec.baselines.models import MODELS
from minionerec.catalog.catalog import Catalog
from minionerec.common.errors import UserError
from minionerec.rewards.registry import reward_functions

CATALOG = Catalog(["<a_0><b_0>", "<a_0><b_1>", "<a_1><b_0>", "<a_1><b_1>"])
GROUPS = np.array([[0, 1, 2], [1, 2, 3], [2, 3, 0], [3, 2, 1]])  # by hand; rows of the catalog, most probable first
TARGETS = [0, 0, 0, 3]  # first place, none, last place, first place
COLUMNS = {
    "prompt": ["p"] * 4,
    "target_sid": [CATALOG.sids[row] for row in TARGETS],
    "target_item": TARGETS,
    "history_items": [[3], [], [1, 2], [0]],
    "task": ["sid_seq"] * 4,
}


def scores(histories):
    return np.array([[0.0, 1.0, 2.0, 3.0]] * len(histories))


@pytest.fixture(scope="module")
def found():
    embeddings = np.array([[1, 0], [0.6, 0.8], [0, 1], [0, 1]])
    rewards = reward_functions("rule,ndcg,prefix,semantic,sasrec,dense", 3, CATALOG, embeddings, scores)
    return reward_replay.rewards_of(rewards, COLUMNS, GROUPS, CATALOG)


def test_rewards_of_groups_by_hand(found):
    assert list(found) == ["rule", "ndcg", "ranking", "prefix", "semantic", "sasrec", "dense"]
    w = 1 / np.log2([2, 3, 4])
    w /= w.sum()
    ndcg = [[0, -w[1], -w[2]], [0, 0, 0], [-w[0], -w[1], 0], [0, -w[1], -w[2]]]
    rule = np.array([[1, 0, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]])
    np.testing.assert_allclose(found["rule"], rule)
    np.testing.assert_allclose(found["ndcg"], ndcg, atol=1e-6)
    np.testing.assert_allclose(found["ranking"], rule + ndcg, atol=1e-6)
    np.testing.assert_allclose(found["prefix"], [[1, 0.5, 0], [0.5, 0, 0], [0, 0, 1], [1, 0.5, 0]])
    np.testing.assert_allclose(found["semantic"], [[1, 0.6, 0], [0.6, 0, 0], [0, 0, 1], [1, 1, 0.8]], atol=1e-6)
    logp = np.log(np.exp([0, 1, 2, 3]) / np.exp([0, 1, 2, 3]).sum())
    expected = [logp[[0, 1, 2]], [0, 0, 0], logp[[2, 3, 0]], logp[[3, 2, 1]]]  # the second row has no history
    np.testing.assert_allclose(found["sasrec"], expected, atol=1e-6)


def test_shares_with_a_signal_by_hand(found):
    """Exact match: three of four groups contain the target. prefix: also the group that contains a sibling of it."""
    figures = {name: reward_replay.figures(values, found["ranking"]) for name, values in found.items()}
    signal = {name: values["signal"] for name, values in figures.items()}
    hits = sum(target in group for group, target in zip(GROUPS.tolist(), TARGETS, strict=True))
    assert signal == {
        "rule": hits / 4, "ndcg": hits / 4, "ranking": hits / 4, "prefix": 1, "semantic": 1, "sasrec": 3 / 4, "dense": 1,
    }  # fmt: skip
    assert {values["groups"] for values in figures.values()} == {3}
    assert figures["rule"]["mean"] == pytest.approx(3 / 12)
    assert figures["rule"]["std"] == pytest.approx(3 * np.std([1, 0, 0], ddof=1) / 4)
    assert figures["ranking"]["spearman"] == pytest.approx(1)
    live = (0, 2, 3)
    for name, values in found.items():
        expected = np.mean([spearmanr(values[row], found["ranking"][row]).statistic for row in live])
        assert figures[name]["spearman"] == pytest.approx(expected, abs=1e-6)


def test_no_group_with_a_signal():
    nothing = np.zeros((2, 3))
    figures = reward_replay.figures(nothing, nothing)
    assert figures == {"signal": 0.0, "mean": 0.0, "std": 0.0, "spearman": None, "groups": 0}
    assert reward_replay.format_rows({"rule": figures}).split()[-5:] == ["0.0000", "0.0000", "0.0000", "-", "0"]


@pytest.fixture(scope="module")
def files(world, checkpoint_folder, tmp_path_factory):
    """Options for the small data set, a baseline and item embeddings."""
    folder = tmp_path_factory.mktemp("replay")
    sizes = {"n_items": N_ITEMS, "max_history": 10, "hidden_size": 8, "dropout": 0.0}
    MODELS["sasrec"](**sizes, num_layers=1, num_heads=1).save(folder / "sasrec")
    np.save(folder / "e.npy", np.random.default_rng(0).normal(size=(N_ITEMS, 8)).astype(np.float32))
    paths = {"model_path": checkpoint_folder, "train_file": world.train, "info_file": world.info}
    paths |= {"baseline_path": folder / "sasrec", "ada_path": folder / "e.npy"}
    return {name: str(path) for name, path in paths.items()}


def test_the_command_counts_what_rl_counts(files, world, tmp_path, monkeypatch):
    """A group is dead in the first step of rl.py if it has no signal here; both use all rows of a train file."""
    pl.read_csv(world.train, infer_schema=False).head(16).write_csv(tmp_path / "train.csv")
    files = files | {"train_file": str(tmp_path / "train.csv")}
    arguments = [part for name, value in files.items() for part in (f"--{name}", value)]
    done = run_stage("benchmarks.reward_replay", *arguments, "--num_generations", "6", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["prompts"], result["num_generations"]) == (16, 6)
    rewards = result["rewards"]
    assert list(rewards) == ["rule", "ndcg", "ranking", "prefix", "semantic", "sasrec", "dense"]
    share = result["target_in_group"]
    assert 0 < share < 1
    assert rewards["rule"]["signal"] == rewards["ndcg"]["signal"] == rewards["ranking"]["signal"] == share
    assert rewards["rule"]["mean"] == pytest.approx(share / 6)
    assert f"16 groups of 6 completions; {share:.4f} contain the target" in done.stdout

    read = {name: files[name] for name in ("model_path", "train_file", "info_file")}
    trained = rl.Options(
        **read, eval_file=str(world.valid), output_dir=str(tmp_path / "rl"), num_generations=6, train_batch_size=96,
        reward_type="prefix", space="catalog", eval_rows=2, eval_beams=6, learning_rate=0.0, eval_step=1,
    )  # fmt: skip
    log = []
    monkeypatch.setattr(rl, "save_best", lambda options, trainer, *_: log.extend(trainer.state.log_history))
    rl.main(trained)
    [first] = [entry for entry in log if "group/dead" in entry]
    assert first["group/dead"] == pytest.approx(1 - rewards["prefix"]["signal"])
    assert first["group/HR@6"] == pytest.approx(share)
    assert first["reward"] == pytest.approx(rewards["prefix"]["mean"], abs=1e-5)


def test_drawn_rows_and_missing_files(files, capsys):
    """Rewards whose files are not given are left out; a smaller number of rows is drawn, the same for the same seed."""
    given = {name: files[name] for name in ("model_path", "train_file", "info_file")}
    texts = []
    for seed in (1, 1, 2):
        reward_replay.main(reward_replay.Options(**given, rows=7, seed=seed, num_generations=4, json=True))
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["prompts"] == 7 and list(result["rewards"]) == ["rule", "ndcg", "ranking", "prefix"]
        result.pop("seconds")
        texts.append(result)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rows": 0}, "--rows 0: expected at least 1, or -1"),
        ({"num_generations": 1}, "--num_generations 1: expected at least 2"),
        ({"num_generations": 99}, "found 47 distinct SIDs, expected at least --num_generations 99"),
        ({"space": "tokens"}, "--space tokens: expected vocab or catalog"),
        ({"baseline_path": "nowhere"}, "nowhere: no such file or folder; check --baseline_path"),
        ({"model_path": ""}, "--model_path is required"),
    ],
)
def test_wrong_options(files, wrong, message):
    with pytest.raises(UserError, match=message):
        reward_replay.main(reward_replay.Options(**files | wrong))
