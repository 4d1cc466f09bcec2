"""What a training run costs: printed before it starts, and refused where it cannot fit the device."""

import torch
from transformers import TrainingArguments

from minionerec.common.console import say
from minionerec.common.errors import UserError
from minionerec.language_model.batches import EpochOrder, Lines

GIB = 2**30


def memory_estimate(model, lines: Lines, micro_batch_size: int, bf16: bool, checkpointing: bool) -> dict[str, int]:
    """Bytes on one device without sharding: `state`, `activations`, `logits`. An upper estimate, for the longest rows.

    state: 4 bytes per parameter, and 12 more per trained one (gradient, two moments of AdamW).
    activations: per token, a decoder layer keeps about 8 vectors of the hidden size (norms, q, k, v, attention, two
    residuals) and 4 of the intermediate size (gate, up, activation, product) for its backward pass. With checkpointing
    it is one hidden vector per layer, and one full layer.
    logits: three float32 arrays (answer tokens, vocabulary): the logits, their float copy and its gradient.

    `benchmarks.sft_step` prints estimate and peak, `minionerec.language_model.estimate` the estimate for any model.
    """
    longest = sorted(lines.lengths.tolist(), reverse=True)[:micro_batch_size]
    if lines.packed:
        answers = int(max(lines.rows.answer[rows].sum() for rows in lines.rows_of)) * micro_batch_size
    else:
        answers = int(lines.rows.answer.max()) * micro_batch_size
    return memory_of_step(model, max(longest) * len(longest), answers, bf16, checkpointing)


def memory_of_step(model, tokens: int, answers: int, bf16: bool, checkpointing: bool) -> dict[str, int]:
    """`memory_estimate` for a forward pass of so many tokens, padding included, of which `answers` have logits."""
    config = model.config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    layer = tokens * (8 * hidden + 4 * inner)
    layers = config.num_hidden_layers
    kept = layers * tokens * hidden + layer if checkpointing else layers * layer
    logits = 3 * 4 * answers * model.get_output_embeddings().weight.shape[0]
    return {"state": 4 * parameters + 12 * trained, "activations": kept * (2 if bf16 else 4), "logits": logits}


def check_and_print(model, new_ids: list[int], lines: Lines, order: EpochOrder, args: TrainingArguments) -> None:
    """Print parameters, rows, tokens, steps, padding and memory.

    Raises `UserError` where a row is longer than the model's positions, or weights and optimizer state exceed the
    device's memory.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    longest = int(lines.rows.lengths.max())
    if limit and longest > limit:
        raise UserError(
            f"the longest row has {longest} tokens, the model {limit} positions; lower --cutoff_len to {limit}"
        )
    bytes_of = memory_estimate(model, lines, args.per_device_train_batch_size, args.bf16, args.gradient_checkpointing)
    if torch.cuda.is_available():
        room = torch.cuda.get_device_properties(args.device).total_memory
        if not args.deepspeed_plugin and bytes_of["state"] > room:
            raise UserError(
                f"weights, gradients and optimizer state need {bytes_of['state'] / GIB:.0f} GiB, the device has "
                f"{room / GIB:.0f}; use --use_lora True, --freeze_LLM True, or ZeRO-3 (ACCELERATE_CONFIG=config/zero3.yaml)"
            )
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = ", ".join(f"{name} {size / GIB:.2f}" for name, size in bytes_of.items())
    say(f"{parameters:,} parameters, {trained:,} trained, {len(new_ids)} new tokens")
    say(
        f"{len(lines.rows.answer):,} rows in {len(lines):,} lines, {lines.lengths.sum():,} tokens, "
        f"{len(order) // order.batch_size:,} steps an epoch, "
        f"{order.padding_share(args.per_device_train_batch_size):.1%} padding"
    )
    say(f"memory of one device, estimated, GiB: {memory}")
