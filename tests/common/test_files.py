"""Files: checked when read, atomic when written.

Invariants: what cannot be read is one line that names the file and the option; a file exists whole or not at all, also
where writing fails half-way or the disk is full; nothing is left in the folder after a failure.
"""

import json
import os
import re
import subprocess

import pytest

from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, read_json, require_file, write_json
from minionerec.common.options import message_of


def test_require_file(tmp_path):
    assert require_file(str(tmp_path), "flag") == tmp_path
    with pytest.raises(UserError, match="--flag is required"):
        require_file("", "flag")
    with pytest.raises(UserError, match="none: no such file or folder; check --flag"):
        require_file(tmp_path / "none", "flag")
    with pytest.raises(UserError, match=rf"none: .*; check --flag \(in {re.escape(os.getcwd())}\)$"):
        require_file("none", "flag")


BAD = {
    "utf-16": (b"\xff\xfe{\x00}\x00", "not valid JSON"),
    "latin-1": ('{"a": "é"}'.encode("latin-1"), "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "cut": (b'{"a": 1', "line 1 column 8"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "twice": (b'{"0": {"a": 1, "b": 2, "a": 3}}', "key 'a' is there twice"),
    "lone surrogate": (rb'{"a": "\ud83d"}', "surrogates not allowed"),
    "list": (b"[1]", "found a JSON list, expected an object"),
    "text": (b'"x"', "found a JSON str, expected an object"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_json_names_the_file_and_the_option(tmp_path, case):
    content, message = BAD[case]
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_json(tmp_path / "x.json", "flag")
    assert str(tmp_path / "x.json") in str(refused.value) and "--flag" in str(refused.value)
    assert message in str(refused.value)


def test_json_round_trip(tmp_path):
    content = {"é": ["😀", 1.5, None], "b": {"x": "\u2028"}}
    write_json(tmp_path / "new" / "x.json", content)
    assert read_json(tmp_path / "new" / "x.json", "flag") == content
    (tmp_path / "mark.json").write_bytes(b'\xef\xbb\xbf{"pair": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "mark.json", "flag") == {"pair": "😀"}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a" / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), atomic_file(path) as f:
        f.write("half")
        f.flush()
        raise RuntimeError
    with pytest.raises(TypeError):
        write_json(path, {"no JSON": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError) as error:
        write_json(tmp_path / "file" / "x.json", {})
    assert "check the path" in message_of(error.value)


# ------------------------------------------------------------------------------------------------ full and read-only


def test_a_full_disk(small_disk):
    path = small_disk / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(OSError) as error, atomic_file(path) as f:
        for _ in range(4096):
            f.write("x" * 1024)
    assert message_of(error.value).startswith(f"{path}: No space left on device; check the path")
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(small_disk) == ["x.json"]


def test_a_read_only_disk(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError) as error:
        write_json(small_disk / "new" / "x.json", {})
    assert f"{small_disk / 'new'}: Read-only file system; check the path" in message_of(error.value)


def test_a_failed_write_leaves_no_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in ("new/deep", "mine/deep"):
        with pytest.raises(ValueError), atomic_file(tmp_path / folder / "x.csv"):
            raise ValueError
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    with atomic_file(tmp_path / "new" / "x.csv") as f:
        f.write("x")
    with pytest.raises(ValueError), atomic_file(tmp_path / "new" / "y.csv"):
        raise ValueError
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.csv"]
