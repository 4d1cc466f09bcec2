"""Text files and tables, read from exactly the file that is named.

Polars takes `*`, `?` and `[` in a path as a pattern and reads a folder as all of its files, so it is only ever given
bytes here. Files are UTF-8, with or without a byte-order mark, and may be gzip. Anything else is refused with a one-line error.
"""

import csv
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from minionerec.common.errors import UserError
from minionerec.common.files import require_file

ROW = "#row"  # the column that `read_csv` adds: the row's number, as an editor counts; the header is row 1
CHUNK = 1 << 26  # bytes of a file that `read_csv_parts` reads at once


def read_bytes(path: str | Path, flag: str) -> bytes:
    """The bytes of one file, unpacked if it is gzip, without a byte-order mark. Refuses a folder and UTF-16."""
    return next(_chunks(path, flag, -1))


def _chunks(path: str | Path, flag: str, size: int) -> Iterator[bytes]:
    """What `read_bytes` returns, in chunks of whole lines with about `size` bytes; at least one, which may be empty."""
    path = require_file(path, flag)
    if path.is_dir():
        raise UserError(f"{path}: found a folder, expected a file; check --{flag}")
    with open(path, "rb") as f:
        packed = f.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else open(path, "rb") as f:
        try:
            data = f.read(size) + f.readline()
            if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data.partition(b"\n")[0]:
                raise UserError(f"{path}: found UTF-16 or binary data, expected UTF-8 text; save the file as UTF-8")
            yield data.removeprefix(b"\xef\xbb\xbf")
            while data := f.read(size) + f.readline():
                yield data
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise UserError(f"{path}: found a broken gzip file; download it again or check --{flag}") from None


def read_text(path: str | Path, flag: str) -> str:
    """The text of one UTF-8 file, line ends unchanged. Raises `UserError` naming the line that is not UTF-8."""
    return _decoded(read_bytes(path, flag), path)


def _decoded(data: bytes, path: str | Path, before: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = before + data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: found the byte 0x{data[error.start]:02x}, which is not UTF-8 there; "
            "save the file as UTF-8"
        ) from None


def read_csv(path: str | Path, flag: str, *, separator: str = ",", quote_char: str | None = '"') -> pl.DataFrame:
    """The table in one CSV file: every cell a string, an empty one null, and `ROW`, the number of each row.

    Blank lines are skipped. Raises `UserError` naming the row for a quote that is not closed and for a row with more or
    fewer cells than the header, and for a file without a header, with a column twice, or in another encoding than UTF-8.
    """
    return _table(read_bytes(path, flag), path, flag, separator, quote_char)


def read_csv_parts(path: str | Path, flag: str, *, separator: str, size: int | None = None) -> Iterator[pl.DataFrame]:
    """The table that `read_csv` returns without quotes, in parts of about `size` bytes of the file (default: `CHUNK`)."""
    header, before = b"", 0  # lines of earlier parts
    for data in _chunks(path, flag, size or CHUNK):
        if header:
            data = header + data
        elif data := data.lstrip(b"\r\n"):
            header = data.partition(b"\n")[0] + b"\n"
        else:
            continue
        yield _table(data, path, flag, separator, None, before)
        before += data.count(b"\n") - 1
    if not header:
        yield _table(b"", path, flag, separator, None)


def _table(data: bytes, path, flag: str, separator: str, quote_char: str | None, before: int = 0) -> pl.DataFrame:
    """The table in `data`, a file or its header and the lines that follow `before` others."""
    if not data.strip():
        raise UserError(f"{path}: the file is empty, expected a header and rows; check --{flag}")
    try:
        table = pl.read_csv(io.BytesIO(data), separator=separator, quote_char=quote_char, infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        found = _fault(_decoded(data, path, before), separator, quote_char, before) or str(error).splitlines()[0]
        raise UserError(f"{path}, {found}; repair it or check --{flag}") from None
    if twice := [name for name in table.columns if f"{name}_duplicated_0" in table.columns]:
        raise UserError(f"{path}: column {twice[0]!r} is there twice; remove one")
    if ROW in table.columns:
        raise UserError(f"{path}: column {ROW!r} is a name that this program uses itself; rename it")
    if len(table) and table.to_series(-1).null_count():  # an empty last cell, or a row that ends too early
        if found := _fault(_decoded(data, path, before), separator, quote_char, before):
            raise UserError(f"{path}, {found}; repair it or check --{flag}")
    return table.with_row_index(ROW, offset=before + 2).filter(~pl.all_horizontal(pl.exclude(ROW).is_null()))


def refuse_rows(table: pl.DataFrame, bad: pl.Series | pl.Expr, column: str, path: str | Path, expected: str) -> None:
    """Raise `UserError` for the first row of a table of `read_csv` where `bad` holds, with its cell in `column`."""
    for row, cell in table.filter(bad).select(ROW, column).head(1).iter_rows():
        raise UserError(f"{path}, row {row}, column {column}: found {(cell or '')[:60]!r}, expected {expected}")


def _fault(text: str, separator: str, quote_char: str | None, before: int = 0) -> str | None:
    """The first row that breaks the rules of CSV, in words; `before` rows stand between it and the header."""
    quoting = csv.QUOTE_MINIMAL if quote_char else csv.QUOTE_NONE
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, quotechar=quote_char or '"', quoting=quoting, strict=True
    )
    row, width = 0, 0
    try:
        for row, cells in enumerate(reader, start=1):
            width = width or len(cells)
            if cells and len(cells) != width:
                return f"row {before + row}: found {len(cells)} cells, expected {width} as in the header"
    except csv.Error as error:
        return f"row {before + row + 1}: found a cell whose quotes are not closed or not doubled ({error})"
    finally:
        csv.field_size_limit(limit)
    return "a quote inside a cell is not doubled" if quote_char and text.count(quote_char) % 2 else None
