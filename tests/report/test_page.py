"""The report page: every section from what stages leave, no request, no text of the data that a browser would act on.

Figures have a text alternative with their values, are well-formed, and take their colours from the page. What is missing
is said, not an error. Several outputs are compared on the same test rows.
"""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest

import report
from minionerec.common.errors import UserError
from minionerec.common.text import printable
from minionerec.evaluation.metrics import MISSED
from minionerec.report import figures
from minionerec.report.blocks import User, Users
from minionerec.report.outputs import Dataset, Output
from minionerec.report.results import results_section
from minionerec.report.rows import histogram, net, ranks_section, slices_section, users_section
from minionerec.report.sids import gini, project

from .conftest import TITLES, write_output

SECTIONS = ("results", "training", "sids", "slices", "ranks", "users", "data", "provenance")


class Reader(HTMLParser):
    """The tags of a page as (name, attributes), and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def cells(page, caption) -> dict[str, list[str]]:
    """The rows of the table with this caption: first cell -> the other cells."""
    table = re.search(rf"<caption[^>]*>{re.escape(caption)}</caption>(.*?)</table>", page, re.S)[1]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", table, re.S)]
    return {row[0]: row[1:] for row in rows}


# ------------------------------------------------------------------------------------------------ the page


def test_every_section_is_there_and_in_the_navigation(page):
    reader = Reader(page)
    assert tuple(section["id"] for section in reader.of("section")) == SECTIONS
    assert {link["href"] for link in reader.of("a")} == {f"#{name}" for name in SECTIONS} | {"#main"}
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_nothing_leads_out_of_the_page(page):
    reader = Reader(page)
    for _, attributes in reader.tags:
        for name, value in attributes.items():
            if name in ("href", "src", "xlink:href", "srcset", "action", "data"):
                assert value.startswith(("#", "data:,"))
            if name == "style":
                assert not re.search(r"url\((?!#)", value)
    [policy] = [meta["content"] for meta in reader.of("meta") if "http-equiv" in meta]
    script = re.search(r"<script>(.*?)</script>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}'" in policy


def test_texts_of_the_data_stay_texts(page):
    reader = Reader(page)
    assert len(reader.of("script")) == 1 and len(reader.of("style")) == 1 and not reader.of("img")
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
    tips = [circle["data-tip"] for circle in reader.of("circle")]
    assert set(map(printable, TITLES.values())) <= set(tips)
    assert "\u202e" not in page and "49" not in [tip.strip() for tip in tips]
    assert "x<y" in "".join(reader.text) and "--category '<b>'" in "".join(reader.text)


def test_every_figure_says_what_it_shows(page):
    pictures = Reader(page).of("svg")
    assert len(pictures) > 15 and all(svg["role"] == "img" and len(svg["aria-label"]) > 30 for svg in pictures)
    parts = re.findall(r"<figure.*?</figure>", page, re.S)
    assert len(parts) == len(pictures) and all("<details>" in part and "<td" in part for part in parts)
    for part in parts:
        ElementTree.fromstring(re.search(r"<svg.*?</svg>", part, re.S)[0].replace("xlink:href", "href"))
    assert not re.search("#0000[ef][0-9]", page)  # a colour that the page's style does not set
    assert "rl: KL divergence from the reference. " not in page and "KL divergence from the reference" in page


def test_curves_are_those_of_the_logs(page):
    assert page.index("sft: HR@K on valid") < page.index("rl: HR@K on valid")  # in the order of the trainings
    assert cells(page, "sft: HR@K on valid")["3"] == ["0.3000"]
    assert cells(page, "rl: reward by function, mean")["2"] == ["0.2000", "0.5000"]
    assert cells(page, "rl: the target&#39;s prefix in its group")["1"] == ["0.9000", "0.5000"]
    assert cells(page, "sft: NDCG@K on valid")["3"] == ["0.1500"]
    assert cells(page, "rl: groups without signal")["0"] == ["0.5000"]


def test_results_are_those_of_the_metrics(page, output):
    metrics = json.loads((output / "sft.metrics.json").read_text())
    caption = "all items" if metrics["headline"] == "unseen" else "Headline: all items"
    row = cells(page, caption)["sft"]
    low, high = metrics["intervals"]["HR@10"]
    assert row[:2] == ["12", "20"] and f"{metrics['item']['HR@10']:.3f} [{low:.3f}, {high:.3f}]" in row
    results = json.loads((output / "results.json").read_text())
    caption = f"NDCG@10 minus {results['baseline']}&#39;s, paired on the same test rows"
    assert cells(page, caption)["rl"] == [f"{value:.4f}" for value in results["differences"]["rl"]["NDCG@10"]]
    changed = cells(page, "rl minus sft, paired on the same test rows; ~: the interval contains 0")
    for row, number, name in (("HR", 0, "HR@1"), ("NDCG", 1, "NDCG@3")):
        mean, low, high = results["rl_minus_sft"][name]
        assert changed[row][number].removeprefix("~ ") == f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def test_gains_are_counted_by_row(page, output):
    results = json.loads((output / "results.json").read_text())
    arrays = {name: dict(np.load(output / f"{name}ranks.npz")) for name in ("sft.", "sasrec/")}
    own, other = (arrays[name][f"{results['headline']}_item"] for name in ("sft.", "sasrec/"))
    labels = arrays["sft."]["slice_history"]
    found = cells(page, "Hits in the first 10 against sasrec: gained, lost, net")
    for name, rows in [("all", range(12))] + [(label, np.flatnonzero(labels == label)) for label in set(labels)]:
        gained = sum(own[row] < 10 <= other[row] for row in rows)
        lost = sum(other[row] < 10 <= own[row] for row in rows)
        cell = found["all" if name == "all" else f"history {name}"]
        assert cell[:2] == [str(len(rows)), f"{gained} gained, {lost} lost: {gained - lost:+d}"]
    assert len(found) > 3


def test_sample_users_show_the_first_items_and_the_hits(page, output):
    reader = Reader(page)
    assert len([each for each in reader.of("details") if each.get("class") == "user"]) == 5
    results = json.loads((output / "results.json").read_text())
    top = np.load(output / "rl.ranks.npz")[f"{results['headline']}_top"]
    targets = np.load(output / "rl.ranks.npz")["target"]
    chosen = np.random.default_rng(42).permutation(12)[:5]
    hits = sum(int((top[row, :5] == targets[row]).sum()) for row in chosen)
    lists = re.findall(r"<h3>rl <small>.*?</ol>", page, re.S)
    assert len(lists) == 5 and sum("✓ hit" in each for each in lists) == hits


def test_indexes_are_compared(page):
    found = cells(page, "Quality of the index files")
    assert found["figure"] == ["data/toy.index.json", "raw/other.index.json", "difference"]
    assert found["distinct SIDs"] == ["47", "46", "-1"] and found["most items of a SID"] == ["2", "3", "+1"]
    largest = cells(page, "Largest buckets: data/toy.index.json")
    assert largest["&lt;a_0&gt;&lt;b_1&gt;&lt;c_1&gt;"][0] == "2"


def test_what_is_missing_is_said(tmp_path, output):
    metrics = json.loads((output / "sft.metrics.json").read_text())
    del metrics["slices"], metrics["unseen"]["slices"]
    (tmp_path / "sft.metrics.json").write_text(json.dumps(metrics))
    report.main(report.Options(output_dir=[str(tmp_path)]))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert tuple(section["id"] for section in Reader(text).of("section")) == SECTIONS
    for said in ("No training has left a log", "No index file", "No model has stored ranks", "are not there any more"):
        assert said in text


def tables_of(*folders, published="") -> dict[str, list]:
    """{caption: rows} of the tables of the first section."""
    outputs = report.outputs_of({folder: report.results_of(folder, 0) for folder in folders})
    section = results_section(outputs, report.PUBLISHED if published else None, published, seed=0)
    return {block.caption: block.rows for block in section.blocks if block.kind == "table"}


def test_outputs_are_compared_on_the_same_rows(tmp_path, output):
    other = write_output(tmp_path / "second", seed=1)
    for name in ("metrics.json", "ranks.npz"):
        (other / f"rl.{name}").write_bytes((output / f"rl.{name}").read_bytes())
    between = "Between the outputs, paired; ~: the interval contains 0"
    rows = {row[0]: row[1:] for row in tables_of(output, other)[between]}
    same = "~ +0.0000 [+0.0000, +0.0000]"
    assert rows["rl"] == ["second minus first", same, same] and len(rows) == 4
    assert any(row[2] != same for row in rows.values())
    with np.load(other / "rl.ranks.npz") as found:
        arrays = dict(found) | {"target": found["target"][::-1]}
    np.savez(other / "rl.ranks.npz", **arrays)  # other test rows
    assert "rl" not in [row[0] for row in tables_of(output, other)[between]]


def test_published_rows_come_with_their_protocol(output):
    rows = tables_of(output, published="Amazon 2014 Beauty")["Published for Amazon 2014 Beauty"]
    assert ["TIGER", "arXiv 2305.05065", "not stated", ".0648", ".0384"] in rows
    with pytest.raises(UserError, match="has no such data; expected one of Amazon 2014 Beauty, "):
        tables_of(output, published="Beauty")


# ------------------------------------------------------------------------------------------------ sections by hand


def made(metrics=None, ranks=None, headline="all", label="one") -> Output:
    """An output with this content; ranks: {model: {array: values}}."""
    results = {"headline": headline, "baseline": "", "differences": {}, "rl_minus_sft": {}}
    arrays = {model: {name: np.array(values) for name, values in own.items()} for model, own in (ranks or {}).items()}
    return Output(label, Path(), results, metrics or {}, arrays)


def captions(section) -> list[str]:
    return [block.caption for block in section.blocks if block.kind == "table"]


@pytest.mark.parametrize("headline", ["all", "unseen"])
def test_the_headline_table_is_first(headline):
    metrics = {"sft": {"item": {"HR@10": 0.1}, "unseen": {"item": {"HR@10": 0.2}}}}
    found = captions(results_section([made(metrics, headline=headline)], None, "", 0))
    other = {"all": "unseen", "unseen": "all"}[headline]
    assert [caption.split(" items")[0] for caption in found] == [f"Headline: {headline}", other]


@pytest.mark.parametrize(
    ("headline", "target", "compared"), [("all", 7, True), ("unseen", 7, False), ("all", 8, False)]
)
def test_outputs_are_compared_in_one_protocol_and_on_the_same_rows(headline, target, compared):
    arrays = {"all_item": [0, 3], "unseen_item": [0, 2], "target": [5, 7]}
    second = made(ranks={"sft": arrays | {"target": [5, target]}}, headline=headline, label="two")
    found = captions(results_section([made(ranks={"sft": arrays}), second], None, "", 0))
    assert found == ["Between the outputs, paired; ~: the interval contains 0"] * compared


@pytest.mark.parametrize(
    ("sft", "sasrec", "compared"),
    [
        ({"all_item": [0, 30, 9], "target": [5, 7, 6]}, {"all_item": [10, 3, 20], "target": [5, 7, 6]}, True),
        ({"all_item": [0, 30, 9], "target": [5, 7, 6]}, {"all_item": [10, 3, 20], "target": [6, 7, 5]}, False),
        ({"all_item": [0, 30, 9], "target": [5, 7, 6]}, {"all_item": [10, 3, 20]}, True),  # as many rows
        ({"all_item": [0, 30, 9], "target": [5, 7, 6]}, {"all_item": [10]}, False),
    ],
)
def test_gains_are_those_of_models_with_the_same_rows(sft, sasrec, compared):
    section = slices_section([made(ranks={"sft": sft, "sasrec": sasrec})])
    assert captions(section) == ["Hits in the first 10 against sasrec: gained, lost, net"] * compared
    if compared:
        assert section.blocks[0].rows == [["all", 3, "2 gained, 1 lost: +1"]]


def test_each_slice_has_its_own_bar():
    sft = {"1-2": {"rows": 3, "HR@10": 0.25}, "3-5": {"rows": 1000, "HR@10": 0.75}}
    rl = {"3-5": {"rows": 1000, "HR@10": 0.5}}
    [figure] = slices_section([made({"sft": {"slices": {"history": sft}}, "rl": {"slices": {"history": rl}}})]).blocks
    assert figure.table.header == ["items in the history", "sft", "rl"]
    assert figure.table.rows == [["1-2\n3 rows", "0.250", "0.000"], ["3-5\n1,000 rows", "0.750", "0.500"]]


def test_ranks_by_hand():
    ranks = {"sft": {"all_item": [0, 1, 1, 50]}, "rl": {"all_item": [49, 50, MISSED, MISSED]}}
    bars, lines, missed = ranks_section([made(ranks=ranks)]).blocks
    assert bars.table.rows[0] == ["1", "0.250", "0.000"] and bars.table.rows[-1] == ["21–50", "0.000", "0.250"]
    rates = {row[0]: row[1:] for row in lines.table.rows}
    assert [rates[k] for k in ("1", "2", "50")] == [["0.2500", "0.0000"], ["0.7500", "0.0000"], ["0.7500", "0.2500"]]
    assert missed.caption == "Target not in the first 50" and missed.rows == [["sft", "25.0%"], ["rl", "75.0%"]]


def test_sample_users_by_hand():
    """The latest ten items, the target's place counted from 1, and no model of other rows."""
    kinds = {"seen": pl.List(pl.Int64)}
    test = pl.DataFrame({"user": ["u", "v"], "target": [12, 3], "seen": [[*range(12)], [4]]}, schema_overrides=kinds)
    top = np.array([[0, 12, 1, 2, 4, 5], [8, -1, -1, -1, -1, -1]])
    ranks = {"rl": {"all_item": [1, MISSED], "all_top": top, "target": [12, 3]}}
    ranks["sft"] = ranks["rl"] | {"target": [3, 12]}
    output = made(ranks=ranks)
    output.data = Dataset([f"t{item}" for item in range(13)], {"test": test})
    first = [("t0 (0)", False), ("t12 (12)", True), ("t1 (1)", False), ("t2 (2)", False), ("t4 (4)", False)]
    history = [f"t{item} ({item})" for item in range(2, 12)]
    users = [
        User("user u", history, "t12 (12)", [("rl", "target at 2", first)]),
        User("user v", ["t4 (4)"], "t3 (3)", [("rl", "target not listed", [("t8 (8)", False)])]),
    ]
    assert users_section([output], 2, seed=0).blocks == [Users(users)]


