"""`python -m data check DIR`: every fault of a folder, with file and row; none in a good folder, and nothing is executed."""

import csv
import json
import re

import numpy as np
import pytest
from helpers import INDUSTRIAL, run_stage, write_world

from minionerec.catalog.check import check


@pytest.fixture
def folder(tmp_path):
    world = write_world(tmp_path)
    np.save(tmp_path / "toy.emb-x-td.npy", np.zeros((48, 4), dtype=np.float32))
    return world.folder


def found(folder) -> list[str]:
    return [f"{path.relative_to(folder)}: {fault}" for path, fault in check(folder)]


def change(path, old: str, new: str, count: int = 1) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


def cell(path, row: int, column: int, value: str) -> None:
    """Set a cell of a tab-separated file; rows are counted from 1, columns from 0."""
    lines = path.read_text().splitlines()
    cells = lines[row - 1].split("\t")
    cells[column] = value
    lines[row - 1] = "\t".join(cells)
    path.write_text("\n".join(lines) + "\n")


def test_a_good_folder(folder, tmp_path):
    assert found(folder) == []
    done = run_stage("data", "check", folder)
    assert done.stdout == f"{folder}: no faults\n"


@pytest.mark.skipif(not INDUSTRIAL.exists(), reason="needs the Industrial files")
def test_the_published_folder():
    assert list(check(INDUSTRIAL)) == []


