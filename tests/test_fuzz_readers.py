"""Readers of data files under random and hostile content.

Invariants: whatever the bytes of a file are, a reader returns something that the next step accepts, or raises a
`UserError` of one printable line; it does so within seconds, and nothing in the file is executed.

`FUZZ_EXAMPLES=5000 python -m pytest tests/test_fuzz_readers.py` tries more than the 60 files of each kind that the fast
tests try.
"""

import csv
import io
import json
import os
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert_dataset import read_inter
from data import TASKS, Prompts
from minionerec.catalog.catalog import Catalog
from minionerec.catalog.items import Items, prompt_titles, read_info, read_titles
from minionerec.catalog.sequences import read_preferences, read_sequences
from minionerec.catalog.sids import codebook_tokens, read_index
from minionerec.catalog.trie import Trie
from minionerec.common.embeddings import load_embeddings
from minionerec.common.errors import UserError
from minionerec.common.files import read_json
from minionerec.common.processes import one_line
from minionerec.common.tables import read_csv
from minionerec.common.text import HIDDEN

SIDS = ["<a_0><b_1>", "<a_1><b_0>", "<a_2>"]
TITLES = ["One", 'Two, "or" so', "Three"]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 60))
ATTEMPTS: Counter[str] = Counter()
VICTIM = Path(os.environ.get("TMPDIR", "/tmp")) / f"executed-{os.getpid()}"


# ------------------------------------------------------------------------------------------------ readers


def sequences(path: Path) -> None:
    rows = read_sequences(path, SIDS, "flag")
    assert rows["target"].is_between(0, 2).all() and rows["history"].explode().drop_nulls().is_between(0, 2).all()
    for task in ("sid_seq", "title_seq2sid", "sid_walk"):
        list(TASKS[task].examples(rows, Items(SIDS, TITLES), Prompts()))


def inter(path: Path) -> None:
    rows = pl.concat(read_inter(path, 3))
    assert rows["target"].is_between(0, 2).all() and rows["history"].explode().drop_nulls().is_between(0, 2).all()


def info(path: Path) -> None:
    items = read_info(path)
    Catalog(items.sids)
    codebook_tokens(items.sids)
    prompt_titles(items)


def index(path: Path) -> None:
    sids = read_index(path)
    Catalog(sids)
    codebook_tokens(sids)


def titles(path: Path) -> None:
    read = read_titles(path)
    "".join(prompt_titles(Items([f"<a_{item}>" for item in range(len(read))], read))[0]).encode("utf-8")


def template(path: Path) -> None:
    prompts = Prompts(path, "toys")
    for task in prompts.tasks:
        if task in TASKS:
            prompts.render(task, **{TASKS[task].field: "x"})


def table(path: Path) -> None:
    read_csv(path, "flag")


def atomic_table(path: Path) -> None:
    read_csv(path, "flag", separator="\t", quote_char=None)


def trie(path: Path) -> None:
    Trie.load(path)


def bytes_of(write) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


CSV_ROWS = [
    ["user_id", "history_item_title", "item_title", "history_item_id", "item_id", "history_item_sid", "item_sid"],
    ["u", "['One', 'Two']", 'Two, "or" so', "[0, 1]", "2", "['<a_0><b_1>', '<a_1><b_0>']", "<a_2>"],
    ["v", "[]", "One", "[]", "0", "[]", "<a_0><b_1>"],
]
INDEX = {"0": ["<a_0>", "<b_1>"], "1": ["<a_1>", "<b_0>"], "2": ["<a_2>"]}
META = {str(i): {"title": title, "description": "", "brand": "", "categories": ""} for i, title in enumerate(TITLES)}


def csv_bytes(rows) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


