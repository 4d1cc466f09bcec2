"""The trainer of SFT: `transformers.Trainer` with the loss and the logits restricted to answers.

- Hidden states are gathered at the positions that predict answer tokens before the LM head, so logits of prompts and
  padding, (batch, length, vocabulary), are never computed.
- Batches come in the order of `EpochOrder`, whatever the number of processes.
- Evaluation is exact: sums over all rows, on any number of processes.
- A loss that is not finite ends the run with one line.
"""

import math
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback
from transformers.trainer_utils import speed_metrics

from minionerec.common.console import duration, say
from minionerec.common.errors import UserError
from minionerec.common.processes import on_main_process
from minionerec.decoding.lm_head import LMHead
from minionerec.language_model.batches import IGNORED, EpochOrder
from minionerec.language_model.catalog_loss import SidTokens, catalog_loss
from minionerec.language_model.checkpoints import writing
from minionerec.language_model.numbered_checkpoints import begin_checkpoint, resuming
from minionerec.language_model.regularization import MovingAverage


class AnswerLogits:
    """Restricts the LM head to the positions that predict an answer token: (answer tokens, vocabulary) logits.

    A hook on the head, so that wrappers (DDP, DeepSpeed, PEFT) and the model's own treatment of its logits stay in
    force. Outside `of` the model is unchanged.
    """

    def __init__(self, model, sids: SidTokens | None = None, smoothing: float = 0.0):
        """sids: SID tokens get their loss over the trie (`catalog_loss`) and no logits; None: as all tokens."""
        self.model, self.sids, self.smoothing = model, sids, smoothing
        self.keep: torch.Tensor | None = (
            None  # (lines, length), True where the next token is an answer's and has logits
        )
        self.states: torch.Tensor | None = None  # (SID tokens, dim) the states that predict the others
        model.get_output_embeddings().register_forward_pre_hook(self._gather)

    def _gather(self, head, arguments):
        if self.keep is None:
            return arguments
        if self.sids is not None:
            self.states = arguments[0][self.of_sids]
        return (arguments[0][self.keep],)

    def of(self, labels: torch.Tensor, forward):
        """`forward()` with logits only at the positions that predict a token of `labels`, (lines, length)."""
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        self.keep = following != IGNORED
        if self.sids is not None:
            self.sids.to(labels.device)
            self.of_sids = self.keep & (self.sids.level[following.clamp(min=0)] >= 0)
            self.keep = self.keep & ~self.of_sids
        try:
            return forward()
        finally:
            self.keep = None

    def loss(self, outputs, labels: torch.Tensor, num_items_in_batch=None, *, smooth: bool = True) -> torch.Tensor:
        """Cross-entropy of the answer tokens in nats: their sum / `num_items_in_batch`, or their mean.

        Call it with the outputs of the last `of`. smooth: with label smoothing, for training.
        """
        wanted = labels[:, 1:][labels[:, 1:] != IGNORED]
        smoothing, of_text = self.smoothing if smooth else 0.0, wanted
        total = outputs.logits.new_zeros((), dtype=torch.float32)
        if self.sids is not None:
            is_sid = self.sids.level[wanted] >= 0
            total = total + catalog_loss(LMHead.of(self.model), self.states, wanted[is_sid], self.sids, smoothing)
            of_text = wanted[~is_sid]
        if len(of_text):
            logits = outputs.logits.float()
            total = total + cross_entropy(logits, of_text, reduction="sum", label_smoothing=smoothing)
        else:
            total = total + outputs.logits.sum()  # zero: no row, but every weight of the head is in the graph
        return total / (max(len(wanted), 1) if num_items_in_batch is None else num_items_in_batch)


class UpdateAverage(TrainerCallback):
    """Updates the average of weights after every optimizer step."""

    def __init__(self, average: MovingAverage):
        self.average = average

    def on_step_end(self, args, state, control, **kwargs):
        self.average.update()


class TimeBudget(TrainerCallback, ExportableState):
    """Ends training, with an evaluation, after `seconds` of training and evaluations, and prints when that will be.

    `SFTTrainer` lets the learning rate follow `share`, the share of the seconds that is gone.
    """

    MEASURED = 20  # steps until the end is estimated

    def __init__(self, seconds: float, spent: float = 0.0):
        self.seconds, self.spent, self.started = seconds, spent, time.monotonic()
        self.share = min(1.0, spent / seconds)  # the same on all processes

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        # the first process decides for all: clocks differ, and one that stops alone leaves the others waiting
        elapsed = on_main_process(lambda: self.spent + time.monotonic() - self.started)
        self.share = min(1.0, elapsed / self.seconds)
        if state.global_step - self.first_step == self.MEASURED:
            total = elapsed + (time.monotonic() - self.started) / self.MEASURED * (state.max_steps - state.global_step)
            say(
                f"{state.max_steps} steps take about {duration(total)} without evaluations; --time_budget "
                f"{self.seconds:.0f}: {duration(self.seconds)}"
            )
        if elapsed > self.seconds and state.global_step < state.max_steps:
            say(f"--time_budget {self.seconds:.0f}: training ends after {state.global_step} steps")
            control.should_training_stop = control.should_evaluate = control.should_save = True

    def state(self) -> dict:
        return {
            "args": {"seconds": self.seconds, "spent": self.spent + time.monotonic() - self.started},
            "attributes": {},
        }


