"""Tables: CSV, TSV, gzip and parquet give the same files; times in any unit; what is wrong is one line with its row."""

import gzip
import json

import polars as pl
import pytest
from helpers import run_stage

from minionerec.common.errors import UserError
from preprocess.table import Options, main

ROWS = [("ann", "x", 30), ("ann", "y", 10), ("bob", "x", 10), ("ann", "z", 30), ("bob", "z", 20), ("bob", "y", 30)]
EXPECTED = {"train": [], "valid": ["0\t1\t0", "1\t0\t2"], "test": ["0\t1 0\t2", "1\t0 2\t1"]}
UNITS = {"s": 10**9, "ms": 10**12, "us": 10**15, "ns": 10**18}


def options(path, folder, **changes):
    return Options(file=str(path), output_dir=str(folder / "out"), dataset_name="t", **changes)


def inter(folder) -> dict:
    read = {split: (folder / "out" / f"t.{split}.inter").read_text().splitlines()[1:] for split in EXPECTED}
    return {split: sorted(rows) for split, rows in read.items()}


def stats(folder) -> dict:
    return json.loads((folder / "out" / "t.stats.json").read_text())


def csv_of(rows=ROWS, separator=",", header="user_id,item_id,timestamp") -> str:
    lines = [header.replace(",", separator)] if header else []
    return "\n".join([*lines, *(separator.join(map(str, row)) for row in rows)]) + "\n"


