"""evaluate.py: metrics that plain loops over the predictions give, both protocols, records, resuming, refusals.

The files of a run do not depend on a kill or on the number of processes. A result with other options is refused or
moved aside, never mixed in or overwritten. What the checkpoint stores is the default.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from helpers import ROOT, run_stage
from safetensors.torch import load_file, save_file

import evaluate
from minionerec.common import model_card, runs
from minionerec.common.errors import UserError
from minionerec.decoding.engine import TransformersEngine
from minionerec.language_model.checkpoints import Settings, save_settings


def options(world, checkpoint_folder, output, **more):
    arguments = {"base_model": checkpoint_folder, "test_data_path": world.test, "info_file": world.info}
    arguments |= {"train_file": world.train, "result_json_data": output}
    arguments = {k: str(v) for k, v in arguments.items()} | {"num_beams": 20, "batch_size": 2} | more
    return evaluate.Options(**arguments)


def results(output: Path):
    """The content of every result file."""
    with np.load(output.with_suffix(".ranks.npz")) as ranks:
        ranks = {name: values.tolist() for name, values in ranks.items()}
    return output.read_text(), json.loads(output.with_suffix(".metrics.json").read_text()), ranks


@pytest.fixture
def copied(checkpoint_folder, tmp_path):
    """A copy of the checkpoint that a test may change."""
    return shutil.copytree(checkpoint_folder, tmp_path / "checkpoint")


# ------------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize("space", ["vocab", "catalog"])
def test_metrics_are_those_of_the_written_predictions(world, checkpoint_folder, tmp_path, space):
    output = tmp_path / "p.json"
    evaluate.main(options(world, checkpoint_folder, output, space=space, num_beams=60))
    text, metrics, ranks = results(output)
    titles = [line.split("\t")[1] for line in world.info.read_text().splitlines()]
    rows = json.loads(text)
    for protocol, measured in (("all", metrics), ("unseen", metrics["unseen"])):
        by_sid, by_item, shown, first = [], [], set(), set()
        for row in rows:
            found = row if protocol == "all" else row["unseen"]
            assert len({len(found[name]) for name in ("predict", "predict_item_id", "predict_title", "score")}) == 1
            assert found["predict_title"] == [titles[group[0]] for group in found["predict_item_id"]]
            assert row["history_item_title"] == [titles[item] for item in row["history_item_id"]]
            listed = [item for group in found["predict_item_id"] for item in group]
            seen = set(row["history_item_id"]) if protocol == "unseen" else set()
            assert len(set(listed)) == len(listed) and set(listed) == set(range(48)) - seen
            by_sid.append(found["predict"].index(row["output"]) if row["output"] in found["predict"] else 10**9)
            by_item.append(listed.index(row["item_id"]) if row["item_id"] in listed else 10**9)
            shown |= set(listed[:10])
            first.add(listed[0])
        for name, places in (("sid", by_sid), ("item", by_item)):
            for k in (1, 3, 5, 10, 20, 50):
                gains = [1 / np.log2(place + 2) if place < k else 0 for place in places]
                assert measured[name][f"HR@{k}"] == pytest.approx(np.mean([place < k for place in places]), abs=1e-12)
                assert measured[name][f"NDCG@{k}"] == pytest.approx(np.mean(gains), abs=1e-12)
            assert [min(rank, 10**9) for rank in ranks[f"{protocol}_{name}"]] == places
        assert measured["coverage"]["items@10"] == pytest.approx(len(shown) / 48)
        assert measured["distinct_first"] == len(first)
    assert metrics["illegal"] == 0 and metrics["rows"] == 12 and metrics["space"] == space


def test_the_unseen_search_is_exact(world, checkpoint_folder, tmp_path):
    """vocab: the scores of what stays do not change. catalog: scores are a distribution over what stays."""
    for space in ("vocab", "catalog"):
        output = tmp_path / f"{space}.json"
        evaluate.main(options(world, checkpoint_folder, output, space=space, num_beams=47))
        for row in json.loads(output.read_text()):
            seen = set(row["history_item_id"])
            kept = [not seen.issuperset(group) for group in row["predict_item_id"]]
            assert not all(kept)
            expected = [sid for sid, keep in zip(row["predict"], kept, strict=True) if keep]
            if space == "vocab":
                assert row["unseen"]["predict"] == expected
                scores = [score for score, keep in zip(row["score"], kept, strict=True) if keep]
                assert row["unseen"]["score"] == pytest.approx(scores, abs=2e-4)
            else:
                assert sorted(row["unseen"]["predict"]) == sorted(expected)
                assert np.exp(row["unseen"]["score"]).sum() == pytest.approx(1, abs=0.01)


def test_seen_is_the_whole_list_and_not_the_prompts_window(world, checkpoint_folder, tmp_path):
    output = tmp_path / "p.json"
    evaluate.main(options(world, checkpoint_folder, output, num_beams=47, max_history=1))
    full = dict(pl.read_csv(world.test).select("user_id", "history_item_id").iter_rows())
    rows = json.loads(output.read_text())
    assert any(len(json.loads(full[row["user_id"]])) > 1 for row in rows)
    for row in rows:
        assert len(row["history_item_id"]) == 1
        listed = {item for group in row["unseen"]["predict_item_id"] for item in group}
        assert not listed & set(json.loads(full[row["user_id"]]))


def test_one_search_without_unseen_items(world, checkpoint_folder, tmp_path):
    evaluate.main(options(world, checkpoint_folder, tmp_path / "both.json"))
    evaluate.main(options(world, checkpoint_folder, tmp_path / "one.json", unseen=False))
    both, one = results(tmp_path / "both.json"), results(tmp_path / "one.json")
    assert both[1]["headline"] == "unseen" and one[1]["headline"] == "all"
    assert all("unseen" not in row for row in json.loads(one[0])) and "unseen" not in one[1]
    assert one[1] | {"headline": "unseen", "unseen": both[1]["unseen"]} == both[1]


def test_catalog_scores_are_a_distribution_and_parquet_equals_json(world, checkpoint_folder, tmp_path):
    output = tmp_path / "p.json"
    evaluate.main(options(world, checkpoint_folder, output, space="catalog", num_beams=47))
    rows = json.loads(output.read_text())
    for row in rows:
        assert np.exp(row["score"]).sum() == pytest.approx(1, abs=0.01)
    assert pl.read_parquet(output.with_suffix(".parquet")).to_dicts() == rows


def test_illegal_predictions_of_both_searches_are_counted(world, checkpoint_folder, tmp_path, monkeypatch):
    plain = evaluate.search

    def repeating(*arguments):
        found = plain(*arguments)
        found["all"].sid_rows[0, 1] = found["all"].sid_rows[0, 0]
        found["unseen"].sid_rows[:2, 1] = found["unseen"].sid_rows[:2, 0]
        return found

    monkeypatch.setattr(evaluate, "search", repeating)
    evaluate.main(options(world, checkpoint_folder, tmp_path / "p.json"))
    assert results(tmp_path / "p.json")[1]["illegal"] == 3


def test_fewer_beams_and_predictions(world, checkpoint_folder, tmp_path):
    """Metrics use all beams and stop at them; K cuts what is written."""
    environment = {"BASE_MODEL": checkpoint_folder, "TEST_DATA_PATH": world.test, "INFO_FILE": world.info}
    environment |= {"RESULT_JSON_DATA": tmp_path / "p.json", "NUM_BEAMS": 20, "NPROC": 1}
    run_stage("evaluate.sh", "--K", "7", env=environment)
    text, metrics, _ = results(tmp_path / "p.json")
    rows = json.loads(text)
    legal = {line.split("\t")[0] for line in world.info.read_text().splitlines()}
    for row in rows:
        assert len(row["predict"]) == 7 == len(set(row["predict"])) and set(row["predict"]) <= legal
        assert row["score"] == sorted(row["score"], reverse=True)
    hits = sum(row["output"] in row["predict"][:5] for row in rows)
    assert metrics["sid"]["HR@5"] == pytest.approx(hits / 12)
    assert metrics["item"]["HR@5"] <= metrics["sid"]["HR@5"]
    assert "HR@20" in metrics["item"] and "HR@50" not in metrics["item"]
    assert "popularity" not in metrics["slices"] and metrics["headline"] == "all"  # no train file


def test_users_without_a_name(world, checkpoint_folder, tmp_path):
    """More empty ids than a reader looks at to guess a column's type, and then one that is not."""
    table = pl.read_csv(world.test, infer_schema=False)
    many = pl.concat(
        [table.head(1).with_columns(user_id=pl.lit(None, pl.String)) for _ in range(120)] + [table.tail(1)]
    )
    for name, rows in (("mixed", many), ("none", many.head(3))):
        rows.write_csv(tmp_path / f"{name}.csv")
        output = tmp_path / f"{name}.json"
        evaluate.main(options(world, checkpoint_folder, output, test_data_path=str(tmp_path / f"{name}.csv")))
        assert pl.read_parquet(output.with_suffix(".parquet")).to_dicts() == json.loads(output.read_text())


