"""Stage 5: reinforcement learning (GRPO) over catalog-constrained beams.

    accelerate launch --config_file config/zero2_opt.yaml rl.py --model_path output/sft --train_file train.csv \
        --eval_file valid.csv --info_file info.txt --category Video_Games --output_dir output/rl

Each prompt's group is its `num_generations` best beams; rewards are functions of the rows' own targets (rewards.py).
Every --eval_step the model is tested on validation rows by constrained beam search, and the weights with the best
NDCG@10 are saved. A killed run goes on from its last checkpoint when the same command is given again.
"""

import os
from dataclasses import dataclass

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from trl import GRPOConfig

import checkpoint
from catalog import Catalog, read_index
from cli import HfArg, UserError, begin, finish, not_built, require_file, run
from data import Prompts, next_sid_prompts, read_info, read_sequences, read_titles, rl_rows, target_counts, template_of
from minionerec_trainer import ReReTrainer
from rewards import reward_functions


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
    sid_index_path: str = HfArg(default="", help="<D>.index.json; must agree with --info_file")
    item_meta_path: str = HfArg(default="", help="<D>.item.json; must have as many items as --info_file")
    # generation and rewards
    num_generations: int = HfArg(default=16, help="completions of a prompt: its group")
    temperature: float = HfArg(default=1.0, help="logits are divided by it, in search and in log-probabilities")
    beam_search: bool = HfArg(default=True, help="the group is the beam list")
    dynamic_sampling: bool = HfArg(default=False, help="draw 1.5 x num_generations, keep the target first")
    add_gt: bool = HfArg(default=False, help="a target that its group lacks replaces the last beam")
    reward_type: str = HfArg(default="ranking", help="rule | ranking (rule + ndcg) | ranking_only (ndcg)")
    ada_path: str = HfArg(default="", help="item embeddings of the semantic reward")
    cf_path: str = HfArg(default="", help="collaborative model of the sasrec reward")
    # training
    seed: int = HfArg(default=42, help="seed")
    train_batch_size: int = HfArg(default=64, help="completions of one forward on one process")
    eval_batch_size: int = HfArg(default=32, help="prompts of one search in evaluation on one process")
    gradient_accumulation_steps: int = HfArg(default=1, help="forwards of an optimizer step")
    num_train_epochs: float = HfArg(default=1, help="passes over the rows")
    learning_rate: float = HfArg(default=1e-6, help="peak learning rate")
    lr_scheduler_type: str = HfArg(default="cosine", help="any schedule of transformers")
    warmup_ratio: float = HfArg(default=0.03, help="share of the steps that warm up")
    beta: float = HfArg(default=0.04, help="weight of the KL divergence to the reference model; 0: no reference")
    sync_ref_model: bool = HfArg(default=False, help="move the reference towards the policy every 512 steps")
    dapo: bool = HfArg(default=False, help="DAPO's token-level loss (arXiv 2503.14476)")
    gspo: bool = HfArg(default=False, help="GSPO's sequence-level ratio (arXiv 2507.18071)")
    mask_all_zero: bool = HfArg(default=False, help="drop groups whose advantages are all zero")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, more time")
    # evaluation and logging
    eval_step: float = HfArg(default=0.1, help="evaluate and save every so many steps; below 1: share of all steps")
    test_during_training: bool = HfArg(default=False, help="log HR and NDCG of --test_beam beams on each batch")
    test_beam: int = HfArg(default=20, help="beams of the evaluations and of --test_during_training")
    resume_from_checkpoint: str = HfArg(default="", help="a checkpoint-N folder; default: where this run was killed")
    wandb_project: str = HfArg(default="", help="log to this Weights & Biases project")
    wandb_run_name: str = HfArg(default="", help="its run name")

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        if not self.beam_search:
            raise not_built("beam_search", False, "use beams with --beam_search True")
        for flag in ("dynamic_sampling", "mask_all_zero"):
            if getattr(self, flag):
                raise not_built(flag, True, f"leave it out with --{flag} False")
        for flag in ("ada_path", "cf_path"):
            if getattr(self, flag):
                raise not_built(flag, getattr(self, flag), "no reward reads it; leave it out")
        if not self.output_dir:
            raise UserError("--output_dir is required")
        for flag in ("model_path", "train_file", "eval_file", "info_file"):
            require_file(getattr(self, flag), flag)
        if self.test_beam < 1:
            raise UserError(f"--test_beam {self.test_beam}: expected at least 1")
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


def training_arguments(options: Options, completion_length: int) -> GRPOConfig:
    if options.wandb_project:
        os.environ["WANDB_PROJECT"] = options.wandb_project
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
        num_generations=options.num_generations,
        max_completion_length=completion_length,
        temperature=options.temperature,
        beta=options.beta,
        sync_ref_model=options.sync_ref_model,
        loss_type="dapo" if options.dapo else "grpo",
        importance_sampling_level="sequence" if options.gspo else "token",
        bf16=checkpoint.device_has_bf16() or os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16",
        gradient_checkpointing=options.gradient_checkpointing,
        eval_strategy="steps",
        eval_steps=options.eval_step,
        eval_on_start=True,
        save_steps=options.eval_step,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_NDCG@{min(10, options.test_beam)}",
        greater_is_better=True,
        logging_steps=min(options.eval_step, 0.02),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=["wandb"] if options.wandb_project else [],
        run_name=options.wandb_run_name or None,
    )


def main(options: Options) -> None:
    options.check()
    rewards = reward_functions(options.reward_type, options.num_generations)
    items, train, valid, catalog = read_catalog(options)
    prompts = Prompts(template_of(options.model_path, options.prompt_template), options.category)

    depth = max(sid.count("<") for sid in catalog.sids)
    args = training_arguments(options, depth)
    [state] = broadcast_object_list([begin(options.output_dir, options) if args.process_index == 0 else None])
    if state == "complete":
        return
    if state == "fresh" and args.process_index == 0:
        checkpoint.remove_checkpoints(options.output_dir)

    rows = Dataset.from_dict(rl_rows(train, items, prompts))
    trainer = ReReTrainer(
        model=checkpoint.load_model(options.model_path, "model_path"),
        processing_class=checkpoint.load_tokenizer(options.model_path, "model_path"),
        reward_funcs=rewards,
        args=args,
        train_dataset=rows,
        eval_dataset=rows.select(range(1)),  # the validation rows are searched, not sampled: see ReReTrainer.evaluate
        catalog=catalog,
        add_gt=options.add_gt,
        test_beam=options.test_beam if options.test_during_training else 0,
        validation=(next_sid_prompts(valid, items, prompts), valid["target"].to_list()),
        eval_beams=options.test_beam,
    )
    resume = options.resume_from_checkpoint or (
        checkpoint.last_checkpoint(options.output_dir) if state == "resume" else None
    )
    trainer.train(resume_from_checkpoint=resume)
    if args.process_index == 0:
        start = next(
            entry[args.metric_for_best_model]
            for entry in trainer.state.log_history
            if args.metric_for_best_model in entry
        )
        print(f"validation {args.metric_for_best_model} before training: {start:.4f}")
        print(
            f"best validation {args.metric_for_best_model}: {trainer.state.best_metric:.4f}, at {trainer.state.best_model_checkpoint}"
        )
        model = trainer.accelerator.unwrap_model(trainer.model)
        checkpoint.save(model, trainer.processing_class, prompts.path, options.output_dir)
        checkpoint.remove_checkpoints(options.output_dir)
        finish(options.output_dir, options)


if __name__ == "__main__":
    run(main, Options)
