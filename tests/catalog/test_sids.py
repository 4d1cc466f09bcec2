"""SIDs as text.

Invariants: a SID is level tokens and nothing else, at any depth; an index in another token form gives the same SIDs as
one in ours, or names the item; no index makes the tokenizer gain more than 65 536 codes of a level.
"""

import json

import polars as pl
import pytest

from minionerec.catalog.sids import (
    canonical_sid,
    canonical_sids,
    codebook_tokens,
    is_sid,
    level_codes,
    level_token,
    read_index,
    split_sid,
)
from minionerec.common.errors import UserError


def test_level_tokens_and_text_forms():
    assert [level_token(level, 3) for level in (0, 1, 25, 26)] == ["<a_3>", "<b_3>", "<z_3>", "<aa_3>"]
    assert split_sid("<a_1><b_22>") == ["<a_1>", "<b_22>"]
    assert canonical_sid(" <a_1> <b_22>\n<|endoftext|>") == "<a_1><b_22>"
    assert is_sid("<a_1><d_0>")
    for text in ("<a_1> <b_2>", "", "<a_1>x", "<a_٣>", "<a_01>", "<a_>", "<A_1>", "<a_1234567890>"):
        assert not is_sid(text)
        with pytest.raises(ValueError):
            split_sid(text)


def test_codes_of_sids():
    tokens, codes = level_codes(["<a_0><b_1>", "<a_2>", "<a_0><b_0>"])
    assert [[tokens[place] for place in row if place >= 0] for row in codes] == [
        ["<a_0>", "<b_1>"],
        ["<a_2>"],
        ["<a_0>", "<b_0>"],
    ]


# ------------------------------------------------------------------------------------------------ the codebook


def test_tokenizer_gains_the_whole_codebook_of_any_depth():
    tokens = codebook_tokens(["<a_0><b_5><c_2>", "<a_1><b_0><c_0><d_1>"])
    assert tokens == [f"<{letter}_{code}>" for letter in "abcd" for code in range(8)]
    assert codebook_tokens(["<a_0><b_5>", "<a_1><b_10>"], used_only=True) == ["<a_0>", "<a_1>", "<b_5>", "<b_10>"]


def test_a_huge_code_is_refused_with_its_item():
    """20 000 000 at three levels would be 67 million tokens."""
    assert len(codebook_tokens(["<a_65535>"])) == 65_536
    with pytest.raises(UserError, match="item 1 has <b_20000000>, expected codes below 65,536.*--sid_tokens used"):
        codebook_tokens(["<a_1><b_2>", "<a_1><b_20000000>"])
    assert codebook_tokens(["<a_1>", "<a_20000000>"], used_only=True) == ["<a_1>", "<a_20000000>"]


# ------------------------------------------------------------------------------------------------ index files


def index_file(tmp_path, content):
    path = tmp_path / "x.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize(
    "content, found",
    [
        ("{}", "no item"),
        ("[1]", "found a JSON list"),
        ('{"0": ["<a_1>"], "2": ["<a_2>"]}', "item 1 is missing"),
        ('{"0": "<a_1>"}', "item 0 has '<a_1>'"),
        ('{"0": ["a"]}', "item 0 has .*'a' has no code"),
        ('{"0": []}', "item 0 has"),
        ('{"0": [true]}', "item 0 has"),
        ('{"0": [1.5]}', "item 0 has"),
        ('{"0": [-1]}', "item 0 has"),
        ('{"0": [null]}', "item 0 has"),
        ('{"0": ["<a_12345678901234567890>"]}', "item 0 has .*no code of 1 to 9 digits"),
        (f'{{"0": [{"9" * 4000}]}}', "item 0 has .*no code of 1 to 9 digits"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_index_files(tmp_path, content, found):
    with pytest.raises(UserError, match=found) as refused:
        read_index(index_file(tmp_path, content))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


CODES = [[5028, 0, 17], [3, 0], [5028, 1, 16]]
FORMS = {
    "ours": lambda level, code: f"<{'abc'[level]}_{code}>",
    "item": lambda level, code: f"<item_{'abc'[level]}_{code}>",
    "pipes": lambda level, code: f"<|{'abc'[level]}_{code}|>",
    "numbered levels": lambda level, code: f"<L{level}_{code}>",
    "zeros in front": lambda level, code: f"<{'abc'[level]}_{code:05d}>",
    "capital letters": lambda level, code: f"<{'ABC'[level]}_{code}>",
    "other letters": lambda level, code: f"<{'xyz'[level]}{code}>",
    "square brackets": lambda level, code: f"[{'abc'[level]}_{code}]",
    "no brackets": lambda level, code: f"{'abc'[level]}_{code}",
    "codes": lambda level, code: code,
    "codes as text": lambda level, code: str(code),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_token_form_that_tells_level_and_code(tmp_path, form):
    index = {str(i): [FORMS[form](level, code) for level, code in enumerate(item)] for i, item in enumerate(CODES)}
    assert read_index(index_file(tmp_path, index)) == ["<a_5028><b_0><c_17>", "<a_3><b_0>", "<a_5028><b_1><c_16>"]


@pytest.mark.parametrize(
    "items, found",
    [
        ([["<c5>", "<c6>"]], "item 0 .*'<c6>' is at level 2, its form is that of another level"),
        ([["<x_a_1>"], ["<y_a_1>"]], "item 1 .*'<y_a_1>' is at level 1, where other tokens are <x_a_….*"),
        ([["<x_a_1>", "<x_b_1>"], ["<x_b_1>", "<x_a_1>"]], "item 1 .*at level 1"),
        ([["<a_5>"], ["<a_05>"]], "item 1 .*the same level and code"),
        ([["<|begin|>", "<a_5>"]], "item 0 .*has no code"),
    ],
)
def test_a_form_that_does_not_tell_them_names_the_item(tmp_path, items, found):
    with pytest.raises(UserError, match=found):
        read_index(index_file(tmp_path, {str(i): tokens for i, tokens in enumerate(items)}))


def test_our_form_is_taken_as_it_is():
    """Any letters at any level, and several tokens in one entry."""
    assert canonical_sids([["<b_1>", "<b_2>"], ["<a_1><c_2>"]], str) == ["<b_1><b_2>", "<a_1><c_2>"]


def test_columns_are_renamed_as_the_index_is():
    from minionerec.catalog.sids import Renaming

    renaming = Renaming()
    assert renaming.sid(["<item_a_7>", "<item_b_07>"]) == "<a_7><b_7>"
    column = renaming.column(pl.Series(["['<item_a_1><item_b_00>', '<item_a_12>']", None]))
    assert column.to_list() == ["['<a_1><b_0>', '<a_12>']", None]
