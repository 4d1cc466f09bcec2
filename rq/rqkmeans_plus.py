"""RQ-KMeans+ (GPR, arXiv 2511.10138): codebooks of constrained RQ-KMeans, trained on as an RQ-VAE.

    python -m rq.rqkmeans_plus --data_path <D>.emb-minilm-td.npy --ckpt_dir output/plus \
        --pretrained_codebook_path <D>.codebooks_constrained.npz

z = x + MLP(x) with the MLP's last linear layer at zero, so before the first step z = x and every item's code is the
nearest code of the constrained codebooks, level by level: what `rq.generate_indices --ckpt_path <D>.codebooks_….npz`
gives items other than those the codebooks were made of. That is the warm start's code here. The clusters of
constrained RQ-KMeans themselves (`codes` in the .npz) are bounded in size and so not always the nearest; no rule gives
them to a new item, and no gradient keeps them, so training cannot start from them. How many items agree is printed.

Ends with the index, <D>.index.json in --ckpt_dir unless --output_file says otherwise.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from minionerec.common.devices import pick_device
from minionerec.common.embeddings import load_embeddings
from minionerec.common.errors import UserError
from minionerec.common.options import run
from rq.build_index import build_index
from rq.checkpoints import load_model
from rq.codebooks import CodebookFile, read_codebooks
from rq.collisions import refuse_small_codebooks
from rq.models.rq import Codebooks
from rq.quality import variance
from rq.trainer import TrainingOptions, train


@dataclass
class Options(TrainingOptions):
    # files
    pretrained_codebook_path: str = HfArg(default="", help="the warm start, <D>.codebooks_constrained.npz")
    output_file: str = HfArg(default="", help="the index; default <D>.index.json in --ckpt_dir")
    # model
    e_dim: int = HfArg(default=0, help="dimension of the code vectors: that of the embeddings; 0: take it from them")
    num_emb_list: list[int] = HfArg(default_factory=list, help="codes of each level: those of the codebooks; none: so")
    # SIDs
    collision: Literal["none", "sinkhorn", "nearest_free", "extra_token"] = HfArg(
        default="nearest_free", help="what becomes of items with equal codes"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.output_file and not self.output_file.endswith(".json"):
            raise UserError(f"--output_file is {self.output_file!r}, expected a name like <D>.index.json")


def warm_start(options: Options, dim: int) -> CodebookFile:
    """The codebooks, which must be as wide as the embeddings, `dim`, and as `--e_dim` and `--num_emb_list` say."""
    o = options
    start = read_codebooks(o.pretrained_codebook_path, "pretrained_codebook_path")
    sizes, width = [len(book) for book in start.codebooks], start.codebooks[0].shape[1]
    if width != dim:
        raise UserError(
            f"{o.pretrained_codebook_path}: codes of width {width}, but {o.data_path} has {dim} columns; make the "
            f"codebooks from these embeddings (rq/rqkmeans_constrained.sh)"
        )
    o.check(
        e_dim=(o.e_dim in (0, dim), f"{dim}, the width of the embeddings"),
        num_emb_list=(o.num_emb_list in ([], sizes), f"{sizes}, the codebooks' own"),
    )
    o.spread_epsilons(len(sizes))
    return start


def main(options: Options) -> None:
    o = options
    device = pick_device(o.device)
    matrix = load_embeddings(o.data_path)
    start = warm_start(o, matrix.shape[1])
    books = [torch.from_numpy(book) for book in start.codebooks]
    sizes = [len(book) for book in books]
    refuse_small_codebooks(sizes, len(matrix), o.collision)

    embeddings = torch.from_numpy(matrix).to(device)
    frozen = Codebooks(books).to(device)
    nearest = frozen.encode(embeddings, o.batch_size).codes
    error = frozen.squared_error(embeddings, nearest, o.batch_size)[-1].item() / variance(embeddings)
    print(f"warm start: nearest codes, which leave {error:.4f} of the variance")
    if len(start.codes) == len(matrix):
        agree = (nearest.cpu().numpy() == start.codes).all(axis=1).mean()
        print(f"{agree:.1%} of the items have these as their clusters")
    dim = matrix.shape[1]
    model_config = {"in_dim": dim, "e_dim": dim, "num_emb_list": sizes, **o.model_options()}
    train(
        "rqkmeans_plus",
        model_config,
        matrix,
        o,
        device,
        prepare=lambda model: model.quantizer.load_codebooks(books),
        warm_start=start.meta,
    )
    name = Path(o.data_path).name.split(".emb-")[0]
    model, _ = load_model(o.ckpt_dir, "ckpt_dir")
    output = o.output_file or Path(o.ckpt_dir) / f"{name}.index.json"
    report = build_index(model.to(device), embeddings, output, o.collision, batch_size=o.batch_size)
    print(f"after training {report['before']['reconstruction_error'][-1]:.4f} of the variance is left")


if __name__ == "__main__":
    run(main, Options)