# ------------------------------------------------------------------------------------------------ parts


def test_shares_of_ranks():
    ranks = np.array([0, 1, 2, 9, 10, 49, 50, np.iinfo(np.int64).max])
    assert histogram(ranks) == [1 / 8, 2 / 8, 0, 1 / 8, 1 / 8, 1 / 8, 2 / 8]


def test_a_gain_is_a_hit_that_the_other_misses():
    own, other = np.array([0, 9, 9, 10, 30, 5]), np.array([10, 10, 0, 9, 40, 3])
    assert net(own, other) == "2 gained, 1 lost: +1" and net(other, own) == "1 gained, 2 lost: -1"


def test_gini():
    assert gini(np.array([3, 3, 3])) == pytest.approx(0)
    assert gini(np.array([0, 0, 0, 8])) == pytest.approx(3 / 4)
    assert gini(np.array([1, 3])) == pytest.approx(1 / 4)


def test_the_map_keeps_neighbours_and_repeats():
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.normal(0, 0.1, (30, 6)), rng.normal(5, 0.1, (30, 6))])
    places = project(vectors, 0)
    assert places.min() == 0 and places.max() == pytest.approx(100) and np.array_equal(places, project(vectors, 0))
    middle = places[:30].mean(axis=0), places[30:].mean(axis=0)
    apart = np.linalg.norm(middle[0] - middle[1])
    assert apart > np.linalg.norm(places[:30] - middle[0], axis=1).max()


def test_names_with_markup_and_mathematics_are_drawn_as_they_are():
    figure = figures.lines("t", "x & y", "$y$", {"<b>$a$": [(0, 1.0), (1, 2.0)], "$\\bad{": [(0, 1.0), (1, 0.5)]})
    root = ElementTree.fromstring(str(figure.svg).replace("xlink:href", "href"))
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
    assert {"<b>$a$", "$\\bad{", "x & y", "$y$"} <= set(texts)
