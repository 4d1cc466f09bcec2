"""Training of the sequential baselines, and the ranks of a baseline's targets.

Every baseline ranks all items of the catalog. Test is scored once, with the epoch that was best on valid.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from minionerec.baselines.models import MODELS, SequentialModel
from minionerec.baselines.options import BaselineOptions, filter_heights
from minionerec.catalog.catalog import Catalog, target_counts
from minionerec.catalog.windows import chain, windows
from minionerec.common.console import Progress, duration, figures, say, short
from minionerec.common.devices import pick_device
from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file
from minionerec.common.tracking import TrainingLog, read_log
from minionerec.evaluation.metrics import table
from minionerec.evaluation.protocols import by_scores

MAX_GRADIENT_NORM = 5.0
SAMPLED_FROM = 4_000  # items of the smallest catalog that is trained with sampled negatives by default
Scorer = Callable[[Sequence[Sequence[int]]], np.ndarray]  # histories, oldest first -> scores (rows, items)


class Fit(NamedTuple):
    """A trained model with the weights of its best epoch."""

    model: SequentialModel
    ndcg: float  # valid NDCG@10 by item, in the headline protocol
    epoch: int  # counted from 1


def build(options: BaselineOptions, n_items: int, features: torch.Tensor | None = None) -> SequentialModel:
    """The untrained model of `options`; weights depend on the seed only. features: (items, dim), or None."""
    torch.manual_seed(options.seed)
    kind = MODELS[options.model]
    values = asdict(options) | {"filter_sizes": filter_heights(options.filter_sizes)}
    common = ("max_history", "hidden_size", "dropout", "tie_embeddings")
    return kind(n_items=n_items, features=features, **{name: values[name] for name in (*common, *kind.sizes)})


class Batches:
    """Windows of whole sequences as (items, targets), both (rows, length); windows of about equal length together."""

    def __init__(self, train: pl.DataFrame, max_history: int, n_items: int, batch_size: int):
        self.sequences = chain(train)
        self.windows = windows(self.sequences, max_history + 1)
        self.n_items, self.batch_size = n_items, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.windows.begin) / self.batch_size)

    def epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One pass in random order, drawn from torch's generator."""
        lengths = self.windows.end - self.windows.begin
        order = get_length_grouped_indices(lengths.tolist(), self.batch_size, mega_batch_mult=20)
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        for batch in torch.randperm(len(batches)).tolist():
            yield self.tensors(np.array(batches[batch]))

    def tensors(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of these windows; an item without a history is predicted from padding, in its own row."""
        begin, end, context = (array[rows] for array in self.windows)
        place = np.arange(max(2, (end - begin).max()))  # of an item in its window
        items = self.sequences.items[np.minimum(begin[:, None] + place, len(self.sequences.items) - 1)]
        items[place >= (end - begin)[:, None]] = self.n_items
        inputs, targets = items[:, :-1], np.where(place >= context[:, None], items, self.n_items)[:, 1:]
        firsts = items[context == 0, 0]
        alone = np.full((2, len(firsts), inputs.shape[1]), self.n_items)
        alone[1, :, 0] = firsts
        both = np.concatenate([inputs, alone[0]]), np.concatenate([targets, alone[1]])
        return torch.from_numpy(both[0]), torch.from_numpy(both[1])


def fit(
    options: BaselineOptions,
    train: pl.DataFrame,
    valid: pl.DataFrame,
    catalog: Catalog,
    *,
    protocol: str = "all",
    features: torch.Tensor | None = None,
    state_file: Path | None = None,
    run_id: str = "",
) -> Fit:
    """Train the model of `options` on whole sequences; keep the epoch with the best valid NDCG@10. Test is not used.

    protocol: the headline protocol, in which epochs are scored; state_file: where the state is kept after each epoch; a
    file that is there is resumed, and gives the result of an unbroken run. run_id: the file's mark; another is refused.
    """
    if options.loss == "bce" and catalog.n_items <= 2 * options.max_history:
        raise UserError(f"--loss bce: {catalog.n_items} items may all be in one row, so none is negative; use ce")
    device, n_items = pick_device(options.device), catalog.n_items
    loss = options.loss or ("ce" if n_items < SAMPLED_FROM else "sampled_softmax")
    model = build(options, n_items, features)
    if options.popularity_bias:
        model.start_from_popularity(target_counts(train, n_items))
    model.to(device)
    batches = Batches(train, options.max_history, n_items, options.batch_size)
    valid = valid.sample(min(len(valid), options.eval_rows), seed=options.seed) if options.eval_rows > 0 else valid
    parameters = list(model.parameters())
    matrices = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay}]
    vectors = [{"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(matrices + vectors, lr=options.learning_rate, betas=(0.9, 0.98))
    say(
        f"{sum(p.numel() for p in parameters):,} parameters, {len(batches)} steps an epoch, loss {loss}, on {device}; "
        f"at most {options.epochs} epochs and {options.time_budget:.0f} s"
    )

    state = State(model, optimizer, state_file, run_id)
    state.load()
    log = state_file and TrainingLog(
        options, state_file.parent, read_log(state_file.parent, state.epoch * len(batches))
    )
    started = time.monotonic() - state.seconds
    for epoch in range(state.epoch + 1, options.epochs + 1):
        if state.over(options):
            break
        model.train()
        total = torch.zeros((), device=device)
        progress = Progress(len(batches), f"epoch {epoch}", unit="steps")
        for items, targets in batches.epoch():
            value = model.loss(items.to(device), targets.to(device), kind=loss, negatives=options.negatives)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimizer.step()
            total += value.detach()
            progress.update()
        progress.close()
        if not torch.isfinite(total) or not model.scores(valid["history"].head(1).to_list()).isfinite().all():
            raise UserError(
                f"epoch {epoch}: the loss is {total.item():.3g}, and training diverged; lower --learning_rate"
            )
        ndcg = table(by_scores(scorer(model), valid, catalog, names=[protocol])[protocol].item)["NDCG@10"]
        seconds = time.monotonic() - started
        entry = {"loss": total.item() / len(batches), "eval_NDCG@10": ndcg, "seconds": seconds}
        if log:
            log.add(entry | {"epoch": epoch, "step": epoch * len(batches)})
        state.add(epoch, ndcg, seconds)
        words = figures({"loss": entry["loss"], "valid NDCG@10": ndcg})
        left = duration(state.most_seconds_left(options))
        say(f"epoch {epoch}/{options.epochs}  {words} (best {short(state.best)})  at most {left} left")
    if log:
        log.close()
    if state.out_of_time(options):
        say(f"--time_budget {options.time_budget:.0f}: stopped after {state.epoch} epochs")
    model.load_state_dict(state.best_weights)
    return Fit(model, state.best, state.best_epoch)


class State:
    """The progress of a training: its best epoch, and in `path`, if given, all that a killed run needs to resume."""

    FIGURES = ("epoch", "seconds", "best", "best_epoch", "best_weights")

    def __init__(self, model: SequentialModel, optimizer: torch.optim.Optimizer, path: Path | None, run_id: str = ""):
        self.model, self.optimizer, self.path, self.run_id = model, optimizer, path, run_id
        self.epoch, self.seconds = 0, 0.0
        self.best, self.best_epoch, self.best_weights = -1.0, 0, {}

    def add(self, epoch: int, ndcg: float, seconds: float) -> None:
        """Count an epoch with this valid NDCG@10; seconds: of training so far."""
        self.epoch, self.seconds = epoch, seconds
        if ndcg > self.best:
            weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self.best, self.best_epoch, self.best_weights = ndcg, epoch, weights
        if self.path:
            values = {name: getattr(self, name) for name in (*self.FIGURES, "run_id")}
            values |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            values["random"] = torch.get_rng_state()
            with atomic_file(self.path, "wb") as f:
                torch.save(values, f)

    def load(self) -> None:
        """Resume from `path`, if it is there. Raises `UserError` for a file that is damaged, or that another run wrote."""
        if not self.path or not self.path.exists():
            return
        try:
            values = torch.load(self.path, map_location="cpu", weights_only=True)
            if values["run_id"] != self.run_id:
                raise ValueError("another run wrote it")
            self.model.load_state_dict(values["model"])
            self.optimizer.load_state_dict(values["optimizer"])
            torch.set_rng_state(values["random"])
            vars(self).update({name: values[name] for name in self.FIGURES})
        except Exception as error:  # torch raises many kinds for a damaged file
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"{self.path}: cannot be resumed from ({reason}); move it away to train from the start"
            ) from None
        say(f"resumed after epoch {self.epoch}, from {self.path}")

    def out_of_time(self, options: BaselineOptions) -> bool:
        """Whether another epoch would exceed --time_budget."""
        return bool(options.time_budget and self.epoch) and self.seconds * (1 + 1 / self.epoch) > options.time_budget

    def most_seconds_left(self, options: BaselineOptions) -> float:
        """Seconds of the epochs that are left, or of the time budget if that ends before; early stopping may come first."""
        by_epochs = self.seconds / self.epoch * (options.epochs - self.epoch)
        return max(0.0, min(by_epochs, options.time_budget - self.seconds)) if options.time_budget else by_epochs

    def over(self, options: BaselineOptions) -> bool:
        patience_is_over = options.early_stop and self.epoch - self.best_epoch >= options.early_stop
        return bool(patience_is_over) or self.out_of_time(options)


def scorer(model: SequentialModel) -> Scorer:
    return lambda histories: model.scores(histories).cpu().numpy()
