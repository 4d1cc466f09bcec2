"""Sequence files, and what every reader of stage 0 writes.

Invariants: file order is the order of a sequence; the published statistics of Beauty; ids keep their originals; the
files are those that stage 3 reads; a mistake is one line, and nothing is written.
"""

import json

import pytest
from helpers import ROOT, run_stage

import convert_dataset
from minionerec.common.errors import UserError
from preprocess.sequences import Options, main

BEAUTY = ROOT.parent / "shared" / "data" / "beauty"
LINES = "ann 30 10 20\nbob 10 20 30  40\n\ncid\t40 10\n"


def write(folder, text=LINES, texts=None, name="toy.txt", **changes):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    if texts is not None:
        suffix = "json" if texts.startswith("{") else "tsv"
        (folder / f"texts.{suffix}").write_text(texts)
        changes["texts"] = str(folder / f"texts.{suffix}")
    return Options(file=str(folder / name), output_dir=str(folder / "out"), **changes)


def inter(folder, split, name="toy") -> list[str]:
    return sorted((folder / "out" / f"{name}.{split}.inter").read_text().splitlines()[1:])


def test_by_hand(tmp_path, capsys):
    main(write(tmp_path))
    assert inter(tmp_path, "train") == ["1\t0\t1"]
    assert inter(tmp_path, "valid") == ["0\t2\t0", "1\t0 1\t2"]
    assert inter(tmp_path, "test") == ["0\t2 0\t1", "1\t0 1 2\t3"]
    out = tmp_path / "out"
    assert (out / "toy.user2id").read_text() == "ann\t0\nbob\t1\ncid\t2\n"
    assert (out / "toy.item2id").read_text() == "10\t0\n20\t1\n30\t2\n40\t3\n"
    items = json.loads((out / "toy.item.json").read_text())
    assert items["3"] == {"title": "40", "description": "", "brand": "", "categories": ""}
    stats = json.loads((out / "toy.stats.json").read_text())
    assert (stats["users"], stats["items"], stats["interactions"]) == (3, 4, 9)
    assert stats["density"] == 9 / 12 and stats["split"]["users_left_out"] == 1
    assert stats["split"]["samples"] == {"train": 1, "valid": 2, "test": 2}
    said = capsys.readouterr().out
    assert "read: 3 users, 4 items, 9 interactions" in said and "the source has no times" in said
    main(write(tmp_path))
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    "texts",
    [
        json.dumps({"10": {"title": " A &amp;\tB\n", "description": ["x", "y"], "categories": 7}, "20": "C", "30": "漢字", "40": "<b>D</b>"}),
        "10\tA & B\n20\tC\n30\t漢字\n40\tD\n",
    ],
)  # fmt: skip
def test_texts(tmp_path, texts):
    main(write(tmp_path, texts=texts))
    items = json.loads((tmp_path / "out" / "toy.item.json").read_text())
    assert [items[str(i)]["title"] for i in range(4)] == ["A & B", "C", "漢字", "D"]
    if texts.startswith("{"):
        assert items["0"] == {"title": "A & B", "description": "x, y", "brand": "", "categories": "7"}


def test_items_without_a_title(tmp_path):
    """They are refused, left out with their interactions, or titled by their id."""
    texts = "10\tA\n20\tB\n30\tC\n"
    with pytest.raises(UserError, match="2 interactions are of items without a title, the first of item 40"):
        main(write(tmp_path, texts=texts))
    main(write(tmp_path, texts=texts, untitled="drop"))
    stats = json.loads((tmp_path / "out" / "toy.stats.json").read_text())
    assert stats["steps"][-1] == {"step": "with a title", "users": 3, "items": 3, "interactions": 7, "dropped": 2}
    assert inter(tmp_path, "test") == ["0\t2 0\t1", "1\t0 1\t2"]
    main(write(tmp_path, texts=texts, untitled="keep", overwrite=True))
    assert json.loads((tmp_path / "out" / "toy.item.json").read_text())["3"]["title"] == "40"


def test_k_core_and_repeats(tmp_path):
    main(write(tmp_path, "a 1 2 1 3\nb 1 2 2\nc 9 1\n", k_core=3))
    stats = json.loads((tmp_path / "out" / "toy.stats.json").read_text())
    assert [step["interactions"] for step in stats["steps"]] == [9, 6] and stats["repeats"] == 2
    assert stats["steps"][-1]["rounds"] >= 2 and stats["split"]["test_targets_in_history"] == 2
    main(write(tmp_path, "a 1 2 1 3\nb 1 2 2\nc 9 1\n", drop_repeats="all", overwrite=True))
    assert inter(tmp_path, "test") == ["0\t0 1\t2"]


