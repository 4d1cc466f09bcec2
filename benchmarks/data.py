"""Tokenising SFT rows: a row at a time, in one batched call, and ours (tokens.py), side by side.

    python -m benchmarks.data --json

50,000 rows of the default tasks on MovieLens-100K. A row at a time is two calls of the tokenizer, for the prompt and
for the answer; it is timed on a part of the rows, evenly spread, and scaled up. Medians over rounds that take turns.
"""

import json
import statistics
import time
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from benchmarks import movielens_rows
from minionerec.common.options import run
from minionerec.language_model.tokenizing import tokenize


@dataclass
class Options:
    tokenizer: str = HfArg(default="", help="a model folder; default: SmolLM2's tokenizer")
    rows: int = HfArg(default=50_000, help="rows to tokenise")
    one_by_one: int = HfArg(default=5_000, help="of them, how many are timed one by one")
    rounds: int = HfArg(default=5, help="rounds of which the median is taken")
    json: bool = HfArg(default=False, help="print the ratio as JSON in the last line")


def main(options: Options) -> None:
    tokenizer = movielens_rows.tokenizer_of(options.tokenizer)
    pairs = movielens_rows.pairs(options.rows)
    part = pairs[: options.one_by_one]

    def one_by_one() -> list[list[int]]:
        return [
            [
                *tokenizer(prompt)["input_ids"],
                *tokenizer(answer, add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id,
            ]
            for prompt, answer in part
        ]

    def batched():
        prompts, answers = zip(*pairs, strict=True)
        return tokenizer(list(prompts)), tokenizer(list(answers), add_special_tokens=False)

    def ours():
        return tokenize(pairs, tokenizer, "", "; ")

    taken = {"one by one": [], "batched": [], "ours": []}
    for _ in range(options.rounds):
        for name, function in zip(taken, (one_by_one, batched, ours), strict=True):
            result = None  # what the last one made is freed before the clock starts
            started = time.perf_counter()
            result = function()
            seconds = time.perf_counter() - started
            taken[name].append(seconds * (len(pairs) / len(part) if name == "one by one" else 1))
            if name == "one by one":
                expected = result
    rows = result
    assert all(rows.tokens[rows.start[i] : rows.start[i + 1]].tolist() == ids for i, ids in enumerate(expected))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    print(f"{len(pairs):,} rows, {len(rows.tokens):,} tokens; seconds, median of {options.rounds} rounds")
    for name, value in medians.items():
        print(f"{name:12}{value:8.2f}{medians['one by one'] / value:8.1f} x")
    if options.json:
        print(json.dumps({"ratio": round(medians["one by one"] / medians["ours"], 2), "seconds": medians}))


if __name__ == "__main__":
    run(main, Options)
