"""Semantic IDs from a quantizer: embeddings and checkpoint -> `<D>.index.json`.

    python -m rq.generate_indices --ckpt_path output/rqvae --data_path <D>.emb-minilm-td.npy \
        --output_file <D>.index.json

Codes are each level's nearest; for the very items that k-means codebooks were made of, their clusters. Collisions are
then treated by `--collision` (see `rq.collisions`). The figures before and after go to <D>.index.quality.json and .png.

    … --data_path all.emb-minilm-td.npy --append <D>.index.json --output_file new.index.json

gives SIDs to the rows beyond the old index's items alone (see `rq.append`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from minionerec.common.devices import pick_device
from minionerec.common.embeddings import digest, load_embeddings
from minionerec.common.errors import UserError
from minionerec.common.options import run
from rq.append import append_codes
from rq.build_index import build_index
from rq.checkpoints import load_model
from rq.collisions import refuse_small_codebooks
from rq.index_file import read_codes


@dataclass
class Options:
    ckpt_path: str = HfArg(
        default="", help="a .safetensors file, a folder (its best_collision.safetensors), or an .npz of codebooks"
    )
    data_path: str = HfArg(default="", help="embeddings, <D>.emb-<plm>-td.npy")
    output_file: str = HfArg(default="", help="the index to write, <D>.index.json")
    item_meta_path: str = HfArg(default="", help="<D>.item.json, to check the number of rows against")
    collision: Literal["none", "sinkhorn", "nearest_free", "extra_token"] = HfArg(
        default="nearest_free", help="what becomes of items with equal codes"
    )
    append: str = HfArg(default="", help="an index of the first rows, whose SIDs stay as they are")
    append_tokens: Literal["codebook", "used"] = HfArg(
        default="codebook", help="what the tokenizer of --append's catalog knows: the --sid_tokens of SFT"
    )
    batch_size: int = HfArg(default=20480, help="items a step")
    device: str = HfArg(default="", help="cpu, cuda, cuda:1, ...; empty: cuda if there is one")

    def __post_init__(self):
        if not self.output_file.endswith(".json"):
            raise UserError(f"--output_file is {self.output_file!r}, expected a name like <D>.index.json")
        if self.batch_size < 1:
            raise UserError(f"--batch_size is {self.batch_size}, expected at least 1")
        if self.append_tokens != "codebook" and not self.append:
            raise UserError(f"--append_tokens {self.append_tokens} is for --append")


def main(options: Options) -> None:
    o = options
    device = pick_device(o.device)
    model, config = load_model(o.ckpt_path)
    matrix = load_embeddings(o.data_path, item_meta_path=o.item_meta_path)
    in_dim = config["model"]["in_dim"]
    if matrix.shape[1] != in_dim:
        raise UserError(
            f"{o.data_path}: {matrix.shape[1]} columns, but {o.ckpt_path} was trained on {in_dim}; "
            f"give the embeddings that it was trained on, or train again"
        )
    refuse_small_codebooks([len(level.codebook) for level in model.quantizer.levels], len(matrix), o.collision)

    model, embeddings = model.to(device), torch.from_numpy(matrix).to(device)
    if o.append:
        codes = append_codes(
            model, embeddings, read_codes(o.append, "append"), o.collision, used_only=o.append_tokens == "used"
        )
        build_index(model, embeddings, o.output_file, "none", codes=torch.from_numpy(codes), batch_size=o.batch_size)
        return
    codes = config.get("codes")
    if codes is not None and (not len(codes) or config["data"]["digest"] != digest(matrix)):
        print(f"{o.ckpt_path} was not made of these embeddings: every item takes its nearest codes")
        codes = None
    build_index(
        model,
        embeddings,
        o.output_file,
        o.collision,
        codes=None if codes is None else torch.from_numpy(codes),
        batch_size=o.batch_size,
    )


if __name__ == "__main__":
    run(main, Options)
