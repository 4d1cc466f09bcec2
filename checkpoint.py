"""A checkpoint folder: model, tokenizer and the wording of its prompts; loading, new tokens, saving, resuming."""

import os
import re
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl.models import unwrap_model_for_generation

from cli import UserError
from data import PROMPT_FILE, Items


def load_tokenizer(folder: str | Path, flag: str):
    """The tokenizer of a model folder; one without a pad token pads with its end of sequence."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no tokenizer to be read there ({_first_line(error)}); check --{flag}") from None
    if tokenizer.eos_token is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(folder: str | Path, flag: str, dtype: torch.dtype = torch.float32):
    """The causal LM of a folder (or hub name), on the CPU."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder}: no causal language model to be read there ({_first_line(error)}); check --{flag}"
        ) from None


def new_model(folder: str | Path, flag: str, dtype: torch.dtype = torch.float32):
    """A causal LM with random weights from the config of a folder (or hub name)."""
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder}: no config of a causal language model ({_first_line(error)}); check --{flag}"
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


# ------------------------------------------------------------------------------------------------ new tokens


def _embedding_matrices(model) -> list[torch.nn.Parameter]:
    """The input embedding and, where it is untied, the output embedding: each (vocabulary, hidden)."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return list({id(module.weight): module.weight for module in modules}.values())


@torch.no_grad()
def add_tokens(model, tokenizer, tokens: list[str], items: Items | None = None) -> list[int]:
    """Add `tokens` to the tokenizer and rows for them to the embeddings; returns the ids of the new ones.

    New rows are drawn from the normal distribution with the mean and the covariance of the old rows, of the input
    and, where it is untied, the output embedding. With `items`, the row of a token that their SIDs use is instead the
    mean, over the items that carry it, of their titles' mean embedding. A matrix padded beyond the tokenizer's length
    never shrinks.
    """
    n_old = len(tokenizer)
    titles = tokenizer([item or " " for item in items.titles], add_special_tokens=False)["input_ids"] if items else []
    tokenizer.add_tokens(tokens)
    new_ids = list(range(n_old, len(tokenizer)))
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for weight in _embedding_matrices(model):
        old = weight[:n_old].float()
        mean = old.mean(dim=0)
        # (new, old) standard normals times the centred rows: samples with the rows' covariance, never formed
        drawn = torch.randn(len(new_ids), n_old, device=old.device) @ (old - mean) / n_old**0.5
        weight[new_ids] = (mean + drawn).to(weight.dtype)
        if items:
            used, rows = _means_by_token(old, titles, tokenizer(items.sids, add_special_tokens=False)["input_ids"])
            new = used >= n_old
            weight[used[new]] = rows[new].to(weight.dtype)
    return new_ids


def _means_by_token(old: torch.Tensor, titles: list[list[int]], sids: list[list[int]]):
    """(token ids in use, for each the mean of its items' title means): (used,) and (used, hidden)."""
    offsets = torch.tensor([0, *map(len, titles[:-1])]).cumsum(0)
    flat = torch.tensor([token for title in titles for token in title])
    title_mean = torch.nn.functional.embedding_bag(flat, old, offsets, mode="mean")  # (items, hidden)
    carrier = torch.tensor([item for item, sid in enumerate(sids) for _ in sid])
    used, place = torch.tensor([token for sid in sids for token in sid]).unique(return_inverse=True)
    sums = torch.zeros(len(used), old.shape[1]).index_add_(0, place, title_mean[carrier])
    return used, sums / place.bincount().unsqueeze(1)


# ------------------------------------------------------------------------------------------------ what is trained


def _embedding_names(model) -> list[str]:
    """The names, as PEFT takes them, of the modules that `_embedding_matrices` are the weights of."""
    names = {id(module): name for name, module in model.named_modules()}
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [inputs] if inputs.weight is outputs.weight else [inputs, outputs]
    return [names[id(module)].rsplit(".", 1)[-1] for module in modules]


def train_rows_alone(model, new_ids: list[int], flag_value: str):
    """The model with nothing to train but the embedding rows of `new_ids`: optimizer state exists for those alone."""
    if not new_ids:
        raise UserError(
            f"--freeze_LLM True, but {flag_value} already knows every SID token: there is no new row to train; "
            f"give the model that was there before, or leave --freeze_LLM out"
        )
    return get_peft_model(model, TrainableTokensConfig(token_indices=new_ids, target_modules=_embedding_names(model)))


def lora_config(r: int, alpha: float, dropout: float, target_modules: str, **more) -> LoraConfig:
    """LoRA adapters (arXiv 2106.09685) on `all-linear` layers, or on the named modules: `q_proj,v_proj`."""
    if target_modules != "all-linear":
        target_modules = [name.strip() for name in target_modules.split(",")]
    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM", **more
    )


def add_lora(model, new_ids: list[int], r: int, alpha: float, dropout: float, target_modules: str):
    """The model with LoRA adapters and the embedding rows of `new_ids` to train."""
    rows = dict.fromkeys(_embedding_names(model), new_ids) if new_ids else None
    config = lora_config(r, alpha, dropout, target_modules, trainable_token_indices=rows)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora_target_modules {target_modules}: {_first_line(error)}") from None


# ------------------------------------------------------------------------------------------------ saving


def save_trained(trainer, prompt_template: Path, folder: str | Path, space: str = "vocab") -> None:
    """Write a trainer's model as a whole checkpoint, adapters merged; `space` is what its scores are normalised over.

    Every process calls it, for ZeRO-3 gathers the weights from all; the first one writes.
    """
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        if trainer.accelerator.is_main_process:
            model = model.merge_and_unload() if isinstance(model, PeftModel) else model
            model.config.sid_space = space
            save(model, trainer.processing_class, prompt_template, folder)


def save(model, tokenizer, prompt_template: Path, folder: str | Path) -> None:
    """Write a whole checkpoint: into temporary neighbours first, then file by file into `folder`."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.copyfile(prompt_template, temporary / PROMPT_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    for file in temporary.iterdir():
        os.replace(file, folder / file.name)
    temporary.rmdir()


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete `checkpoint-N` of the Trainer in `output_dir`: the state file is what it writes last."""
    complete = [path.parent for path in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(re.sub(r"\D", "", path.name)))) if complete else None


def remove_checkpoints(output_dir: str | Path) -> None:
    """Delete every `checkpoint-N` in `output_dir`."""
    for path in Path(output_dir).glob("checkpoint-*"):
        shutil.rmtree(path)


def device_has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def wants_bf16() -> bool:
    """Whether training runs in bf16: where the device has it, or an accelerate config asks for it."""
    return device_has_bf16() or os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
