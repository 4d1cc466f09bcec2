"""sasrec.py through its command line.

Invariants: the launcher and the script give the same result for the same seed, under both protocols; a killed run ends as
an unbroken one; a finished run is skipped, one with other settings or files is refused or moved aside; every published
flag is understood; whatever is wrong is one line, and nothing is written.
"""

import json
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from helpers import run_stage

import sasrec
from data import load
from minionerec.baselines import counts, training
from minionerec.baselines.models import MODELS, SequentialModel, load_checkpoint
from minionerec.baselines.options import filter_heights
from minionerec.common.errors import UserError
from minionerec.common.options import parse, run
from minionerec.evaluation.metrics import table
from minionerec.evaluation.protocols import by_scores
from sasrec import Options

every_model = pytest.mark.parametrize("name", MODELS)
TINY = {"epochs": 3, "batch_size": 8, "hidden_size": 8, "max_history": 10}
N = 10


def layout(folder: Path) -> dict[str, str]:
    """Ten items in a cycle, forty train rows, in the published layout; returns the flags of its files."""
    sids = [f"<a_{i // 4}><b_{i % 4}>" for i in range(N)]
    (folder / "info.txt").write_text("".join(f"{sid}\tItem, {i}\t{i}\n" for i, sid in enumerate(sids)))
    header = ["user_id", "history_item_title", "item_title", "history_item_id", "item_id"]
    header += ["history_item_sid", "item_sid"]
    for name, rows in (("train", range(40)), ("valid", range(10)), ("test", range(10))):
        histories = [[(r + i) % N for i in range(1 + r % 3)] for r in rows]
        targets = [(h[-1] + 1) % N for h in histories]
        pl.DataFrame(
            [
                (str(r), str([f"Item, {i}" for i in h]), f"Item, {t}", str(h), t, str([sids[i] for i in h]), sids[t])
                for r, h, t in zip(rows, histories, targets, strict=True)
            ],
            schema=header,
            orient="row",
        ).write_csv(folder / f"{name}.csv")
    return {f"{n}_file": str(folder / f) for n, f in _FILES.items()} | {"output_dir": str(folder / "out")}


_FILES = {"train": "train.csv", "valid": "valid.csv", "test": "test.csv", "info": "info.txt"}


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def result_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


# ------------------------------------------------------------------------------------------------ runs


