"""Names of the files around an index, and what a training folder holds.

    <D>.emb-<plm>-td.npy   embeddings
    <D>.index.json         SIDs, with <D>.index.quality.json and .png
    <D>.codebooks_….npz    codebooks of a residual k-means

The folder of a trained quantizer holds

    config.json                  architecture and hyper-parameters of the model
    best_loss.safetensors        the weights of the evaluated epoch with the lowest training loss
    best_collision.safetensors   the same by collision rate; of equal ones the latest
    epoch_<n>.safetensors        the latest `save_limit` evaluated epochs
    last.pt                      the state of an unfinished training, from which it is resumed
    result.json                  best loss and best collision rate
    run.json                     the record of the run (minionerec/common/runs.py)
"""

import glob
import re
from pathlib import Path

from minionerec.common import runs
from minionerec.common.errors import UserError
from minionerec.common.files import read_json, require_file

SUFFIX = re.compile(r"(\.emb-[^/]*-td\.npy|\.index\.json|\.[^.]*)$")
ARCHITECTURES = ("rqvae", "rqkmeans_plus")
BEST, CONFIG, STATE = "best_collision.safetensors", "config.json", "last.pt"
RESULTS = (CONFIG, "best_*.safetensors", "result.json")


def dataset_name(path: str | Path) -> str:
    """<D> of the name of embeddings or an index: `Office.2018.emb-minilm-td.npy` -> `Office.2018`."""
    return SUFFIX.sub("", Path(path).name, count=1)


def embeddings_of(dataset: str, root: str) -> Path:
    """The one `<dataset>.emb-<plm>-td.npy` in `root`; raises `UserError` where there is none or several."""
    found = sorted(require_file(root, "root").glob(f"{glob.escape(dataset)}.emb-*-td.npy"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{root}: found {names}, expected exactly one {dataset}.emb-<plm>-td.npy; give --data_path")
    return found[0]


def report_path(index: str | Path) -> Path:
    """Where the quality report of an index goes; its picture is next to it, with the suffix .png."""
    return Path(index).with_suffix(".quality.json")


def begin_training(options, stage: str) -> runs.Run:
    """The record of a training into `options.ckpt_dir`."""
    record = runs.begin(options, stage, folder=options.ckpt_dir, writes=[*RESULTS, "epoch_*.safetensors", STATE])
    state = record.path.with_name(STATE)
    if record.complete and state.exists() and _mark(state) == record.record.get("state"):
        state.unlink()  # a kill came between the two last lines of `finish_training`
    return record


def finish_training(record: runs.Run) -> None:
    """Mark a training as complete: as long as its `RESULTS` are there, since the user may delete other checkpoints."""
    state = record.path.with_name(STATE)
    record.record["state"] = _mark(state)
    record.writes = RESULTS
    record.finish()
    state.unlink(missing_ok=True)


def _mark(state: Path) -> list[int]:
    """What tells the state of this training from another file of its name."""
    return [state.stat().st_size, state.stat().st_mtime_ns] if state.exists() else []


def weights_file(path: str | Path, flag: str = "ckpt_path") -> Path:
    """The weights that `path` means: itself, or in a folder `BEST`. Raises `UserError` for an unfinished training."""
    path = require_file(path, flag)
    if not path.is_dir():
        return path
    record = runs.read_record(path / runs.RECORD)
    finished = record.get("complete") if record else not (path / STATE).exists()
    if not finished:
        raise UserError(
            f"{path}: the training there has not finished; run it again to resume it, or give one of its files, such "
            f"as epoch_<n>.safetensors, as --{flag}"
        )
    return require_file(path / BEST, flag)


def read_config(weights: str | Path, flag: str = "ckpt_path") -> dict:
    """config.json next to `weights`: {"architecture": one of `ARCHITECTURES`, "model": the arguments of its constructor}.

    Raises `UserError` where the architecture is unknown, or the model's `in_dim` or `num_emb_list` is no such thing.
    """
    path = Path(weights).with_name(CONFIG)
    config = read_json(path, flag)
    if config.get("architecture") not in ARCHITECTURES:
        raise UserError(
            f"{path}: architecture {config.get('architecture')!r}, expected one of {', '.join(ARCHITECTURES)}; "
            f"check --{flag}"
        )
    model = config.get("model")
    sizes = model.get("num_emb_list") if isinstance(model, dict) else None
    if not isinstance(sizes, list) or not sizes or not all(isinstance(n, int) for n in [*sizes, model.get("in_dim")]):
        raise UserError(f"{path}: expected model with in_dim and num_emb_list; train again or check --{flag}")
    return config
