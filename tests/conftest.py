"""A small world in the published layout, and a small base model, for tests of whole stages."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
INDUSTRIAL = ROOT.parent / "shared" / "data" / "industrial"
QWEN_TOKENIZER = ROOT.parent / "shared" / "tokenizers" / "qwen2.5"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)

N_ITEMS = 48


def write_world(folder: Path, seed: int = 0) -> SimpleNamespace:
    """Files of a data set with 48 items, where items 5 and 6 share a SID and items 7 and 8 a title."""
    import convert_dataset

    rng = random.Random(seed)
    codes = [(item // 12, item // 4 % 3, item % 4) for item in range(N_ITEMS)]
    codes[6] = codes[5]
    titles = [f"Item number {item}, the 'best'" for item in range(N_ITEMS)]
    titles[8] = titles[7]
    index = {str(i): [f"<{letter}_{code}>" for letter, code in zip("abc", c, strict=True)] for i, c in enumerate(codes)}
    meta = {str(i): {"title": t, "description": "", "brand": "", "categories": ""} for i, t in enumerate(titles)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.index.json").write_text(json.dumps(index))
    (folder / "toy.item.json").write_text(json.dumps(meta))
    for split, users in (("train", 60), ("valid", 12), ("test", 12)):
        lines = ["user_id:token\titem_id_list:token_seq\titem_id:token"]
        for user in range(users):
            start, length = rng.randrange(N_ITEMS), rng.randint(1, 6)
            walk = [(start + step) % N_ITEMS for step in range(length + 1)]  # the next item is the next id
            lines.append(f"{split}{user}\t{' '.join(map(str, walk[:-1]))}\t{walk[-1]}")
        (folder / f"toy.{split}.inter").write_text("\n".join(lines) + "\n")
    convert_dataset.main(
        convert_dataset.Options(dataset_name="toy", data_dir=str(folder), output_dir=str(folder), max_history=10)
    )
    return SimpleNamespace(
        folder=folder,
        index=folder / "toy.index.json",
        items=folder / "toy.item.json",
        info=folder / "info" / "toy.txt",
        train=folder / "train" / "toy.csv",
        valid=folder / "valid" / "toy.csv",
        test=folder / "test" / "toy.csv",
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def base_model(world, tmp_path_factory):
    """A folder with a two-layer Qwen2 of width 32 and a tokenizer of the world's titles."""
    from preprocess import base_model as script

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
    import checkpoint
    from catalog import Catalog, codebook_tokens
    from data import read_info

    torch.manual_seed(0)
    tokenizer = checkpoint.load_tokenizer(base_model, "base_model")
    model = checkpoint.load_model(base_model, "base_model")
    items = read_info(world.info)
    checkpoint.add_tokens(model, tokenizer, codebook_tokens(items.sids))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return SimpleNamespace(model=model.eval(), tokenizer=tokenizer, catalog=Catalog(items.sids), items=items)


@pytest.fixture(scope="session")
def checkpoint_folder(policy, tmp_path_factory):
    """The policy on disk, as a stage leaves it."""
    import checkpoint
    from data import DEFAULT_TEMPLATE

    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    checkpoint.save(policy.model, policy.tokenizer, DEFAULT_TEMPLATE, folder)
    return folder


def run_stage(script: str, *arguments, env: dict | None = None, check: bool = True, timeout: int = 600):
    """Run `python script …` or `bash script.sh` from the project's root; returns the completed process."""
    command = ["bash", script] if script.endswith(".sh") else [sys.executable, script]
    if not script.endswith((".py", ".sh")):
        command = [sys.executable, "-m", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=environment | {k: str(v) for k, v in (env or {}).items()},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        assert done.returncode == 0, f"{script} {arguments}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done