INTER = b"user_id:token\titem_id_list:token_seq\titem_id:token\nu\t0 1\t2\nv\t\t0\n"
INFO = b"<a_0><b_1>\tOne\t0\n<a_1><b_0>\tTwo\t1\n<a_2>\tThree\t2\n"
READERS = {  # reader, and a file that it accepts
    "csv": (sequences, csv_bytes(CSV_ROWS)),
    "inter": (inter, INTER),
    "info": (info, INFO),
    "index.json": (index, json.dumps(INDEX).encode()),
    "item.json": (titles, json.dumps(META).encode()),
    "preferences": (read_preferences, b'{"u": "likes lamps", "v": "likes hooks"}'),
    "template": (template, (ROOT / "config" / "prompt.yaml").read_bytes()),
    "table": (table, csv_bytes(CSV_ROWS)),
    "atomic table": (atomic_table, INTER),
    "embedding": (load_embeddings, bytes_of(lambda f: np.save(f, np.eye(3, dtype=np.float32)))),
    "trie": (trie, None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def good(folder) -> dict[str, bytes]:
    Trie.build([[1, 2], [1, 3], [4, 5]]).save(folder / "good")
    return {kind: data or (folder / "good").read_bytes() for kind, (_, data) in READERS.items()}


@pytest.fixture(autouse=True)
def count(record_property):
    """Records how many files each reader got in a test, for benchmarks/reliability.py."""
    ATTEMPTS.clear()
    yield
    for kind, attempts in ATTEMPTS.items():
        record_property(kind, attempts)


def attempt(kind: str, data: bytes, folder: Path) -> bool:
    """Whether the reader of `kind` accepts a file; raises where it neither does nor refuses it in one line."""
    path = folder / "x[1]*.csv"
    path.write_bytes(data)
    ATTEMPTS[kind] += 1
    try:
        READERS[kind][0](path)
        return True
    except UserError as error:
        message = one_line(str(error))
        assert not HIDDEN & {unicodedata.category(character) for character in message}, repr(message)
        assert len(message) <= 1000 and "\n" not in str(error), repr(message)
        return False
    finally:
        assert not VICTIM.exists()


# ------------------------------------------------------------------------------------------------ content

HOSTILE = [
    f"__import__('pathlib').Path('{VICTIM}').touch()",
    f"[__import__('pathlib').Path('{VICTIM}').touch()]",
    f"!!python/object/apply:pathlib.Path.touch ['{VICTIM}']",
    f"$(touch {VICTIM})", f"'; touch {VICTIM} #", "=cmd|' /C calc'!A0", "../../etc/passwd", "{0.__class__}", "{history}",
    "NaN", "Infinity", "1e999", "9" * 30, "9" * 5000, "-1", "0.5", "1.7", "true", "null", "[1.7]", "'12'", "{1:2}", "{1}",
    "[" * 2000, "[[0]]", "(0,)", "[0, 0", "٠", "<a_0>", "<a_20000000>", f"<a_{'9' * 40}>", "<a_00>", "<|a_1|>", "<_1>",
    "<a_1><a_1>", '"', '""', "'", ",", "\t", "\n", "\r", "\r\n", "\0", "\x1b[31m", "\u2028", "\ufeff", "\ud800", "\\ud800",
    "\\u0000", "#row", "*", "&a *a", "? ", ": ", "x" * 5000,
]  # fmt: skip

cells = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=8), st.integers().map(str))
fragments = st.one_of(st.binary(max_size=6), cells.map(lambda text: text.encode("utf-8", "surrogatepass")))
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), fragments), min_size=1, max_size=3)


def edited(data: bytes, changes) -> bytes:
    """`data` with some of its bytes replaced: (place as a share of the length, bytes removed, bytes put there)."""
    for place, removed, fragment in changes:
        start = int(place * len(data))
        data = data[:start] + fragment + data[start + removed :]
    return data


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(HOSTILE)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "1", "title", "x"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
bounded = settings(
    max_examples=EXAMPLES,
    deadline=10_000,  # milliseconds for one file
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("kind", READERS)
def test_the_good_file_is_accepted(kind, good, folder):
    assert attempt(kind, good[kind], folder)


@pytest.mark.parametrize("kind", READERS)
@bounded
@given(changes=edits)
def test_edited_files(kind, good, folder, changes):
    attempt(kind, edited(good[kind], changes), folder)


@pytest.mark.parametrize("kind", READERS)
@bounded
@given(data=st.binary(max_size=200))
def test_random_bytes(kind, folder, data):
    attempt(kind, data, folder)


@pytest.mark.parametrize("kind", READERS)
@bounded
@given(share=st.floats(0, 1))
def test_truncated_files(kind, good, folder, share):
    attempt(kind, good[kind][: int(share * len(good[kind]))], folder)


@pytest.mark.parametrize("kind", ["index.json", "item.json", "preferences"])
@bounded
@given(value=st.dictionaries(st.sampled_from(["0", "1", "2", "00", "x"]), json_values, max_size=3) | json_values)
def test_json_of_another_shape(kind, folder, value):
    attempt(kind, json.dumps(value).encode(), folder)


@pytest.mark.parametrize("kind", ["csv", "table"])
@bounded
@given(row=st.integers(0, 2), column=st.integers(0, 6), cell=cells)
def test_one_other_cell(kind, folder, row, column, cell):
    """A well-formed CSV with one other cell: it is read, or row and column are named."""
    rows = [list(cells) for cells in CSV_ROWS]
    rows[row][column] = cell
    attempt(kind, csv_bytes(rows), folder)


@bounded
@given(key=st.sampled_from(["sid_separator", "instruction", "input", "tasks", "categories"]), value=json_values)
def test_templates_with_other_values(folder, key, value):
    import yaml

    content = yaml.safe_load(READERS["template"][1])
    inner = content["tasks"]["sid_seq"] if key in ("instruction", "input") else content
    inner[key] = value
    attempt("template", json.dumps(content).encode(), folder)


def test_json_and_text_at_the_limits(folder):
    for data in (b"[" * 1_000_000, b'{"0":' * 1_000_000, b'{"0": "' + b"x" * 10_000_000, b"9" * 1_000_000):
        for kind in ("index.json", "item.json"):
            assert not attempt(kind, data, folder)
        with pytest.raises(UserError):
            read_json(folder / "x[1]*.csv", "flag")
    assert attempt("table", b"a,b\n" + b'"' + b"x" * 10_000_000 + b'",1\n', folder)
