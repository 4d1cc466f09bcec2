"""benchmarks/grpo_step.py runs at a tiny size, and the sides that it compares take the same step."""

import io
import json

import pytest
from helpers import run_stage

from benchmarks import grpo_step
from minionerec.common.errors import UserError
from minionerec.common.options import parse

TINY = ["--vocabulary", "1000", "--prompts", "2", "--prompt_tokens", "5", "--completions", "3", "--items", "40"]


def test_the_command():
    done = run_stage(
        "benchmarks.grpo_step", *TINY, "--sides", "trl,catalog", "--rounds", "1", "--device", "cpu", "--json"
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["catalog_ratio"] == result["catalog_ratio_to_trl"] > 0
    assert result["catalog_memory_ratio_to_trl"] > 0


def test_the_sides_take_the_same_step(monkeypatch, capsys):
    """Two steps of each side: the losses agree, before and after an update, where the space is the same."""
    options = parse(grpo_step.Options, TINY)
    losses = {}
    for options.side in grpo_step.SIDES:
        monkeypatch.setattr("sys.stdin", io.StringIO("step\nstep\n"))
        grpo_step.be_side(options, "cpu")
        answers = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        assert len(answers) == 2 and all(set(answer["seconds"]) == set(grpo_step.PARTS) for answer in answers)
        losses[options.side] = [answer["loss"] for answer in answers]
    assert losses["logits"] == pytest.approx(losses["trl"], abs=1e-5)
    assert losses["vocab"] == pytest.approx(losses["trl"], abs=1e-5)


@pytest.mark.vllm
def test_vllm_takes_the_step_of_catalog(vllm_engines, monkeypatch, capfd):
    options, losses = parse(grpo_step.Options, TINY), {}
    for options.side in ("catalog", "vllm"):
        monkeypatch.setattr("sys.stdin", io.StringIO("step\nstep\nstep\n"))
        grpo_step.be_side(options, "cpu")
        lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
        losses[options.side] = [json.loads(line)["loss"] for line in lines]
    assert losses["vllm"] == pytest.approx(losses["catalog"], abs=1e-5) and len(losses["vllm"]) == 3


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"sides": "trl,other"}, "--sides trl,other: found 'other', expected some of trl, logits"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"prompts": 0}, "--prompts 0: expected at least 1"),
        ({"device": "cuda:77"}, "--device cuda:77 is not on this machine"),
    ],
)
def test_wrong_options(wrong, message):
    with pytest.raises(UserError, match=message):
        grpo_step.main(grpo_step.Options(**({"device": "cpu"} | wrong)))
