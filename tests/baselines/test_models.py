"""SASRec, GRU4Rec and Caser beside slow twins.

Invariants: a state depends on the items up to its position only, on all that the model reads of them, and on no padding;
the softmax of scores is the distribution that `ce` trains; losses are those written out by hand; a saved model loads with
equal scores and anything else is refused in one line.
"""

import json

import polars as pl
import pytest
import torch
from torch.nn.functional import layer_norm

from minionerec.baselines import counts
from minionerec.baselines.models import LOADABLE, MODELS, SequentialModel, draw_unseen, load_checkpoint
from minionerec.common.errors import UserError

SIZES = {"sasrec": {"num_layers": 2, "num_heads": 2}, "gru4rec": {"num_layers": 2}}
SIZES["caser"] = {"num_filters": 3, "filter_sizes": [1, 2, 4], "num_vertical": 2}
N, PAD = 12, 12  # items, and the id of padding


def small(name: str = "sasrec", n_items: int = N, features: bool = False, **changes) -> SequentialModel:
    torch.manual_seed(0)
    sizes = {"max_history": 5, "hidden_size": 16, "dropout": 0.5} | SIZES[name] | changes
    model = MODELS[name](n_items=n_items, features=torch.randn(n_items, 7) if features else None, **sizes)
    for p in model.parameters():  # positions and biases must matter, or causality and padding are easily right
        torch.nn.init.normal_(p, std=0.5)
    return model.eval()


every_model = pytest.mark.parametrize("name", MODELS)
every_input = pytest.mark.parametrize("features", [False, True])


# ------------------------------------------------------------------------------------------------ states and scores


@every_model
@every_input
def test_a_later_item_never_changes_an_earlier_state(name, features):
    model = small(name, features=features)
    one = torch.tensor([[1, 2, 3, 4, 5], [1, 1, 3, 4, 5]])
    other = torch.tensor([[1, 2, 3, 9, 10], [1, 1, 3, PAD, PAD]])
    a, b = model(one), model(other)
    assert a.shape == (2, 5, 16)
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert (a[:, 3:] - b[:, 3:]).abs().amax((1, 2)).min() > 1e-3


@every_model
def test_every_item_of_the_history_and_its_place_reach_the_last_position(name):
    model, history = small(name), [1, 2, 3, 4, 5]
    for place in range(5):
        changed = history[:place] + [11] + history[place + 1 :]
        assert (model.scores([history]) - model.scores([changed])).abs().max() > 1e-3, place
    assert (model.scores([[1, 2, 3]]) - model.scores([[2, 1, 3]])).abs().max() > 1e-3


def test_caser_reads_a_window():
    """Ten items, whatever --max_history is; the fourth from the end is still in all filters."""
    model = small("caser", max_history=30)
    history = [1 + i % 9 for i in range(30)]
    scores = model.scores([history])
    torch.testing.assert_close(model.scores([[11] * 20 + history[20:]]), scores)
    assert (model.scores([history[:20] + [11] + history[21:]]) - scores).abs().max() > 1e-3


@every_model
@every_input
def test_padding_has_no_influence(name, features):
    model = small(name, features=features)
    short, padded = model(torch.tensor([[7, 2, 5]])), model(torch.tensor([[7, 2, 5, PAD, PAD]]))
    torch.testing.assert_close(padded[:, :3], short)
    scores = model.scores([[7, 2, 5]])
    torch.testing.assert_close(model.scores([[7, 2, 5], [1, 2, 3, 4, 6]])[:1], scores)
    if not features:
        with torch.no_grad():
            model.items.weight[PAD] = 100.0  # nor has what is in the padding's row
        torch.testing.assert_close(model.scores([[7, 2, 5]]), scores)
        assert model(torch.tensor([[PAD, PAD]])).isfinite().all()


