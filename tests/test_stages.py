"""The stages through their launchers and command lines, on a small world."""

import json
from pathlib import Path

import pytest
import torch
from helpers import run_stage
from safetensors.torch import load_file

import rl
from minionerec.common.errors import UserError


def rl_environment(world, model, output, **more):
    return {
        "MODEL_PATH": model,
        "TRAIN_FILE": world.train,
        "EVAL_FILE": world.valid,
        "INFO_FILE": world.info,
        "OUTPUT_DIR": output,
        "CATEGORY": "Toys_and_Games",
        "REWARD_TYPE": "ranking",
        "KEEP_START": "False",
        "METRIC_FOR_BEST_MODEL": "NDCG@10",
        "NUM_GENERATIONS": 4,
        "TRAIN_BATCH_SIZE": 16,
        "GRADIENT_ACCUMULATION_STEPS": 1,
        "NUM_TRAIN_EPOCHS": 1,
        "LEARNING_RATE": 1e-3,
        "EVAL_STEP": 0.5,
        "TEST_BEAM": 10,
        "NPROC": 1,
    } | more


def evaluate_environment(world, model, output, **more):
    return {
        "BASE_MODEL": model,
        "TEST_DATA_PATH": world.test,
        "INFO_FILE": world.info,
        "TRAIN_FILE": world.train,
        "RESULT_JSON_DATA": output,
        "CATEGORY": "Toys_and_Games",
        "NUM_BEAMS": 20,
        "NPROC": 1,
    } | more


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def test_rl(world, sft_checkpoint, tmp_path):
    done = run_stage("rl.sh", env=rl_environment(world, sft_checkpoint, tmp_path / "rl", TEST_DURING_TRAINING="True"))
    assert "test/HR@10" in done.stdout and "eval_NDCG@10" in done.stdout
    before, after = weights(sft_checkpoint), weights(tmp_path / "rl")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "rl" / "prompt.yaml").read_text() == (sft_checkpoint / "prompt.yaml").read_text()
    run_stage("evaluate.sh", env=evaluate_environment(world, tmp_path / "rl", tmp_path / "rl.json"))


# ------------------------------------------------------------------------------------------------ bad input


def test_rl_sh_asks_for_the_model_that_its_reward_needs(world, sft_checkpoint, tmp_path):
    environment = rl_environment(world, sft_checkpoint, tmp_path / "rl", REWARD_TYPE="rule,sasrec")
    refused = run_stage("rl.sh", env=environment, check=False)
    assert refused.returncode == 2 and "CF_PATH is not set" in refused.stderr and not (tmp_path / "rl").exists()


@pytest.mark.parametrize(
    "arguments, found",
    [
        (["sft.py", "--no_such_flag", "1"], "unknown option --no_such_flag"),
        (["sft.py", "--base", "x"], "unknown option --base"),  # no abbreviations
        (["sft.py", "--freeze_LLM", "True", "--use_lora", "True"], "exclude each other"),
        (["rl.py", "--num_generations", "many"], "invalid int value"),
        (["convert_dataset.py"], "required"),
    ],
)
def test_errors_are_one_line(arguments, found):
    done = run_stage(*arguments, check=False)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and found in lines[0]


def test_groups_that_do_not_fit_a_batch(world, base_model, tmp_path):
    options = {"train_file": str(world.train), "eval_file": str(world.valid), "info_file": str(world.info)}
    options |= {"model_path": str(base_model), "output_dir": str(tmp_path)}
    with pytest.raises(UserError, match="20 x .* 2 = 40 .*num_generations 16.*: 32 or 48"):
        rl.Options(**options, train_batch_size=20, gradient_accumulation_steps=2).check()
    with pytest.raises(UserError, match="found 47 distinct SIDs, expected at least --num_generations 64"):
        rl.read_catalog(rl.Options(**options, num_generations=64))


def test_rl_refuses_files_of_another_catalog(world, base_model, tmp_path):
    index = json.loads(world.index.read_text())
    index["3"] = ["<a_9>", "<b_9>", "<c_9>"]
    (tmp_path / "other.index.json").write_text(json.dumps(index))
    options = rl.Options(
        info_file=str(world.info),
        train_file=str(world.train),
        eval_file=str(world.valid),
        sid_index_path=str(tmp_path / "other.index.json"),
    )
    with pytest.raises(UserError, match="48 items that differ from the 48"):
        rl.read_catalog(options)


# ------------------------------------------------------------------------------------------------ slow


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config", ["zero2_opt", "cpu"])
def test_rl_on_two_processes(world, sft_checkpoint, tmp_path, config):
    environment = rl_environment(
        world, sft_checkpoint, tmp_path / "rl", NPROC=2, ACCELERATE_CONFIG=f"config/{config}.yaml"
    )
    run_stage("rl.sh", env=environment)
    before, after = weights(sft_checkpoint), weights(tmp_path / "rl")
    assert before.keys() == after.keys() and any(not torch.equal(before[n].float(), after[n].float()) for n in before)
    run_stage("evaluate.sh", env=evaluate_environment(world, tmp_path / "rl", tmp_path / "rl.json"))
