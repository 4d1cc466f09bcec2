"""The engine that generates the groups of RL, where it is not the tree search over the trained model itself."""

import torch

from minionerec.decoding.engine import vllm_engine


def start_rollout(options, trainer) -> None:
    """Start vLLM in this process if it generates the groups, as the options of rl.py say.

    The trainer hands it the weights before the first group is generated.
    """
    if options.rollout != "vllm":
        return
    trainer.rollout = vllm_engine(
        options.model_path,
        trainer.trie,
        trainer.processing_class.eos_token_id,
        options.space,
        dtype=torch.bfloat16 if trainer.args.bf16 else torch.float32,
        load=False,
        memory=options.vllm_gpu_memory_utilization,
        sleep=options.vllm_enable_sleep_mode,
    )
