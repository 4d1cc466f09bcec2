"""Items from item files and info files.

Invariants: each item is there once, and its line or id is named where it is not; titles that prompts show contain no
level token of the catalog and at most 300 characters.
"""

import json

import pytest

from minionerec.catalog.items import MAX_TITLE, Items, prompt_titles, read_info, read_titles
from minionerec.common.errors import UserError

INFO = {
    "too few cells": ("<a_0>\tOne\n", "line 1"),
    "a gap": ("<a_0>\tOne\t0\n<a_1>\tTwo\t2\n", "found 2 item ids, expected each of 0..n-1 once"),
    "no SID": ("x\tOne\t0\n", "line 1"),
    "an item twice": ("<a_0>\tOne\t0\n<a_1>\tTwo\t1\n<a_2>\tThree\t1\n", "line 3: item 1 is also in line 2"),
    "an id that is no number": ("<a_0>\tOne\t0\n<a_1>\tTwo\t-1\n", "line 2"),
    "digits of another script": ("<a_0>\tOne\t٠\n", "line 1"),
    "a huge id": (f"<a_0>\tOne\t{'9' * 5000}\n", "line 1"),
    "empty": ("", "line 1: found ''"),
    "a blank line": ("<a_0>\tOne\t0\n\n<a_1>\tTwo\t1\n", "line 2"),
    "two forms": ("<i_a_0>\tOne\t0\n<j_a_1>\tTwo\t1\n", "line 2: item 1 has"),
}


@pytest.mark.parametrize("case", INFO)
def test_bad_info(tmp_path, case):
    content, found = INFO[case]
    path = tmp_path / "info.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as refused:
        read_info(path)
    assert str(path) in str(refused.value) and found in str(refused.value) and len(str(refused.value)) < 500


def test_info_titles_may_hold_anything_but_the_first_and_last_tab(tmp_path):
    path = tmp_path / "info.txt"
    path.write_bytes("\ufeff<a_0>\tA\ttab, \r and \u2028 a separator\t0\r\n".encode())
    assert read_info(path) == Items(["<a_0>"], ["A\ttab, \r and \u2028 a separator"])


def test_info_in_another_token_form_and_order(tmp_path):
    path = tmp_path / "info.txt"
    path.write_text("<item_a_7><item_b_1>\tTwo\t1\n<item_a_0><item_b_1>\tOne\t0\n")
    assert read_info(path) == Items(["<a_0><b_1>", "<a_7><b_1>"], ["One", "Two"])


@pytest.mark.parametrize("data", [b"\xff\xfea\0", b"<a_0>\t\xe9\t0\n"])
def test_info_in_another_encoding(tmp_path, data):
    (tmp_path / "info.txt").write_bytes(data)
    with pytest.raises(UserError, match="UTF-8"):
        read_info(tmp_path / "info.txt")


@pytest.mark.parametrize(
    "content, found",
    [
        ({}, "no item"),
        ({"0": {"title": "x"}, "2": {"title": "y"}}, "item 1 is missing"),
        ({"0": {"title": None}}, "item 0 has"),
        ({"0": {"title": float("nan")}}, "item 0 has"),
        ({"0": {}}, "item 0 has"),
        ({"0": ["title"]}, "item 0 has"),
    ],
)
def test_bad_item_files(tmp_path, content, found):
    (tmp_path / "x.item.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=found):
        read_titles(tmp_path / "x.item.json")


def test_white_space_of_titles_is_collapsed(tmp_path):
    (tmp_path / "x.item.json").write_text(json.dumps({"0": {"title": " a\tb\n\u2028c "}}), encoding="utf-8-sig")
    assert read_titles(tmp_path / "x.item.json") == ["a b c"]


# ------------------------------------------------------------------------------------------------ titles in prompts


def test_titles_lose_level_tokens_of_the_catalog():
    titles = ["plain", "my ID is <a_0> <b_1>!", "<a_<a_1>5> nested", "H<sub_2>O", "<b_07>", "a  <b"]
    shown, [note] = prompt_titles(Items([f"<a_{i}><b_1>" for i in range(6)], titles))
    assert shown == ["plain", "my ID is !", "<a_ 5> nested", "H<sub_2>O", "", "a  <b"]
    assert note == "level tokens such as <a_1> are left out of the title of item 1 and of 2 other items"


def test_a_long_title_is_cut_and_named():
    shown, [note] = prompt_titles(Items(["<a_0>", "<a_1>"], ["x" * MAX_TITLE, "y" * 100_000]))
    assert shown == ["x" * MAX_TITLE, "y" * MAX_TITLE]
    assert note == "only the first 300 characters are used of the title of item 1"


def test_other_titles_are_unchanged():
    titles = ["One", "two  blanks", "", "<b>bold</b>"]
    assert prompt_titles(Items(["<a_0>", "<a_1>", "<a_2>", "<a_3>"], titles)) == (titles, [])
