"""Text that is shown: no character that acts on a terminal remains, and JSON reads back as it was."""

import json

from minionerec.common.text import json_line, printable

HOSTILE = 'plain "é" \U0001f600 \x1b[31m \x9b2J \x07 \u202e \u2028 \ud800 \U000e0001 \\ end'


def test_printable_escapes_what_a_terminal_acts_on():
    shown = printable(HOSTILE)
    assert not set(shown) & set("\x1b\x9b\x07\u202e\u2028\ud800\U000e0001") and r"\x1b[31m" in shown
    assert 'plain "é" \U0001f600' in shown and printable("Amélie") == "Amélie"


def test_json_reads_back():
    line = json_line(json.dumps({"title": HOSTILE}, ensure_ascii=False))
    assert json.loads(line) == {"title": HOSTILE} and not set(line) & set("\x1b\x9b\x07\u202e\u2028\ud800\U000e0001")
    line.encode("utf-8")
