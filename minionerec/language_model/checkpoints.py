"""Models and tokenizers on disk: checked loading and whole checkpoints.

A checkpoint of SFT or RL is a Hugging Face folder with two more files, which later stages read:

    prompt.yaml       the wording of the prompts
    minionerec.json   `Settings`: category, length of the history, normalisation space

Loading raises `UserError` for a folder that is missing, damaged or foreign, and puts tokenizer and model into a neutral
state: no truncation, padding, BPE dropout or sampling values of their last use.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from minionerec.catalog.sids import SID_TOKEN
from minionerec.common.console import note
from minionerec.common.errors import UserError
from minionerec.common.files import read_json, write_json
from minionerec.language_model.file_names import PROMPT_FILE, SETTINGS_FILE

# ------------------------------------------------------------------------------------------------ settings


class Settings(NamedTuple):
    """What a model was trained with. A stage that prompts or scores the model otherwise gets worse results."""

    category: str = ""  # --category
    max_history: int = 10  # items of history in a prompt
    space: str = "vocab"  # what log-probabilities are normalised over


def save_settings(folder: str | Path, prompt_template: str | Path, settings: Settings) -> None:
    """Write the prompt template and `settings` into a checkpoint's folder."""
    shutil.copyfile(prompt_template, Path(folder) / PROMPT_FILE)
    write_json(Path(folder) / SETTINGS_FILE, settings._asdict())


def load_settings(folder: str | Path) -> Settings | None:
    """The settings that a checkpoint stores; None where it stores none, as one that was trained elsewhere."""
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        return None
    content = read_json(path, "model folder")
    kinds = {name: type(value) for name, value in Settings()._asdict().items()}
    wrong = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise UserError(f"{path}: found {wrong[0]} {content.get(wrong[0])!r}; copy the checkpoint again")
    return Settings(**{name: content[name] for name in kinds})


def resolve_settings(folder: str | Path, **given) -> Settings:
    """Settings to use with a checkpoint: what the command line gives, else what the checkpoint stores, else defaults.

    given: values of `Settings`; an empty string, 0 or None was not given. Prints one line for each value that
    contradicts the checkpoint's.
    """
    stored = load_settings(folder)
    given = {name: value for name, value in given.items() if value}
    for name, value in given.items():
        if stored and getattr(stored, name) != value:
            note(f"--{name} {value} is used, but {folder} was trained with {getattr(stored, name)!r}")
    return (stored or Settings())._replace(**given)


# ------------------------------------------------------------------------------------------------ loading


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters; its type where there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


@contextmanager
def reading(folder: str | Path, what: str, flag: str) -> Iterator[None]:
    """Turn any error of a library that reads `folder` into a `UserError`."""
    try:
        yield
    except Exception as error:  # they raise nearly every type for files that are cut off, foreign or missing
        raise UserError(f"{folder}: found no readable {what} ({first_line(error)}); check --{flag}") from error


def load_tokenizer(folder: str | Path, flag: str):
    """The tokenizer of a model folder or hub name; one without a pad token pads with its end-of-sequence token."""
    with reading(folder, "tokenizer", flag):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(f"{folder}: found a {type(tokenizer).__name__}, expected a fast tokenizer (tokenizer.json)")
    if not set(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)) - set(tokenizer.all_special_tokens):
        raise UserError(f"{folder}: found a tokenizer without any token (no tokenizer.json?); copy the folder again")
    if tokenizer.eos_token is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    reset(tokenizer)
    return tokenizer


def reset(tokenizer) -> None:
    """Clear what a tokenizer.json can carry from its last use, so that a text always gets the same ids.

    That is truncation, padding and BPE dropout. SID tokens become ordinary added tokens: one that is `special` decodes
    to nothing, and one that is `normalized` is not found by a normalizer that prepends a space.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
    plain = dict.fromkeys(("special", "normalized", "lstrip", "rstrip", "single_word"), False)
    tokens = [token for token in backend.get_added_tokens_decoder().values() if SID_TOKEN.fullmatch(token.content)]
    if any(getattr(token, name) for token in tokens for name in plain):
        state = json.loads(backend.to_str())
        for token in state["added_tokens"]:
            token |= plain if SID_TOKEN.fullmatch(token["content"]) else {}
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    special = tokenizer.extra_special_tokens
    if any(SID_TOKEN.fullmatch(token) for token in special):
        tokenizer.extra_special_tokens = [token for token in special if not SID_TOKEN.fullmatch(token)]


def load_model(folder: str | Path, flag: str, dtype: torch.dtype = torch.float32):
    """The causal LM of a folder or hub name, on the CPU. Raises `UserError` for missing or non-finite weights."""
    with reading(folder, "causal language model", flag):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} weights of the model are missing, such as {missing[0]}; "
            f"copy the folder again or check --{flag}"
        )
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{folder}: the weight {name} has NaN or infinite values; use another checkpoint")
    return _neutral(model)


def new_model(folder: str | Path, flag: str, dtype: torch.dtype = torch.float32):
    """A causal LM with random weights from the config of a folder or hub name."""
    with reading(folder, "config of a causal language model", flag):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return _neutral(model)


def _neutral(model):
    """The model with a generation config of token ids only: sampling values without `do_sample` cannot be saved."""
    old = model.generation_config
    ids = {name: getattr(old, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    return model


# ------------------------------------------------------------------------------------------------ writing


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Turn a failed write of safetensors or `torch.save` into a `UserError`."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("inline_container|PytorchStreamWriter", str(error)):
            raise
        free = shutil.disk_usage(folder if Path(folder).exists() else ".").free / 2**30
        reason = f"{first_line(error)}; {free:.2f} GiB are free"
        raise UserError(f"{folder}: could not be written ({reason}); free some disk space and re-run") from error


def save_trained(trainer, prompt_template: str | Path, folder: str | Path, settings: Settings) -> None:
    """Write a trainer's model as a whole checkpoint, adapters merged.

    Every process calls it, because ZeRO-3 gathers the weights from all of them; the first one writes.
    """
    from peft import PeftModel
    from trl.models import unwrap_model_for_generation

    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        if trainer.accelerator.is_main_process:
            model = model.merge_and_unload() if isinstance(model, PeftModel) else model
            save(model, trainer.processing_class, prompt_template, folder, settings)


def save(model, tokenizer, prompt_template: str | Path, folder: str | Path, settings: Settings) -> None:
    """Write a whole checkpoint into `folder`; other files there stay."""
    with _staged(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        save_settings(temporary, prompt_template, settings)


def save_base(model, tokenizer, folder: str | Path) -> None:
    """Write a base model and its tokenizer into `folder`; other files there stay."""
    with _staged(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


@contextmanager
def _staged(folder: str | Path) -> Iterator[Path]:
    """A temporary folder inside `folder`, whose files replace those of `folder` one by one when all are written."""
    folder = Path(folder)
    temporary = folder / ".saving"
    shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
    temporary.mkdir(parents=True)
    try:
        with writing(folder):
            yield temporary
        for file in sorted(path for path in temporary.rglob("*") if path.is_file()):
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
