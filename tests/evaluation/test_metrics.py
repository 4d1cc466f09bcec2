"""Metrics from ranks: values by hand, plain loops over lists, and an independent library; intervals that repeat by seed.

A target in a shared SID is a hit by SID for each of its items, by item only at its place in the catalog's order.
"""

import math
import random

import numpy as np
import pytest
import torch

from minionerec.catalog.catalog import Catalog
from minionerec.evaluation.metrics import (
    MISSED,
    bootstrap,
    cutoffs_of,
    format_table,
    illegal,
    interval_of_mean,
    ranks_of_scores,
    sid_and_item_ranks,
    table,
)


def test_table_by_hand():
    result = table(np.array([0, 3, MISSED, 12]))
    assert result["HR@1"] == 0.25 and result["HR@3"] == 0.25 and result["HR@5"] == 0.5 and result["HR@20"] == 0.75
    assert result["NDCG@5"] == pytest.approx((1 + 1 / math.log2(5)) / 4)
    assert result["NDCG@20"] == pytest.approx((1 + 1 / math.log2(5) + 1 / math.log2(14)) / 4)
    assert result["MRR"] == pytest.approx((1 + 1 / 4 + 1 / 13) / 4)


def test_sid_and_item_ranks_equal_a_plain_loop():
    rng = random.Random(0)
    sids = [f"<a_{rng.randrange(6)}><b_{rng.randrange(3)}>" for _ in range(40)]  # many items share a SID
    catalog = Catalog(sids, popularity=[rng.randrange(4) for _ in sids])
    predicted = np.array([rng.sample(range(len(catalog.sids)), 5) for _ in range(200)])
    predicted[::7, 3:] = -1  # shorter lists
    targets = [rng.randrange(40) for _ in range(200)]
    by_sid, by_item = sid_and_item_ranks(predicted, targets, catalog)
    for row, target, sid_rank, item_rank in zip(predicted, targets, by_sid, by_item, strict=True):
        rows = [r for r in row.tolist() if r >= 0]
        listed_sids = [catalog.sids[r] for r in rows]
        listed_items = [item for r in rows for item in catalog.items_of_sid[r]]
        assert sid_rank == (listed_sids.index(sids[target]) if sids[target] in listed_sids else MISSED)
        assert item_rank == (listed_items.index(target) if target in listed_items else MISSED)


def test_a_shared_sid_is_a_hit_by_sid_but_not_for_both_items():
    catalog = Catalog(["<a_1>", "<a_1>", "<a_2>"])
    by_sid, by_item = sid_and_item_ranks(np.array([[0, 1], [0, 1]]), [0, 1], catalog)
    assert by_sid.tolist() == [0, 0] and by_item.tolist() == [0, 1]


def test_ranks_of_scores_equal_a_stable_sort():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (50, 20)).astype(float)  # many ties
    targets = rng.integers(0, 20, 50)
    expected = [np.argsort(-row, kind="stable").tolist().index(t) for row, t in zip(scores, targets, strict=True)]
    assert ranks_of_scores(scores, targets).tolist() == expected
    scores[3, 4] = np.nan
    with pytest.raises(ValueError, match="row 3"):
        ranks_of_scores(scores, targets)


@pytest.mark.parametrize("rows", [400, 4000])
@pytest.mark.parametrize("of", ["ranks", "values"])
def test_intervals_are_the_normal_ones_of_a_share(rows, of):
    """A quarter of the rows are hits. Over seeds, the bounds are 1.96 standard errors from the mean."""

    def interval(seed):
        hits = np.arange(rows) % 4 == 0
        return bootstrap(np.where(hits, 9, 10), seed)["HR@10"] if of == "ranks" else interval_of_mean(1.0 * hits, seed)

    error = math.sqrt(0.25 * 0.75 / rows)
    bounds = np.mean([interval(seed) for seed in range(20)], axis=0)
    assert bounds == pytest.approx([0.25 - 1.96 * error, 0.25 + 1.96 * error], abs=0.1 * error)
    assert interval(0) == interval(0) != interval(1)


