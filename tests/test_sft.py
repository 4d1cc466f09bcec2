"""SFT as a stage.

Invariants: any causal LM folder is a base model, in any state of its tokenizer and generation config; checkpoints
are never lost: options that do not shape the result resume, others are refused; a killed run ends with the weights of an
unbroken one; each checkpoint carries wording and settings; several processes train as one.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from helpers import ROOT, killed_midway, run_stage, sft_environment
from language_model.small_models import config_of
from language_model.test_tokenizing import tokenizer_named
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import sft
from data import Prompts
from minionerec.catalog.items import Items
from minionerec.common.devices import use_one_gpu
from minionerec.common.errors import UserError
from minionerec.language_model import numbered_checkpoints, sft_trainer
from minionerec.language_model.checkpoints import Settings, load_settings
from rq.codebooks import CodebookFile, write_codebooks


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_equal_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def options(world, base_model, tmp_path):
    """Makes options of a training of seconds: 57 rows, 8 steps, 4 evaluations."""
    files = {"train_file": world.train, "eval_file": world.valid, "base_model": base_model}
    files |= {"sid_index_path": world.index, "item_meta_path": world.items, "cache_dir": tmp_path / "cache"}
    values = {"batch_size": 16, "micro_batch_size": 8, "num_epochs": 2, "eval_step": 2, "learning_rate": 5e-3}
    values |= {"sft_tasks": "sid_seq", "train_rows": 57, "category": "Toys_and_Games"}

    def make(output="sft", **more):
        paths = {name: str(path) for name, path in files.items()} | {"output_dir": str(tmp_path / output)}
        return sft.Options(**paths | values | more)

    return make


class Killed(Exception):
    """What the tests raise in the middle of a run."""


def kill_after(monkeypatch, saves: int):
    """A run dies when it has written `saves` checkpoints."""
    usual, count = numbered_checkpoints.KeepCheckpoints.on_save, iter(range(1, 100))

    def on_save(self, *args, **kwargs):
        usual(self, *args, **kwargs)
        if next(count) == saves:
            raise Killed

    monkeypatch.setattr(numbered_checkpoints.KeepCheckpoints, "on_save", on_save)


def killed(options, saves: int = 2) -> Path:
    """The folder of a run that died after `saves` checkpoints."""
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Killed):
        kill_after(monkeypatch, saves)
        sft.main(options)
    return Path(options.output_dir)


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"freeze_LLM": True, "use_lora": True}, "exclude each other"),
        ({"freeze_LLM": True, "train_from_scratch": True}, "random weights"),
        ({"sid_init": "zeros"}, "--sid_init zeros: expected mean or text or codebook"),
        (
            {"sid_init": "codebook"},
            r"--sid_init codebook --sid_codebooks \(none\): expected --sid_init codebook and its file",
        ),
        (
            {"sid_codebooks": "x.npz"},
            "--sid_init mean --sid_codebooks x.npz: expected --sid_init codebook and its file",
        ),
        ({"history_drop": 1}, "--history_drop 1: expected 0 or more and below 1"),
        ({"history_crop": 0.5, "packing": True}, "is not implemented; choose one"),
        ({"sid_tokens": "all"}, "--sid_tokens all: expected codebook or used"),
        ({"report_to": "paper"}, "--report_to paper: expected one of none, wandb, tensorboard, trackio"),
        ({"lr_scheduler_type": "sine"}, "--lr_scheduler_type sine: expected one of linear, cosine"),
        ({"num_epochs": -1}, "--num_epochs -1: expected more than 0"),
        ({"learning_rate": float("nan")}, "--learning_rate nan: expected a finite number"),
        ({"eval_step": 1.5}, "--eval_step 1.5: expected a number of steps, or a share"),
        ({"train_rows": 0}, "--train_rows 0: expected at least 1, or -1 for all"),
        ({"batch_size": 0}, "--batch_size 0: expected at least 1"),
        ({"max_history": -1}, "--max_history -1: expected at least 1"),
    ],
)
def test_options_that_cannot_work(flags, message):
    with pytest.raises(UserError, match=message):
        sft.Options(**flags)


def test_batch_sizes_that_do_not_divide(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="100 .* 8 x 2 processes = 16; .*: 96 or 112"):
        sft.Options(batch_size=100, micro_batch_size=8)
    assert sft.Options(batch_size=96, micro_batch_size=8).accumulation_steps() == 6


def test_metrics_that_the_beams_cannot_give(options, world, policy):
    made = options(metric_for_best_model="HR@50", eval_beams=20)
    with pytest.raises(UserError, match=r"--metric_for_best_model HR@50: expected eval_loss, or with --eval_beams 20"):
        sft.build_validation(made, sft.read_data(made), Prompts(), policy.tokenizer)


def test_one_process_uses_one_gpu(capsys):
    """transformers would use DataParallel on all of them, with a larger batch."""
    args = SimpleNamespace(n_gpu=4, _n_gpu=4)
    assert use_one_gpu(args)._n_gpu == 1 and "one process uses one of the 4 GPUs" in capsys.readouterr().out
    assert use_one_gpu(SimpleNamespace(n_gpu=1)).n_gpu == 1 and not capsys.readouterr().out


def test_help_and_a_finished_stage_load_no_heavy_library(sft_checkpoint, world, base_model):
    environment = sft_environment(world, base_model, sft_checkpoint)
    code = """
