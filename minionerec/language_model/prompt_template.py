"""Template files of prompts (config/prompt.yaml), read and checked before any prompt is made."""

import string
from collections.abc import Mapping
from pathlib import Path

import yaml

from minionerec.common.errors import UserError
from minionerec.common.tables import read_text

TEXTS = ("instruction_marker", "input_marker", "response_marker", "response_suffix", "sid_separator", "title_separator")
KEYS = (*TEXTS, "tasks", "categories")
FIELDS = {"history", "item", "preference"}  # what tasks fill into their inputs, in addition to {category}


def read_template(path: str | Path, field_of: Mapping[str, str]) -> dict:
    """The content of a template file. field_of: the field that the input of each known task must contain.

    Raises `UserError` naming the key that is missing, unknown, no text, or a wording with another field.
    """
    try:
        template = yaml.safe_load(read_text(path, "prompt_template"))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a prompt template: {reason}; compare it with config/prompt.yaml") from None

    def expect(holds: bool, key: str, found, expected: str) -> None:
        if not holds:
            raise UserError(
                f"{path}: not a prompt template: {key} is {str(found)[:60]!r}, expected {expected}; "
                "compare it with config/prompt.yaml"
            )

    expect(isinstance(template, dict), "the file", template, "keys and values")
    for key in KEYS:
        kind, expected = (str, "a text") if key in TEXTS else (dict, "keys and values")
        expect(isinstance(template.get(key), kind), key, template.get(key, "missing"), expected)
    for key, value in template.items():
        expect(key in KEYS, str(key), value, "no such key")
    for name, text in template["categories"].items():
        expect(isinstance(name, str) and isinstance(text, str), f"categories: {name}", text, "a text for a name")
    for task, wording in template["tasks"].items():
        keys = set(wording) if isinstance(wording, dict) else set()
        complete = keys - {"response_marker"} == {"instruction", "input"}
        expect(complete, f"tasks: {task}", wording, "the keys instruction and input, and perhaps response_marker")
        marker = wording.get("response_marker", "")
        expect(isinstance(marker, str), f"tasks: {task}: response_marker", marker, "a text")
        fields = fields_of(wording["instruction"])
        only_category = fields is not None and fields <= {"category"}
        expect(
            only_category, f"tasks: {task}: instruction", wording["instruction"], "a text with no field but {category}"
        )
        fields = fields_of(wording["input"])
        needed = {field_of[task]} if task in field_of else set()
        right = fields is not None and needed <= fields <= (needed or FIELDS) | {"category"}
        names = ", ".join(f"{{{name}}}" for name in sorted(needed or FIELDS))
        expect(
            right,
            f"tasks: {task}: input",
            wording["input"],
            f"a text with {names}, and no other field but {{category}}",
        )
    return template


def fields_of(text) -> set[str] | None:
    """`"{history} of {category}"` -> {"history", "category"}; None for what is no text with plain fields."""
    try:
        parts = list(string.Formatter().parse(text))
    except (TypeError, ValueError):
        return None
    fields = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    if any(spec or conversion for _, spec, conversion in fields):
        return None
    return {name for name, _, _ in fields}
