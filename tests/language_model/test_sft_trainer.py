"""The trainer of SFT.

Invariants: loss and gradients equal those of full logits over padded rows; accumulation does not change the run;
evaluation is the mean over all answer tokens; a diverging run ends with one line; early stopping survives a resume.
"""

import numpy as np
import pytest
import torch
from helpers import INDUSTRIAL
from language_model.small_models import ARCHITECTURES, random_model, random_rows, train
from transformers import TrainerControl, TrainerState, TrainingArguments

from minionerec.common.errors import UserError
from minionerec.language_model import sft_trainer
from minionerec.language_model.batches import IGNORED, Collator, Lines
from minionerec.language_model.sft_trainer import AnswerLogits, Patience, TimeBudget


def plain_loss_and_gradients(model, rows):
    """Mean loss of the answers by full logits of padded rows with a mask, as any trainer computes it."""
    shape = (len(rows.answer), rows.lengths.max())
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(rows.lengths):
        tokens = torch.from_numpy(rows.tokens[rows.start[i] : rows.start[i + 1]]).long()
        ids[i, :length], mask[i, :length] = tokens, 1
        labels[i, length - rows.answer[i] : length] = tokens[-rows.answer[i] :]
    model.zero_grad()
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_loss_and_gradients_equal(model, rows, capacity):
    expected, gradients = plain_loss_and_gradients(model, rows)
    lines = Lines(rows, capacity)
    batch = Collator(0, packed=capacity > 0)([*(lines[i] for i in range(len(lines))), []])
    labels, seen = batch.pop("labels"), []
    model.get_output_embeddings().register_forward_hook(lambda head, inputs, output: seen.append(tuple(output.shape)))
    model.zero_grad()
    losses = AnswerLogits(model)
    loss = losses.loss(losses.of(labels, lambda: model(**batch, use_cache=False)), labels)
    loss.backward()
    assert seen == [(rows.answer.sum(), model.config.vocab_size)]  # logits of answers only
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("bloom", "mamba", "granite")])
@pytest.mark.parametrize("capacity", [0, 40])
def test_loss_and_gradients_equal_the_plain_ones(name, capacity):
    if capacity and name.startswith("opt"):
        pytest.skip("needs a mask")
    assert_loss_and_gradients_equal(random_model(name), random_rows(9), capacity)


@pytest.mark.skipif(not INDUSTRIAL.exists(), reason="the Industrial data set is absent")
@pytest.mark.parametrize("capacity", [0, 200])
def test_loss_and_gradients_equal_the_plain_ones_on_real_rows(capacity):
    from language_model.test_batches import industrial_rows

    rows = industrial_rows()
    picked = np.arange(0, len(rows.answer), len(rows.answer) // 12)
    tokens = [rows.tokens[rows.start[i] : rows.start[i + 1]] for i in picked]
    start = np.concatenate([[0], np.cumsum([len(each) for each in tokens])])
    rows = type(rows)(np.concatenate(tokens), start, rows.answer[picked]).trimmed(150)
    assert_loss_and_gradients_equal(random_model("qwen2", vocab_size=int(rows.tokens.max()) + 1), rows, capacity)


def test_accumulation_does_not_change_the_run(tmp_path):
    runs = [
        train(tmp_path / "a", random_model("qwen2"), random_rows(), per_device_train_batch_size=8),
        train(tmp_path / "b", random_model("qwen2"), random_rows(), per_device_train_batch_size=1, gradient_accumulation_steps=8),
    ]  # fmt: skip
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in runs]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], abs=1e-5)
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_evaluation_is_the_mean_over_all_answer_tokens(tmp_path):
    rows = random_rows(11)
    trainer = train(tmp_path, random_model("gpt2"), rows, per_device_train_batch_size=4, per_device_eval_batch_size=4)
    measured = trainer.evaluate()["eval_loss"]
    trainer.model.eval()
    assert measured == pytest.approx(plain_loss_and_gradients(trainer.model, rows)[0], abs=1e-5)


