"""Tokenising SFT rows: one row at a time, in one batched call, and ours, side by side.

    python -m benchmarks.data --json

50,000 rows of the default tasks on MovieLens-100K. One row at a time is two calls of the tokenizer, for the prompt and
for the answer; it is timed on a part of the rows and scaled up. Ours is minionerec/language_model/tokenizing.py. Medians
over rounds in which the three take turns.
"""

import json
import statistics
import time
from dataclasses import dataclass

from benchmarks import movielens_rows
from minionerec.common.errors import UserError
from minionerec.common.options import option, run
from minionerec.language_model.tokenizing import tokenize


@dataclass
class Options:
    tokenizer: str = option("", movielens_rows.TOKENIZER_HELP)
    rows: int = option(50_000, "rows to tokenise")
    one_by_one: int = option(5_000, "how many of them are timed one by one")
    rounds: int = option(5, "rounds of which the median is taken")
    json: bool = option(False, "print the ratio as JSON in the last line")

    def __post_init__(self):
        for name in ("rows", "one_by_one", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: expected at least 1")


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
            result = None  # the previous result is freed before the clock starts
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
