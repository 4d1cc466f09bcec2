"""Stage 0, Amazon Reviews 2014, 2018 and 2023: reviews and metadata, JSON lines or the 5-core CSVs, plain or gzip.

    python -m preprocess.amazon --reviews Industrial_and_Scientific.json.gz \\
        --meta meta_Industrial_and_Scientific.json.gz --from 2016-10 --to 2018-11 --split chronological \\
        --output_dir output/industrial/raw

The release is told by the fields of the first records:

    2014   reviewerID asin overall unixReviewTime; metadata lines are Python literals (parsed by ast.literal_eval)
    2018   the same and verified, vote, style; metadata has category, description and feature as lists
    2023   user_id parent_asin rating timestamp (milliseconds); CSVs user_id,parent_asin,rating,timestamp[,history]

Several review files (the parts of a split) are read as one log. Items are 5-core filtered, and those whose title is
missing or is markup are left out with their reviews, as in the published Industrial and Office sets.
"""

import ast
import io
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from minionerec.common.console import say
from minionerec.common.errors import UserError
from minionerec.common.files import require_file
from minionerec.common.options import RUNTIME, option, run
from preprocess.options import PreprocessOptions, name_of
from preprocess.stage import preprocess

BLOCK = 1 << 26  # bytes of JSON lines that are parsed at once
EARLIEST = 788_918_400  # seconds: 1995, the year of the first reviews
LOOK = 1000  # records whose fields tell the release
MARKUP = re.compile(r"<span\s|getTime\(|aPageStart|function\s*\(|\{\s*\w+\s*:")  # scraped in place of a title


class Fields(NamedTuple):
    """The fields of a review."""

    user: str
    item: str
    time: str
    rating: str
    unit: str  # of time


OLD = Fields("reviewerID", "asin", "unixReviewTime", "overall", "s")
FIELDS = {"2014": OLD, "2018": OLD, "2023": Fields("user_id", "parent_asin", "timestamp", "rating", "ms")}
ONLY_2018 = {"verified", "vote", "style"}, {"category", "feature", "main_cat", "also_buy"}  # in reviews, in metadata


@dataclass
class Options(PreprocessOptions):
    reviews: list[str] = option([], "review files, JSON lines or the 2023 CSVs", role=RUNTIME)  # digests are recorded
    meta: list[str] = option([], "metadata files; default: titles are ids", role=RUNTIME)
    release: Literal["auto", "2014", "2018", "2023"] = option("auto", "of both; auto: told by their fields")
    k_core: int = option(5, "keep users and items with at least this many interactions, to a fixed point; 0: all")
    untitled: Literal["refuse", "drop", "keep"] = option(
        "drop", "items without a title: an error, left out with their interactions, or titled by their id"
    )
    max_bad: float = option(0.01, "share of unusable records that are counted and left out; more is an error")


# ------------------------------------------------------------------------------------------------ the release


def records(path: Path, flag: str, literal: bool = True) -> Iterator[tuple[int, dict | None, str]]:
    """(line number, record, line) of every line; the record is None where the line holds none."""
    from preprocess.files import lines

    for number, line in lines(path, flag, errors="replace"):
        yield number, parse(line, literal), line


