"""What several benchmarks share: a model of random weights, a catalog of random SIDs, the machine and its memory."""

import platform
import resource
import sys
import tempfile
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from minionerec.catalog.trie import Trie
from minionerec.common.errors import UserError

VOCABULARY, CODES, LEVELS = 152_204, 256, 3  # the SID tokens are the vocabulary's last CODES * LEVELS
VOCABULARY_HELP = "tokens of the model, SID tokens included"


def first_sid_token(vocabulary: int) -> int:
    """The least id of a SID token. Raises `UserError` where the vocabulary has no room for other tokens."""
    if vocabulary <= CODES * LEVELS:
        raise UserError(f"--vocabulary {vocabulary}: expected more than the {CODES * LEVELS} SID tokens")
    return vocabulary - CODES * LEVELS


def random_model(device: str, dtype: torch.dtype, vocabulary: int = VOCABULARY):
    """A Qwen2 of hidden size 256 with 6 layers: 45 million weights with the default vocabulary."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    model = AutoModelForCausalLM.from_config(config).eval().to(device, dtype)
    model.generation_config.pad_token_id = 0
    return model


def random_sids(items: int, vocabulary: int = VOCABULARY) -> np.ndarray:
    """Token ids (items, LEVELS) of distinct random SIDs."""
    if items > CODES**LEVELS // 2:
        raise UserError(f"--items {items}: expected at most {CODES**LEVELS // 2}, half of all SIDs")
    rng = np.random.default_rng(0)
    drawn = np.unique(rng.integers(CODES**LEVELS, size=items + items // 4 + 100))
    drawn = rng.permutation(drawn)[:items]
    codes = np.stack([drawn // CODES ** (LEVELS - 1 - level) % CODES for level in range(LEVELS)], axis=1)
    return codes + first_sid_token(vocabulary) + CODES * np.arange(LEVELS)


def transformers_search(model, trie: Trie, ids: torch.Tensor, mask: torch.Tensor, beams: int) -> Callable:
    """The beam search of `generate` with `prefix_allowed_tokens_fn`, which looks a prefix up in a dictionary."""
    children: dict[tuple, list[int]] = {}
    prefixes = {0: ()}
    token, start = trie.child_token.tolist(), trie.start.tolist()
    for node in range(len(start) - 1):
        for edge in range(start[node], start[node + 1]):
            children.setdefault(prefixes[node], []).append(token[edge])
            prefixes[edge + 1] = (*prefixes[node], token[edge])
    length = ids.shape[1]
    return lambda: model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=LEVELS,
        do_sample=False,
        length_penalty=0.0,
        prefix_allowed_tokens_fn=lambda _, tokens: children[tuple(tokens[length:].tolist())],
        return_dict_in_generate=True,
        output_scores=True,
    )


def vllm_engine_of(model, trie: Trie, dtype: torch.dtype):
    """vLLM with the weights of `model`, in the catalog's space."""
    from minionerec.decoding.backends import require_vllm
    from minionerec.decoding.engine import vllm_engine

    require_vllm("vllm")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return vllm_engine(folder, trie, 0, "catalog", dtype=dtype, memory=0.3)


# ------------------------------------------------------------------------------------------------ the machine


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "cpu"


def dtype_of(name: str) -> torch.dtype:
    """Raises `UserError` for anything but float32 and bfloat16."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise UserError(f"--dtype {name}: expected float32 or bfloat16")
    return dtypes[name]


def finish(device: str) -> None:
    """Wait for all queued work of the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_memory(device: str) -> int:
    """Bytes: the most that was allocated on the GPU, or the largest resident set of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
