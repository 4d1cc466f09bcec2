"""The cost of a run, before it starts.

Invariants: rows longer than the model's positions are refused; the estimate counts trained parameters apart.
"""

from types import SimpleNamespace

import pytest
from language_model.small_models import random_model, random_rows, rows_of

from minionerec.common.errors import UserError
from minionerec.language_model.adapters import train_new_rows
from minionerec.language_model.batches import EpochOrder, Lines
from minionerec.language_model.memory import check_and_print, memory_estimate


def arguments(**more):
    defaults = {"per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False, "process_index": 0}
    return SimpleNamespace(**defaults | more)


def test_rows_longer_than_the_positions_are_refused():
    expected = "the longest row has 300 tokens, the model 256 positions; lower --cutoff_len to 256"
    with pytest.raises(UserError, match=expected):
        check_and_print(random_model("gpt2"), [], Lines(rows_of([300])), SimpleNamespace(), arguments())


def test_the_first_lines_say_what_a_run_costs(capsys, monkeypatch):
    model = train_new_rows(random_model("qwen2"), list(range(100, 120)), "base")
    lines = Lines(random_rows())
    check_and_print(model, list(range(20)), lines, EpochOrder(lines.lengths, 8, 0, by_length=True), arguments())
    printed = capsys.readouterr().out
    assert f"{20 * 32} trained, 20 new tokens\n21 rows in 21 lines, {lines.lengths.sum()} tokens, 3 steps" in printed
    monkeypatch.setenv("RANK", "1")
    check_and_print(model, [], lines, EpochOrder(lines.lengths, 8, 0, by_length=True), arguments(process_index=1))
    assert capsys.readouterr().out == ""


def test_only_trained_parameters_have_optimizer_state():
    lines = Lines(random_rows())
    full = memory_estimate(random_model("qwen2"), lines, 4, bf16=False, checkpointing=False)
    frozen = memory_estimate(train_new_rows(random_model("qwen2"), [1, 2], "base"), lines, 4, False, False)
    parameters = sum(p.numel() for p in random_model("qwen2").parameters())
    assert full["state"] == 16 * parameters and frozen["state"] == 4 * parameters + 16 * 2 * 32
    assert memory_estimate(random_model("qwen2"), lines, 4, False, True)["activations"] < full["activations"]
