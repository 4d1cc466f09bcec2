"""Text files and tables, read from exactly the file that is named.

Polars takes `*`, `?` and `[` in a path as a pattern and reads a folder as all of its files, so it is only ever given
bytes here. Files are UTF-8, with or without a byte-order mark, and may be gzip. Anything else is refused with a one-line error.
"""

import csv
import gzip
import io
import sys
import zlib
from pathlib import Path

import polars as pl

from minionerec.common.errors import UserError
from minionerec.common.files import require_file

ROW = "#row"  # the column that `read_csv` adds: the row's number, as an editor counts; the header is row 1


def read_bytes(path: str | Path, flag: str) -> bytes:
    """The bytes of one file, unpacked if it is gzip, without a byte-order mark. Refuses a folder and UTF-16."""
    path = require_file(path, flag)
    if path.is_dir():
        raise UserError(f"{path}: found a folder, expected a file; check --{flag}")
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            raise UserError(f"{path}: found a broken gzip file; download it again or check --{flag}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data.partition(b"\n")[0]:
        raise UserError(f"{path}: found UTF-16 or binary data, expected UTF-8 text; save the file as UTF-8")
    return data.removeprefix(b"\xef\xbb\xbf")


def read_text(path: str | Path, flag: str) -> str:
    """The text of one UTF-8 file, line ends unchanged. Raises `UserError` naming the line that is not UTF-8."""
    return _decoded(read_bytes(path, flag), path)


def _decoded(data: bytes, path: str | Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: found the byte 0x{data[error.start]:02x}, which is not UTF-8 there; "
            "save the file as UTF-8"
        ) from None


def read_csv(path: str | Path, flag: str, *, separator: str = ",", quote_char: str | None = '"') -> pl.DataFrame:
    """The table in one CSV file: every cell a string, an empty one null, and `ROW`, the number of each row.

    Blank lines are skipped. Raises `UserError` naming the row for a quote that is not closed and for a row with more or
    fewer cells than the header, and for a file without a header, with a column twice, or in another encoding than UTF-8.
    """
    data = read_bytes(path, flag)
    if not data.strip():
        raise UserError(f"{path}: the file is empty, expected a header and rows; check --{flag}")
    try:
        table = pl.read_csv(io.BytesIO(data), separator=separator, quote_char=quote_char, infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        found = _fault(_decoded(data, path), separator, quote_char) or str(error).splitlines()[0]
        raise UserError(f"{path}, {found}; repair it or check --{flag}") from None
    if twice := [name for name in table.columns if f"{name}_duplicated_0" in table.columns]:
        raise UserError(f"{path}: column {twice[0]!r} is there twice; remove one")
    if ROW in table.columns:
        raise UserError(f"{path}: column {ROW!r} is a name that this program uses itself; rename it")
    if len(table) and table.to_series(-1).null_count():  # an empty last cell, or a row that ends too early
        if found := _fault(_decoded(data, path), separator, quote_char):
            raise UserError(f"{path}, {found}; repair it or check --{flag}")
    return table.with_row_index(ROW, offset=2).filter(~pl.all_horizontal(pl.exclude(ROW).is_null()))


def refuse_rows(table: pl.DataFrame, bad: pl.Series | pl.Expr, column: str, path: str | Path, expected: str) -> None:
    """Raise `UserError` for the first row of a table of `read_csv` where `bad` holds, with its cell in `column`."""
    for row, cell in table.filter(bad).select(ROW, column).head(1).iter_rows():
        raise UserError(f"{path}, row {row}, column {column}: found {(cell or '')[:60]!r}, expected {expected}")


def _fault(text: str, separator: str, quote_char: str | None) -> str | None:
    """The first row that breaks the rules of CSV, in words."""
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
                return f"row {row}: found {len(cells)} cells, expected {width} as in the header"
    except csv.Error as error:
        return f"row {row + 1}: found a cell whose quotes are not closed or not doubled ({error})"
    finally:
        csv.field_size_limit(limit)
    return "a quote inside a cell is not doubled" if quote_char and text.count(quote_char) % 2 else None
