"""Readers of stage 0 under damaged files.

Invariants: whatever the bytes of a source are, a reader writes files that stage 3 can read, or raises a `UserError` of one
printable line and writes nothing; it executes nothing.
"""

import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import convert_dataset
from minionerec.common.errors import UserError
from preprocess import amazon, movielens, recbole, sequences, table

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 12))
REVIEWS = "".join(
    json.dumps({"reviewerID": f"A{user}", "asin": f"B{item}", "overall": 4.0, "unixReviewTime": 1_500_000_000 + item})
    + "\n"
    for user in range(3)
    for item in range(4)
)
METAS = "".join(str({"asin": f"B{item}", "title": f"Item {item}", "categories": [["X"]]}) + "\n" for item in range(4))
CSV = "".join(f"u{user},i{item},{item}\n" for user in range(3) for item in range(4))
RATINGS = "".join(f"{user}::{item}::4::{item + 1}\n" for user in range(3) for item in range(4))
INTER = "user_id:token\titem_id:token\ttimestamp:float\n" + CSV.replace(",", "\t")
ITEM = "item_id:token\ttitle:token_seq\n" + "".join(f"i{item}\tItem {item}\n" for item in range(4))
SOURCES = {
    "amazon": ({"x.json": REVIEWS, "m.json": METAS}, lambda f: amazon.Options(
        reviews=[f"{f}/x.json"], meta=[f"{f}/m.json"], output_dir=f"{f}/out", k_core=2, dataset_name="x", max_bad=0.5)),
    "sequences": ({"x.txt": "a 1 2 3 4\nb 2 1 3\nc 4 1 2\n", "t.json": '{"1": "A", "2": "B", "3": "C", "4": {"title": "D"}}'},
        lambda f: sequences.Options(file=f"{f}/x.txt", texts=f"{f}/t.json", output_dir=f"{f}/out", dataset_name="x",
        untitled="keep")),
    "table": ({"x.csv": "user_id,item_id,timestamp\n" + CSV, "i.csv": 'item_id,title\ni0,"A, b"\ni1,B\ni2,C\ni3,D\n'},
        lambda f: table.Options(file=f"{f}/x.csv", items_file=f"{f}/i.csv", output_dir=f"{f}/out", dataset_name="x",
        max_bad=0.5, untitled="drop")),
    "recbole": ({"x.inter": INTER, "x.item": ITEM}, lambda f: recbole.Options(
        input_dir=str(f), output_dir=f"{f}/out", dataset_name="x", split="chronological", max_bad=0.3)),
    "movielens": ({"ratings.dat": RATINGS,
                   "movies.dat": "0::A (1990)::War\n1::B::War|Drama\n2::C::\n3::D::X\n"},
        lambda f: movielens.Options(input_dir=str(f), output_dir=f"{f}/out", dataset_name="x", max_bad=0.5, untitled="keep")),
}  # fmt: skip
PIECES = st.one_of(
    st.binary(max_size=6),
    st.sampled_from([b"\0", b"\xff\xfe", b'"', b"\t", b"\n", b"\r", b",", b":", b"nan", b"inf", b"-1", b"1e400", b"\xe2\x80\xa8",
                     b"{", b"[" * 3000, b"9" * 400, b"''", b"__import__('os')", b"\x1b[31m", b"\\ud800", b"null", b"{}\n", b"x\x01"]),
)  # fmt: skip
DAMAGE = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), PIECES), max_size=4)


def damaged(data: bytes, damage) -> bytes:
    for where, length, piece in damage:
        place = int(where * len(data))
        data = data[:place] + piece + data[place + length :]
    return data


@pytest.mark.parametrize("name", SOURCES)
def test_damaged_files(tmp_path, name):
    files, options_of = SOURCES[name]
    module = {"amazon": amazon, "sequences": sequences, "table": table, "recbole": recbole, "movielens": movielens}[
        name
    ]

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(which=st.integers(0, len(files) - 1), damage=DAMAGE)
    def check(which, damage):
        folder = tmp_path / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for number, (file, text) in enumerate(files.items()):
            (folder / file).write_bytes(damaged(text.encode(), damage if number == which else []))
        try:
            module.main(options_of(folder))
        except UserError as error:
            assert "\n" not in str(error) and damage
            assert [path.name for path in (folder / "out").glob("*")] in ([], ["x.preprocess.run.json"])
            return
        out = folder / "out"
        items = json.loads((out / "x.item.json").read_text(encoding="utf-8"))
        (out / "x.index.json").write_text(json.dumps({item: [f"<a_{item}>"] for item in items}))
        convert_dataset.main(convert_dataset.Options(dataset_name="x", data_dir=str(out), output_dir=str(out / "csv")))

    check()
    check.hypothesis.inner_test(0, [])  # undamaged files are read
