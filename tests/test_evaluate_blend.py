"""The blend in evaluate.py and recommend.py.

Invariants: with weights by user, each row has the rank that the weights of its group give; without a difference between
groups, the ranks of auto; what evaluate.py has chosen is what recommend.py uses when it is given the metrics; a file of
other baselines, and values that are no weights, are one line.
"""

import json
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from helpers import N_ITEMS

import evaluate
import recommend
from minionerec.baselines import counts
from minionerec.baselines.models import MODELS, load_checkpoint
from minionerec.catalog.items import read_info
from minionerec.catalog.sequences import read_sequences
from minionerec.common.errors import UserError
from minionerec.evaluation import blend_weights
from minionerec.evaluation.blend import Candidates
from minionerec.evaluation.blend_weights import Choice, UserWeights

SELECTION = {"shrinkage": 100, "gain": [0.1, 0.01], "rows": [6, 6]}


@pytest.fixture(scope="module")
def baselines(world, tmp_path_factory):
    """Folders of a SASRec with random weights, and of the Markov chain of train."""
    folder = tmp_path_factory.mktemp("baselines")
    torch.manual_seed(0)
    sizes = {"n_items": N_ITEMS, "max_history": 10, "hidden_size": 8, "dropout": 0.0}
    model = MODELS["sasrec"](**sizes, num_layers=1, num_heads=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1.0)
    model.save(folder / "sasrec")
    counts.save(folder / "markov", "markov", rows_of(world, "train"), N_ITEMS)
    return [str(folder / "sasrec"), str(folder / "markov")]


def rows_of(world, split: str) -> pl.DataFrame:
    return read_sequences(getattr(world, split), read_info(world.info).sids, f"{split}_file", 10)


@pytest.fixture
def evaluated(world, checkpoint_folder, baselines, tmp_path):
    """Runs evaluate.py; returns (content of the blend's metrics, ranks of each protocol)."""

    def evaluated(name: str, *weights: str, **more):
        output = tmp_path / f"{name}.json"
        paths = {"base_model": checkpoint_folder, "test_data_path": world.test, "info_file": world.info}
        paths |= {"train_file": world.train, "result_json_data": output, "blend_valid_file": world.valid}
        evaluate.main(
            evaluate.Options(
                **{key: str(path) for key, path in paths.items()}, num_beams=60, blend_path=baselines,
                blend_weight=list(weights), **more,
            )
        )  # fmt: skip
        with np.load(tmp_path / f"{name}.blend.ranks.npz") as ranks:
            return json.loads((tmp_path / f"{name}.blend.metrics.json").read_text()), dict(ranks)

    return evaluated


def recommender(world, checkpoint_folder, baselines, *weights: str):
    return recommend.Recommender(
        recommend.Options(
            base_model=str(checkpoint_folder), info_file=str(world.info), blend_path=baselines,
            blend_weight=list(weights), K=N_ITEMS,
        )
    )  # fmt: skip


def test_each_row_has_the_weights_of_its_group(
    evaluated, world, checkpoint_folder, baselines, tmp_path, monkeypatch, capsys
):
    test = rows_of(world, "test")
    scores = load_checkpoint(baselines[1], "blend_path", N_ITEMS).scores(test["seen"].to_list()).double()
    sure = torch.softmax(scores, dim=1).amax(dim=1).numpy()
    cut = float(np.median(sure) + 1e-6)
    low, high = (0.0, 0.25), (3.0, 2.0)
    assert 0 < (sure <= cut).sum() < len(sure)
    choice = Choice(UserWeights((low, high), (cut,), 1), (1.0, 1.0), SELECTION)
    monkeypatch.setattr(blend_weights, "choose_user_weights", lambda *_: choice)
    metrics, found = evaluated("user", "user")
    assert metrics["weights"] == [1.0, 1.0]
    assert metrics["user_weights"] == SELECTION | {
        "confidence_of": baselines[1], "cuts": [cut], "weights": [list(low), list(high)],
    }  # fmt: skip
    assert f"weights by the largest probability of {baselines[1]}: [0.0, 0.25] to {cut:.3f}; [3.0, 2.0]" in (
        capsys.readouterr().out
    )
    _, of_low = evaluated("low", *map(str, low))
    _, of_high = evaluated("high", *map(str, high))
    for name in ("all_item", "all_sid", "unseen_item", "unseen_sid"):
        ranks = found[name]
        assert not np.array_equal(of_low[name], of_high[name])
        assert np.array_equal(ranks, np.where(sure <= cut, of_low[name], of_high[name]))

    histories = test["seen"].to_list()
    file = str(tmp_path / "user.blend.metrics.json")
    own = recommender(world, checkpoint_folder, baselines, file)(histories)
    parts = [recommender(world, checkpoint_folder, baselines, *map(str, w))(histories) for w in (low, high)]
    assert own == [parts[int(p > cut)][row] for row, p in enumerate(sure)]
    for row, target in enumerate(test["target"].to_list()):  # the ranks of evaluate.py, with all items
        assert [entry["item_id"] for entry in own[row]].index(target) == found["all_item"][row]


