"""Memory of one GPU that trains a model, before anything is downloaded or trained: only the model's config is read.

    python -m minionerec.language_model.estimate --base_model Qwen/Qwen2.5-1.5B --micro_batch_size 16 --processes 8

The parts are those that sft.py prints at its start (minionerec/language_model/memory.py). State is 16 bytes a parameter
without sharding. In bf16 with DeepSpeed, ZeRO-2 keeps 2 + 14/N bytes a parameter on each of N processes and ZeRO-3 16/N
(ZeRO, arXiv 1910.02054, section 3). Buffers of communication and fragments are not counted: leave a tenth of the GPU free.
"""

from dataclasses import dataclass

from minionerec.common.options import StageOptions, option, run


@dataclass
class Options(StageOptions):
    base_model: str = option("", "folder, config.json or hub name of a causal LM")
    processes: int = option(1, "processes, one per GPU")
    micro_batch_size: int = option(16, "rows per forward pass of one process")
    row_tokens: int = option(128, "tokens of the longest row")
    answer_tokens: int = option(32, "tokens of the longest answer; a SID has one per level, a title more")
    new_tokens: int = option(768, "SID tokens that are added")
    bf16: bool = option(True, "activations in bf16")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "processes", "micro_batch_size", "row_tokens", "answer_tokens")
        self.at_least(0, "new_tokens")


def state_bytes(parameters: int, processes: int) -> dict[str, float]:
    """Bytes of weights, gradients and AdamW's moments on each process, by kind of parallelism."""
    shares = {"DDP": 16, "ZeRO-2": 2 + 14 / processes, "ZeRO-3": 16 / processes}
    return {name: share * parameters for name, share in shares.items()}


def empty_model(name: str, new_tokens: int):
    """The model without weights, its vocabulary enlarged by `new_tokens`. Raises `UserError` for another kind of config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from minionerec.language_model.checkpoints import reading

    with reading(name, "config of a causal language model", "base_model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        config.get_text_config().vocab_size += new_tokens
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def main(options: Options) -> None:
    options.require("base_model")
    from minionerec.language_model.memory import GIB, memory_of_step

    o, model = options, empty_model(options.base_model, options.new_tokens)
    tokens, answers = o.micro_batch_size * o.row_tokens, o.micro_batch_size * o.answer_tokens
    step = memory_of_step(model, tokens, answers, o.bf16, o.gradient_checkpointing)
    parameters, shared = model.num_parameters(), step["activations"] + step["logits"]
    print(f"{parameters:,} parameters, {o.processes} processes, {tokens:,} tokens per forward; GiB per GPU")
    print(f"{'':8}{'state':>8}{'activations':>13}{'logits':>8}{'sum':>8}")
    for name, state in state_bytes(parameters, o.processes).items():
        cells = f"{state / GIB:8.1f}{step['activations'] / GIB:13.1f}{step['logits'] / GIB:8.1f}{(state + shared) / GIB:8.1f}"
        print(f"{name:8}{cells}")


if __name__ == "__main__":
    run(main, Options)