def test_format_table_has_a_line_a_row():
    text = format_table({"sft": table(np.array([0, 1])), "rl": table(np.array([0, 0]))}, (1, 5))
    assert [line.split()[0] for line in text.splitlines()] == ["HR@1", "sft", "rl"]


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_torchmetrics(seed):
    """HR, NDCG and MRR by item of random lists over shared SIDs, against an independent library, row by row."""
    library = pytest.importorskip("torchmetrics.functional.retrieval")
    rng = random.Random(seed)
    sids = [f"<a_{rng.randrange(6)}><b_{rng.randrange(3)}>" for _ in range(40)]
    catalog, targets = Catalog(sids), [rng.randrange(40) for _ in range(60)]
    predicted = np.array([rng.sample(range(len(catalog.sids)), 12) for _ in targets])
    expected = {f"{name}@{k}": [] for name in ("HR", "NDCG") for k in (1, 3, 5, 10)} | {"MRR": []}
    for row, target in zip(predicted.tolist(), targets, strict=True):
        listed = [item for sid_row in row for item in catalog.items_of_sid[sid_row]]
        scores = torch.full((40,), -1.0)  # below every listed item; torchmetrics' MRR leaves these out
        scores[listed] = torch.arange(len(listed), 0, -1).float()
        relevant = torch.arange(40) == target
        for k in (1, 3, 5, 10):
            expected[f"HR@{k}"].append(library.retrieval_hit_rate(scores, relevant, top_k=k).item())
            expected[f"NDCG@{k}"].append(library.retrieval_normalized_dcg(scores, relevant, top_k=k).item())
        expected["MRR"].append(library.retrieval_reciprocal_rank(scores, relevant).item())
    _, by_item = sid_and_item_ranks(predicted, targets, catalog)
    assert table(by_item, (1, 3, 5, 10)) == pytest.approx({k: np.mean(v) for k, v in expected.items()}, abs=1e-6)


def test_tied_scores_equal_torchmetrics_on_the_order_that_breaks_them():
    library = pytest.importorskip("torchmetrics.functional.retrieval")
    rng = np.random.default_rng(5)
    scores, targets = rng.integers(0, 4, (50, 20)), rng.integers(0, 20, 50)
    found = table(ranks_of_scores(scores.astype(float), targets), (1, 5))
    untied = torch.from_numpy(scores - np.arange(20) / 100)  # of equal scores the lower id is first
    for k in (1, 5):
        expected = [
            library.retrieval_normalized_dcg(row, torch.arange(20) == int(target), top_k=k).item()
            for row, target in zip(untied, targets, strict=True)
        ]
        assert found[f"NDCG@{k}"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_seen_items_leave_the_list_of_items():
    rng = random.Random(2)
    sids = [f"<a_{rng.randrange(8)}>" for _ in range(30)]
    catalog = Catalog(sids, popularity=[rng.randrange(4) for _ in sids])
    predicted = np.array([rng.sample(range(8), 6) for _ in range(200)])
    targets = [rng.randrange(30) for _ in range(200)]
    seen = [[rng.randrange(30) for _ in range(rng.randrange(8))] for _ in range(200)]  # with repetitions
    by_sid, by_item = sid_and_item_ranks(predicted, targets, catalog, seen)
    assert by_sid.tolist() == sid_and_item_ranks(predicted, targets, catalog)[0].tolist()
    for row, target, past, rank in zip(predicted.tolist(), targets, seen, by_item, strict=True):
        listed = [item for sid_row in row for item in catalog.items_of_sid[sid_row] if item not in past]
        assert rank == (listed.index(target) if target in listed else MISSED)


def test_cutoffs_by_beams():
    assert cutoffs_of(50) == [1, 3, 5, 10, 20, 50] and cutoffs_of(12) == [1, 3, 5, 10]
    assert cutoffs_of(8) == [1, 3, 5, 8] and cutoffs_of(4) == [1, 3, 4]


def test_illegal_by_hand():
    catalog = Catalog(["<a_1>", "<a_1>", "<a_2>", "<a_3>"])
    assert illegal(np.array([[0, 2], [1, -1], [-1, -1]]), catalog) == 0
    assert illegal(np.array([[0, 0], [1, 3], [-2, 1]]), catalog) == 3
