"""Constrained decoding: users a second of `transformers`' beam search and of ours in both spaces, side by side.

    python -m benchmarks.decode                       # two catalogs at 10, 50 and 200 beams
    python -m benchmarks.decode --beams 50 --json     # the four ratios, as JSON in the last line

A Qwen2 of 45 million random weights (hidden 256, 6 layers, vocabulary 152,204), prompts of 97 tokens, 8 a batch. The
SIDs are random, three levels of 256 codes. Every round times each search once, in turn, so that a busy machine slows
all of them; figures are medians over rounds. `transformers` is timed on fewer prompts and rounds (`--hf_prompts`,
`--hf_rounds`), at the small catalog, up to 50 beams: it is that slow. The floor is the prompts' forward with the
logits of the last position, which every search needs.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.hf_argparser import HfArg

from minionerec.catalog.trie import Trie
from minionerec.common.errors import UserError
from minionerec.common.options import run
from minionerec.decoding.beam_search import beam_search

VOCABULARY, CODES, LEVELS = 152_204, 256, 3
FIRST_TOKEN = VOCABULARY - CODES * LEVELS  # the SID tokens are the vocabulary's last


@dataclass
class Options:
    device: str = HfArg(default="", help="cpu or cuda; default: cuda where there is one")
    dtype: str = HfArg(default="", help="float32 or bfloat16; default: bfloat16 on cuda, float32 on the CPU")
    beams: str = HfArg(default="10,50,200", help="numbers of beams, by commas")
    items: str = HfArg(default="3686,1000000", help="sizes of the catalogs, the small one first, by commas")
    batch_size: int = HfArg(default=8, help="prompts a batch")
    prompt_tokens: int = HfArg(default=97, help="tokens a prompt")
    rounds: int = HfArg(default=5, help="rounds of which the median is taken")
    hf_prompts: int = HfArg(default=4, help="prompts a batch for transformers' search; 0 leaves it out")
    hf_rounds: int = HfArg(default=1, help="rounds of transformers' search")
    hf_beams: int = HfArg(default=50, help="the most beams that transformers' search is timed at")
    threads: int = HfArg(default=0, help="CPU threads; 0: torch's own choice")
    json: bool = HfArg(default=False, help="print the ratios as JSON in the last line")

    def numbers(self, flag: str) -> list[int]:
        try:
            values = [int(part) for part in getattr(self, flag).split(",")]
        except ValueError:
            values = []
        if not values or min(values) < 1:
            raise UserError(f"--{flag} {getattr(self, flag)}: expected whole numbers above 0, by commas, as in 10,50")
        return values


def random_model(device: str, dtype: torch.dtype):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
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


def random_trie(items: int) -> Trie:
    """A trie of `items` distinct random SIDs."""
    if items > CODES**LEVELS // 2:
        raise UserError(f"--items {items}: expected at most {CODES**LEVELS // 2}, half of all SIDs")
    rng = np.random.default_rng(0)
    drawn = np.unique(rng.integers(CODES**LEVELS, size=items + items // 4 + 100))
    drawn = rng.permutation(drawn)[:items]
    codes = np.stack([drawn // CODES ** (LEVELS - 1 - level) % CODES for level in range(LEVELS)], axis=1)
    return Trie.build(codes + FIRST_TOKEN + CODES * np.arange(LEVELS))


def transformers_search(model, trie: Trie, ids: torch.Tensor, mask: torch.Tensor, beams: int) -> Callable:
    """The search of `generate` under a dictionary from prefix to tokens."""
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


@torch.no_grad()
def seconds(work: dict[str, Callable], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each function over `rounds` rounds, one call of each a round; the first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, function in work.items():
            started = time.perf_counter()
            function()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if number:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def main(options: Options) -> None:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.startswith("cuda") else "float32"), None)
    if dtype not in (torch.float32, torch.bfloat16):
        raise UserError(f"--dtype {options.dtype}: expected float32 or bfloat16")
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes, beam_numbers = options.numbers("items"), options.numbers("beams")
    small = sizes[0]

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "cpu"
    model = random_model(device, dtype)
    print(f"{name}, {torch.get_num_threads()} threads, {str(dtype)[6:]}, torch {torch.__version__}")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights, {options.batch_size} prompts a batch")
    tries = {}
    for size in sizes:
        started = time.perf_counter()
        tries[size] = random_trie(size)
        print(f"trie of {size:,} items built in {time.perf_counter() - started:.2f} s")
        tries[size] = tries[size].to(device)
    ids = torch.randint(FIRST_TOKEN, (options.batch_size, options.prompt_tokens), device=device)
    mask = torch.ones_like(ids)

    work: dict = {"prompt": lambda: model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)}
    for beams in beam_numbers:
        for size, trie in tries.items():
            for space in ("vocab", "catalog"):
                work[space, size, beams] = lambda trie=trie, beams=beams, space=space: beam_search(
                    model, trie, ids, mask, beams, space=space
                )
    taken = {key: value / options.batch_size for key, value in seconds(work, options.rounds, device).items()}
    floor = taken.pop("prompt")
    if options.hf_prompts:
        few = slice(options.hf_prompts)
        hf = {
            ("transformers", small, beams): transformers_search(model, tries[small], ids[few], mask[few], beams)
            for beams in beam_numbers
            if beams <= options.hf_beams
        }
        if options.hf_rounds < 1:
            raise UserError(f"--hf_rounds {options.hf_rounds}: expected at least 1")
        slow = seconds(hf, options.hf_rounds, device)
        taken |= {key: value / min(options.hf_prompts, options.batch_size) for key, value in slow.items()}

    print(f"\nprompts' forward alone: {1 / floor:,.1f} users/s\n")
    print(f"{'items':>10}{'beams':>7}{'search':>14}{'users/s':>10}{'x prompt':>10}{'x transformers':>16}")
    for (space, size, beams), value in sorted(taken.items(), key=lambda pair: (pair[0][1], pair[0][2], -pair[1])):
        slow = taken.get(("transformers", small, beams))
        ratio = f"{slow / value:>16.1f}" if slow else f"{'-':>16}"
        print(f"{size:>10,}{beams:>7}{space:>14}{1 / value:>10.2f}{value / floor:>10.2f}{ratio}")

    beams, large = 50 if 50 in beam_numbers else beam_numbers[0], sizes[-1]
    own = {space: taken[space, small, beams] for space in ("vocab", "catalog")}
    slow = taken.get(("transformers", small, beams))
    result = {
        "device": name,
        "beams": beams,
        "vocab_ratio": slow and round(slow / own["vocab"], 2),
        "catalog_ratio": slow and round(slow / own["catalog"], 2),
        "catalog_over_prompt_forward": round(own["catalog"] / floor, 3),
        "million_over_small": round(taken["catalog", large, beams] / own["catalog"], 3),
    }
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run(main, Options)
