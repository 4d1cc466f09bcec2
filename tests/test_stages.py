"""The stages through their launchers and command lines, on a small world."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_stage
from safetensors.torch import load_file

import rl
import sft
from minionerec.common.errors import UserError


def sft_environment(world, base_model, output, **more):
    return {
        "BASE_MODEL": base_model,
        "TRAIN_FROM_SCRATCH": "True",
        "TRAIN_FILE": world.train,
        "EVAL_FILE": world.valid,
        "SID_INDEX_PATH": world.index,
        "ITEM_META_PATH": world.items,
        "OUTPUT_DIR": output,
        "CATEGORY": "Toys_and_Games",
        "BATCH_SIZE": 16,
        "MICRO_BATCH_SIZE": 8,
        "NUM_EPOCHS": 2,
        "LEARNING_RATE": 5e-3,
        "EVAL_STEP": 0.5,
        "NPROC": 1,
    } | more


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


@pytest.fixture(scope="session")
def sft_checkpoint(world, base_model, tmp_path_factory):
    """A checkpoint of sft.sh, which the tests below share."""
    output = tmp_path_factory.mktemp("sft") / "sft"
    run_stage("sft.sh", env=sft_environment(world, base_model, output))
    return output


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def test_sft_checkpoint_is_whole(sft_checkpoint, base_model):
    names = {path.name for path in sft_checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "prompt.yaml", "stage.json"} <= names
    assert not any(name.startswith("checkpoint-") for name in names)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sft_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(sft_checkpoint)
    assert len(tokenizer("<a_3><b_0><c_2>")["input_ids"]) == 3
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert not torch.equal(weights(sft_checkpoint)["model.norm.weight"], weights(base_model)["model.norm.weight"])


def test_sft_again_is_not_computed_again(world, base_model, sft_checkpoint):
    before = (sft_checkpoint / "model.safetensors").stat().st_mtime_ns
    done = run_stage("sft.sh", env=sft_environment(world, base_model, sft_checkpoint))
    assert "complete, made with these options" in done.stdout
    assert (sft_checkpoint / "model.safetensors").stat().st_mtime_ns == before


def test_rl(world, sft_checkpoint, tmp_path):
    done = run_stage("rl.sh", env=rl_environment(world, sft_checkpoint, tmp_path / "rl", TEST_DURING_TRAINING="True"))
    assert "test/HR@10" in done.stdout and "eval_NDCG@10" in done.stdout
    before, after = weights(sft_checkpoint), weights(tmp_path / "rl")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "rl" / "prompt.yaml").read_text() == (sft_checkpoint / "prompt.yaml").read_text()
    run_stage("evaluate.sh", env=evaluate_environment(world, tmp_path / "rl", tmp_path / "rl.json"))


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "script", ["sft", "rl", "evaluate", "sasrec", "convert_dataset", "rq/rqvae", "rq/generate_indices"]
)
def test_launchers_explain_themselves_and_refuse_arguments(script):
    helped = run_stage(f"{script}.sh", "--help")
    assert helped.stdout.startswith("usage:") and "reads" in helped.stdout or "TRAIN_FILE" in helped.stdout
    refused = run_stage(f"{script}.sh", "--nonsense", check=False)
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1
    unset = run_stage(f"{script}.sh", check=False)
    assert unset.returncode == 2 and "is not set" in unset.stderr and len(unset.stderr.strip().splitlines()) == 1


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
        (["report.py", "--output_dir", "nowhere"], "nowhere: no such file"),
    ],
)
def test_errors_are_one_line(arguments, found):
    done = run_stage(*arguments, check=False)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and found in lines[0]


def test_debug_shows_the_traceback():
    done = run_stage("report.py", "--output_dir", "nowhere", "--debug", check=False)
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_batch_sizes_that_do_not_divide(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="100 .* 8 x 2 processes = 16; .*: 96 or 112"):
        sft.Options(batch_size=100, micro_batch_size=8).accumulation_steps()
    assert sft.Options(batch_size=96, micro_batch_size=8).accumulation_steps() == 6


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


def test_sft_refuses_an_index_of_another_data_set(world, base_model, tmp_path):
    (tmp_path / "x.index.json").write_text(json.dumps({"0": ["<a_0>"]}))
    environment = sft_environment(world, base_model, tmp_path / "out", SID_INDEX_PATH=tmp_path / "x.index.json")
    done = run_stage("sft.py", *[f"--{k.lower()}={v}" for k, v in environment.items() if k != "NPROC"], check=False)
    assert done.returncode == 2 and "found 48 items, expected the 1" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------ slow


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["", "FREEZE_LLM", "USE_LORA"])
def test_killed_sft_resumes_to_the_same_weights(world, base_model, tmp_path, trained):
    settings = {"EVAL_STEP": 0.1, "NUM_EPOCHS": 4}
    if trained:
        settings |= {"TRAIN_FROM_SCRATCH": "False", trained: "True", "PACKING": "True"}
    run_stage("sft.sh", env=sft_environment(world, base_model, tmp_path / "whole", **settings))

    killed = tmp_path / "killed"
    killed_midway("sft.sh", sft_environment(world, base_model, killed, **settings), killed)
    assert not (killed / "model.safetensors").exists()
    run_stage("sft.sh", env=sft_environment(world, base_model, killed, **settings))
    whole, resumed = weights(tmp_path / "whole"), weights(killed)
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one(world, base_model, tmp_path):
    for processes in (1, 2):  # 57 rows: the last batch of an epoch is not full
        environment = sft_environment(world, base_model, tmp_path / str(processes), NPROC=processes, SAMPLE=57)
        run_stage("sft.sh", env=environment | {"SFT_TASKS": "sid_seq", "METRIC_FOR_BEST_MODEL": "NDCG@10"})
    one, two = (weights(tmp_path / str(n)) for n in (1, 2))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.distributed
def test_frozen_llm_on_two_processes(world, sft_checkpoint, base_model, tmp_path):
    environment = sft_environment(world, base_model, tmp_path / "frozen", NPROC=2, TRAIN_FROM_SCRATCH="False")
    done = run_stage("sft.sh", env=environment | {"FREEZE_LLM": "True"})
    base, frozen = weights(base_model), weights(tmp_path / "frozen")
    name = "model.embed_tokens.weight"
    old, new = len(base[name]), len(frozen[name])
    assert f"{(new - old) * base[name].shape[1]:,} trained" in done.stdout
    assert all(torch.equal(frozen[key][: len(base[key])], base[key]) for key in base)
    run_stage(
        "sft.sh", env=environment | {"FREEZE_LLM": "True", "LEARNING_RATE": "0", "OUTPUT_DIR": tmp_path / "start"}
    )
    start = weights(tmp_path / "start")[name]
    moved = (frozen[name][old:] != start[old:]).any(dim=1)
    assert new > old and torch.equal(start[:old], frozen[name][:old]) and moved.all()


def killed_midway(script, environment, output):
    """Start a launcher and kill its whole process group once it has written a checkpoint."""
    environment = (
        os.environ
        | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        | {k: str(v) for k, v in environment.items()}
    )
    process = subprocess.Popen(
        ["bash", script], cwd=ROOT, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list(output.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config", ["zero2_opt", "zero3"])
def test_sft_under_deepspeed_is_killed_and_resumes(world, base_model, tmp_path, config):
    def environment(name):
        settings = {"NPROC": 2, "ACCELERATE_CONFIG": f"config/{config}.yaml", "EVAL_STEP": 0.2, "NUM_EPOCHS": 3}
        return sft_environment(world, base_model, tmp_path / name, SFT_TASKS="sid_seq,title2sid", **settings)

    run_stage("sft.sh", env=environment("whole"))
    killed_midway("sft.sh", environment("killed"), tmp_path / "killed")
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    run_stage("sft.sh", env=environment("killed"))
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    for key in whole:
        torch.testing.assert_close(resumed[key].float(), whole[key].float(), atol=1e-2, rtol=1e-2)  # bf16
    run_stage("evaluate.sh", env=evaluate_environment(world, tmp_path / "killed", tmp_path / "p.json"))


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


@pytest.mark.slow
def test_run_sh_on_a_folder_in_the_published_layout(world, tmp_path):
    environment = {
        "DATASET": world.folder,
        "OUTPUT": tmp_path / "out",
        "SFT_EPOCHS": 1,
        "SFT_BATCH_SIZE": 16,
        "SFT_MICRO_BATCH_SIZE": 16,
        "RL_ROWS": 32,
    }
    first = run_stage("run.sh", env=environment, timeout=1200)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results) == {"popularity", "markov", "sasrec", "gru4rec", "sft", "rl", "seconds"}
    for model in ("popularity", "markov", "sasrec", "gru4rec", "sft", "rl"):
        assert set(results[model]) == {f"{m}@{k}" for m in ("HR", "NDCG") for k in (5, 10, 20)}
        assert f"{results[model]['HR@10']:.4f}" in first.stdout
    assert {"popularity", "sft", "rl", "rl_evaluate"} <= set(results["seconds"])

    started = time.monotonic()
    again = run_stage("run.sh", env=environment)
    assert time.monotonic() - started < 20 and again.stdout.count("done before") == 9
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results

    (tmp_path / "out" / "stages" / "rl.done").unlink()  # as after a kill in the RL stage
    resumed = run_stage("run.sh", env=environment)
    assert resumed.stdout.count("done before") == 7
