"""The report as one HTML file: sections and blocks through page.html, with style and script inside.

Jinja escapes every text that comes from data; characters that are invisible or change the direction of text are shown as
escapes. The page's own policy (CSP) forbids every request, and every script but ours.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from minionerec.common.text import printable
from minionerec.report.blocks import Section

HERE = Path(__file__).parent


def environment() -> Environment:
    """Jinja's environment of the templates in this folder, which escapes all texts."""
    return Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )  # fmt: skip


def read(name: str) -> Markup:
    """One of our own files, to be put into a page as it is."""
    return Markup((HERE / name).read_text(encoding="utf-8"))


def policy(script: str) -> str:
    """The content security policy of a page whose only script is `script`."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page."""
    script = read("page.js")
    return (
        environment()
        .get_template("page.html")
        .render(
            title=title,
            subtitle=subtitle,
            sections=sections,
            style=read("page.css"),
            script=script,
            policy=policy(script),
        )
    )