import sys, sft
from minionerec.common.options import parse
heavy = {"torch", "polars", "trl", "peft", "accelerate"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
sft.main(parse(sft.Options, []))
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    own = {name: str(value) for name, value in environment.items()} | {"MINIONEREC_VARIABLES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | own, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "complete with these options, nothing to do" in done.stdout


# ------------------------------------------------------------------------------------------------ tasks


def example_table() -> str:
    """What every task makes of one sample, as docs/sft.md shows it."""
    sids = ["<a_1><b_7><c_2>", "<a_1><b_3><c_9>", "<a_4><b_0><c_5>"]
    items = Items(sids, ["Desk lamp", "Light bulb", "Picture hook"])
    sequences = pl.DataFrame({"user": ["u"], "history": [[0, 1]], "target": [2], "preference": ["Bright rooms."]})
    prompts = Prompts(category="Office_Products")
    lines = ["| task | prompt | answer |", "|---|---|---|"]
    for name, task in data.TASKS.items():
        example = next(iter(task.examples(sequences, items, prompts)))
        lines.append(f"| `{name}` | `{example.prompt.encode('unicode_escape').decode()}` | `{example.answer}` |")
    return "\n".join(lines)


def test_the_documentation_shows_the_tasks_as_they_are():
    page = (ROOT / "docs" / "sft.md").read_text(encoding="utf-8")
    assert example_table() in page, f"docs/sft.md wants\n{example_table()}"
    assert sft.Options().sft_tasks == data.DEFAULT_TASKS


# ------------------------------------------------------------------------------------------------ the whole stage


@pytest.mark.parametrize("name, tokenizer", [("llama", "smollm2"), ("phi", "smollm2"), ("qwen2", "qwen2.5")])
def test_any_causal_lm_folder_is_a_base_model(options, tmp_path, name, tokenizer):
    tokenizer = tokenizer_named(tokenizer, None)
    config = config_of(name, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "eos_token_id": 0}')
    more = {"metric_for_best_model": "NDCG@10", "sid_init": "text", "sft_tasks": "sid_seq,sid2title", "num_epochs": 1}
    sft.main(options(base_model=str(tmp_path / "base"), **more))
    saved, base = weights(tmp_path / "sft"), weights(tmp_path / "base")
    assert saved.keys() == base.keys() and any(not torch.equal(saved[key], base[key]) for key in base)
    again = AutoTokenizer.from_pretrained(tmp_path / "sft")
    assert len(again("<a_3><b_0><c_2>", add_special_tokens=False)["input_ids"]) == 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "sft")


def test_a_checkpoint_is_whole(sft_checkpoint, base_model):
    names = {path.name for path in sft_checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "prompt.yaml", "minionerec.json", "run.json"} <= names
    assert {"README.md", "log.jsonl"} <= names
    assert not any(name.startswith("checkpoint-") for name in names)
    assert load_settings(sft_checkpoint) == Settings("Toys_and_Games", 10, "vocab")
    tokenizer = AutoTokenizer.from_pretrained(sft_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(sft_checkpoint)
    assert len(tokenizer("<a_3><b_0><c_2>")["input_ids"]) == 3
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert not torch.equal(weights(sft_checkpoint)["model.norm.weight"], weights(base_model)["model.norm.weight"])


@pytest.mark.parametrize("state", ["truncation", "padding"])
def test_state_of_the_base_tokenizer_does_not_change_the_weights(options, base_model, tmp_path, state):
    sft.main(options("clean"))
    shutil.copytree(base_model, tmp_path / "used")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "used")
    call = {"truncation": True, "max_length": 8} if state == "truncation" else {"padding": True}
    tokenizer(["a red lamp and a long steel cable", "a lamp"], **call)
    tokenizer.save_pretrained(tmp_path / "used")
    sft.main(options("stained", base_model=str(tmp_path / "used"), cache_dir=str(tmp_path / "other cache")))
    assert_equal_weights(tmp_path / "clean", tmp_path / "stained")


def test_a_model_that_evaluation_cannot_decode_is_refused_before_the_training(options, base_model, tmp_path):
    shutil.copytree(base_model, tmp_path / "base")
    config = config_of("mamba", vocab_size=len(AutoTokenizer.from_pretrained(base_model)))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="MambaForCausalLM cannot decode a tree of tokens"):
        sft.main(options(base_model=str(tmp_path / "base")))


