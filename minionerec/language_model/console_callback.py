"""What SFT and RL print and log while they train, in place of the output of transformers' trainers."""

import math
import time
from collections.abc import Mapping

from transformers import TrainerCallback

from minionerec.common.console import Progress, detail, duration, figures, say, short
from minionerec.common.tracking import TrackedOptions, TrainingLog


class ConsoleCallback(TrainerCallback):
    """A line at each evaluation, a bar on a terminal; everything to `log.jsonl` and the tracker. The first process does it.

    shown: {name in the log: name on the line} of figures of the training; the metric of --metric_for_best_model follows.
    """

    def __init__(self, options: TrackedOptions, shown: Mapping[str, str]):
        self.options, self.shown = options, shown
        self.log = self.progress = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.metric, self.larger = args.metric_for_best_model, args.greater_is_better
        measured = [entry[self.metric] for entry in state.log_history if self.metric in entry]
        self.best = (max if self.larger else min)(measured, default=None)
        # Not the estimate by steps alone: a run may end earlier, by its time budget
        budget = (state.stateful_callbacks or {}).get("TimeBudget", {}).get("args", {})
        seconds = budget["seconds"] - budget["spent"] if budget else math.inf
        self.ends = time.monotonic() + seconds
        self.log = TrainingLog(self.options, args.output_dir, state.log_history)
        self.progress = Progress(state.max_steps, "training", start=state.global_step, unit="steps")

    def on_step_end(self, args, state, control, **kwargs):
        if self.progress:
            self.progress.update()

    def on_log(self, args, state, control, **kwargs):
        if self.log:
            self.log.add(state.log_history[-1])
            detail(figures({k: v for k, v in state.log_history[-1].items() if isinstance(v, int | float)}))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not self.log:
            return
        trained = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
        line = {label: trained[name] for name, label in self.shown.items() if trained.get(name) is not None}
        words = [f"step {state.global_step}/{state.max_steps}", figures(line)]
        words.append(f"valid {self.metric.removeprefix('eval_')} {self._compared(metrics[self.metric])}")
        say("  ".join(filter(None, [*words, self._left()])))

    def _compared(self, value: float) -> str:
        """`.0723 (best .0732)`"""
        both = [value] if self.best is None else [value, self.best]
        self.best = (max if self.larger else min)(both)
        return f"{short(value)} (best {short(self.best)})"

    def _left(self) -> str:
        seconds = self.progress.seconds_left()
        if seconds is None or self.progress.done >= self.progress.total:
            return ""
        return f"{duration(max(0.0, min(seconds, self.ends - time.monotonic())))} left"

    def on_train_end(self, args, state, control, **kwargs):
        if self.log:
            self.progress.close()
            self.log.close()
