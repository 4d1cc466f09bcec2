"""Baselines: counts by hand, training of each model, the command line and its refusals."""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import sasrec
from data import read_sequences
from minionerec.baselines.counts import markov, popularity
from minionerec.baselines.models import MODELS, SequentialModel
from minionerec.baselines.training import build, fit, item_and_sid_ranks, scorer
from minionerec.catalog.catalog import Catalog
from minionerec.catalog.items import read_info
from minionerec.common.errors import UserError
from sasrec import Options

ROOT = Path(__file__).parent.parent
INDUSTRIAL = ROOT.parent / "shared" / "data" / "industrial"


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on shared cores make tiny models take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sequences(*rows: tuple[list[int], int]) -> pl.DataFrame:
    history, target = zip(*rows, strict=True)
    return pl.DataFrame(
        {"user": [str(i) for i in range(len(rows))], "history": history, "target": target},
        schema_overrides={"history": pl.List(pl.Int64)},
    )


def catalog_of(n_items: int, shared: tuple[int, int] | None = None) -> Catalog:
    """One SID an item, but `shared[1]` has the SID of `shared[0]`."""
    sids = [f"<a_{item}><b_0>" for item in range(n_items)]
    if shared:
        sids[shared[1]] = sids[shared[0]]
    return Catalog(sids)


every_model = pytest.mark.parametrize("name", MODELS)


# ------------------------------------------------------------------------------------------------ counts

#          target: 1 three times, 2 twice, 3 once, 0 and 4 never; item 4 is in a history only
TRAIN = sequences(([0], 1), ([0], 1), ([4, 0], 2), ([2], 3), ([3, 1], 2), ([3], 1))


def test_popularity_counts_targets_and_ties_go_to_the_lower_id():
    score = popularity(TRAIN, 5)
    assert score([[0], [3, 2]]).tolist() == [[0, 3, 2, 1, 0]] * 2
    ranks, _ = item_and_sid_ranks(score, sequences(*(([0], item) for item in range(5))), catalog_of(5))
    assert ranks.tolist() == [3, 0, 1, 2, 4]


def test_markov_ranks_by_transitions_from_the_last_item_then_by_popularity():
    score = markov(TRAIN, 5)
    # from 0: 1 twice, 2 once, then 3 by popularity, then 0 and 4 by id; from 2: 3 once, then 1, 2, 0, 4
    cases = [([0], [3, 0, 1, 2, 4]), ([3, 2], [3, 1, 2, 0, 4]), ([4], [3, 0, 1, 2, 4]), ([], [3, 0, 1, 2, 4])]
    for history, expected in cases:
        ranks, _ = item_and_sid_ranks(score, sequences(*((history, item) for item in range(5))), catalog_of(5))
        assert ranks.tolist() == expected, history


def test_one_transition_outweighs_any_popularity():
    train = sequences(*[([0], 1)] * 50, ([2], 3))
    assert markov(train, 4)([[2]])[0].argmax() == 3


def test_sid_rank_counts_distinct_sids_by_their_best_item():
    # scores 0, 3, 2, 1, 0 with items 1 and 4 under one SID: SIDs in order {1, 4}, 2, 3, 0
    rows = sequences(*(([0], item) for item in range(5)))
    items, sids = item_and_sid_ranks(popularity(TRAIN, 5), rows, catalog_of(5, shared=(1, 4)))
    assert items.tolist() == [3, 0, 1, 2, 4]
    assert sids.tolist() == [3, 0, 1, 2, 0]


def test_ranks_do_not_depend_on_how_many_rows_are_scored_at_once(monkeypatch):
    rows = sequences(*(([i % 4], i % 5) for i in range(23)))
    whole = item_and_sid_ranks(markov(TRAIN, 5), rows, catalog_of(5))
    monkeypatch.setattr(sasrec, "ROWS_AT_ONCE", 4)
    parts = item_and_sid_ranks(markov(TRAIN, 5), rows, catalog_of(5))
    assert all((a == b).all() for a, b in zip(whole, parts, strict=True))


