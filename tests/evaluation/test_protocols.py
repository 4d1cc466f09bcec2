"""Both protocols for seen items: ranks equal plain sorting, lists of SIDs and scores of items give the same report.

Under `unseen` a seen target is missed and a SID leaves the ranking only when all its items are seen; slices cover every
row once; the headline follows from train.
"""

import random

import numpy as np
import polars as pl
import pytest
from helpers import sequences

from minionerec.catalog.catalog import Catalog
from minionerec.evaluation.metrics import MISSED, bootstrap, table
from minionerec.evaluation.protocols import (
    by_beams,
    by_scores,
    headline,
    looks_cut,
    of_beams,
    of_scores,
    popularity_of_items,
    repeats,
    report,
    slices_of,
    write_ranks,
)

N = 30


def world(seed):
    """A catalog in which many items share a SID (none for seed 2), targets, seen items, some repeated or the target."""
    rng = random.Random(seed)
    sids = [f"<a_{rng.randrange(16) if seed < 2 else item}>" for item in range(N)]
    catalog = Catalog(sids, popularity=[rng.randrange(4) for _ in sids])
    seen = [[rng.randrange(N) for _ in range(rng.randrange(12))] for _ in range(80)]
    targets = [rng.choice(row) if row and rng.random() < 0.3 else rng.randrange(N) for row in seen]
    return catalog, targets, seen


def place(listed, target):
    return listed.index(target) if target in listed else MISSED


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unseen", [False, True])
def test_scores_are_ranked_as_by_sorting(seed, unseen):
    catalog, targets, seen = world(seed)
    scores = np.random.default_rng(seed).integers(0, 6, (80, N)).astype(np.float32)  # many ties
    before = scores.copy()
    found = of_scores(scores, targets, catalog, seen if unseen else None)
    assert np.array_equal(scores, before)
    for row, target in enumerate(targets):
        ranked = [i for i in np.argsort(-scores[row], kind="stable").tolist() if not unseen or i not in seen[row]]
        best = {}
        for item in ranked:
            sid = int(catalog.sid_of_item[item])
            best[sid] = max(best.get(sid, -1), scores[row, item])
        sids = sorted(best, key=lambda sid, best=best: (-best[sid], sid))
        assert found.item[row] == place(ranked, target)
        assert found.sid[row] == place(sids, int(catalog.sid_of_item[target]))
        assert [i for i in found.top[row].tolist() if i >= 0] == ranked[:10]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unseen", [False, True])
def test_beams_and_scores_agree(seed, unseen):
    """Every SID of the catalog in a list, best first, and the scores of items that say the same."""
    catalog, targets, seen = world(seed)
    seen = seen if unseen else None
    rng = np.random.default_rng(seed)
    predicted = np.array([rng.permutation(len(catalog.sids)) for _ in targets])
    scores = np.zeros((80, N))
    for row, order in enumerate(predicted):
        listed = [item for sid_row in order for item in catalog.items_of_sid[sid_row]]
        scores[row, listed] = np.arange(N, 0, -1)
    if unseen:  # as the search gives it: without the SIDs all of whose items are seen
        for row, items in enumerate(seen):
            kept = [sid_row for sid_row in predicted[row] if sid_row not in catalog.rows_of(items)]
            predicted[row] = kept + [-1] * (len(catalog.sids) - len(kept))
    beams, scored = of_beams(predicted, targets, catalog, seen), of_scores(scores, targets, catalog, seen)
    for one, other in zip(beams, scored, strict=True):
        assert np.array_equal(one, other)


def test_a_sid_with_another_item_stays():
    catalog = Catalog(["<a_0>", "<a_0>", "<a_1>"])
    scores = np.array([[3.0, 2.0, 1.0]] * 3)
    found = of_scores(scores, [1, 0, 2], catalog, [[0], [0], [0, 1]])
    assert found.item.tolist() == [0, MISSED, 0]  # item 0 leaves; a seen target is missed
    assert found.sid.tolist() == [0, 0, 0]  # <a_0> stays for item 1, and leaves when both are seen
    assert found.top[:, :3].tolist() == [[1, 2, -1], [1, 2, -1], [2, -1, -1]]


def frame(seen, targets):
    return pl.DataFrame({"seen": seen, "target": targets}, schema={"seen": pl.List(pl.Int64), "target": pl.Int64})


def test_both_protocols_from_one_scoring():
    """A scorer is asked once for each slice of rows; joined slices equal one call with all rows."""
    catalog, targets, seen = world(0)
    rows = frame(seen, targets).with_columns(history=pl.col("seen").list.tail(2))
    scores, asked = np.random.default_rng(0).random((80, N)), []

    def score(histories):
        asked.append(histories)
        start = sum(map(len, asked[:-1]))
        return scores[start : start + len(histories)]

    found = by_scores(score, rows, catalog, rows_at_once=50)
    assert [len(histories) for histories in asked] == [50, 30] and sum(asked, []) == rows["history"].to_list()
    for name, hidden in (("all", None), ("unseen", seen)):
        for one, other in zip(found[name], of_scores(scores, targets, catalog, hidden), strict=True):
            assert np.array_equal(one, other)
    lists = np.array([np.random.default_rng(i).permutation(len(catalog.sids)) for i in range(80)])
    beams = by_beams({"all": lists, "unseen": lists}, rows, catalog)
    assert np.array_equal(beams["unseen"].item, of_beams(lists, targets, catalog, seen).item)
    assert np.array_equal(beams["all"].item, of_beams(lists, targets, catalog).item)


