"""The estimate of a model's memory needs only its config, and agrees with what sft.py prints."""

import re
import shutil

import pytest

from minionerec.common.errors import UserError
from minionerec.language_model import estimate
from minionerec.language_model.checkpoints import load_model
from minionerec.language_model.estimate import Options, empty_model, state_bytes
from minionerec.language_model.memory import memory_of_step


def test_only_the_config_is_read(base_model, tmp_path):
    shutil.copy(base_model / "config.json", tmp_path)
    empty, real = empty_model(str(tmp_path), 0), load_model(base_model, "base_model")
    assert empty.num_parameters() == real.num_parameters() and {p.device.type for p in empty.parameters()} == {"meta"}
    assert memory_of_step(empty, 100, 10, False, False) == memory_of_step(real, 100, 10, False, False)
    added = empty_model(str(tmp_path), 100).num_parameters() - real.num_parameters()
    assert added == 100 * real.config.hidden_size * (1 if real.config.tie_word_embeddings else 2)


def test_state_is_divided_as_zero_says():
    """ZeRO, figure 1: 7.5 billion parameters on 64 GPUs take 120, 16.6 and 1.9 GB."""
    found = state_bytes(7_500_000_000, 64)
    assert [round(size / 1e9, 1) for size in found.values()] == [120.0, 16.6, 1.9]
    assert len({*state_bytes(10, 1).values()}) == 1


def test_the_table(base_model, capsys):
    estimate.main(Options(base_model=str(base_model), processes=4, micro_batch_size=2, row_tokens=10))
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert "4 processes, 20 tokens per forward" in first and [row.split()[0] for row in rows] == [
        "DDP",
        "ZeRO-2",
        "ZeRO-3",
    ]
    assert all(re.fullmatch(r"\S+( +\d+\.\d){4}", row) for row in rows)


def test_what_is_no_model_is_one_line(tmp_path):
    with pytest.raises(UserError, match="found no readable config of a causal language model .*check --base_model"):
        empty_model(str(tmp_path), 0)
