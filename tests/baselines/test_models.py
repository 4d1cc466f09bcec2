"""SASRec, GRU4Rec and Caser compared with slow twins: states, scores, losses, checkpoints.

Invariants: a state depends on the items up to its position and not on padding; every item of a history and its place reach
the score; the loss is the formula; a loaded checkpoint scores as the saved model.
"""

import json

import pytest
import torch

from minionerec.baselines.models import MODELS, SequentialModel, draw_unseen, load_checkpoint
from minionerec.common.errors import UserError

SIZES = {"sasrec": {"num_layers": 2, "num_heads": 2}, "gru4rec": {"num_layers": 2}}
SIZES["caser"] = {"num_filters": 3, "filter_sizes": [1, 2, 4], "num_vertical": 2}


def small(name: str = "sasrec", n_items: int = 12, **changes) -> SequentialModel:
    torch.manual_seed(0)
    sizes = {"max_history": 5, "hidden_size": 16, "dropout": 0.5} | SIZES[name]
    model = MODELS[name](n_items=n_items, **(sizes | changes))
    for p in model.parameters():  # positions and biases must matter, or causality and padding are easily right
        torch.nn.init.normal_(p, std=0.5)
    return model.eval()


# ------------------------------------------------------------------------------------------------ states and scores

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_a_position_sees_nothing_after_it(name):
    model = small(name)
    one, other = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[1, 2, 3, 9, 10]])
    a, b = model(one), model(other)
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert (a[:, 3:] - b[:, 3:]).abs().amax((1, 2)).min() > 1e-3


@every_model
def test_every_item_of_the_history_and_its_place_reach_the_last_position(name):
    model, history = small(name), [1, 2, 3, 4, 5]
    for place in range(5):
        changed = history[:place] + [11] + history[place + 1 :]
        assert (model.scores([history]) - model.scores([changed])).abs().max() > 1e-3, place
    assert (model.scores([[1, 2, 3]]) - model.scores([[2, 1, 3]])).abs().max() > 1e-3


@every_model
def test_padding_does_not_change_states_or_scores(name):
    model = small(name)
    short, padded = torch.tensor([[7, 2, 5]]), torch.tensor([[7, 2, 5, 12, 12]])
    torch.testing.assert_close(model(short), model(padded)[:, :3])
    scores = model.scores([[7, 2, 5]])
    torch.testing.assert_close(model.scores([[7, 2, 5], [1, 2, 3, 4, 5]])[:1], scores)
    with torch.no_grad():
        model.items.weight[12] = 100.0  # the padding's embedding is not read
    torch.testing.assert_close(model.scores([[7, 2, 5], [1, 2, 3, 4, 5]])[:1], scores)


@every_model
def test_scores_of_a_batch_equal_scores_row_by_row_without_dropout(name):
    model = small(name).train()
    histories = [[1], [2, 3], [], [4, 5, 6, 7, 8, 9, 10, 11], [0, 0, 0]]
    together = model.scores(histories)
    assert together.shape == (5, 12) and together.dtype == torch.float32 and together.isfinite().all()
    torch.testing.assert_close(together, torch.cat([model.scores([h]) for h in histories]))
    torch.testing.assert_close(together[3:4], model.scores([[7, 8, 9, 10, 11]]))  # the latest max_history
    assert model.scores([]).shape == (0, 12)


@every_model
@pytest.mark.parametrize("item", [-1, 12, 1000])
def test_an_unknown_item_has_no_score(name, item):
    with pytest.raises(ValueError, match=f"item {item} is not in the catalog of 0..11 that {name} knows"):
        small(name).scores([[1, 2], [3, item]])


@pytest.mark.parametrize("tied", [True, False])
def test_a_score_is_the_state_times_the_output_embedding_plus_the_bias(tied):
    model = small(tie_embeddings=tied)
    with torch.no_grad():
        state = model(model.pad([[3, 4]]))[0, -1]
    table, bias = (model.items if tied else model.outputs).weight.detach(), model.bias.detach()
    for item in range(12):
        expected = float(state @ table[item] + bias[item])
        assert float(model.scores([[3, 4]])[0, item]) == pytest.approx(expected, abs=1e-4)


# ------------------------------------------------------------------------------------------------ slow twins


