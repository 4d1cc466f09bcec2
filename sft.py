"""Stage 4: supervised fine-tuning on semantic IDs.

    torchrun --nproc_per_node 1 sft.py --base_model base --train_file train.csv --eval_file valid.csv \
        --sid_index_path D.index.json --item_meta_path D.item.json --output_dir output/sft

The tokenizer gains the level tokens of the codebook, and the model learns the tasks of --sft_tasks with the loss on the
answers alone: hidden states are gathered at the answers' positions before the LM head, so logits of prompts and padding
are never made. What is trained is everything, LoRA adapters and the new tokens (--use_lora), or the new tokens alone
(--freeze_LLM). The weights with the best --metric_for_best_model on the next-SID task of --eval_file are saved, merged.

A killed run goes on from its last checkpoint when the same command is given again.
"""

import importlib.util
import os
from dataclasses import dataclass

import torch
from accelerate.utils import broadcast_object_list
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from data import (
    DEFAULT_TASKS,
    DEFAULT_TEMPLATE,
    Prompts,
    next_sid_prompts,
    parse_tasks,
    read_preferences,
    read_sequences,
    sft_pairs,
)
from minionerec.catalog.catalog import Catalog, target_counts
from minionerec.catalog.items import Items, read_titles
from minionerec.catalog.sids import codebook_tokens, read_index
from minionerec.common.devices import wants_bf16
from minionerec.common.errors import UserError
from minionerec.common.files import require_file
from minionerec.common.options import run
from minionerec.common.runs import begin, finish
from minionerec.evaluation.validation import Validation
from minionerec.language_model import memory as preflight
from minionerec.language_model.adapters import add_lora, train_rows_alone
from minionerec.language_model.batches import Collator, EpochOrder, Lines
from minionerec.language_model.checkpoints import (
    last_checkpoint,
    load_model,
    load_tokenizer,
    new_model,
    remove_checkpoints,
    save_trained,
)
from minionerec.language_model.new_tokens import add_tokens
from minionerec.language_model.sft_trainer import SFTTrainer
from minionerec.language_model.tokenizing import tokenize_cached


