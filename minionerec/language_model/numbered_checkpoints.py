"""The `checkpoint-N` folders of a training run: written, resumed from, removed.

Each has the files of the Trainer, prompt.yaml and minionerec.json (language_model/checkpoints.py), and a manifest.json: the
run that made it, and its files. A run resumes from and removes only what it made itself, and resumes only from a folder
whose files are those of the manifest.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import TrainerCallback

from minionerec.common import runs
from minionerec.common.console import note
from minionerec.common.errors import UserError
from minionerec.common.files import write_json
from minionerec.language_model.checkpoints import Settings, first_line, save_settings

IDENTITY = ("stage", "settings", "inputs")  # of a record: what a run is compared by
REQUIRED = ("*model*.*", "optimizer*", "scheduler.pt")  # what a checkpoint-N without a manifest must have
DIGESTED_BELOW = 64 * 2**20  # bytes of a file


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-N` folders of a run, by N. Folders with another name, such as checkpoint-good, are not among them."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(filter(Path.is_dir, found), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(output_dir: str | Path, record: Mapping) -> str | None:
    """The newest complete `checkpoint-N` that the run of `record` made. Those that are passed over get a note each."""
    for checkpoint in reversed(list_checkpoints(output_dir)):
        if not is_of_run(checkpoint, record):
            note(f"{checkpoint} was not made by this run; it is neither resumed from nor removed")
        elif reason := defect(checkpoint):
            note(f"{checkpoint} is not complete ({reason}) and is not used")
        else:
            return str(checkpoint)
    return None


def begin_manifest(checkpoint: Path, record: Mapping) -> None:
    """Mark a `checkpoint-N` that is to be written as one of this run; what another has put there moves to its name.1."""
    if checkpoint.exists() and not is_of_run(checkpoint, record) and any(checkpoint.iterdir()):
        [(_, new)] = runs.move_aside([checkpoint], "")
        note(f"{checkpoint} was not made by this run, which writes there; it moves to {new}")
    _write_manifest(checkpoint, record)


def complete_manifest(checkpoint: Path, record: Mapping) -> None:
    """Write down the files of a `checkpoint-N`: sizes, and digests of those that are read in no time."""
    found = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.name != runs.MANIFEST)
    _write_manifest(checkpoint, record, {str(file.relative_to(checkpoint)): _figures(file) for file in found})


def _write_manifest(checkpoint: Path, record: Mapping, files: Mapping | None = None) -> None:
    identity = {key: record[key] for key in IDENTITY}
    content = {"run": record["id"], "step": _step(checkpoint), "identity": identity, "files": files}
    write_json(checkpoint / runs.MANIFEST, content)


def _figures(file: Path) -> list:
    size = file.stat().st_size
    return [size, runs.digest(file) if size < DIGESTED_BELOW else ""]


def is_of_run(checkpoint: Path, record: Mapping) -> bool:
    """Whether the run of `record` made this folder: not another run, nor a copy of another `checkpoint-N`."""
    found = runs.read_record(checkpoint / runs.MANIFEST)
    return bool(found) and (found.get("run"), found.get("step")) == (record["id"], _step(checkpoint))


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a training can resume from a `checkpoint-N`."""
    return not defect(checkpoint)


def defect(checkpoint: str | Path) -> str:
    """What keeps a training from being resumed from a `checkpoint-N`: a file that is missing or has changed."""
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "no such folder"
    found = runs.read_record(checkpoint / runs.MANIFEST)
    if not found:
        return _defect_without_manifest(checkpoint)
    if not found.get("files") or not isinstance(found["files"], dict):
        return "it was not written to its end"
    for name, figures in found["files"].items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if _figures(checkpoint / name) != figures:
            return f"{name} has changed"
    return ""


