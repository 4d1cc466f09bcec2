"""What a prompt can say of an item: its SID and its title, from item files, index files and info files."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from minionerec.catalog.sids import SID_TOKEN, canonical_sids, is_sid
from minionerec.common.errors import UserError
from minionerec.common.files import read_json
from minionerec.common.tables import read_text

MAX_TITLE = 300  # characters of a title in prompts and answers; published catalogs stay below 250
BRACKETED = re.compile(r"<[^<>]*>")  # a level token in any form with angle brackets


class Items(NamedTuple):
    """What a prompt can say of an item; row i is item i."""

    sids: list[str]
    titles: list[str]


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
    if not titles:
        raise UserError(f"{path}: no item in it; write it again or check --{flag}")
    return titles


def read_info(path: str | Path, flag: str = "info_file") -> Items:
    """Items of an info file, `sid \\t title \\t item_id` a line. Raises `UserError` naming the line."""
    tokens: dict[int, list[str]] = {}
    titles: dict[int, str] = {}
    lines: dict[int, int] = {}
    for number, line in enumerate(read_text(path, flag).rstrip("\r\n").split("\n"), start=1):
        sid, _, rest = line.partition("\t")
        title, _, text = rest.rpartition("\t")
        text = text.strip()
        parts = [sid] if is_sid(sid) else BRACKETED.findall(sid)
        if not sid or "".join(parts) != sid or not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise UserError(f"{path}, line {number}: found {line[:80]!r}, expected 'SID<tab>title<tab>item id'")
        item = int(text)
        if item in lines:
            raise UserError(
                f"{path}, line {number}: item {item} is also in line {lines[item]}, expected each item once"
            )
        tokens[item], titles[item], lines[item] = parts, title, number
    if sorted(lines) != list(range(len(lines))):
        raise UserError(
            f"{path}: found {len(lines)} item ids, expected each of 0..n-1 once; run convert_dataset.sh again"
        )
    order = range(len(lines))
    sids = canonical_sids([tokens[item] for item in order], lambda item: f"{path}, line {lines[item]}: item {item}")
    return Items(sids, [titles[item] for item in order])


def prompt_titles(items: Items) -> tuple[list[str], list[str]]:
    """Titles as prompts and answers show them, and notes on what was changed.

    Level tokens of this catalog are left out, so that no title can give away a SID; longer titles are cut to
    `MAX_TITLE` characters.
    """
    titles, with_tokens, cut = list(items.titles), [], []
    if any("<" in title and SID_TOKEN.search(title) for title in titles):
        letters = {match.group(1) for sid in items.sids for match in SID_TOKEN.finditer(sid)}
        token = re.compile(f"<(?:{'|'.join(letters)})_[0-9]+>")
        with_tokens = [item for item, title in enumerate(titles) if token.search(title)]
        for item in with_tokens:
            titles[item] = " ".join(token.sub(" ", titles[item]).split())
    for item, title in enumerate(titles):
        if len(title) > MAX_TITLE:
            titles[item] = title[:MAX_TITLE]
            cut.append(item)
    notes = []
    if with_tokens:
        notes.append(f"level tokens such as <a_1> are left out of {_number(with_tokens)}")
    if cut:
        notes.append(f"only the first {MAX_TITLE} characters are used of {_number(cut)}")
    return titles, notes


def _number(items: Sequence[int]) -> str:
    return f"the title of item {items[0]}" + (f" and of {len(items) - 1} other items" if len(items) > 1 else "")
