"""Stages and the documented server with vLLM: what they print and write is what the tree search gives.

Invariants: evaluation and recommendations have the lists and metrics of the default engine, with items left out too, on
one and two processes; a server that was started as documented answers only with legal SIDs and their exact scores.
"""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from helpers import ROOT

import evaluate
import recommend
from minionerec.common.errors import UserError

pytest.importorskip("vllm", reason="vLLM is not installed: requirements-vllm.txt or requirements-vllm-cpu.txt")
pytestmark = pytest.mark.vllm

FEW = {"num_beams": 20, "batch_size": 4, "dtype": "float32"}


def evaluation(world, checkpoint, output, **more) -> dict:
    files = {"base_model": checkpoint, "test_data_path": world.test, "info_file": world.info, "train_file": world.train}
    return {name: str(path) for name, path in files.items()} | {"result_json_data": str(output)} | FEW | more


def lists(path) -> list:
    rows = json.loads(path.read_text())
    return [(row["predict"], row["unseen"]["predict"]) for row in rows]


def test_evaluation_and_recommendations_are_those_of_the_default_engine(
    world, vllm_checkpoint, vllm_engines, tmp_path, capfd
):
    tables = {}
    for backend in ("transformers", "vllm"):
        given = evaluation(world, vllm_checkpoint, tmp_path / f"{backend}.json", backend=backend)
        evaluate.main(evaluate.Options(**given))
        tables[backend] = [line for line in capfd.readouterr().out.splitlines() if "items, by" in line]
    assert tables["vllm"] == tables["transformers"] and len(tables["vllm"]) == 4
    assert lists(tmp_path / "vllm.json") == lists(tmp_path / "transformers.json")
    metrics = json.loads((tmp_path / "vllm.metrics.json").read_text())
    assert metrics["backend"] == "vllm" and metrics["illegal"] == 0

    vllm_engines.pop().close()
    files = {"base_model": str(vllm_checkpoint), "info_file": str(world.info)}
    one, two = (
        recommend.Recommender(recommend.Options(**files, backend=backend, unseen=True))([[3, 5], [7]])
        for backend in ("transformers", "vllm")
    )
    assert [[item["item_id"] for item in user] for user in one] == [[item["item_id"] for item in user] for user in two]
    assert not {3, 5} & {item["item_id"] for item in two[0]}


def test_a_blend_is_refused(world, vllm_checkpoint, tmp_path):
    given = evaluation(world, vllm_checkpoint, tmp_path / "p.json", backend="vllm", blend_path=["x"])
    with pytest.raises(UserError, match="--blend_path .*: expected nothing with --backend vllm"):
        evaluate.main(evaluate.Options(**given, blend_weight=["1"]))


# ------------------------------------------------------------------------------------------------ the server


def documented(language: str) -> list[str]:
    """The code blocks of docs/vllm.md that are about the server."""
    text = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8").split("## A server")[1]
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def start(command: str, log):
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    return subprocess.Popen(
        ["bash", "-c", command], cwd=ROOT, env=environment, start_new_session=True, stdout=log, stderr=log
    )


@pytest.mark.slow
def test_the_documented_server_answers_from_the_catalog(world, vllm_checkpoint, tmp_path, free_port, policy):
    names = {"output/quickstart/sft": vllm_checkpoint, "output/quickstart/data/info/ml-100k.txt": world.info}
    names |= {"output/trie.safetensors": tmp_path / "trie.safetensors", "8000": free_port}

    def here(text: str) -> str:
        for name, own in names.items():
            text = text.replace(name, str(own))
        return text

    save, ask = documented("python")
    done = subprocess.run([sys.executable, "-c", here(save)], cwd=ROOT, capture_output=True, text=True, check=True)
    end = done.stdout.split()[-1]
    [command] = documented("bash")
    command = here(command).replace('"end_token": 0', f'"end_token": {end}').replace("python -m", "exec python -m")
    with open(tmp_path / "log", "w") as log:
        server = start(command, log)
    try:
        deadline = time.monotonic() + 240
        while True:
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://localhost:{free_port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        client = here(ask).replace('"stop_token_ids": [0]', f'"stop_token_ids": [{end}]').replace('"n": 10', '"n": 200')
        done = subprocess.run([sys.executable, "-c", client], capture_output=True, text=True, check=True)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    answers = [ast.literal_eval(line) for line in done.stdout.splitlines()]
    catalog = policy.catalog
    legal = set(catalog.sids) - {catalog.sids[0], catalog.sids[7]}
    assert len(answers) > 20 and {sid for sid, _ in answers} <= legal
    assert all(score < 0 for _, score in answers) and [s for _, s in answers] == sorted((s for _, s in answers))[::-1]
