"""The training loop: what it learns, that every weight is trained, and that a resumed training equals an unbroken one."""

import json
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, environment_of, forked_python
from rq_helpers import clustered, train

from rq.checkpoints import load_model
from rq.models.rqvae import RQVAE
from rq.trainer import Trainer


def test_reconstruction_error_falls(embedding_file, tmp_path):
    train(embedding_file, tmp_path / "ckpt", epochs=80, lr=5e-3, eval_step=40, save_limit=1)
    data = torch.from_numpy(clustered())
    config = json.loads((tmp_path / "ckpt" / "config.json").read_text())
    torch.manual_seed(2024)
    model = RQVAE(**config["model"])
    model.init_by_kmeans(data, iterations=100, seed=2024)
    before = model(data).reconstruction_loss.item()
    trained = load_model(tmp_path / "ckpt" / "best_loss.safetensors")
    assert trained(data).reconstruction_loss.item() < 0.5 * before
    names = sorted(path.name for path in (tmp_path / "ckpt").iterdir())
    assert names == [
        "best_collision.safetensors",
        "best_loss.safetensors",
        "config.json",
        "epoch_80.safetensors",
        "log.jsonl",
        "result.json",
        "run.json",
    ]


@pytest.mark.parametrize("learner", ["Adam", "adamw", "SGD", "adagrad", "RMSprop"])
def test_every_learner_moves_every_weight(embedding_file, tmp_path, learner):
    train(
        embedding_file, tmp_path / "ckpt", epochs=2, learner=learner, bn=True, lr_scheduler_type="linear", eval_step=1
    )
    first, second = (load_model(tmp_path / "ckpt" / f"epoch_{epoch}.safetensors") for epoch in (1, 2))
    frozen = [n for (n, a), b in zip(first.named_parameters(), second.parameters(), strict=True) if torch.equal(a, b)]
    assert not [name for name in frozen if "bias" not in name]  # a bias before batch norm has no gradient


def test_dead_code_threshold_revives_codes(embedding_file, tmp_path):
    """Without k-means all codes start near zero, and few are ever used."""
    used = []
    for threshold in (0.0, 1.0):
        folder = tmp_path / str(threshold)
        train(embedding_file, folder, epochs=30, kmeans_init=False, num_emb_list=[32], dead_code_threshold=threshold)
        model = load_model(folder / "best_loss.safetensors")
        used.append(model.encode(torch.from_numpy(np.load(embedding_file))).codes.unique().numel())
    assert used[1] > 2 * used[0]


RESUMED = {
    "epochs": 6,
    "eval_step": 1,
    "dropout_prob": 0.2,
    "dead_code_threshold": 2.0,
    "lr_scheduler_type": "linear",
    "warmup_epochs": 2,
}


def weights(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["rqvae", "rqkmeans_constrained"])
def test_killed_at_any_moment(command, embedding_file, tmp_path):
    """kill -9 at 10 moments, each followed by the same command: the bytes of an unbroken run; then nothing to do."""
    arguments = {
        "rqvae": ["--layers", "64", "--num_emb_list", "16", "16", "--epochs", "400", "--eval_step", "20"],
        "rqkmeans_constrained": ["--k", "16", "--l", "3", "--collision", "extra_token", "--solver", "transport"],
    }[command]

    def start(folder):
        output = ["--ckpt_dir", folder] if command == "rqvae" else ["--output_file", folder / "D.index.json"]
        words = [forked_python().executable, "-m", f"rq.{command}", "--data_path", embedding_file, *output, *arguments]
        return subprocess.Popen(
            [str(word) for word in words],
            cwd=ROOT,
            env=environment_of(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def files(folder):
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*")}

    assert start(tmp_path / "unbroken").wait() == 0
    rng, killed = np.random.default_rng(0), 0
    for changes in rng.integers(1, 5, size=10):  # how often a file changes before the kill
        process, seen = start(tmp_path / "killed"), files(tmp_path / "killed")
        while changes and process.poll() is None:
            if (now := files(tmp_path / "killed")) != seen:
                seen, changes = now, changes - 1
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 3
    assert start(tmp_path / "killed").wait() == 0
    for path in (tmp_path / "unbroken").iterdir():
        if not path.name.endswith("run.json"):
            assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes(), path.name
    assert b"nothing to do" in start(tmp_path / "killed").communicate()[0]


def test_a_training_that_died_and_resumed_equals_an_unbroken_one(embedding_file, tmp_path, monkeypatch):
    train(embedding_file, tmp_path / "unbroken", **RESUMED)
    save_state = Trainer.save_state

    def save_then_die(self):
        save_state(self)
        if self.epoch == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save_state", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        train(embedding_file, tmp_path / "killed", **RESUMED)
    assert not json.loads((tmp_path / "killed" / "run.json").read_text())["complete"]
    monkeypatch.undo()
    torch.rand(7)  # the process that resumes has another random state
    train(embedding_file, tmp_path / "killed", **RESUMED)
    assert weights(tmp_path / "unbroken") == weights(tmp_path / "killed")
    assert not (tmp_path / "killed" / "last.pt").exists()