# ------------------------------------------------------------------------------------------------ records


def killed_at(monkeypatch, batch):
    """Make the search of batch number `batch` end the run; returns the list that counts the batches."""
    plain, calls = TransformersEngine.beam_search, []

    def killed(*arguments, **named):
        calls.append(1)
        if len(calls) == batch:
            raise KeyboardInterrupt
        return plain(*arguments, **named)

    monkeypatch.setattr(TransformersEngine, "beam_search", killed)
    return calls


def test_a_killed_evaluation_goes_on_and_ends_the_same(world, checkpoint_folder, tmp_path, monkeypatch):
    evaluate.main(options(world, checkpoint_folder, tmp_path / "whole.json"))
    calls = killed_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(options(world, checkpoint_folder, tmp_path / "killed.json"))
    assert len(list((tmp_path / "killed.parts").glob("*.npz"))) == 4 and not (tmp_path / "killed.json").exists()
    evaluate.main(options(world, checkpoint_folder, tmp_path / "killed.json"))
    assert len(calls) == 5 + 2  # six batches, four of them kept
    assert results(tmp_path / "killed.json") == results(tmp_path / "whole.json")
    assert not (tmp_path / "killed.parts").exists()


def test_parts_of_other_options_are_refused_or_moved_aside(world, checkpoint_folder, tmp_path, monkeypatch):
    calls = killed_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(options(world, checkpoint_folder, tmp_path / "p.json"))
    other = options(world, checkpoint_folder, tmp_path / "p.json", space="catalog")
    with pytest.raises(UserError, match="holds another result .space is '' there and 'catalog' now"):
        evaluate.main(other)
    evaluate.main(dataclasses.replace(other, overwrite=True))
    assert len(list((tmp_path / "p.parts.1").glob("*.npz"))) == 2 and len(calls) == 3 + 6
    evaluate.main(options(world, checkpoint_folder, tmp_path / "whole.json", space="catalog"))
    assert results(tmp_path / "p.json") == results(tmp_path / "whole.json")