@every_model
@every_input
def test_scores_of_a_batch_equal_scores_row_by_row_without_dropout(name, features):
    model = small(name, features=features).train()
    histories = [[1], [2, 3], [], [4, 5, 6, 7, 8, 9, 10, 11], [0, 0, 0]]
    together = model.scores(histories)
    assert together.shape == (5, N) and together.dtype == torch.float32 and together.isfinite().all()
    torch.testing.assert_close(together, torch.cat([model.scores([h]) for h in histories]), atol=1e-4, rtol=1e-4)
    latest = model.scores([[7, 8, 9, 10, 11]])  # max_history items
    torch.testing.assert_close(together[3:4], latest, atol=1e-4, rtol=1e-4)
    assert model.scores([]).shape == (0, N)


@every_model
@pytest.mark.parametrize("item", [-1, N, 1000])
def test_an_unknown_item_has_no_score(name, item):
    with pytest.raises(ValueError, match=f"item {item} is not in the catalog of 0..11 that {name} knows"):
        small(name).scores([[1, 2], [3, item]])


@pytest.mark.parametrize("tied", [True, False])
@every_input
def test_a_score_is_the_state_times_the_output_embedding_plus_the_bias(tied, features):
    model = small(tie_embeddings=tied, features=features)
    with torch.no_grad():
        state = model(torch.tensor([[3, 4]]))[0, -1]
        inputs = model.items(model.features) if features else model.items.weight
        table = inputs if tied else model.outputs.weight
        expected = table[:N] @ state + model.bias
    torch.testing.assert_close(model.scores([[3, 4]])[0], expected, rtol=1e-4, atol=1e-4)


