"""Dropout by hooks and the moving average of weights.

Invariants: dropout changes outputs in training and nothing in evaluation or in what is saved, for architectures that name
their blocks differently, and is refused where there are no such blocks; the average follows its formula; evaluation and
checkpoints have the average, training continues with the plain weights, and a resumed run ends as an unbroken one.
"""

import copy
import os

import pytest
import torch
from helpers import killed_midway, run_stage, sft_environment
from language_model.small_models import VOCABULARY, config_of, plain_loss, random_model, random_rows
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from minionerec.common.errors import UserError
from minionerec.language_model.adapters import add_lora
from minionerec.language_model.batches import IGNORED, Collator, EpochOrder, Lines
from minionerec.language_model.numbered_checkpoints import is_complete
from minionerec.language_model.regularization import WEIGHTS, MovingAverage, add_dropout
from minionerec.language_model.sft_trainer import SFTTrainer

IDS = torch.arange(1, 13).view(2, 6)
OWN_DROPOUT = ("dropout", "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop")
BLOCKS = {
    "qwen2": 4,
    "llama": 4,
    "gpt2": 4,
    "opt": 4,
    "gpt_neox": 4,
    "phi": 4,
    "gemma2": 4,
    "gptj": 4,
    "opt projected": 4,
}


def without_dropout(name: str):
    """A random model whose config drops nothing."""
    config = config_of(name)
    for option in OWN_DROPOUT:
        if hasattr(config, option):
            setattr(config, option, 0.0)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def logits_of(model, training: bool) -> torch.Tensor:
    model.train(training)
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


# ------------------------------------------------------------------------------------------------ dropout


@pytest.mark.parametrize("name", BLOCKS)
def test_dropout_changes_training_only(name):
    model = without_dropout(name)
    plain, names = logits_of(model, False), set(model.state_dict())
    assert torch.equal(logits_of(model, True), plain)
    add_dropout(model, 0.4)
    assert torch.equal(logits_of(model, False), plain) and set(model.state_dict()) == names
    one, other = logits_of(model, True), logits_of(model, True)
    assert (one - plain).abs().amin(dim=(1, 2)).max() < (one - plain).abs().amax() and not torch.equal(one, other)
    torch.manual_seed(3)
    one = logits_of(model, True)
    torch.manual_seed(3)
    assert torch.equal(logits_of(model, True), one)  # drawn from torch's generator, as a resumed run restores it


@pytest.mark.parametrize("name, blocks", BLOCKS.items())
def test_what_is_dropped_are_embeddings_and_both_branches_of_every_layer(name, blocks, monkeypatch):
    """Each time a share p of the values, the rest scaled by 1 / (1 - p)."""
    calls = []

    def spy(values, p):
        calls.append(p)
        return nn.functional.dropout(values, p)

    monkeypatch.setattr("minionerec.language_model.regularization.dropout", spy)
    model = without_dropout(name)
    add_dropout(model, 0.4)
    logits_of(model, True)
    assert calls == [0.4] * (1 + blocks)
    embedding, ids = model.get_input_embeddings(), torch.zeros(50, 50, dtype=torch.long)
    embedding.weight.data.fill_(1.0)
    values, whole = embedding.train()(ids), embedding.eval()(ids)
    kept = values != 0
    assert kept.float().mean().item() == pytest.approx(0.6, abs=0.02)
    torch.testing.assert_close(values[kept], whole[kept] / 0.6)


def test_dropout_under_lora():
    model = add_lora(without_dropout("qwen2"), list(range(100, VOCABULARY)), 4, 8, 0.0, "all-linear")
    plain = logits_of(model, False)
    add_dropout(model, 0.4)
    assert torch.equal(logits_of(model, False), plain)
    assert not torch.equal(logits_of(model, True), plain)


@pytest.mark.parametrize("name", ["mamba", "bloom"])
def test_layers_without_such_blocks_are_refused(name):
    """Recurrent layers; and blocks that add the residual themselves, whose output is all of the stream."""
    with pytest.raises(UserError, match=r"--dropout 0.4: the layers of \w+ have no self_attn or .*; use 0"):
        add_dropout(random_model(name), 0.4)