def test_a_finished_evaluation_is_not_computed_again(world, checkpoint_folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "p.json"
    evaluate.main(options(world, checkpoint_folder, output))
    before, calls = results(output), killed_at(monkeypatch, 0)
    evaluate.main(options(world, checkpoint_folder, output, batch_size=5))  # the batch size does not shape the result
    assert "nothing to do" in capsys.readouterr().out and not calls
    output.with_suffix(".metrics.json").unlink()
    evaluate.main(options(world, checkpoint_folder, output))
    assert results(output) == before and len(calls) == 6
    with pytest.raises(UserError, match="num_beams is 20 there and 10 now"):
        evaluate.main(options(world, checkpoint_folder, output, num_beams=10))
    assert results(output) == before


def test_a_skipped_evaluation_completes_the_card_of_a_repeated_training(world, copied, tmp_path):
    """Training that ends with the same weights writes a new card; the evaluation is then skipped."""
    evaluate.main(options(world, copied, tmp_path / "p.json"))
    card = copied / "README.md"
    card.write_text(f"---\n---\n{runs.CARD_MARK}\n{model_card.TEST}\n{model_card.NO_TEST}\n{model_card.END}\n")
    evaluate.main(options(world, copied, tmp_path / "p.json"))
    assert model_card.NO_TEST not in card.read_text() and "test rows, " in card.read_text()


def test_names_with_dots_do_not_share_files(world, checkpoint_folder, tmp_path):
    for name, beams in (("pred_lr0.1", 10), ("pred_lr0.2", 20), ("pred_lr0.2.json", 5)):
        if name.endswith(".json"):
            with pytest.raises(UserError, match="num_beams is 20 there and 5 now"):  # the same metrics file
                evaluate.main(options(world, checkpoint_folder, tmp_path / name, num_beams=beams))
        else:
            evaluate.main(options(world, checkpoint_folder, tmp_path / name, num_beams=beams))
    for name, beams in (("pred_lr0.1", 10), ("pred_lr0.2", 20)):
        assert json.loads((tmp_path / f"{name}.metrics.json").read_text())["num_beams"] == beams
        assert len(json.loads((tmp_path / name).read_text())[0]["predict"]) == beams


# ------------------------------------------------------------------------------------------------ the checkpoint


def test_the_checkpoints_settings_are_the_default(world, copied, tmp_path, capsys):
    save_settings(copied, ROOT / "config" / "prompt.yaml", Settings("Toys_and_Games", 2, "catalog"))
    given = {"category": "Toys_and_Games", "max_history": 2, "space": "catalog"}
    evaluate.main(options(world, copied, tmp_path / "stored.json"))
    assert "note: --" not in capsys.readouterr().out
    evaluate.main(options(world, copied, tmp_path / "given.json", **given))
    assert results(tmp_path / "stored.json") == results(tmp_path / "given.json")
    evaluate.main(options(world, copied, tmp_path / "other.json", category="Books", max_history=3))
    printed = capsys.readouterr().out
    assert "note: --category Books is used" in printed and "'Toys_and_Games'" in printed
    assert "note: --max_history 3 is used" in printed
    assert results(tmp_path / "other.json")[0] != results(tmp_path / "given.json")[0]


def test_a_model_whose_training_is_not_finished_is_refused(world, copied, tmp_path):
    (copied / "run.json").write_text(json.dumps({"stage": "sft", "complete": False}))
    with pytest.raises(UserError, match="sft has not finished there; re-run it"):
        evaluate.main(options(world, copied, tmp_path / "p.json"))
    assert list(tmp_path.iterdir()) == [copied]
    (copied / "run.json").write_text(json.dumps({"stage": "sft", "complete": True}))
    evaluate.main(options(world, copied, tmp_path / "p.json"))


def truncate(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def add_nan(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def rename_weights(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({f"other.{name}": value for name, value in weights.items()}, folder / "model.safetensors")


BROKEN = {
    "truncated weights": (truncate, "no readable causal language model"),
    "NaN": (add_nan, "model.norm.weight has NaN"),
    "foreign weights": (rename_weights, "weights of the model are missing"),
    "no safetensors": (lambda folder: (folder / "model.safetensors").write_text("{}"), "no readable causal"),
    "a list for a config": (lambda folder: (folder / "config.json").write_text("[1]"), "no readable"),
    "a broken config": (lambda folder: (folder / "config.json").write_text("{"), "no readable"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no readable causal language model"),
    "broken settings": (lambda folder: (folder / "minionerec.json").write_text("[]"), "expected an object"),
    "a broken template": (lambda folder: (folder / "prompt.yaml").write_text("a: ["), "not a prompt template"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_one_line(world, copied, tmp_path, case):
    damage, found = BROKEN[case]
    damage(copied)
    with pytest.raises(UserError, match=found) as refused:
        evaluate.main(options(world, copied, tmp_path / "p.json"))
    assert str(copied) in str(refused.value)
    assert not (tmp_path / "p.json").exists() and not (tmp_path / "p.metrics.json").exists()


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "wrong, found",
    [
        ({"space": "words"}, "--space words: expected vocab or catalog"),
        ({"dtype": "float8"}, "--dtype float8: expected float32 or bfloat16"),
        ({"batch_tokens": 0}, "--batch_tokens 0: expected at least 1"),
        ({"batch_size": -1}, "--batch_size -1: expected at least 1"),
        ({"num_beams": 0}, "--num_beams 0: expected at least 1"),
        ({"K": -1}, "--K -1: expected at least 0"),
        ({"max_history": -2}, "--max_history -2: expected at least 0"),
        ({"test_rows": 0}, "--test_rows 0: expected at least 1, or -1 for all"),
        ({"test_rows": -5}, "--test_rows -5: expected at least 1, or -1 for all"),
        ({"seed": -1}, "--seed -1: expected 0 to"),
        ({"length_penalty": float("nan")}, "--length_penalty nan: expected a finite number"),
        ({"length_penalty": float("inf")}, "--length_penalty inf: expected a finite number"),
        ({"max_new_tokens": 2}, "SIDs have up to 3 tokens"),
        ({"base_model": "nowhere"}, "nowhere: no such file or folder; check --base_model"),
        ({"prompt_template": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        ({"result_json_data": ""}, "--result_json_data is required"),
        ({"result_json_data": "minionerec", "overwrite": True}, "--result_json_data minionerec: found a folder"),
    ],
)
def test_bad_options(world, checkpoint_folder, tmp_path, wrong, found):
    with pytest.raises(UserError, match=found):
        evaluate.main(options(world, checkpoint_folder, tmp_path / "p.json", **wrong))
    assert not (tmp_path / "p.json").exists()


def test_an_error_is_one_line_and_help_is_quick():
    done = run_stage("evaluate.py", "--base_model", "nowhere", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere: no such file or folder")
    assert len(done.stderr.splitlines()) == 1
    listed = "import sys, evaluate; print([m for m in ('torch', 'polars', 'accelerate') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", listed], cwd=ROOT, text=True).strip() == "[]"


# ------------------------------------------------------------------------------------------------ processes


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("rows", [-1, 1])
def test_two_processes_evaluate_as_one(world, checkpoint_folder, tmp_path, rows):
    """Also where one of the two has no row."""
    environment = {"BASE_MODEL": checkpoint_folder, "TEST_DATA_PATH": world.test, "INFO_FILE": world.info}
    environment |= {"TRAIN_FILE": world.train, "NUM_BEAMS": 20, "BATCH_SIZE": 2, "TEST_ROWS": rows}
    for processes in (1, 2):
        output = {"RESULT_JSON_DATA": tmp_path / f"{processes}.json", "NPROC": processes}
        run_stage("evaluate.sh", env=environment | output)
        record = json.loads((tmp_path / f"{processes}.run.json").read_text())
        assert record["complete"] and record["processes"] == processes
    assert results(tmp_path / "1.json") == results(tmp_path / "2.json")
    again = run_stage("evaluate.sh", env=environment | output)
    assert again.stdout.count("nothing to do") == 1 and again.stdout.count("unseen items, by item") == 1
    refused = run_stage("evaluate.sh", "--num_beams", "10", env=environment | output, check=False)
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_by_signal_on_one_process_and_finished_by_two(world, checkpoint_folder, tmp_path):
    """The parts of one process serve two: the batches do not depend on how many share them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    common = {"num_beams": 47, "batch_size": 1, "test_data_path": str(world.train)}

    def start(name, processes):
        settings = dataclasses.asdict(options(world, checkpoint_folder, tmp_path / name, **common))
        flags = [f"--{flag}={value}" for flag, value in settings.items() if value != "" and not isinstance(value, list)]
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
    assert json.loads((tmp_path / "killed.run.json").read_text())["processes"] == 2
    assert results(tmp_path / "killed.json") == results(tmp_path / "whole.json")