def test_all_faults_of_a_csv(folder):
    """Each kind once, and each is named by its row."""
    path = folder / "test" / "toy.csv"
    lines = path.read_text().splitlines()
    good = next(csv.reader([lines[1]]))

    def row(**changes) -> str:
        names = ("user", "titles", "title", "ids", "id", "sids", "sid")
        cells = dict(zip(names, good, strict=True)) | changes
        return ",".join('"' + value.replace('"', '""') + '"' for value in cells.values())

    lines[1:] = [
        row(), row(id="48"), row(ids="[1, 99]"), row(ids="[1, 2"), row(ids="__import__('os')"), row(sid="<a_9><b_9><c_9>"),
        row(sids="['<a_0>']"), row(title="Other"), row(titles="['Other']"), row(titles="open('x', 'w')"), row(id="x"),
        row() + ",1", row(user=""), "u,v",
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    faults = found(folder)
    rows = {int(re.search(r"row (\d+)", fault)[1]) for fault in faults}
    assert rows == {3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
    for line, text in {
        3: "column item_id: found '48', expected ids of the catalog, 0..47",
        4: "column history_item_id: found '[1, 99]', expected ids",
        5: "column history_item_id: found '[1, 2', expected a list literal",
        7: "column item_sid: found '<a_9><b_9><c_9>', expected the catalog's SID",
        8: "column history_item_sid: found \"['<a_0>']\", expected the SIDs",
        9: "column item_title: found 'Other', expected the title",
        10: "column history_item_title: found \"['Other']\"",
        13: "found 8 cells, expected 7 as in the header",
        14: "column user_id: found ''",
    }.items():
        assert any(f"test/toy.csv: row {line}" in fault and text in fault for fault in faults), (line, faults)


def test_faults_of_items_and_index(folder):
    items = json.loads((folder / "toy.item.json").read_text())
    items["1"] = {"title": ""}
    items["2"] = {"name": "x"}
    items["07"] = items.pop("7")
    (folder / "toy.item.json").write_text(json.dumps(items))
    index = json.loads((folder / "toy.index.json").read_text())
    index["3"], index["4"] = [], ["<a_1>", "x"]
    del index["47"]
    (folder / "toy.index.json").write_text(json.dumps(index))
    faults = found(folder)
    for text in (
        "toy.item.json: item 7 is missing, expected ids 0..47",
        "toy.item.json: item '07', expected ids 0..47",
        "toy.item.json: item 1: the title is empty",
        "toy.item.json: item 2: found \"{'name': 'x'}\"",
        "toy.index.json: item 3: found '[]', expected a list",
        "toy.index.json: item 4: found \"['<a_1>', 'x']\": 'x' has no code",
        "expected the 48 of toy.item.json",
    ):
        assert any(text in fault for fault in faults), (text, faults)


@pytest.mark.parametrize("name, value", [("toy.item.json", {"title": "Long"}), ("toy.index.json", ["<a_1>"])])
def test_a_key_of_many_digits(folder, name, value):
    content = json.loads((folder / name).read_text()) | {"9" * 5000: value}
    (folder / name).write_text(json.dumps(content))
    faults = found(folder)
    assert any(f"{name}: item '{'9' * 40}', expected ids 0..48" in fault for fault in faults)
    assert all(len(fault) < 500 for fault in faults)


@pytest.mark.parametrize(
    "write, text",
    [
        (lambda f: np.savez(f, a=np.zeros(3)), "toy.emb-x-td.npy: found an .npz file, expected one array of floats"),
        (lambda f: f.write(b"PK\x03\x04 and no more"), "toy.emb-x-td.npy: not readable as an array"),
        (lambda f: f.write(b"\x93NUMPY\x01\x00\x76\x00{'descr': ((((" + b" " * 103), "toy.emb-x-td.npy: not readable"),
        (lambda f: np.save(f, np.zeros((48, 0))), "toy.emb-x-td.npy: "),
        (lambda f: np.save(f, np.zeros(48)), "toy.emb-x-td.npy: found float64 (48,), expected floats (48, dim)"),
    ],
)
def test_what_is_no_matrix(folder, write, text):
    with open(folder / "toy.emb-x-td.npy", "wb") as f:
        write(f)
    faults = found(folder)
    assert len(faults) == 1 and text in faults[0]


def test_prefixes(folder):
    index = json.loads((folder / "toy.index.json").read_text())
    index["0"] = index["1"][:2]
    (folder / "toy.index.json").write_text(json.dumps(index))
    assert any("toy.index.json" in fault and "prefix" in fault for fault in found(folder))


def test_faults_of_the_info_file(folder):
    info = folder / "info" / "toy.txt"
    cell(info, 1, 0, "<a_3><b_2><c_3>")
    cell(info, 2, 1, "Other")
    cell(info, 3, 2, "x")
    cell(info, 4, 2, "5")
    faults = found(folder)
    for text in (
        "line 1: found <a_3><b_2><c_3>, expected <a_0><b_0><c_0>",
        "line 2: found the title 'Other'",
        'line 3: found "<a_0>',
        "line 6: item 5 is also in line 4",
        "item 2 is missing",
        "item 3 is missing",
    ):
        assert any(f"info/toy.txt: {text}" in fault for fault in faults), (text, faults)


def test_inter_files_and_embeddings(folder):
    cell(folder / "toy.train.inter", 2, 1, "1 x")
    cell(folder / "toy.train.inter", 3, 2, "48")
    cell(folder / "toy.train.inter", 4, 1, "1 99")
    cell(folder / "toy.train.inter", 5, 0, "a\tb")
    rows = np.zeros((47, 4), dtype=np.float32)
    np.save(folder / "toy.emb-x-td.npy", rows)
    infinite = np.zeros((48, 4), dtype=np.float32)
    infinite[9, 1] = np.inf
    np.save(folder / "toy.emb-y-td.npy", infinite)
    np.save(folder / "toy.emb-z-td.npy", np.array([{}] * 48), allow_pickle=True)
    faults = found(folder)
    for text in (
        "toy.train.inter: row 2, column item_id_list:token_seq: found '1 x', expected ids with blanks",
        "toy.train.inter: row 3, column item_id:token: found '48'",
        "toy.train.inter: row 4, column item_id_list:token_seq: found '1 99'",
        "toy.train.inter: row 5: found 4 cells, expected 3",
        "toy.emb-x-td.npy: found float32 (47, 4), expected floats (48, dim)",
        "toy.emb-y-td.npy: row 9 has a number that is not finite",
        "toy.emb-z-td.npy: not readable as an array",
    ):
        assert any(text in fault for fault in faults), (text, faults)
    assert len(faults) == 7


def test_missing_and_unreadable_files(folder):
    (folder / "valid" / "toy.csv").unlink()
    (folder / "train" / "other.csv").write_text("")
    (folder / "test" / "toy.csv").write_bytes("user_id\n".encode("utf-16"))
    (folder / "toy.index.json").write_text("{")
    faults = found(folder)
    for text in (
        "found 0 files like valid/*.csv, expected one",
        "found 2 files like train/*.csv",
        "train/other.csv: the file is empty",
        "test/toy.csv: found UTF-16",
        "toy.index.json: not valid JSON",
    ):
        assert any(text in fault for fault in faults), (text, faults)


def test_the_command(folder):
    change(folder / "toy.valid.inter", "\t", "\tx")
    done = run_stage("data", "check", folder, check=False)
    assert done.returncode == 2 and "toy.valid.inter: row 1: no column" in done.stdout
    assert done.stderr == f"error: {folder}: 1 faults in 1 files, listed above\n"
    done = run_stage("data", "verify", folder, check=False)
    assert done.returncode == 2 and "expected `python -m data check DIR`" in done.stderr
