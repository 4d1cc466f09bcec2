"""Text that is safe to show."""

import unicodedata

# Control and format characters (terminal escapes, direction overrides), surrogates, and separators of lines.
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: str) -> str:
    r"""`text` with every character that a terminal would act on as an escape: `"\x1b[31m"` -> `"\\x1b[31m"`."""
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in HIDDEN else c for c in text)


def json_line(text: str) -> str:
    r"""One line of JSON with the same characters as JSON escapes (`\u001b`), which read back as they were."""
    if text.isprintable():
        return text
    return "".join(_units(c) if unicodedata.category(c) in HIDDEN else c for c in text)


def _units(character: str) -> str:
    """The JSON escapes of a character: one, or the two surrogates of one above U+FFFF."""
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{int.from_bytes(units[i : i + 2]):04x}" for i in range(0, len(units), 2))
