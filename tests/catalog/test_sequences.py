"""Users' histories from CSVs.

Invariants: what conversion writes is what is read; a cell is never executed; a row that cannot be right (an unknown item,
another index's SID, a cell that is no list of ids) is named; histories of 0 and of 10 000 items are rows like others.
"""

import json

import polars as pl
import pytest
from helpers import INDUSTRIAL, N_ITEMS

from minionerec.catalog.items import Items, read_info, read_titles
from minionerec.catalog.sequences import read_preferences, read_sequences
from minionerec.common.errors import UserError

ITEMS = Items(["<a_0><b_1>", "<a_1><b_0>", "<a_2><b_2>", "<a_0><b_3>"], ["One", "Two; or so", "Same", "Same"])
HEADER = "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid\n"
GOOD = "u,['One'],Two,[0],1,['<a_0><b_1>'],<a_1><b_0>\n"


def csv(tmp_path, body, header=HEADER):
    path = tmp_path / "rows.csv"
    path.write_text(header + body, encoding="utf-8")
    return path


def row(ids, target="1", sids="['<a_0><b_1>']", sid="<a_1><b_0>"):
    return f'u,x,Two,"{ids}",{target},"{sids}",{sid}\n'


def test_conversion_round_trip(world):
    """Quotes and commas in titles included."""
    items = read_info(world.info)
    assert items.titles == read_titles(world.items) and len(items.sids) == N_ITEMS
    for split in ("train", "valid", "test"):
        written = (world.folder / f"toy.{split}.inter").read_text().splitlines()[1:]
        rows = read_sequences(getattr(world, split), items.sids, "file")
        assert len(rows) == len(written)
        for line, (user, history, target, seen) in zip(written, rows.iter_rows(), strict=True):
            assert line == f"{user}\t{' '.join(map(str, history))}\t{target}" and seen == history


def test_history_is_cut_to_the_latest(world):
    items = read_info(world.info)
    long = read_sequences(world.train, items.sids, "file")
    short = read_sequences(world.train, items.sids, "file", max_history=2)
    assert short["history"].to_list() == [history[-2:] for history in long["history"].to_list()]
    assert short["seen"].equals(long["seen"])  # what the user had stays whole


