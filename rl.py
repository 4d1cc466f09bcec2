"""Stage 5: reinforcement learning (GRPO) over catalog-constrained completions.

    bash rl.sh          or, in one process:
    python rl.py --model_path output/sft --train_file train.csv --eval_file valid.csv --info_file info.txt \\
        --output_dir output/rl

Each prompt's group is its `num_generations` best beams, or as many samples under the catalog's trie. Rewards compare the
completions with the row's own target (minionerec/rewards/functions.py). Every `eval_step` the model is scored on
validation rows by constrained beam search, and the weights with the best `metric_for_best_model` are saved; if no
evaluation is better than the first, the initial weights are saved (`keep_start`).

Re-running skips a finished run and resumes a killed one from its newest complete checkpoint. docs/rl.md describes
rewards, logged metrics, the recipe of rl.sh, and departures from TRL and the papers.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from minionerec.common import model_card, runs
from minionerec.common.console import say
from minionerec.common.errors import UserError
from minionerec.common.options import INPUT, OUTPUT, RUNTIME, option, run
from minionerec.common.processes import on_main_process
from minionerec.common.tracking import TrackedOptions
from minionerec.decoding.backends import BACKENDS, require_vllm
from minionerec.decoding.spaces import SPACES
from minionerec.language_model.file_names import CHECKPOINT_FILES

LOSS_TYPES = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
CISPO_EPSILON = 5.0  # largest weight that ScaleRL (arXiv 2510.13786) recommends for cispo
TRL_NAMES = (  # options that have the same name in trl.GRPOConfig
    "output_dir", "seed", "num_generations", "temperature", "top_p", "scale_rewards", "gradient_accumulation_steps",
    "num_train_epochs", "num_iterations", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm",
    "gradient_checkpointing", "loss_type", "epsilon", "beta", "sync_ref_model", "ref_model_sync_steps",
    "ref_model_mixup_alpha",
)  # fmt: skip
SCALES = ("group", "batch", "none")
SHOWN = {"loss": "loss", "reward": "reward", "kl": "KL"}  # on the line of an evaluation


@dataclass
class Options(TrackedOptions):
    # ---- data and model
    model_path: str = option("", "folder of the SFT checkpoint", role=INPUT)
    train_file: str = option("", "train CSV", role=INPUT)
    eval_file: str = option("", "valid CSV", role=INPUT)
    info_file: str = option("", "info file: the catalog", role=INPUT)
    sid_index_path: str = option("", "<D>.index.json; must agree with --info_file", role=INPUT)
    item_meta_path: str = option("", "<D>.item.json; must have as many items as --info_file", role=INPUT)
    output_dir: str = option("", "folder for the checkpoint", role=OUTPUT)
    category: str = option("", "what the prompts call the items; default: as the checkpoint was trained")
    prompt_template: str = option("", "wording of the prompts; default: the checkpoint's", role=INPUT)
    max_history: int = option(0, "items of history in a prompt; 0: as the checkpoint was trained")
    rl_tasks: str = option("sid_seq", "sid_seq, title2sid, title_seq2sid; title2sid:1000 uses at most 1000 rows of it")
    train_rows: int = option(-1, "rows of --train_file, drawn by seed; -1: all", aliases=["--sample", "--sample_train"])
    eval_rows: int = option(1000, "rows of --eval_file for evaluation, drawn by seed; -1: all")
    seed: int = option(42, "seed of row order, samples and adapters")
    # ---- generation
    num_generations: int = option(16, "completions per prompt: its group")
    space: str = option(
        "vocab",
        "normalise log-probabilities over the vocabulary (vocab) or over the tokens that the trie allows (catalog), "
        "in generation, loss and evaluation",
        aliases=["--logp_space"],
    )
    beam_search: bool = option(True, "the group is the beam list; False: it is sampled")
    temperature: float = option(1.0, "logits are divided by it, in generation and in log-probabilities")
    top_p: float = option(1.0, "nucleus sampling threshold (top-p), with --beam_search False")
    dynamic_sampling: bool = option(False, "draw 1.5 x num_generations; keep the target first, then distinct others")
    add_gt: bool = option(False, "replace the last completion by the target if the group does not contain it")
    rollout: str = option(
        "transformers", "what generates the groups: transformers (tree search) or vllm (docs/vllm.md)"
    )
    vllm_gpu_memory_utilization: float = option(
        0.3, "share of each GPU's memory for vLLM's weights and cache", role=RUNTIME
    )
    vllm_enable_sleep_mode: bool = option(
        False, "vLLM gives its GPU memory back while the model is trained", role=RUNTIME
    )
    vllm_tensor_parallel_size: int = option(1, "GPUs of one vLLM engine; more than 1 is not supported", role=RUNTIME)
    # ---- rewards
    reward_type: str = option(
        "ranking",
        "some of rule, ndcg, prefix, semantic, sasrec, dense; ranking is rule,ndcg and ranking_only is ndcg",
    )
    reward_module: str = option("", "path.py:name, your own reward, in addition to --reward_type", role=RUNTIME)
    reward_weights: str = option("", "a weight per reward, in order: 1,0.5; default: all 1")
    scale_rewards: str = option("group", "divide advantages by the standard deviation of the group, the batch, or none")
    ada_path: str = option("", ".npy of item embeddings, for the reward semantic", role=INPUT)
    baseline_path: str = option(
        "", "folder of a baseline that sasrec.sh trained, for sasrec and dense", role=INPUT, aliases=["--cf_path"]
    )
    # ---- optimisation
    train_batch_size: int = option(64, "completions per forward and process")
    gradient_accumulation_steps: int = option(1, "forwards per optimizer step")
    num_train_epochs: float = option(1.0, "passes over the rows")
    num_iterations: int = option(1, "optimizer steps per generation")
    learning_rate: float = option(1e-6, "peak learning rate")
    lr_scheduler_type: str = option("cosine", "any schedule of transformers")
    warmup_ratio: float = option(0.03, "share of the steps that warm up")
    weight_decay: float = option(0.0, "AdamW weight decay")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: not clipped")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time", role=RUNTIME)
    # ---- loss
    loss_type: str = option("grpo", f"TRL's losses: {', '.join(LOSS_TYPES)}")
    dapo: bool = option(False, "DAPO's token-level loss (arXiv 2503.14476): --loss_type dapo")
    gspo: bool = option(False, "GSPO's sequence-level ratio (arXiv 2507.18071); luspo always uses it")
    epsilon: float = option(0.2, "ratios are clipped at 1 - epsilon")
    epsilon_high: float = option(0.0, "and at 1 + epsilon_high; 0: as epsilon. cispo: at epsilon_high; 0: 5")
    beta: float = option(0.04, "weight of the KL divergence from the reference model; 0: no reference model")
    sync_ref_model: bool = option(False, "move the reference model towards the policy every --ref_model_sync_steps")
    ref_model_sync_steps: int = option(512, "steps between two moves of the reference model")
    ref_model_mixup_alpha: float = option(0.6, "share of the policy in the moved reference model")
    mask_all_zero: bool = option(False, "exclude groups whose advantages are all zero from the loss")
    # ---- LoRA
    use_lora: bool = option(False, "train low-rank adapters (arXiv 2106.09685); saved merged")
    lora_r: int = option(16, "rank of the adapters")
    lora_alpha: int = option(32, "adapters are scaled by lora_alpha / lora_r")
    lora_dropout: float = option(0.0, "accepted as in sft.py, without effect: dropout is off in RL", role=RUNTIME)
    lora_target_modules: str = option("all-linear", "q_proj,v_proj,… or all-linear: all but the LM head")
    # ---- evaluation
    eval_step: float = option(0.1, "steps between evaluations, which also save; below 1: share of all steps")
    eval_beams: int = option(20, "beams of evaluation and of --test_during_training", aliases=["--test_beam"])
    eval_batch_size: int = option(32, "prompts per search in evaluation, per process", role=RUNTIME)
    metric_for_best_model: str = option("", "HR@K or NDCG@K; default: NDCG@10, or @eval_beams if that is less")
    keep_start: bool = option(
        True, "save the initial weights if no evaluation improves without losing HR at any K (docs/rl.md)"
    )
    test_during_training: bool = option(False, "log HR and NDCG of --eval_beams beams on each batch", role=RUNTIME)
    resume_from_checkpoint: str = option("", "a checkpoint-N folder; default: the newest of this run", role=RUNTIME)

    def __post_init__(self):
        super().__post_init__()
        self.metric_for_best_model = self.metric_for_best_model or f"NDCG@{min(10, self.eval_beams)}"
        if self.dapo:
            self.check(dapo=(self.loss_type in ("grpo", "dapo"), f"False with --loss_type {self.loss_type}"))
            self.loss_type = "dapo"
        if self.loss_type == "cispo":
            self.epsilon_high = self.epsilon_high or CISPO_EPSILON


# ------------------------------------------------------------------------------------------------ checks


def check(options: Options) -> None:
    """Refuse what cannot work, before anything is loaded or written. Raises `UserError`."""
    from data import parse_rl_tasks
    from minionerec.evaluation.metrics import cutoffs_of
    from minionerec.rewards.registry import check_files

    options.require("model_path", "train_file", "eval_file", "info_file", "output_dir")
    sizes = ("train_batch_size", "gradient_accumulation_steps", "num_iterations", "eval_batch_size", "eval_beams")
    options.at_least(1, *sizes, "ref_model_sync_steps", "lora_r")
    options.at_least(0, "max_history", "beta", "weight_decay", "max_grad_norm", "learning_rate", "lora_dropout")
    metrics = [f"{metric}@{k}" for metric in ("HR", "NDCG") for k in cutoffs_of(options.eval_beams)]
    vespo = options.gspo and options.loss_type == "vespo"
    options.check(
        num_generations=(options.num_generations >= 2, "at least 2 completions"),
        train_rows=(options.train_rows >= 1 or options.train_rows == -1, "at least 1, or -1 for all"),
        eval_rows=(options.eval_rows >= 1 or options.eval_rows == -1, "at least 1, or -1 for all"),
        space=(options.space in SPACES, " or ".join(SPACES)),
        temperature=(options.temperature > 0, "more than 0"),
        top_p=(0 < options.top_p <= 1, "more than 0 and at most 1"),
        num_train_epochs=(options.num_train_epochs > 0, "more than 0"),
        warmup_ratio=(0 <= options.warmup_ratio < 1, "0 or more and below 1"),
        eval_step=(
            0 < options.eval_step < 1 or options.eval_step % 1 == 0 < options.eval_step,
            "a share or whole steps",
        ),
        loss_type=(options.loss_type in LOSS_TYPES, f"one of {', '.join(LOSS_TYPES)}"),
        gspo=(not vespo, "False: vespo has a sequence-level ratio"),
        epsilon=(0 < options.epsilon < 1, "more than 0 and below 1"),
        epsilon_high=(options.epsilon_high >= 0, "at least 0"),
        rollout=(options.rollout in BACKENDS, " or ".join(BACKENDS)),
        vllm_gpu_memory_utilization=(0 < options.vllm_gpu_memory_utilization < 1, "more than 0 and below 1"),
        vllm_tensor_parallel_size=(options.vllm_tensor_parallel_size == 1, "1: an engine in each process"),
        scale_rewards=(options.scale_rewards in SCALES, f"one of {', '.join(SCALES)}"),
        ref_model_mixup_alpha=(0 <= options.ref_model_mixup_alpha <= 1, "0 to 1"),
        metric_for_best_model=(
            options.metric_for_best_model in metrics,
            f"with --eval_beams {options.eval_beams} one of {', '.join(metrics)}",
        ),
    )
    options.check(
        top_p=(options.top_p == 1 or not options.beam_search, "1 with beams, or --beam_search False"),
        epsilon_high=(
            options.loss_type != "cispo" or options.epsilon_high >= 1,
            "at least 1 with --loss_type cispo, where it is the largest weight of a token",
        ),
        sync_ref_model=(
            not options.sync_ref_model or (options.beta > 0 and not options.use_lora),
            "False with --beta 0 or --use_lora True, which have no reference model to move",
        ),
    )
    if options.rollout == "vllm":
        require_vllm("rollout")
    parse_rl_tasks(options.rl_tasks)
    check_files(options.reward_type, options.reward_module, options.ada_path, options.baseline_path)
    check_batch(options)


def check_batch(options: Options) -> None:
    """Whole groups on each process."""
    completions = options.train_batch_size * options.gradient_accumulation_steps
    group = options.num_generations
    if completions % group:
        below = max(completions // group * group, group)
        raise UserError(
            f"--train_batch_size {options.train_batch_size} x --gradient_accumulation_steps "
            f"{options.gradient_accumulation_steps} = {completions} completions per process is not divisible by "
            f"--num_generations {group}; the nearest products that are: {below} or {below + group}"
        )


# ------------------------------------------------------------------------------------------------ the run's parts


def join_processes() -> None:
    """Initialise the process group that a launcher of several processes has prepared."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(seconds=1800))