def test_metrics_are_those_of_sorted_lists():
    """HR, NDCG and MRR of a random ranking from its sorted lists, without metrics.py."""
    scores = np.random.default_rng(0).integers(0, 30, (40, 25)).astype(float)  # with ties: the lower id is first
    rows = sequences(*(([0], row % 25) for row in range(40)))
    ranks, _ = item_and_sid_ranks(lambda histories: scores, rows, catalog_of(25))
    found = sasrec.table(ranks)
    places = [sorted(range(25), key=lambda i: (-scores[r, i], i)).index(r % 25) + 1 for r in range(40)]
    for k in (1, 5, 10):
        assert found[f"HR@{k}"] == pytest.approx(sum(p <= k for p in places) / 40)
        assert found[f"NDCG@{k}"] == pytest.approx(sum(np.log(2) / np.log(p + 1) for p in places if p <= k) / 40)
    assert found["MRR"] == pytest.approx(sum(1 / p for p in places) / 40)


# ------------------------------------------------------------------------------------------------ training


@every_model
def test_before_training_a_model_with_popularity_bias_expects_popularity(name):
    options = Options("", "", "", "", "", model=name)
    counts = [5, 0, 9, 2, 100, 1, 30]
    model = build(options, len(counts))
    with torch.no_grad():
        model.items.weight.mul_(1e-4)
    model.start_from_popularity(counts)
    expected = torch.tensor(counts) + 1.0
    torch.testing.assert_close(model.scores([[1, 2]])[0].softmax(0), expected / expected.sum(), rtol=1e-3, atol=0)


def cycle(n: int) -> pl.DataFrame:
    """Every window of one to three items of the cycle 0, 1, ... n-1, 0."""
    return sequences(
        *(([(i - 2) % n, (i - 1) % n, i][-length:], (i + 1) % n) for i in range(n) for length in (1, 2, 3))
    )


@every_model
@pytest.mark.parametrize("settings", [("ce", "last"), ("ce", "all"), ("bce", "all")])
def test_a_model_learns_a_cycle(tmp_path, name, settings):
    n, rows = 20, cycle(20)
    options = Options("", "", "", "", str(tmp_path), model=name, hidden_size=32, dropout=0.1, device="cpu")
    options.epochs, options.batch_size, options.learning_rate, options.early_stop = 40, 16, 1e-2, 0
    options.loss, options.loss_positions = settings
    options.negatives = 4 if options.loss == "bce" else 1
    trained = fit(options, rows, rows, catalog_of(n))
    ranks, _ = item_and_sid_ranks(scorer(trained.model), rows, catalog_of(n))
    # Sampled negatives are never of the row: nothing holds its up to three items below the target. By popularity, all
    # counts being equal, the target would be first in 5 % of the rows and among the first four in 20 %.
    assert (ranks < (4 if options.loss == "bce" else 1)).mean() >= 0.95
    assert trained.ndcg == pytest.approx(float((1 / np.log2(ranks[ranks < 10] + 2)).sum() / len(ranks)))


@every_model
def test_flags_reach_the_model(name):
    flags = {"max_history": 7, "hidden_size": 12, "dropout": 0.4, "tie_embeddings": False}
    own = {"sasrec": {"num_layers": 3, "num_heads": 3}, "gru4rec": {"num_layers": 3}}
    own["caser"] = {"num_filters": 5, "filter_sizes": [2, 7], "num_vertical": 3}
    values = flags | own[name]
    texts = values | ({"filter_sizes": "2,7"} if name == "caser" else {})
    model = build(Options("", "", "", "", "", model=name, **texts), 9)
    assert model.config == values | {"n_items": 9} and model.outputs is not None


@pytest.mark.parametrize("bias", [True, False])
def test_popularity_bias_is_where_training_starts(bias):
    rows = sequences(*[([0], 3)] * 30, *[([0], 1)] * 10, ([0], 2))
    options = Options("", "", "", "", "", epochs=1, learning_rate=1e-12, popularity_bias=bias, device="cpu")
    model = fit(options, rows, rows, catalog_of(4)).model
    shares = torch.tensor([1.0, 11.0, 2.0, 31.0]) / 45  # one added to each count
    expected = shares.log() - shares.log().mean() if bias else torch.zeros(4)
    torch.testing.assert_close(model.bias - model.bias.mean(), expected)


