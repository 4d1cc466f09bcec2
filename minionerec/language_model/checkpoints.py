"""TODO."""

import os
import re
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl.models import unwrap_model_for_generation

from minionerec.common.errors import UserError

PROMPT_FILE = "prompt.yaml"


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