def begin(options: Options) -> runs.Run:
    """The record of this run, the same in every process."""
    from data import template_of
    from minionerec.rewards.registry import split_module

    training = runs.read_record(Path(options.model_path) / runs.RECORD)
    if training and not training.get("complete"):
        raise UserError(f"{options.model_path}: training is not finished; re-run {training.get('stage')} first")
    inputs = {"template": template_of(options.model_path, options.prompt_template)}
    if options.reward_module:
        file, names = split_module(options.reward_module)
        inputs["reward_module"] = [file, f":{names}"]
    return on_main_process(
        lambda: runs.begin(options, "rl", folder=options.output_dir, writes=CHECKPOINT_FILES, inputs=inputs)
    )


def settings_of(options: Options):
    """Category, history and space of this run: the checkpoint's category and history unless options say otherwise."""
    from minionerec.language_model.checkpoints import resolve_settings

    given = {"category": options.category, "max_history": options.max_history}
    return on_main_process(lambda: resolve_settings(options.model_path, **given))._replace(space=options.space)


def read_data(options: Options, max_history: int):
    """(items, catalog, and the rows of train and valid that are used; the headline protocol of the whole train set)"""
    from data import drawn, load
    from minionerec.evaluation.protocols import headline

    data = load(
        info_file=options.info_file,
        sid_index_path=options.sid_index_path,
        item_meta_path=options.item_meta_path,
        train=options.train_file,
        valid=options.eval_file,
        max_history=max_history,
    )
    if len(data.catalog.sids) < options.num_generations:
        raise UserError(
            f"{options.info_file}: found {len(data.catalog.sids)} distinct SIDs, expected at least --num_generations "
            f"{options.num_generations}; lower it"
        )
    used = data._replace(
        train=drawn(data.train, options.train_rows, options.seed),
        valid=drawn(data.valid, options.eval_rows, options.seed),
    )
    return used, headline(data.train)


