"""One data set with different SIDs, as data set folders for the `sids` key of the plans of benchmarks/experiments.py.

    python -m benchmarks.sid_variants --dataset_dir data/industrial --embeddings Industrial.emb-minilm-td.npy \\
        --baseline_path output/sasrec --output_dir output/sids/industrial

Writes a folder in the published layout for each of --variants. The number at the end of a name is the number of levels:

    text2        constrained RQ-KMeans on the text embeddings
    behaviour2   on the baseline's item embeddings
    fused2       on both, joined by rq/fuse_embeddings.py at its default weights
    permuted2    fused2 with its SIDs permuted among the items: the same tree, no meaning
    random2      codes drawn uniformly, distinct SIDs
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.dataset import files_of
from minionerec.common.errors import UserError
from minionerec.common.options import INPUT, OUTPUT, option, run
from rq.index_file import read_codes, write_index

WEIGHTS = {"text": (1.0, 0.0), "behaviour": (0.0, 1.0), "fused": (0.5, 1.0)}  # of text, of behaviour
VARIANTS = "text2,text3,behaviour2,fused2,fused3,fused4,permuted2,random2"


@dataclass
class Options:
    dataset_dir: str = option("", "a folder in the published layout", role=INPUT)
    embeddings: str = option("", "text embeddings, <D>.emb-<plm>-td.npy", role=INPUT)
    baseline_path: str = option("", "folder of sasrec.sh, trained on this data", role=INPUT)
    output_dir: str = option("", "folder that gets a folder for each variant", role=OUTPUT)
    variants: str = option(VARIANTS, "which ones, separated by commas")
    k: int = option(256, "codes of a level")
    seed: int = option(42, "seed of clustering, permutation and random codes")


def call(module: str, **options) -> None:
    """Run `python -m module --name value …`; raises `UserError` where it fails."""
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", module, *arguments]
    if subprocess.run(command).returncode:
        raise UserError(f"{' '.join(command)} failed; see its message above")


def make(options: Options, name: str) -> None:
    kind, levels, folder = name[:-1], int(name[-1]), Path(options.output_dir) / name
    data, index = files_of(options.dataset_dir), folder / "D.index.json"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "D.item.json").write_bytes(Path(data.items).read_bytes())
    n_items = len(json.loads(Path(data.items).read_text(encoding="utf-8")))
    rng = np.random.default_rng(options.seed)
    if kind in WEIGHTS:
        text_weight, behaviour_weight = WEIGHTS[kind]
        vectors = folder / "D.emb-fused-td.npy"
        call(
            "rq.fuse_embeddings", data_path=options.embeddings, baseline_path=options.baseline_path,
            train_file=data.train, info_file=data.info, output_file=vectors, text_weight=text_weight,
            behaviour_weight=behaviour_weight,
        )  # fmt: skip
        call("rq.rqkmeans_constrained", data_path=vectors, output_file=index, k=options.k, l=levels, seed=options.seed)
    elif kind == "permuted":
        codes = read_codes(Path(options.output_dir) / f"fused{levels}" / "D.index.json", "output_dir")
        write_index(index, codes[rng.permutation(n_items)])
    else:
        codes = np.unique(rng.integers(options.k, size=(4 * n_items, levels)), axis=0)
        write_index(index, rng.permutation(codes)[:n_items])
    call(
        "convert_dataset", dataset_name="D", data_dir=folder, csv_dir=options.dataset_dir, output_dir=folder,
        max_history=20,
    )  # fmt: skip


def main(options: Options) -> None:
    for name in ("dataset_dir", "embeddings", "baseline_path", "output_dir"):
        if not getattr(options, name):
            raise UserError(f"--{name} is required")
    for name in options.variants.split(","):
        if name[:-1] not in (*WEIGHTS, "permuted", "random") or name[-1] not in "123456789":
            raise UserError(f"--variants {options.variants}: no variant {name!r}, expected some of {VARIANTS}")
    for name in options.variants.split(","):
        make(options, name)


if __name__ == "__main__":
    run(main, Options)