BAD = {
    "an empty file": (b"", {}, "toy.txt: the file is empty"),
    "only blank lines": (b"\n \n", {}, "toy.txt: the file is empty"),
    "a user twice": ("a 1 2 3\na 4 5 6\n", {}, "toy.txt, line 2: user 'a' is there twice"),
    "a user without items": ("a 1 2 3\nb\n", {}, "toy.txt, line 2: found 'b', expected a user and items (1 of 4 records"),
    "latin-1": (b"a 1 2 3\nb 4 \xe9 6\n", {}, "toy.txt, line 2: found the byte 0xe9"),
    "UTF-16": ("a 1 2 3\n".encode("utf-16"), {}, "found UTF-16 or binary data"),
    "line ends CR": ("a 1 2 3\rb 4 5 6\r", {}, "toy.txt: found line ends CR, expected LF or CR LF; save the file"),
    "one line end CR": ("a 1 2 3\rb 4 5 6\nc 1 2 3\n", {}, "toy.txt, line 1: found a carriage return inside the line"),
    "texts with line ends CR": (LINES, {"texts": "10\tA\r20\tB\r"}, "texts.tsv: found line ends CR, expected LF"),
    "too short": ("a 1\nb 2\n", {}, "none of 2 users has 3 interactions"),
    "a core that is empty": (LINES, {"k_core": 9}, "9-core: no interaction is left"),
    "a split without times": (LINES, {"split": "chronological"}, "--split chronological: the source has no times"),
    "a date without times": (LINES, {"from_time": "2016"}, "--from_time 2016: the source has no dates"),
    "a rating without ratings": (LINES, {"min_rating": 3.0}, "--min_rating 3.0: the source has no ratings"),
    "no text of an item": (LINES, {"texts": '{"10": [1]}'}, "item 10 has '[1]', expected an object"),
    "a line without a tab": (LINES, {"texts": "10 A\n"}, "texts.tsv, line 1: found '10 A', expected 'item<tab>title'"),
    "an item twice": (LINES, {"texts": "10\tA\n10\tB\n"}, "texts.tsv, line 2: found '10\\tB', expected each item once"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_sources(tmp_path, case):
    text, changes, found = BAD[case]
    with pytest.raises(UserError) as refused:
        main(write(tmp_path, text, **changes))
    assert found in str(refused.value) and "\n" not in str(refused.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["toy.preprocess.run.json"]


def test_faults_below_the_limit_are_counted(tmp_path, capsys):
    main(write(tmp_path, "a 1 2 3\nb\n", max_bad=0.3))
    assert "left out: 1 records, a user without items; the first: " in capsys.readouterr().out
    stats = json.loads((tmp_path / "out" / "toy.stats.json").read_text())
    assert stats["left_out"][0]["records"] == 1 and "toy.txt, line 2" in stats["left_out"][0]["first"]


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"max_history": 0}, "--max_history 0: expected at least 1"),
        ({"max_bad": 2.0}, "--max_bad 2.0: expected 0 to 1"),
        ({"valid_from": "2016"}, "--test_from : expected both"),
        ({"valid_from": "2016", "test_from": "2017"}, "--split leave_one_out: expected time"),
        ({"dataset_name": "a/b"}, "--dataset_name a/b: expected a plain name, without slashes"),
    ],
)
def test_options(tmp_path, changes, found):
    with pytest.raises(UserError, match=found):
        write(tmp_path, **changes)


def test_stage_3_reads_the_files(tmp_path):
    main(write(tmp_path))
    out = tmp_path / "out"
    (out / "toy.index.json").write_text(json.dumps({str(i): [f"<a_{i}>"] for i in range(4)}))
    convert_dataset.main(convert_dataset.Options(dataset_name="toy", data_dir=str(out), output_dir=str(out)))
    assert (out / "test" / "toy.csv").read_text().splitlines()[2] == (
        "1,\"['10', '20', '30']\",40,\"[0, 1, 2]\",3,\"['<a_0>', '<a_1>', '<a_2>']\",<a_3>"
    )


def test_the_command(tmp_path):
    write(tmp_path)
    done = run_stage("preprocess.sequences", "--file", tmp_path / "toy.txt", "--output_dir", tmp_path / "out")
    assert "read: 3 users, 4 items, 9 interactions\n" in done.stdout
    done = run_stage("preprocess.sequences", "--file", tmp_path / "no", "--output_dir", tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.endswith("no: no such file or folder; check --file\n")


@pytest.mark.skipif(not BEAUTY.exists(), reason="needs the Beauty files")
def test_beauty_has_its_published_statistics(tmp_path):
    main(
        Options(
            file=str(BEAUTY / "Beauty.txt"), texts=str(BEAUTY / "Beauty.item.json"), output_dir=str(tmp_path), k_core=5
        )
    )
    stats = json.loads((tmp_path / "Beauty.stats.json").read_text())
    assert (stats["users"], stats["items"], stats["interactions"]) == (22_363, 12_101, 198_502)
    assert stats["split"]["samples"] == {"train": 131_413, "valid": 22_363, "test": 22_363}
    lines = (BEAUTY / "Beauty.txt").read_text().splitlines()
    tests = (tmp_path / "Beauty.test.inter").read_text().splitlines()[1:]
    for line, row in zip(lines[:300], tests[:300], strict=True):  # users and items keep their numbers
        user, *walk = line.split()
        assert row == f"{user}\t{' '.join(walk[:-1])}\t{walk[-1]}"