def test_launcher_and_a_second_run_with_the_same_seed(tmp_path):
    files = layout(tmp_path)
    variables = {name.upper(): value for name, value in (files | TINY).items()}
    done = run_stage("sasrec.sh", env=variables | {"DEVICE": "cpu", "OUTPUT_DIR": tmp_path / "one"})
    assert "test, by item" in done.stdout and "unseen items" in done.stdout
    sasrec.main(Options(**files | TINY | {"output_dir": str(tmp_path / "two")}, device="cpu"))
    results = [result_of(tmp_path / folder) for folder in ("one", "two")]
    assert results[0] == results[1] and results[0]["headline"] == "unseen"
    for part in (results[0], results[0]["unseen"]):
        assert set(part["item"]) == set(part["sid"]) == set(part["intervals"])
    files = ["README.md", "config.json", "log.jsonl", "metrics.json", "model.safetensors", "ranks.npz", "run.json"]
    assert written(tmp_path / "one") == files == written(tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", ["popularity", "markov", "sasrec"])
def test_metrics_are_those_of_the_saved_model(tmp_path, name):
    """Both protocols on test, the headline on valid."""
    files = layout(tmp_path)
    sasrec.main(Options(**files | (TINY if name in MODELS else {}), model=name, device="cpu"))
    model = load_checkpoint(files["output_dir"], n_items=N)
    paths = {split: files[f"{split}_file"] for split in ("train", "valid", "test")}
    data = load(info_file=files["info_file"], **paths)
    result, score = result_of(tmp_path / "out"), training.scorer(model)
    found = by_scores(score, data.test, data.catalog)
    assert result["item"] == table(found["all"].item) and result["sid"] == table(found["all"].sid)
    assert result["unseen"]["item"] == table(found["unseen"].item)
    assert result["valid"] == table(by_scores(score, data.valid, data.catalog)["unseen"].item)
    ranks = np.load(tmp_path / "out" / "ranks.npz")
    assert np.array_equal(ranks["unseen_item"], found["unseen"].item)


@every_model
def test_a_killed_run_ends_as_an_unbroken_one_and_the_seed_decides(tmp_path, name, monkeypatch):
    flags = layout(tmp_path) | TINY | {"model": name, "device": "cpu"}

    def train(folder: str, seed: int = 1) -> tuple[bytes, dict]:
        sasrec.main(Options(**flags | {"output_dir": str(tmp_path / folder)}, seed=seed))
        return (tmp_path / folder / "model.safetensors").read_bytes(), result_of(tmp_path / folder)

    unbroken, save, loss, calls = train("one"), SequentialModel.save, MODELS[name].loss, []

    def killed(model, folder):  # after training and half of saving
        save(model, folder)
        Path(folder, "config.json").unlink()
        raise KeyboardInterrupt

    def killed_early(*arguments, **named):  # in the second epoch
        calls.append(1)
        if len(calls) > 7:
            raise KeyboardInterrupt
        return loss(*arguments, **named)

    for owner, function, replacement in ((MODELS[name], "loss", killed_early), (SequentialModel, "save", killed)):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(owner, function, replacement)
            train("two")
        assert not (tmp_path / "two" / "metrics.json").exists() and (tmp_path / "two" / sasrec.STATE).exists()
    assert train("two") == unbroken
    assert written(tmp_path / "two") == written(tmp_path / "one")
    assert train("three", seed=2)[0] != unbroken[0]


def test_item_vectors_in_place_of_item_ids(tmp_path):
    files = layout(tmp_path)
    vectors = np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", vectors)
    given = files | TINY | {"item_features": str(tmp_path / "x.npy"), "device": "cpu"}
    sasrec.main(Options(**given))
    model = load_checkpoint(files["output_dir"], n_items=N)
    assert torch.equal(model.features, torch.from_numpy(vectors))
    assert result_of(tmp_path / "out")["rows"] == 10
    np.save(tmp_path / "x.npy", vectors[:-1])
    with pytest.raises(UserError, match=r"x.npy: 9 rows, expected the 10 items of .*info.txt; check --item_features"):
        sasrec.main(Options(**given | {"output_dir": str(tmp_path / "other")}))


@pytest.mark.parametrize("name", [*counts.MODELS, *MODELS])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path, name):
    sasrec.main(Options(**layout(tmp_path) | (TINY if name in MODELS else {}), model=name, device="cuda"))
    assert result_of(tmp_path / "out")["rows"] == 10


# ------------------------------------------------------------------------------------------------ records


def test_a_finished_run_is_skipped_and_another_is_refused_or_moved_aside(tmp_path, monkeypatch, capsys):
    flags, runs, original = layout(tmp_path), [], counts.save
    monkeypatch.setattr(counts, "save", lambda *a: runs.append(1) or original(*a))
    for _ in range(2):
        sasrec.main(Options(**flags, model="markov", seed=1))
        assert "test, by item" in capsys.readouterr().out and len(runs) == 1
    with pytest.raises(UserError, match="seed is 1 there and 2 now"):
        sasrec.main(Options(**flags, model="markov", seed=2))
    sasrec.main(Options(**flags, model="markov", seed=2, overwrite=True))
    assert len(runs) == 2 and (tmp_path / "out.1" / "metrics.json").exists()
    pl.read_csv(flags["test_file"]).head(5).write_csv(flags["test_file"])
    with pytest.raises(UserError, match="the content of test_file has changed"):
        sasrec.main(Options(**flags, model="markov", seed=2))


@pytest.mark.parametrize("model", ["popularity", "sasrec"])
def test_a_state_that_this_run_did_not_write_stays(tmp_path, model):
    """Whether the run is complete, or is made again because a file is missing."""
    options = Options(**layout(tmp_path) | (TINY if model == "sasrec" else {}), model=model, device="cpu")
    sasrec.main(options)
    foreign = tmp_path / "out" / sasrec.STATE
    foreign.write_text("mine")
    sasrec.main(options)
    assert foreign.read_text() == "mine"
    (tmp_path / "out" / "config.json").unlink()
    if model == "popularity":
        sasrec.main(options)
    else:
        with pytest.raises(UserError, match="training.pt: cannot be resumed from"):
            sasrec.main(options)
    assert foreign.read_text() == "mine"


