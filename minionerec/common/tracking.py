"""The figures of a training: all of them in `log.jsonl` of its folder and, if asked for, in a tracker.

`--report_to wandb`, `tensorboard` or `trackio` shows the same names for every stage: `train/loss`, `eval/NDCG@10`, over
optimizer steps. A tracker is imported only if it is asked for. wandb and tensorboard write into the training's folder.
"""

import importlib.util
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from minionerec.common.console import say
from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file
from minionerec.common.options import RUNTIME, StageOptions, option

LOG_FILE = "log.jsonl"  # what a training has logged
PROJECT = "minionerec"
PACKAGES = {  # tracker: packages of which one is needed; the first is what to install
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
}
TRACKERS = ("none", *PACKAGES)


@dataclass
class TrackedOptions(StageOptions):
    """What every stage takes that trains step by step."""

    report_to: str = option("none", f"tracker of the training's figures: {', '.join(TRACKERS)}", role=RUNTIME)
    wandb_project: str = option(
        "", f"project in wandb or trackio, {PROJECT} by default; given alone, it means --report_to wandb", role=RUNTIME
    )
    wandb_run_name: str = option("", "name of the run in wandb or trackio; default: the output folder", role=RUNTIME)

    def __post_init__(self):
        super().__post_init__()
        self.report_to = self.report_to or "none"
        if self.wandb_project and self.report_to == "none":
            self.report_to = "wandb"
        self.check(report_to=(self.report_to in TRACKERS, f"one of {', '.join(TRACKERS)}"))
        packages = PACKAGES.get(self.report_to, ())
        if packages and not any(map(importlib.util.find_spec, packages)):
            raise UserError(f"--report_to {self.report_to}: not installed; pip install {packages[0]}")


# ------------------------------------------------------------------------------------------------ the log


class TrainingLog:
    """Entries {"step": 120, "loss": 0.0154, "eval_NDCG@10": 0.0723, …}: a line of `log.jsonl` and a step of the tracker."""

    def __init__(self, options: TrackedOptions, folder: str | Path, earlier: Iterable[Mapping] = ()):
        """earlier: the entries up to where a killed training is resumed; later ones will come again.

        Raises `UserError` where the folder has a `log.jsonl` that is no log of a training.
        """
        self.path, earlier = Path(folder) / LOG_FILE, list(earlier)
        if self.path.exists() and None in _entries(self.path):
            raise UserError(
                f"{self.path}: no log of a training, and would be overwritten; move it or choose another folder"
            )
        if earlier or self.path.exists():
            with atomic_file(self.path) as f:
                f.writelines(json_line(entry) for entry in earlier)
        self.tracker = open_tracker(options, folder)

    def add(self, entry: Mapping) -> None:
        """Call it before the state is saved from which a killed training resumes, so that no entry is missing then."""
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json_line(entry))
        numbers = {k: v for k, v in entry.items() if isinstance(v, int | float) and k not in ("step", "epoch")}
        if self.tracker:
            self.tracker.log({tracked_name(name): value for name, value in numbers.items()}, entry["step"])

    def close(self) -> None:
        if self.tracker:
            self.tracker.close()


def read_log(folder: str | Path, last_step: float = math.inf) -> list[dict]:
    """The entries of a folder's log up to `last_step`; none where there is no log."""
    path = Path(folder) / LOG_FILE
    entries = _entries(path) if path.exists() else []
    return [entry for entry in entries if entry is not None and entry["step"] <= last_step]


def _entries(path: Path) -> list[dict | None]:
    """The entry of each line, None for a line that is none. The last line is left out if a kill has cut it."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        entries.append(entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None)
    return entries


def json_line(entry: Mapping) -> str:
    """An entry as a line; JSON has no NaN, so a figure that is not finite becomes null."""
    entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(entry) + "\n"


def tracked_name(name: str) -> str:
    """`eval_NDCG@10` -> `eval/NDCG@10`, `loss` -> `train/loss`."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


# ------------------------------------------------------------------------------------------------ trackers


def open_tracker(options: TrackedOptions, folder: str | Path):
    """The tracker of --report_to, with `log` and `close`; None for none."""
    kinds = {"wandb": Wandb, "tensorboard": TensorBoard, "trackio": Trackio}
    return kinds[options.report_to](options, Path(folder)) if options.report_to in kinds else None


class Wandb:
    """Weights & Biases; `WANDB_MODE=offline` writes into the folder and sends nothing (`wandb sync` does, later)."""

    def __init__(self, options: TrackedOptions, folder: Path):
        import wandb

        self.run = _started(
            "wandb",
            "run `wandb login` first, or set WANDB_MODE=offline",
            lambda: wandb.init(
                **_names(options, folder),
                dir=os.environ.get("WANDB_DIR") or str(folder),
                settings=wandb.Settings(silent=True, console="off"),
            ),
        )
        say(f"wandb: {f'offline, {self.run.sync_dir}' if self.run.offline else self.run.url}")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log(dict(figures), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """trackio, with the interface of wandb; `trackio show` opens its page."""

    def __init__(self, options: TrackedOptions, folder: Path):
        import trackio

        self.trackio = trackio
        _started("trackio", "check its installation", lambda: trackio.init(**_names(options, folder)))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.trackio.log(dict(figures), step=step)

    def close(self) -> None:
        self.trackio.finish()


class TensorBoard:
    """Files for `tensorboard --logdir <folder>/tensorboard`."""

    def __init__(self, options: TrackedOptions, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            from tensorboardX import SummaryWriter
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        say(f"tensorboard: {folder / 'tensorboard'}")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def _names(options: TrackedOptions, folder: Path) -> dict:
    """Project, name and options of a run."""
    return {
        "project": options.wandb_project or PROJECT,
        "name": options.wandb_run_name or str(folder),
        "config": asdict(options),
    }


def _started(tracker: str, remedy: str, start):
    """The result of `start()`; what the tracker raises becomes one line."""
    try:
        return start()
    except Exception as error:  # trackers raise many kinds: not logged in, no network, a full disk
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"--report_to {tracker}: {reason}; {remedy}") from error