def test_too_few_rows_for_groups_give_auto(evaluated, world, checkpoint_folder, baselines, tmp_path):
    auto, ranks = evaluated("auto", "auto")
    user, by_user = evaluated("user", "user")
    assert user["user_weights"]["cuts"] == [] and user["user_weights"]["weights"] == [auto["weights"]]
    assert all(np.array_equal(ranks[name], by_user[name]) for name in ranks)
    assert {key: user[key] for key in auto} == auto
    asked = [recommender(world, checkpoint_folder, baselines, str(tmp_path / f"{name}.blend.metrics.json"))([[3, 5]])
             for name in ("auto", "user")]  # fmt: skip
    assert (
        asked[0] == asked[1] == recommender(world, checkpoint_folder, baselines, *map(str, auto["weights"]))([[3, 5]])
    )


def test_the_blend_does_not_depend_on_how_the_test_rows_were_searched(evaluated):
    """Beams of another space, or with a length penalty, have other scores than the blend adds."""
    _, ranks = evaluated("plain", "1", "1", space="catalog")
    for name, other in (("vocab", {"space": "vocab"}), ("divided", {"space": "catalog", "length_penalty": 2.0})):
        _, found = evaluated(name, "1", "1", **other)
        assert all(np.array_equal(found[kind], ranks[kind]) for kind in ranks)


@pytest.mark.parametrize("how", ["auto", "user"])
@pytest.mark.parametrize("target, weight", [(1, 0.0), (0, 0.25)])
def test_weights_are_chosen_in_the_protocol_of_the_headline(how, target, weight):
    """The baseline ranks every target first with all items and says nothing of unseen ones. target: of train."""
    data = SimpleNamespace(train=pl.DataFrame({"seen": [[0]], "target": [target]}))
    items, valid = np.tile(np.arange(20), (20, 1)), pl.DataFrame({"target": range(20)})
    found = {
        name: Candidates(items, np.stack([np.zeros((20, 20)), baseline], axis=-1), np.ones((20, 1)))
        for name, baseline in (("all", np.eye(20)), ("unseen", np.zeros((20, 20))))
    }
    options = evaluate.Options(blend_path=["baseline"], blend_weight=[how])
    weights, _ = evaluate.blend_weights_of(options, data, lambda rows: found, valid)
    assert weights == UserWeights(((weight,),))


@pytest.mark.parametrize(
    "weights, found",
    [
        (["user", "1"], "--blend_weight ['user', '1']: expected auto, user, or 2 numbers"),
        (["x.json"], "expected auto, user, or 2 numbers"),
    ],
)
def test_values_that_are_no_weights(baselines, weights, found):
    with pytest.raises(UserError) as error:
        evaluate.Options(blend_path=baselines, blend_weight=weights)
    assert found in str(error.value)


def test_recommend_refuses_other_files(world, checkpoint_folder, baselines, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"blend_path": ["a/caser", "a/markov"], "weights": [1, 2]}))
    for weights, found in (
        ([str(tmp_path / "other.json")], "has weights for a/caser, a/markov, found --blend_path"),
        ([str(tmp_path / "none.json")], "none.json: no such file or folder; check --blend_weight"),
        (["1"], "--blend_weight ['1']: expected 2 numbers, one for each --blend_path"),
        (["1", "user"], "--blend_weight ['1', 'user']: expected 2 numbers"),
    ):
        with pytest.raises(UserError) as error:
            recommender(world, checkpoint_folder, baselines, *weights)  # before a history is asked
        assert found in str(error.value)
    with pytest.raises(UserError, match="expected 0 numbers"):
        recommend.Options(blend_weight=["x.json"])
