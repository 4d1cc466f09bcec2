"""TODO."""

import atexit
import os
import sys


def leave_group(code: int) -> None:
    """End a process that is one of several, without taking Python down: a gloo thread that frees a tensor meanwhile
    aborts it, and DistributedDataParallel keeps gloo's threads alive even when its group is destroyed."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        atexit._run_exitfuncs()  # wandb and others finish there
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