@dataclass
class Options:
    # data and model
    base_model: str = HfArg(default="", help="folder or hub name of a causal LM")
    train_file: str = HfArg(default="", help="train CSV")
    eval_file: str = HfArg(default="", help="valid CSV")
    sid_index_path: str = HfArg(default="", help="<D>.index.json")
    item_meta_path: str = HfArg(default="", help="<D>.item.json")
    user_preference_file: str = HfArg(default="", help='{"user id": "what they like", …}: for the preference tasks')
    output_dir: str = HfArg(default="", help="folder for the checkpoint")
    category: str = HfArg(default="", help="what the prompts call the items, e.g. Video_Games")
    prompt_template: str = HfArg(default=str(DEFAULT_TEMPLATE), help="wording of the prompts")
    sft_tasks: str = HfArg(default=DEFAULT_TASKS, help="tasks and weights: sid_seq:1.0,title2sid:0.5,…")
    max_history: int = HfArg(default=10, help="items of history in a prompt")
    sample: int = HfArg(default=-1, help="use this many rows of --train_file, drawn by seed; -1 for all")
    cache_dir: str = HfArg(default="output/cache", help="where tokenised rows are kept; empty: nowhere")
    # what is trained
    sid_tokens: str = HfArg(
        default="codebook", help="codebook: all K codes of each level become tokens; used: only those in use"
    )
    sid_init: str = HfArg(
        default="mean", help="new rows start from mean (and covariance) of the old ones, or from their items' text"
    )
    train_from_scratch: bool = HfArg(default=False, help="new weights from the config of --base_model")
    freeze_LLM: bool = HfArg(default=False, help="train the new tokens' embeddings alone")
    use_lora: bool = HfArg(default=False, help="train LoRA adapters and the new tokens' embeddings")
    lora_r: int = HfArg(default=16, help="rank of the adapters")
    lora_alpha: float = HfArg(default=32, help="adapters are scaled by lora_alpha / lora_r")
    lora_dropout: float = HfArg(default=0.05, help="dropout before the adapters")
    lora_target_modules: str = HfArg(default="all-linear", help="all-linear, or module names: q_proj,v_proj")
    # training
    seed: int = HfArg(default=42, help="seed")
    batch_size: int = HfArg(default=128, help="lines of one optimizer step, over all processes")
    micro_batch_size: int = HfArg(default=4, help="lines of one forward on one process")
    num_epochs: float = HfArg(default=10, help="passes over the rows")
    learning_rate: float = HfArg(default=3e-4, help="peak learning rate")
    lr_scheduler_type: str = HfArg(
        default="cosine", help="any schedule of transformers: cosine, linear, constant_with_warmup, …"
    )
    warmup_ratio: float = HfArg(default=0.05, help="share of the steps that warm up")
    weight_decay: float = HfArg(default=0.01, help="AdamW weight decay")
    cutoff_len: int = HfArg(default=512, help="tokens of a line; a longer prompt loses its beginning")
    group_by_length: bool = HfArg(default=True, help="batch lines of about equal length")
    packing: bool = HfArg(
        default=False, help="a line holds as many rows as --cutoff_len has room for, unseen by others"
    )
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, more time")
    resume_from_checkpoint: str = HfArg(default="", help="a checkpoint-N folder; default: where this run was killed")
    # evaluation and logging
    eval_step: float = HfArg(default=0.1, help="evaluate and save every so many steps; below 1: share of all steps")
    early_stopping_patience: int = HfArg(
        default=3, help="stop after this many evaluations without a better one; 0: never"
    )
    metric_for_best_model: str = HfArg(default="eval_loss", help="eval_loss, or HR@K or NDCG@K by constrained beams")
    eval_rows: int = HfArg(default=1000, help="rows of --eval_file, drawn by seed, for HR and NDCG; -1 for all")
    eval_beams: int = HfArg(default=20, help="beams for HR and NDCG")
    report_to: str = HfArg(default="none", help="none, wandb or tensorboard")
    wandb_project: str = HfArg(default="", help="log to this Weights & Biases project")
    wandb_run_name: str = HfArg(default="", help="its run name")

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        if self.freeze_LLM and self.use_lora:
            raise UserError("--freeze_LLM True and --use_lora True exclude each other; choose one")
        if self.freeze_LLM and self.train_from_scratch:
            raise UserError(
                "--freeze_LLM True would freeze the random weights of --train_from_scratch True; choose one"
            )
        choices = {"sid_tokens": ("codebook", "used"), "sid_init": ("mean", "text")}
        choices["report_to"] = ("none", "wandb", "tensorboard")
        for flag, allowed in choices.items():
            if getattr(self, flag) not in allowed:
                raise UserError(f"--{flag} {getattr(self, flag)}: expected {' or '.join(allowed)}")
        if self.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--report_to tensorboard: tensorboard is not installed; pip install tensorboard")
        if not self.output_dir:
            raise UserError("--output_dir is required")
        for flag in ("train_file", "eval_file", "sid_index_path", "item_meta_path"):
            require_file(getattr(self, flag), flag)
        if not self.base_model:
            raise UserError("--base_model is required")
        self.accumulation_steps()

    def accumulation_steps(self) -> int:
        world = int(os.environ.get("WORLD_SIZE", 1))
        unit = self.micro_batch_size * world
        if self.batch_size < 1 or self.micro_batch_size < 1 or self.batch_size % unit:
            below = self.batch_size // max(unit, 1) * unit
            nearest = " or ".join(str(b) for b in (below, below + unit) if b > 0)
            raise UserError(
                f"--batch_size {self.batch_size} is not divisible by --micro_batch_size {self.micro_batch_size} x "
                f"{world} processes = {unit}; the nearest batch sizes that are: {nearest}"
            )
        return self.batch_size // unit


def training_arguments(options: Options) -> TrainingArguments:
    if options.wandb_project:
        os.environ["WANDB_PROJECT"] = options.wandb_project
    metric = options.metric_for_best_model
    return TrainingArguments(
        output_dir=options.output_dir,
        seed=options.seed,
        use_cpu=not torch.accelerator.is_available(),
        per_device_train_batch_size=options.micro_batch_size,
        per_device_eval_batch_size=4 * options.micro_batch_size,
        gradient_accumulation_steps=options.accumulation_steps(),
        num_train_epochs=options.num_epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=options.warmup_ratio,  # below 1: a share of all steps
        weight_decay=options.weight_decay,
        bf16=wants_bf16(),
        gradient_checkpointing=options.gradient_checkpointing,
        eval_strategy="steps",
        eval_steps=options.eval_step,
        save_steps=options.eval_step,
        logging_steps=min(options.eval_step, 0.02),
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric if metric.startswith("eval_") else f"eval_{metric}",
        greater_is_better=not metric.endswith("loss"),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=["wandb"] if options.wandb_project else [options.report_to],
        run_name=options.wandb_run_name or None,
    )


