"""Conversion.

Invariants: no file gets its name before all of them are written, so a bad file leaves the old result whole; the four files that
are written say the same as the sources; a finished conversion is skipped, a changed source is converted again.
"""

import ast
import json
import re
import subprocess
import sys

import polars as pl
import pytest
from helpers import INDUSTRIAL, ROOT, run_stage, write_world

import convert_dataset
from convert_dataset import Options, main, read_inter
from minionerec.catalog.items import read_info
from minionerec.catalog.sequences import read_sequences
from minionerec.common import tables
from minionerec.common.errors import UserError

HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\n"


def options(folder, **changes) -> Options:
    return Options(**{"dataset_name": "toy", "data_dir": str(folder), "output_dir": str(folder)} | changes)


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_is_written(world):
    items = read_info(world.info)
    table = pl.read_csv(world.train)
    assert table.columns == [
        "user_id", "history_item_title", "item_title", "history_item_id", "item_id", "history_item_sid", "item_sid",
    ]  # fmt: skip
    for row in table.head(20).iter_rows(named=True):
        ids = ast.literal_eval(row["history_item_id"])
        assert ast.literal_eval(row["history_item_title"]) == [items.titles[i] for i in ids]
        assert ast.literal_eval(row["history_item_sid"]) == [items.sids[i] for i in ids]
        assert row["item_title"] == items.titles[row["item_id"]] and row["item_sid"] == items.sids[row["item_id"]]


def test_a_finished_conversion_is_skipped_and_a_changed_source_is_not(tmp_path, capsys):
    world = write_world(tmp_path)
    main(options(tmp_path))
    assert "nothing to do" in capsys.readouterr().out
    path = tmp_path / "toy.valid.inter"
    path.write_text(path.read_text() + "new\t1 2\t3\n")
    with pytest.raises(UserError, match="the content of valid has changed"):
        main(options(tmp_path))
    main(options(tmp_path, overwrite=True))
    assert read_sequences(world.valid, read_info(world.info).sids, "file")["user"].to_list()[-1] == "new"


def test_train_rows_are_cut_and_valid_and_test_rows_are_not(tmp_path):
    world = write_world(tmp_path)
    long = "u\t" + " ".join(["1"] * 30) + "\t3\n"
    for split in ("train", "valid", "test"):
        path = tmp_path / f"toy.{split}.inter"
        path.write_text(path.read_text() + long)
    main(options(tmp_path, max_history=4, overwrite=True))
    sids = read_info(world.info).sids
    lengths = {
        name: read_sequences(getattr(world, name), sids, "file", 99)["history"].list.len()
        for name in ("train", "valid", "test")
    }
    assert lengths["train"].max() == 4 and lengths["valid"][-1] == lengths["test"][-1] == 30


def test_published_csvs_get_other_sids(tmp_path):
    """The same rows under a new index, whatever SIDs the CSVs have."""
    world = write_world(tmp_path / "old")
    new = tmp_path / "new"
    new.mkdir()
    index = json.loads(world.index.read_text())
    index = {item: index[str(len(index) - 1 - int(item))] for item in index}
    (new / "toy.index.json").write_text(json.dumps(index))
    (new / "toy.item.json").write_text(world.items.read_text())
    main(options(new, csv_dir=str(world.folder)))
    for split in ("train", "valid", "test"):
        old_rows = read_sequences(getattr(world, split), read_info(world.info).sids, "file")
        new_rows = read_sequences(new / split / "toy.csv", read_info(new / "info" / "toy.txt").sids, "file")
        assert old_rows.equals(new_rows)
    with pytest.raises(UserError, match="found 0 files"):
        main(options(new, csv_dir=str(tmp_path), overwrite=True))


@pytest.mark.parametrize("broken", ["toy.test.inter", "toy.index.json", "toy.item.json"])
def test_a_bad_file_leaves_the_old_result(tmp_path, broken):
    """The test split is read last: writing each split after reading it would leave a new train with old valid and test."""
    write_world(tmp_path)
    train = tmp_path / "toy.train.inter"
    train.write_text(train.read_text() + "new\t1 2\t3\n")
    path = tmp_path / broken
    path.write_text(path.read_text().replace("toy", "x")[:-20] + "\nu\t1\n")
    before = {name: data for name, data in files_of(tmp_path).items() if name.endswith((".csv", ".txt"))}
    with pytest.raises(UserError):
        main(options(tmp_path, overwrite=True))
    after = {name.removesuffix(".1"): data for name, data in files_of(tmp_path).items()}
    assert {name: after[name] for name in before} == before
    assert not list(tmp_path.rglob("*.csv")) and not list(tmp_path.rglob("*.tmp"))  # moved aside whole, nothing new


