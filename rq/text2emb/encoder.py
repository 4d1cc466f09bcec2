"""A text encoder, loaded by sentence-transformers: token ids of texts, and embeddings of token ids.

A sentence-transformers folder is loaded as its `modules.json` says: transformer, pooling, dense layers, normalisation,
prompts. Of any other Hugging Face folder the last hidden states are pooled as sentence-transformers does it: the last
token of a causal language model, the mean of the tokens of any other.

Departures from `SentenceTransformer.encode`:

- Texts are also cut at what the position table has room for. RoBERTa's and MPNet's positions start after the padding id.
- Padding is on the right, so that a model that counts positions from the left does not depend on the batch.
- In bf16 and fp16, everything after the transformer is computed in float32.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from minionerec.common.devices import device_has_bf16
from minionerec.common.errors import UserError


def load(folder: Path, device: torch.device, dtype: str) -> SentenceTransformer:
    """The encoder in `folder`, in evaluation mode. Nothing is downloaded, no code of the folder is executed."""
    require_modules(folder)
    try:
        model = SentenceTransformer(
            str(folder), device=str(device), local_files_only=True, model_kwargs={"dtype": getattr(torch, dtype)}
        )
    except Exception as error:  # sentence-transformers, transformers, tokenizers and safetensors raise many kinds
        raise UserError(
            f"{folder}: not an encoder that can be loaded ({first_line(error)}); check --plm_checkpoint"
        ) from None
    for module in list(model)[1:]:
        module.float()
    model[0].register_forward_hook(lambda module, inputs, features: _in_float32(features))
    return model.eval()


def require_modules(folder: Path) -> None:
    """Raise `UserError` where the folder has a `modules.json` that is broken or no list."""
    path = folder / "modules.json"
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); check --plm_checkpoint") from None
    if not isinstance(content, list):
        raise UserError(f"{path}: found a {type(content).__name__}, expected a list; check --plm_checkpoint")


def dtype_of(name: str, device: torch.device) -> str:
    """`name`, or for an empty name float32 on a CPU and on a GPU without bf16, bfloat16 on any other GPU."""
    return name or ("bfloat16" if device.type == "cuda" and device_has_bf16() else "float32")


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _in_float32(features: dict) -> dict:
    is_half = {name: torch.is_tensor(value) and value.is_floating_point() for name, value in features.items()}
    return {name: value.float() if is_half[name] else value for name, value in features.items()}


class Encoder:
    """An encoder with its limits, pooling and prompt."""

    def __init__(
        self, folder: Path, device: torch.device, *, max_length: int, dtype: str, pooling: str, prompt: str, name: str
    ):
        """pooling: instead of the encoder's own; prompt: text before each text; name: of one of the encoder's prompts."""
        self.folder, self.device = folder, device
        self.dtype = dtype_of(dtype, device)
        self.model = load(folder, device, self.dtype)
        self.tokenizer = self.model.tokenizer if isinstance(self.model[0], Transformer) else None
        if self.tokenizer is not None:
            self._prepare_padding()
        if pooling:
            self._set_pooling(pooling)
        self.prompt = prompt or self._prompt_of(name)
        self.max_length = self._set_length(max_length)

    def _prepare_padding(self) -> None:
        tokenizer = self.tokenizer
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise UserError(
                f"{self.folder}: its tokenizer has no token to pad with; set pad_token in tokenizer_config.json"
            )

    def _set_pooling(self, mode: str) -> None:
        pooling = [module for module in self.model if isinstance(module, Pooling)]
        if not pooling:
            raise UserError(f"--pooling {mode}: {self.folder} does not pool tokens ({self.modules}); leave it out")
        pooling[0].pooling_mode = mode
        pooling[0].pooling_output_dimension = pooling[0].embedding_dimension

    def _prompt_of(self, name: str) -> str:
        prompts = self.model.prompts
        name = name or self.model.default_prompt_name or ""
        if name and name not in prompts:
            known = ", ".join(sorted(prompts)) or "none"
            raise UserError(
                f"--prompt_name {name}: {self.folder} has the prompts {known}; give one of them or --prompt"
            )
        return prompts.get(name, "")

    def _set_length(self, asked: int) -> int:
        """Most tokens of a text: the smallest of `asked`, the length that the encoder declares, and its positions."""
        limits = [asked, self.model.max_seq_length, position_limit(self.model)]
        limit = min(n for n in limits if isinstance(n, int) and n > 0)
        if self.tokenizer is not None:
            special = self.tokenizer.num_special_tokens_to_add()
            if limit <= special:
                raise UserError(
                    f"--max_sent_len {asked}: expected at least {special + 1}, because each text of {self.folder} has "
                    f"{special} special tokens"
                )
            self.model.max_seq_length = limit
        return limit

    @property
    def modules(self) -> str:
        """The modules by name, with the pooling mode."""
        mode = {id(module): f" ({module.pooling_mode})" for module in self.model if isinstance(module, Pooling)}
        return ", ".join(type(module).__name__ + mode.get(id(module), "") for module in self.model)

    # -------------------------------------------------------------------------------------------- texts to embeddings

    def tokenize(self, texts: Sequence[str]) -> tuple[list, dict]:
        """(features of each text, what all texts share): token ids and masks as lists without padding.

        An encoder without a transformer (static embeddings, bags of words) does its own padding: its features of a text
        are the text.
        """
        if self.tokenizer is None:
            return list(texts), {}
        plain = {"text": {"padding": False}, "common": {"return_tensors": None}}
        features = self.model.preprocess(list(texts), prompt=self.prompt or None, processing_kwargs=plain)
        shared = {name: value for name, value in features.items() if not isinstance(value, list)}
        lists = {name: value for name, value in features.items() if isinstance(value, list)}
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)], shared

    @staticmethod
    def length(row) -> int:
        """Tokens of a text's features; characters where the encoder has no transformer."""
        return len(row["input_ids"] if isinstance(row, dict) else row)

    def embed(self, rows: Sequence, shared: dict) -> torch.Tensor:
        """Embeddings (rows, dim) in float32, on the device. A batch that does not fit the GPU is halved."""
        try:
            return self._embed(rows, shared)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise UserError(
                    f"{self.folder}: one text of {self.length(rows[0])} tokens does not fit the GPU; lower --max_sent_len"
                ) from None
        torch.cuda.empty_cache()
        half = len(rows) // 2
        return torch.cat([self.embed(rows[:half], shared), self.embed(rows[half:], shared)])

    def _embed(self, rows: Sequence, shared: dict) -> torch.Tensor:
        if self.tokenizer is None:
            features = dict(self.model.preprocess(list(rows), prompt=self.prompt or None))
        else:
            features = {**self.tokenizer.pad(list(rows), return_tensors="pt"), **shared}
        features = {
            name: value.to(self.device) if torch.is_tensor(value) else value for name, value in features.items()
        }
        with torch.inference_mode():
            embeddings = self.model(features)["sentence_embedding"]  # (rows, dim)
        return embeddings[:, : self.model.truncate_dim].float()

    def dim(self) -> int:
        """The width of an embedding, by embedding one text; raises `UserError` where the encoder cannot do that."""
        try:
            rows, shared = self.tokenize(["item"])
            return self.embed(rows, shared).shape[1]
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.folder}: cannot embed a text ({first_line(error)}); check --plm_checkpoint, --pooling and "
                f"--max_sent_len"
            ) from None


def position_limit(model: torch.nn.Module) -> int | None:
    """Most tokens that the position tables have room for; None without such a table.

    A table with a padding row counts positions from the row after it: RoBERTa's 514 rows are 512 positions.
    """
    tables = [getattr(module, "position_embeddings", None) for module in model.modules()]
    tables = [table for table in tables if isinstance(table, torch.nn.Embedding)]
    first = [0 if table.padding_idx is None else table.padding_idx + 1 for table in tables]
    return min((table.num_embeddings - start for table, start in zip(tables, first, strict=True)), default=None)
