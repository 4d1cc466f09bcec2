"""Stage 4: supervised fine-tuning (SFT) of a causal language model on semantic IDs.

    bash sft.sh          or:
    torchrun --nproc_per_node 1 sft.py --base_model base --train_file train.csv --eval_file valid.csv \\
        --sid_index_path D.index.json --item_meta_path D.item.json --output_dir output/sft

The tokenizer gains the level tokens of the codebook. The model learns the tasks of --sft_tasks; loss and logits are
computed only at the answers' tokens. Trained are all weights, LoRA adapters and the new tokens' embedding rows
(--use_lora), or only those rows (--freeze_LLM). The weights with the best --metric_for_best_model on the next-SID task of
--eval_file are saved, merged, with the prompt template and minionerec.json.

Re-running a killed command resumes from its last checkpoint; a finished run is skipped. docs/sft.md explains the rest.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from minionerec.common import model_card, runs
from minionerec.common.console import say
from minionerec.common.errors import UserError
from minionerec.common.options import INPUT, OUTPUT, RUNTIME, option, run
from minionerec.common.processes import on_main_process
from minionerec.common.tracking import TrackedOptions
from minionerec.decoding.spaces import SPACES
from minionerec.language_model.file_names import CHECKPOINT_FILES

TEMPLATE = Path(__file__).parent / "config" / "prompt.yaml"
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
)  # fmt: skip
SID_INITS = ("mean", "text", "codebook")


@dataclass
class Options(TrackedOptions):
    # data
    train_file: str = option("", "train CSV", role=INPUT)
    eval_file: str = option("", "valid CSV", role=INPUT)
    sid_index_path: str = option("", "<D>.index.json", role=INPUT)
    item_meta_path: str = option("", "<D>.item.json", role=INPUT)
    user_preference_file: str = option("", 'preference tasks: JSON {"user id": "what the user likes", …}', role=INPUT)
    category: str = option("", "the prompts' name for the items, e.g. Video_Games; default: items")
    prompt_template: str = option("", "wording of the prompts; default: config/prompt.yaml", role=INPUT)
    sft_tasks: str = option(
        "sid_seq,title2sid,sid2title,sid_seq2title,title_seq2title",
        "tasks and how often each row is taken: sid_seq,title2sid:0.5; docs/sft.md lists the tasks",
    )
    max_history: int = option(10, "items of history in a prompt, the latest ones")
    train_rows: int = option(-1, "rows of --train_file, drawn by seed; -1: all", aliases=["--sample"])
    cutoff_len: int = option(512, "tokens of a row; a longer prompt loses its beginning")
    cache_dir: str = option("output/cache", "folder for tokenised rows", role=RUNTIME)
    # model
    base_model: str = option("", "folder or hub name of a causal LM", role=INPUT)
    train_from_scratch: bool = option(False, "random weights of the architecture of --base_model")
    sid_tokens: str = option("codebook", "new tokens: codebook (all K codes of each level) or used (only those in use)")
    sid_init: str = option(
        "mean",
        "new embedding rows: mean (drawn with mean and covariance of the old rows), text (of their items' titles) or "
        "codebook (projections of the codes' centroids in --sid_codebooks)",
    )
    sid_codebooks: str = option("", "--sid_init codebook: <D>.codebooks_….npz of the index", role=INPUT)
    freeze_LLM: bool = option(False, "train only the new tokens' embedding rows")
    use_lora: bool = option(False, "train LoRA adapters and the new tokens' embedding rows")
    lora_r: int = option(16, "rank of the adapters")
    lora_alpha: float = option(32, "the adapters' output is scaled by lora_alpha / lora_r")
    lora_dropout: float = option(0.05, "dropout on the adapters' input")
    lora_target_modules: str = option("all-linear", "all-linear, or module names: q_proj,v_proj")
    # training
    output_dir: str = option("", "folder for the checkpoint", role=OUTPUT)
    seed: int = option(42, "seed of new weights, rows, batches and dropout")
    batch_size: int = option(128, "rows (lines, with --packing) per optimizer step, over all processes")
    micro_batch_size: int = option(
        4, "rows per forward pass of one process; evaluation takes 4 times as many", role=RUNTIME
    )
    num_epochs: float = option(10, "passes over the rows; 0: by the number of targets, 20 to 60")
    time_budget: float = option(0.0, "seconds of training and its evaluations, at most; 0: no limit")
    train_space: str = option(
        "vocab", "what the probabilities of SID tokens are normalised over: vocab, or catalog (what the trie allows)"
    )
    dropout: float = option(0.0, "dropout on embeddings and on every attention and feed-forward output")
    history_drop: float = option(0.0, "whole sequences: probability that an item is left out, drawn in every epoch")
    history_crop: float = option(0.0, "whole sequences: probability that a random number of first items is left out")
    label_smoothing: float = option(0.0, "share of the loss that is spread equally over all allowed tokens")
    ema_decay: float = option(
        0.0, "evaluate and save an exponential moving average of the weights with this decay; 0: the weights"
    )
    learning_rate: float = option(3e-4, "peak learning rate")
    lr_scheduler_type: str = option("cosine", f"one of {', '.join(SCHEDULES)}")
    warmup_ratio: float = option(0.05, "share of the steps in which the learning rate rises")
    weight_decay: float = option(0.01, "AdamW weight decay")
    group_by_length: bool = option(True, "batch rows of about equal length")
    packing: bool = option(False, "pack rows into lines of --cutoff_len tokens; rows do not attend to each other")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time", role=RUNTIME)
    resume_from_checkpoint: str = option(
        "", "a checkpoint-N folder; default: the last one of a killed run", role=RUNTIME
    )
    # evaluation
    eval_step: float = option(0.1, "steps between evaluations (and checkpoints); below 1: share of all steps")
    early_stopping_patience: int = option(3, "stop after this many evaluations without improvement; 0: never")
    metric_for_best_model: str = option("eval_loss", "eval_loss, or HR@K or NDCG@K of constrained beam search")
    eval_rows: int = option(1000, "HR and NDCG: rows of --eval_file, drawn by seed; -1: all")
    eval_beams: int = option(20, "HR and NDCG: beams", aliases=["--test_beam"])

    def __post_init__(self):
        super().__post_init__()
        self.prompt_template = self.prompt_template or str(TEMPLATE)
        if (self.sid_init == "codebook") != bool(self.sid_codebooks):
            raise UserError(
                f"--sid_init {self.sid_init} --sid_codebooks {self.sid_codebooks or '(none)'}: expected --sid_init codebook "
                "and its file, or neither"
            )
        if self.packing and (self.history_drop or self.history_crop):
            raise UserError("--packing True with --history_drop or --history_crop is not implemented; choose one")
        if self.freeze_LLM and self.use_lora:
            raise UserError("--freeze_LLM True and --use_lora True exclude each other; choose one")
        if self.freeze_LLM and self.train_from_scratch:
            raise UserError(
                "--freeze_LLM True would freeze the random weights of --train_from_scratch True; choose one"
            )
        self.at_least(1, "batch_size", "micro_batch_size", "max_history", "lora_r", "eval_beams")
        self.at_least(0, "learning_rate", "weight_decay", "early_stopping_patience", "time_budget")
        self.at_least(2, "cutoff_len")
        steps = self.eval_step > 0 and (self.eval_step < 1 or self.eval_step == int(self.eval_step))
        self.check(
            sid_tokens=(self.sid_tokens in ("codebook", "used"), "codebook or used"),
            sid_init=(self.sid_init in SID_INITS, " or ".join(SID_INITS)),
            history_drop=(0 <= self.history_drop < 1, "0 or more and below 1"),
            history_crop=(0 <= self.history_crop <= 1, "0 to 1"),
            lr_scheduler_type=(self.lr_scheduler_type in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            num_epochs=(self.num_epochs >= 0, "more than 0, or 0 for a number by the targets"),
            train_space=(self.train_space in SPACES, " or ".join(SPACES)),
            dropout=(0 <= self.dropout < 1, "0 or more and below 1"),
            label_smoothing=(0 <= self.label_smoothing < 1, "0 or more and below 1"),
            ema_decay=(0 <= self.ema_decay < 1, "0 or more and below 1"),
            lora_alpha=(self.lora_alpha > 0, "more than 0"),
            lora_dropout=(0 <= self.lora_dropout < 1, "0 or more and below 1"),
            warmup_ratio=(0 <= self.warmup_ratio < 1, "0 or more and below 1"),
            eval_step=(steps, "a number of steps, or a share of all steps between 0 and 1"),
            train_rows=(self.train_rows >= 1 or self.train_rows == -1, "at least 1, or -1 for all"),
            eval_rows=(self.eval_rows >= 1 or self.eval_rows == -1, "at least 1, or -1 for all"),
        )
        self.accumulation_steps()

    def require_inputs(self) -> None:
        """Raise `UserError` for the first required option that is missing."""
        files = ("train_file", "eval_file", "sid_index_path", "item_meta_path", "prompt_template")
        optional = [name for name in ("user_preference_file", "sid_codebooks") if getattr(self, name)]
        self.require(*files, "output_dir", *optional)
        if not self.base_model:  # a hub name is no path
            raise UserError("--base_model is required")

    def accumulation_steps(self) -> int:
        """Forward passes per optimizer step: batch size / (micro batch size x processes); `UserError` if no integer."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        unit = self.micro_batch_size * world
        if self.batch_size % unit:
            below = self.batch_size // unit * unit
            nearest = " or ".join(str(size) for size in (below, below + unit) if size > 0)
            raise UserError(
                f"--batch_size {self.batch_size} is not divisible by --micro_batch_size {self.micro_batch_size} x "
                f"{world} processes = {unit}; the nearest valid batch sizes: {nearest}"
            )
        return self.batch_size // unit


