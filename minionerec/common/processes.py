"""One process among several: who reports an error, what only the main process does, how to end."""

import atexit
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file
from minionerec.common.text import printable

PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent ends
ERRORS = "MINIONEREC_ERRORS"  # folder in which the processes of one launch leave their error lines


def report_error(message: str) -> None:
    """Print `error: …` on stderr as one line; under a launcher, leave it for the launcher to print once."""
    close_progress_bars()
    line = f"error: {one_line(message)}"
    if os.environ.get(ERRORS):
        path = Path(os.environ[ERRORS], os.environ.get("RANK", "0"))
        with atomic_file(path) as f:  # the launcher may end this process now
            f.write(line)
    else:
        print(line, file=sys.stderr)


def close_progress_bars() -> None:
    """End the lines of unfinished tqdm bars, so that what is printed next starts a line."""
    tqdm = sys.modules.get("tqdm.std")
    for bar in list(getattr(tqdm and tqdm.tqdm, "_instances", ())):
        bar.close()


def one_line(message: str) -> str:
    """`message` as one line: white space collapsed, control characters escaped, the middle of a very long one cut."""
    line = printable(" ".join(message.split()))
    return line if len(line) <= 1000 else f"{line[:600]} … {line[-300:]}"


def on_main_process(function: Callable):
    """The result of `function()`, called in the first process only and sent to all; an error of the user reaches all too.

    Needs an initialised process group where there are several processes (`accelerate.PartialState`).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    result = [None]
    if int(os.environ["RANK"]) == 0:
        try:
            result = [function()]
        except (UserError, OSError) as error:
            result = [error]
    [result] = broadcast_object_list(result)
    if isinstance(result, Exception):
        raise result
    return result


def end_with_launcher() -> None:
    """Under torchrun or accelerate, on Linux: end at once when the launcher ends.

    They start processes in sessions of their own. Where the launcher is killed, those would go on writing into the
    folder that the next start writes into.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_group(code: int) -> None:
    """End a process that belongs to a process group, with `os._exit`.

    Interpreter shutdown can abort inside gloo's threads, which DistributedDataParallel keeps alive even after its
    group is destroyed. Exit handlers run and output is flushed first. A single process returns from here.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        atexit._run_exitfuncs()  # wandb and others finish there; vLLM takes down its groups, and fails where they are gone
        if distributed.is_initialized():
            distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
