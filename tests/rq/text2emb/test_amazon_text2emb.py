"""Text embedding: what becomes an item's text, and that it is embedded as it is written.

Invariants: nothing of a text is executed; ids must be consecutive; an item without text gets a text of its own.
"""

import pytest

from minionerec.common.errors import UserError
from rq.text2emb.amazon_text2emb import drop_words, item_texts, plain_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        ("", ""),
        ("[]", ""),
        ("  a\n b ", "a b"),
        (["a", "", ["b"]], "a b"),
        ("['it''s', \"b\"]", "its b"),
        ("[not a list]", "[not a list]"),
        ("__import__('os')", "__import__('os')"),
        ("5 &lt; 6 &amp; <b>bold</b>", "5 < 6 & bold"),
    ],
)
def test_plain_text(value, text):
    assert plain_text(value) == text


def test_item_texts(tmp_path):
    path = tmp_path / "D.item.json"
    path.write_text(
        '{"1": {"title": "", "description": "[]"}, "0": {"title": "T", "brand": "B", "description": ["x"]}}'
    )
    assert item_texts(path) == ["T x B", "item 1"]
    path.write_text('{"0": {"title": "T"}, "2": {"title": "U"}}')
    with pytest.raises(UserError, match="item 1 is missing, expected ids 0..1"):
        item_texts(path)


def test_drop_words():
    text = " ".join(map(str, range(1000)))
    (kept,) = drop_words([text], 0.3, seed=0)
    assert 600 < len(kept.split()) < 800 and drop_words([text], 0.3, seed=0) == [kept]
    assert drop_words(["word"], 0.999, seed=0) == ["word"]
