"""Training a part of a model, with PEFT: LoRA adapters, or only the embedding rows of the new tokens."""

from collections.abc import Iterator

import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

from minionerec.common.errors import UserError
from minionerec.decoding.lm_head import unwrap_adapter
from minionerec.language_model.checkpoints import first_line
from minionerec.language_model.new_tokens import embedding_names


def train_new_rows(model, new_ids: list[int], base_model: str):
    """The model with only the embedding rows of `new_ids` to train; optimizer state exists only for those rows.

    Raises `UserError` where there are none; `base_model` is the name to report.
    """
    if not new_ids:
        raise UserError(
            f"--freeze_LLM True, but {base_model} already has every SID token, so there is no new row to train; give the "
            "base model without SID tokens, or leave --freeze_LLM out"
        )
    names = _short_names(model)
    return _with_head_bias(get_peft_model(model, TrainableTokensConfig(token_indices=new_ids, target_modules=names)))


def lora_config(r: int, alpha: float, dropout: float, target_modules: str, **more) -> LoraConfig:
    """LoRA adapters (arXiv 2106.09685) on `all-linear` layers, or on the named modules: `q_proj,v_proj`."""
    if target_modules != "all-linear":
        target_modules = [name.strip() for name in target_modules.split(",")]
    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM", **more
    )


def add_lora(model, new_ids: list[int], r: int, alpha: float, dropout: float, target_modules: str):
    """The model with LoRA adapters and the embedding rows of `new_ids` to train."""
    refuse_embeddings(model, target_modules)
    rows = dict.fromkeys(_short_names(model), new_ids) if new_ids else None
    config = lora_config(r, alpha, dropout, target_modules, trainable_token_indices=rows)
    try:
        return _with_head_bias(get_peft_model(model, config))
    except ValueError as error:
        raise UserError(f"--lora_target_modules {target_modules}: {first_line(error)}") from None


def refuse_embeddings(model, target_modules: str) -> None:
    """Raise `UserError` where --lora_target_modules names the embedding or the LM head."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    refused = [name for name, module in model.named_modules() if any(module is each for each in modules)]
    for target in target_modules.split(","):
        for name in refused:
            if f".{name}".endswith(f".{target.strip()}"):
                raise UserError(
                    f"--lora_target_modules {target_modules}: {name} is an embedding or the LM head; adapters go on the "
                    "layers between them, and new tokens' embedding rows are trained without being named; leave it out"
                )


def _short_names(model) -> list[str]:
    """The last part of the names of the embedding modules, as PEFT takes them."""
    return [name.rpartition(".")[-1] for name in embedding_names(model)]


def _with_head_bias(model):
    """The PEFT model with the bias of its LM head in force: PEFT's layer for trainable tokens leaves it out.

    The layer computes `x W^T`; a merged layer, or one whose adapter is disabled, computes `x W^T + b`.
    """

    def add_bias(layer, arguments, output: torch.Tensor) -> torch.Tensor:
        applied = layer.merged or layer.disable_adapters or not layer.active_adapters
        return output if applied else output + layer.base_layer.bias

    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer) and getattr(layer.base_layer, "bias", None) is not None:
            layer.register_forward_hook(add_bias)
    return model


@torch.no_grad()
def merged_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) of a causal LM under the names of a model without adapters, LoRA adapters merged.

    An LM head that is tied to the embeddings comes too, under its own name: vLLM keeps a packed copy of it on a CPU. The
    model is not changed: merging into it and taking that back would round its weights each time.
    """
    base = unwrap_adapter(model)
    adapted = {f"{name}.": layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    for prefix, layer in adapted.items():
        for name, parameter in layer.get_base_layer().named_parameters():
            if name == "weight":
                parameter = parameter + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            yield prefix + name, parameter.data
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if not name.startswith(tuple(adapted)):
            yield name, parameter.data