def read_rewards(options: Options, catalog) -> list:
    """The reward functions; their files are checked against the catalog."""
    from minionerec.baselines.models import load_checkpoint
    from minionerec.rewards.registry import parse_weights, reward_functions, unit_embeddings

    embeddings = unit_embeddings(options.ada_path, catalog.n_items) if options.ada_path else None
    baseline = None
    if options.baseline_path:
        baseline = load_checkpoint(options.baseline_path, "baseline_path", catalog.n_items).scores
    rewards = reward_functions(
        options.reward_type, options.num_generations, catalog, embeddings, baseline, options.reward_module
    )
    parse_weights(options.reward_weights, [reward.__name__ for reward in rewards])
    return rewards


def prompts_of(options: Options, settings):
    """The prompts of RL and of its evaluation: wording and category are the checkpoint's unless options say otherwise."""
    from data import Prompts, template_of

    return Prompts(template_of(options.model_path, options.prompt_template), settings.category)


def rows_of(options: Options, data, prompts) -> dict[str, list]:
    """The columns of the RL dataset: prompts, and what their rewards need."""
    from data import parse_rl_tasks, rl_rows

    return rl_rows(data.train, data.items, prompts, parse_rl_tasks(options.rl_tasks), options.seed)


def validation_of(data, protocol: str, prompts) -> tuple[list[str], list[int], list[list[int]] | None]:
    """Prompts and target items of the validation rows, and the items that are not ranked, None where all are."""
    from data import next_sid_prompts

    seen = data.valid["seen"].to_list() if protocol == "unseen" else None
    return next_sid_prompts(data.valid, data.items, prompts), data.valid["target"].to_list(), seen