FORMS = {
    "t.csv": lambda path: path.write_text(csv_of()),
    "t.tsv": lambda path: path.write_text(csv_of(separator="\t")),
    "t.csv.gz": lambda path: path.write_bytes(gzip.compress(csv_of().encode())),
    "t.parquet": lambda path: pl.DataFrame(
        ROWS, schema=["user_id", "item_id", "timestamp"], orient="row"
    ).write_parquet(path),
    "a[b]*.csv": lambda path: path.write_bytes(b"\xef\xbb\xbf" + csv_of().replace("\n", "\r\n").encode()),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms(tmp_path, name):
    FORMS[name](tmp_path / name)
    main(options(tmp_path / name, tmp_path))
    assert inter(tmp_path) == EXPECTED and stats(tmp_path)["time"]["unit"] == "order"


def test_named_columns_and_separators(tmp_path):
    (tmp_path / "t.dat").write_text(csv_of(separator=";", header=""))
    main(options(tmp_path / "t.dat", tmp_path, column_names=["u", "i", "t"], separator="semicolon", user_column="u",
                 item_column="i", time_column="t"))  # fmt: skip
    assert inter(tmp_path) == EXPECTED


def test_ids_are_written_as_they_are(tmp_path):
    names = {"x": '15" screen 1', "y": '"', "z": "a, b"}
    rows = [(user, '"' + names[item].replace('"', '""') + '"', time) for user, item, time in ROWS]
    (tmp_path / "t.csv").write_text(csv_of(rows))
    main(options(tmp_path / "t.csv", tmp_path))
    lines = (tmp_path / "out" / "t.item2id").read_text().splitlines()
    assert [line.split("\t") for line in lines] == [['"', "0"], ['15" screen 1', "1"], ["a, b", "2"]]


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_a_semicolon_is_found_in_the_first_line(tmp_path, name):
    data = csv_of([(f"{user},1", *row) for user, *row in ROWS], separator=";").encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (tmp_path / "i.csv").write_text('item_id,title\nx,"A; B"\ny,C\nz,D\n')
    main(options(tmp_path / name, tmp_path, items_file=str(tmp_path / "i.csv")))
    assert inter(tmp_path) == EXPECTED
    assert json.loads((tmp_path / "out" / "t.item.json").read_text())["0"]["title"] == "A; B"


@pytest.mark.parametrize("time_unit", ["auto", "date"])
@pytest.mark.parametrize(
    "form, first",
    [
        ("2024-03-{:02}", "2024-03-10T00:00:00"),
        ("2024/03/{:02}", "2024-03-10T00:00:00"),
        ("2024-03-{:02}T12:00", "2024-03-10T12:00:00"),
        ("2024-03-{:02}T12:00:00Z", "2024-03-10T12:00:00"),
        ("2024-03-{:02} 12:00:00.5+01:00", "2024-03-10T11:00:00.5"),
        ("202403{:02}", "2024-03-10T00:00:00"),
        ("202403{:02}.0", "2024-03-10T00:00:00"),
        ("202403{:02}11", "2024-03-10T11:00:00"),
        ("202403{:02}1130", "2024-03-10T11:30:00"),
        ("202403{:02}113015", "2024-03-10T11:30:15"),
    ],
)
def test_dates_are_told_by_their_form(tmp_path, form, first, time_unit):
    (tmp_path / "t.csv").write_text(csv_of([(user, item, form.format(time)) for user, item, time in ROWS]))
    main(options(tmp_path / "t.csv", tmp_path, time_unit=time_unit))
    time = stats(tmp_path)["time"]
    assert inter(tmp_path) == EXPECTED and time["unit"] == "us" and time["first"].startswith(first)


@pytest.mark.parametrize("time_unit", ["auto", "date"])
def test_dates_written_as_numbers(tmp_path, capsys, time_unit):
    rows = [(user, item, 20161000113015 + time * 10**6) for user, item, time in ROWS]
    rows += [(user, "w", 20170101000000) for user in ("ann", "bob")]
    pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").write_parquet(tmp_path / "t.parquet")
    main(options(tmp_path / "t.parquet", tmp_path, time_unit=time_unit, time_column="none"))
    assert stats(tmp_path)["time"]["unit"] == ""
    main(options(tmp_path / "t.parquet", tmp_path, time_unit=time_unit, to_time="2017", overwrite=True))
    assert inter(tmp_path) == EXPECTED and stats(tmp_path)["time"]["last"] == "2016-10-30T11:30:15+00:00"
    assert "the times of column timestamp are read as dates: 20161031 is 2016-10-31" in capsys.readouterr().out


@pytest.mark.parametrize("unit", [*UNITS, "date", "parquet dates"])
def test_units(tmp_path, unit):
    """Times that differ by one unit keep their order, and dates filter."""
    start = UNITS.get(unit, 0)
    rows = [(user, item, start + time) for user, item, time in ROWS]
    if not start:
        rows = [(user, item, f"2001-09-{time:02}") for user, item, time in ROWS]
    path = tmp_path / "t.csv"
    path.write_text(csv_of(rows))
    if unit == "parquet dates":
        path = tmp_path / "t.parquet"
        table = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
        table.with_columns(pl.col("timestamp").str.to_date()).write_parquet(path)
    main(
        options(path, tmp_path, time_unit="date" if unit == "date" else "auto", from_time="2001-09-09", to_time="2002")
    )
    assert inter(tmp_path) == EXPECTED
    time = stats(tmp_path)["time"]
    assert time["unit"] == (unit if start else "us") and time["first"].startswith("2001-09-")


def test_splits_in_time_and_ratings(tmp_path):
    rows = [(f"u{i % 7}", f"i{i % 5}", 10**9 + i, 1 + i % 5) for i in range(100)]
    (tmp_path / "t.csv").write_text(csv_of(rows, header="user_id,item_id,timestamp,rating"))
    main(options(tmp_path / "t.csv", tmp_path, split="chronological", min_rating=3))
    found = stats(tmp_path)
    assert [step["interactions"] for step in found["steps"]] == [100, 60]
    assert found["split"]["samples"] == {"train": 42, "valid": 5, "test": 6}
    assert found["split"]["test_targets_before_train_targets_of_others"] == 0
    main(options(tmp_path / "t.csv", tmp_path, split="time", overwrite=True))
    assert stats(tmp_path)["split"]["samples"] == {"train": 74, "valid": 9, "test": 10}


def test_the_leak_warning(tmp_path, capsys):
    """User b ends before user a's train targets."""
    rows = [("a", item, 10 + item) for item in range(6)] + [("b", item, item) for item in range(4)]
    (tmp_path / "t.csv").write_text(csv_of(rows))
    main(options(tmp_path / "t.csv", tmp_path))
    assert (
        "warning: 1 of 2 test targets (50.0%) are earlier than a train target of another user"
        in capsys.readouterr().out
    )


def test_repeats_with_the_same_time(tmp_path):
    rows = [("a", "x", 1), ("a", "x", 1), ("a", "y", 2), ("a", "x", 3), ("a", "x", 2)]
    (tmp_path / "t.csv").write_text(csv_of(rows))
    for drop, left in (("none", 5), ("same_time", 4), ("all", 2)):
        try:
            main(options(tmp_path / "t.csv", tmp_path, drop_repeats=drop, overwrite=True))
            assert stats(tmp_path)["interactions"] == left
        except UserError as error:
            assert drop == "all" and "none of 1 users has 3" in str(error)


@pytest.mark.parametrize("name", ["i.csv", "i.csv.gz"])
def test_item_tables(tmp_path, name):
    (tmp_path / "t.csv").write_text(csv_of())
    data = 'item_id,name,genre\nx,"A, ""b""\tc",G\ny,漢字,\nz,\x07C&#39;s,H\nunused,U,\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    main(options(tmp_path / "t.csv", tmp_path, items_file=str(tmp_path / name), categories_column="genre"))
    items = json.loads((tmp_path / "out" / "t.item.json").read_text())
    assert [items[str(i)]["title"] for i in range(3)] == ['A, "b" c', "漢字", "C's"] and items["0"]["categories"] == "G"
    table = pl.DataFrame({"item_id": ["x", "y", "z"], "title": ["A", "B", "C"], "tags": [["p", "q"], [], ["r"]]})
    table.write_parquet(tmp_path / "i.parquet")
    main(options(tmp_path / "t.csv", tmp_path, items_file=str(tmp_path / "i.parquet"), overwrite=True))
    items = json.loads((tmp_path / "out" / "t.item.json").read_text())
    assert items["0"] == {"title": "A", "description": "", "brand": "", "categories": "p, q"}


def flipped(data: bytes, place: int) -> bytes:
    """`data` with the bits of one byte inverted."""
    changed = bytearray(data)
    changed[place] ^= 0xFF
    return bytes(changed)


GOOD = csv_of()
LATER = csv_of([(user, item, 10**9 + time) for user, item, time in ROWS])
DATED = csv_of([(user, item, f"2016-10-{time:02}") for user, item, time in ROWS])
PACKED = gzip.compress(csv_of([(f"u{i * i % 997}", f"i{i * 7 % 401}", 10**9 + i) for i in range(20_000)]).encode())
BAD = {
    "an empty file": (b"", {}, "t.csv: the file is empty"),
    "no such column": (GOOD, {"time_column": "when"}, "t.csv: no column 'when', found ['user_id', 'item_id', 'timestamp']; check --time_column"),
    "another separator": (csv_of(separator="|"), {}, "found ['user_id|item_id|timestamp']; check --user_column and --separator"),
    "German dates": (csv_of([("a", "b", "01.03.2024")]), {}, "found '01.03.2024', expected a number or a date like 2016-10-31 ("),
    "a cell too many": (GOOD + "a,b,1,2\n", {}, "t.csv, row 8: found 4 cells, expected 3"),
    "no item": (GOOD + "a,,1\n", {}, "t.csv, row 8, column item_id: found '', expected an id (1 of 7 records"),
    "a user with a tab": (GOOD + '"a\tb",x,1\n', {}, "t.csv, row 8, column user_id: found 'a\\tb', expected an id without tabs and line ends (1 of 7"),
    "an item of two lines": (GOOD + 'a,"x\ny",1\n', {}, "t.csv, row 8, column item_id: found 'x\\ny', expected an id without tabs"),
    "no time": (GOOD + "a,b\n", {}, "t.csv, row 8, column timestamp: found ''"),
    "a word as time": (GOOD + "a,b,noon\n", {}, "row 8, column timestamp: found 'noon', expected a number"),
    "an endless time": (GOOD + "a,b,inf\n", {}, "row 8, column timestamp: found 'inf'"),
    "no date": (csv_of([("a", "b", "2016-02-30")]), {"time_unit": "date"}, "row 2, column timestamp: found '2016-02-30', expected a date like"),
    "a time after 2100": (GOOD + "a,b,99999999999\n", {"time_unit": "s"}, "found '99999999999', expected a time stamp in s"),
    "a detected time after 2100": (LATER + "a,b,99999999999\n", {}, "row 8, column timestamp: found '99999999999', expected a time stamp in s, 1970 to 2099"),
    "a detected time of zero": (LATER + "a,b,0\n", {}, "row 8, column timestamp: found '0', expected a time stamp in s, 1970 to 2099"),
    "one date among time stamps": (LATER + "a,b,20160101120000\n", {}, "row 8, column timestamp: found '20160101120000', expected a time stamp in s"),
    "the last day of all": (DATED + "a,b,9999-12-31\n", {"time_unit": "date"}, "row 8, column timestamp: found '9999-12-31', expected a date like 2016-10-31 or 2016-10-31T12:00:00, 1970 to 2099"),
    "a day before time stamps": (DATED + "a,b,1066-10-14\n", {}, "row 8, column timestamp: found '1066-10-14'"),
    "no 30th of February": (DATED.replace("-", "") + "a,b,20160230\n", {}, "row 8, column timestamp: found '20160230', expected a date like"),
    "a negative time": (GOOD + "a,b,-5\n", {"time_unit": "s"}, "found '-5', expected a time stamp in s"),
    "latin-1": (GOOD.encode() + b"\xe9,b,1\n", {}, "t.csv, line 8: found the byte 0xe9"),
    "20 bytes of a gzip file": (gzip.compress(GOOD.encode())[:20], {}, "t.csv: found a broken gzip file"),
    "half a gzip file": (PACKED[: len(PACKED) // 2], {}, "t.csv: found a broken gzip file (Compressed file ended"),
    "a gzip file with another checksum": (flipped(PACKED, -6), {}, "t.csv: found a broken gzip file (CRC check failed"),
    "a gzip file with another length": (flipped(PACKED, -1), {}, "t.csv: found a broken gzip file (Incorrect length"),
    "a gzip file with a damaged block": (flipped(PACKED, len(PACKED) // 2), {}, "t.csv: found a broken gzip file ("),
    "an open quote": (GOOD + 'a,"b,1\n', {}, "t.csv, row 8"),
    "half a parquet file": (b"PAR1xxxx", {}, "not readable as parquet"),
    "no ratings": (GOOD, {"min_rating": 3.0}, "t.csv: no column 'rating'"),
    "what looks like zlib": (b"x\x01,item_id,timestamp\n", {}, "t.csv: the table cannot be read"),
    "line ends CR": (GOOD.replace("\n", "\r"), {}, "t.csv: found line ends CR, expected LF or CR LF; save"),
    "one name before the colon": ("event:user,event:item,timestamp\na,b,1\n", {}, "t.csv: found the columns ['event:user', 'event:item'], expected names that differ"),
    "a column twice": ("user_id,item_id,timestamp,timestamp\na,b,1,2\n", {}, "t.csv"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tables(tmp_path, case):
    data, changes, found = BAD[case]
    (tmp_path / "t.csv").write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UserError) as refused:
        main(options(tmp_path / "t.csv", tmp_path, **changes))
    assert found in str(refused.value) and "\n" not in str(refused.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["t.preprocess.run.json"]


@pytest.mark.parametrize(
    "name, changes, found",
    [
        (
            "t.csv",
            {"title_column": "title"},
            "--title_column title: there are no item texts; leave it out, or give --items",
        ),
        ("t.csv", {"brand_column": "no"}, "--brand_column no: there are no item texts"),
        ("t.csv", {"untitled": "drop"}, "--untitled drop: there are no item texts"),
        ("t.parquet", {"separator": "comma"}, "--separator comma: "),
        ("t.parquet", {"column_names": ["a", "b", "c"]}, "--column_names: "),
    ],
)
def test_options_without_effect_are_refused(tmp_path, name, changes, found):
    FORMS[name](tmp_path / name)
    with pytest.raises(UserError, match=found):
        main(options(tmp_path / name, tmp_path, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, changes, found",
    [
        ("item_id,title\nx,A\nx,B\n", {}, "i.csv, row 3, column item_id: found 'x', expected each item once"),
        ("item_id,label\nx,A\n", {}, "i.csv: no column of titles, found ['item_id', 'label']; give --title_column"),
        (
            "id,title\nx,A\n",
            {},
            "i.csv: no column 'item_id', found ['id', 'title']; check --item_column; the ids need the same name",
        ),
        ("item_id,title\nX,A\n", {}, "none of the 3 items has a title; the first is x, the first with a text X; give"),
        ("item_id,title\nX,A\n", {"untitled": "keep"}, "none of the 3 items has a title"),
        ("item_id,title\nx,A\n", {"brand_column": "b"}, "i.csv: no column 'b'"),
        ("item_id,title\nx,A\n", {}, "4 interactions are of items without a title, the first of item y"),
    ],
)
def test_bad_item_tables(tmp_path, text, changes, found):
    (tmp_path / "t.csv").write_text(GOOD)
    (tmp_path / "i.csv").write_text(text)
    with pytest.raises(UserError) as refused:
        main(options(tmp_path / "t.csv", tmp_path, items_file=str(tmp_path / "i.csv"), **changes))
    assert found in str(refused.value)


def test_items_titled_by_their_ids_are_counted(tmp_path, capsys):
    (tmp_path / "t.csv").write_text(GOOD)
    (tmp_path / "i.csv").write_text("item_id,title\nx,A\ny,\n")
    main(options(tmp_path / "t.csv", tmp_path, items_file=str(tmp_path / "i.csv"), untitled="keep"))
    assert "2 of 3 items have no title; their ids are their titles\n" in capsys.readouterr().out


def test_a_share_of_bad_records_is_left_out(tmp_path, capsys):
    (tmp_path / "t.csv").write_text(GOOD + "a,,1\nb,x,noon\n\n,x,1\n")
    main(options(tmp_path / "t.csv", tmp_path, max_bad=0.5))
    found = {fault["reason"]: (fault["records"], fault["first"]) for fault in stats(tmp_path)["left_out"]}
    assert {reason: count for reason, (count, _) in found.items()} == {
        "no valid user": 1, "no valid item": 1, "no valid time": 1,
    }  # fmt: skip
    assert "row 11, column user_id" in found["no valid user"][1] and inter(tmp_path) == EXPECTED
    assert capsys.readouterr().out.count("left out: 1 records, no valid ") == 3


def test_the_command(tmp_path):
    (tmp_path / "t.csv").write_text(GOOD)
    done = run_stage("preprocess.table", "--file", tmp_path / "t.csv", "--output_dir", tmp_path / "out")
    assert "train: 0 samples" in done.stdout and "warning: no train samples; " in done.stdout
    assert (tmp_path / "out" / "t.stats.json").exists()
    done = run_stage("preprocess.table", "--time_unit", "day", check=False)
    assert done.returncode == 2 and done.stderr.endswith("`python -m preprocess.table --help` lists the options\n")
