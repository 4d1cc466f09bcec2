"""Stage 0, sequence files: one line a user, `user item item item …`, oldest item first.

    python -m preprocess.sequences --file Beauty.txt --texts Beauty.item.json --output_dir output/beauty/raw

Ids are separated by blanks or tabs. There are no times, so the only split is leave-one-out. The texts are optional: a
`.json` object `{"item": {"title": …, "description": …, "brand": …, "categories": …}}` or `{"item": "title"}`, or lines
`item <tab> title`. Without them an item's title is its id.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from minionerec.common.errors import UserError
from minionerec.common.files import read_json, require_file
from minionerec.common.options import RUNTIME, option, run
from preprocess.options import PreprocessOptions, name_of, refuse_unused
from preprocess.stage import preprocess


@dataclass
class Options(PreprocessOptions):
    file: str = option("", "the sequence file", role=RUNTIME)  # the record holds digests of both files
    texts: str = option("", "item texts, .json or lines `item <tab> title`; default: titles are ids", role=RUNTIME)


def read_sequences(path: str | Path, faults):
    """Columns user, item, time (0) of a sequence file. A user without items is a fault, a user twice an error."""
    import polars as pl

    from preprocess.files import lines

    numbers, texts = [], []
    for number, line in lines(path, "file"):
        numbers.append(number)
        texts.append(line)
    words = pl.DataFrame({"line": numbers, "words": texts}).with_columns(
        words=pl.col("words").str.replace_all(r"[ \t]+", " ").str.strip_chars().str.split(" ")
    )
    words = words.with_columns(user=pl.col("words").list.first(), items=pl.col("words").list.slice(1))
    faults.records += int(words["words"].list.len().sum()) - len(words)
    alone = words.filter(pl.col("items").list.len() == 0)
    if len(alone):
        where = f"{path}, line {alone['line'][0]}: found {alone['user'][0][:60]!r}, expected a user and items"
        faults.records += len(alone)
        faults.add("a user without items", len(alone), where)
    twice = words.filter(~pl.col("user").is_first_distinct())
    if len(twice):
        raise UserError(
            f"{path}, line {twice['line'][0]}: user {twice['user'][0][:60]!r} is there twice, expected one line a user"
        )
    return (
        words.select("user", "items")
        .explode("items", empty_as_null=False)
        .select("user", item="items", time=pl.lit(0, pl.Int64))
    )


def read_texts(path: str | Path):
    """Columns item and texts, from a JSON object or from lines `item <tab> title`."""
    import polars as pl

    from preprocess.dataset import TEXTS, clean
    from preprocess.files import lines

    path = require_file(path, "texts")
    rows: dict[str, dict[str, str]] = {}
    if path.suffix == ".json":
        for item, entry in read_json(path, "texts").items():
            entry = {"title": entry} if isinstance(entry, str) else entry
            if not isinstance(entry, dict):
                raise UserError(
                    f"{path}: item {item} has {str(entry)[:60]!r}, expected an object with a title, or a text"
                )
            rows[item] = {name: clean(_text(entry.get(name))) for name in TEXTS}
    else:
        for number, line in lines(path, "texts"):
            item, tab, title = line.partition("\t")
            if not tab or item in rows:
                expected = "each item once" if tab else "'item<tab>title'"
                raise UserError(f"{path}, line {number}: found {line[:60]!r}, expected {expected}")
            rows[item] = dict.fromkeys(TEXTS, "") | {"title": clean(title)}
    columns = {name: [row[name] for row in rows.values()] for name in TEXTS}
    return pl.DataFrame({"item": list(rows)} | columns, schema=dict.fromkeys(("item", *TEXTS), pl.String))


def _text(value) -> str:
    """A text of an item's entry; a list as one text, nothing as an empty one."""
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def main(options: Options) -> None:
    options.require("output_dir", "file")
    files = {"file": require_file(options.file, "file")}
    if options.texts:
        files["texts"] = require_file(options.texts, "texts")
    else:
        refuse_unused(options, "--texts")

    def read():
        from preprocess.dataset import Faults, Source

        faults = Faults()
        log = read_sequences(options.file, faults)
        texts = read_texts(options.texts) if options.texts else None
        return Source(log, texts, "", faults, {"format": "sequences"})

    preprocess(options, name_of(options, options.file), files, read)


if __name__ == "__main__":
    run(main, Options)