def training_arguments(options: Options, completion_length: int, rewards: Sequence[str]):
    """`trl.GRPOConfig` for these options. completion_length: tokens of the longest SID."""
    import torch
    from trl import GRPOConfig

    from minionerec.common.devices import use_one_gpu, wants_bf16
    from minionerec.rewards.registry import parse_weights

    settings = {name: getattr(options, name) for name in TRL_NAMES} | {
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": wants_bf16(),
        "per_device_train_batch_size": options.train_batch_size,
        "warmup_steps": options.warmup_ratio,  # below 1: a share of all steps
        "dataloader_pin_memory": torch.cuda.is_available(),
        "max_completion_length": completion_length,
        "reward_weights": parse_weights(options.reward_weights, rewards),
        "importance_sampling_level": "sequence" if options.gspo or options.loss_type == "luspo" else "token",
        "epsilon_high": options.epsilon_high or None,
        "num_generations_eval": 1,  # evaluation does not sample, so groups need not divide its batch
        "per_device_eval_batch_size": options.eval_batch_size,
        "eval_strategy": "steps",
        "eval_on_start": True,
        "eval_steps": options.eval_step,
        "save_steps": options.eval_step,
        "logging_steps": min(options.eval_step, 0.02),
        "load_best_model_at_end": True,
        "metric_for_best_model": f"eval_{options.metric_for_best_model}",
        "greater_is_better": True,
        "report_to": "none",  # ConsoleCallback prints, logs and tracks
        "disable_tqdm": True,
    }
    try:
        return use_one_gpu(GRPOConfig(**settings))
    except ValueError as error:  # such as the name of a schedule
        raise UserError(f"transformers refuses these options: {' '.join(str(error).split())}") from None


