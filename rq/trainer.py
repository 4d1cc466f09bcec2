"""The training loop of the learned quantizers. The whole embedding matrix lives on the device.

A checkpoint folder holds

    config.json                   every hyper-parameter that shapes the result, and a digest of the embeddings
    best_loss.safetensors         the weights with the least training loss among the evaluated epochs
    best_collision.safetensors    ... with the least collision rate; among equals, the longest trained
    epoch_<n>.safetensors         the latest `save_limit` evaluated epochs
    last.pt                       all that a killed run needs to go on: one file, so its parts cannot disagree
    result.json                   the figures of a finished run; where it exists nothing is trained again
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from cli import UserError, atomic_file, read_json, require_file, write_json
from rq.models.rqvae import RQVAE
from rq.sid_index import collision_rate

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
ARCHITECTURES = {"rqvae": RQVAE}
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Schedule:
    """What the loop needs to know; all but `save_limit` shape the result."""

    lr: float
    epochs: int
    batch_size: int  # rows
    eval_step: int  # epochs
    learner: str  # a key of OPTIMIZERS, in any case
    lr_scheduler_type: str  # constant or linear
    warmup_epochs: int
    weight_decay: float
    kmeans_init: bool
    kmeans_iters: int
    seed: int
    save_limit: int

    def hyper_parameters(self) -> dict:
        """What config.json records."""
        values = asdict(self) | {"learner": self.learner.lower()}
        del values["save_limit"]
        return values


def digest(embeddings: np.ndarray) -> str:
    """A fingerprint of the matrix: 128 bits of BLAKE2 over its bytes, in hexadecimal."""
    return hashlib.blake2b(np.ascontiguousarray(embeddings).data, digest_size=16).hexdigest()


def prepare_folder(folder: str | Path, config: dict, overwrite: bool) -> bool:
    """Make `folder` the checkpoint folder of `config`; True if a run with it has finished there already.

    Raises `UserError` if it holds a run with other hyper-parameters, unless `overwrite` removes that run.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, expected a folder; check --ckpt_dir")
    if (folder / "config.json").exists():
        there = read_json(folder / "config.json", "ckpt_dir")
        config = json.loads(json.dumps(config))  # as the file would give it back
        if there == config:
            return (folder / "result.json").exists()
        if not overwrite:
            raise UserError(
                f"{folder}: holds a run with other hyper-parameters ({_first_difference(there, config)}); give another "
                f"--ckpt_dir, or --overwrite True to replace it"
            )
        for pattern in ("result.json", "last.pt", "best_*.safetensors", "epoch_*.safetensors"):
            for path in folder.glob(pattern):
                path.unlink()
    write_json(folder / "config.json", config)
    return False


def _first_difference(there: dict, asked: dict, prefix: str = "") -> str:
    for key in sorted({*there, *asked}):
        old, new = there.get(key), asked.get(key)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            return _first_difference(old, new, f"{key}.")
        if old != new:
            return f"{prefix}{key} is {old} there and {new} now"
    return "no key differs"


def load_model(path: str | Path, flag: str = "ckpt_path") -> tuple[nn.Module, dict]:
    """The model in `path` and its config; a folder means its best_collision.safetensors.

    Raises `UserError` if weights or config.json are missing, broken, or of another architecture.
    """
    path = require_file(path, flag)
    if path.is_dir():
        path = require_file(path / "best_collision.safetensors", flag)
    config = read_json(path.parent / "config.json", flag)
    architecture = config.get("architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path.parent / 'config.json'}: architecture {architecture!r}, expected one of {sorted(ARCHITECTURES)}; "
            f"check --{flag}"
        )
    try:
        model = ARCHITECTURES[architecture](**config["model"])
        model.load_state_dict(load_file(path))
    except (KeyError, TypeError, RuntimeError, SafetensorError, OSError) as error:
        raise UserError(f"{path}: does not fit its config.json ({error}); train again or check --{flag}") from None
    return model, config


def learning_rate_factor(epoch: float, schedule: Schedule) -> float:
    """Share of the peak learning rate after `epoch` epochs: up from 0 in the warm-up, then level or down to 0."""
    if epoch < schedule.warmup_epochs:
        return epoch / schedule.warmup_epochs
    if schedule.lr_scheduler_type == "constant":
        return 1.0
    return max(0.0, (schedule.epochs - epoch) / max(1, schedule.epochs - schedule.warmup_epochs))


