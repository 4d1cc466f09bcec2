"""Evaluation in one process: its files, its resumption, and metrics that a plain loop over the predictions gives."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers import ROOT

import evaluate
from minionerec.common.errors import UserError


def options(world, checkpoint_folder, output, **more):
    arguments = {"base_model": checkpoint_folder, "test_data_path": world.test, "info_file": world.info}
    arguments |= {"train_file": world.train, "result_json_data": output}
    arguments = {k: str(v) for k, v in arguments.items()} | {"num_beams": 20, "batch_size": 2} | more
    return evaluate.Options(**arguments)


def results(output: Path):
    metrics = json.loads(output.with_suffix(".metrics.json").read_text())
    del metrics["seconds"], metrics["processes"]
    return metrics, output.read_text()


@pytest.mark.parametrize("space", ["vocab", "catalog"])
@pytest.mark.parametrize("exclude_seen", [False, True])
def test_metrics_are_those_of_the_written_predictions(world, checkpoint_folder, tmp_path, space, exclude_seen):
    output = tmp_path / "p.json"
    evaluate.main(options(world, checkpoint_folder, output, space=space, exclude_seen=exclude_seen, num_beams=60))
    metrics, text = results(output)
    rows = json.loads(text)
    titles = [line.split("\t")[1] for line in world.info.read_text().splitlines()]
    by_sid, by_item, shown = [], [], set()
    for row in rows:
        assert len({len(row[name]) for name in ("predict", "predict_item_id", "predict_title", "score")}) == 1
        assert row["predict_title"] == [titles[group[0]] for group in row["predict_item_id"]]
        assert row["history_item_title"] == [titles[item] for item in row["history_item_id"]]
        listed = [item for group in row["predict_item_id"] for item in group]
        assert len(set(listed)) == len(listed) and all(row["predict_item_id"])
        assert set(listed) == set(range(48)) - (set(row["history_item_id"]) if exclude_seen else set())
        by_sid.append(row["predict"].index(row["output"]) if row["output"] in row["predict"] else 10**9)
        by_item.append(listed.index(row["item_id"]) if row["item_id"] in listed else 10**9)
        shown |= set(row["predict"][:10])
    for name, ranks in (("sid", by_sid), ("item", by_item)):
        for k in (1, 3, 5, 10, 20, 50):
            gains = [1 / np.log2(rank + 2) if rank < k else 0 for rank in ranks]
            assert metrics[name][f"HR@{k}"] == pytest.approx(np.mean([rank < k for rank in ranks]), abs=1e-12)
            assert metrics[name][f"NDCG@{k}"] == pytest.approx(np.mean(gains), abs=1e-12)
    assert metrics["coverage"]["sids@10"] == pytest.approx(len(shown) / 47)
    assert metrics["illegal"] == 0 and metrics["distinct_sids"] == len(shown)


def test_catalog_scores_are_a_distribution_and_parquet_equals_json(world, checkpoint_folder, tmp_path):
    output = tmp_path / "p.json"
    evaluate.main(options(world, checkpoint_folder, output, space="catalog", num_beams=47))
    rows = json.loads(output.read_text())
    for row in rows:
        assert np.exp(row["score"]).sum() == pytest.approx(1, abs=0.01)
    assert pl.read_parquet(output.with_suffix(".parquet")).to_dicts() == rows


def test_a_killed_evaluation_goes_on_and_ends_the_same(world, checkpoint_folder, tmp_path, monkeypatch):
    evaluate.main(options(world, checkpoint_folder, tmp_path / "whole.json"))
    plain, calls = evaluate.recommend_batch, []

    def killed(*arguments, **named):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return plain(*arguments, **named)

    monkeypatch.setattr(evaluate, "recommend_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(options(world, checkpoint_folder, tmp_path / "killed.json"))
    assert len(list((tmp_path / "killed.parts").glob("*.npz"))) == 4 and not (tmp_path / "killed.json").exists()
    evaluate.main(options(world, checkpoint_folder, tmp_path / "killed.json"))
    assert len(calls) == 5 + 2  # six batches, four of them kept
    assert results(tmp_path / "killed.json") == results(tmp_path / "whole.json")
    assert not (tmp_path / "killed.parts").exists()


def test_parts_of_other_options_are_not_taken(world, checkpoint_folder, tmp_path, monkeypatch):
    plain, calls = evaluate.recommend_batch, []

    def killed(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*arguments, **named)

    monkeypatch.setattr(evaluate, "recommend_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(options(world, checkpoint_folder, tmp_path / "p.json"))
    evaluate.main(options(world, checkpoint_folder, tmp_path / "p.json", space="catalog"))
    assert len(calls) == 3 + 6
    evaluate.main(options(world, checkpoint_folder, tmp_path / "whole.json", space="catalog"))
    assert results(tmp_path / "p.json") == results(tmp_path / "whole.json")


@pytest.mark.parametrize(
    "wrong, found",
    [
        ({"space": "words"}, "--space words: expected one of vocab, catalog"),
        ({"dtype": "float8"}, "--dtype float8: expected one of float32, bfloat16"),
        ({"batch_tokens": 0}, "--batch_tokens 0: expected at least 1"),
        ({"max_new_tokens": 2}, "SIDs have up to 3 tokens"),
    ],
)
def test_bad_options(world, checkpoint_folder, tmp_path, wrong, found):
    with pytest.raises(UserError, match=found):
        evaluate.main(options(world, checkpoint_folder, tmp_path / "p.json", **wrong))


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_by_signal_on_one_process_and_finished_by_two(world, checkpoint_folder, tmp_path):
    """The parts of one process serve two: the batches do not depend on how many share them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    common = {"num_beams": 47, "batch_size": 1, "exclude_seen": True, "test_data_path": str(world.train)}

    def start(name, processes):
        settings = dataclasses.asdict(options(world, checkpoint_folder, tmp_path / name, **common))
        flags = [f"--{flag}={value}" for flag, value in settings.items() if value != ""]
        launcher = ["torchrun", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
        return subprocess.Popen(
            [*launcher, "evaluate.py", *flags],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    killed = start("killed.json", 1)
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "killed.parts").glob("[0-9]*.npz"))) < 3:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert not (tmp_path / "killed.json").exists()
    resumed, whole = start("killed.json", 2), start("whole.json", 1)
    assert "parts were computed before" in resumed.communicate(timeout=300)[0]
    whole.communicate(timeout=300)
    assert resumed.returncode == whole.returncode == 0
    assert json.loads((tmp_path / "killed.metrics.json").read_text())["processes"] == 2
    assert results(tmp_path / "killed.json") == results(tmp_path / "whole.json")