def test_a_damaged_or_foreign_state_is_one_line(tmp_path, monkeypatch):
    files, state = layout(tmp_path) | TINY, tmp_path / "out" / sasrec.STATE
    for folder in ("out", "other"):  # both die after training
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(SequentialModel, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            sasrec.main(Options(**files | {"output_dir": str(tmp_path / folder)}, device="cpu"))
    whole, other = state.read_bytes(), (tmp_path / "other" / sasrec.STATE).read_bytes()
    torch.save({"model": {}}, tmp_path / "x.pt")
    for content in (b"", whole[:1000], b"text", (tmp_path / "x.pt").read_bytes(), other):
        state.write_bytes(content)
        with pytest.raises(UserError, match=r"training.pt: cannot be resumed from \(.+\); move it away to train from"):
            sasrec.main(Options(**files, device="cpu"))
        assert state.read_bytes() == content
    state.write_bytes(whole)
    sasrec.main(Options(**files, device="cpu"))
    assert not state.exists() and result_of(tmp_path / "out")


# ------------------------------------------------------------------------------------------------ flags


def test_published_flags_and_names_are_understood():
    flags = "--model GRU --lr 0.01 --hidden_factor 16 --dropout_rate 0.3 --loss_type bce --epoch 4"
    found = parse(Options, flags.split())
    assert (found.model, found.learning_rate, found.hidden_size, found.dropout) == ("gru4rec", 0.01, 16, 0.3)
    assert (found.loss, found.epochs) == ("bce", 4)
    assert filter_heights(parse(Options, ["--model", "caser", "--filter_sizes", "[2,3]"]).filter_sizes) == [2, 3]


BAD = {
    "missing file": ({"test_file": "nowhere.csv"}, "nowhere.csv: no such file"),
    "missing column": ({}, "no column 'item_id'"),
    "heads": ({"hidden_size": "64", "num_heads": "6"}, "a multiple of --num_heads 6, such as [60, 66]"),
    "unknown model": ({"model": "bert"}, "expected one of popularity, markov, sasrec, gru4rec, caser"),
    "another model's flag": ({"model": "GRU4Rec", "num_heads": "4"}, "--num_heads 4: expected nothing: gru4rec does not use it"),
    "another loss's flag": ({"loss": "ce", "negatives": "4"}, "--negatives 4: expected nothing: sasrec with --loss ce does"),
    "loss": ({"loss": "bpr"}, "--loss bpr: expected one of ce, sampled_softmax, bce"),
    "no negatives": ({"loss": "bce"}, "10 items may all be in one row"),
    "filter text": ({"model": "caser", "filter_sizes": "2;3"}, "--filter_sizes 2;3"),
    "filter too high": ({"model": "caser", "filter_sizes": "2,9", "max_history": "8"}, "each from 1 to 8"),
    "filter above the window": ({"model": "caser", "filter_sizes": "2,11"}, "each from 1 to 10"),
    "dropout": ({"dropout": "1.5"}, "--dropout 1.5"),
    "learning rate": ({"learning_rate": "0"}, "--learning_rate 0.0"),
    "epochs": ({"epochs": "0"}, "--epochs 0"),
    "time": ({"time_budget": "-1"}, "--time_budget -1.0: expected at least 0"),
    "rows of valid": ({"eval_rows": "0"}, "--eval_rows 0: expected at least 1, or -1 for all"),
    "item vectors": ({"item_features": "nowhere.npy"}, "nowhere.npy: no such file"),
    "device": ({"device": "abacus"}, "--device abacus"),
    "unknown flag": ({"loss_positions": "last"}, "unknown option --loss_positions"),
    "max_history": ({"max_history": "0"}, "--max_history 0"),
    "output is a file": ({"output_dir": __file__}, "test_sasrec.py"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line(tmp_path, case, monkeypatch, capsys):
    flags = layout(tmp_path)
    changes, message = BAD[case]
    if case == "missing column":
        pl.read_csv(flags["train_file"]).drop("item_id").write_csv(flags["train_file"])
    flags |= changes
    monkeypatch.setattr(sys, "argv", ["sasrec.py", *(p for f, v in flags.items() for p in (f"--{f}", v))])
    with pytest.raises(SystemExit) as stopped:
        run(sasrec.main, Options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1 and message in error, error
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_loss_that_diverges_ends_in_one_line(tmp_path):
    with pytest.raises(UserError, match="lower --learning_rate"):
        sasrec.main(Options(**layout(tmp_path) | TINY, learning_rate=1e30, weight_decay=0.0, device="cpu"))
    assert not (tmp_path / "out" / "metrics.json").exists()
