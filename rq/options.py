"""Options that several commands of rq/ share, each defined once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from minionerec.common.errors import UserError
from minionerec.common.files import require_file
from minionerec.common.options import INPUT, OUTPUT, RUNTIME, StageOptions, option
from minionerec.common.tracking import TrackedOptions
from rq.files import dataset_name, embeddings_of

Collision = Literal["none", "sinkhorn", "nearest_free", "extra_token"]
LEARNERS = ("adam", "adamw", "sgd", "adagrad", "rmsprop")
MOST_CODES, MOST_LEVELS = 1 << 16, 26
DEVICE_HELP = "cpu, cuda, cuda:1, …; default: cuda if there is a GPU"


def part(options, group: type):
    """The options of `group` as an instance of it: what shapes one of the several results of a command."""
    return group(**{field.name: getattr(options, field.name) for field in fields(group)})


def refuse_small_codebooks(sizes: Sequence[int], n_items: int, collision: str) -> None:
    """Raise `UserError` where each item must get one of the SIDs of codebooks of `sizes`, and there are too few SIDs."""
    if math.prod(sizes) < n_items and collision == "nearest_free":
        raise UserError(
            f"{' x '.join(map(str, sizes))} codes make {math.prod(sizes)} SIDs, fewer than the {n_items} items; give more "
            f"levels or codes, or --collision extra_token (or none, which lets items share a SID)"
        )


@dataclass
class IndexOptions(StageOptions):
    """What each command takes that writes an index."""

    output_file: str = option("", "index to write, <D>.index.json; its quality report goes next to it", role=OUTPUT)
    item_meta_path: str = option("", "<D>.item.json: refuses embeddings of another number of items", role=RUNTIME)
    collision: Collision = option(
        "nearest_free",
        "how SID collisions are resolved: not at all; Sinkhorn on the last level; the nearest free code of the last "
        "level; one more token",
    )

    def __post_init__(self):
        super().__post_init__()
        is_json = not self.output_file or self.output_file.endswith(".json")
        self.check(output_file=(is_json, "a name like <D>.index.json"))


@dataclass
class ClusteringOptions(StageOptions):
    """What shapes the codebooks of a residual k-means."""

    # data
    dataset: str = option("", "<D>: the embeddings are <root>/<D>.emb-*-td.npy", role=RUNTIME)
    root: str = option("", "folder of the embeddings; the results are written there", role=RUNTIME)
    data_path: str = option("", "embeddings (items, dim), instead of --dataset and --root", role=INPUT)
    codebook_path: str = option("", "codebooks; default <D>.codebooks_<method>.npz next to the index", role=OUTPUT)
    # clustering
    k: int = option(256, f"codes per level, 2 to {MOST_CODES}")
    l: int = option(3, f"levels, 1 to {MOST_LEVELS}")  # noqa: E741 (the published name)
    max_iter: int = option(100, "most iterations of the k-means of a level")
    seed: int = option(42, "seed of the starting centres")

    def __post_init__(self):
        super().__post_init__()
        self.check(
            k=(2 <= self.k <= MOST_CODES, f"2 to {MOST_CODES}"),
            l=(1 <= self.l <= MOST_LEVELS, f"1 to {MOST_LEVELS}"),
            seed=(self.seed + self.l <= 2**31, f"0 to {2**31 - self.l}"),
        )
        self.at_least(1, "max_iter")
        self.plain_names("dataset")


@dataclass
class KMeansOptions(IndexOptions, ClusteringOptions):
    """What the commands of residual k-means take: codebooks, then the index."""

    def name_files(self, method: str) -> None:
        """Set the paths that are not given: the embeddings, the index, the codebooks."""
        if bool(self.dataset and self.root) == bool(self.data_path):
            raise UserError("either --dataset and --root, or --data_path, is required, not both")
        path = require_file(self.data_path, "data_path") if self.data_path else embeddings_of(self.dataset, self.root)
        output = Path(self.output_file or path.with_name(f"{dataset_name(path)}.index.json"))
        books = Path(self.codebook_path or output.with_name(f"{dataset_name(output)}.codebooks_{method}.npz"))
        self.data_path, self.output_file, self.codebook_path = str(path), str(output), str(books)


@dataclass
class TrainingOptions(TrackedOptions):
    """What each quantizer takes that is trained by gradient descent."""

    # data
    data_path: str = option("", "embeddings, <D>.emb-<plm>-td.npy", role=INPUT)
    ckpt_dir: str = option("", "folder for the checkpoints", role=OUTPUT)
    save_limit: int = option(5, "evaluated epochs to keep in addition to the best ones", role=RUNTIME)
    # model
    layers: list[int] = option([2048, 1024, 512, 256, 128, 64], "hidden sizes of the encoder; the decoder mirrors them")
    beta: float = option(0.25, "weight of the commitment loss")
    quant_loss_weight: float = option(1.0, "weight of the quantisation loss")
    loss_type: Literal["mse", "l1"] = option("mse", "reconstruction loss")
    dropout_prob: float = option(0.0, "dropout before each linear layer")
    bn: bool = option(False, "batch norm after each linear layer except the last")
    sk_epsilons: list[float] = option(
        [], "Sinkhorn's epsilon in training, one per level; 0: nearest code; default: 0 at all levels"
    )
    sk_iters: int = option(50, "Sinkhorn rounds")
    # training
    lr: float = option(1e-3, "peak learning rate")
    epochs: int = option(10000, "passes over the items")
    batch_size: int = option(20480, "items per step")
    learner: str = option("AdamW", f"optimizer: {', '.join(LEARNERS)}, in any case")
    lr_scheduler_type: Literal["constant", "linear"] = option("constant", "learning rate after the warm-up")
    warmup_epochs: int = option(50, "epochs in which the learning rate rises from 0")
    weight_decay: float = option(1e-4, "weight decay")
    eval_step: int = option(50, "epochs between evaluations; checkpoints are written there")
    dead_code_threshold: float = option(
        0.0, "restart a code at an item's residual if fewer items used it in an epoch; 0: never"
    )
    # machine
    seed: int = option(2024, "seed of weights, k-means and order of items")
    device: str = option("", DEVICE_HELP, role=RUNTIME)
    compile: bool = option(False, "compile the training step (GPU only)", role=RUNTIME)
    num_workers: int = option(0, "ignored: the embeddings are on the device", role=RUNTIME)

    def __post_init__(self):
        super().__post_init__()
        self.learner = self.learner.lower()
        self.check(
            layers=(min(self.layers, default=0) >= 1, "sizes of at least 1"),
            dropout_prob=(0 <= self.dropout_prob < 1, "0 or more and below 1"),
            lr=(self.lr > 0, "more than 0"),
            learner=(self.learner in LEARNERS, f"one of {', '.join(LEARNERS)}"),
        )
        self.at_least(2, "batch_size")
        self.at_least(1, "sk_iters", "epochs", "eval_step")
        self.at_least(0, "beta", "quant_loss_weight", "warmup_epochs", "weight_decay")
        self.at_least(0, "dead_code_threshold", "save_limit", "num_workers")

    def spread_epsilons(self, levels: int) -> None:
        """Set `sk_epsilons` to one value per level: zeros where none is given."""
        self.sk_epsilons = self.sk_epsilons or [0.0] * levels
        fits = len(self.sk_epsilons) == levels and min(self.sk_epsilons) >= 0
        self.check(sk_epsilons=(fits, f"{levels} values of 0 or more, one per level"))

    def model_options(self) -> dict:
        """The options that a model's constructor takes under the same name."""
        names = "layers beta dropout_prob bn loss_type quant_loss_weight sk_epsilons sk_iters"
        return {name: getattr(self, name) for name in names.split()}