def test_a_failed_write_gives_no_file_its_name(tmp_path, monkeypatch):
    write_world(tmp_path)
    out = tmp_path / "out"
    original = pl.DataFrame.write_csv
    calls = []

    def fails_at_last(table, f, **options):
        calls.append(f)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return original(table, f, **options)

    monkeypatch.setattr(pl.DataFrame, "write_csv", fails_at_last)
    with pytest.raises(OSError):
        main(options(tmp_path, output_dir=str(out)))
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["toy.convert.run.json"]
    monkeypatch.undo()
    main(options(tmp_path, output_dir=str(out)))
    assert len(files_of(out)) == 5


# ------------------------------------------------------------------------------------------------ .inter files


def inter(tmp_path, body: str, header: str = HEADER):
    path = tmp_path / "x.inter"
    path.write_bytes((header + body).encode())
    return path


def test_histories_of_any_length_and_blanks(tmp_path):
    long = " ".join(["0"] * 10_000)
    path = inter(tmp_path, f"u\t0  1\t2\n\u00e9\t 0 1 \t2\n\t\t1\n\nv\t{long}\t0\n", "\ufeff" + HEADER)
    rows = pl.concat(read_inter(path, 3))
    assert rows["history"].list.len().to_list() == [2, 2, 0, 10_000] and rows["target"].to_list() == [2, 2, 1, 0]


BAD_ROWS = {
    "an unknown item": ("u\t0 3\t1\n", "row 2, column item_id_list:token_seq: found '0 3', expected ids"),
    "an unknown target": ("u\t0\t1\nu\t0\t3\n", "row 3, column item_id:token: found '3'"),
    "words": ("u\t0 x\t1\n", "row 2, column item_id_list:token_seq"),
    "commas": ("u\t0,1\t1\n", "row 2, column item_id_list:token_seq: found '0,1'"),
    "a list": ("u\t[0]\t1\n", "row 2"),
    "a huge id": (f"u\t{'9' * 30}\t1\n", "row 2"),
    "a negative id": ("u\t-1\t1\n", "row 2"),
    "no target": ("u\t0\t\n", "row 2, column item_id:token: found ''"),
    "a cell too few": ("u\t0\n", "row 2: found 2 cells, expected 3"),
    "a cell too many": ("u\t0\t1\t2\n", "row 2: found 4 cells, expected 3"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(tmp_path, case):
    body, found = BAD_ROWS[case]
    path = inter(tmp_path, body)
    with pytest.raises(UserError) as refused:
        list(read_inter(path, 3))
    assert str(path) in str(refused.value) and found in str(refused.value) and "\n" not in str(refused.value)


def test_other_columns(tmp_path):
    with pytest.raises(UserError, match="found columns .* expected .*item_id_list:token_seq"):
        list(read_inter(inter(tmp_path, "", "user_id:token\titem_id:token\n"), 3))


def test_empty_histories_and_titles_are_converted(tmp_path):
    world = write_world(tmp_path)
    items = json.loads(world.items.read_text()) | {"0": {"title": ""}, "1": {"title": "a\n\"b', c"}}
    world.items.write_text(json.dumps(items))
    world_train = tmp_path / "toy.train.inter"
    world_train.write_text(HEADER + "u\t\t0\nu\t0 1\t2\n\t1\t0\n")
    main(options(tmp_path, overwrite=True))
    rows = read_sequences(world.train, read_info(world.info).sids, "file")
    assert rows["history"].to_list() == [[], [0, 1], [1]] and rows["user"].to_list() == ["u", "u", ""]
    assert ast.literal_eval(pl.read_csv(world.train)["history_item_title"][1]) == ["", "a \"b', c"]


# ------------------------------------------------------------------------------------------------ the command


def test_one_line_for_what_is_wrong(tmp_path):
    write_world(tmp_path)
    (tmp_path / "other.index.json").write_text("{}")
    cases = {
        "--max_history 0: expected at least 1": {"max_history": 0},
        "--max_history -5: expected at least 1": {"max_history": -5},
        "none.item.json: no such file": {"dataset_name": "none"},
        "--dataset_name is required": {"dataset_name": ""},
        "--output_dir is required": {"output_dir": ""},
    }
    for found, changes in cases.items():
        with pytest.raises(UserError, match=found):
            main(options(tmp_path, **changes))


def test_index_and_items_must_agree(tmp_path):
    world = write_world(tmp_path)
    index = json.loads(world.index.read_text())
    del index["47"]
    world.index.write_text(json.dumps(index))
    with pytest.raises(UserError, match="toy.index.json: found 47 items, expected the 48 of toy.item.json"):
        main(options(tmp_path, overwrite=True))


def test_the_launcher(tmp_path):
    world = write_world(tmp_path)
    variables = {"DATASET_NAME": "toy", "DATA_DIR": tmp_path, "OUTPUT_DIR": tmp_path / "out"}
    assert "48 items, 47 SIDs" in run_stage("convert_dataset.sh", env=variables).stdout
    assert (tmp_path / "out" / "train" / "toy.csv").read_bytes() == world.train.read_bytes()
    done = run_stage("convert_dataset.sh", "--max_history", "0", env=variables, check=False)
    assert done.returncode == 2 and done.stderr == "error: --max_history 0: expected at least 1\n"


def test_help_and_a_finished_stage_import_neither_torch_nor_polars():
    for module in ("convert_dataset", "preprocess.movielens"):
        code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'polars', 'transformers.models')))"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_example_of_the_documentation(tmp_path):
    """The files that the last Python block of docs/data.md writes are converted."""
    *_, block = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), re.M | re.S
    )
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
    folder = tmp_path / "output" / "mine"
    (folder / "mine.index.json").write_text(json.dumps({str(i): [f"<a_{i}>"] for i in range(3)}))
    main(options(folder, dataset_name="mine"))
    rows = read_sequences(folder / "test" / "mine.csv", ["<a_0>", "<a_1>", "<a_2>"], "file")
    assert rows.select("user", "history", "target").rows() == [("ann", [0, 1, 2], 1)]


