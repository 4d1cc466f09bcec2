"""TODO."""

from peft import LoraConfig, TrainableTokensConfig, get_peft_model

from minionerec.common.errors import UserError
from minionerec.language_model.checkpoints import _first_line
from minionerec.language_model.new_tokens import _embedding_names


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