def test_sasrec_is_the_papers_formulas_for_one_row():
    """Equations 1 to 5 written out head by head, position by position, for a row without padding."""
    model, row = small(), [1, 2, 3, 4, 5]
    norm = torch.nn.functional.layer_norm
    with torch.no_grad():
        x = [model.items.weight[i] * 4 + model.positions.weight[p] for p, i in enumerate(row)]  # sqrt(16) = 4
        for block in model.blocks:
            normed = [norm(v, (16,), block.attention_norm.weight, block.attention_norm.bias) for v in x]
            queries, keys, values = zip(*(block.query_key_value(v).split(16) for v in normed), strict=True)
            after = []
            for p, query in enumerate(queries):
                heads = []
                for head in (slice(0, 8), slice(8, 16)):
                    weights = torch.stack([query[head] @ keys[q][head] / 8**0.5 for q in range(p + 1)]).softmax(0)
                    heads.append(sum(w * values[q][head] for q, w in enumerate(weights)))
                y = x[p] + block.output(torch.cat(heads))
                after.append(y + block.feed(norm(y, (16,), block.feed_norm.weight, block.feed_norm.bias)))
            x = after
        expected = torch.stack([norm(v, (16,), model.norm.weight, model.norm.bias) for v in x])
        torch.testing.assert_close(model(torch.tensor([row]))[0], expected, rtol=1e-4, atol=1e-5)


