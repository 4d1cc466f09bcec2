"""Tree attention: padding side, precision and autocast change nothing; models that cannot decode a tree are refused."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from decoding.small_models import CONFIGS, MIXED, SMALL, VOCABULARY, prompts_of, random_model, random_sids
from transformers import MambaConfig, MistralConfig, Qwen2Config

from minionerec.catalog.trie import Trie
from minionerec.common.errors import UserError
from minionerec.decoding.beam_search import beam_search, sample


@pytest.mark.parametrize("space", ["vocab", "catalog"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_padding_on_the_right_changes_nothing(architecture, space):
    model, sids = random_model(CONFIGS[architecture]()), random_sids(60)
    ids, mask = prompts_of([3, 8, 5])
    left = beam_search(model, Trie.build(sids), ids, mask, 6, space=space)
    rolled = [(-int(8 - n), row) for row, n in enumerate([3, 8, 5])]
    right_ids = torch.stack([ids[row].roll(shift) for shift, row in rolled])
    right_mask = torch.stack([mask[row].roll(shift) for shift, row in rolled])
    right = beam_search(model, Trie.build(sids), right_ids, right_mask, 6, space=space)
    assert right_mask[0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0] and torch.equal(left.row, right.row)
    torch.testing.assert_close(left.score, right.score, atol=1e-4, rtol=0)


def test_architectures_that_cannot_decode_a_tree_are_refused():
    arguments = (Trie.build(MIXED), torch.tensor([[3, 4]]), torch.ones(1, 2, dtype=torch.long), 3)
    recurrent = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(UserError, match="MambaForCausalLM .*use a(nother| decoder)"):
        beam_search(random_model(recurrent), *arguments)
    window = MistralConfig(vocab_size=VOCABULARY, num_key_value_heads=2, sliding_window=16, **SMALL)
    model, (ids, mask) = random_model(window), prompts_of([12])
    assert beam_search(model, *arguments).row.shape == (1, 3)  # a row of 2 + 3 * 3 tokens fits
    with pytest.raises(UserError, match="18 tokens .*longer than the model's attention window of 16"):
        beam_search(model, arguments[0], ids, mask, 3)
    full = random_model(Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=2, sliding_window=16, **SMALL))
    assert beam_search(full, arguments[0], ids, mask, 3).row.shape == (1, 3)
    flash = random_model(CONFIGS["qwen2"]())
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="flash_attention_2, which takes no 4D mask"):
        sample(flash, *arguments)
    other = random_model(CONFIGS["llama"]())
    other.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)  # not in the config
    with pytest.raises(UserError, match="gives other logits for a tree"):
        beam_search(other, *arguments)


@pytest.mark.parametrize("outside", [False, True])
def test_a_model_under_autocast_is_not_taken_for_another_architecture(outside):
    model, (ids, mask) = random_model(CONFIGS["qwen2"]()), prompts_of([4, 7])
    AcceleratorState._reset_state(reset_partial_state=True)
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        assert beam_search(model, Trie.build(MIXED), ids, mask, 3).row.shape == (2, 3)


@pytest.mark.parametrize("space", ["vocab", "catalog"])
def test_bfloat16_is_legal_and_close(space):
    model, sids = random_model(CONFIGS["qwen2"]()), random_sids(60)
    ids, mask = prompts_of([4, 7])
    trie = Trie.build(sids)
    exact = beam_search(model, trie, ids, mask, 60, space=space)
    rough = beam_search(model.bfloat16(), trie, ids, mask, 60, space=space)
    assert rough.score.dtype == torch.float32
    for row in range(2):
        assert sorted(rough.row[row].tolist()) == list(range(len(sids)))
        error = rough.score[row][rough.row[row].argsort()] - exact.score[row][exact.row[row].argsort()]
        assert error.abs().mean() < 0.3  # scores spread over tens of nats
