"""benchmarks/sft_sequence.py runs at a tiny size, and its sides train the same targets in as many steps."""

import json

import polars as pl
import pytest
from helpers import run_stage

from benchmarks import movielens_rows, sft_sequence
from minionerec.common.errors import UserError

TINY = ["--targets", "60", "--rounds", "1", "--device", "cpu", "--threads", "1", "--json"]


@pytest.mark.parametrize("space", ["vocab", "catalog"])
def test_the_command_on_a_folder(world, space):
    done = run_stage(
        "benchmarks.sft_sequence", "--dataset_dir", world.folder, "--batch_size", "8", "--space", space, *TINY
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"token_ratio", "time_ratio"} and result["time_ratio"] > 0
    assert result["token_ratio"] == 1.0  # each user of this data set has one row, which is the whole sequence


def test_the_command_on_movielens():
    done = run_stage("benchmarks.sft_sequence", *TINY)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["token_ratio"] > 3 and result["time_ratio"] > 0
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith(sft_sequence.SIDES)]
    steps = [line[line.index("steps") - 1] for line in lines]
    assert len(steps) == 2 and steps[0] == steps[1]


def test_drawn_users_are_whole(monkeypatch):
    rows = pl.DataFrame({"user": ["u"] * 4 + ["v"] * 3 + ["w"] * 5, "history": [[0]] * 12, "target": range(12)})
    monkeypatch.setattr(movielens_rows, "samples", lambda max_history, rng: (rows, None))
    for targets, users in ((1, 1), (6, 2), (0, 3), (100, 3)):
        train, _ = sft_sequence.read(sft_sequence.Options(targets=targets))
        counts = dict(train.group_by("user").len().iter_rows())
        assert len(counts) == users and all(counts[user] == {"u": 4, "v": 3, "w": 5}[user] for user in counts)
        assert train["target"].is_sorted()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"space": "tokens"}, "--space tokens: expected vocab or catalog"),
        ({"rounds": 0}, "--rounds 0: expected at least 1"),
        ({"dataset_dir": "nowhere"}, "nowhere: no such file or folder; check --dataset_dir"),
    ],
)
def test_wrong_options(wrong, message):
    with pytest.raises(UserError, match=message):
        sft_sequence.main(sft_sequence.Options(**{"device": "cpu"} | wrong))
