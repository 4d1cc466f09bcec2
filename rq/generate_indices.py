"""Semantic IDs from a trained quantizer or codebooks: writes `<D>.index.json`.

    python -m rq.generate_indices --ckpt_path output/quickstart/rqvae \
        --data_path output/quickstart/raw/ml-100k.emb-minilm-td.npy --output_file output/ml-100k.index.json

Each item gets the nearest code of each level. The items that k-means codebooks were made from get their clusters. Then
`--collision` resolves SID collisions (see `rq.collisions`). The figures before and after go to <D>.index.quality.json
and .png.

    … --data_path all.emb-minilm-td.npy --append <D>.index.json --output_file new.index.json

keeps the SIDs of the old index and gives SIDs to the rows after its items (see `rq.append`).
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np

from minionerec.common import runs
from minionerec.common.console import note
from minionerec.common.embeddings import digest, load_embeddings
from minionerec.common.errors import UserError
from minionerec.common.options import INPUT, RUNTIME, option, run
from rq.codebooks import read_codebooks
from rq.files import CONFIG, read_config, report_path, weights_file
from rq.options import DEVICE_HELP, IndexOptions, refuse_small_codebooks


@dataclass
class Options(IndexOptions):
    ckpt_path: str = option(
        "", "a .safetensors file, a folder (its best_collision.safetensors), or an .npz of codebooks", role=INPUT
    )
    data_path: str = option("", "embeddings, <D>.emb-<plm>-td.npy", role=INPUT)
    append: str = option("", "an index of the first rows, whose SIDs are kept", role=INPUT)
    append_tokens: Literal["codebook", "used"] = option(
        "codebook", "tokens that the tokenizer of --append's catalog knows: the --sid_tokens of its SFT"
    )
    batch_size: int = option(20480, "items per step", role=RUNTIME)
    device: str = option("", DEVICE_HELP, role=RUNTIME)

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "batch_size")
        same = bool(self.append) and Path(self.append).resolve() == Path(self.output_file).resolve()
        self.check(
            append_tokens=(self.append_tokens == "codebook" or bool(self.append), "codebook without --append"),
            output_file=(not same, "another file than --append"),
        )


def index_of(options: IndexOptions, ckpt_path: str, data_path: str, **more) -> None:
    """Write the index for another command, which has made the quantizer in `ckpt_path` from `data_path`."""
    shared = {field.name: getattr(options, field.name) for field in fields(IndexOptions)}
    main(Options(ckpt_path=ckpt_path, data_path=data_path, **shared, **more))


def check(options: Options, matrix: np.ndarray) -> np.ndarray | None:
    """Raise `UserError` where the quantizer does not fit the matrix (items, dim) or the options.

    Returns the clusters (items, levels) of codebooks that were made from exactly this matrix, else None.
    """
    o, codes = options, None
    if o.ckpt_path.endswith(".npz"):
        found = read_codebooks(o.ckpt_path, "ckpt_path")
        in_dim, sizes = found.codebooks[0].shape[1], [len(book) for book in found.codebooks]
        if len(found.codes) and found.digest == digest(matrix):
            codes = found.codes
        else:
            note(f"{o.ckpt_path} was not made from these embeddings: every item takes its nearest codes")
    else:
        model = read_config(o.ckpt_path)["model"]
        in_dim, sizes = model["in_dim"], model["num_emb_list"]
    if matrix.shape[1] != in_dim:
        raise UserError(
            f"{o.data_path}: {matrix.shape[1]} columns, but {o.ckpt_path} was trained on {in_dim}; "
            f"give the embeddings that it was trained on, or train again"
        )
    refuse_small_codebooks(sizes, len(matrix), o.collision)
    return codes


def main(options: Options) -> None:
    options.require("ckpt_path", "data_path", "output_file")
    o = replace(options, ckpt_path=str(weights_file(options.ckpt_path)))
    matrix = load_embeddings(o.data_path, item_meta_path=o.item_meta_path)
    codes = check(o, matrix)
    report = report_path(o.output_file)
    record = runs.begin(
        o,
        "generate_indices",
        files=[o.output_file, report, report.with_suffix(".png")],
        inputs={} if o.ckpt_path.endswith(".npz") else {"config": Path(o.ckpt_path).with_name(CONFIG)},
    )
    if record.complete:
        return

    import torch

    from minionerec.common.devices import pick_device
    from rq.append import append_codes
    from rq.build_index import build_index
    from rq.checkpoints import load_model
    from rq.index_file import read_codes

    model = load_model(o.ckpt_path).to(pick_device(o.device))
    embeddings, collision = torch.from_numpy(matrix).to(model.device), o.collision
    if o.append:
        old, used_only = read_codes(o.append, "append"), o.append_tokens == "used"
        codes, collision = append_codes(model, embeddings, old, o.collision, used_only=used_only), "none"
    build_index(model, embeddings, o.output_file, collision, codes=codes, batch_size=o.batch_size)
    record.finish()


if __name__ == "__main__":
    run(main, Options)
