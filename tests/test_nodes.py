"""Two nodes, here two launches on one machine, make one job.

Invariants: under torchrun, DDP, ZeRO-2 and ZeRO-3 the processes of both nodes know of each other (world size 2), write
one output, and an error of the user ends both with one line and exit code 2.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, sft_environment
from safetensors.torch import load_file

CONFIGS = {"torchrun": "", "DDP": "config/cpu.yaml", "ZeRO-2": "config/zero2_opt.yaml", "ZeRO-3": "config/zero3.yaml"}
pytestmark = pytest.mark.distributed


def start_nodes(environment: dict, port: str) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of sft.sh on each of two nodes."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shared = environment | {"NPROC": 1, "NNODES": 2, "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "PATH": path}
    nodes = [
        subprocess.Popen(
            ["bash", "sft.sh"],
            cwd=ROOT,
            env=os.environ | {name: str(value) for name, value in shared.items()} | {"NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=400) for node in nodes]
    return [(node.returncode, *output) for node, output in zip(nodes, outputs, strict=True)]


@pytest.mark.parametrize("config", CONFIGS)
def test_both_nodes_are_one_world(world, base_model, tmp_path, free_port, config):
    """Eight rows per step are one batch of one process, but do not divide among two."""
    environment = sft_environment(world, base_model, tmp_path / "out", BATCH_SIZE=8, ACCELERATE_CONFIG=CONFIGS[config])
    for code, _, errors in start_nodes(environment, free_port):
        assert code == 2
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "8 x 2 processes = 16" in lines[0] and "Traceback" not in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_two_nodes_train_one_model(world, base_model, tmp_path, free_port, config):
    environment = sft_environment(world, base_model, tmp_path / "out", ACCELERATE_CONFIG=CONFIGS[config])
    environment |= {"SFT_TASKS": "sid_seq", "TRAIN_ROWS": 32, "NUM_EPOCHS": 1}
    nodes = start_nodes(environment, free_port)
    assert [code for code, _, _ in nodes] == [0, 0], nodes[0][2][-3000:] + nodes[1][2][-3000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["complete"] and not list(tmp_path.glob("out.*"))
    before = load_file(base_model / "model.safetensors")["model.norm.weight"]
    assert (load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].float() != before).any()
