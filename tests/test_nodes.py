"""Two nodes, here two launches on one machine, make one job.

Invariants: under torchrun, DDP, ZeRO-2 and ZeRO-3 the processes of both nodes know of each other (world size 2), write
one output, and an error of the user ends both with one line and exit code 2. Two nodes evaluate as one process does.
shell/slurm.sh starts a launcher on every node of a job with the variables that say so.
"""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, environment_of, run_stage, sft_environment
from safetensors.torch import load_file

CONFIGS = {"torchrun": "", "DDP": "config/cpu.yaml", "ZeRO-2": "config/zero2_opt.yaml", "ZeRO-3": "config/zero3.yaml"}


def start_nodes(environment: dict, port: str, launcher: str = "sft.sh") -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of a launcher on each of two nodes."""
    shared = environment | {"NPROC": 1, "NNODES": 2, "MASTER_PORT": port}
    nodes = [
        subprocess.Popen(
            ["bash", launcher],
            cwd=ROOT,
            env=environment_of(**shared, NODE_RANK=rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=240) for node in nodes]
    finally:  # nodes that wait for each other without end leave no process behind
        for node in nodes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
    return [(node.returncode, *output) for node, output in zip(nodes, outputs, strict=True)]


@pytest.mark.distributed
@pytest.mark.parametrize("config", CONFIGS)
def test_both_nodes_are_one_world(world, base_model, tmp_path, free_port, config):
    """Eight rows per step are one batch of one process, but do not divide among two."""
    environment = sft_environment(world, base_model, tmp_path / "out", BATCH_SIZE=8, ACCELERATE_CONFIG=CONFIGS[config])
    for code, _, errors in start_nodes(environment, free_port):
        assert code == 2
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "8 x 2 processes = 16" in lines[0] and "Traceback" not in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
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


@pytest.mark.distributed
def test_two_nodes_evaluate_as_one_process_does(world, checkpoint_folder, tmp_path, free_port):
    given = {"BASE_MODEL": checkpoint_folder, "TEST_DATA_PATH": world.test, "INFO_FILE": world.info}
    given |= {"NUM_BEAMS": 10, "BATCH_SIZE": 2, "OMP_WAIT_POLICY": "PASSIVE"}
    run_stage("evaluate.sh", env=given | {"NPROC": 1, "RESULT_JSON_DATA": tmp_path / "one.json"})
    nodes = start_nodes(given | {"RESULT_JSON_DATA": tmp_path / "two.json"}, free_port, "evaluate.sh")
    assert [code for code, _, _ in nodes] == [0, 0], nodes[0][2][-3000:] + nodes[1][2][-3000:]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two and len(two) == 12
    assert json.loads((tmp_path / "two.run.json").read_text())["processes"] == 2
    assert "all items, by SID" in nodes[0][1] and nodes[1][1] == ""  # only the first prints


# ------------------------------------------------------------------------------------------------ Slurm


def in_slurm(folder: Path, *arguments: str, **variables) -> subprocess.CompletedProcess:
    """shell/slurm.sh in a job of two nodes, whose srun starts the command once per node, here."""
    commands = {
        "scontrol": 'printf "%s\\n" node7 node8',
        "srun": 'shift; for id in 0 1; do SLURM_NODEID=$id "$@" & done; wait',
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    environment = os.environ | job | {"PATH": f"{folder}:{os.environ['PATH']}"} | variables
    command = ["bash", "shell/slurm.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_slurm_tells_every_node_its_place(tmp_path):
    launcher = tmp_path / "launcher.sh"
    launcher.write_text('echo "$NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT: $BATCH_SIZE $*"\n')
    done = in_slurm(tmp_path, str(launcher), "--num_beams", "5 6", BATCH_SIZE="64")
    lines = [f"{rank} of 2 at node7:20123: 64 --num_beams 5 6" for rank in (0, 1)]
    assert done.returncode == 0 and sorted(done.stdout.splitlines()) == lines, done.stderr


@pytest.mark.parametrize(
    "arguments, variables, found",
    [(["sft.sh"], {"SLURM_JOB_ID": ""}, "not in a Slurm job"), (["stf.sh"], {}, "'stf.sh' is no launcher"), ([], {}, "'' is no")],
)  # fmt: skip
def test_slurm_refuses_in_one_line(tmp_path, arguments, variables, found):
    done = in_slurm(tmp_path, *arguments, **variables)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and found in done.stderr