def plan_steps(options: Options, args, rows: int) -> None:
    """Print what a step and an epoch are; evaluate at least once. Refuses fewer rows than one generation uses."""
    prompts = args.generation_batch_size // options.num_generations
    if rows < prompts:
        raise UserError(
            f"{options.train_file}: {rows} RL rows, expected at least {prompts}, the prompts of one generation: "
            f"--train_batch_size {options.train_batch_size} x --gradient_accumulation_steps "
            f"{options.gradient_accumulation_steps} x {args.world_size} processes / --num_generations "
            f"{options.num_generations}; lower the batch"
        )
    steps = rows // prompts * options.num_iterations
    args.eval_steps = args.save_steps = min(args.eval_steps, math.ceil(steps * options.num_train_epochs))
    say(
        f"{rows:,} rows; {prompts:,} prompts x {options.num_generations} completions per generation; "
        f"{steps:,} optimizer steps per epoch"
    )


def build_trainer(options: Options, data, protocol: str, rewards: list, prompts, keep):
    """The trainer with model, rows, rewards and validation rows; `keep` looks after its checkpoints."""
    from datasets import Dataset

    from minionerec.language_model.adapters import lora_config, refuse_embeddings
    from minionerec.language_model.checkpoints import first_line, load_model, load_tokenizer
    from minionerec.language_model.console_callback import ConsoleCallback
    from minionerec_trainer import ReReTrainer

    rows = Dataset.from_dict(rows_of(options, data, prompts))
    depth = data.catalog.codes.shape[1]
    args = training_arguments(options, depth, [reward.__name__ for reward in rewards])
    plan_steps(options, args, len(rows))
    model, adapter = load_model(options.model_path, "model_path"), None
    if options.use_lora:
        refuse_embeddings(model, options.lora_target_modules)
        adapter = lora_config(options.lora_r, options.lora_alpha, 0.0, options.lora_target_modules)
    try:
        return ReReTrainer(
            model=model,
            processing_class=load_tokenizer(options.model_path, "model_path"),
            reward_funcs=rewards,
            args=args,
            train_dataset=rows,
            eval_dataset=rows.select(range(1)),  # TRL wants one; `evaluate` searches the validation rows
            peft_config=adapter,
            callbacks=[keep, ConsoleCallback(options, SHOWN)],
            catalog=data.catalog,
            space=options.space,
            beams=options.beam_search,
            dynamic_sampling=options.dynamic_sampling,
            add_gt=options.add_gt,
            mask_all_zero=options.mask_all_zero,
            test_beams=options.eval_beams if options.test_during_training else 0,
            validation=validation_of(data, protocol, prompts),
            eval_beams=options.eval_beams,
            keep_recall=options.keep_start,
        )
    except ValueError as error:  # PEFT found no such modules
        if not options.use_lora:
            raise
        raise UserError(f"--lora_target_modules {options.lora_target_modules}: {first_line(error)}") from None


