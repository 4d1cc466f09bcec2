"""Tables: exactly the file that is named is read, and what is wrong with it is one line.

Invariants: `*`, `?` and `[` in a path are characters, not patterns; a folder is no table; a byte-order mark is accepted;
every malformed CSV is a `UserError` that names file and row; rows keep the numbers that an editor shows; a file in parts is
the whole file, with the same faults.
"""

import gzip

import polars as pl
import pytest

from minionerec.common.errors import UserError
from minionerec.common.tables import ROW, read_csv, read_csv_parts, read_text, refuse_rows


def write(tmp_path, content: bytes, name: str = "x.csv"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["toy[1].csv", "toy*.csv", "toy?.csv", "toy{1,2}.csv"])
def test_a_path_is_no_pattern(tmp_path, name):
    write(tmp_path, b"a\nwrong\n", "toy1.csv")
    write(tmp_path, b"a\nwrong\n", "toy2.csv")
    assert read_csv(write(tmp_path, b"a\nright\n", name), "file")["a"].to_list() == ["right"]


def test_a_folder_is_no_table(tmp_path):
    write(tmp_path, b"a\n1\n")
    with pytest.raises(UserError, match="found a folder, expected a file; check --file"):
        read_csv(tmp_path, "file")


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa,b\n1,\n", b"a,b\r\n1,\r\n", b"a,b\n1,", b"\n\na,b\n1,\n"])
def test_marks_line_ends_and_blank_lines_at_the_start(tmp_path, content):
    table = read_csv(write(tmp_path, content), "file")
    assert table.columns == [ROW, "a", "b"] and table.rows() == [(2, "1", None)]


def test_rows_keep_their_numbers(tmp_path):
    """Blank lines are skipped, and still counted."""
    assert read_csv(write(tmp_path, b"a,b\n1,2\n\n3,4\n\n"), "file").rows() == [(2, "1", "2"), (4, "3", "4")]


def test_cells_are_strings_as_written(tmp_path):
    table = read_csv(write(tmp_path, b'a,b\n"x\ny","say ""hi"", 5"\n007,\xf0\x9f\x98\x80\n'), "file")
    assert table.rows() == [(2, "x\ny", 'say "hi", 5'), (3, "007", "😀")]
    table = read_csv(write(tmp_path, b'a\tb\n"x\t5" pipe\n'), "file", separator="\t", quote_char=None)
    assert table.rows() == [(2, '"x', '5" pipe')]


BAD = {
    "empty": (b"", "the file is empty"),
    "only blank lines": (b"\n\n", "the file is empty"),
    "only a mark": (b"\xef\xbb\xbf", "the file is empty"),
    "latin-1": ("a,b\nx,1\né,2\n".encode("latin-1"), "line 3: found the byte 0xe9"),
    "surrogates": (b"a,b\n\xed\xa0\x80,2\n", "line 2: found the byte 0xed"),
    "utf-16": ("a,b\n1,2\n".encode("utf-16"), "found UTF-16"),
    "utf-16 without a zero byte in its header": ("\u6807\u9898\n1\n".encode("utf-16"), "found UTF-16"),
    "utf-16 without a mark": ("a,b\n1,2\n".encode("utf-16-le"), "found UTF-16"),
    "zip": (b"PK\x03\x04\0\0\0\0", "found UTF-16 or binary data"),
    "a cell too many": (b"a,b\n1,2\n1,2,3\n", "row 3: found 3 cells, expected 2"),
    "a cell too few": (b"a,b,c\n1,2,3\n\n1,2\n", "row 4: found 2 cells, expected 3"),
    "cells too few and then quotes": (b'a,b\n1,2\n3\n4,"5,\n6"\n', "row 3: found 1 cells"),
    "unclosed": (b'a,b\n1,2\n"3,4\n5,6\n', "row 3: found a cell whose quotes are not closed"),
    "text after a quote": (b'a,b\n"x"y,2\n', "row 2: found a cell whose quotes"),
    "quote inside a cell": (b'a,b\n5" pipe,2\n', "a quote inside a cell is not doubled"),
    "a column twice": (b"a,b,a\n1,2,3\n", "column 'a' is there twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_table_is_one_line(tmp_path, case):
    content, found = BAD[case]
    path = write(tmp_path, content)
    with pytest.raises(UserError) as refused:
        read_csv(path, "file")
    message = str(refused.value)
    assert message.startswith(str(path)) and found in message and "\n" not in message


PARTS = {
    "rows": b"a,b\n1,2\n3,\n,4\n",
    "no end of line": b"a,b\n1,2\n3,4",
    "a mark, a blank first line, CRLF": b"\xef\xbb\xbf\r\na,b\r\n1,2\r\n\r\n3,4\r\n",
    "blank lines": b"a,b\n\n\n1,2\n\n\n3,4\n\n\n",
    "quotes": b'a,b\n"1,2\n"3,4"\n',
    "a header": b"a,b\n",
    "gzip": gzip.compress(b"a,b\n1,2\n3,4\n"),
    "a broken gzip": gzip.compress(b"a,b\n1,2\n3,4\n")[:-9],
} | {case: content for case, (content, _) in BAD.items() if b'"' not in content}


@pytest.mark.parametrize("size", [1, 6, 1000])
@pytest.mark.parametrize("case", PARTS)
def test_parts_are_the_whole(tmp_path, case, size):
    path = write(tmp_path, PARTS[case])

    def found(read) -> list | str:
        try:
            return read().rows()
        except UserError as error:
            return str(error)

    whole = found(lambda: read_csv(path, "file", quote_char=None))
    assert whole == found(lambda: pl.concat(read_csv_parts(path, "file", separator=",", size=size)))


def test_long_cells_are_no_fault(tmp_path):
    """Python's csv module, which looks for the fault, limits cells to 131 072 characters by default."""
    path = write(tmp_path, b"a,b\n" + b"x" * 200_000 + b",\n1,2,3\n")
    with pytest.raises(UserError, match="row 3: found 3 cells"):
        read_csv(path, "file")


def test_text_keeps_its_line_ends(tmp_path):
    assert read_text(write(tmp_path, b"\xef\xbb\xbfa\r\nb\r\n"), "file") == "a\r\nb\r\n"
    with pytest.raises(UserError, match="line 2: found the byte 0xff"):
        read_text(write(tmp_path, b"a\n\xff\n"), "file")


def test_refused_rows_name_row_column_and_cell(tmp_path):
    table = read_csv(write(tmp_path, b"a,b\n1,2\n,4\n"), "file")
    refuse_rows(table, table["b"] == "9", "a", "x.csv", "nothing")
    with pytest.raises(UserError, match="x.csv, row 3, column a: found '', expected a number"):
        refuse_rows(table, table["a"].is_null(), "a", "x.csv", "a number")
