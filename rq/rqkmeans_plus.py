"""RQ-KMeans+ (GPR, arXiv 2511.10138): an RQ-VAE that starts from the codebooks of constrained RQ-KMeans.

    python -m rq.rqkmeans_plus --data_path output/quickstart/raw/ml-100k.emb-minilm-td.npy --ckpt_dir output/plus \
        --pretrained_codebook_path output/quickstart/raw/ml-100k.codebooks_constrained.npz --layers 256 --epochs 60

z = x + MLP(x), and the last linear layer of the MLP is zero at the start. So before the first step z = x, and each item
has the nearest codes of the constrained codebooks, level by level.

The clusters of constrained RQ-KMeans (`codes` in the .npz) have bounded sizes, so an item's cluster is not always its
nearest code. No rule assigns them to a new item and no gradient keeps them, so training starts from the nearest codes.
The share of items for which both agree is printed.

Ends with the index: <D>.index.json in --ckpt_dir, or --output_file.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minionerec.common import runs
from minionerec.common.console import say
from minionerec.common.embeddings import load_embeddings
from minionerec.common.errors import UserError
from minionerec.common.options import INPUT, option, run
from rq import generate_indices
from rq.codebooks import CodebookFile, read_codebooks
from rq.files import begin_training, dataset_name, finish_training
from rq.options import IndexOptions, TrainingOptions, part, refuse_small_codebooks


@dataclass
class PlusOptions(TrainingOptions):
    """What shapes the trained quantizer."""

    pretrained_codebook_path: str = option("", "codebooks to start from, <D>.codebooks_constrained.npz", role=INPUT)
    e_dim: int = option(0, "dimension of the code vectors: that of the embeddings; 0: take it from them")
    num_emb_list: list[int] = option([], "codes of each level: those of the codebooks; default: take them from there")


@dataclass
class Options(PlusOptions, IndexOptions):
    pass


def read_start(options: PlusOptions, dim: int) -> CodebookFile:
    """The codebooks to start from; sets `e_dim`, `num_emb_list` and `sk_epsilons` to what they imply.

    Raises `UserError` where the codebooks do not match the embeddings' `dim` or the options.
    """
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
        num_emb_list=(o.num_emb_list in ([], sizes), f"{sizes}, the sizes of the codebooks"),
    )
    o.e_dim, o.num_emb_list = dim, sizes
    o.spread_epsilons(len(sizes))
    return start


def train_from(start: CodebookFile, matrix: np.ndarray, options: PlusOptions) -> None:
    """Train from the codebooks `start` on matrix (items, dim) into `--ckpt_dir`."""
    import torch

    from minionerec.common.devices import pick_device
    from rq.models.rq import Codebooks
    from rq.models.rqvae import RQKMeansPlus
    from rq.quality import variance
    from rq.trainer import train

    device, dim = pick_device(options.device), matrix.shape[1]
    books = [torch.from_numpy(book) for book in start.codebooks]
    embeddings, frozen = torch.from_numpy(matrix).to(device), Codebooks(books).to(device)
    nearest = frozen.encode(embeddings, options.batch_size).codes  # (items, levels)
    error = frozen.squared_error(embeddings, nearest, options.batch_size)[-1].item() / variance(embeddings)
    say(f"start: nearest codes, which leave {error:.4f} of the variance")
    if len(start.codes) == len(matrix):
        agree = (nearest.cpu().numpy() == start.codes).all(axis=1).mean()
        say(f"{agree:.1%} of the items have these as their clusters")

    def make_model() -> RQKMeansPlus:
        sizes = [len(book) for book in books]
        model = RQKMeansPlus(in_dim=dim, e_dim=dim, num_emb_list=sizes, **options.model_options())
        model.quantizer.load_codebooks(books)
        return model

    train(make_model, matrix, options)


def main(options: Options) -> None:
    options.require("data_path", "ckpt_dir", "pretrained_codebook_path")
    o = options
    matrix = load_embeddings(o.data_path, item_meta_path=o.item_meta_path)  # (items, dim)
    start = read_start(o, matrix.shape[1])
    refuse_small_codebooks([len(book) for book in start.codebooks], len(matrix), o.collision)
    o.output_file = o.output_file or str(Path(o.ckpt_dir) / f"{dataset_name(o.data_path)}.index.json")
    runs.refuse_unknown(o, o.output_file)
    record = begin_training(part(o, PlusOptions), "rqkmeans_plus")
    if not record.complete:
        train_from(start, matrix, o)
        finish_training(record)
    generate_indices.index_of(o, o.ckpt_dir, o.data_path, batch_size=o.batch_size, device=o.device)


if __name__ == "__main__":
    run(main, Options)
