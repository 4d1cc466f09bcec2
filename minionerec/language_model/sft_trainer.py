"""TODO."""

import time

import numpy as np
import torch
from transformers import Trainer
from transformers.trainer_utils import speed_metrics

from minionerec.language_model.batches import IGNORED, EpochOrder


class AnswerLogits:
    """Lets the LM head see the positions alone that predict a token of an answer: (answer tokens, vocabulary) logits.

    A hook on the head, so that whatever wraps the model (DDP, DeepSpeed, PEFT) and whatever the model does to its
    logits stays as it is. Outside `of`, the model is as before.
    """

    def __init__(self, model):
        self.keep: torch.Tensor | None = None  # (lines, length), True where the next token is an answer's
        model.get_output_embeddings().register_forward_pre_hook(self._gather)

    def _gather(self, head, arguments):
        return arguments if self.keep is None else (arguments[0][self.keep],)

    def of(self, labels: torch.Tensor, forward):
        """`forward()` with logits at the positions that predict a token of `labels` (lines, length) alone."""
        self.keep = torch.zeros_like(labels, dtype=torch.bool)
        self.keep[:, :-1] = labels[:, 1:] != IGNORED
        try:
            return forward()
        finally:
            self.keep = None


def answer_loss(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Cross-entropy in nats over the answers' tokens: their sum over `num_items_in_batch`, or their mean."""
    wanted = labels[:, 1:][labels[:, 1:] != IGNORED]
    total = torch.nn.functional.cross_entropy(outputs.logits.float(), wanted, reduction="sum")
    return total / (max(len(wanted), 1) if num_items_in_batch is None else num_items_in_batch)


class SFTTrainer(Trainer):
    """`transformers.Trainer` with logits for answers alone, one order on any number of processes, exact evaluation."""

    def __init__(self, *args, order: EpochOrder, validation=None, **kwargs):
        super().__init__(*args, compute_loss_func=answer_loss, **kwargs)
        self.order, self.validation = order, validation
        self.answer_logits = AnswerLogits(self.model)
        self.model_accepts_loss_kwargs = False  # the loss is made here; the model is told nothing of it

    def _get_train_sampler(self, train_dataset=None):
        return self.order

    def compute_loss(self, model, inputs, *args, **kwargs):
        usual = super().compute_loss
        return self.answer_logits.of(inputs["labels"], lambda: usual(model, inputs, *args, **kwargs))

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The loss in nats a token over all rows of the evaluation set; HR and NDCG too where `validation` is given."""
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
        result = {"loss": nats / tokens} | (self.validation.measure(self) if self.validation else {})
        result = {f"{metric_key_prefix}_{name}": value for name, value in result.items()}
        result |= speed_metrics(metric_key_prefix, started, num_samples=len(lines))
        self.log(result)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, result)
        return result
