"""TODO."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from minionerec.common.errors import UserError
from minionerec.common.files import read_json, require_file
from rq.codebooks import read_codebooks
from rq.models.rq import Codebooks
from rq.models.rqvae import RQVAE, RQKMeansPlus

ARCHITECTURES = {"rqvae": RQVAE, "rqkmeans_plus": RQKMeansPlus}


def load_model(path: str | Path, flag: str = "ckpt_path") -> tuple[nn.Module, dict]:
    """The model in `path` and its config; a folder means its best_collision.safetensors.

    An .npz of codebooks is a model too; its config has the `codes` (items, levels) of the items that it was made of.
    Raises `UserError` if weights or config.json are missing, broken, or of another architecture.
    """
    path = require_file(path, flag)
    if path.suffix == ".npz":
        found = read_codebooks(path, flag)
        config = {"model": {"in_dim": found.codebooks[0].shape[1]}, "data": {"digest": found.meta.get("digest")}}
        return Codebooks([torch.from_numpy(book) for book in found.codebooks]), config | {"codes": found.codes}
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
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError, OSError) as error:
        raise UserError(f"{path}: does not fit its config.json ({error}); train again or check --{flag}") from None
    return model, config
