"""Every stage is killed with SIGKILL at random moments and started again with the same command.

Invariants: the result has the bytes of an unbroken run's; a record that says "complete" has a whole result next to it;
no start after a kill is refused. Each stage is killed 4 times, or `KILLS` times; `benchmarks/reliability.py`
kills each 20 times and makes a table of the counts.
"""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from helpers import arguments_of, write_encoder

KILLS = int(os.environ.get("KILLS", 4))
MOST_STARTS = 200
NOT_RESULTS = {"run.json", "README.md", "log.jsonl", "training_args.bin", "log.txt", "trainer_state.json"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def made(python, world, base_model, tmp_path_factory):
    """Inputs of the stages: embeddings, codebooks, a quantizer, an encoder, a baseline, an SFT checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(20, 10))[rng.integers(20, size=300)] + 0.3 * rng.normal(size=(300, 10))
    np.save(folder / "toy.emb-x-td.npy", matrix.astype(np.float32))
    write_encoder(folder / "encoder")
    for name in ("rqkmeans_constrained", "rqvae", "sasrec", "sft"):
        stage, options, _ = STAGES[name](folder, folder / name, world, base_model)
        status, _ = python.run(["-m", stage, *arguments_of(options)], folder / f"{name}.log")
        assert status == 0, (folder / f"{name}.log").read_text()[-3000:]
    return folder


# ------------------------------------------------------------------------------------------------ the stages

SPLITS = ("train", "valid", "test")


def preprocess(made, out, world, base):
    return "preprocess.movielens", {"output_dir": str(out)}, ["ml-100k.*"]


def text2emb(made, out, world, base):
    out.mkdir(exist_ok=True)
    items = {str(i): {"title": f"Item number {i}"} for i in range(2000)}  # 4 parts
    (out / "toy.item.json").write_text(json.dumps(items))
    options = {"dataset": "toy", "root": str(out), "plm_name": "x", "plm_checkpoint": str(made / "encoder")}
    return "rq.text2emb.amazon_text2emb", options | {"device": "cpu", "batch_size": 4}, ["*.npy"]


TRAINING = {"layers": [16], "eval_step": 4, "warmup_epochs": 2, "batch_size": 100, "device": "cpu"}


def rqvae(made, out, world, base):
    options = TRAINING | {"epochs": 60, "e_dim": 4, "num_emb_list": [8, 8], "lr": 5e-3}
    return "rq.rqvae", options | {"data_path": str(made / "toy.emb-x-td.npy"), "ckpt_dir": str(out)}, ["*"]


def rqkmeans_constrained(made, out, world, base):
    options = {"data_path": str(made / "toy.emb-x-td.npy"), "output_file": str(out / "toy.index.json")}
    return "rq.rqkmeans_constrained", options | {"k": 32, "l": 2}, ["*"]


def rqkmeans_faiss(made, out, world, base):
    options = {"data_path": str(made / "toy.emb-x-td.npy"), "output_file": str(out / "toy.index.json")}
    return "rq.rqkmeans_faiss", options | {"k": 32, "l": 2}, ["*"]


def rqkmeans_plus(made, out, world, base):
    books = made / "rqkmeans_constrained" / "toy.codebooks_constrained.npz"
    options = TRAINING | {"epochs": 40, "lr": 5e-3, "pretrained_codebook_path": str(books)}
    return "rq.rqkmeans_plus", options | {"data_path": str(made / "toy.emb-x-td.npy"), "ckpt_dir": str(out)}, ["*"]


def generate_indices(made, out, world, base):
    options = {"ckpt_path": str(made / "rqvae"), "data_path": str(made / "toy.emb-x-td.npy"), "device": "cpu"}
    return (
        "rq.generate_indices",
        options | {"output_file": str(out / "x.index.json"), "collision": "extra_token"},
        ["*"],
    )


def convert_dataset(made, out, world, base):
    options = {"dataset_name": "toy", "data_dir": str(world.folder), "output_dir": str(out)}
    return "convert_dataset", options, ["*/*.csv", "info/*.txt"]


def sasrec(made, out, world, base):
    files = {f"{name}_file": str(getattr(world, name)) for name in (*SPLITS, "info")}
    return "sasrec", files | {"output_dir": str(out), "epochs": 20, "early_stop": 0, "device": "cpu"}, ["*"]


def base_model(made, out, world, base):
    options = {
        "output_dir": str(out),
        "item_meta_path": str(world.items),
        "config_file": str(base.parent / "config.json"),
    }
    return "minionerec.language_model.base_model", options | {"vocab_size": 400}, ["*"]


def sft(made, out, world, base):
    files = {"train_file": world.train, "eval_file": world.valid, "sid_index_path": world.index}
    files |= {"item_meta_path": world.items, "base_model": base, "output_dir": out}
    options = {"train_from_scratch": True, "sft_tasks": "sid_seq", "batch_size": 16, "micro_batch_size": 8}
    options |= {"num_epochs": 6, "learning_rate": 5e-3, "eval_step": 4, "cache_dir": ""}
    return "sft", {name: str(path) for name, path in files.items()} | options, ["*"]


def rl(made, out, world, base):
    files = {"train_file": world.train, "eval_file": world.valid, "info_file": world.info}
    files |= {"model_path": made / "sft", "baseline_path": made / "sasrec", "output_dir": out}
    options = {"reward_type": "sasrec", "num_generations": 4, "train_batch_size": 16, "learning_rate": 1e-3}
    options |= {"eval_step": 3, "eval_beams": 10, "space": "catalog", "keep_start": False}
    return "rl", {name: str(path) for name, path in files.items()} | options, ["*"]


def evaluate(made, out, world, base):
    files = {"base_model": made / "sft", "test_data_path": world.test, "info_file": world.info}
    files |= {"train_file": world.train, "result_json_data": out / "p.json"}
    return "evaluate", {name: str(path) for name, path in files.items()} | {"num_beams": 20, "batch_size": 1}, ["*"]


STAGES = {
    f.__name__: f
    for f in (preprocess, text2emb, rqvae, rqkmeans_constrained, rqkmeans_faiss, rqkmeans_plus, generate_indices)
    + (convert_dataset, sasrec, base_model, sft, rl, evaluate)
}


# ------------------------------------------------------------------------------------------------ the test


def results(folder: Path, patterns: list[str]) -> dict[str, bytes]:
    """The bytes of a stage's results. Records, logs and remains of killed writes are left out."""
    found = {}
    for path in sorted(file for pattern in patterns for file in folder.glob(pattern)):
        skipped = path.name in NOT_RESULTS or path.name.endswith((".run.json", ".tmp"))
        if path.is_file() and not skipped:
            content = path.read_bytes()
            found[str(path.relative_to(folder))] = content.replace(str(folder).encode(), b"FOLDER")
    return found


def require_whole(folder: Path) -> None:
    """Every record that says "complete" has all its files next to it."""
    for path in folder.glob("**/*run.json"):
        record = json.loads(path.read_text())
        for name, size in record.get("outputs", {}).items() if record["complete"] else ():
            assert (path.parent / name).stat().st_size == size


@pytest.mark.parametrize("name", STAGES)
def test_killed_at_random_moments(name, made, python, world, base_model, tmp_path, record_property):
    def start(run: str, kill_after: float | None = None):
        folder, log = tmp_path / run / "out", tmp_path / f"{run}.log"
        folder.parent.mkdir(exist_ok=True)
        stage, options, patterns = STAGES[name](made, folder, world, base_model)
        status, seconds = python.run(["-m", stage, *arguments_of(options)], log, kill_after)
        assert status in ((0, -9) if kill_after else (0,)), log.read_text()[-3000:]
        require_whole(folder)
        return status, seconds, results(folder, patterns)

    _, seconds, expected = start("whole")
    assert expected
    rng, kills, starts, finished = random.Random(name), 0, 0, 0
    while kills < KILLS:
        status = -9
        while status:
            status, _, found = start(str(finished), rng.uniform(0.01, seconds) if kills < KILLS else None)
            kills, starts = kills + (status == -9), starts + 1
            assert starts < MOST_STARTS
        finished += 1
        assert found.keys() == expected.keys()
        assert [file for file in found if found[file] != expected[file]] == []
    for counted, count in (("kills", kills), ("starts", starts), ("finished", finished)):
        record_property(counted, count)
    print(f"\n{name}: {kills} kills, {starts} starts, {finished} finished runs, all equal; {seconds:.1f} s unbroken")
