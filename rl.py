"""Stage 5: reinforcement learning (GRPO) over catalog-constrained completions.

    accelerate launch --config_file config/zero2_opt.yaml rl.py --model_path output/sft --train_file train.csv \
        --eval_file valid.csv --info_file info.txt --category Video_Games --output_dir output/rl

Each prompt's group is its `num_generations` best beams, or as many samples under the catalog's trie; rewards are
functions of the rows' own targets (rewards.py).
Every --eval_step the model is tested on validation rows by constrained beam search, and the weights with the best
--metric_for_best_model are saved: those that it started from, if no later ones are better (--keep_start). A killed run goes on from its last checkpoint when the same command is given again.
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import LoraConfig
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import GRPOConfig

from data import Prompts, next_sid_prompts, parse_rl_tasks, read_sequences, rl_rows, template_of
from minionerec.baselines.models import load_checkpoint
from minionerec.catalog.catalog import Catalog, target_counts
from minionerec.catalog.items import read_info, read_titles
from minionerec.catalog.sids import read_index
from minionerec.common.devices import wants_bf16
from minionerec.common.errors import UserError
from minionerec.common.files import require_file
from minionerec.common.options import run
from minionerec.common.runs import begin, finish
from minionerec.decoding.lm_head import SPACES
from minionerec.evaluation.validation import cutoffs_of
from minionerec.language_model.adapters import lora_config
from minionerec.language_model.checkpoints import (
    last_checkpoint,
    load_model,
    load_tokenizer,
    remove_checkpoints,
    save,
    save_trained,
)
from minionerec.rewards.registry import names_of, parse_weights, reward_functions, unit_embeddings
from minionerec_trainer import ReReTrainer

LOSS_TYPES = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
SCALES = ("group", "batch", "none")
REPORTERS = ("wandb", "tensorboard")


@dataclass
class Options:
    # data and model
    model_path: str = HfArg(default="", help="folder of the SFT checkpoint")
    train_file: str = HfArg(default="", help="train CSV")
    eval_file: str = HfArg(default="", help="valid CSV")
    info_file: str = HfArg(default="", help="info file: the catalog")
    output_dir: str = HfArg(default="", help="folder for the checkpoint")
    category: str = HfArg(default="", help="what the prompts call the items")
    prompt_template: str = HfArg(default="", help="wording of the prompts; default: the checkpoint's own")
    max_history: int = HfArg(default=10, help="items of history in a prompt")
    sample_train: int = HfArg(default=-1, help="use this many rows of --train_file, drawn by seed; -1 for all")
    eval_rows: int = HfArg(default=1000, help="rows of --eval_file, drawn by seed, for the evaluations; -1 for all")
    rl_tasks: str = HfArg(default="sid_seq", help="prompts and most rows of each: sid_seq,title2sid:1000,title_seq2sid")
    sid_index_path: str = HfArg(default="", help="<D>.index.json; must agree with --info_file")
    item_meta_path: str = HfArg(default="", help="<D>.item.json; must have as many items as --info_file")
    # generation
    num_generations: int = HfArg(default=16, help="completions of a prompt: its group")
    temperature: float = HfArg(default=1.0, help="logits are divided by it, in generation and in log-probabilities")
    logp_space: str = HfArg(
        default="vocab",
        help="log-probabilities over the vocabulary, or over what the trie allows (catalog); generation likewise",
    )
    beam_search: bool = HfArg(default=True, help="the group is the beam list; False: it is sampled")
    top_p: float = HfArg(default=1.0, help="samples come from the most probable tokens that hold this much probability")
    dynamic_sampling: bool = HfArg(default=False, help="draw 1.5 x num_generations, keep the target first")
    add_gt: bool = HfArg(default=False, help="a target that its group lacks replaces the last completion")
    # rewards
    reward_type: str = HfArg(
        default="ranking",
        help="some of rule, ndcg, prefix, semantic, sasrec; ranking is rule,ndcg and ranking_only is ndcg",
    )
    reward_module: str = HfArg(default="", help="path.py:name, a function of yours that joins --reward_type's")
    reward_weights: str = HfArg(default="", help="a weight for each reward, in order: 1,0.5; default: all 1")
    scale_rewards: str = HfArg(default="group", help="divide advantages by the group's or batch's deviation, or none")
    ada_path: str = HfArg(default="", help=".npy of item embeddings, for the semantic reward")
    cf_path: str = HfArg(default="", help="folder that sasrec.sh wrote, for the sasrec reward")
    # training
    seed: int = HfArg(default=42, help="seed")
    train_batch_size: int = HfArg(default=64, help="completions of one forward on one process")
    eval_batch_size: int = HfArg(default=32, help="prompts of one search in evaluation on one process")
    gradient_accumulation_steps: int = HfArg(default=1, help="forwards of an optimizer step")
    num_train_epochs: float = HfArg(default=1, help="passes over the rows")
    num_iterations: int = HfArg(default=1, help="optimizer steps on one generation")
    learning_rate: float = HfArg(default=1e-6, help="peak learning rate")
    lr_scheduler_type: str = HfArg(default="cosine", help="any schedule of transformers")
    warmup_ratio: float = HfArg(default=0.03, help="share of the steps that warm up")
    weight_decay: float = HfArg(default=0.0, help="AdamW weight decay")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are clipped to this norm")
    loss_type: str = HfArg(default="grpo", help=f"TRL's losses: {', '.join(LOSS_TYPES)}")
    dapo: bool = HfArg(default=False, help="DAPO's token-level loss (arXiv 2503.14476): --loss_type dapo")
    gspo: bool = HfArg(default=False, help="GSPO's sequence-level ratio (arXiv 2507.18071); luspo always has it")
    epsilon: float = HfArg(default=0.2, help="ratios are clipped at 1 - epsilon")
    epsilon_high: float = HfArg(default=0.0, help="and at 1 + epsilon_high (cispo: at epsilon_high); 0: as epsilon")
    beta: float = HfArg(default=0.04, help="weight of the KL divergence to the reference model; 0: no reference")
    sync_ref_model: bool = HfArg(default=False, help="move the reference towards the policy now and then")
    ref_model_sync_steps: int = HfArg(default=512, help="steps between two moves of --sync_ref_model")
    ref_model_mixup_alpha: float = HfArg(default=0.6, help="share of the policy in the moved reference")
    mask_all_zero: bool = HfArg(default=False, help="drop groups whose advantages are all zero from the loss")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, more time")
    use_lora: bool = HfArg(default=False, help="train low-rank adapters (arXiv 2106.09685); saved merged")
    lora_r: int = HfArg(default=16, help="rank of the adapters")
    lora_alpha: int = HfArg(default=32, help="adapters are scaled by lora_alpha / lora_r")
    lora_dropout: float = HfArg(default=0.0, help="dropout on the adapters' inputs")
    lora_target_modules: str = HfArg(default="all-linear", help="q_proj,v_proj,… or all-linear: all but the LM head")
    # evaluation and logging
    eval_step: float = HfArg(default=0.1, help="evaluate and save every so many steps; below 1: share of all steps")
    test_during_training: bool = HfArg(default=False, help="log HR and NDCG of --test_beam beams on each batch")
    test_beam: int = HfArg(default=20, help="beams of the evaluations and of --test_during_training")
    metric_for_best_model: str = HfArg(default="", help="HR@K or NDCG@K; default: NDCG@10, or of fewer beams")
    keep_start: bool = HfArg(
        default=True, help="save the start's weights where no evaluation is better than the start's"
    )
    resume_from_checkpoint: str = HfArg(default="", help="a checkpoint-N folder; default: where this run was killed")
    report_to: str = HfArg(default="", help="wandb or tensorboard beside the console; default: the console alone")
    wandb_project: str = HfArg(default="", help="log to this Weights & Biases project")
    wandb_run_name: str = HfArg(default="", help="its run name")
    reward_file: str = field(init=False, default="")  # of --reward_module: a changed file makes another run

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        rules = [
            ("test_beam", self.test_beam >= 1, "at least 1"),
            ("logp_space", self.logp_space in SPACES, " or ".join(SPACES)),
            ("temperature", self.temperature > 0, "more than 0"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top_p", self.top_p == 1 or not self.beam_search, "1 with beams, or --beam_search False"),
            ("loss_type", self.loss_type in LOSS_TYPES, f"one of {', '.join(LOSS_TYPES)}"),
            ("dapo", not self.dapo or self.loss_type in ("grpo", "dapo"), f"False beside --loss_type {self.loss_type}"),
            ("gspo", not self.gspo or self.loss_type != "vespo", "False: vespo has a ratio of its own"),
            ("scale_rewards", self.scale_rewards in SCALES, f"one of {', '.join(SCALES)}"),
            ("num_iterations", self.num_iterations >= 1, "at least 1"),
            ("beta", self.beta >= 0, "at least 0"),
            ("sync_ref_model", not self.sync_ref_model or self.beta > 0, "False: with --beta 0 there is no reference"),
            ("sync_ref_model", not self.sync_ref_model or not self.use_lora, "False: --use_lora has no reference copy"),
            ("lora_r", self.lora_r >= 1, "at least 1"),
            ("report_to", self.report_to in ("", "none", *REPORTERS), f"nothing, none, {' or '.join(REPORTERS)}"),
        ]
        for flag, kept, expected in rules:
            if not kept:
                raise UserError(f"--{flag} {getattr(self, flag)}: expected {expected}")
        self.metric_for_best_model = self.metric_for_best_model or f"NDCG@{min(10, self.test_beam)}"
        known = [f"{metric}@{k}" for metric in ("HR", "NDCG") for k in cutoffs_of(self.test_beam)]
        if self.metric_for_best_model not in known:
            raise UserError(
                f"--metric_for_best_model {self.metric_for_best_model}: expected, with --test_beam {self.test_beam}, one "
                f"of {', '.join(known)}"
            )
        parse_rl_tasks(self.rl_tasks)
        if self.report_to == "tensorboard" and not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
            raise UserError("--report_to tensorboard: the package is not installed; pip install tensorboard")
        for flag, reward in (("ada_path", "semantic"), ("cf_path", "sasrec")):
            path = getattr(self, flag)
            if path and reward not in names_of(self.reward_type) and not self.reward_module:
                raise UserError(f"--{flag} {path}: no reward reads it; add {reward} to --reward_type or leave it out")
            if path:
                require_file(path, flag)
        if ":" in self.reward_module:
            self.reward_file = str(require_file(self.reward_module.rpartition(":")[0], "reward_module"))
        if not self.output_dir:
            raise UserError("--output_dir is required")
        for flag in ("model_path", "train_file", "eval_file", "info_file"):
            require_file(getattr(self, flag), flag)
        rows, group = self.train_batch_size * self.gradient_accumulation_steps, self.num_generations
        if group < 2:
            raise UserError(f"--num_generations {group}: a group needs at least 2 completions")
        if rows < 1 or rows % group:
            below = max(rows // group * group, group)
            raise UserError(
                f"--train_batch_size {self.train_batch_size} x --gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps} = {rows} completions a process is not divisible by "
                f"--num_generations {group}; the nearest products that are: {below} or {below + group}"
            )


def read_catalog(options: Options):
    """(items, train rows, validation rows, catalog), checked against each other."""
    items = read_info(options.info_file)
    for flag in ("sid_index_path", "item_meta_path"):
        if getattr(options, flag):
            found = (
                read_index(options.sid_index_path) if flag == "sid_index_path" else read_titles(options.item_meta_path)
            )
            if flag == "sid_index_path" and found != items.sids or len(found) != len(items.sids):
                raise UserError(
                    f"{getattr(options, flag)}: {len(found)} items that differ from the {len(items.sids)} of "
                    f"{options.info_file}; make both from one index (convert_dataset.sh)"
                )
    train = read_sequences(options.train_file, items.sids, "train_file", options.max_history)
    valid = read_sequences(options.eval_file, items.sids, "eval_file", options.max_history)
    catalog = Catalog(items.sids, target_counts(train, len(items.sids)))
    if len(catalog.sids) < options.num_generations:
        raise UserError(
            f"{options.info_file}: found {len(catalog.sids)} distinct SIDs, expected at least --num_generations "
            f"{options.num_generations}; lower it"
        )
    if 0 <= options.sample_train < len(train):
        train = train.sample(options.sample_train, seed=options.seed)
    if 0 <= options.eval_rows < len(valid):
        valid = valid.sample(options.eval_rows, seed=options.seed)
    return items, train, valid, catalog


def read_rewards(options: Options, catalog: Catalog) -> list:
    """The reward functions, their files read and held against the catalog."""
    embeddings = unit_embeddings(options.ada_path, catalog.n_items) if options.ada_path else None
    collaborative = load_checkpoint(options.cf_path, "cf_path", catalog.n_items).scores if options.cf_path else None
    rewards = reward_functions(
        options.reward_type, options.num_generations, catalog, embeddings, collaborative, options.reward_module
    )
    parse_weights(options.reward_weights, [reward.__name__ for reward in rewards])
    return rewards


def training_arguments(options: Options, completion_length: int, rewards: Sequence[str]) -> GRPOConfig:
    if options.wandb_project:
        os.environ["WANDB_PROJECT"] = options.wandb_project
    reporter = options.report_to or ("wandb" if options.wandb_project else "none")
    if reporter == "tensorboard":
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", os.path.join(options.output_dir, "tensorboard"))
    return GRPOConfig(
        output_dir=options.output_dir,
        seed=options.seed,
        use_cpu=not torch.accelerator.is_available(),
        per_device_train_batch_size=options.train_batch_size,
        per_device_eval_batch_size=options.eval_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        num_train_epochs=options.num_train_epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=options.warmup_ratio,  # below 1: a share of all steps
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        num_generations=options.num_generations,
        num_iterations=options.num_iterations,
        max_completion_length=completion_length,
        temperature=options.temperature,
        top_p=options.top_p,
        reward_weights=parse_weights(options.reward_weights, rewards),
        scale_rewards=options.scale_rewards,
        beta=options.beta,
        epsilon=options.epsilon,
        epsilon_high=options.epsilon_high or None,
        sync_ref_model=options.sync_ref_model,
        ref_model_sync_steps=options.ref_model_sync_steps,
        ref_model_mixup_alpha=options.ref_model_mixup_alpha,
        loss_type="dapo" if options.dapo else options.loss_type,
        importance_sampling_level="sequence" if options.gspo or options.loss_type == "luspo" else "token",
        bf16=wants_bf16(),
        gradient_checkpointing=options.gradient_checkpointing,
        eval_strategy="steps",
        eval_steps=options.eval_step,
        eval_on_start=True,
        save_steps=options.eval_step,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{options.metric_for_best_model}",
        greater_is_better=True,
        logging_steps=min(options.eval_step, 0.02),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[] if reporter == "none" else [reporter],
        run_name=options.wandb_run_name or None,
    )


def adapter(options: Options) -> LoraConfig | None:
    """What --use_lora trains."""
    if not options.use_lora:
        return None
    return lora_config(options.lora_r, options.lora_alpha, options.lora_dropout, options.lora_target_modules)


def save_best(options: Options, trainer: ReReTrainer, prompt_template: Path) -> None:
    """Write the weights with the best validation metric, print that metric, and end the stage. Every process calls it."""
    metric, best = trainer.args.metric_for_best_model, trainer.state.best_metric
    start = next(entry[metric] for entry in trainer.state.log_history if metric in entry)
    helped = best > start
    if helped or not options.keep_start:
        save_trained(trainer, prompt_template, options.output_dir, options.logp_space)
    if trainer.args.process_index:
        return
    print(f"validation {metric} before training: {start:.4f}")
    print(f"best validation {metric}: {best:.4f}, at {trainer.state.best_model_checkpoint}")
    if not helped and options.keep_start:
        print(
            f"RL did not help on valid: {options.output_dir} gets the start's weights (--keep_start False: RL's best)"
        )
        unset_hf_deepspeed_config()  # under ZeRO-3 the model would be loaded in shards
        model = load_model(options.model_path, "model_path")
        model.config.sid_space = options.logp_space
        save(model, trainer.processing_class, prompt_template, options.output_dir)
    remove_checkpoints(options.output_dir)
    finish(options.output_dir, options)


def main(options: Options) -> None:
    options.check()
    items, train, valid, catalog = read_catalog(options)
    rewards = read_rewards(options, catalog)
    prompts = Prompts(template_of(options.model_path, options.prompt_template), options.category)

    depth = max(sid.count("<") for sid in catalog.sids)
    args = training_arguments(options, depth, [reward.__name__ for reward in rewards])
    [state] = broadcast_object_list([begin(options.output_dir, options) if args.process_index == 0 else None])
    if state == "complete":
        return
    if state == "fresh" and args.process_index == 0:
        remove_checkpoints(options.output_dir)

    rows = Dataset.from_dict(rl_rows(train, items, prompts, parse_rl_tasks(options.rl_tasks), options.seed))
    trainer = ReReTrainer(
        model=load_model(options.model_path, "model_path"),
        processing_class=load_tokenizer(options.model_path, "model_path"),
        reward_funcs=rewards,
        args=args,
        train_dataset=rows,
        eval_dataset=rows.select(range(1)),  # the validation rows are searched, not sampled: see ReReTrainer.evaluate
        peft_config=adapter(options),
        catalog=catalog,
        logp_space=options.logp_space,
        beams=options.beam_search,
        dynamic_sampling=options.dynamic_sampling,
        add_gt=options.add_gt,
        mask_all_zero=options.mask_all_zero,
        test_beam=options.test_beam if options.test_during_training else 0,
        validation=(next_sid_prompts(valid, items, prompts), valid["target"].to_list()),
        eval_beams=options.test_beam,
    )
    resume = options.resume_from_checkpoint or (last_checkpoint(options.output_dir) if state == "resume" else None)
    trainer.train(resume_from_checkpoint=resume)
    trainer.accelerator.wait_for_everyone()  # the checkpoints go, and another process may be loading the best of them
    save_best(options, trainer, prompts.path)


if __name__ == "__main__":
    run(main, Options)