def save_best(options: Options, trainer, prompts, settings) -> None:
    """Write the weights with the best validation metric and print that metric. Every process calls it."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from minionerec.language_model.checkpoints import load_model, save, save_trained

    trainer.accelerator.wait_for_everyone()  # another process may still be loading the best checkpoint
    metric, best = trainer.args.metric_for_best_model, trainer.state.best_metric
    start = next(entry[metric] for entry in trainer.state.log_history if metric in entry)
    improved = best is not None and best > start
    if improved or not options.keep_start:
        save_trained(trainer, prompts.path, options.output_dir, settings)
    if trainer.args.process_index:
        return
    name = metric.removeprefix("eval_")
    say(f"valid {name} before training {start:.4f}")
    if best is not None:
        say(f"best valid {name} {best:.4f}, at step {trainer.state.best_global_step}")
    if not improved and options.keep_start:
        say(f"no evaluation improves: {options.output_dir} gets the initial weights (--keep_start False: RL's best)")
        unset_hf_deepspeed_config()  # under ZeRO-3 the model would be loaded in shards
        model = load_model(options.model_path, "model_path")
        save(model, trainer.processing_class, prompts.path, options.output_dir, settings)


# ------------------------------------------------------------------------------------------------ main


def main(options: Options) -> None:
    check(options)
    join_processes()
    record = begin(options)
    if record.complete:
        return

    from minionerec.decoding.rollout import start_rollout
    from minionerec.language_model.numbered_checkpoints import KeepCheckpoints, remove_checkpoints, resume_point

    settings = settings_of(options)
    data, protocol = read_data(options, settings.max_history)
    rewards = read_rewards(options, data.catalog)
    prompts = prompts_of(options, settings)
    given = options.resume_from_checkpoint
    resume = on_main_process(lambda: resume_point(options.output_dir, given, record))
    keep = KeepCheckpoints(prompts.path, settings, resume, record.record)
    trainer = build_trainer(options, data, protocol, rewards, prompts, keep)
    start_rollout(options, trainer)
    trainer.train(resume_from_checkpoint=resume)
    save_best(options, trainer, prompts, settings)
    if trainer.args.process_index == 0:
        model_card.write(record, base_model=options.model_path)
        record.finish()
        remove_checkpoints(options.output_dir, record.record, keep=[given])


if __name__ == "__main__":
    run(main, Options)