def test_a_few_long_steps_still_end_with_an_evaluation(options, tmp_path, capsys):
    sft.main(options(eval_step=1000))
    assert "best valid loss " in capsys.readouterr().out


def test_an_index_of_another_data_set_is_refused(options, tmp_path):
    (tmp_path / "x.index.json").write_text(json.dumps({"0": ["<a_0>"]}))
    with pytest.raises(UserError, match="found 48 items, expected the 1"):
        sft.main(options(sid_index_path=str(tmp_path / "x.index.json")))
    assert not (tmp_path / "sft" / "model.safetensors").exists()
    sft.main(options(num_epochs=1))  # the failed start is no obstacle


@pytest.mark.parametrize("option", ["history_drop", "history_crop"])
def test_augmentation_needs_whole_sequences(options, option):
    with pytest.raises(
        UserError, match="prompt_upstream.yaml: --history_drop and --history_crop augment whole sequences"
    ):
        sft.main(options(prompt_template=str(ROOT / "config/prompt_upstream.yaml"), **{option: 0.5}))


def test_augmentation_and_codebooks_change_the_training(options, tmp_path):
    """Each by itself, from the same seed."""
    write_codebooks(
        tmp_path / "books.npz", CodebookFile(np.random.default_rng(0).normal(size=(3, 8, 5)), np.zeros((0, 3)))
    )
    codebook = {"sid_init": "codebook", "sid_codebooks": str(tmp_path / "books.npz")}
    changes = [{}, {"history_drop": 0.5}, {"history_crop": 1.0}, codebook]
    for n, change in enumerate(changes):
        sft.main(options(f"run{n}", num_epochs=1, **change))
    tables = [weights(tmp_path / f"run{n}")["model.embed_tokens.weight"] for n in range(4)]
    assert all(not torch.equal(tables[0], other) for other in tables[1:])


# ------------------------------------------------------------------------------------------------ nothing is lost


@pytest.mark.parametrize("augmented", [False, True])
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(options, tmp_path, augmented):
    options = functools.partial(options, history_drop=0.3, history_crop=0.3) if augmented else options
    sft.main(options("whole"))
    folder = killed(options("killed"))
    assert not (folder / "model.safetensors").exists()
    for checkpoint in numbered_checkpoints.list_checkpoints(folder):
        assert load_settings(checkpoint).category == "Toys_and_Games"
        assert (checkpoint / "prompt.yaml").read_bytes() == sft.TEMPLATE.read_bytes()
    sft.main(options("killed"))
    assert_equal_weights(tmp_path / "whole", folder)
    assert not numbered_checkpoints.list_checkpoints(folder)


def test_a_resume_takes_whole_checkpoints_of_this_run_and_leaves_the_others(options, tmp_path, capsys):
    sft.main(options("whole"))
    folder = killed(options("killed"), saves=3)
    newest = numbered_checkpoints.list_checkpoints(folder)[-1]
    for name in ("checkpoint-3", "checkpoint-7"):
        shutil.copytree(newest, folder / name)
    (folder / "checkpoint-99999").mkdir()
    (newest / "optimizer.pt").unlink()
    sft.main(options("killed"))
    printed = capsys.readouterr().out
    assert f"{newest} is not complete (optimizer.pt is missing) and is not used" in printed
    assert "checkpoint-99999 was not made by this run" in printed
    assert_equal_weights(tmp_path / "whole", folder)
    assert [path.name for path in numbered_checkpoints.list_checkpoints(folder)] == [
        "checkpoint-3",
        "checkpoint-7",
        "checkpoint-99999",
    ]


