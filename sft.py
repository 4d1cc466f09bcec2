"""Stage 4: supervised fine-tuning on semantic IDs.

    torchrun --nproc_per_node 1 sft.py --base_model base --train_file train.csv --eval_file valid.csv \
        --sid_index_path D.index.json --item_meta_path D.item.json --output_dir output/sft

The tokenizer gains the level tokens of the codebook, the model learns the tasks of --sft_tasks with the loss on the
answers alone, and the weights with the least loss on the next-SID task of --eval_file are saved. Logits are computed
for the answers' positions only: rows are padded on the left, so every answer ends its row.

A killed run goes on from its last checkpoint when the same command is given again.
"""

import os
from dataclasses import dataclass

import torch
from accelerate.utils import broadcast_object_list
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

import checkpoint
from catalog import codebook_tokens, read_index
from cli import HfArg, UserError, begin, finish, not_built, require_file, run
from data import (
    DEFAULT_TASKS,
    DEFAULT_TEMPLATE,
    Items,
    Pair,
    Prompts,
    parse_tasks,
    read_sequences,
    read_titles,
    sft_pairs,
)


@dataclass
class Options:
    # data and model
    base_model: str = HfArg(default="", help="folder or hub name of a causal LM")
    train_file: str = HfArg(default="", help="train CSV")
    eval_file: str = HfArg(default="", help="valid CSV")
    sid_index_path: str = HfArg(default="", help="<D>.index.json")
    item_meta_path: str = HfArg(default="", help="<D>.item.json")
    output_dir: str = HfArg(default="", help="folder for the checkpoint")
    category: str = HfArg(default="", help="what the prompts call the items, e.g. Video_Games")
    prompt_template: str = HfArg(default=str(DEFAULT_TEMPLATE), help="wording of the prompts")
    sft_tasks: str = HfArg(default=DEFAULT_TASKS, help="tasks and weights: sid_seq:1.0,title2sid:0.5,…")
    max_history: int = HfArg(default=10, help="items of history in a prompt")
    sample: int = HfArg(default=-1, help="use this many rows of --train_file, drawn by seed; -1 for all")
    sid_tokens: str = HfArg(
        default="codebook", help="codebook: all K codes of each level become tokens; used: only those in use"
    )
    # training
    seed: int = HfArg(default=42, help="seed")
    batch_size: int = HfArg(default=128, help="rows of one optimizer step, over all processes")
    micro_batch_size: int = HfArg(default=4, help="rows of one forward on one process")
    num_epochs: float = HfArg(default=10, help="passes over the rows")
    learning_rate: float = HfArg(default=3e-4, help="peak learning rate")
    lr_scheduler_type: str = HfArg(
        default="cosine", help="any schedule of transformers: cosine, linear, constant_with_warmup, …"
    )
    warmup_ratio: float = HfArg(default=0.05, help="share of the steps that warm up")
    weight_decay: float = HfArg(default=0.01, help="AdamW weight decay")
    cutoff_len: int = HfArg(default=512, help="tokens of a row; a longer prompt loses its beginning")
    group_by_length: bool = HfArg(default=False, help="batch rows of about equal length")
    eval_step: float = HfArg(default=0.1, help="evaluate and save every so many steps; below 1: share of all steps")
    early_stopping_patience: int = HfArg(
        default=3, help="stop after this many evaluations without a lower loss; 0: never"
    )
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, more time")
    freeze_LLM: bool = HfArg(default=False, help="train the new tokens' embeddings alone")
    train_from_scratch: bool = HfArg(default=False, help="new weights from the config of --base_model")
    resume_from_checkpoint: str = HfArg(default="", help="a checkpoint-N folder; default: where this run was killed")
    # logging
    wandb_project: str = HfArg(default="", help="log to this Weights & Biases project")
    wandb_run_name: str = HfArg(default="", help="its run name")

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        if self.freeze_LLM:
            raise not_built("freeze_LLM", True, "train all weights with --freeze_LLM False")
        if self.sid_tokens not in ("codebook", "used"):
            raise UserError(f"--sid_tokens {self.sid_tokens}: expected codebook or used")
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
        if self.batch_size < 1 or self.batch_size % unit:
            below = self.batch_size // unit * unit
            nearest = " or ".join(str(b) for b in (below, below + unit) if b > 0)
            raise UserError(
                f"--batch_size {self.batch_size} is not divisible by --micro_batch_size {self.micro_batch_size} x "
                f"{world} processes = {unit}; the nearest batch sizes that are: {nearest}"
            )
        return self.batch_size // unit


# ------------------------------------------------------------------------------------------------ rows


