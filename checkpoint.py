"""A checkpoint folder: model, tokenizer and the wording of its prompts; loading, new tokens, saving, resuming."""

import os
import re
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli import UserError
from data import PROMPT_FILE


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


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


@torch.no_grad()
def add_tokens(model, tokenizer, tokens: list[str]) -> list[int]:
    """Add `tokens` to the tokenizer and rows for them to the embeddings; returns the ids of the new ones.

    New rows are drawn from the normal distribution with the mean and the covariance of the old rows, of the input
    and, where it is untied, the output embedding. A matrix padded beyond the tokenizer's length never shrinks.
    """
    n_old = len(tokenizer)
    tokenizer.add_tokens(tokens)
    new_ids = list(range(n_old, len(tokenizer)))
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    matrices = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    for weight in matrices.values():
        old = weight[:n_old].float()
        mean = old.mean(dim=0)
        # (new, old) standard normals times the centred rows: samples with the rows' covariance, never formed
        drawn = torch.randn(len(new_ids), n_old, device=old.device) @ (old - mean) / n_old**0.5
        weight[new_ids] = (mean + drawn).to(weight.dtype)
    return new_ids


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
