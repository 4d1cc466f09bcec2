"""The training loop of the learned quantizers. The whole embedding matrix lives on the device."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minionerec.common.console import Progress, figures, note, say, short
from minionerec.common.devices import pick_device
from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, write_json
from minionerec.common.tracking import TrainingLog, read_log
from rq.checkpoints import save_model
from rq.collisions import collision_rate
from rq.files import STATE
from rq.models.rq import ResidualModel
from rq.options import TrainingOptions

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
MAX_GRADIENT_NORM = 1.0


def learning_rate_factor(epoch: float, options: TrainingOptions) -> float:
    """Share of the peak learning rate after `epoch` epochs: from 0 to 1 in the warm-up, then constant or down to 0."""
    if epoch < options.warmup_epochs:
        return epoch / options.warmup_epochs
    if options.lr_scheduler_type == "constant":
        return 1.0
    return max(0.0, (options.epochs - epoch) / max(1, options.epochs - options.warmup_epochs))


def train(
    make_model: Callable[[], ResidualModel],
    embeddings: np.ndarray,
    options: TrainingOptions,
    start: Callable[[ResidualModel, Tensor], None] | None = None,
) -> None:
    """Train the model on embeddings (items, dim) into `--ckpt_dir`; resumes from last.pt if it is there.

    `make_model` is called after seeding. `start` gets the model and the first batch (rows, dim) before the first step.
    """
    o, device = options, pick_device(options.device)
    if o.compile and device.type != "cuda":
        raise UserError(f"--compile True is for cuda, but the device is {device}; leave it out")
    if o.num_workers:
        note(f"--num_workers {o.num_workers} is ignored: the whole matrix is on {device}")
    if o.warmup_epochs >= o.epochs:
        note(f"the learning rate never reaches {o.lr}: --warmup_epochs {o.warmup_epochs}, --epochs {o.epochs}")

    torch.manual_seed(o.seed)
    model = make_model()
    sizes = model.quantizer.sizes
    if math.prod(sizes) < len(embeddings):
        note(f"codebooks of {sizes} have fewer SIDs than there are items: --collision nearest_free will be refused")
    say(f"{len(embeddings)} items, {sum(p.numel() for p in model.parameters()):,} parameters, on {device}")
    result = Trainer(model, embeddings, o, o.ckpt_dir, device, o.compile).fit(start)
    say(
        f"wrote {o.ckpt_dir}: best loss {result['best_loss']:.5f}, best collision rate "
        f"{result['best_collision']:.4f}, {result['epochs']} epochs"
    )


class Trainer:
    """Trains `model` on embeddings (items, dim) into `folder`, or resumes a training that was killed.

    Deterministic: the same seed, machine and thread count give the same weights, whether killed in between or not.
    `options` gives lr, epochs, batch_size and the other fields of `TrainingOptions` under "training", seed, save_limit.
    """

    def __init__(
        self,
        model: ResidualModel,
        embeddings: np.ndarray,
        options: TrainingOptions,
        folder: str | Path,
        device,
        compile_step: bool = False,
    ):
        self.folder, self.options, self.device = Path(folder), options, torch.device(device)
        self.model = model.to(self.device)
        self.forward = torch.compile(self.model) if compile_step else self.model  # the same weights
        self.data = torch.from_numpy(embeddings).to(self.device)  # (items, dim)
        self.optimizer = OPTIMIZERS[options.learner](
            model.parameters(), lr=options.lr, weight_decay=options.weight_decay
        )
        steps = len(self._batches())  # draws a permutation; fit() seeds afterwards
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step / steps, options)
        )
        self.epoch = 0
        self.best = {"loss": float("inf"), "collision": float("inf")}

    def fit(self, start: Callable[[ResidualModel, Tensor], None] | None = None) -> dict:
        """Train to the last epoch; returns the figures that are also written to result.json. `start`: see `train`."""
        o = self.options
        if self._load_state():
            say(f"resuming after epoch {self.epoch}, from {self.folder / STATE}")
        else:
            torch.manual_seed(o.seed)
            if start:
                self.model.train()
                start(self.model, self.data[self._batches()[0]])
        log = TrainingLog(o, self.folder, read_log(self.folder, self._step) if self.epoch else ())
        with Progress(o.epochs, "training", start=self.epoch, unit="epochs") as progress:
            while self.epoch < o.epochs:
                loss = self._train_epoch()
                self.epoch += 1
                progress.update()
                if self.epoch % o.eval_step == 0 or self.epoch == o.epochs:
                    collision = self._collision_rate()
                    self._keep(loss, collision)
                    entry = {
                        "loss": loss,
                        "eval_collision": collision,
                        "learning_rate": self.scheduler.get_last_lr()[0],
                    }
                    log.add(entry | {"epoch": self.epoch, "step": self._step})
                    self.save_state()
                    words = figures({"loss": loss, "collision rate": collision})
                    best = f"(best {short(self.best['collision'])})"
                    say(f"epoch {self.epoch}/{o.epochs}  {words} {best}  {progress.left()}")
        log.close()
        result = {"epochs": self.epoch} | {f"best_{name}": figure for name, figure in self.best.items()}
        write_json(self.folder / "result.json", result)
        return result

    @property
    def _step(self) -> int:
        """Optimizer steps so far."""
        return self.scheduler.last_epoch

    def _batches(self) -> list[Tensor]:
        """One epoch's rows, shuffled. A last batch of one row joins the one before: batch norm needs two rows."""
        batches = list(torch.randperm(len(self.data), device=self.device).split(self.options.batch_size))
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def _train_epoch(self) -> float:
        """One pass over the data; returns the mean loss per row."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        levels, threshold = self.model.quantizer.levels, self.options.dead_code_threshold
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
        if threshold and self.epoch + 1 < self.options.epochs:  # the last epoch's codes are the result
            self.model.restart_dead_codes(self.data[rows], counts, threshold)
        mean = total.item() / len(self.data)
        if not np.isfinite(mean):
            raise self._diverged(f"the loss is {mean}")
        return mean

    def _collision_rate(self) -> float:
        """The collision rate of all items' nearest codes; raises `UserError` where weights have become NaN or Inf."""
        encoded = self.model.encode(self.data, self.options.batch_size)
        tensors = [encoded.last_residual, *self.model.state_dict().values()]
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            raise self._diverged("weights or latents are NaN or Inf")
        return collision_rate(encoded.codes.cpu().numpy())

    def _diverged(self, found: str) -> UserError:
        return UserError(f"{found} at epoch {self.epoch or 1}; lower --lr or raise --warmup_epochs")

    def _keep(self, loss: float, collision: float) -> None:
        """Save the weights of this evaluation: as the latest, and where they are the best."""
        names = [f"epoch_{self.epoch}"] if self.options.save_limit else []
        for name, figure in (("loss", loss), ("collision", collision)):
            if figure <= self.best[name]:
                self.best[name] = figure
                names.append(f"best_{name}")
        save_model(self.model, self.folder, names)
        kept = sorted(self.folder.glob("epoch_*.safetensors"), key=lambda path: int(path.stem.split("_")[1]))
        for path in kept[: -self.options.save_limit or None]:
            path.unlink()

    def save_state(self) -> None:
        """Write last.pt: weights, optimizer, schedule, random state, best figures, in one file."""
        state = {
            "epoch": self.epoch,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        with atomic_file(self.folder / STATE, "wb") as f:
            torch.save(state, f)

    def _load_state(self) -> bool:
        """Restore what `save_state` wrote; False if there is nothing. Raises `UserError` for a damaged file."""
        path = self.folder / STATE
        if not path.exists():
            return False
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.epoch, self.best = state["epoch"], state["best"]
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and "cuda_rng" in state:
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        except Exception as error:  # torch raises many kinds for a damaged file
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: cannot be resumed from ({reason}); remove it to train from the start") from None
        return True