def read_data(options: Options):
    """(items, train rows, validation rows), checked against each other."""
    sids = read_index(options.sid_index_path)
    items = Items(sids, read_titles(options.item_meta_path))
    if len(items.titles) != len(sids):
        raise UserError(
            f"{options.item_meta_path}: found {len(items.titles)} items, expected the {len(sids)} of {options.sid_index_path}"
        )
    train = read_sequences(options.train_file, sids, "train_file", options.max_history)
    valid = read_sequences(options.eval_file, sids, "eval_file", options.max_history)
    if 0 <= options.sample < len(train):
        train = train.sample(options.sample, seed=options.seed)
    if options.user_preference_file:
        train = train.join(read_preferences(options.user_preference_file), on="user", how="left", maintain_order="left")
    return items, train, valid


def build_model(options: Options, items: Items):
    """(model, tokenizer, ids of the new tokens): the base model with the codebook's tokens, and what is to be trained."""
    tokenizer = load_tokenizer(options.base_model, "base_model")
    load = new_model if options.train_from_scratch else load_model
    model = load(options.base_model, "base_model")
    tokens = codebook_tokens(items.sids, used_only=options.sid_tokens == "used")
    new = add_tokens(model, tokenizer, tokens, items if options.sid_init == "text" else None)
    model.config.pad_token_id = tokenizer.pad_token_id
    if options.freeze_LLM:
        model = train_rows_alone(model, new, options.base_model)
    elif options.use_lora:
        model = add_lora(
            model, new, options.lora_r, options.lora_alpha, options.lora_dropout, options.lora_target_modules
        )
    return model, tokenizer, new


def build_validation(options: Options, items: Items, train, valid, prompts: Prompts, tokenizer) -> Validation | None:
    """What HR and NDCG are measured on, if --metric_for_best_model asks for them."""
    name = options.metric_for_best_model.removeprefix("eval_")
    if name == "loss":
        return None
    if 0 <= options.eval_rows < len(valid):
        valid = valid.sample(options.eval_rows, seed=options.seed)
    catalog = Catalog(items.sids, target_counts(train, len(items.sids)))
    texts = next_sid_prompts(valid, items, prompts)
    validation = Validation(texts, valid["target"].to_list(), catalog, catalog.trie(tokenizer), options.eval_beams)
    known = [f"{metric}@{k}" for metric in ("HR", "NDCG") for k in validation.cutoffs]
    if name not in known:
        raise UserError(
            f"--metric_for_best_model {name}: expected eval_loss or, with {options.eval_beams} beams, {known}"
        )
    return validation


def main(options: Options) -> None:
    options.check()
    tasks = parse_tasks(options.sft_tasks)
    args = training_arguments(options)
    main_process = args.process_index == 0
    [state] = broadcast_object_list([begin(options.output_dir, options) if main_process else None])
    if state == "complete":
        return
    if state == "fresh" and main_process:
        remove_checkpoints(options.output_dir)
    set_seed(options.seed)

    # data and model
    items, train, valid = read_data(options)
    prompts = Prompts(options.prompt_template, options.category)
    model, tokenizer, new = build_model(options, items)
    validation = build_validation(options, items, train, valid, prompts, tokenizer)

    # rows, lines, order
    def lines(weights: dict[str, float], sequences, capacity: int = 0) -> Lines:
        pairs = sft_pairs(weights, sequences, items, prompts, options.seed)
        with args.main_process_first(desc="tokenising"):
            rows = tokenize_cached(
                pairs, tokenizer, prompts.response_suffix, prompts.title_separator, options.cache_dir
            )
        return Lines(rows.trimmed(options.cutoff_len), capacity)

    train_lines = lines(tasks, train, options.cutoff_len if options.packing else 0)
    valid_lines = lines({"sid_seq": 1}, valid)
    order = EpochOrder(train_lines.lengths, options.batch_size, options.seed, options.group_by_length)
    preflight.check_and_print(model, new, train_lines, order, args)

    # training
    patience = options.early_stopping_patience
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=train_lines,
        eval_dataset=valid_lines,
        data_collator=Collator(tokenizer.pad_token_id, packed=options.packing),
        processing_class=tokenizer,
        order=order,
        validation=validation,
        callbacks=[EarlyStoppingCallback(patience)] if patience > 0 else [],
    )
    resume = options.resume_from_checkpoint or (last_checkpoint(options.output_dir) if state == "resume" else None)
    trainer.train(resume_from_checkpoint=resume)
    trainer.accelerator.wait_for_everyone()  # the checkpoints go, and another process may be loading the best of them
    if main_process:
        print(
            f"best {args.metric_for_best_model}: {trainer.state.best_metric:.4f}, {trainer.state.best_model_checkpoint}"
        )
    save_trained(trainer, prompts.path, options.output_dir)
    if main_process:
        remove_checkpoints(options.output_dir)
        finish(options.output_dir, options)


if __name__ == "__main__":
    run(main, Options)
