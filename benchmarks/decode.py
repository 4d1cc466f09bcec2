"""Constrained decoding: users per second of `transformers`' beam search and of ours in both spaces, side by side.

    python -m benchmarks.decode                       # two catalogs at 10, 50 and 200 beams
    python -m benchmarks.decode --beams 50 --json     # the ratios, as JSON in the last line
    python -m benchmarks.decode --vllm                # vLLM too (docs/vllm.md)

A Qwen2 of 45 million random weights (hidden 256, 6 layers, vocabulary 152,204), prompts of 97 tokens, 8 per batch. The
SIDs are random, three levels of 256 codes. Each round times every search once, one after the other, so that other work on the
machine slows all of them; figures are medians over rounds. `transformers` is slow, so it is timed on fewer prompts and
rounds (`--hf_prompts`, `--hf_rounds`), with the small catalog and up to 50 beams. The floor is the prompts' forward
with the logits of the last position, which every search needs. vLLM searches in the catalog's space, the small catalog,
with its cache of earlier prompts emptied before each call.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.shared import (
    VOCABULARY,
    VOCABULARY_HELP,
    device_name,
    dtype_of,
    finish,
    first_sid_token,
    random_model,
    random_sids,
    transformers_search,
    vllm_engine_of,
)
from minionerec.catalog.trie import Trie
from minionerec.common.devices import pick_device
from minionerec.common.errors import UserError
from minionerec.common.options import option, run
from minionerec.decoding.beam_search import beam_search


@dataclass
class Options:
    device: str = option("", "cpu or cuda; default: cuda if there is a GPU")
    dtype: str = option("", "float32 or bfloat16; default: bfloat16 on cuda, float32 on the CPU")
    beams: str = option("10,50,200", "numbers of beams, separated by commas")
    items: str = option("3686,1000000", "sizes of the catalogs, the small one first, separated by commas")
    vocabulary: int = option(VOCABULARY, VOCABULARY_HELP)
    batch_size: int = option(8, "prompts per batch")
    prompt_tokens: int = option(97, "tokens per prompt")
    rounds: int = option(5, "rounds of which the median is taken")
    hf_prompts: int = option(4, "prompts per batch for transformers' search; 0: skip it")
    hf_rounds: int = option(1, "rounds of transformers' search")
    hf_beams: int = option(50, "the most beams that transformers' search is timed with")
    vllm: bool = option(False, "also time vLLM")
    threads: int = option(0, "CPU threads; 0: torch's default")
    json: bool = option(False, "print the ratios as JSON in the last line")

    def __post_init__(self):
        for name in ("batch_size", "prompt_tokens", "rounds", "hf_rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: expected at least 1")

    def numbers(self, flag: str) -> list[int]:
        try:
            values = [int(part) for part in getattr(self, flag).split(",")]
        except ValueError:
            values = []
        if not values or min(values) < 1:
            raise UserError(f"--{flag} {getattr(self, flag)}: expected whole numbers above 0, as in 10,50")
        return values


@torch.no_grad()
def seconds(work: dict[str, Callable], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each function over `rounds` rounds, one call of each per round, after one round of warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, function in work.items():
            started = time.perf_counter()
            function()
            finish(device)
            if number:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def main(options: Options) -> None:
    device = str(pick_device(options.device))
    dtype = dtype_of(options.dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes, beam_numbers = options.numbers("items"), options.numbers("beams")
    small = sizes[0]

    # model, catalogs, prompts
    model = random_model(device, dtype, options.vocabulary)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, {str(dtype)[6:]}, torch {torch.__version__}")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights, {options.batch_size} prompts per batch")
    tries = {}
    for size in sizes:
        started = time.perf_counter()
        trie = Trie.build(random_sids(size, options.vocabulary))
        print(f"trie of {size:,} items built in {time.perf_counter() - started:.2f} s")
        tries[size] = trie.to(device)
    ids = torch.randint(first_sid_token(options.vocabulary), (options.batch_size, options.prompt_tokens), device=device)
    mask = torch.ones_like(ids)

    # seconds per prompt of every search
    work: dict = {"prompt": lambda: model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)}
    for beams in beam_numbers:
        for size, trie in tries.items():
            for space in ("vocab", "catalog"):
                work[space, size, beams] = lambda trie=trie, beams=beams, space=space: beam_search(
                    model, trie, ids, mask, beams, space=space
                )
    if options.vllm:
        engine, prompts = vllm_engine_of(model, tries[small], dtype), ids.tolist()

        def by_vllm(beams: int) -> None:
            engine.llm.reset_prefix_cache()
            engine.beam_search(prompts, beams)

        work |= {("vllm", small, beams): lambda beams=beams: by_vllm(beams) for beams in beam_numbers}
    taken = {key: value / options.batch_size for key, value in seconds(work, options.rounds, device).items()}
    floor = taken.pop("prompt")
    if options.hf_prompts:
        few = slice(options.hf_prompts)
        hf = {
            ("transformers", small, beams): transformers_search(model, tries[small], ids[few], mask[few], beams)
            for beams in beam_numbers
            if beams <= options.hf_beams
        }
        slow = seconds(hf, options.hf_rounds, device)
        taken |= {key: value / min(options.hf_prompts, options.batch_size) for key, value in slow.items()}

    # the table
    print(f"\nonly the prompts' forward: {1 / floor:,.1f} users/s\n")
    print(f"{'items':>10}{'beams':>7}{'search':>14}{'users/s':>10}{'x prompt':>10}{'x transformers':>16}")
    for (space, size, beams), value in sorted(taken.items(), key=lambda pair: (pair[0][1], pair[0][2], -pair[1])):
        slow = taken.get(("transformers", small, beams))
        ratio = f"{slow / value:>16.1f}" if slow else f"{'-':>16}"
        print(f"{size:>10,}{beams:>7}{space:>14}{1 / value:>10.2f}{value / floor:>10.2f}{ratio}")

    beams, large = 50 if 50 in beam_numbers else beam_numbers[0], sizes[-1]
    own = {space: taken[space, small, beams] for space in ("vocab", "catalog")}
    slow = taken.get(("transformers", small, beams))
    result = {
        "device": device_name(device),
        "beams": beams,
        "vocab_ratio": slow and round(slow / own["vocab"], 2),
        "catalog_ratio": slow and round(slow / own["catalog"], 2),
        "catalog_over_prompt_forward": round(own["catalog"] / floor, 3),
        "million_over_small": round(taken["catalog", large, beams] / own["catalog"], 3),
    }
    if options.vllm:
        result["catalog_ratio_to_vllm"] = round(taken["vllm", small, beams] / own["catalog"], 2)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run(main, Options)