class Patience(EarlyStoppingCallback):
    """Early stopping that survives a resume: a run whose patience had run out does not train or evaluate further."""

    def on_step_end(self, args, state, control, **kwargs):
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True
            control.should_evaluate = control.should_save = False


class SFTTrainer(Trainer):
    """`transformers.Trainer` with logits only for answers, one order on any number of processes, exact evaluation.

    order: the lines of each epoch; validation: `evaluation.validation.Validation`, or None to measure only the loss.
    With a `TimeBudget` among the callbacks, the learning rate is where the larger of two shares puts it on its schedule,
    that of steps and that of seconds, so that a run that its budget ends has come to the end of its schedule.
    """

    def __init__(
        self,
        *args,
        order: EpochOrder,
        validation=None,
        sids: SidTokens | None = None,
        smoothing: float = 0.0,
        average: float = 0.0,
        **kwargs,
    ):
        super().__init__(*args, compute_loss_func=self._loss, **kwargs)
        self.remove_callback(PrinterCallback)  # it prints every figure
        self.order, self.validation = order, validation
        self.answer_logits = AnswerLogits(self.model, sids, smoothing)
        self.average = MovingAverage(self.model, average) if average else None
        if self.average:
            self.add_callback(UpdateAverage(self.average))
        self.model_accepts_loss_kwargs = False  # the loss is computed here, the model needs no arguments for it

    def _loss(self, outputs, labels, num_items_in_batch=None):
        return self.answer_logits.loss(outputs, labels, num_items_in_batch)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if hasattr(scheduler, "lr_lambdas"):
            scheduler.lr_lambdas = [
                lambda step, usual=usual: usual(max(step, self._spent() * num_training_steps))
                for usual in scheduler.lr_lambdas
            ]
        return scheduler

    def _spent(self) -> float:
        """The share of the time budget that is gone, 0 without one. Resuming replaces the callback, so it is looked up."""
        return max((c.share for c in self.callback_handler.callbacks if isinstance(c, TimeBudget)), default=0.0)

    def _get_train_sampler(self, train_dataset=None):
        return self.order

    def compute_loss(self, model, inputs, *args, **kwargs):
        usual = super().compute_loss
        return self.answer_logits.of(inputs["labels"], lambda: usual(model, inputs, *args, **kwargs))

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The loss in nats per answer token over all evaluation rows; with `validation`, also its HR and NDCG.

        With an average of weights, that is what is evaluated.
        """
        with self._averaged():
            return self._measure(metric_key_prefix)

    def _measure(self, metric_key_prefix: str) -> dict[str, float]:
        started, lines, accelerator = time.time(), self.eval_dataset, self.accelerator
        size, world = self.args.per_device_eval_batch_size, accelerator.num_processes
        order = np.array(EpochOrder(lines.lengths, size * world, seed=0, by_length=True).order())
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # nats, tokens
        self.model.eval()
        for rows in order.reshape(-1, world, size)[:, accelerator.process_index].tolist():
            batch = self._prepare_inputs(self.data_collator([lines[row] for row in rows]))
            labels = batch.pop("labels")
            outputs = self.answer_logits.of(labels, lambda batch=batch: self.model(**batch, use_cache=False))
            loss = self.answer_logits.loss(outputs, labels, 1, smooth=False)
            sums += torch.stack([loss.double(), (labels != IGNORED).sum()])
        self.model.train()
        nats, tokens = accelerator.reduce(sums).tolist()
        self._require_finite(nats)
        result = {"loss": nats / tokens} | (self.validation.measure(self) if self.validation else {})
        result = {f"{metric_key_prefix}_{name}": value for name, value in result.items()}
        result |= speed_metrics(metric_key_prefix, started, num_samples=len(lines))
        self.log(result)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, result)
        return result

    def log(self, logs, *args, **kwargs):
        self._require_finite(logs.get("loss", 0.0))
        super().log(logs, *args, **kwargs)

    def _require_finite(self, loss: float) -> None:
        """Raise `UserError` for a loss that diverged. It is the same on all processes, so all of them end."""
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} after {self.state.global_step} steps with --learning_rate {self.args.learning_rate}: "
                "training diverged; lower it"
            )

    def _save_checkpoint(self, *args, **kwargs):
        begin_checkpoint(self)
        with writing(self.args.output_dir):
            if self.average and self.args.should_save:  # first: what is written last completes a checkpoint
                self.average.save(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
            with self._averaged():
                super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with resuming(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self.average:
                self.average.load(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with resuming(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    @contextmanager
    def _averaged(self):
        """The model with the average of its weights, where there is one."""
        if self.average is None:
            yield
            return
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()