def test_a_checkpoint_of_a_run_with_other_settings_is_refused(options, tmp_path):
    given = str(numbered_checkpoints.list_checkpoints(killed(options("k")))[-1])
    before = {path: path.read_bytes() for path in (tmp_path / "k").rglob("*") if path.is_file()}
    for change, message in (({"num_epochs": 1}, "num_epochs is 2 there and 1 now"), ({"use_lora": True}, "use_lora")):
        with pytest.raises(UserError, match=rf"--resume_from_checkpoint .*: its run was another one \({message}"):
            sft.main(options(resume_from_checkpoint=given, **change))
    assert before == {path: path.read_bytes() for path in (tmp_path / "k").rglob("*") if path.is_file()}
    (Path(given) / "manifest.json").unlink()  # as an earlier version left it, with its record elsewhere
    (tmp_path / "k" / "run.json").unlink()
    with pytest.raises(UserError, match="checkpoint-.*: cannot be resumed from"):
        sft.main(options("other", resume_from_checkpoint=given, train_from_scratch=True, use_lora=True))


def test_options_that_do_not_shape_the_result_resume(options, tmp_path, monkeypatch, capsys):
    """Also where their value names a file or folder that changes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tensorboard").mkdir()
    folder = killed(options(report_to="none"))
    before = {path.name for path in numbered_checkpoints.list_checkpoints(folder)}
    assert before
    (tmp_path / "tensorboard" / "log").write_text("changed")
    more = {"micro_batch_size": 2, "gradient_checkpointing": True, "cache_dir": "", "wandb_run_name": "tensorboard"}
    started = []
    usual = sft_trainer.SFTTrainer.train
    monkeypatch.setattr(
        sft_trainer.SFTTrainer,
        "train",
        lambda self, resume_from_checkpoint: (
            started.append(Path(resume_from_checkpoint).name),
            usual(self, resume_from_checkpoint=resume_from_checkpoint),
        ),
    )
    sft.main(options(**more))
    assert started == [max(before, key=lambda name: int(name.rpartition("-")[2]))]
    sft.main(options(micro_batch_size=16))
    assert "nothing to do" in capsys.readouterr().out and len(started) == 1


def test_a_run_with_other_settings_keeps_the_checkpoints_of_the_first(options, tmp_path):
    folder = killed(options())
    before = [path.name for path in numbered_checkpoints.list_checkpoints(folder)]
    with pytest.raises(UserError, match="learning_rate is 0.005 there and 0.001 now"):
        sft.main(options(learning_rate=1e-3))
    assert [path.name for path in numbered_checkpoints.list_checkpoints(folder)] == before
    sft.main(options(learning_rate=1e-3, overwrite=True))
    moved = numbered_checkpoints.list_checkpoints(tmp_path / "sft.1")
    assert [path.name for path in moved] == before and all(map(numbered_checkpoints.is_complete, moved))


def test_the_checkpoint_that_a_run_was_resumed_from_stays(options):
    folder = killed(options(), saves=1)
    first = str(numbered_checkpoints.list_checkpoints(folder)[-1])
    sft.main(options(resume_from_checkpoint=first))
    assert [str(path) for path in numbered_checkpoints.list_checkpoints(folder)] == [first]
    assert numbered_checkpoints.is_complete(first) and (folder / "model.safetensors").exists()


def test_early_stopping_remembers_its_patience(options, monkeypatch):
    """Nothing improves without a learning rate: of 8 evaluations the third is the last."""
    flat = {"learning_rate": 0.0, "early_stopping_patience": 2, "eval_step": 1}
    usual, evaluations = sft_trainer.SFTTrainer.evaluate, []
    monkeypatch.setattr(
        sft_trainer.SFTTrainer,
        "evaluate",
        lambda self, *args, **kwargs: (evaluations.append(self.state.global_step), usual(self, *args, **kwargs))[1],
    )
    sft.main(options("whole", **flat))
    assert evaluations == [1, 2, 3]
    evaluations.clear()
    killed(options("killed", **flat), saves=2)
    sft.main(options("killed", **flat))
    assert evaluations == [1, 2, 3]
    evaluations.clear()
    killed(options("late", **flat), saves=3)  # after the patience has run out, before the weights are saved
    sft.main(options("late", **flat))
    assert evaluations == [1, 2, 3]


# ------------------------------------------------------------------------------------------------ slow


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["FREEZE_LLM", "USE_LORA"])
def test_sft_sh_killed_by_a_signal_resumes_to_the_same_weights(world, base_model, tmp_path, trained):
    """tests/test_kill.py kills a training of all weights, at random moments."""
    settings = {"EVAL_STEP": 0.1, "NUM_EPOCHS": 4, "TRAIN_FROM_SCRATCH": "False", trained: "True", "PACKING": "True"}
    run_stage("sft.sh", env=sft_environment(world, base_model, tmp_path / "whole", **settings))
    folder = tmp_path / "killed"
    killed_midway("sft.sh", sft_environment(world, base_model, folder, **settings), folder)
    assert not (folder / "model.safetensors").exists()
    run_stage("sft.sh", env=sft_environment(world, base_model, folder, **settings))
    whole, resumed = weights(tmp_path / "whole"), weights(folder)
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one(world, base_model, tmp_path):
    for processes in (1, 2):  # 57 rows: the last batch of an epoch is not full
        environment = sft_environment(world, base_model, tmp_path / str(processes), NPROC=processes, TRAIN_ROWS=57)
        run_stage("sft.sh", env=environment | {"SFT_TASKS": "sid_seq", "METRIC_FOR_BEST_MODEL": "NDCG@10"})
    one, two = (weights(tmp_path / str(n)) for n in (1, 2))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("metric", ["eval_loss", "NDCG@10"])
def test_fewer_validation_rows_than_processes(world, base_model, tmp_path, metric):
    header, row, *_ = world.valid.read_text().splitlines()
    (tmp_path / "valid.csv").write_text(f"{header}\n{row}\n")
    more = {"NPROC": 2, "EVAL_FILE": tmp_path / "valid.csv", "METRIC_FOR_BEST_MODEL": metric, "SFT_TASKS": "sid_seq"}
    run_stage("sft.sh", env=sft_environment(world, base_model, tmp_path / "sft", **more), timeout=180)
    assert (tmp_path / "sft" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_frozen_llm_on_two_processes(world, base_model, tmp_path):
    more = {"NPROC": 2, "TRAIN_FROM_SCRATCH": "False", "FREEZE_LLM": "True"}
    done = run_stage("sft.sh", env=sft_environment(world, base_model, tmp_path / "frozen", **more))
    base, frozen = weights(base_model), weights(tmp_path / "frozen")
    name = "model.embed_tokens.weight"
    old, new = len(base[name]), len(frozen[name])
    assert f"{(new - old) * base[name].shape[1]:,} trained" in done.stdout
    assert all(torch.equal(frozen[key][: len(base[key])], base[key]) for key in base)
    more |= {"LEARNING_RATE": "0"}
    run_stage("sft.sh", env=sft_environment(world, base_model, tmp_path / "start", **more))
    start = weights(tmp_path / "start")[name]
    moved = (frozen[name][old:] != start[old:]).any(dim=1)
    assert new > old and torch.equal(start[:old], frozen[name][:old]) and moved.all()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config", ["zero2_opt", "zero3"])
def test_sft_under_deepspeed_is_killed_and_resumes(world, base_model, tmp_path, config):
    def environment(name):
        settings = {"NPROC": 2, "ACCELERATE_CONFIG": f"config/{config}.yaml", "EVAL_STEP": 0.2, "NUM_EPOCHS": 3}
        return sft_environment(world, base_model, tmp_path / name, SFT_TASKS="sid_seq,title2sid", **settings)

    run_stage("sft.sh", env=environment("whole"))
    killed_midway("sft.sh", environment("killed"), tmp_path / "killed")
    assert (
        numbered_checkpoints.list_checkpoints(tmp_path / "killed")
        and not (tmp_path / "killed" / "model.safetensors").exists()
    )
    run_stage("sft.sh", env=environment("killed"))
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    for key in whole:
        torch.testing.assert_close(resumed[key].float(), whole[key].float(), atol=1e-2, rtol=1e-2)  # bf16
    AutoModelForCausalLM.from_pretrained(tmp_path / "killed")


@pytest.mark.parametrize("weight", [0.25, 1, 1.4, 2.5])
def test_a_share_of_whole_sequences_is_drawn(world, policy, weight):
    files = {"info_file": world.info, "train": world.train, "valid": world.valid}
    given = data.load(**files, max_history=4), Prompts(category="items"), policy.tokenizer

    def rows(weight):
        options = sft.Options(sft_tasks=f"sid_seq:{weight}", max_history=4)
        return sft.build_lines(options, None, *given)[0].rows

    whole, found = rows(1), rows(weight)
    assert len(found.answer) == round(weight * len(whole.answer))
    if weight == 1:
        assert np.array_equal(found.tokens, whole.tokens)
