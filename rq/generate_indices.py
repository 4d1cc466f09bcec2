"""Semantic IDs from a trained quantizer: embeddings and checkpoint -> `<D>.index.json`.

    python -m rq.generate_indices --ckpt_path output/rqvae --data_path <D>.emb-minilm-td.npy \
        --output_file <D>.index.json

Codes are each level's nearest; collisions are then treated by `--collision` (see `rq.sid_index`). The figures before
and after go to `<output_file without .json>.quality.json`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cli import HfArg, UserError, run, write_json
from rq.embeddings import load_embeddings, pick_device
from rq.sid_index import quality, resolve, write_index
from rq.trainer import load_model


@dataclass
class Options:
    ckpt_path: str = HfArg(default="", help="a .safetensors file, or a folder: its best_collision.safetensors")
    data_path: str = HfArg(default="", help="embeddings, <D>.emb-<plm>-td.npy")
    output_file: str = HfArg(default="", help="the index to write, <D>.index.json")
    item_meta_path: str = HfArg(default="", help="<D>.item.json, to check the number of rows against")
    collision: Literal["none", "sinkhorn", "nearest_free", "extra_token"] = HfArg(
        default="nearest_free", help="what becomes of items with equal codes"
    )
    batch_size: int = HfArg(default=20480, help="items a step")
    device: str = HfArg(default="", help="cpu, cuda, cuda:1, ...; empty: cuda if there is one")

    def __post_init__(self):
        if not self.output_file.endswith(".json"):
            raise UserError(f"--output_file is {self.output_file!r}, expected a name like <D>.index.json")
        if self.batch_size < 1:
            raise UserError(f"--batch_size is {self.batch_size}, expected at least 1")


def main(options: Options) -> None:
    device = pick_device(options.device)
    model, config = load_model(options.ckpt_path)
    embeddings = load_embeddings(options.data_path, item_meta_path=options.item_meta_path)
    in_dim = config["model"]["in_dim"]
    if embeddings.shape[1] != in_dim:
        raise UserError(
            f"{options.data_path}: {embeddings.shape[1]} columns, but {options.ckpt_path} was trained on {in_dim}; "
            f"give the embeddings that it was trained on, or train again"
        )

    encoded = model.to(device).encode(torch.from_numpy(embeddings).to(device), options.batch_size)
    codes, residuals = encoded.codes.cpu().numpy(), encoded.last_residual.cpu().numpy()
    codebook = model.quantizer.levels[-1].codebook.detach().cpu().numpy()
    resolved = resolve(codes, options.collision, residuals, codebook)

    before, after = quality(codes), quality(resolved)
    output = Path(options.output_file)
    write_json(output.with_suffix(".quality.json"), {"collision": options.collision, "before": before, "after": after})
    write_index(output, resolved)
    print(
        f"wrote {output}: {after['n_items']} items, {after['distinct_sids']} SIDs; collision rate "
        f"{before['collision_rate']:.4f} before, {after['collision_rate']:.4f} after {options.collision}; "
        f"codes used {before['codes_used']}, perplexity {before['perplexity']}"
    )


if __name__ == "__main__":
    run(main, Options)
