"""Train an RQ-VAE on item embeddings; `rq.generate_indices` then turns its codes into semantic IDs.

    python -m rq.rqvae --data_path output/quickstart/raw/ml-100k.emb-minilm-td.npy --ckpt_dir output/rqvae \
        --layers 256 --epochs 60 --lr 3e-3

The default sizes are the published ones, for a GPU; use smaller layers for a small catalog on a CPU. Re-running resumes a
killed training and skips a finished one.

Departures from the published code (TIGER arXiv 2305.05065, LC-Rec 2311.09049):
- The residual passed on is detached from the code only, so the commitment of every level reaches the encoder, as in the
  formula. The published code cuts the gradient after the first level.
- k-means initialises all levels before the first step, not within it.
"""

from dataclasses import dataclass

from minionerec.common.embeddings import load_embeddings
from minionerec.common.errors import UserError
from minionerec.common.options import option, run
from rq.files import begin_training, finish_training
from rq.options import MOST_CODES, TrainingOptions


@dataclass
class Options(TrainingOptions):
    e_dim: int = option(32, "dimension of the code vectors")
    num_emb_list: list[int] = option([256, 256, 256], "codes of each level")
    kmeans_init: bool = option(True, "start the codebooks from k-means on the first batch")
    kmeans_iters: int = option(100, "most iterations of that k-means")

    def __post_init__(self):
        super().__post_init__()
        sizes = self.num_emb_list or [0]
        self.check(num_emb_list=(min(sizes) >= 2 and max(sizes) <= MOST_CODES, f"2 to {MOST_CODES} codes per level"))
        self.at_least(1, "e_dim", "kmeans_iters")
        self.spread_epsilons(len(self.num_emb_list))


def main(options: Options) -> None:
    options.require("data_path", "ckpt_dir")
    o = options
    embeddings = load_embeddings(o.data_path)  # (items, dim)
    if o.kmeans_init and min(o.batch_size, len(embeddings)) < max(o.num_emb_list):
        raise UserError(
            f"{o.data_path}: k-means initialisation needs a row per code, but n={len(embeddings)} rows with "
            f"--batch_size {o.batch_size} are fewer than K={max(o.num_emb_list)}; lower --num_emb_list, raise "
            f"--batch_size, or give --kmeans_init False"
        )
    record = begin_training(o, "rqvae")
    if record.complete:
        return

    from rq.models.rqvae import RQVAE
    from rq.trainer import train

    def make_model() -> RQVAE:
        return RQVAE(in_dim=embeddings.shape[1], e_dim=o.e_dim, num_emb_list=o.num_emb_list, **o.model_options())

    def kmeans(model: RQVAE, rows) -> None:
        model.init_by_kmeans(rows, iterations=o.kmeans_iters, seed=o.seed)

    train(make_model, embeddings, o, kmeans if o.kmeans_init else None)
    finish_training(record)


if __name__ == "__main__":
    run(main, Options)