@pytest.mark.parametrize("logged", [True, False])
def test_a_diverging_run_ends_with_one_line(tmp_path, logged):
    arguments = {"logging_nan_inf_filter": False, "learning_rate": 1e30, "eval_strategy": "epoch"}
    arguments |= {} if logged else {"logging_strategy": "no"}
    with pytest.raises(
        UserError, match=r"the loss is (nan|inf) after \d steps with --learning_rate 1e\+30: .*lower it"
    ):
        train(tmp_path, random_model("qwen2"), random_rows(), **arguments)


# ------------------------------------------------------------------------------------------------ early stopping


def test_patience_that_had_run_out_stops_a_resumed_run_without_another_evaluation(tmp_path):
    stored = Patience(2)
    args = TrainingArguments(
        output_dir=str(tmp_path), eval_strategy="steps", metric_for_best_model="eval_loss", load_best_model_at_end=True,
        greater_is_better=False, use_cpu=True,
    )  # fmt: skip
    state, control = TrainerState(best_metric=1.0), TrainerControl()
    for _ in range(2):
        assert not control.should_training_stop
        stored.on_evaluate(args, state, control, {"eval_loss": 2.0})
    assert control.should_training_stop
    restored = Patience(**stored.state()["args"])  # as the Trainer does
    restored.early_stopping_patience_counter = stored.state()["attributes"]["early_stopping_patience_counter"]
    control = TrainerControl(should_evaluate=True, should_save=True)
    restored.on_step_end(args, state, control)
    assert control.should_training_stop and not control.should_evaluate and not control.should_save


@pytest.mark.parametrize("elapsed_there, stops", [(11.0, True), (9.0, False)])
def test_the_first_process_decides_that_the_time_is_over(elapsed_there, stops, monkeypatch):
    """The clock of this process says the opposite."""
    monkeypatch.setattr(sft_trainer, "on_main_process", lambda function: elapsed_there)
    budget, control = TimeBudget(10.0, spent=0.0 if stops else 20.0), TrainerControl()
    state = TrainerState(max_steps=100)
    budget.on_train_begin(None, state, control)
    state.global_step = 5
    budget.on_step_end(None, state, control)
    assert control.should_training_stop is stops and control.should_evaluate is stops and control.should_save is stops


def test_time_spent_before_a_resume_counts():
    budget, control, state = TimeBudget(10.0, spent=9.0), TrainerControl(), TrainerState(max_steps=100)
    budget.on_train_begin(None, state, control)
    budget = TimeBudget(**budget.state()["args"])
    assert budget.spent >= 9.0
    budget.spent += 2.0
    budget.on_train_begin(None, state, control)
    budget.on_step_end(None, state, control)
    assert control.should_training_stop


def learning_rates(folder, budget: TimeBudget | None, **arguments) -> list[float]:
    values = {"per_device_train_batch_size": 3, "learning_rate": 1.0, "lr_scheduler_type": "linear"}
    trainer = train(folder, random_model("qwen2"), random_rows(), callbacks=budget and [budget], **values | arguments)
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


class Clock(TimeBudget):
    """A budget of which every step takes a tenth."""

    def on_step_end(self, args, state, control, **kwargs):
        self.share = min(1.0, state.global_step / 10)
        control.should_training_stop |= self.share >= 1


@pytest.mark.parametrize("steps, ends", [(5, False), (100, True)])
def test_the_learning_rate_has_decayed_when_the_budget_ends_a_run(tmp_path, steps, ends):
    """After n steps it is at the larger of n / steps and the share of the seconds."""
    without = learning_rates(tmp_path / "a", None, max_steps=steps)
    rates = learning_rates(tmp_path / "b", Clock(10.0), max_steps=steps)
    if ends:
        assert len(rates) == 10 and without[9] > 0.9
        expected = [1, 0.99, *(1 - n / 10 for n in range(1, 9))]  # a share is known one step later
        assert rates == pytest.approx(expected)
    else:
        assert rates == without and len(rates) == 5


def test_the_share_of_the_seconds_survives_a_resume():
    assert TimeBudget(10.0, spent=4.0).share == 0.4 and TimeBudget(10.0, spent=40.0).share == 1.0
