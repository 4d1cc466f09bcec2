"""Train an RQ-VAE on item embeddings; its codes become semantic IDs (`rq.generate_indices`).

    python -m rq.rqvae --data_path <D>.emb-minilm-td.npy --ckpt_dir output/rqvae

Small catalogs on a CPU want smaller layers: the defaults are the published ones, made for a GPU. A run that was
killed goes on when started again; one that has finished is not computed again.

Departures from the published code (TIGER arXiv 2305.05065, LC-Rec 2311.09049): the residual passed on is detached from
the code alone, so every level's commitment reaches the encoder, as the formula says, where theirs cuts the gradient
after the first level; k-means initialises all levels before the first step instead of within it.
"""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from minionerec.common.devices import pick_device
from minionerec.common.embeddings import load_embeddings
from minionerec.common.errors import UserError
from minionerec.common.options import run
from rq.trainer import TrainingOptions, train


@dataclass
class Options(TrainingOptions):
    # model
    layers: list[int] = HfArg(default_factory=lambda: [2048, 1024, 512, 256, 128, 64], help="hidden sizes")
    e_dim: int = HfArg(default=32, help="dimension of the code vectors")
    num_emb_list: list[int] = HfArg(default_factory=lambda: [256, 256, 256], help="codes of each level")
    kmeans_init: bool = HfArg(default=True, help="codebooks start from k-means on the first batch")
    kmeans_iters: int = HfArg(default=100, help="most iterations of that k-means")

    def __post_init__(self):
        super().__post_init__()
        self.check(
            e_dim=(self.e_dim >= 1, "at least 1"),
            num_emb_list=(min(self.num_emb_list, default=0) >= 2, "at least 2 codes a level"),
            kmeans_iters=(self.kmeans_iters >= 1, "at least 1"),
        )
        self.spread_epsilons(len(self.num_emb_list))


def main(options: Options) -> None:
    o = options
    device = pick_device(o.device)
    embeddings = load_embeddings(o.data_path)  # (items, dim)
    if o.kmeans_init and min(o.batch_size, len(embeddings)) < max(o.num_emb_list):
        raise UserError(
            f"{o.data_path}: k-means initialisation wants a row for each code, but n={len(embeddings)} rows with "
            f"--batch_size {o.batch_size} are fewer than K={max(o.num_emb_list)}; lower --num_emb_list, raise "
            f"--batch_size, or give --kmeans_init False"
        )
    model_config = {
        "in_dim": embeddings.shape[1],
        "e_dim": o.e_dim,
        "num_emb_list": o.num_emb_list,
        **o.model_options(),
    }
    train("rqvae", model_config, embeddings, o, device)


if __name__ == "__main__":
    run(main, Options)