def parse(line: str, literal: bool) -> dict | None:
    """The JSON object in a line, or the Python literal if those are allowed; None for anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        if not literal:
            return None
        try:
            with warnings.catch_warnings(action="ignore"):
                record = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return None
    return record if isinstance(record, dict) else None


def release_of(path: Path, flag: str, kind: int) -> str:
    """The release of a review file (kind 0) or of a metadata file (kind 1). Raises `UserError` where it is none."""
    found: set[str] = set()
    for count, (number, record, line) in enumerate(records(path, flag)):
        if number == 1 and line.startswith("user_id,parent_asin,"):
            return "2023"
        found |= (record or {}).keys()
        if count == LOOK:
            break
    needed = {release: (fields.item, fields.user)[: 2 - kind] for release, fields in FIELDS.items()}
    if found.issuperset(needed["2023"]):
        return "2023"
    if found.issuperset(needed["2014"]):
        return "2018" if found & ONLY_2018[kind] else "2014"
    what = ("reviews", "metadata")[kind]
    raise UserError(
        f"{path}: found the fields {sorted(found)[:8]}, expected {what} of a release, with "
        f"{' or '.join(' and '.join(names) for names in dict.fromkeys(needed.values()))}; check --{flag}"
    )


def one_release(options: Options) -> str:
    """The release of all files. Raises `UserError` for files of another one than given, or than the first."""
    expected, source = options.release, "--release"
    for flag, kind in (("reviews", 0), ("meta", 1)):
        for path in map(Path, getattr(options, flag)):
            found = release_of(path, flag, kind)
            if expected == "auto":
                expected, source = found, str(path)
                say(f"release {found}, told by the fields of {path}")
            if found != expected:
                raise UserError(f"{path}: found release {found}, expected {expected} as in {source}; check --{flag}")
    return expected


# ------------------------------------------------------------------------------------------------ reviews


def blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number of its first line, whole lines) of a file, about `BLOCK` bytes at a time."""
    from preprocess.files import open_binary

    number, rest = 1, b""
    with open_binary(path) as f:
        while data := f.read(BLOCK):
            whole, newline, rest = (rest + data).rpartition(b"\n")
            if newline:
                yield number, whole + newline
                number += whole.count(b"\n") + 1
    if rest.strip():
        yield number, rest


def read_json_reviews(path: Path, fields: Fields, faults, categories):
    """Columns user, item, time, rating of a file of JSON lines. Lines that are no record are faults."""
    import polars as pl

    from preprocess.files import Columns, usable

    types = {name: pl.Categorical(own) for name, own in zip(("user", "item"), categories, strict=True)}
    parts = []
    for first, data in blocks(path):
        table, numbers = _parse_block(path, first, data, fields, faults)

        def cell(row: int, name: str, table=table, numbers=numbers) -> str:
            return f"{path}, line {numbers(row)}, field {name}: found {str(table[name][row] or '')[:60]!r}"

        log, _ = usable(table.lazy(), Columns(*fields[:4]), faults, cell, fields.unit, EARLIEST)
        parts.append(log.with_columns(pl.col(name).cast(pl.String).cast(kind) for name, kind in types.items()))
    return pl.concat(parts)


def _parse_block(path: Path, first: int, data: bytes, fields: Fields, faults):
    """(table of strings, function from row to line number). Polars parses; Python only blocks with a line it refuses."""
    import polars as pl

    schema = dict.fromkeys(fields[:4], pl.String)
    try:
        table = pl.read_ndjson(io.BytesIO(data), schema=schema, ignore_errors=True)

        def numbers(row: int) -> int:
            return [n for n, line in enumerate(data.split(b"\n"), first) if line.strip()][row]

        return table, numbers
    except pl.exceptions.PolarsError:
        pass
    rows, known = [], []
    for number, line in enumerate(data.split(b"\n"), first):
        if not line.strip():
            continue
        record = parse(line.decode("utf-8", errors="replace"), literal=False)
        if record is None:
            faults.records += 1
            where = f"{path}, line {number}: found {line[:60].decode('utf-8', 'replace')!r}, expected a JSON object"
            faults.add("a broken line", 1, where)
            continue
        rows.append([None if (value := record.get(name)) is None else str(value) for name in schema])
        known.append(number)
    return pl.DataFrame(rows, schema=schema, orient="row"), lambda row: known[row]


def read_reviews(paths: list[Path], release: str, faults):
    """The log of all review files, one after another."""
    import polars as pl

    from preprocess.files import Columns, read_log

    fields, parts = FIELDS[release], []
    categories = pl.Categories.random(), pl.Categories.random()
    for path in paths:
        if _is_csv(path):
            form = {"unit": fields.unit, "earliest": EARLIEST}
            log, _ = read_log(path, "reviews", Columns(*fields[:4]), faults, **form)
            names = zip(("user", "item"), categories, strict=True)
            parts.append(log.with_columns(pl.col(n).cast(pl.String).cast(pl.Categorical(own)) for n, own in names))
        else:
            parts.append(read_json_reviews(path, fields, faults, categories))
    return pl.concat(parts)