# ------------------------------------------------------------------------------------------------ back to .inter


def back(folder, output, **changes) -> Options:
    return Options(
        **{"dataset_name": "toy", "csv_dir": str(folder), "output_dir": str(output), "to_inter": True} | changes
    )


def test_there_and_back(tmp_path, capsys):
    """The same bytes; rows without history and other scripts too."""
    write_world(tmp_path)
    valid = tmp_path / "toy.valid.inter"
    valid.write_text(valid.read_text() + "ünï 漢\t\t3\n", encoding="utf-8")
    main(options(tmp_path, overwrite=True))
    main(back(tmp_path, tmp_path / "back"))
    for split in ("train", "valid", "test"):
        name = f"toy.{split}.inter"
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / name).read_bytes()
    capsys.readouterr()
    main(back(tmp_path, tmp_path / "back"))
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.skipif(not INDUSTRIAL.exists(), reason="needs the Industrial files")
def test_the_published_csvs_back_and_there(tmp_path):
    main(back(INDUSTRIAL, tmp_path))
    for kind in ("index", "item"):
        [source] = INDUSTRIAL.glob(f"index/*.{kind}.json")
        (tmp_path / f"toy.{kind}.json").write_bytes(source.read_bytes())
    main(options(tmp_path, max_history=100))
    for split in ("train", "valid", "test"):
        [source] = (INDUSTRIAL / split).glob("*.csv")
        old, new = (pl.read_csv(path, infer_schema=False) for path in (source, tmp_path / split / "toy.csv"))
        old = old.with_columns(pl.col("^.*title$").str.replace_all(" +", " "))  # as readers collapse them
        assert old.equals(new) and len(old) > 4_000


def test_parts_of_any_size(tmp_path, monkeypatch):
    world = write_world(tmp_path / "whole")
    monkeypatch.setattr(convert_dataset, "PART", 7)
    monkeypatch.setattr(tables, "CHUNK", 50)
    assert write_world(tmp_path / "parts").train.read_bytes() == world.train.read_bytes()
    main(back(tmp_path / "parts", tmp_path / "back"))
    assert (tmp_path / "back" / "toy.train.inter").read_bytes() == (tmp_path / "whole" / "toy.train.inter").read_bytes()


def test_bad_csvs_are_not_converted_back(tmp_path):
    world = write_world(tmp_path)
    text = world.test.read_text()
    for changed, found in (
        (text.replace("test0,", '"a\tb",', 1), "toy.csv: user 'a\\tb' has a tab or a line end"),
        (re.sub(r"\[(\d)", r"{\1", text, count=1), "row 2, column history_item_id: found '{"),
        ("", "toy.csv: the file is empty"),
    ):
        world.test.write_text(changed)
        with pytest.raises(UserError) as refused:
            main(back(tmp_path, tmp_path / "back", overwrite=True))
        assert found in str(refused.value) and not list((tmp_path / "back").glob("*.inter"))
    world.info.unlink()
    with pytest.raises(UserError, match="info: found 0 files"):
        main(back(tmp_path, tmp_path / "back"))


def test_the_launcher_back(tmp_path):
    world = write_world(tmp_path)
    variables = {"TO_INTER": True, "DATASET_NAME": "toy", "CSV_DIR": world.folder, "OUTPUT_DIR": tmp_path / "back"}
    assert "train: 60 rows" in run_stage("convert_dataset.sh", env=variables).stdout
    assert (tmp_path / "back" / "toy.test.inter").read_bytes() == (tmp_path / "toy.test.inter").read_bytes()
