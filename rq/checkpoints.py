"""Checkpoints of the quantizers: weights in safetensors, and architecture and hyper-parameters in config.json."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, write_json
from rq.codebooks import read_codebooks
from rq.files import ARCHITECTURES, CONFIG, read_config, weights_file
from rq.models.rq import Codebooks, ResidualModel
from rq.models.rqvae import RQVAE, RQKMeansPlus

MODELS = dict(zip(ARCHITECTURES, (RQVAE, RQKMeansPlus), strict=True))
MISFITS = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError, MemoryError)


def save_model(model: RQVAE, folder: Path, names: Sequence[str]) -> None:
    """Write config.json (a key of `ARCHITECTURES`, constructor arguments) and the weights as <name>.safetensors."""
    [architecture] = [name for name, kind in MODELS.items() if type(model) is kind]
    write_json(folder / CONFIG, {"architecture": architecture, "model": model.config})
    weights = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    for name in names:
        with atomic_file(folder / f"{name}.safetensors", "wb") as f:
            f.write(weights)


def load_model(path: str | Path, flag: str = "ckpt_path") -> ResidualModel:
    """The model in `path`, on the CPU: weights next to their config.json, or codebooks (.npz).

    A folder means its best_collision.safetensors. Raises `UserError` where weights or config.json are missing, broken,
    not finite, of another architecture, or of an unfinished training.
    """
    path = weights_file(path, flag)
    if path.suffix == ".npz":
        return Codebooks([torch.from_numpy(book) for book in read_codebooks(path, flag).codebooks])
    config = read_config(path, flag)
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a file of weights ({error}); train again or check --{flag}") from None
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(f"{path}: NaN or Inf in {len(bad)} of {len(weights)} tensors, first {bad[0]}; train again")
    try:
        model = MODELS[config["architecture"]](**config["model"])
        model.load_state_dict(weights)
    except MISFITS as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: does not fit its config.json ({reason}); train again or check --{flag}") from None
    return model
