"""The smallest and the largest data: catalogs of 1, 2 and 100,000 items (`CATALOG_SIZE=1000000` for a million), histories
of 0 and 10,000 items, users with one interaction.

Invariants: each stage works, or says in one line why it cannot; what it writes has as many rows and items as it read.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import bench

from minionerec.common.errors import UserError

SPLITS = ("train", "valid", "test")
LARGE = int(os.environ.get("CATALOG_SIZE", 100_000))  # items; 1000000 takes minutes


def write_data(folder: Path, n_items: int, rows: dict[str, list[tuple[list[int], int]]], sids=None) -> None:
    """The files of stage 3 for a catalog of `n_items`. sids: codes of each item; default (item, 0)."""
    codes = sids if sids is not None else [(item, 0) for item in range(n_items)]
    index = {
        str(i): [f"<{letter}_{c}>" for letter, c in zip("abc", code, strict=False)] for i, code in enumerate(codes)
    }
    items = {str(i): {"title": f"Item {i}", "description": "", "brand": "", "categories": ""} for i in range(n_items)}
    (folder / "toy.index.json").write_text(json.dumps(index))
    (folder / "toy.item.json").write_text(json.dumps(items))
    for split in SPLITS:
        lines = ["user_id:token\titem_id_list:token_seq\titem_id:token"]
        lines += [f"u{i}\t{' '.join(map(str, past))}\t{target}" for i, (past, target) in enumerate(rows[split])]
        (folder / f"toy.{split}.inter").write_text("\n".join(lines) + "\n")


def call(stage: str, **options) -> None:
    bench.call(stage, options)


def train_and_score(n_items: int, capsys) -> dict:
    """Stage 3, baselines, a base model, an SFT step, an evaluation and a recommendation; returns the metrics."""
    call("convert_dataset", output_dir=".")
    for model in ("popularity", "markov", "sasrec"):
        call("sasrec", model=model, output_dir=model, negatives=None)
    call("base_model", output_dir="base")
    call("sft", output_dir="sft", num_epochs=1, learning_rate=1e-3)
    call("evaluate", num_beams=2, test_rows=-1)
    metrics = json.loads(Path("out/p.metrics.json").read_text())
    capsys.readouterr()
    call("recommend", history="0", unseen=False)
    assert "Item 0" in capsys.readouterr().out
    return metrics


@pytest.mark.slow
@pytest.mark.parametrize("n_items", [1, 2])
def test_the_smallest_catalogs(n_items, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [([], 0), ([0], n_items - 1), ([0, n_items - 1], 0)] * 8
    write_data(tmp_path, n_items, dict.fromkeys(SPLITS, rows))
    metrics = train_and_score(n_items, capsys)
    assert metrics["rows"] == 24 and metrics["illegal"] == 0 and metrics["num_beams"] == n_items
    groups = {"num_generations": 2, "train_batch_size": 4, "eval_beams": 2, "num_train_epochs": 0.2}
    if n_items == 1:
        with pytest.raises(UserError, match="found 1 distinct SIDs, expected at least --num_generations 2"):
            call("rl", output_dir="rl", **groups)
    else:
        call("rl", output_dir="rl", **groups)
        assert json.loads(Path("rl/run.json").read_text())["complete"]


@pytest.mark.parametrize("stage", ["rqkmeans_constrained", "rqkmeans_faiss", "rqvae"])
def test_embeddings_of_one_and_two_items(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"num_emb_list": "2 2"} if stage == "rqvae" else {"k": 2, "l": 2}
    np.save("toy.emb-x-td.npy", np.ones((1, 8), dtype=np.float32))
    with pytest.raises(UserError, match="expected at least 2 rows"):
        call(stage, **small)
    np.save("toy.emb-x-td.npy", np.eye(2, 8, dtype=np.float32))
    call(stage, **small)
    assert json.loads(next(Path("out").glob("*run.json")).read_text())["complete"]


@pytest.mark.slow
def test_histories_of_no_and_of_ten_thousand_items(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    long = [item % 30 for item in range(10_000)]
    write_data(tmp_path, 30, dict.fromkeys(SPLITS, [([], 3), (long, 7), (long[:1], 4), (long[:7000], 29)] * 4))
    metrics = train_and_score(30, capsys)
    assert metrics["rows"] == 16 and metrics["seen"]["longest"] == 10_000
    with open("test/toy.csv", encoding="utf-8") as f:
        assert re.findall(r"\[([0-9, ]*)\],3,|\Z", f.readline() + f.readline())[0] == ""


def test_users_with_one_interaction(tmp_path, monkeypatch):
    """They have nothing to train or test on: leave-one-out needs three."""
    monkeypatch.chdir(tmp_path)
    bench.write_films(tmp_path / "ml")
    with open("ml/ml-100k.inter", "a", encoding="utf-8") as f:
        f.write("lonely\t1\t5\t9\ntwo\t1\t5\t9\ntwo\t2\t5\t10\n")
    call("preprocess")
    texts = [Path(f"out/ml-100k.{split}.inter").read_text() for split in SPLITS]
    assert [text.count("\n") for text in texts] == [1 + 3, 1 + 3, 1 + 3]
    assert not any("lonely" in text or "two" in text for text in texts)


@pytest.mark.slow
def test_a_large_catalog(tmp_path, monkeypatch, capsys, record_property):
    """Stage 2 (codebooks, index, report), stage 3, a training step of SFT and a recommendation."""
    monkeypatch.chdir(tmp_path)
    n = LARGE
    record_property("items", n)
    rng = np.random.default_rng(0)
    np.save("toy.emb-x-td.npy", rng.normal(size=(n, 4)).astype(np.float32))
    call("rqkmeans_faiss", k=128, l=3, max_iter=3, output_file="toy.index.json", collision="extra_token")
    assert json.loads(Path("toy.index.quality.json").read_text())["after"]["distinct_sids"] == n
    items = {str(i): {"title": f"Item {i}", "description": "", "brand": "", "categories": ""} for i in range(n)}
    Path("toy.item.json").write_text(json.dumps(items))
    rows = [(rng.integers(n, size=5).tolist(), int(rng.integers(n))) for _ in range(16)]
    lines = "\n".join(f"u{i}\t{' '.join(map(str, past))}\t{target}" for i, (past, target) in enumerate(rows))
    for split in SPLITS:
        Path(f"toy.{split}.inter").write_text(f"user_id:token\titem_id_list:token_seq\titem_id:token\n{lines}\n")
    call("convert_dataset", output_dir=".")
    Path("small.item.json").write_text(json.dumps(dict(list(items.items())[:100])))
    call("base_model", output_dir="base", item_meta_path="small.item.json")
    call("sft", output_dir="sft", num_epochs=1)
    capsys.readouterr()
    call("recommend", history=str(n - 1), train_file=None)
    assert capsys.readouterr().out.count("Item ") == 11  # the history and ten items
