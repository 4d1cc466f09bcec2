"""One optimizer step of SFT: plain `transformers.Trainer` and ours, time and peak memory side by side.

    python -m benchmarks.sft_step --json

A Qwen2 of 45 million random weights (hidden 256, 6 layers, vocabulary 152,204), rows of the default tasks on
MovieLens-100K. Plain: random batches padded to their longest row, logits of every position, the model's own loss. Ours:
the trainer, batches and loss of sft.py. Each run is a process, so that its peak memory can be measured. The two take
turns; figures are medians over the steps of all rounds (of the runs' peaks, for memory). The last line compares our
peak, less what the process held before its model, with the estimate that sft.py prints at its start.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks import movielens_rows
from benchmarks.shared import VOCABULARY, VOCABULARY_HELP, peak_memory, random_model
from minionerec.common.errors import UserError
from minionerec.common.options import option, run
from minionerec.language_model.batches import IGNORED, Collator, EpochOrder, Lines
from minionerec.language_model.memory import memory_estimate
from minionerec.language_model.sft_trainer import SFTTrainer
from minionerec.language_model.tokenizing import tokenize

SIDES = ("plain", "ours")
WARM_UP = 2  # steps that are not counted


@dataclass
class Options:
    side: str = option("", "plain or ours: run only that one and print its figures; default: both, in turns")
    tokenizer: str = option("", movielens_rows.TOKENIZER_HELP)
    vocabulary: int = option(VOCABULARY, VOCABULARY_HELP)
    batch_size: int = option(16, "rows per step")
    steps: int = option(8, "counted steps of a run")
    rounds: int = option(2, "runs of each side")
    json: bool = option(False, "print the ratios as JSON in the last line")

    def __post_init__(self):
        if self.side not in ("", *SIDES):
            raise UserError(f"--side {self.side}: expected plain or ours")
        for name in ("batch_size", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: expected at least 1")


class Clock(TrainerCallback):
    """Seconds of each step after the warm-up."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step > WARM_UP:
            self.seconds.append(time.perf_counter() - self.started)


def measure(options: Options) -> dict:
    """{"seconds": of each counted step, "bytes": the peak, "before": the peak before there was a model}, and for our
    side "estimate": the bytes of the preflight line. Of the process, or of the GPU."""
    device, steps = "cuda" if torch.cuda.is_available() else "cpu", WARM_UP + options.steps
    tokenizer = movielens_rows.tokenizer_of(options.tokenizer)
    # as many rows as an epoch's length groups consist of, and not fewer than the steps take
    rows = tokenize(movielens_rows.pairs(50 * options.batch_size), tokenizer, "", "; ").trimmed(512)
    if rows.tokens.max() >= options.vocabulary:
        raise UserError(f"--tokenizer {options.tokenizer}: {len(tokenizer)} tokens, expected at most --vocabulary")
    figures = {"before": peak_memory(device)}
    model = random_model("cpu", torch.float32, options.vocabulary)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=options.batch_size, max_steps=steps, save_strategy="no",
            use_cpu=not torch.cuda.is_available(), bf16=torch.cuda.is_available(), report_to=[], disable_tqdm=True,
            logging_strategy="no", remove_unused_columns=False, dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        if options.side == "ours":
            lines = Lines(rows)
            order = EpochOrder(lines.lengths, options.batch_size, 0, by_length=True)
            estimate = memory_estimate(model, lines, options.batch_size, arguments.bf16, checkpointing=False)
            figures["estimate"] = sum(estimate.values())
            trainer = SFTTrainer(
                model=model, args=arguments, train_dataset=lines, data_collator=Collator(tokenizer.pad_token_id),
                order=order, callbacks=[clock],
            )  # fmt: skip
        else:
            dataset = []
            for begin, end, answer in zip(rows.start, rows.start[1:], rows.answer, strict=False):
                ids = rows.tokens[begin:end].tolist()
                labels = [IGNORED] * (len(ids) - answer) + ids[len(ids) - answer :]
                dataset.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
            collator = DataCollatorForSeq2Seq(tokenizer)
            trainer = Trainer(
                model=model, args=arguments, train_dataset=dataset, data_collator=collator, callbacks=[clock]
            )
        trainer.train()
    return figures | {"seconds": clock.seconds, "bytes": peak_memory(device)}


def main(options: Options) -> None:
    if options.side:
        print(json.dumps(measure(options)))
        return
    seconds, peaks = ({side: [] for side in SIDES} for _ in range(2))
    shared = {name: getattr(options, name) for name in ("tokenizer", "vocabulary", "batch_size", "steps")}
    for _ in range(options.rounds):
        for side in SIDES:
            command = [sys.executable, "-m", "benchmarks.sft_step", f"--side={side}"]
            command += [f"--{name}={value}" for name, value in shared.items()]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise UserError(f"the run of side {side} failed; its error is printed above")
            figures = json.loads(done.stdout.splitlines()[-1])
            seconds[side] += figures["seconds"]
            peaks[side].append(figures["bytes"])
            if side == "ours":
                ours = figures

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}; batches of {options.batch_size} rows, {len(seconds['ours'])} steps per side")
    time_of = {side: statistics.median(values) for side, values in seconds.items()}
    peak_of = {side: statistics.median(values) for side, values in peaks.items()}
    for side in SIDES:
        print(f"{side:6}{time_of[side]:8.3f} s per step{peak_of[side] / 2**30:8.2f} GiB at most")
    ratios = {"time_ratio": time_of["plain"] / time_of["ours"], "memory_ratio": peak_of["ours"] / peak_of["plain"]}
    print(f"ours is {ratios['time_ratio']:.1f} times as fast, with {ratios['memory_ratio']:.2f} of the memory")
    needed = (peak_of["ours"] - ours["before"]) / 2**30
    print(f"ours needed {needed:.2f} GiB in addition to the process; the estimate was {ours['estimate'] / 2**30:.2f}")
    if options.json:
        print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    run(main, Options)
