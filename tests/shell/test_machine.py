"""shell/machine.sh: how many GPUs, processes and threads there are, and how threads wait.

Invariants: only devices that CUDA shows are counted, never error texts or MIG instances; a wrong number of processes is
one line with exit code 2; threads sleep while they wait only on a busy CPU, and what the user has set is kept.
"""

import os
import subprocess

import pytest
from helpers import ROOT


def bash(commands: str, **variables) -> subprocess.CompletedProcess:
    """Run `commands` after sourcing shell/machine.sh; a variable that is None is unset."""
    environment = os.environ | {name: str(value) for name, value in variables.items() if value is not None}
    for name in (
        "CUDA_VISIBLE_DEVICES",
        "NPROC",
        "NNODES",
        "NODE_RANK",
        "MASTER_PORT",
        "OMP_WAIT_POLICY",
        "GOMP_SPINCOUNT",
    ):
        if variables.get(name) is None:
            environment.pop(name, None)
    die = 'die() { echo "error: $*" >&2; exit 2; }'
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail\nsource {ROOT}/shell/machine.sh\n{die}\n{commands}"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture
def nvidia_smi(tmp_path):
    """Put an `nvidia-smi` with a given output in front of PATH; returns that PATH."""

    def write(output: str, code: int = 0) -> str:
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\ncat <<'TEXT'\n{output}\nTEXT\nexit {code}\n")
        script.chmod(0o755)
        return f"{tmp_path}:{os.environ['PATH']}"

    return write


TWO = "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-a)\nGPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-b)"
MIG = "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-a)\n  MIG 3g.20gb Device 0: (UUID: MIG-a)\n  MIG 3g.20gb Device 1: (UUID: MIG-b)"


@pytest.mark.parametrize(
    "output, code, count",
    [
        (TWO, 0, 2),
        (MIG, 0, 1),
        ("No devices were found", 0, 0),
        (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\nMake sure that it runs.",
            9,
            0,
        ),
        ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 570.1", 18, 0),
        ("", 0, 0),
    ],
)
def test_gpus_of_nvidia_smi(nvidia_smi, output, code, count):
    done = bash("count_gpus", PATH=nvidia_smi(output, code))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{count}\n", "")


@pytest.mark.parametrize(
    "visible, count",
    [
        ("", 0), ("-1", 0), ("0", 1), ("0,1", 2), (" 0, 3 ", 2), ("0,-1,1", 1), ("NoDevFiles", 0), ("none", 0),
        ("GPU-8932f937-d72c,GPU-1", 2), ("MIG-5c6c0e5f-9b6c", 1), ("10,11,12", 3),
    ],
)  # fmt: skip
def test_visible_devices_as_cuda_reads_them(nvidia_smi, visible, count):
    assert bash("count_gpus", PATH=nvidia_smi(TWO), CUDA_VISIBLE_DEVICES=visible).stdout == f"{count}\n"


def test_no_nvidia_smi(tmp_path):
    for tool in ("grep", "cat"):
        (tmp_path / tool).symlink_to(subprocess.check_output(["which", tool], text=True).strip())
    assert bash(f"PATH={tmp_path}; count_gpus").stdout == "0\n"


def test_processes_and_threads(nvidia_smi):
    show = 'find_processes; echo "$GPUS $NPROC $NNODES $THREADS $MASTER_PORT"'
    cores = "count_cores() { echo 7; };"
    assert bash(cores + show, PATH=nvidia_smi(TWO)).stdout == "2 2 1 4 0\n"
    assert bash(cores + show, PATH=nvidia_smi("none")).stdout == "0 1 1 7 0\n"
    assert bash(cores + show, PATH=nvidia_smi(TWO), NPROC=8, NNODES=2, NODE_RANK=1).stdout == "2 8 2 1 29500\n"


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"NPROC": "0"}, "NPROC is '0', expected a number of processes, at least 1"),
        ({"NPROC": "-1"}, "NPROC is '-1'"),
        ({"NPROC": "two"}, "NPROC is 'two'"),
        ({"NPROC": "1.5"}, "NPROC is '1.5'"),
        ({"NNODES": "0"}, "NNODES is '0', expected a number of nodes"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK is '2', expected a number from 0 to NNODES - 1 = 1"),
        ({"NODE_RANK": "x"}, "NODE_RANK is 'x'"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc', expected a port from 0 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({"MASTER_PORT": "9" * 30}, "MASTER_PORT is '999"),
        ({"NNODES": "2", "MASTER_PORT": "0"}, "MASTER_PORT is '0', expected a port from 1 to 65535"),
    ],
)
def test_wrong_numbers_are_one_line(variables, message):
    done = bash("find_processes; echo no", **variables)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_threads_of_openmp_are_not_cores():
    """GNU nproc prints OMP_NUM_THREADS where it is set."""
    assert bash("count_cores", OMP_NUM_THREADS=1).stdout == f"{len(os.sched_getaffinity(0))}\n"


def test_cores_without_nproc(tmp_path):
    """macOS has no nproc."""
    (tmp_path / "getconf").write_text('#!/bin/sh\n[ "$1" = _NPROCESSORS_ONLN ] && echo 5\n')
    (tmp_path / "getconf").chmod(0o755)
    assert bash(f"PATH={tmp_path}:/bin.none; count_cores").stdout in ("5\n",)
    assert bash("PATH=/none; count_cores").stdout == "1\n"


@pytest.mark.parametrize(
    "given, spins",
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "none")],
)
def test_threads_spin_for_a_short_time_unless_the_user_says_how_they_wait(given, spins):
    done = bash("shorten_spinning; bash -c 'echo ${GOMP_SPINCOUNT:-none}'", **given)
    assert (done.stdout, done.stderr) == (f"{spins}\n", "")