BAD = {
    "a missing column": (GOOD, HEADER.replace("history_item_sid", "x"), "no column 'history_item_sid'"),
    "no rows": ("", HEADER, "found no rows"),
    "words": (GOOD + row("nonsense"), HEADER, "row 3, column history_item_id: found 'nonsense'"),
    "words in a list": (GOOD + row("[0, 'x']"), HEADER, "row 3, column history_item_id"),
    "a fraction": (row("[0.7]"), HEADER, "row 2, column history_item_id: found '[0.7]', expected a list literal"),
    "a text": (row("'0'"), HEADER, "column history_item_id: found \"'0'\""),
    "a dictionary": (row("{0: 1}"), HEADER, "column history_item_id: found '{0: 1}'"),
    "a set": (row("{0}"), HEADER, "column history_item_id"),
    "a number": (row("0"), HEADER, "column history_item_id"),
    "a nested list": (row("[[0]]"), HEADER, "column history_item_id"),
    "a deep list": (row("[" * 100_000), HEADER, "column history_item_id"),
    "a negative id": (row("[-1]"), HEADER, "column history_item_id"),
    "a huge id": (row(f"[{'9' * 30}]"), HEADER, "column history_item_id"),
    "digits of another script": (row("[٠]"), HEADER, "column history_item_id"),
    "an unknown target": (row("[0]", target="9"), HEADER, "row 2, column item_id: found '9'"),
    "a huge target": (row("[0]", target="9" * 30), HEADER, "row 2, column item_id"),
    "a target that is no number": (row("[0]", target="1.0"), HEADER, "row 2, column item_id: found '1.0'"),
    "no target": (row("[0]", target=""), HEADER, "row 2, column item_id: found ''"),
    "an unknown item": (row("[7]"), HEADER, "row 2, column history_item_id: found '[7]'"),
    "another SID": (row("[0]", sid="<a_9><b_9>"), HEADER, "row 2, column item_sid: found '<a_9><b_9>'"),
    "no SID": ("u,x,Two,[0],1,['<a_0><b_1>'],\n", HEADER, "row 2, column item_sid: found ''"),
    "a cell too few": ("u,x,Two,[0],1,['<a_0><b_1>']\n", HEADER, "row 2: found 6 cells, expected 7"),
    "another history SID": (row("[0]", sids="['<a_9><b_1>']"), HEADER, "row 2, column history_item_sid"),
    "an item without its SID": (row("[0, 0]"), HEADER, "row 2, column history_item_sid"),
    "a SID without its item": (row("[]"), HEADER, "row 2, column history_item_sid"),
    "latin-1": (None, HEADER, "is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_csv(tmp_path, case):
    body, header, found = BAD[case]
    path = csv(tmp_path, body or "", header)
    if body is None:
        path.write_bytes(header.encode() + "é,x\n".encode("latin-1"))
    with pytest.raises(UserError) as refused:
        read_sequences(path, ITEMS.sids, "train_file")
    message = str(refused.value)
    assert message.startswith(str(path)) and found in message and "\n" not in message and len(message) < 600


def test_missing_file_names_the_flag(tmp_path):
    with pytest.raises(UserError, match="no such file.*--train_file"):
        read_sequences(tmp_path / "none.csv", ITEMS.sids, "train_file")


def test_cells_are_never_executed(tmp_path):
    victim = tmp_path / "executed"
    cell = f"[__import__('pathlib').Path('{victim}').touch()]"
    with pytest.raises(UserError, match="expected a list literal"):
        read_sequences(csv(tmp_path, row(cell)), ITEMS.sids, "train_file")
    assert not victim.exists()


def test_unusual_literals_still_read(tmp_path):
    both = "['<a_0><b_1>', '<a_1><b_0>']"
    body = row("('0', 1)", sids=both) + row("[0,1,]", sids=both) + row(" [ 00 ] ") + row("[]", sids="[]")
    rows = read_sequences(csv(tmp_path, body), ITEMS.sids, "train_file")
    assert rows["history"].to_list() == [[0, 1], [0, 1], [0], []]


def test_users_are_texts(tmp_path):
    """Also where the first 200 rows have none."""
    body = GOOD.replace("u,", ",", 1) * 200 + GOOD + GOOD.replace("u,", "007,", 1)
    users = read_sequences(csv(tmp_path, body), ITEMS.sids, "train_file")["user"]
    assert users.dtype == pl.String and users.to_list() == [""] * 200 + ["u", "007"]


def test_another_token_form_is_read_like_the_index(tmp_path):
    body = (GOOD + row("[0, 3]", sids="['<a_0><b_1>', '<a_0><b_3>']")).replace("<", "<item_")
    rows = read_sequences(csv(tmp_path, body), ITEMS.sids, "train_file")
    assert rows["history"].to_list() == [[0], [0, 3]]
    with pytest.raises(UserError, match="row 4, column item_sid: found '<item_a_2><item_b_0>'"):
        read_sequences(csv(tmp_path, body + row("[0]", sid="<item_a_2><item_b_0>").replace("<a", "<item_a")),
                       ITEMS.sids, "train_file")  # fmt: skip


def test_long_histories(tmp_path):
    ids, sids = [0, 1] * 5_000, ["<a_0><b_1>", "<a_1><b_0>"] * 5_000
    path = csv(tmp_path, row(ids, sids=sids) * 3 + row("[]", sids="[]"))
    rows = read_sequences(path, ITEMS.sids, "train_file", max_history=10_000)
    assert rows["history"].to_list() == [ids] * 3 + [[]]
    assert read_sequences(path, ITEMS.sids, "train_file")["history"].to_list() == [ids[-10:]] * 3 + [[]]


@pytest.mark.parametrize("content", [{"u": ""}, {"u": 1}, {"u": None}, {"u": ["x"]}, {"u": float("nan")}])
def test_preferences_are_texts(tmp_path, content):
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="user 'u' has"):
        read_preferences(tmp_path / "p.json")


@pytest.mark.skipif(not INDUSTRIAL.exists(), reason="the industrial data is not available")
def test_published_files_read():
    name = "Industrial_and_Scientific_5_2016-10-2018-11"
    info = read_info(INDUSTRIAL / "info" / f"{name}.txt")
    splits = ("train", "valid", "test")
    rows = {split: read_sequences(INDUSTRIAL / split / f"{name}.csv", info.sids, split) for split in splits}
    assert {split: len(r) for split, r in rows.items()} == {"train": 10393, "valid": 4532, "test": 4533}
