"""What is trained, and what is saved of it.

Invariants: with --freeze_LLM only the new rows change and have optimizer state; LoRA's merged model computes what the
adapted one did; for every architecture that is accepted, the loss of the trained model is the loss of the saved one.
"""

import copy

import pytest
import torch
from language_model.small_models import ARCHITECTURES, WITH_BIAS, plain_loss, random_model, random_rows, train
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from minionerec.catalog.trie import Trie
from minionerec.common.errors import UserError
from minionerec.decoding.beam_search import beam_search
from minionerec.language_model.adapters import add_lora, lora_config, merged_weights, train_new_rows

NEW = list(range(100, 120))


def adapted(model, how: str):
    if how == "frozen":
        return train_new_rows(model, NEW, "base")
    return add_lora(model, NEW, 4, 8, 0.0, "all-linear") if how == "lora" else model


def merged(model):
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


@pytest.mark.parametrize("how", ["full", "frozen", "lora"])
@pytest.mark.parametrize(
    "name", [name for name in ARCHITECTURES if name not in ("bloom", "mamba")]
)  # those are refused
def test_the_trained_loss_is_that_of_the_saved_model(tmp_path, name, how):
    rows = random_rows()
    trainer = train(tmp_path / "run", adapted(random_model(name, 0.1), how), rows)
    trained = trainer.evaluate()["eval_loss"]
    merged(trainer.model).save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert plain_loss(saved, rows) == pytest.approx(trained, abs=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", *WITH_BIAS])
def test_merged_weights_are_those_of_the_merged_model_which_is_left_as_it_was(name):
    model = get_peft_model(random_model(name), lora_config(4, 8, 0.0, "all-linear"))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1, generator=generator)
    before = copy.deepcopy(model.state_dict())
    found = dict(merged_weights(model))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    expected = dict(model.merge_and_unload().named_parameters(remove_duplicate=False))  # a tied head too
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value.data, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2", *WITH_BIAS])  # tied, untied, tied, with a bias
def test_frozen_llm_trains_only_the_new_rows(tmp_path, name):
    model = random_model(name)
    base = copy.deepcopy(model.state_dict())
    trainer = train(tmp_path, train_new_rows(model, NEW, "base"), random_rows(), weight_decay=0.1)
    states = [state["exp_avg"].shape for state in trainer.optimizer.state.values()]
    assert states == [(20, 32)] * (1 if name in ("qwen2", "gpt2") else 2)  # only the new rows have optimizer state
    after = trainer.model.merge_and_unload().state_dict()
    assert after.keys() == base.keys()
    for key in base:
        if base[key].shape == (120, 32):
            assert torch.equal(after[key][:100], base[key][:100])
            assert (after[key][100:] != base[key][100:]).any(dim=1).all()
        else:
            assert torch.equal(after[key], base[key])


def test_freezing_without_new_tokens_is_refused():
    with pytest.raises(UserError, match="base already has every SID token, so there is no new row to train"):
        train_new_rows(random_model("qwen2"), [], "base")


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2"])
def test_lora_trains_adapters_and_new_rows(tmp_path, name):
    model = random_model(name)
    base = copy.deepcopy(model.state_dict())
    after = train(tmp_path, adapted(model, "lora"), random_rows()).model.merge_and_unload().state_dict()
    assert after.keys() == base.keys()
    inner = [key for key in base if ".0." in key and base[key].ndim == 2]  # the first layer's matrices
    assert inner and all(not torch.equal(after[key], base[key]) for key in inner)
    for key in base:
        if base[key].shape == (120, 32):
            assert torch.equal(after[key][:100], base[key][:100]) and not torch.equal(after[key][100:], base[key][100:])


@pytest.mark.parametrize("name", ["qwen2", "llama", "phi"])
@pytest.mark.parametrize("how", ["frozen", "lora"])
def test_search_with_adapters_is_search_with_merged_weights(tmp_path, name, how):
    trainer = train(tmp_path, adapted(random_model(name), how), random_rows())
    trie = Trie.build([[100 + i, 110 + j] for i in range(5) for j in range(5)])
    ids = torch.arange(1, 13).view(2, 6)
    trainer.model.eval()
    found = beam_search(trainer.model, trie, ids, torch.ones_like(ids), 8)
    expected = beam_search(trainer.model.merge_and_unload(), trie, ids, torch.ones_like(ids), 8)
    assert torch.equal(found.row, expected.row)
    torch.testing.assert_close(found.score, expected.score, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["frozen", "lora"])
def test_a_disabled_adapter_gives_the_base_model(how):
    model, ids = random_model("phi", 0.1), torch.arange(1, 13).view(2, 6)
    expected = model(input_ids=ids).logits
    wrapped = adapted(copy.deepcopy(model), how).eval()
    torch.testing.assert_close(wrapped(input_ids=ids).logits, expected)
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(input_ids=ids).logits, expected)


@pytest.mark.parametrize("new_ids", [NEW, []])
@pytest.mark.parametrize(
    "name, target",
    [("qwen2", "embed_tokens"), ("llama", "q_proj, lm_head"), ("gpt2", "wte"), ("gpt_neox", "embed_in")],
)
def test_adapters_on_embeddings_are_refused(name, target, new_ids):
    with pytest.raises(UserError, match=f"--lora_target_modules {target}: .* is an embedding or the LM head"):
        add_lora(random_model(name), new_ids, 4, 8, 0.0, target)


def test_an_unknown_module_is_named():
    with pytest.raises(UserError, match="--lora_target_modules nonsense"):
        add_lora(random_model("qwen2"), [100], 4, 8, 0.0, "nonsense")
