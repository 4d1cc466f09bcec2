"""rl.py: what it refuses, what it reads, what it writes; two processes, a kill and DeepSpeed (slow)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import N_ITEMS, ROOT, run_stage
from safetensors.torch import load_file

import evaluate
import rl
from data import DEFAULT_TEMPLATE, Prompts, parse_rl_tasks, read_sequences, rl_rows
from minionerec.baselines.models import MODELS
from minionerec.catalog.items import Items, read_info
from minionerec.common.errors import UserError
from minionerec.language_model.checkpoints import save


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.fixture(scope="module")
def sft_model(policy, tmp_path_factory):
    """A folder as sft.py writes it, with random weights."""
    folder = tmp_path_factory.mktemp("policy") / "sft"
    save(policy.model, policy.tokenizer, DEFAULT_TEMPLATE, folder)
    return folder


@pytest.fixture(scope="module")
def reward_files(tmp_path_factory):
    """(embeddings, folder of a collaborative model, module of a user's reward) for the world's items."""
    folder = tmp_path_factory.mktemp("rewards")
    torch.manual_seed(0)
    np.save(folder / "e.npy", np.random.default_rng(0).normal(size=(N_ITEMS, 8)).astype(np.float32))
    sizes = {"n_items": N_ITEMS, "max_history": 10, "hidden_size": 8, "dropout": 0.0}
    MODELS["sasrec"](**sizes, num_layers=1, num_heads=1).save(folder / "sasrec")
    (folder / "mine.py").write_text(
        "def even(completions, target_item, catalog, **_):\n"
        "    return [catalog.items_of_sid[catalog.row_of_sid[c]][0] % 2 for c in completions]\n"
    )
    return folder / "e.npy", folder / "sasrec", f"{folder}/mine.py:even"


def options(world, model, output, **settings):
    defaults = {
        "model_path": str(model),
        "train_file": str(world.train),
        "eval_file": str(world.valid),
        "info_file": str(world.info),
        "output_dir": str(output),
        "category": "Toys_and_Games",
        "num_generations": 4,
        "train_batch_size": 16,
        "sample_train": 16,
        "learning_rate": 1e-3,
        "eval_step": 0.5,
        "test_beam": 10,
        "keep_start": False,
    }
    return rl.Options(**defaults | settings)


# ------------------------------------------------------------------------------------------------ rows and rewards

ITEMS = Items(["<a_0><b_1>", "<a_1><b_0>", "<a_2><b_2>", "<a_0><b_3>"], ["One", "Two; or so", "Same", "Same"])


def test_rows_of_every_task_carry_their_target(world, policy):
    items = read_info(world.info)
    sequences = read_sequences(world.train, items.sids, "train_file")
    caps = parse_rl_tasks("sid_seq:7,title2sid, title_seq2sid:1000")
    assert caps == {"sid_seq": 7, "title2sid": None, "title_seq2sid": 1000}
    rows = rl_rows(sequences, items, Prompts(category="toys"), caps, seed=3)
    assert rows == rl_rows(sequences, items, Prompts(category="toys"), caps, seed=3)
    assert {task: rows["task"].count(task) for task in caps} == {
        "sid_seq": 7,
        "title2sid": len(items.sids),
        "title_seq2sid": len(sequences),
    }
    for prompt, sid, item, history, task in zip(*rows.values(), strict=True):
        assert sid == items.sids[item] and sid not in prompt.replace("".join(items.sids[i] for i in history), "")
        if task == "title2sid":
            assert items.titles[item] in prompt and history == []
        else:
            said = items.titles if task == "title_seq2sid" else items.sids
            assert history and all(said[i] in prompt for i in history)
    whole = rl_rows(sequences, items, Prompts(), {"sid_seq": None})
    drawn = rl_rows(sequences, items, Prompts(), {"sid_seq": 20}, seed=1)["target_item"]
    assert drawn != whole["target_item"][:20]  # a sample, not the first ones


@pytest.mark.parametrize("text", ["", "sid2title", "title2sid:0", "title2sid:x", "sid_seq,sid_seq:5"])
def test_tasks_that_are_none(text):
    with pytest.raises(UserError, match="--rl_tasks"):
        parse_rl_tasks(text)


def test_reward_files_must_fit_the_catalog(world, sft_model, reward_files, tmp_path):
    embeddings, collaborative, module = reward_files
    given = {"ada_path": str(embeddings), "cf_path": str(collaborative), "reward_module": module}
    given["reward_type"] = "ranking,semantic,sasrec"
    chosen = options(world, sft_model, tmp_path, **given)
    chosen.check()
    _, _, _, catalog = rl.read_catalog(chosen)
    names = [reward.__name__ for reward in rl.read_rewards(chosen, catalog)]
    assert names == ["rule", "ndcg", "semantic", "sasrec", "even"]

    np.save(tmp_path / "e.npy", np.load(embeddings)[:-1])
    sizes = {"n_items": N_ITEMS + 1, "max_history": 10, "hidden_size": 8, "dropout": 0.0}
    MODELS["sasrec"](**sizes, num_layers=1, num_heads=1).save(tmp_path / "sasrec")
    for wrong, message in [
        ({"ada_path": str(tmp_path / "e.npy")}, "47 rows, expected the catalog's 48"),
        ({"cf_path": str(tmp_path / "sasrec")}, "a catalog of 49 items, and this one has 48"),
        ({"cf_path": str(world.folder)}, "no such file"),
        ({"reward_weights": "1,2"}, "found 2 weights, expected 5"),
    ]:
        with pytest.raises(UserError, match=message):
            rl.read_rewards(options(world, sft_model, tmp_path, **given | wrong), catalog)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"metric_for_best_model": "NDCG@20"},
            "--metric_for_best_model NDCG@20: expected, with --test_beam 10, one of",
        ),
        ({"logp_space": "items"}, "--logp_space items: expected vocab or catalog"),
        ({"loss_type": "ppo"}, "--loss_type ppo: expected one of grpo, dapo"),
        ({"loss_type": "bnpo", "dapo": True}, "--dapo True: expected False beside --loss_type bnpo"),
        ({"loss_type": "vespo", "gspo": True}, "--gspo True: expected False"),
        ({"beta": 0.0, "sync_ref_model": True}, "with --beta 0 there is no reference"),
        ({"use_lora": True, "sync_ref_model": True}, "--use_lora has no reference copy"),
        ({"top_p": 0.9}, "--top_p 0.9: expected 1 with beams"),
        ({"top_p": 0.0, "beam_search": False}, "--top_p 0.0: expected more than 0"),
        ({"temperature": 0.0}, "--temperature 0.0: expected more than 0"),
        ({"scale_rewards": "all"}, "--scale_rewards all: expected one of group, batch, none"),
        ({"rl_tasks": "sid2title"}, "--rl_tasks sid2title: found 'sid2title'"),
        ({"report_to": "paper"}, "--report_to paper"),
        ({"ada_path": "x.npy"}, "no reward reads it; add semantic"),
        ({"cf_path": "x"}, "no reward reads it; add sasrec"),
        ({"ada_path": "x.npy", "reward_type": "semantic"}, "x.npy: no such file"),
        ({"reward_module": "nowhere.py:f"}, "nowhere.py: no such file"),
        ({"num_generations": 1}, "at least 2 completions"),
        ({"train_batch_size": 10}, "not divisible by --num_generations 4; the nearest products that are: 8 or 12"),
    ],
)
def test_refused_before_anything_is_loaded(world, sft_model, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        options(world, sft_model, tmp_path, **settings).check()


def test_a_changed_reward_file_is_another_run(world, sft_model, reward_files, tmp_path):
    chosen = options(world, sft_model, tmp_path, reward_module=reward_files[2])
    chosen.check()
    assert chosen.reward_file == reward_files[2].removesuffix(":even")


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize(
    "settings",
    [
        {"use_lora": True, "lora_r": 4, "logp_space": "catalog", "rl_tasks": "sid_seq,title2sid:4,title_seq2sid:4"},
        {"beam_search": False, "top_p": 0.95, "loss_type": "dr_grpo", "mask_all_zero": True, "sync_ref_model": True},
    ],
    ids=["lora", "sampled"],
)
def test_run(world, sft_model, reward_files, tmp_path, settings):
    embeddings, collaborative, module = reward_files
    rewards = {"reward_type": "ranking,semantic,sasrec", "ada_path": str(embeddings), "cf_path": str(collaborative)}
    rewards |= {"reward_module": module, "reward_weights": "1,1,0.5,0.1,0.2"}
    rl.main(options(world, sft_model, tmp_path / "rl", **rewards | settings))
    before, after = weights(sft_model), weights(tmp_path / "rl")
    assert before.keys() == after.keys()  # adapters are merged
    assert any(not torch.equal(before[name], after[name]) for name in before if "q_proj" in name)
    names = {path.name for path in (tmp_path / "rl").iterdir()}
    assert {"config.json", "tokenizer.json", "prompt.yaml", "stage.json"} <= names
    assert not any(name.startswith(("checkpoint-", "adapter")) for name in names)
    scored = evaluate.Options(
        base_model=str(tmp_path / "rl"), test_data_path=str(world.test), info_file=str(world.info), num_beams=10,
        result_json_data=str(tmp_path / "p.json"),
    )  # fmt: skip
    evaluate.main(scored)  # in the space that the policy was trained in, unless it is told another
    metrics = json.loads((tmp_path / "p.metrics.json").read_text())
    assert metrics["space"] == settings.get("logp_space", "vocab")


@pytest.mark.parametrize("helped, keep_start", [(False, True), (False, False), (True, True)])
def test_the_start_is_kept_where_rl_does_not_help(world, sft_model, tmp_path, monkeypatch, capsys, helped, keep_start):
    measured = rl.ReReTrainer.evaluate

    def evaluate(self, *arguments, **keywords):
        result = measured(self, *arguments, **keywords)
        step = self.state.global_step
        self.state.log_history[-1]["eval_NDCG@10"] = result["eval_NDCG@10"] = step if helped else 1 / (1 + step)
        return result

    monkeypatch.setattr(rl.ReReTrainer, "evaluate", evaluate)
    settings = {"reward_type": "prefix", "logp_space": "catalog", "keep_start": keep_start}
    rl.main(options(world, sft_model, tmp_path / "rl", **settings))
    before, after = weights(sft_model), weights(tmp_path / "rl")
    same = all(torch.equal(before[name], after[name]) for name in before)
    assert same == (keep_start and not helped) == ("RL did not help on valid" in capsys.readouterr().out)
    assert json.loads((tmp_path / "rl" / "config.json").read_text())["sid_space"] == "catalog"
    assert not list((tmp_path / "rl").glob("checkpoint-*"))


# ------------------------------------------------------------------------------------------------ slow


def environment(world, model, output, **settings):
    return {
        "MODEL_PATH": model,
        "TRAIN_FILE": world.train,
        "EVAL_FILE": world.valid,
        "INFO_FILE": world.info,
        "OUTPUT_DIR": output,
        "REWARD_TYPE": "ranking",
        "LOGP_SPACE": "vocab",
        "KEEP_START": "False",
        "METRIC_FOR_BEST_MODEL": "NDCG@10",
        "NUM_GENERATIONS": 4,
        "TRAIN_BATCH_SIZE": 16,
        "GRADIENT_ACCUMULATION_STEPS": 1,
        "NUM_TRAIN_EPOCHS": 1,
        "LEARNING_RATE": 1e-4,
        "EVAL_STEP": 0.25,
        "TEST_BEAM": 10,
        "NPROC": 1,
        "ACCELERATE_CONFIG": "config/cpu.yaml",
    } | settings


def assert_same_weights(first, second, start, tolerance):
    """Both runs moved, and by the same: the difference is short beside the way, tensor by tensor."""
    first, second, start = weights(first), weights(second), weights(start)
    ways = {name: float((first[name] - start[name]).norm()) for name in start}
    assert all(way > 1e-4 for name, way in ways.items() if "proj.weight" in name)  # what adapters reach
    for name, way in ways.items():
        apart = float((first[name] - second[name]).norm())
        assert apart <= tolerance * way, (name, way, apart)


# Samples of an untrained policy seldom hit the target; its prefix they do, so that the first steps move the adapters.
SAMPLED_LORA = {"BEAM_SEARCH": "False", "USE_LORA": "True", "LEARNING_RATE": 3e-3, "REWARD_TYPE": "rule,prefix"}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, SAMPLED_LORA], ids=["beams", "sampled_lora"])
def test_killed_rl_resumes_to_the_same_weights(world, sft_model, tmp_path, settings):
    run_stage("rl.sh", env=environment(world, sft_model, tmp_path / "whole", **settings))
    killed = tmp_path / "killed"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = environment(world, sft_model, killed, **settings)
    given = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path} | {k: str(v) for k, v in given.items()}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(["bash", "rl.sh"], cwd=ROOT, env=given, **quiet)
    deadline = time.monotonic() + 300
    while not list(killed.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "model.safetensors").exists()
    run_stage("rl.sh", env=environment(world, sft_model, killed, **settings))
    assert_same_weights(tmp_path / "whole", killed, sft_model, 1e-4)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("settings", [{}, {"MASK_ALL_ZERO": "True", "DAPO": "True", "LOGP_SPACE": "catalog"}], ids=str)
def test_two_processes_train_as_one(world, sft_model, tmp_path, settings):
    """The same groups, rewards and advantages, however the groups are split."""
    for processes in (1, 2):
        split = {"NPROC": processes, "TRAIN_BATCH_SIZE": 16 // processes}
        run_stage("rl.sh", env=environment(world, sft_model, tmp_path / str(processes), **settings | split))
    assert_same_weights(tmp_path / "1", tmp_path / "2", sft_model, 1e-2)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config", ["zero2_opt", "zero3"])
@pytest.mark.parametrize(
    "settings", [{}, {"LOGP_SPACE": "catalog"}, {"USE_LORA": "True"}], ids=["vocab", "catalog", "lora"]
)
def test_deepspeed_on_two_processes(world, sft_model, tmp_path, config, settings):
    settings = settings | {"NPROC": 2, "TRAIN_BATCH_SIZE": 8, "ACCELERATE_CONFIG": f"config/{config}.yaml"}
    run_stage("rl.sh", env=environment(world, sft_model, tmp_path / "rl", **settings))
    before, after = weights(sft_model), weights(tmp_path / "rl")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert any(not torch.equal(before[n].bfloat16(), after[n].bfloat16()) for n in before)
