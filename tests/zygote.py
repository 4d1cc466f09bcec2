"""Start stages without the seconds of their imports: a process that has imported everything and forks for each run.

    python tests/zygote.py        reads a line {"stage": module, "options": {…}, "log": file} per run (or "arguments": […], as
                                  on the command line), answers with the process id at once, and with the exit status
                                  when the run has ended

`Zygote` is its other end, for tests that start and kill the same stage many times.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAVY = ["torch", "polars", "scipy.sparse", "sklearn.cluster", "faiss", "matplotlib.pyplot", "transformers", "peft"]
HEAVY += ["trl", "accelerate", "k_means_constrained", "safetensors.torch", "tokenizers", "sentence_transformers"]
HEAVY += ["transformers.models.qwen2.modeling_qwen2", "transformers.models.bert.modeling_bert"]


class Zygote:
    """Runs stages in forked processes."""

    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, stage: str, options: dict | list, log: Path, kill_after: float | None = None) -> tuple[int, float]:
        """(exit status, seconds) of `stage.main(stage.Options(**options))`, or of the stage with a list of arguments.

        The status is -9 if it was killed after so many seconds.
        """
        given = "arguments" if isinstance(options, list) else "options"
        self.process.stdin.write(json.dumps({"stage": stage, given: options, "log": str(log)}) + "\n")
        self.process.stdin.flush()
        pid, started = int(self.process.stdout.readline()), time.monotonic()
        timer = threading.Timer(kill_after or 0, lambda: os.killpg(pid, signal.SIGKILL)) if kill_after else None
        if timer:
            timer.start()
        status = int(self.process.stdout.readline())
        seconds = time.monotonic() - started
        if timer:
            timer.cancel()
            timer.join()
        return status, seconds

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def be_stage(job: dict) -> int:
    """The run itself, in the forked process."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    module = importlib.import_module(job["stage"])
    sys.argv = [job["stage"], *job.get("arguments", ["--debug"])]
    from minionerec.common import options

    if "options" in job:
        options.parse = lambda options_class, arguments: options_class(**job["options"])
    try:
        options.run(module.main, module.Options)
    except SystemExit as ended:
        return ended.code or 0
    return 0


def main() -> None:
    for name in HEAVY:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os.setpgid(0, 0)
            code = 1
            try:
                code = be_stage(json.loads(line))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        os.setpgid(pid, pid)  # in both: whoever is first, the group exists before its id is told
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
