"""Dropout for architectures that have none in their config, and an exponential moving average of weights."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import nn
from torch.nn.functional import dropout

from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file
from minionerec.decoding.lm_head import unwrap_adapter

WEIGHTS = "trained_weights.safetensors"  # in a checkpoint whose model is the average
BRANCHES = (
    "self_attn",
    "attn",
    "attention",
    "mlp",
    "feed_forward",
    "fc2",
)  # submodules whose output joins the residual


def add_dropout(model, p: float) -> None:
    """Drop input embeddings and the output of every attention and feed-forward block with probability `p` in training.

    By forward hooks, for any decoder of transformers whose layers name their blocks as `BRANCHES` do; raises `UserError`
    for another one. Nothing changes in evaluation mode or in what is saved.
    """

    def hook(module, inputs, output):
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (dropout(output[0], p), *output[1:])
        return dropout(output, p)

    body = unwrap_adapter(model).base_model
    layers = max((m for m in body.modules() if isinstance(m, nn.ModuleList)), key=len, default=[])
    branches = [child for layer in layers for name, child in layer.named_children() if name in BRANCHES]
    if len(branches) < 2 * len(layers) or not branches:
        raise UserError(f"--dropout {p}: the layers of {type(body).__name__} have no {' or '.join(BRANCHES)}; use 0")
    for module in (model.get_input_embeddings(), *branches):
        module.register_forward_hook(hook)


class MovingAverage:
    """An exponential moving average of a model's trained weights: average = decay * average + (1 - decay) * weight.

    The decay is at most (1 + step) / (10 + step), so that the first steps do not hold on to random weights.
    """

    def __init__(self, model, decay: float):
        self.decay, self.step = decay, 0
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.weights.values()], 1 - decay)

    def save(self, folder: str | Path) -> None:
        """Write the plain weights next to a checkpoint that has the average."""
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.weights.items()}
        with atomic_file(Path(folder) / WEIGHTS, "wb") as f:
            f.write(to_safetensors(tensors, {"step": str(self.step)}))

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Restore both from a checkpoint; the model has just been given the average."""
        path = Path(folder) / WEIGHTS
        with safe_open(path, "pt") as f:
            self.step = int(f.metadata()["step"])
            for name, p in self.weights.items():
                self.average[name].copy_(p)
                p.copy_(f.get_tensor(name))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average; twice is nothing."""
        for name, p in self.weights.items():
            kept = p.detach().clone()
            p.copy_(self.average[name])
            self.average[name].copy_(kept)
