"""benchmarks/data.py runs at a tiny size."""

import json

from helpers import run_stage


def test_the_command(base_model):
    done = run_stage(
        "benchmarks.data", "--tokenizer", base_model, "--rows", "60", "--one_by_one", "9", "--rounds", "1", "--json"
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ratio"] > 0 and set(result["seconds"]) == {"one by one", "batched", "ours"}
    assert done.stdout.startswith("60 rows, ")
