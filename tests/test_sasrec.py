"""Baselines: hand-computed counts, SASRec's causality and padding, the command line and its refusals."""

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
from catalog import Catalog
from cli import UserError
from data import read_info, read_sequences
from sasrec import Options, SASRec, item_and_sid_ranks, markov, popularity

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


def small(n_items: int = 12, **changes) -> SASRec:
    torch.manual_seed(0)
    sizes = {"max_history": 5, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.5}
    model = SASRec(n_items=n_items, **(sizes | changes))
    for p in model.parameters():  # positions and biases must matter, or causality and padding are easily right
        torch.nn.init.normal_(p, std=0.5)
    return model.eval()


# ------------------------------------------------------------------------------------------------ counts

#          target: 1 three times, 2 twice, 3 once, 0 and 4 never; item 4 stands in a history only
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


# ------------------------------------------------------------------------------------------------ SASRec


def test_a_position_sees_nothing_after_it():
    model = small()
    one = torch.tensor([[1, 2, 3, 4, 5]])
    other = torch.tensor([[1, 2, 3, 9, 10]])
    a, b = model(one, keep=5), model(other, keep=5)
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert (a[:, 3:] - b[:, 3:]).abs().max() > 1e-3


def test_every_item_of_the_history_reaches_the_last_position():
    model, history = small(), [1, 2, 3, 4, 5]
    for place in range(5):
        changed = history[:place] + [11] + history[place + 1 :]
        assert (model.scores([history]) - model.scores([changed])).abs().max() > 1e-3, place


def test_left_padding_does_not_change_scores():
    model = small()
    short = model.logits(model(torch.tensor([[7, 2, 5]])))[:, 0]
    padded = model.scores([[7, 2, 5]])
    torch.testing.assert_close(short, padded)
    with torch.no_grad():
        model.items.weight[12] = 100.0  # nor does what stands in the padding's row
    torch.testing.assert_close(model.scores([[7, 2, 5]]), padded)


def test_scores_of_a_batch_equal_scores_row_by_row_without_dropout():
    model = small().train()
    histories = [[1], [2, 3], [], [4, 5, 6, 7, 8, 9, 10, 11], [0, 0, 0]]
    together = model.scores(histories)
    assert together.shape == (5, 12) and together.isfinite().all()
    torch.testing.assert_close(together, torch.cat([model.scores([h]) for h in histories]))
    torch.testing.assert_close(together[3:4], model.scores([[7, 8, 9, 10, 11]]))  # the latest max_history


@pytest.mark.parametrize("item", [-1, 12, 1000])
def test_an_unknown_item_has_no_score(item):
    with pytest.raises(ValueError, match=f"item {item} is not in the catalog"):
        small().scores([[1, 2], [3, item]])


def test_loss_over_all_positions_is_the_mean_over_prefixes():
    """With positions that do not matter, a row of n items is n rows, one for each prefix."""
    model = small()
    with torch.no_grad():
        model.positions.weight.zero_()
    rows = [([3, 1, 4], 1), ([5], 9), ([2, 6, 5, 3, 5], 8)]
    prefixes = [((h + [t])[: i + 1], (h + [t])[i + 1]) for h, t in rows for i in range(len(h))]
    whole, split = (model.pad([h for h, _ in part]) for part in (rows, prefixes))
    targets = [torch.tensor([t for _, t in part]) for part in (rows, prefixes)]
    torch.testing.assert_close(model.loss(whole, targets[0], True), model.loss(split, targets[1], False))


@pytest.mark.parametrize("positions", ["last", "all"])
def test_sasrec_learns_a_cycle(tmp_path, positions):
    n = 20
    rows = sequences(
        *(([(i - 2) % n, (i - 1) % n, i][-length:], (i + 1) % n) for i in range(n) for length in (1, 2, 3))
    )
    options = Options("", "", "", "", str(tmp_path), epochs=40, batch_size=16, learning_rate=1e-2, device="cpu")
    options.loss_positions, options.hidden_size, options.early_stop, options.dropout = positions, 32, 0, 0.1
    score = sasrec.sasrec(rows, rows, catalog_of(n), options)
    ranks, _ = item_and_sid_ranks(score, rows, catalog_of(n))
    assert (ranks == 0).all()
    kept = SASRec.load(tmp_path).scores(rows["history"].to_list()).numpy()
    np.testing.assert_array_equal(kept, score(rows["history"].to_list()))


def test_save_and_load_give_equal_scores(tmp_path):
    model, histories = small(), [[1, 2, 3], [11]]
    model.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = SASRec.load(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded.scores(histories), model.scores(histories))


def test_load_refuses_another_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        SASRec.load(tmp_path)
    small().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(UserError, match="cf_path"):
        SASRec.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="cf_path"):
        SASRec.load(tmp_path)


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
        assert type(field.default)(written) == field.default, name


def test_a_finished_run_is_not_done_again_unless_options_or_files_change(tmp_path, monkeypatch, capsys):
    flags = layout(tmp_path)
    runs = []
    original = sasrec.markov
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
    "unknown model": ({"model": "bert"}, "expected one of popularity, markov, sasrec"),
    "model to come": ({"model": "gru4rec"}, "not built yet"),
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