def test_all_positions_teach_what_no_target_says():
    """1 follows 0 inside the one history, whose target is 4: only `all` learns it."""
    rows, asked = sequences(*[([0, 1, 2, 3], 4)] * 16), sequences(([0], 1))
    options = Options("", "", "", "", "", epochs=15, batch_size=4, learning_rate=1e-2, dropout=0.0, device="cpu")
    options.popularity_bias, first = False, {}
    for options.loss_positions in ("all", "last"):
        model = fit(options, rows, asked, catalog_of(8)).model
        first[options.loss_positions] = int(model.scores([[0]]).argmax())
    assert first["all"] == 1 != first["last"]


def test_what_is_kept_is_the_best_epoch_on_valid(capsys):
    """Valid runs the other way round: the longer it trains, the worse; the first epochs are kept and end training."""
    n, rows = 12, cycle(12)
    against = sequences(*(([i], (i - 1) % n) for i in range(n)))
    options = Options("", "", "", "", "", epochs=30, early_stop=3, batch_size=8, learning_rate=1e-2, device="cpu")
    trained = fit(options, rows, against, catalog_of(n))
    ranks, _ = item_and_sid_ranks(scorer(trained.model), against, catalog_of(n))
    assert trained.epoch < 15
    assert capsys.readouterr().out.count("valid NDCG@10") == trained.epoch + 3
    assert trained.ndcg == pytest.approx(float((1 / np.log2(ranks[ranks < 10] + 2)).sum() / len(ranks)))


# ------------------------------------------------------------------------------------------------ command line


def layout(folder: Path) -> dict[str, str]:
    """Ten items in a cycle, forty train rows, in the published layout; returns the flags of its files."""
    sids = [f"<a_{i // 4}><b_{i % 4}>" for i in range(10)]
    (folder / "info.txt").write_text("".join(f"{sid}\tItem, {i}\t{i}\n" for i, sid in enumerate(sids)))
    header = ["user_id", "history_item_title", "item_title", "history_item_id", "item_id"]
    header += ["history_item_sid", "item_sid"]
    for name, rows in (("train", range(40)), ("valid", range(10)), ("test", range(10))):
        histories = [[(r + i) % 10 for i in range(1 + r % 3)] for r in rows]
        targets = [(h[-1] + 1) % 10 for h in histories]
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


def launch(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = (
        {k: v for k, v in os.environ.items() if not k.endswith("_FILE")}
        | {"PATH": path, "OMP_NUM_THREADS": "1"}
        | variables
    )
    return subprocess.run(["bash", ROOT / "sasrec.sh", *arguments], env=environment, capture_output=True, text=True)


def test_launcher_and_a_second_run_with_the_same_seed(tmp_path):
    files, tiny = layout(tmp_path), {"epochs": 3, "batch_size": 8, "hidden_size": 8}
    variables = {name.upper(): str(value) for name, value in (files | tiny).items()}
    done = launch(**(variables | {"DEVICE": "cpu", "OUTPUT_DIR": str(tmp_path / "one")}))
    assert done.returncode == 0, done.stderr
    assert "test, by item" in done.stdout
    sasrec.main(Options(**(files | tiny | {"output_dir": str(tmp_path / "two")}), device="cpu"))
    results = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("one", "two")]
    for key in ("model", "item", "sid", "valid", "intervals", "inputs"):
        assert results[0][key] == results[1][key], key
    assert set(results[0]["item"]) == set(results[0]["sid"]) == set(results[0]["intervals"])
    assert results[0]["options"]["hidden_size"] == 8
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["config.json", "metrics.json", "model.safetensors"]