def test_the_headline_follows_from_the_repeats_of_train():
    never = frame([[0], [1, 2]] * 100, [5, 6] * 100)
    assert repeats(never) == 0 and headline(never) == "unseen" and headline(None) == "all"
    once = frame([[0]] * 101, [0] + [1] * 100)  # 0.99 %
    assert headline(once) == "unseen" and repeats(once) == pytest.approx(1 / 101)
    assert headline(once.head(100)) == headline(once.head(99)) == "all"  # 1 % and 1.01 %


@pytest.mark.parametrize(
    "longest, others, cut",
    [(1, 0, False), (1, 38, False), (2, 0, True), (3, 50, True), (2, 198, True), (2, 199, False), (3, 297, True)],
)
def test_histories_of_one_length_look_cut(longest, others, cut):
    """longest, others: rows with the greatest length and with smaller ones."""
    seen = [[1] * 5] * longest + [[1] * (n % 5) for n in range(others)]
    assert looks_cut(frame(seen, [0] * len(seen))) == cut


def test_popularity_and_history_by_hand():
    train = frame([[8], [], [], [], [], [], [], [], []], [0, 0, 0, 0, 1, 1, 1, 2, 3])
    groups = popularity_of_items(train, 10)
    assert groups[:4].tolist() == ["head", "middle", "tail", "tail"]
    assert groups[8] == "tail" and set(groups[[4, 5, 6, 7, 9]]) == {"new"}  # 8 is in a history
    rows = frame([[0]] * 6, [0, 1, 2, 3, 8, 9])
    assert slices_of(rows, train, 10)["popularity"].tolist() == ["head", "middle", "tail", "tail", "tail", "new"]
    lengths = {"0": [0], "1-2": [1, 2], "3-5": [3, 5], "6-10": [6, 10], "11-20": [11, 20], "21-50": [21, 50]}
    for label, edges in (lengths | {"51+": [51, 400]}).items():
        labels = slices_of(frame([[0] * n for n in edges], [0] * len(edges)), None, 10)
        assert list(labels) == ["history"] and set(labels["history"]) == {label}


def test_a_report_adds_up():
    catalog, targets, seen = world(1)
    scores = np.random.default_rng(1).random((80, N))
    ranks = {"all": of_scores(scores, targets, catalog), "unseen": of_scores(scores, targets, catalog, seen)}
    rows, train = frame(seen, targets), frame([[]] * 60, [i % 7 for i in range(60)])
    result = report(ranks, rows, train, catalog, seed=3, cutoffs=(1, 5, 10))
    assert result["rows"] == 80 and result["headline"] == "unseen"
    assert result["item"] == table(ranks["all"].item, (1, 5, 10))
    assert result["unseen"]["sid"] == table(ranks["unseen"].sid, (1, 5, 10))
    for values, own in ((result, ranks["all"]), (result["unseen"], ranks["unseen"])):
        assert values["intervals"] == bootstrap(own.item, 3, (1, 5, 10))
        for slices in values["slices"].values():
            assert sum(each["rows"] for each in slices.values()) == 80
            for name in ("HR@10", "NDCG@10"):
                mean = sum(each["rows"] * each[name] for each in slices.values()) / 80
                assert mean == pytest.approx(values["item"][name])
    assert result["coverage"]["items@10"] == len(np.unique(ranks["all"].top)) / N
    assert result["distinct_first"] == len(np.unique(scores.argmax(axis=1)))
    assert result["repeats"] == {"train": 0, "test": np.mean([t in s for t, s in zip(targets, seen, strict=True)])}
    assert result["seen"] == {"longest": 11, "looks_cut": True}
    few = report({"all": ranks["all"]}, rows, train, catalog, seed=0, cutoffs=(1, 3))
    assert few["headline"] == "all" and "unseen" not in few
    assert set(few["slices"]["history"]["0"]) == {"rows", "HR@3", "NDCG@3"}


def test_empty_places_are_no_items():
    """A list with one SID of two items, and an empty list."""
    catalog = Catalog(["<a_0>", "<a_0>", "<a_1>", "<a_2>"])
    found = of_beams(np.array([[0, -1], [-1, -1]]), [0, 2], catalog)
    assert found.top[:, :3].tolist() == [[0, 1, -1], [-1, -1, -1]]
    result = report({"all": found}, frame([[], []], [0, 2]), None, catalog, seed=0)
    assert result["coverage"] == {"items@10": 2 / 4, "sids@10": 1 / 3} and result["distinct_first"] == 1


def test_ranks_are_written_in_the_order_of_rows(tmp_path):
    catalog, targets, seen = world(0)
    scores = np.random.default_rng(2).random((80, N))
    ranks = {"all": of_scores(scores, targets, catalog), "unseen": of_scores(scores, targets, catalog, seen)}
    rows = sequences(*zip(seen, targets, strict=True))
    write_ranks(tmp_path / "x.ranks.npz", ranks, rows, rows, N)
    with np.load(tmp_path / "x.ranks.npz", allow_pickle=False) as found:
        written = {f"{name}_{kind}": values for name, each in ranks.items() for kind, values in each._asdict().items()}
        assert set(found) == set(written) | {"target", "slice_history", "slice_popularity"}
        assert found["target"].tolist() == list(targets)
        assert found["slice_history"].tolist() == slices_of(rows, rows, N)["history"].tolist()
        for name, values in written.items():
            assert np.array_equal(found[name], values)
