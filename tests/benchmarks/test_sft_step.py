"""benchmarks/sft_step.py runs at a tiny size, on both sides."""

import json

import pytest
from helpers import run_stage

from benchmarks import sft_step
from minionerec.common.errors import UserError


def test_the_command(base_model):
    sizes = ["--vocabulary", "2000", "--batch_size", "2", "--steps", "1", "--rounds", "1"]
    done = run_stage("benchmarks.sft_step", "--tokenizer", base_model, *sizes, "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["time_ratio"] > 0 and result["memory_ratio"] > 0
    assert "plain" in done.stdout and "the estimate was" in done.stdout


def test_a_tokenizer_that_is_too_large(base_model):
    options = sft_step.Options(tokenizer=str(base_model), vocabulary=900, batch_size=1, side="ours")
    with pytest.raises(UserError, match="expected at most --vocabulary"):
        sft_step.measure(options)