class Trainer:
    """Trains `model` on embeddings (items, dim) into `folder`, or goes on from where a killed run stopped.

    Deterministic: the same seed, machine and thread count give the same weights, whether killed in between or not.
    """

    def __init__(self, model: nn.Module, embeddings: np.ndarray, schedule: Schedule, folder: str | Path, device):
        self.folder, self.schedule, self.device = Path(folder), schedule, torch.device(device)
        self.model = model.to(self.device)
        self.data = torch.from_numpy(embeddings).to(self.device)  # (items, dim)
        self.optimizer = OPTIMIZERS[schedule.learner.lower()](
            model.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay
        )
        steps = len(self._batches())  # a permutation is drawn here; fit() seeds afterwards
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step / steps, schedule)
        )
        self.epoch = 0
        self.seconds = 0.0
        self.best = {"loss": float("inf"), "collision": float("inf")}

    def _batches(self) -> list[Tensor]:
        """One epoch's rows, shuffled. A lone last row joins the batch before: batch norm cannot take one row."""
        batches = list(torch.randperm(len(self.data), device=self.device).split(self.schedule.batch_size))
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def _train_epoch(self) -> float:
        """One pass over the data; returns the mean loss a row."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        for rows in self._batches():
            loss = self.model(self.data[rows]).loss
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
            self.optimizer.step()
            self.scheduler.step()
            total += loss.detach() * len(rows)
        mean = total.item() / len(self.data)
        if not np.isfinite(mean):
            raise UserError(f"the loss is {mean} at epoch {self.epoch + 1}; lower --lr or raise --warmup_epochs")
        return mean

    def fit(self) -> dict:
        """Train to the last epoch; returns the figures that are also written to result.json."""
        schedule = self.schedule
        if not self._load_state():
            torch.manual_seed(schedule.seed)
            if schedule.kmeans_init:
                self.model.train()
                first = self.data[self._batches()[0]]
                self.model.init_by_kmeans(first, iterations=schedule.kmeans_iters, seed=schedule.seed)
        else:
            print(f"going on after epoch {self.epoch}, from {self.folder / 'last.pt'}")
        begin = time.perf_counter() - self.seconds
        with tqdm(total=schedule.epochs, initial=self.epoch, desc="RQ-VAE", unit="epoch", mininterval=1) as bar:
            while self.epoch < schedule.epochs:
                loss = self._train_epoch()
                self.epoch += 1
                bar.update()
                if self.epoch % schedule.eval_step == 0 or self.epoch == schedule.epochs:
                    collision = collision_rate(self.model.encode(self.data, schedule.batch_size).codes.cpu().numpy())
                    bar.set_postfix(loss=f"{loss:.5f}", collision=f"{collision:.4f}")
                    self.seconds = time.perf_counter() - begin
                    self._keep(loss, collision)
                    self.save_state()
        result = {
            "epochs": self.epoch,
            "best_loss": self.best["loss"],
            "best_collision": self.best["collision"],
            "seconds": round(self.seconds, 1),
        }
        write_json(self.folder / "result.json", result)
        (self.folder / "last.pt").unlink(missing_ok=True)
        return result

    def _keep(self, loss: float, collision: float) -> None:
        weights = save({name: tensor.contiguous() for name, tensor in self.model.state_dict().items()})
        names = [f"epoch_{self.epoch}"] if self.schedule.save_limit > 0 else []
        for name, figure in (("loss", loss), ("collision", collision)):
            if figure <= self.best[name]:
                self.best[name] = figure
                names.append(f"best_{name}")
        for name in names:
            with atomic_file(self.folder / f"{name}.safetensors", "wb") as f:
                f.write(weights)
        kept = sorted(self.folder.glob("epoch_*.safetensors"), key=lambda path: int(path.stem.split("_")[1]))
        for path in kept[: -self.schedule.save_limit or None]:
            path.unlink()

    def save_state(self) -> None:
        """Write last.pt: weights, optimizer, schedule, random state, best figures."""
        state = {
            "epoch": self.epoch,
            "seconds": self.seconds,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        with atomic_file(self.folder / "last.pt", "wb") as f:
            torch.save(state, f)

    def _load_state(self) -> bool:
        path = self.folder / "last.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.epoch, self.seconds, self.best = state["epoch"], state["seconds"], state["best"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        return True