@every_model
def test_features_are_frozen_and_embeddings_their_projection(name):
    model = small(name, features=True)
    assert "features" not in dict(model.named_parameters()) and "features" in model.state_dict()
    table = model.table()
    assert table.shape == (N + 1, 16) and not table[N].any()
    torch.testing.assert_close(table[:N], model.items(model.features))
    torch.testing.assert_close(model.embed(torch.tensor([[3, PAD]]))[0, 0], model.items(model.features[3]) * 4)
    model.loss(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()
    assert model.items[0].weight.grad.abs().sum() > 0


def test_start_from_popularity():
    model, times = small(), [5, 0, 9, 2, 100, 1, 30, 0, 0, 0, 0, 3]
    model.start_from_popularity(times)
    shares = (torch.tensor(times) + 1.0) / (sum(times) + N)
    torch.testing.assert_close(model.bias.softmax(0), shares)


# ------------------------------------------------------------------------------------------------ slow twins


def test_sasrec_is_the_papers_formulas_for_one_row():
    """Equations 1 to 5 written out head by head, position by position."""
    model, row = small(), [1, 2, 3, 4, 5]
    with torch.no_grad():
        x = [model.items.weight[i] * 4 + model.positions.weight[p] for p, i in enumerate(row)]  # sqrt(16) = 4
        for block in model.blocks:
            normed = [layer_norm(v, (16,), block.attention_norm.weight, block.attention_norm.bias) for v in x]
            queries, keys, values = zip(*(block.query_key_value(v).split(16) for v in normed), strict=True)
            after = []
            for p, query in enumerate(queries):
                heads = []
                for head in (slice(0, 8), slice(8, 16)):
                    weights = torch.stack([query[head] @ keys[q][head] / 8**0.5 for q in range(p + 1)]).softmax(0)
                    heads.append(sum(w * values[q][head] for q, w in enumerate(weights)))
                y = x[p] + block.output(torch.cat(heads))
                inner = layer_norm(y, (16,), block.feed_norm.weight, block.feed_norm.bias)
                after.append(y + block.feed[3](torch.relu(block.feed[0](inner))))
            x = after
        expected = torch.stack([layer_norm(v, (16,), model.norm.weight, model.norm.bias) for v in x])
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
        torch.testing.assert_close(model(torch.tensor([row]))[0], expected, rtol=1e-4, atol=1e-5)


def test_caser_is_its_convolutions_as_loops():
    model, row = small("caser"), [7, 2, 5]
    with torch.no_grad():
        image = torch.zeros(5, 16)  # two places before the first item, then three items
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
        torch.testing.assert_close(model(torch.tensor([row]))[0, -1], expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ losses

# Three windows: all items are predicted; the first items are history only; nothing came before the target.
ITEMS = torch.tensor([[3, 1, 4, 1], [2, 6, 5, PAD], [PAD, PAD, PAD, PAD]])
TARGETS = torch.tensor([[1, 4, 1, 5], [PAD, PAD, 9, PAD], [8, PAD, PAD, PAD]])
EXAMPLES = [([3], 1), ([3, 1], 4), ([3, 1, 4], 1), ([3, 1, 4, 1], 5), ([2, 6, 5], 9), ([], 8)]


@every_model
@every_input
@pytest.mark.parametrize("tied", [True, False])
def test_the_softmax_of_scores_is_what_ce_trains(name, features, tied):
    model = small(name, features=features, tie_embeddings=tied)
    log_probs = model.scores([history for history, _ in EXAMPLES]).log_softmax(dim=1)
    expected = -log_probs[range(len(EXAMPLES)), [target for _, target in EXAMPLES]].mean()
    torch.testing.assert_close(model.loss(ITEMS, TARGETS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@every_input
def test_sampled_softmax_by_hand(tied, features, monkeypatch):
    """Over the target and the drawn items; a drawn target counts once, a drawn other as often as it is drawn."""
    model, drawn = small("gru4rec", tie_embeddings=tied, features=features), [4, 0, 9, 9, 7]
    monkeypatch.setattr(
        torch, "randint", lambda high, size, device: torch.tensor(drawn) if (high, size) == (N, (5,)) else None
    )
    scores, expected = model.scores([history for history, _ in EXAMPLES]).double(), 0.0
    for row, (_, target) in enumerate(EXAMPLES):
        others = [item for item in drawn if item != target]
        expected -= float(scores[row, [target, *others]].log_softmax(0)[0]) / len(EXAMPLES)
    found = model.loss(ITEMS, TARGETS, kind="sampled_softmax", negatives=5)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@every_model
def test_sampled_softmax_of_all_items_is_ce(name, monkeypatch):
    model = small(name)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "randint", lambda high, size, device: torch.arange(high))
        found = model.loss(ITEMS, TARGETS, kind="sampled_softmax", negatives=N)
    torch.testing.assert_close(found, model.loss(ITEMS, TARGETS))
    drawn = [model.loss(ITEMS, TARGETS, kind="sampled_softmax", negatives=3).item() for _ in range(5)]
    assert len(set(drawn)) > 1  # other items at each step


@pytest.mark.parametrize("tied", [True, False])
@every_input
def test_bce_by_hand(tied, features, monkeypatch):
    model = small("gru4rec", tie_embeddings=tied, features=features)
    drawn = torch.tensor([[0, 2], [7, 8], [6, 6], [0, 11], [1, 3], [4, 2]])
    monkeypatch.setattr("minionerec.baselines.models.draw_unseen", lambda seen, n_items, count: drawn)
    scores = model.scores([history for history, _ in EXAMPLES]).double()
    positive = sum(torch.sigmoid(scores[row, item]).log() for row, (_, item) in enumerate(EXAMPLES)) / 6
    negative = sum((1 - torch.sigmoid(scores[row, i])).log() for row in range(6) for i in drawn[row]) / 12
    found = model.loss(ITEMS, TARGETS, kind="bce", negatives=2)
    assert found.item() == pytest.approx(-float(positive + negative), rel=1e-5)


def test_negatives_are_never_of_their_own_row(monkeypatch):
    model, calls = small("gru4rec"), []
    monkeypatch.setattr("minionerec.baselines.models.draw_unseen", lambda *a: calls.append(a) or draw_unseen(*a))
    model.loss(ITEMS, TARGETS, kind="bce", negatives=4)
    [(seen, n_items, count)] = calls
    assert (n_items, count) == (N, 4)
    assert [set(row) - {PAD} for row in seen.tolist()] == [{3, 1, 4, 5}] * 4 + [{2, 6, 5, 9}, {8}]


def test_unseen_items_are_drawn_evenly():
    torch.manual_seed(0)
    seen = torch.tensor([[4, 0, 4, 8, 8], [8, 8, 8, 8, 7], [0, 1, 2, 3, 4]])
    drawn = draw_unseen(seen, 8, 30_000)
    for row, expected in enumerate(([1, 2, 3, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6], [5, 6, 7])):
        values, times = drawn[row].unique(return_counts=True)
        assert values.tolist() == expected
        share = 30_000 / len(expected)
        assert (times - share).abs().max() < 5 * share**0.5


@every_model
def test_dropout_is_in_the_loss(name):
    model = small(name).train()
    assert model.loss(ITEMS, TARGETS).item() != model.loss(ITEMS, TARGETS).item()


@torch.no_grad()
def test_each_dropout_of_sasrec():
    """Each dropout of 0.5 keeps half of the values, twice as large; two in a row give zeros and four times as much."""
    model = small(num_layers=1)
    [block], model.norm, items = model.blocks, torch.nn.Identity(), torch.full((50, 1), 3)
    for p in block.parameters():
        p.zero_()
    x = model(items)
    found = model.train()(items) / x  # the block adds 0
    assert found.unique().tolist() == [0, 2]
    nothing, eye = torch.zeros(50, 1, 16), torch.eye(16)
    block.query_key_value.bias.fill_(1)
    block.output.weight.copy_(eye)
    assert block(nothing).unique().tolist() == [0, 4]  # of the attention's weights, then of its output
    block.output.weight.zero_()
    block.feed[0].bias.fill_(1)
    block.feed[3].weight.copy_(eye)
    assert block(nothing).unique().tolist() == [0, 4]  # of the hidden layer, then of its output


@torch.no_grad()
@pytest.mark.parametrize(("num_layers", "embedded"), [(1, True), (2, False)])
def test_each_dropout_of_gru4rec(num_layers, embedded):
    """Dropout of the embeddings, or, where these are 0, between the layers changes states; dropout of states follows."""
    model, items = small("gru4rec", num_layers=num_layers), torch.tensor([[3, 1, 4]] * 20)
    model.output.weight.copy_(torch.eye(16))
    model.output.bias.zero_()
    if not embedded:
        model.items.weight.zero_()
    states, found = model(items), model.train()(items)
    kept = found != 0
    assert 0.4 < kept.float().mean() < 0.6
    assert not torch.allclose(found[kept], 2 * states[kept], atol=1e-3)


# ------------------------------------------------------------------------------------------------ checkpoints


@every_model
@every_input
@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_checkpoint_gives_equal_scores(tmp_path, name, features, tied):
    model, histories = small(name, tie_embeddings=tied, features=features), [[1, 2, 3], [11], []]
    model.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_checkpoint(tmp_path, n_items=N)
    assert type(loaded) is MODELS[name] and not loaded.training
    assert torch.equal(loaded.scores(histories), model.scores(histories))


@pytest.mark.parametrize("name", counts.MODELS)
def test_counted_models_load_too(tmp_path, name):
    counts.save(tmp_path, name, pl.DataFrame({"history": [[0], [0, 1]], "target": [1, 2]}), N)
    loaded = load_checkpoint(tmp_path, n_items=N)
    assert type(loaded) is LOADABLE[name] and loaded.scores([[0]]).shape == (1, N)
    with pytest.raises(UserError, match="catalog of 12 items, and this one has 13"):
        load_checkpoint(tmp_path, n_items=13)


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