def begin(options: Options) -> runs.Run:
    """The record of this run, the same on all processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        training_arguments(options)  # joins the process group, which the processes need to share the record
    return on_main_process(lambda: runs.begin(options, "sft", folder=options.output_dir, writes=CHECKPOINT_FILES))


def training_arguments(options: Options):
    """`transformers.TrainingArguments` of the options."""
    import torch
    from transformers import TrainingArguments

    from minionerec.common.devices import use_one_gpu, wants_bf16

    metric = options.metric_for_best_model
    args = TrainingArguments(
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
        logging_nan_inf_filter=False,  # SFTTrainer ends a run whose loss is not finite
        save_total_limit=None,  # KeepCheckpoints removes old ones
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,  # the patience of early stopping
        metric_for_best_model=metric if metric.startswith("eval_") else f"eval_{metric}",
        greater_is_better=not metric.endswith("loss"),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",  # ConsoleCallback prints, logs and tracks
        disable_tqdm=True,
    )
    return use_one_gpu(args)


def read_data(options: Options):
    """The data set: items, catalog, train rows (with preferences, if given) and validation rows."""
    from data import drawn, load, read_preferences

    data = load(
        sid_index_path=options.sid_index_path,
        item_meta_path=options.item_meta_path,
        train=options.train_file,
        valid=options.eval_file,
        max_history=options.max_history,
    )
    train = drawn(data.train, options.train_rows, options.seed)
    if options.user_preference_file:
        preferences = read_preferences(options.user_preference_file)
        train = train.join(preferences, on="user", how="left", maintain_order="left")
    return data._replace(train=train)


def build_model(options: Options, data):
    """(model, tokenizer, ids of the new tokens): the base model with SID tokens, set up for what is to be trained."""
    from minionerec.catalog.sids import codebook_tokens
    from minionerec.decoding.tree_attention import require_tree_attention
    from minionerec.language_model.adapters import add_lora, train_new_rows
    from minionerec.language_model.checkpoints import load_model, load_tokenizer, new_model
    from minionerec.language_model.new_tokens import add_tokens, require_sid_tokens, start_from_codebooks
    from minionerec.language_model.regularization import add_dropout

    tokenizer = load_tokenizer(options.base_model, "base_model")
    model = (new_model if options.train_from_scratch else load_model)(options.base_model, "base_model")
    tokens = codebook_tokens(data.items.sids, used_only=options.sid_tokens == "used")
    new_ids = add_tokens(model, tokenizer, tokens, data.items if options.sid_init == "text" else None)
    if options.sid_init == "codebook":
        from rq.codebooks import read_codebooks

        start_from_codebooks(
            model, tokenizer, new_ids, read_codebooks(options.sid_codebooks, "sid_codebooks").codebooks
        )
    require_sid_tokens(tokenizer, data.catalog.sids)
    model.config.pad_token_id = tokenizer.pad_token_id
    if options.freeze_LLM:
        model = train_new_rows(model, new_ids, options.base_model)
    elif options.use_lora:
        lora = (options.lora_r, options.lora_alpha, options.lora_dropout, options.lora_target_modules)
        model = add_lora(model, new_ids, *lora)
    if options.dropout:
        add_dropout(model, options.dropout)
    require_tree_attention(model)  # evaluation and RL decode with it: better refused now than after the training
    return model, tokenizer, new_ids


def build_validation(options: Options, data, prompts, tokenizer):
    """The search that measures HR and NDCG, or None if --metric_for_best_model needs only the loss.

    Items are ranked by the headline protocol: without those that the user has, if train hardly repeats any.
    """
    from data import drawn, next_sid_prompts
    from minionerec.evaluation.protocols import headline
    from minionerec.evaluation.validation import Validation

    name = options.metric_for_best_model.removeprefix("eval_")
    if name == "loss":
        return None
    valid = drawn(data.valid, options.eval_rows, options.seed)
    texts = next_sid_prompts(valid, data.items, prompts)
    trie = data.catalog.trie(tokenizer)
    seen = valid["seen"].to_list() if headline(data.train) == "unseen" else None
    targets = valid["target"].to_list()
    validation = Validation(texts, targets, data.catalog, trie, options.eval_beams, options.train_space, seen)
    known = [f"{metric}@{k}" for metric in ("HR", "NDCG") for k in validation.cutoffs]
    if name not in known:
        raise UserError(
            f"--metric_for_best_model {name}: expected eval_loss, or with --eval_beams {options.eval_beams} one of "
            f"{', '.join(known)}"
        )
    return validation


def build_lines(options: Options, args, data, prompts, tokenizer):
    """(train lines, validation lines): tokenised rows, packed with --packing. Validation is the task sid_seq.

    Where the template lets answers continue histories, sid_seq is trained as whole sequences.
    """
    from data import parse_tasks, sft_pairs, taken
    from minionerec.language_model import sid_sequences
    from minionerec.language_model.augmentation import AugmentedLines, level_of_tokens
    from minionerec.language_model.batches import Lines
    from minionerec.language_model.tokenizing import check_rows, joined, tokenize_cached

    weights, sids = parse_tasks(options.sft_tasks), data.items.sids
    prefix = prompts.render("sid_seq", history="")
    if prompts.continues:
        sid_sequences.check_sequences(data.train, sids, prefix, tokenizer)

    def tokenised(weights: dict[str, float], sequences):
        pairs = sft_pairs(weights, sequences, data.items, prompts, options.seed)
        suffix, separator = prompts.response_suffix, prompts.title_separator
        with args.main_process_first(desc="tokenising"):
            rows = tokenize_cached(pairs, tokenizer, suffix, separator, options.cache_dir)
        check_rows(rows, pairs, tokenizer, suffix)
        return rows.trimmed(options.cutoff_len, pairs)

    parts = []
    if prompts.continues and "sid_seq" in weights:
        whole = sid_sequences.sequence_rows(data.train, sids, prefix, tokenizer, options.max_history)
        places = taken(len(whole.answer), weights.pop("sid_seq"), "sid_seq", options.seed)
        parts.append(whole.of(places).trimmed(options.cutoff_len))
    if weights:
        parts.append(tokenised(weights, data.train))
    if options.history_drop or options.history_crop:
        if not prompts.continues:
            raise UserError(
                f"{prompts.path}: --history_drop and --history_crop augment whole sequences, which this template does not "
                "have (it has a response marker); use config/prompt.yaml, or 0"
            )
        level = level_of_tokens(data.catalog.sids, tokenizer, len(tokenizer))
        train = AugmentedLines(joined(parts), level, options.history_drop, options.history_crop)
    else:
        train = Lines(joined(parts), options.cutoff_len if options.packing else 0)
    if prompts.continues:
        return train, Lines(sid_sequences.single_rows(data.valid, sids, prefix, tokenizer).trimmed(options.cutoff_len))
    return train, Lines(tokenised({"sid_seq": 1}, data.valid))


def passes(options: Options, lines, catalog) -> float:
    """--num_epochs, or for 0: 20 passes, and up to 60 where that shows fewer than 200,000 targets."""
    if options.num_epochs:
        return options.num_epochs
    targets = lines.rows.answer.sum() / catalog.codes.shape[1]
    chosen = min(60, max(20, math.ceil(200_000 / max(targets, 1))))
    say(f"--num_epochs 0: {chosen} passes over {targets:,.0f} targets")
    return chosen


def build_trainer(options: Options, args, data, model, tokenizer, lines, order, validation, keep):
    """The trainer of `lines`, (train, valid), in the given order; `keep` looks after its checkpoints."""
    from minionerec.language_model.batches import Collator, packing_collator
    from minionerec.language_model.catalog_loss import SidTokens
    from minionerec.language_model.console_callback import ConsoleCallback
    from minionerec.language_model.sft_trainer import Patience, SFTTrainer, TimeBudget

    args.num_train_epochs = passes(options, lines[0], data.catalog)
    patience, pad = options.early_stopping_patience, tokenizer.pad_token_id
    callbacks = [keep, ConsoleCallback(options, {"loss": "loss"}), *([Patience(patience)] if patience else [])]
    callbacks += [TimeBudget(options.time_budget)] if options.time_budget else []
    collator = packing_collator(model, pad) if options.packing else Collator(pad)
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=lines[0],
        eval_dataset=lines[1],
        data_collator=collator,
        processing_class=tokenizer,
        order=order,
        validation=validation,
        sids=SidTokens(data.catalog.trie(tokenizer), model.get_input_embeddings().weight.shape[0])
        if options.train_space == "catalog"
        else None,
        smoothing=options.label_smoothing,
        average=options.ema_decay,
        callbacks=callbacks,
    )


def main(options: Options) -> None:
    options.require_inputs()
    record = begin(options)
    if record.complete:
        return

    from transformers import set_seed

    from data import Prompts
    from minionerec.language_model import checkpoints, memory, numbered_checkpoints
    from minionerec.language_model.batches import EpochOrder

    # ---- data and model
    args = training_arguments(options)
    set_seed(options.seed)
    data = read_data(options)
    prompts = Prompts(options.prompt_template, options.category)
    model, tokenizer, new_ids = build_model(options, data)
    validation = build_validation(options, data, prompts, tokenizer)
    lines = build_lines(options, args, data, prompts, tokenizer)
    order = EpochOrder(lines[0].lengths, options.batch_size, options.seed, options.group_by_length)
    lines[0].order = order
    memory.check_and_print(model, new_ids, lines[0], order, args)

    # ---- training
    settings = checkpoints.Settings(options.category, options.max_history, options.train_space)
    given = options.resume_from_checkpoint
    resumed_from = on_main_process(lambda: numbered_checkpoints.resume_point(options.output_dir, given, record))
    keep = numbered_checkpoints.KeepCheckpoints(prompts.path, settings, resumed_from, record.record)
    trainer = build_trainer(options, args, data, model, tokenizer, lines, order, validation, keep)
    trainer.train(resume_from_checkpoint=resumed_from)

    # ---- the best weights
    trainer.accelerator.wait_for_everyone()  # every process has loaded them before the checkpoints are removed
    checkpoints.save_trained(trainer, prompts.path, options.output_dir, settings)
    if args.process_index == 0:
        model_card.write(record, base_model="" if options.train_from_scratch else options.base_model)
        record.finish()
        numbered_checkpoints.remove_checkpoints(options.output_dir, record.record, keep=[given])
        best = trainer.state
        name = args.metric_for_best_model.removeprefix("eval_")
        say(f"best valid {name} {best.best_metric:.4f}, at step {best.best_global_step}")


if __name__ == "__main__":
    run(main, Options)
