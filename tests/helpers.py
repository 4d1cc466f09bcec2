"""Shared scaffolding of the tests: a small data set in the published layout, and how to run a stage."""

import atexit
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from forked_python import ForkedPython

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


@functools.cache
def forked_python() -> ForkedPython:
    python = ForkedPython()
    atexit.register(python.close)
    return python


def environment_of(fresh: bool = False, **more) -> dict[str, str]:
    """The variables of a stage: one thread, and a `python` that forks, or the real one."""
    folder = Path(sys.executable).parent
    path = f"{folder}:{os.environ['PATH']}" if fresh else f"{forked_python().folder}:{folder}:{os.environ['PATH']}"
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": path} | {name: str(value) for name, value in more.items()}


def arguments_of(options: dict) -> list[str]:
    """`--name value …`; a list gives several values."""
    values = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    return [str(part) for name, given in values.items() for part in (f"--{name}", *given)]


def run_stage(script: str, *arguments, env: dict | None = None, check: bool = True, timeout: int = 600, fresh=False):
    """Run `python script …` or `bash script.sh` from the project's root; returns the completed process.

    fresh: with a `python` that imports everything itself, as a user's does.
    """
    command = ["bash", script] if script.endswith(".sh") else ["python", script]
    if not script.endswith((".py", ".sh")):
        command = ["python", "-m", script]
    environment = environment_of(fresh, **env or {})
    command[0] = shutil.which(command[0], path=environment["PATH"])
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        assert done.returncode == 0, f"{script} {arguments}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def sft_environment(world, base_model, output, **more) -> dict:
    """Variables of sft.sh for a short training on the small data set."""
    return {
        "BASE_MODEL": base_model,
        "TRAIN_FROM_SCRATCH": "True",
        "TRAIN_FILE": world.train,
        "EVAL_FILE": world.valid,
        "SID_INDEX_PATH": world.index,
        "ITEM_META_PATH": world.items,
        "OUTPUT_DIR": output,
        "CATEGORY": "Toys_and_Games",
        "BATCH_SIZE": 16,
        "MICRO_BATCH_SIZE": 8,
        "NUM_EPOCHS": 2,
        "LEARNING_RATE": 5e-3,
        "EVAL_STEP": 0.5,
        "NPROC": 1,
    } | more


def killed_midway(script: str, environment: dict, output: Path) -> None:
    """Start a launcher, and kill all its processes once it has written a checkpoint."""
    from minionerec.common.runs import read_record

    process = subprocess.Popen(
        ["bash", script],
        cwd=ROOT,
        env=environment_of(fresh=True, **environment),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not any(read_record(path).get("files") for path in output.glob("checkpoint-*/manifest.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def sequences(*rows: tuple[list[int], int]):
    """A table as `read_sequences` returns it: one user per row, with the history as what the user has seen."""
    import polars as pl

    history, target = zip(*rows, strict=True)
    users = [str(i) for i in range(len(rows))]
    lists = pl.List(pl.Int64)
    return pl.DataFrame(
        {"user": users, "history": history, "target": target, "seen": history},
        schema_overrides={"history": lists, "seen": lists},
    )


def write_encoder(folder: Path) -> None:
    """A two-layer BERT of width 16 that knows a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "Item", "number", "best"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
