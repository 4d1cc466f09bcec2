"""Start a script in several processes with torchrun or accelerate, and print a user's error once.

    python -m minionerec.common.launch torchrun --standalone --nproc_per_node 2 sft.py --base_model …
    python -m minionerec.common.launch accelerate --config_file config/zero2_opt.yaml rl.py --model_path …

The arguments after the first are those of `torchrun` or `accelerate launch`. Both print their traceback when
a process ends with an error code. Here the processes leave their error lines in a folder, each different line is
printed once, and the exit code is 2. Any other failure of a process is shown as torchrun shows it.
"""

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from minionerec.common.console import note
from minionerec.common.errors import UserError
from minionerec.common.processes import ERRORS, report_error


def start(tool: str, arguments: list[str]) -> None:
    sys.argv = [tool, *arguments]
    if tool == "torchrun":
        from torch.distributed.run import main
    else:
        from accelerate.commands.launch import main

        check_config(arguments[arguments.index("--config_file") + 1])
        note_locks()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    main()


def check_config(path: str) -> None:
    """Raise `UserError` unless accelerate can read this file."""
    from accelerate.commands.config.config_args import load_config_from_file
    from yaml import YAMLError

    remedy = "check ACCELERATE_CONFIG, which names a file like those of config/"
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; {remedy}")
    try:
        load_config_from_file(path)
    except (OSError, ValueError, TypeError, AttributeError, YAMLError) as error:  # also for a file that is no mapping
        raise UserError(f"{path}: not a configuration of accelerate ({error}); {remedy}") from None


def note_locks() -> None:
    """Name the locks under which DeepSpeed's operators are compiled: one whose process was killed stops every later run."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    for lock in sorted(Path(root).rglob("lock")):
        note(
            f"{lock}: a process compiles here, or was killed while it did; if training does not start, remove this file"
        )


def main() -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    tool, arguments = sys.argv[1], sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder:
        os.environ[ERRORS] = folder
        try:
            start(tool, arguments)
            return 0
        except UserError as error:
            del os.environ[ERRORS]
            report_error(str(error))
            return 2
        except SignalException as stopped:
            return 128 + stopped.sigval
        except (ChildFailedError, subprocess.CalledProcessError) as failure:
            whole = sorted(Path(folder).glob("[0-9]*"))  # without the file of a process that was ended while it wrote
            lines = dict.fromkeys(path.read_text(encoding="utf-8") for path in whole)
            if not lines:
                print(failure, file=sys.stderr)
                return 1
            print("\n".join(lines), file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