def tokenize(pairs: list[Pair], tokenizer, suffix: str, cutoff_len: int) -> list[dict]:
    """Rows `{"input_ids", "answer_length"}`: prompt, answer, suffix, end of sequence; at most `cutoff_len` tokens."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    answers = tokenizer([answer + suffix for _, answer in pairs], add_special_tokens=False)["input_ids"]
    rows, trimmed = [], 0
    for prompt, answer in zip(prompts, answers, strict=True):
        answer = answer + [tokenizer.eos_token_id]
        room = cutoff_len - len(answer)
        if room < 1:
            raise UserError(
                f"--cutoff_len {cutoff_len} leaves no room beside an answer of {len(answer)} tokens; raise it"
            )
        trimmed += len(prompt) > room
        rows.append({"input_ids": prompt[-room:] + answer, "answer_length": len(answer)})
    if trimmed:
        print(f"{trimmed} of {len(rows)} prompts lose their beginning to --cutoff_len {cutoff_len}")
    return rows


class Collator:
    """Left-padded batches whose logits are kept for the longest answer's positions alone."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict]) -> dict:
        length = max(len(row["input_ids"]) for row in rows)
        kept = max(row["answer_length"] for row in rows) + 1  # the position before an answer predicts its first token
        ids = torch.full((len(rows), length), self.pad_token_id)
        labels = torch.full((len(rows), kept), -100)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        for i, row in enumerate(rows):
            tokens = torch.tensor(row["input_ids"])
            ids[i, length - len(tokens) :] = tokens
            labels[i, kept - row["answer_length"] :] = tokens[-row["answer_length"] :]
        position = torch.arange(length) - (length - lengths)[:, None]
        return {
            "input_ids": ids,
            "attention_mask": (position >= 0).long(),
            "position_ids": position.clamp(min=0),
            "labels": labels,
            "logits_to_keep": kept,
        }


class SFTTrainer(Trainer):
    """`transformers.Trainer` whose length groups are those of the global batch, on any number of processes."""

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        global_batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(global_batch, lengths=[len(row["input_ids"]) for row in self.train_dataset])


# ------------------------------------------------------------------------------------------------ the stage


def load_model(options: Options):
    if options.train_from_scratch:
        config = AutoConfig.from_pretrained(options.base_model)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return checkpoint.load_model(options.base_model, "base_model")


def training_arguments(options: Options) -> TrainingArguments:
    if options.wandb_project:
        os.environ["WANDB_PROJECT"] = options.wandb_project
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
        bf16=checkpoint.device_has_bf16(),
        gradient_checkpointing=options.gradient_checkpointing,
        train_sampling_strategy="group_by_length" if options.group_by_length else "random",
        eval_strategy="steps",
        eval_steps=options.eval_step,
        save_steps=options.eval_step,
        logging_steps=min(options.eval_step, 0.02),
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=["wandb"] if options.wandb_project else [],
        run_name=options.wandb_run_name or None,
    )


def main(options: Options) -> None:
    options.check()
    tasks = parse_tasks(options.sft_tasks)
    args = training_arguments(options)
    [state] = broadcast_object_list([begin(options.output_dir, options) if args.process_index == 0 else None])
    if state == "complete":
        return
    if state == "fresh" and args.process_index == 0:
        checkpoint.remove_checkpoints(options.output_dir)
    set_seed(options.seed)

    # data
    sids = read_index(options.sid_index_path)
    items = Items(sids, read_titles(options.item_meta_path))
    if len(items.titles) != len(sids):
        raise UserError(
            f"{options.item_meta_path}: found {len(items.titles)} items, expected the {len(sids)} of {options.sid_index_path}"
        )
    prompts = Prompts(options.prompt_template, options.category)
    train = read_sequences(options.train_file, sids, "train_file", options.max_history)
    valid = read_sequences(options.eval_file, sids, "eval_file", options.max_history)
    if 0 <= options.sample < len(train):
        train = train.sample(options.sample, seed=options.seed)

    # model, with the codebook's tokens
    tokenizer = checkpoint.load_tokenizer(options.base_model, "base_model")
    model = load_model(options)
    new = checkpoint.add_tokens(model, tokenizer, codebook_tokens(sids, used_only=options.sid_tokens == "used"))
    model.config.pad_token_id = tokenizer.pad_token_id

    # rows
    suffix = prompts.response_suffix
    train_rows = tokenize(sft_pairs(tasks, train, items, prompts, options.seed), tokenizer, suffix, options.cutoff_len)
    valid_rows = tokenize(sft_pairs({"sid_seq": 1}, valid, items, prompts, 0), tokenizer, suffix, options.cutoff_len)
    if args.process_index == 0:
        tokens = sum(len(row["input_ids"]) for row in train_rows)
        steps = -(-len(train_rows) // options.batch_size)
        print(
            f"{model.num_parameters():,} parameters, {len(new)} new tokens; {len(train_rows):,} rows, {tokens:,} tokens, "
            f"{steps:,} steps an epoch; {len(valid_rows):,} validation rows"
        )

    patience = options.early_stopping_patience
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=valid_rows,
        data_collator=Collator(tokenizer.pad_token_id),
        callbacks=[EarlyStoppingCallback(patience)] if patience > 0 else [],
    )
    resume = options.resume_from_checkpoint or (
        checkpoint.last_checkpoint(options.output_dir) if state == "resume" else None
    )
    trainer.train(resume_from_checkpoint=resume)
    if args.process_index == 0:
        print(
            f"least validation loss: {trainer.state.best_metric:.4f} nats a token, at {trainer.state.best_model_checkpoint}"
        )
        checkpoint.save(trainer.accelerator.unwrap_model(trainer.model), tokenizer, prompts.path, options.output_dir)
        checkpoint.remove_checkpoints(options.output_dir)
        finish(options.output_dir, options)


if __name__ == "__main__":
    run(main, Options)
