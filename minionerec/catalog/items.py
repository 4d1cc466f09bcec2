"""TODO."""

from pathlib import Path
from typing import NamedTuple

from minionerec.catalog.sids import canonical_sid
from minionerec.common.errors import UserError
from minionerec.common.files import read_json, require_file


def read_titles(path: str | Path, flag: str = "item_meta_path") -> list[str]:
    """Titles, row i is item i, from an `item.json`; white space is collapsed. Raises `UserError` on a gap."""
    content = read_json(path, flag)
    titles = []
    for item in range(len(content)):
        meta = content.get(str(item))
        if meta is None:
            raise UserError(f"{path}: item {item} is missing, expected ids 0..{len(content) - 1} without gaps")
        if not isinstance(meta, dict) or not isinstance(meta.get("title"), str):
            raise UserError(f'{path}: item {item} has {str(meta)[:60]!r}, expected an object with a string "title"')
        titles.append(" ".join(meta["title"].split()))
    return titles


class Items(NamedTuple):
    """What a prompt can say of an item; row i is item i."""

    sids: list[str]
    titles: list[str]


def read_info(path: str | Path, flag: str = "info_file") -> Items:
    """Items of an info file, `sid \\t title \\t item_id` a line. Raises `UserError` naming the line."""
    path = require_file(path, flag)
    sids: dict[int, str] = {}
    titles: dict[int, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        sid, _, rest = line.partition("\t")
        title, _, item = rest.rpartition("\t")
        if canonical_sid(sid) != sid or not sid or not item.strip().isdecimal():
            raise UserError(f"{path}, line {number}: found {line[:80]!r}, expected 'SID<tab>title<tab>item id'")
        sids[int(item)], titles[int(item)] = sid, title
    if not sids or sorted(sids) != list(range(len(sids))):
        raise UserError(
            f"{path}: found {len(sids)} item ids, expected each of 0..n-1 once; run convert_dataset.sh again"
        )
    return Items([sids[i] for i in range(len(sids))], [titles[i] for i in range(len(sids))])
