"""What stages print, in one style on a terminal and in a file:

    sft: reads output/base, data/train/x.csv                          what, from where (minionerec.common.runs)
    sft: writes output/sft
    1,682 items, 768 steps                                            how much
    step 120/768  loss .0154  valid NDCG@10 .0723 (best .0732)  4 min left
    sft: done in 312 s

Only the first process prints. Bars are drawn on a terminal only; elsewhere `Progress` prints a line every 30 s.
--quiet leaves results, notes and errors. --verbose adds details, and the warnings of libraries that are otherwise left
out because no user can act on them (`NOISE`).
"""

import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping

QUIET, NORMAL, VERBOSE = 0, 1, 2
EVERY = 30.0  # seconds between two lines of progress where there is no terminal
NOISE = {  # logger: beginnings of messages that are true of every run here, or that concern other uses of the library
    "DeepSpeed": ("Setting accelerator to CPU", "Setting ds_accelerator to", "Warning: The Accelerator is CPU"),
    "transformers.trainer": ("There were missing keys in the checkpoint model loaded: ['lm_head.weight']",),  # tied
    "torch.distributed.elastic.multiprocessing.redirects": ("NOTE: Redirects are currently not supported",),
}
WARNINGS = (  # the same for Python's warnings
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",  # saving it is tested here
)
_level = NORMAL


def configure(verbose: bool = False, quiet: bool = False) -> None:
    """Set how much is printed. Call it before libraries are imported: they read where their bars go from variables."""
    global _level
    _level = QUIET if quiet else VERBOSE if verbose else NORMAL
    if not _draws():
        for variable in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(variable, "1")
    if _level < VERBOSE:
        for name, beginnings in NOISE.items():
            logging.getLogger(name).addFilter(lambda record, noise=beginnings: _matters(record, noise))
        for beginning in WARNINGS:
            warnings.filterwarnings("ignore", message=re.escape(beginning))


def _matters(record: logging.LogRecord, noise: tuple[str, ...]) -> bool:
    """Whether a message of a logger in `NOISE` is shown: a warning or an error that is not among its `noise`."""
    return record.levelno >= logging.WARNING and not record.getMessage().startswith(noise)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _draws() -> bool:
    """Whether bars are drawn: by the first process, on a terminal."""
    return _level > QUIET and _is_first() and sys.stderr.isatty()


# ------------------------------------------------------------------------------------------------ lines


def say(text: str) -> None:
    """Print a line, unless --quiet."""
    if _level > QUIET:
        _print(text)


def detail(text: str) -> None:
    """Print a line with --verbose."""
    if _level >= VERBOSE:
        _print(text)


def note(text: str) -> None:
    """Print a line about something that the user may want to change, with --quiet too."""
    _print(f"note: {text}")


def _print(text: str) -> None:
    if not _is_first():
        return
    tqdm = sys.modules.get("tqdm.std")
    if tqdm and getattr(tqdm.tqdm, "_instances", None):
        tqdm.tqdm.write(text)  # above the bars
    else:
        print(text, flush=True)


def short(value: float) -> str:
    """A figure for a line: four decimals below 1, else three digits.

    >>> [short(x) for x in (0.0154, -4.934, 0.008, 0, 12.34, 768, 2e-5)]
    ['.0154', '-4.93', '.008', '0', '12.3', '768', '2e-05']
    """
    if abs(value) >= 1000:
        return f"{value:.0f}"
    if abs(value) >= 1 or value != value or 0 < abs(value) < 1e-4:
        return f"{value:.3g}"
    text = f"{value:.4f}".rstrip("0").rstrip(".")
    return text.replace("0.", ".", 1)


def figures(values: Mapping[str, float]) -> str:
    """Figures with their names, for a line: `loss .0154  reward -4.93`."""
    return "  ".join(f"{name} {short(value)}" for name, value in values.items())


def duration(seconds: float) -> str:
    """`45 s`, `5 min`, `3.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ------------------------------------------------------------------------------------------------ progress


class Progress:
    """How far a loop of `total` steps is, and when it will end: a bar on a terminal, elsewhere a line every 30 s."""

    def __init__(self, total: int, what: str, start: int = 0, unit: str = ""):
        """what: what is being done; start: steps of an earlier run; unit: what a step is."""
        self.total, self.what, self.start, self.unit, self.done = total, what, start, unit, start
        self.began = self.printed = time.perf_counter()
        self.bar = None
        if _draws():
            from tqdm import tqdm

            layout = "{desc} {n_fmt}/{total_fmt} {unit} {bar:24} {elapsed}, {remaining} left"
            self.bar = tqdm(
                total=total, initial=start, desc=what, unit=unit, bar_format=layout, leave=False, disable=False
            )

    def update(self, steps: int = 1) -> None:
        self.done += steps
        if self.bar is not None:
            self.bar.update(steps)
        elif time.perf_counter() - self.printed > EVERY:
            self.printed = time.perf_counter()
            of = f"{self.done}/{self.total} {self.unit}".rstrip()
            say(f"{self.what} {of}  {duration(self.printed - self.began)}, {self.left()}")

    def seconds_left(self) -> float | None:
        """Seconds until the end at the speed so far; None before the first step."""
        done = self.done - self.start
        return (time.perf_counter() - self.began) / done * (self.total - self.done) if done > 0 else None

    def left(self) -> str:
        """`5 min left`; empty before the first step."""
        seconds = self.seconds_left()
        return "" if seconds is None else f"{duration(seconds)} left"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def track(steps: Iterable, what: str, total: int | None = None, unit: str = "") -> Iterator:
    """Iterate over `steps` with a `Progress`."""
    with Progress(len(steps) if total is None else total, what, unit=unit) as progress:
        for step in steps:
            yield step
            progress.update()
