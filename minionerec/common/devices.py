"""The device and the precision of a run."""

import os

import torch

from minionerec.common.console import say
from minionerec.common.errors import UserError


def pick_device(name: str) -> torch.device:
    """`name` as a device; empty means cuda where there is a GPU, else cpu. Raises `UserError` if it is not there."""
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not on this machine ({reason}); leave it out or use cpu") from None
    return device


def device_has_bf16() -> bool:
    """Whether there is a GPU that computes in bf16; one that only emulates it (T4, V100) does not count."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def wants_bf16() -> bool:
    """Whether training runs in bf16: the device computes in it, or an accelerate config asks for it."""
    return device_has_bf16() or os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"


def use_one_gpu(args):
    """`args` (`TrainingArguments`) with one GPU per process. On several, transformers would use DataParallel, silently."""
    if args.n_gpu > 1:
        say(f"one process uses one of the {args.n_gpu} GPUs; the launcher (sft.sh, rl.sh) starts one process per GPU")
        args._n_gpu = 1
    return args