@every_model
def test_a_killed_run_ends_as_an_unbroken_one_and_the_seed_decides(tmp_path, name, monkeypatch):
    flags, tiny = layout(tmp_path), {"epochs": 3, "batch_size": 8, "hidden_size": 8, "model": name, "device": "cpu"}

    def train(folder: str, seed: int = 1) -> tuple[bytes, dict]:
        sasrec.main(Options(**(flags | tiny | {"output_dir": str(tmp_path / folder)}), seed=seed))
        result = json.loads((tmp_path / folder / "metrics.json").read_text())
        return (tmp_path / folder / "model.safetensors").read_bytes(), {k: result[k] for k in ("item", "sid", "valid")}

    unbroken, save = train("one"), SequentialModel.save

    def killed(model, folder):  # after training and half of saving
        save(model, folder)
        Path(folder, "config.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(SequentialModel, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train("two")
    assert not (tmp_path / "two" / "metrics.json").exists()
    monkeypatch.undo()
    assert train("two") == unbroken
    assert train("three", seed=2)[0] != unbroken[0]


def test_launcher_refuses_arguments_and_missing_variables():
    assert launch("--help").stdout.startswith("usage:")
    refused, unset = launch("--epochs"), launch(MODEL="markov", TRAIN_FILE="train.csv")
    assert refused.returncode == unset.returncode == 2
    assert refused.stderr.count("\n") == 1 and "--epochs" in refused.stderr
    assert unset.stderr.count("\n") == 1 and "VALID_FILE" in unset.stderr


def test_launcher_and_script_have_the_same_defaults():
    text = (ROOT / "sasrec.sh").read_text()
    for name, field in Options.__dataclass_fields__.items():
        if name.endswith("_file") or name == "output_dir":
            continue
        assert f"--{name} " in text
        written = text.split(f"\n{name.upper()}=${{{name.upper()}:-")[1].split("}")[0]
        parsed = {"True": True, "False": False}[written] if field.type is bool else field.type(written)
        assert parsed == field.default, name


def test_a_finished_run_is_not_done_again_unless_options_or_files_change(tmp_path, monkeypatch, capsys):
    flags = layout(tmp_path)
    runs = []
    original = markov
    monkeypatch.setattr(sasrec, "markov", lambda *a: runs.append(1) or original(*a))
    for expected, seed in ((1, 1), (1, 1), (2, 2)):
        sasrec.main(Options(**flags, model="markov", seed=seed))
        assert len(runs) == expected
        assert "test, by item" in capsys.readouterr().out
    test = pl.read_csv(flags["test_file"])
    test.head(5).write_csv(flags["test_file"])
    sasrec.main(Options(**flags, model="markov", seed=2))
    assert len(runs) == 3


BAD = {
    "missing file": ({"test_file": "nowhere.csv"}, "nowhere.csv: no such file"),
    "missing column": ({}, "no column 'item_id'"),
    "heads": ({"hidden_size": "64", "num_heads": "6"}, "a multiple of --num_heads 6, such as [60, 66]"),
    "unknown model": ({"model": "bert"}, "expected one of popularity, markov, sasrec, gru4rec, caser"),
    "another model's flag": ({"model": "GRU4Rec", "num_heads": "4"}, "gru4rec with --loss ce does not use it"),
    "another loss's flag": ({"negatives": "4"}, "--negatives 4"),
    "loss": ({"loss": "bpr"}, "--loss bpr: expected ce or bce"),
    "no negatives": ({"loss": "bce"}, "10 items may all be in one row"),
    "filter text": ({"model": "caser", "filter_sizes": "2;3"}, "--filter_sizes 2;3"),
    "filter too high": ({"model": "caser", "filter_sizes": "2,11"}, "each from 1 to --max_history 10"),
    "dropout": ({"dropout": "1.5"}, "--dropout 1.5"),
    "learning rate": ({"learning_rate": "0"}, "--learning_rate 0.0"),
    "epochs": ({"epochs": "0"}, "--epochs 0"),
    "sample": ({"sample": "0"}, "--sample 0"),
    "positions": ({"loss_positions": "first"}, "--loss_positions first"),
    "device": ({"device": "abacus"}, "--device abacus"),
    "unknown flag": ({"hidden_units": "64"}, "unknown option --hidden_units"),
    "max_history": ({"max_history": "0"}, "--max_history 0"),
    "output is a file": ({"output_dir": __file__}, "expected a folder, and a file"),
}


def test_published_flags_and_names_are_understood(monkeypatch):
    flags = "--model GRU --lr 0.01 --hidden_factor 16 --dropout_rate 0.3 --loss_type bce --epoch 4 --filter_sizes [2,3]"
    files = "--train_file a --valid_file b --test_file c --info_file d --output_dir e"
    monkeypatch.setattr(sys, "argv", ["sasrec.py", *flags.split(), *files.split()])
    got = []
    sasrec.run(got.append, Options)
    o = got[0]
    assert (o.model, o.learning_rate, o.hidden_size, o.dropout) == ("gru4rec", 0.01, 16, 0.3)
    assert (o.loss, o.epochs, sasrec.filter_heights(o.filter_sizes)) == ("bce", 4, [2, 3])


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line(tmp_path, case, monkeypatch, capsys):
    flags = layout(tmp_path)
    changes, message = BAD[case]
    if case == "missing column":
        pl.read_csv(flags["train_file"]).drop("item_id").write_csv(flags["train_file"])
    flags |= changes
    monkeypatch.setattr(sys, "argv", ["sasrec.py", *(p for f, v in flags.items() for p in (f"--{f}", v))])
    with pytest.raises(SystemExit) as stopped:
        sasrec.run(sasrec.main, Options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1 and message in error, error
    assert not (tmp_path / "out").exists()


def test_a_loss_that_diverges_ends_in_one_line(tmp_path):
    with pytest.raises(UserError, match="lower --learning_rate"):
        sasrec.main(Options(**layout(tmp_path), learning_rate=1e30, weight_decay=0.0, epochs=5, batch_size=4))
    assert not (tmp_path / "out" / "metrics.json").exists()


# ------------------------------------------------------------------------------------------------ real data


@pytest.mark.skipif(not INDUSTRIAL.exists(), reason="the shared data is not here")
def test_reference_numbers_on_industrial():
    """Measured independently of this code. Among equal transition counts the reference takes the first seen in train,
    ours the most popular, which is stronger: .1052; a slow twin below has both."""
    name = "Industrial_and_Scientific_5_2016-10-2018-11"
    sids = read_info(INDUSTRIAL / "info" / f"{name}.txt").sids
    train, test = (read_sequences(INDUSTRIAL / s / f"{name}.csv", sids, s) for s in ("train", "test"))
    catalog, targets = Catalog(sids), test["target"].to_list()

    def hr_at_10(score) -> float:
        return float((item_and_sid_ranks(score, test, catalog)[0] < 10).mean())

    counts = Counter(train["target"].to_list())
    most_popular = sorted(range(len(sids)), key=lambda item: -counts[item])[:40]
    following = defaultdict(Counter)
    for history, target in train.select("history", "target").iter_rows():
        following[history[-1]][target] += 1

    def slow_hr_at_10(order) -> float:
        hits = 0
        for history, target in zip(test["history"].to_list(), targets, strict=True):
            known = order(following[history[-1]])
            hits += target in (known + [item for item in most_popular if item not in known])[:10]
        return hits / len(targets)

    def by_popularity(counter: Counter) -> list[int]:
        return sorted(counter, key=lambda item: (-counter[item], -counts[item], item))

    assert hr_at_10(popularity(train, len(sids))) == pytest.approx(0.0609, abs=0.002)
    assert slow_hr_at_10(lambda counter: [item for item, _ in counter.most_common()]) == pytest.approx(0.1026, abs=1e-4)
    assert hr_at_10(markov(train, len(sids))) == pytest.approx(slow_hr_at_10(by_popularity), abs=1e-9)
    assert hr_at_10(markov(train, len(sids))) == pytest.approx(0.1052, abs=1e-4)
