"""The training loop of the learned quantizers. The whole embedding matrix lives on the device.

A checkpoint folder holds

    config.json                   every hyper-parameter that shapes the result, and a digest of the embeddings
    best_loss.safetensors         the weights with the least training loss among the evaluated epochs
    best_collision.safetensors    ... with the least collision rate; among equals, the longest trained
    epoch_<n>.safetensors         the latest `save_limit` evaluated epochs
    last.pt                       all that a killed run needs to go on: one file, so its parts cannot disagree
    result.json                   the figures of a finished run; where it exists nothing is trained again
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from minionerec.common.embeddings import digest
from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, read_json, write_json
from rq.checkpoints import ARCHITECTURES
from rq.collisions import collision_rate

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
MAX_GRADIENT_NORM = 1.0


@dataclass
class TrainingOptions:
    """What every learned quantizer takes."""

    # files
    data_path: str = HfArg(default="", help="embeddings, <D>.emb-<plm>-td.npy")
    ckpt_dir: str = HfArg(default="", help="folder for the checkpoints")
    overwrite: bool = HfArg(default=False, help="replace a run with other hyper-parameters in --ckpt_dir")
    save_limit: int = HfArg(default=5, help="evaluated epochs to keep beside the best; 0: none")
    # model
    layers: list[int] = HfArg(default_factory=lambda: [2048, 1024, 512, 256, 128, 64], help="hidden sizes")
    beta: float = HfArg(default=0.25, help="weight of the commitment loss")
    quant_loss_weight: float = HfArg(default=1.0, help="weight of the quantisation loss")
    loss_type: Literal["mse", "l1"] = HfArg(default="mse", help="reconstruction loss")
    dropout_prob: float = HfArg(default=0.0, help="dropout before each linear layer")
    bn: bool = HfArg(default=False, help="batch norm after each linear layer but the last")
    sk_epsilons: list[float] = HfArg(
        default_factory=list, help="Sinkhorn's epsilon of each level while training; 0: nearest code; none: all 0"
    )
    sk_iters: int = HfArg(default=50, help="Sinkhorn rounds")
    # training
    lr: float = HfArg(default=1e-3, help="peak learning rate")
    epochs: int = HfArg(default=10000, help="passes over the items")
    batch_size: int = HfArg(default=20480, help="items a step; more than there are: one batch")
    learner: str = HfArg(default="AdamW", help="adam, adamw, sgd, adagrad or rmsprop")
    lr_scheduler_type: Literal["constant", "linear"] = HfArg(default="constant", help="after the warm-up")
    warmup_epochs: int = HfArg(default=50, help="epochs in which the learning rate rises from 0")
    weight_decay: float = HfArg(default=1e-4, help="weight decay")
    eval_step: int = HfArg(default=50, help="epochs between evaluations and checkpoints")
    dead_code_threshold: float = HfArg(
        default=0.0, help="a code that fewer items took in an epoch restarts at an item's residual; 0: never"
    )
    # machine
    seed: int = HfArg(default=2024, help="seed of weights, k-means and order")
    device: str = HfArg(default="", help="cpu, cuda, cuda:1, ...; empty: cuda if there is one")
    compile: bool = HfArg(default=False, help="compile the training step; cuda alone")
    num_workers: int = HfArg(default=0, help="of no effect: the embeddings live on the device")

    def __post_init__(self):
        self.check(
            ckpt_dir=(bool(self.ckpt_dir), "a folder"),
            layers=(min(self.layers, default=0) >= 1, "sizes of at least 1"),
            sk_iters=(self.sk_iters >= 1, "at least 1"),
            dropout_prob=(0 <= self.dropout_prob < 1, "0 or more and below 1"),
            beta=(self.beta >= 0, "0 or more"),
            quant_loss_weight=(self.quant_loss_weight >= 0, "0 or more"),
            lr=(self.lr > 0, "more than 0"),
            epochs=(self.epochs >= 1, "at least 1"),
            batch_size=(self.batch_size >= 2, "at least 2"),
            learner=(self.learner.lower() in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            warmup_epochs=(self.warmup_epochs >= 0, "0 or more"),
            weight_decay=(self.weight_decay >= 0, "0 or more"),
            eval_step=(self.eval_step >= 1, "at least 1"),
            dead_code_threshold=(self.dead_code_threshold >= 0, "0 or more"),
            save_limit=(self.save_limit >= 0, "0 or more"),
        )

    def check(self, **rules: tuple[bool, str]) -> None:
        """Raises `UserError` for the first flag whose rule, (holds, what was expected), does not hold."""
        for flag, (holds, rule) in rules.items():
            if not holds:
                raise UserError(f"--{flag} is {getattr(self, flag)!r}, expected {rule}")

    def spread_epsilons(self, levels: int) -> None:
        """One `sk_epsilons` value a level; none given means zeros."""
        self.sk_epsilons = self.sk_epsilons or [0.0] * levels
        fits = len(self.sk_epsilons) == levels and min(self.sk_epsilons) >= 0
        self.check(sk_epsilons=(fits, f"{levels} values of 0 or more, one for each level"))

    def model_options(self) -> dict:
        """The options that a model's constructor takes as they are."""
        names = "layers beta dropout_prob bn loss_type quant_loss_weight sk_epsilons sk_iters"
        return {name: getattr(self, name) for name in names.split()}


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
    dead_code_threshold: float  # items
    seed: int
    save_limit: int
    kmeans_init: bool = False
    kmeans_iters: int = 0

    def hyper_parameters(self) -> dict:
        """What config.json records."""
        values = asdict(self) | {"learner": self.learner.lower()}
        del values["save_limit"]
        return values


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