def _is_csv(path: Path) -> bool:
    from preprocess.files import open_binary

    with open_binary(path) as f:
        return not f.read(64).lstrip(b"\xef\xbb\xbf \r\n").startswith((b"{", b"["))


# ------------------------------------------------------------------------------------------------ metadata


def read_meta(paths: list[Path], release: str, wanted: set[str], faults):
    """Columns item and texts of the items `wanted`. A line is parsed only if its id is among them, or cannot be seen."""
    import polars as pl

    from preprocess.dataset import TEXTS
    from preprocess.files import lines

    name = FIELDS[release].item
    id_of = re.compile(rf"""['"]{name}['"]\s*:\s*['"]([^'"\\]+)['"]""")
    rows: dict[str, list[str]] = {}
    for path in paths:
        for number, line in lines(path, "meta", errors="replace"):
            faults.records += 1
            seen = id_of.search(line)
            if seen and seen[1] not in wanted:
                continue
            record = parse(line, literal=release == "2014")
            item = record.get(name) if record else None
            where = f"{path}, line {number}: found {line[:60]!r}"
            if not isinstance(item, str):
                faults.add("broken metadata", 1, f"{where}, expected an item with {name}")
            elif item in rows:
                faults.add("metadata of an item that came before", 1, f"{where}, expected each item once")
            elif item in wanted:
                texts = texts_of(record)
                rows[item] = [texts[text] for text in TEXTS]
    columns = dict(zip(TEXTS, zip(*rows.values(), strict=True), strict=True)) if rows else {}
    schema = dict.fromkeys(("item", *TEXTS), pl.String)
    return pl.DataFrame({"item": list(rows)} | {text: list(columns.get(text, [])) for text in TEXTS}, schema=schema)


def texts_of(record: dict) -> dict[str, str]:
    """Title, description, brand and categories of a metadata record of any release, cleaned."""
    from preprocess.dataset import clean

    title = _words(record.get("title"))
    categories = record.get("categories") or record.get("category") or record.get("main_category")
    description = _words(record.get("description")) or _words(record.get("features") or record.get("feature"))
    return {
        "title": "" if MARKUP.search(title) else clean(title),
        "description": clean(description),
        "brand": clean(_words(record.get("brand") or record.get("store"))),
        "categories": clean(", ".join(dict.fromkeys(_flat(categories)))),
    }


def _flat(value) -> Iterator[str]:
    """The texts in a text or in lists of lists of texts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _flat(part)


def _words(value) -> str:
    return " ".join(_flat(value))


# ------------------------------------------------------------------------------------------------ the stage


def read(options: Options):
    """The `Source` of the files."""
    from preprocess.dataset import Faults, Source

    release, faults = one_release(options), Faults()
    log = read_reviews([Path(path) for path in options.reviews], release, faults)
    what = {"format": f"Amazon Reviews {release}", "records": faults.records}
    texts = None
    if options.meta:
        faults.check(options.max_bad)
        wanted = {*log["item"].unique().cast(str).to_list()}
        about = Faults()
        texts = read_meta([Path(path) for path in options.meta], release, wanted, about)
        what |= {"metadata_records": about.records, "items_with_metadata": len(texts)}
        faults.kinds |= about.kinds
        faults.records += about.records
    return Source(log, texts, FIELDS[release].unit, faults, what)


def main(options: Options) -> None:
    options.require("output_dir", "reviews")
    files = {}
    for flag in ("reviews", "meta"):
        for number, path in enumerate(getattr(options, flag)):
            files[f"{flag}_{number}"] = require_file(path, flag)
    preprocess(options, name_of(options, options.reviews[0]), files, lambda: read(options))


if __name__ == "__main__":
    run(main, Options)