# ------------------------------------------------------------------------------------------------ the average


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def step(model, seed: int) -> None:
    """Any change of the weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator))


def by_formula(past: list[dict], decay: float) -> dict[str, torch.Tensor]:
    """The average after the weights `past`, of which the first are those at its start."""
    average = past[0]
    for number, weights in enumerate(past[1:], start=1):
        own = min(decay, (1 + number) / (10 + number))
        average = {name: own * average[name] + (1 - own) * weights[name] for name in weights}
    return average


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], msg=name)


def test_the_average_follows_its_formula():
    """The second decay is reached in step 8: (1 + 8) / (10 + 8) = 0.5."""
    for decay in (0.99, 0.5):
        model = random_model("qwen2")
        average, past = MovingAverage(model, decay), [weights_of(model)]
        for number in range(12):
            step(model, number)
            past.append(weights_of(model))
            average.update()
        assert_equal(average.average, by_formula(past, decay))
        assert_equal(weights_of(model), past[-1])


def test_swapping_twice_changes_nothing():
    model = random_model("llama")
    average, before = MovingAverage(model, 0.9), weights_of(model)
    step(model, 0)
    after = weights_of(model)
    average.swap()
    assert_equal(weights_of(model), before)
    average.swap()
    assert all(torch.equal(p, after[name]) for name, p in model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in average.average.items())


def test_frozen_weights_are_left_out():
    model = random_model("qwen2")
    model.model.layers.requires_grad_(False)
    average = MovingAverage(model, 0.9)
    assert set(average.average) == {"model.embed_tokens.weight", "model.norm.weight"}


def test_a_loaded_average_goes_on(tmp_path):
    """A resumed run reads the average as its model and the weights from the file."""
    model = random_model("qwen2")
    average = MovingAverage(model, 0.9)
    for number in range(4):
        step(model, number)
        average.update()
    average.save(tmp_path)
    resumed = random_model("qwen2")
    resumed.load_state_dict(average.average, strict=False)
    other = MovingAverage(resumed, 0.9)
    other.load(tmp_path)
    assert_equal(weights_of(resumed), weights_of(model))
    for number in range(4, 6):
        for each, its in ((model, average), (resumed, other)):
            step(each, number)
            its.update()
    assert all(torch.equal(value, other.average[name]) for name, value in average.average.items())
    assert all(torch.equal(p, weights_of(model)[name]) for name, p in resumed.named_parameters())


# ------------------------------------------------------------------------------------------------ in training


class Past(TrainerCallback):
    """The weights at the beginning and after each step."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.weights.append(weights_of(model))

    on_step_end = on_train_begin


def trainer_of(folder, model, smoothing=0.0, **arguments) -> tuple[SFTTrainer, Past]:
    """6 steps, with a checkpoint and an evaluation after 3 and 6."""
    lines, past = Lines(random_rows()), Past()
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, seed=1, report_to=[], remove_unused_columns=False, disable_tqdm=True,
        num_train_epochs=2, per_device_train_batch_size=8, learning_rate=1e-2, eval_strategy="steps", eval_steps=3,
        save_steps=3, load_best_model_at_end=True, **arguments,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=lines, eval_dataset=lines, data_collator=Collator(0),
        order=EpochOrder(lines.lengths, 8, 1, by_length=True), callbacks=[past], average=0.6,
        smoothing=smoothing,
    )  # fmt: skip
    return trainer, past


