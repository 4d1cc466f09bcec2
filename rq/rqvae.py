"""Train an RQ-VAE on item embeddings; its codes become semantic IDs (`rq.generate_indices`).

    python -m rq.rqvae --data_path <D>.emb-minilm-td.npy --ckpt_dir output/rqvae

Small catalogs on a CPU want smaller layers: the defaults are the published ones, made for a GPU. A run that was
killed goes on when started again; one that has finished is not computed again.

Departures from the published code (TIGER arXiv 2305.05065, LC-Rec 2311.09049): the residual passed on is detached from
the code alone, so every level's commitment reaches the encoder, as the formula says, where theirs cuts the gradient
after the first level; k-means initialises all levels before the first step instead of within it.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from cli import HfArg, UserError, run
from rq.embeddings import load_embeddings, pick_device
from rq.models.rqvae import RQVAE
from rq.trainer import OPTIMIZERS, Schedule, Trainer, digest, prepare_folder


@dataclass
class Options:
    # files
    data_path: str = HfArg(default="", help="embeddings, <D>.emb-<plm>-td.npy")
    ckpt_dir: str = HfArg(default="", help="folder for the checkpoints")
    overwrite: bool = HfArg(default=False, help="replace a run with other hyper-parameters in --ckpt_dir")
    save_limit: int = HfArg(default=5, help="evaluated epochs to keep beside the best; 0: none")
    # model
    layers: list[int] = HfArg(default_factory=lambda: [2048, 1024, 512, 256, 128, 64], help="hidden sizes")
    e_dim: int = HfArg(default=32, help="dimension of the code vectors")
    num_emb_list: list[int] = HfArg(default_factory=lambda: [256, 256, 256], help="codes of each level")
    beta: float = HfArg(default=0.25, help="weight of the commitment loss")
    quant_loss_weight: float = HfArg(default=1.0, help="weight of the quantisation loss")
    loss_type: Literal["mse", "l1"] = HfArg(default="mse", help="reconstruction loss")
    dropout_prob: float = HfArg(default=0.0, help="dropout before each linear layer")
    bn: bool = HfArg(default=False, help="batch norm after each linear layer but the last")
    kmeans_init: bool = HfArg(default=True, help="codebooks start from k-means on the first batch")
    kmeans_iters: int = HfArg(default=100, help="most iterations of that k-means")
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
    # machine
    seed: int = HfArg(default=2024, help="seed of weights, k-means and order")
    device: str = HfArg(default="", help="cpu, cuda, cuda:1, ...; empty: cuda if there is one")
    num_workers: int = HfArg(default=0, help="of no effect: the embeddings live on the device")

    def __post_init__(self):
        self.sk_epsilons = self.sk_epsilons or [0.0] * len(self.num_emb_list)
        rules = {
            "ckpt_dir": (bool(self.ckpt_dir), "a folder"),
            "layers": (min(self.layers) >= 1, "sizes of at least 1"),
            "e_dim": (self.e_dim >= 1, "at least 1"),
            "num_emb_list": (min(self.num_emb_list) >= 2, "at least 2 codes a level"),
            "sk_epsilons": (
                len(self.sk_epsilons) == len(self.num_emb_list) and min(self.sk_epsilons) >= 0,
                f"{len(self.num_emb_list)} values of 0 or more, one for each of --num_emb_list",
            ),
            "sk_iters": (self.sk_iters >= 1, "at least 1"),
            "kmeans_iters": (self.kmeans_iters >= 1, "at least 1"),
            "dropout_prob": (0 <= self.dropout_prob < 1, "0 or more and below 1"),
            "beta": (self.beta >= 0, "0 or more"),
            "quant_loss_weight": (self.quant_loss_weight >= 0, "0 or more"),
            "lr": (self.lr > 0, "more than 0"),
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 2, "at least 2"),
            "learner": (self.learner.lower() in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            "warmup_epochs": (self.warmup_epochs >= 0, "0 or more"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "eval_step": (self.eval_step >= 1, "at least 1"),
            "save_limit": (self.save_limit >= 0, "0 or more"),
        }
        for flag, (holds, rule) in rules.items():
            if not holds:
                raise UserError(f"--{flag} is {getattr(self, flag)!r}, expected {rule}")


def main(options: Options) -> None:
    o = options
    device = pick_device(o.device)
    embeddings = load_embeddings(o.data_path)  # (items, dim)
    if o.num_workers:
        print(f"--num_workers {o.num_workers} has nothing to load: the whole matrix is on {device}")
    if o.kmeans_init and min(o.batch_size, len(embeddings)) < max(o.num_emb_list):
        raise UserError(
            f"{o.data_path}: k-means initialisation wants a row for each code, but n={len(embeddings)} rows with "
            f"--batch_size {o.batch_size} are fewer than K={max(o.num_emb_list)}; lower --num_emb_list, raise "
            f"--batch_size, or give --kmeans_init False"
        )
    if o.warmup_epochs >= o.epochs:
        print(f"the learning rate never reaches {o.lr}: --warmup_epochs {o.warmup_epochs}, --epochs {o.epochs}")

    model_names = "layers e_dim num_emb_list beta dropout_prob bn loss_type quant_loss_weight sk_epsilons sk_iters"
    model_config = {"in_dim": embeddings.shape[1], **{name: getattr(o, name) for name in model_names.split()}}
    schedule = Schedule(**{name: getattr(o, name) for name in Schedule.__dataclass_fields__})
    config = {"architecture": "rqvae", "model": model_config, "training": schedule.hyper_parameters()}
    config["data"] = {"n_items": len(embeddings), "digest": digest(embeddings)}
    if prepare_folder(o.ckpt_dir, config, o.overwrite):
        print(f"{o.ckpt_dir}: finished before with these hyper-parameters; nothing to do")
        return

    torch.manual_seed(o.seed)
    model = RQVAE(**model_config)
    print(f"{len(embeddings)} items, {sum(p.numel() for p in model.parameters()):,} parameters, on {device}")
    result = Trainer(model, embeddings, schedule, o.ckpt_dir, device).fit()
    print(
        f"wrote {o.ckpt_dir}: least loss {result['best_loss']:.5f}, least collision rate "
        f"{result['best_collision']:.4f}, {result['epochs']} epochs in {result['seconds']} s"
    )


if __name__ == "__main__":
    run(main, Options)
