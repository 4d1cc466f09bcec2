"""What a section of the report consists of. page.html shows each kind of block."""

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup


class Text(NamedTuple):
    """A paragraph."""

    text: str
    kind = "text"


class Table(NamedTuple):
    """A table. A cell is text or a number; the first cell of a row is its name."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence]
    kind = "table"


class Figure(NamedTuple):
    """A picture with its text alternative: one sentence, and all values as a table."""

    title: str
    svg: Markup
    alt: str
    table: Table
    kind = "figure"


class Point(NamedTuple):
    """An item on the map: its place in [0, 100]², its first code, its colour's hue in degrees, its title."""

    x: float
    y: float
    code: int
    hue: int
    title: str


class Map(NamedTuple):
    """Items in two dimensions, coloured by first code. codes: (code, items drawn) by size; table: examples by code."""

    title: str
    alt: str
    points: Sequence[Point]
    codes: Sequence[tuple[int, int]]
    table: Table
    kind = "map"


class User(NamedTuple):
    """A test row: name, titles of the history, title of the target; for each model (name, rank in words, titles, hit)."""

    name: str
    history: Sequence[str]
    target: str
    models: Sequence[tuple[str, str, Sequence[tuple[str, bool]]]]


class Users(NamedTuple):
    """Sample users, each in a part that opens."""

    users: Sequence[User]
    kind = "users"


class Section(NamedTuple):
    """A part of the page with its own heading and anchor."""

    name: str  # the anchor
    title: str
    lead: str
    blocks: Sequence


def number(value: float, digits: int = 3) -> str:
    """A number for a table: `digits` decimals; small ones as 1.2e-05, whole ones with commas."""
    if isinstance(value, int):
        return f"{value:,}"
    if value and abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}"