def test_the_average_is_evaluated_and_saved_and_the_weights_are_trained(tmp_path):
    trainer, past = trainer_of(tmp_path, without_dropout("qwen2"))
    trainer.train()
    assert len(past.weights) == 7
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    for number, loss in zip((3, 6), losses, strict=True):
        average = by_formula(past.weights[: number + 1], 0.6)
        saved = load_file(tmp_path / f"checkpoint-{number}" / "model.safetensors")
        assert_equal({name: saved[name] for name in average}, average)
        trained = load_file(tmp_path / f"checkpoint-{number}" / WEIGHTS)
        assert all(torch.equal(trained[name], value) for name, value in past.weights[number].items())
        model = without_dropout("qwen2")
        model.load_state_dict(average, strict=False)
        assert loss == pytest.approx(plain_loss(model, random_rows()), abs=1e-5)
    assert losses[1] < losses[0]
    assert_equal(weights_of(trainer.model), by_formula(past.weights, 0.6))  # the best checkpoint's


def test_label_smoothing_is_in_the_trained_loss_alone(tmp_path):
    trainer, _ = trainer_of(tmp_path, without_dropout("qwen2"), smoothing=0.2)
    batch = Collator(0)([trainer.train_dataset[row] for row in range(8)])
    given = {name: value for name, value in batch.items() if name != "labels"}
    logits, wanted = trainer.model(**given).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    smoothed = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, label_smoothing=0.2)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), smoothed)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain_loss(trainer.model, random_rows()), abs=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_training_ends_as_an_unbroken_one(tmp_path, dropout):
    def model():
        made = without_dropout("qwen2")
        if dropout:
            add_dropout(made, dropout)
        return made

    unbroken, past = trainer_of(tmp_path / "one", model())
    unbroken.train()
    resumed, later = trainer_of(tmp_path / "two", model())
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))
    assert_equal(later.weights[0], past.weights[3])
    for name, value in weights_of(unbroken.model).items():
        assert torch.equal(value, weights_of(resumed.model)[name]), name


def test_a_checkpoint_is_complete_only_with_its_trained_weights(tmp_path, monkeypatch):
    """A kill while they are written must not leave a checkpoint that a resume takes."""

    def killed(average, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(MovingAverage, "save", killed)
    trainer, _ = trainer_of(tmp_path, without_dropout("qwen2"))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not is_complete(tmp_path / "checkpoint-3")


@pytest.mark.slow
def test_a_killed_stage_ends_as_an_unbroken_one(world, base_model, tmp_path):
    """Through the launcher, with dropout, label smoothing and the loss over the trie."""
    settings = {"EMA_DECAY": 0.9, "DROPOUT": 0.2, "LABEL_SMOOTHING": 0.1, "TRAIN_SPACE": "catalog", "EVAL_STEP": 0.1}
    settings |= {"SFT_TASKS": "sid_seq,title2sid", "NUM_EPOCHS": 8, "EARLY_STOPPING_PATIENCE": 0}

    def environment(name: str, **more) -> dict:
        return sft_environment(world, base_model, tmp_path / name, CACHE_DIR=tmp_path / "cache", **settings | more)

    run_stage("sft.sh", env=environment("unbroken"))
    killed_midway("sft.sh", environment("killed"), tmp_path / "killed")
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    done = run_stage("sft.sh", env=environment("killed"))
    assert "sft: resumes" in done.stdout
    run_stage("sft.sh", env=environment("plain", EMA_DECAY=0))
    models = {name: load_file(tmp_path / name / "model.safetensors") for name in ("unbroken", "killed", "plain")}
    for name, value in models["unbroken"].items():
        assert torch.equal(value, models["killed"][name]), name
    assert any(not torch.equal(value, models["plain"][name]) for name, value in models["unbroken"].items())
    assert not list((tmp_path / "killed").glob(f"**/{WEIGHTS}")) and os.listdir(tmp_path / "killed")


def test_without_an_average_nothing_is_added(tmp_path):
    trainer, _ = trainer_of(tmp_path, copy.deepcopy(without_dropout("qwen2")))
    assert trainer.average is not None
    plain = SFTTrainer(
        model=without_dropout("qwen2"), args=trainer.args, train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset, data_collator=Collator(0), order=trainer.order,
    )  # fmt: skip
    plain.train()
    assert plain.average is None and not list(tmp_path.glob(f"*/{WEIGHTS}"))
