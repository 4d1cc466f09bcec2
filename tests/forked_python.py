"""`python` without the seconds of its imports: a process that has imported everything and forks for each start.

    python = ForkedPython()
    python.executable                a stand-in for `python`, in its own folder: put `python.folder` first in PATH
    python.run(arguments, log)       start one directly, and kill it after some time

What is started has the arguments, folder, environment, streams and exit status of the real thing. Only the packages that
it would import are there already, so tests of imports, of launchers and of one start of each stage use the real one.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAVY = ["torch", "polars", "scipy.sparse", "sklearn.cluster", "faiss", "matplotlib.pyplot", "transformers", "peft"]
HEAVY += ["trl.trainer.grpo_trainer", "accelerate", "k_means_constrained", "safetensors.torch", "tokenizers"]
HEAVY += ["sentence_transformers", "deepspeed", "torch._inductor.compile_fx"]  # the last by DeepSpeed as it starts
HEAVY += ["transformers.models.qwen2.modeling_qwen2", "transformers.models.bert.modeling_bert", "datasets"]
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
job = json.dumps({{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}).encode()
socket.send_fds(server, [len(job).to_bytes(4, "big")], [0, 1, 2])
server.sendall(job)
process = int.from_bytes(server.recv(4, socket.MSG_WAITALL), "big")
for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(name, lambda number, frame: os.kill(process, number))
status = int.from_bytes(server.recv(4, socket.MSG_WAITALL), "big", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


class ForkedPython:
    """The process that forks, and its address."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="python"))
        self.executable, self.address = self.folder / "python", str(self.folder / "socket")
        self.executable.write_text(CLIENT.format(python=sys.executable, address=self.address))
        self.executable.chmod(0o755)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.folder], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert b"ready\n" in iter(self.process.stdout.readline, b"")  # after what the packages print

    def run(self, arguments: list, log: Path, kill_after: float | None = None) -> tuple[int, float]:
        """(exit status, seconds) of `python arguments…` on one thread; -9 if it was killed after so many seconds."""
        job = {"arguments": [str(part) for part in arguments], "folder": str(ROOT)}
        job["environment"] = os.environ | {"OMP_NUM_THREADS": "1"}
        content = json.dumps(job).encode()
        with log.open("ab") as file, open(os.devnull, "rb") as nothing, socket.socket(socket.AF_UNIX) as server:
            server.connect(self.address)
            streams = [nothing.fileno(), file.fileno(), file.fileno()]
            socket.send_fds(server, [len(content).to_bytes(4, "big")], streams)
            server.sendall(content)
            process = int.from_bytes(server.recv(4, socket.MSG_WAITALL), "big")
            started = time.monotonic()
            timer = threading.Timer(kill_after or 0, lambda: os.killpg(process, signal.SIGKILL)) if kill_after else None
            if timer:
                timer.start()
            status = int.from_bytes(server.recv(4, socket.MSG_WAITALL), "big", signed=True)
            seconds = time.monotonic() - started
            if timer:
                timer.cancel()
                timer.join()
        return status, seconds

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        shutil.rmtree(self.folder)


# ------------------------------------------------------------------------------------------------ the other end


def serve(folder: Path) -> dict | None:
    """Answer until the tests end. In each forked process it returns the job to run."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(100)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:  # the tests have ended
            return None
        client, _ = listener.accept()
        if os.fork():
            client.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        listener.close()
        try:
            return keep(client)
        except BaseException:
            traceback.print_exc()
            os._exit(1)


def keep(client: socket.socket) -> dict:
    """Fork the run, tell its process id and exit status, kill it if the client goes. Returns the job in the run itself."""
    size, streams, _, _ = socket.recv_fds(client, 4, 3)
    job = json.loads(client.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    process = os.fork()
    if not process:
        os.setpgid(0, 0)
        client.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return job
    with contextlib.suppress(PermissionError, ProcessLookupError):  # in both: the group exists before its id is told
        os.setpgid(process, process)
    for stream in streams:
        os.close(stream)
    client.sendall(process.to_bytes(4, "big"))
    ended = os.pidfd_open(process)
    ready, _, _ = select.select([ended, client], [], [])
    if ended not in ready:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(OSError):
        client.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
    os._exit(0)


def be_python(job: dict, executable: Path) -> None:
    """Run a job as `python` would."""
    arguments, module = job["arguments"], None
    unbuffered = arguments[:1] == ["-u"]  # as torchrun starts its processes
    arguments = arguments[unbuffered:]
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    real, sys.executable = sys.executable, str(executable)
    if arguments[:1] == ["-m"] and len(arguments) > 1:
        module, sys.argv = arguments[1], arguments[1:]
    elif arguments and arguments[0].endswith(".py"):
        sys.argv = arguments
    else:
        os.execv(real, [real, *job["arguments"]])
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    sys.path[:1] = [os.getcwd() if module else str(Path(arguments[0]).resolve().parent)]
    sys.path[1:1] = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.stdout.reconfigure(line_buffering=os.isatty(1), write_through=unbuffered)
    if module:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")


def main() -> None:
    folder = Path(sys.argv[1])
    for name in HEAVY:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that keep a run end by themselves
    job = serve(folder)
    if not job:
        return
    status = 1
    try:
        be_python(job, folder / "python")
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status)  # without the seconds in which the interpreter takes all packages down


if __name__ == "__main__":
    main()