def _defect_without_manifest(checkpoint: Path) -> str:
    """As `defect`, of a checkpoint of an earlier version: its state, which is written last, and its tensors are whole."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        tensors = [file for file in checkpoint.rglob("*") if file.suffix in (".safetensors", ".pt", ".pth")]
        cut = [file.name for file in tensors if not _is_whole(file)]
    except (OSError, ValueError):
        return "trainer_state.json or a file of weights cannot be read"
    if not isinstance(state, dict) or "global_step" not in state:
        return "trainer_state.json has no global_step"
    zero = any(checkpoint.glob("global_step*/*"))  # DeepSpeed has weights, optimizer and schedule there
    missing = [name for name in REQUIRED if not zero and not any(checkpoint.glob(name))]
    return f"{cut[0]} is cut off" if cut else f"{missing[0]} is missing" if missing else ""


def _is_whole(file: Path) -> bool:
    """Whether a file of safetensors or of `torch.save` has the length that it says it has."""
    if file.suffix != ".safetensors":
        return zipfile.is_zipfile(file)
    with open(file, "rb") as f:
        header = int.from_bytes(f.read(8), "little")
        tensors = json.loads(f.read(header))
    ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
    return file.stat().st_size == 8 + header + max(ends, default=0)


def resume_point(output_dir: str | Path, given: str, run: runs.Run) -> str | None:
    """The checkpoint to resume from: `given` (--resume_from_checkpoint), else the newest one of a run to resume, or None.

    Raises `UserError` for a given one that is not complete, or whose run had other settings or inputs.
    """
    if not given:
        return last_checkpoint(output_dir, run.record) if run.resume else None
    if reason := defect(given):
        raise UserError(
            f"--resume_from_checkpoint {given}: found no complete checkpoint ({reason}); give a checkpoint-N folder"
        )
    parent = Path(given).resolve().parent
    found = runs.read_record(Path(given) / runs.MANIFEST).get("identity")
    if not found and parent != Path(output_dir).resolve():  # whose record this run has just written
        found = runs.read_record(parent / runs.RECORD)
    identity = {key: run.record[key] for key in IDENTITY}
    if not isinstance(found, dict) or not found:
        note(f"{given} has no record of its run; its settings are not compared")
    elif any(found.get(key) != identity[key] for key in IDENTITY):
        raise UserError(
            f"--resume_from_checkpoint {given}: its run was another one ({runs.difference(found, identity)}); give the same "
            "options, or leave it out"
        )
    return given


@contextmanager
def resuming(checkpoint: str | Path) -> Iterator[None]:
    """Turn any error of a library that restores a training from `checkpoint` into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # they raise nearly every type for files that are damaged or of another model
        raise UserError(
            f"{checkpoint}: cannot be resumed from ({first_line(error)}); check --resume_from_checkpoint, or give "
            "--overwrite True to start over"
        ) from error


def remove_checkpoints(output_dir: str | Path, record: Mapping, keep: Iterable[str | Path | None] = ()) -> None:
    """Delete the `checkpoint-N` folders in `output_dir` that the run of `record` made, except those in `keep`."""
    kept = {Path(path).resolve() for path in keep if path}
    for path in list_checkpoints(output_dir):
        if path.resolve() not in kept and is_of_run(path, record):
            for file in [*path.iterdir()]:  # the manifest goes last: until then the folder is known as this run's
                if file.is_dir() and not file.is_symlink():
                    shutil.rmtree(file)
                elif file.name != runs.MANIFEST:
                    file.unlink()
            shutil.rmtree(path)


def begin_checkpoint(trainer) -> None:
    """Mark the `checkpoint-N` that a trainer is about to write. Every process calls it, before it writes there."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, KeepCheckpoints) and trainer.args.should_save:
            begin_manifest(Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}", callback.record)
    _wait()


def _wait() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


class KeepCheckpoints(TrainerCallback):
    """Completes each `checkpoint-N` with template, settings and manifest, and removes the run's earlier ones.

    The newest, the best and the one that the run was resumed from stay. (The Trainer's `save_total_limit` would delete
    any folder whose name begins with checkpoint-, and the one that was resumed from.)
    """

    def __init__(self, prompt_template: str | Path, settings: Settings, resumed_from: str | None, record: Mapping):
        """record: of the run, with its identity and id."""
        self.prompt_template, self.settings, self.resumed_from = prompt_template, settings, resumed_from
        self.record = record

    def on_train_begin(self, args, state, control, **kwargs):
        """Find the best checkpoint of a run whose folder has moved since."""
        step = state.best_global_step  # the Trainer forgets the path of a best checkpoint that is not there
        best = state.best_model_checkpoint or (f"checkpoint-{step}" if step else "")
        if best and not Path(best).exists():
            places = [
                Path(place) / Path(best).name for place in (args.output_dir, Path(self.resumed_from or "").parent)
            ]
            found = next((str(place) for place in places if place.exists()), None)
            if found is None:
                raise UserError(
                    f"{best}: the best checkpoint so far of {self.resumed_from} is missing; put it back, or give "
                    "--overwrite True to start over"
                )
            state.best_model_checkpoint = found

    def on_save(self, args, state, control, **kwargs):
        _wait()  # for the files of the other processes
        if not args.should_save:
            return
        newest = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_settings(newest, self.prompt_template, self.settings)
        complete_manifest(newest, self.record)
        later = [path for path in list_checkpoints(args.output_dir) if _step(path) > state.global_step]
        remove_checkpoints(
            args.output_dir, self.record, [newest, state.best_model_checkpoint, self.resumed_from, *later]
        )