def learning_rate_factor(epoch: float, schedule: Schedule) -> float:
    """Share of the peak learning rate after `epoch` epochs: up from 0 in the warm-up, then level or down to 0."""
    if epoch < schedule.warmup_epochs:
        return epoch / schedule.warmup_epochs
    if schedule.lr_scheduler_type == "constant":
        return 1.0
    return max(0.0, (schedule.epochs - epoch) / max(1, schedule.epochs - schedule.warmup_epochs))


def train(
    architecture: str,
    model_config: dict,
    embeddings: np.ndarray,
    options: TrainingOptions,
    device: torch.device,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    **more_config,
) -> None:
    """Train one of `ARCHITECTURES` on embeddings (items, dim) into `--ckpt_dir`, unless that is done already.

    `prepare` gets the new model before its first step; `more_config` is what else shapes the result.
    """
    o = options
    if o.compile and device.type != "cuda":
        raise UserError(f"--compile True is for cuda, but the device is {device}; leave it out")
    if o.num_workers:
        print(f"--num_workers {o.num_workers} has nothing to load: the whole matrix is on {device}")
    if o.warmup_epochs >= o.epochs:
        print(f"the learning rate never reaches {o.lr}: --warmup_epochs {o.warmup_epochs}, --epochs {o.epochs}")
    sizes = model_config["num_emb_list"]
    if np.prod(sizes, dtype=float) < len(embeddings):
        print(f"codebooks of {sizes} have fewer SIDs than there are items: only --collision extra_token will do")

    schedule = Schedule(**{f.name: getattr(o, f.name) for f in fields(Schedule) if hasattr(o, f.name)})
    config = {"architecture": architecture, "model": model_config, "training": schedule.hyper_parameters()}
    config["data"] = {"n_items": len(embeddings), "digest": digest(embeddings)} | more_config
    if prepare_folder(o.ckpt_dir, config, o.overwrite):
        print(f"{o.ckpt_dir}: finished before with these hyper-parameters; nothing to do")
        return

    torch.manual_seed(o.seed)
    model = ARCHITECTURES[architecture](**model_config)
    prepare(model)
    print(f"{len(embeddings)} items, {sum(p.numel() for p in model.parameters()):,} parameters, on {device}")
    result = Trainer(model, embeddings, schedule, o.ckpt_dir, device, o.compile).fit()
    print(
        f"wrote {o.ckpt_dir}: least loss {result['best_loss']:.5f}, least collision rate "
        f"{result['best_collision']:.4f}, {result['epochs']} epochs in {result['seconds']} s"
    )


class Trainer:
    """Trains `model` on embeddings (items, dim) into `folder`, or goes on from where a killed run stopped.

    Deterministic: the same seed, machine and thread count give the same weights, whether killed in between or not.
    """

    def __init__(
        self,
        model: nn.Module,
        embeddings: np.ndarray,
        schedule: Schedule,
        folder: str | Path,
        device,
        compile_step: bool = False,
    ):
        self.folder, self.schedule, self.device = Path(folder), schedule, torch.device(device)
        self.model = model.to(self.device)
        self.forward = torch.compile(self.model) if compile_step else self.model  # the same weights
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
        levels, threshold = self.model.quantizer.levels, self.schedule.dead_code_threshold
        counts = [torch.zeros(len(level.codebook), dtype=torch.long, device=self.device) for level in levels]
        for rows in self._batches():
            output = self.forward(self.data[rows])
            loss = output.loss
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
            self.optimizer.step()
            self.scheduler.step()
            total += loss.detach() * len(rows)
            if threshold:
                for count, codes in zip(counts, output.codes.T, strict=True):
                    count += torch.bincount(codes, minlength=len(count))
        if threshold and self.epoch + 1 < self.schedule.epochs:  # the last epoch's codes are the result
            self.model.restart_dead_codes(self.data[rows], counts, threshold)
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
        with tqdm(total=schedule.epochs, initial=self.epoch, desc="training", unit="epoch", mininterval=1) as bar:
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
