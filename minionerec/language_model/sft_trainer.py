"""The trainer of SFT: `transformers.Trainer` with the loss and the logits restricted to answers.

- Hidden states are gathered at the positions that predict answer tokens before the LM head, so logits of prompts and
  padding, (batch, length, vocabulary), are never computed.
- Batches come in the order of `EpochOrder`, whatever the number of processes.
- Evaluation is exact: sums over all rows, on any number of processes.
- A loss that is not finite ends the run with one line.
"""

import math
import time

import numpy as np
import torch
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import speed_metrics

from minionerec.common.errors import UserError
from minionerec.language_model.batches import IGNORED, EpochOrder
from minionerec.language_model.checkpoints import writing


class AnswerLogits:
    """Restricts the LM head to the positions that predict an answer token: (answer tokens, vocabulary) logits.

    A hook on the head, so that wrappers (DDP, DeepSpeed, PEFT) and the model's own treatment of its logits stay in
    force. Outside `of` the model is unchanged.
    """

    def __init__(self, model):
        self.keep: torch.Tensor | None = None  # (lines, length), True where the next token is an answer's
        model.get_output_embeddings().register_forward_pre_hook(self._gather)

    def _gather(self, head, arguments):
        return arguments if self.keep is None else (arguments[0][self.keep],)

    def of(self, labels: torch.Tensor, forward):
        """`forward()` with logits only at the positions that predict a token of `labels`, (lines, length)."""
        self.keep = torch.zeros_like(labels, dtype=torch.bool)
        self.keep[:, :-1] = labels[:, 1:] != IGNORED
        try:
            return forward()
        finally:
            self.keep = None


def answer_loss(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Cross-entropy of the answer tokens in nats: their sum / `num_items_in_batch`, or their mean."""
    wanted = labels[:, 1:][labels[:, 1:] != IGNORED]
    total = torch.nn.functional.cross_entropy(outputs.logits.float(), wanted, reduction="sum")
    return total / (max(len(wanted), 1) if num_items_in_batch is None else num_items_in_batch)


class Patience(EarlyStoppingCallback):
    """Early stopping that survives a resume: a run whose patience had run out does not train or evaluate further."""

    def on_step_end(self, args, state, control, **kwargs):
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True
            control.should_evaluate = control.should_save = False


class SFTTrainer(Trainer):
    """`transformers.Trainer` with logits only for answers, one order on any number of processes, exact evaluation.

    order: the lines of each epoch; validation: `evaluation.validation.Validation`, or None to measure only the loss.
    """

    def __init__(self, *args, order: EpochOrder, validation=None, **kwargs):
        super().__init__(*args, compute_loss_func=answer_loss, **kwargs)
        self.order, self.validation = order, validation
        self.answer_logits = AnswerLogits(self.model)
        self.model_accepts_loss_kwargs = False  # the loss is computed here, the model needs no arguments for it

    def _get_train_sampler(self, train_dataset=None):
        return self.order

    def compute_loss(self, model, inputs, *args, **kwargs):
        usual = super().compute_loss
        return self.answer_logits.of(inputs["labels"], lambda: usual(model, inputs, *args, **kwargs))

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The loss in nats per answer token over all evaluation rows; with `validation`, also its HR and NDCG."""
        started, lines, accelerator = time.time(), self.eval_dataset, self.accelerator
        size, world = self.args.per_device_eval_batch_size, accelerator.num_processes
        order = np.array(EpochOrder(lines.lengths, size * world, seed=0, by_length=True).order())
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # nats, tokens
        self.model.eval()
        for rows in order.reshape(-1, world, size)[:, accelerator.process_index].tolist():
            batch = self._prepare_inputs(self.data_collator([lines[row] for row in rows]))
            labels = batch.pop("labels")
            outputs = self.answer_logits.of(labels, lambda batch=batch: self.model(**batch, use_cache=False))
            sums += torch.stack([answer_loss(outputs, labels, 1).double(), (labels != IGNORED).sum()])
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
        with writing(self.args.output_dir):
            super()._save_checkpoint(*args, **kwargs)