def test_gru4rec_is_the_recurrence_step_by_step():
    model, row = small("gru4rec"), [7, 2, 5]
    with torch.no_grad():
        inputs = [model.items.weight[item] * 4 for item in row]
        for layer in range(2):
            w = {n: getattr(model.gru, f"{n}_l{layer}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
            state, states = torch.zeros(16), []
            for x in inputs:
                reset_x, update_x, new_x = (w["weight_ih"] @ x + w["bias_ih"]).split(16)
                reset_h, update_h, new_h = (w["weight_hh"] @ state + w["bias_hh"]).split(16)
                update = torch.sigmoid(update_x + update_h)
                new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
                state = (1 - update) * new + update * state
                states.append(state)
            inputs = states
        expected = model.output(torch.stack(states))
        torch.testing.assert_close(model(model.pad([row]))[0], expected, rtol=1e-4, atol=1e-5)


def test_caser_is_its_convolutions_as_loops():
    model, row = small("caser"), [7, 2, 5]
    with torch.no_grad():
        image = torch.zeros(5, 16)  # two rows of padding, then three items
        for place, item in enumerate(row, start=2):
            image[place] = model.items.weight[item] * 4
        features = []
        for height, filters in zip([1, 2, 4], model.horizontal, strict=True):
            for f in range(3):
                sums = [
                    sum(float(filters.weight[f, :, i] @ image[top + i]) for i in range(height)) + float(filters.bias[f])
                    for top in range(5 - height + 1)
                ]
                features.append(max(max(value, 0.0) for value in sums))
        for column in range(16):
            for f in range(2):
                features.append(sum(float(model.vertical.weight[f, i] * image[i, column]) for i in range(5)))
        expected = torch.relu(model.output(torch.tensor(features)))
        torch.testing.assert_close(model(model.pad([row]))[0, -1], expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ losses


def positions(model, rows):
    """(items, targets) of whole sequences; each position is asked for the item after it."""
    items = model.pad([row[:-1] for row in rows])
    targets = torch.full_like(items, model.n_items)
    for number, row in enumerate(rows):
        targets[number, : len(row) - 1] = torch.tensor(row[1:])
    return items, targets


@every_model
def test_the_loss_of_a_sequence_is_the_mean_over_its_prefixes(name):
    model = small(name)
    rows = [[3, 1, 4, 1], [5, 9], [2, 6, 5, 3, 5, 8]]
    prefixes = [row[: i + 1] for row in rows for i in range(1, len(row))]
    scores = model.scores([prefix[:-1] for prefix in prefixes]).log_softmax(dim=1)
    expected = -torch.stack([scores[i, prefix[-1]] for i, prefix in enumerate(prefixes)]).mean()
    torch.testing.assert_close(model.loss(*positions(model, rows)), expected)
    items, targets = positions(model, rows)
    targets[0, :2] = model.n_items  # context without a loss
    kept = [scores[i, prefix[-1]] for i, prefix in enumerate(prefixes) if i not in (0, 1)]
    torch.testing.assert_close(model.loss(items, targets), -torch.stack(kept).mean())


@pytest.mark.parametrize("tied", [True, False])
def test_losses_with_negatives_by_hand(tied, monkeypatch):
    model = small("gru4rec", tie_embeddings=tied)
    items, targets = model.pad([[3], [5]]), torch.tensor([[1], [9]])
    scores = model.scores([[3], [5]]).double()
    drawn = torch.tensor([0, 9, 7])  # shared by the rows; 9 is the second row's target and no negative there
    monkeypatch.setattr(torch, "randint", lambda *a, **k: drawn)
    expected = -(scores[0, [1, 0, 9, 7]].log_softmax(0)[0] + scores[1, [9, 0, 7]].log_softmax(0)[0]) / 2
    found = model.loss(items, targets, kind="sampled_softmax", negatives=3)
    assert found.item() == pytest.approx(float(expected), rel=1e-5)
    own = torch.tensor([[0, 2], [7, 8]])
    monkeypatch.setattr("minionerec.baselines.models.draw_unseen", lambda seen, n_items, count: own)
    positive = sum(torch.sigmoid(scores[row, item]).log() for row, item in enumerate((1, 9))) / 2
    negative = sum((1 - torch.sigmoid(scores[row, i])).log() for row in (0, 1) for i in own[row]) / 4
    found = model.loss(items, targets, kind="bce", negatives=2)
    assert found.item() == pytest.approx(-float(positive + negative), rel=1e-5)


def test_negatives_of_bce_are_never_of_their_own_row(monkeypatch):
    model, calls = small("gru4rec"), []
    monkeypatch.setattr("minionerec.baselines.models.draw_unseen", lambda *a: calls.append(a) or draw_unseen(*a))
    model.loss(*positions(model, [[3, 1, 4, 1], [5, 9]]), kind="bce", negatives=4)
    [(seen, n_items, count)] = calls
    assert (n_items, count) == (12, 4)
    assert [set(row) - {12} for row in seen.tolist()] == [{3, 1, 4}] * 3 + [{5, 9}]


def test_unseen_items_are_drawn_evenly():
    torch.manual_seed(0)
    seen = torch.tensor([[4, 0, 4, 8, 8], [8, 8, 8, 8, 7], [0, 1, 2, 3, 4]])
    drawn = draw_unseen(seen, 8, 30_000)
    for row, expected in enumerate(([1, 2, 3, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6], [5, 6, 7])):
        values, counts = drawn[row].unique(return_counts=True)
        assert values.tolist() == expected
        share = 30_000 / len(expected)
        assert (counts - share).abs().max() < 5 * share**0.5


# ------------------------------------------------------------------------------------------------ checkpoints


@every_model
@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_checkpoint_gives_equal_scores(tmp_path, name, tied):
    model, histories = small(name, tie_embeddings=tied), [[1, 2, 3], [11]]
    model.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_checkpoint(tmp_path, n_items=12)
    assert type(loaded) is MODELS[name] and not loaded.training
    assert torch.equal(loaded.scores(histories), model.scores(histories))


def test_loading_refuses_another_folder_and_another_catalog(tmp_path):
    with pytest.raises(UserError, match="baseline_path"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such file"):
        load_checkpoint(tmp_path)
    small().save(tmp_path)
    with pytest.raises(UserError, match="catalog of 12 items, and this one has 13.*--my_flag"):
        load_checkpoint(tmp_path, "my_flag", n_items=13)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in ({"hidden_size": 32}, {"model_type": "bert"}, {"hidden_size": "wide"}, {"depth": 2}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match="baseline_path"):
            load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="baseline_path"):
        load_checkpoint(tmp_path)


def test_features_replace_ids_and_are_saved(tmp_path):
    """Items with equal features have equal scores; the features are not trained."""
    features = torch.randn(6, 3)
    features[4] = features[2]
    model = MODELS["sasrec"](
        n_items=6, max_history=5, hidden_size=8, dropout=0.0, num_layers=1, num_heads=2, features=features
    ).eval()
    scores = model.scores([[2, 1], [4, 1]])
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[:, 2], scores[:, 4])
    assert not any(p.shape == features.shape for p in model.parameters())
    model.save(tmp_path)
    torch.testing.assert_close(load_checkpoint(tmp_path, n_items=6).scores([[2, 1]]), scores[:1])
