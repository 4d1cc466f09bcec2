"""Beam search for all rows of a test set: shared among processes, and resumable after a kill.

The batches are divided into at most 256 parts. A process writes each part that it has finished to `<folder>/<part>.npz`,
with the rows that it belongs to. Batches and parts do not depend on the number of processes, so the parts of a killed run
serve any number. A part whose rows are not those of the current batches is ignored.
"""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate.utils import gather_object

from minionerec.common.console import Progress, say
from minionerec.common.files import atomic_file
from minionerec.common.processes import on_main_process
from minionerec.decoding.beam_search import Beams, length_batches
from minionerec.decoding.engine import Engine

PARTS = 256


class Predictions(NamedTuple):
    """What one search found for each row."""

    sid_rows: np.ndarray  # (rows, beams) rows of the catalog's SIDs, best first, -1 where there are no more
    scores: np.ndarray  # (rows, beams) nats


class Parts:
    """The division of batches into parts, and the folder with the arrays of finished parts."""

    def __init__(self, folder: str | Path, batches: Sequence[list[int]]):
        self.folder = Path(folder)
        self.batches = [batches[i::PARTS] for i in range(min(PARTS, len(batches)))]  # of each part

    def rows(self, part: int) -> np.ndarray:
        """The rows of a part, in the order of its arrays."""
        return np.concatenate(self.batches[part])

    def read(self) -> dict[int, dict[str, np.ndarray]]:
        """The arrays of every finished part."""
        found = {}
        for part in range(len(self.batches)):
            try:
                with np.load(self.folder / f"{part}.npz", allow_pickle=False) as content:
                    arrays = dict(content)
            except (OSError, ValueError, zipfile.BadZipFile):
                continue
            if np.array_equal(arrays.pop("rows", None), self.rows(part)):
                found[part] = arrays
        return found

    def write(self, part: int, arrays: dict[str, np.ndarray]) -> None:
        with atomic_file(self.folder / f"{part}.npz", "wb") as f:
            np.savez(f, rows=self.rows(part), **arrays)


def remove_parts(folder: str | Path) -> None:
    """Delete the parts in `folder`, and the folder if nothing else is in it."""
    folder = Path(folder)
    for file in folder.glob("*.npz"):
        file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def predict(
    process,
    engine: Engine,
    tokenizer,
    prompts: Sequence[str],
    exclusions: Mapping[str, Sequence[Sequence[int]] | None],
    folder: str | Path,
    resume: bool,
    *,
    num_beams: int,
    batch_size: int,
    batch_tokens: int,
    length_penalty: float = 0.0,
) -> dict[str, Predictions] | None:
    """The predictions of all prompts for each name in `exclusions`, in the main process; None in the others.

    process: an `accelerate.PartialState`; exclusions: for each search, None or the rows of SIDs that each prompt must not
    get; folder: of the parts; resume: whether those that are there are used.
    """
    tokens = tokenizer(list(prompts))["input_ids"]
    parts = Parts(folder, length_batches([len(t) for t in tokens], batch_size, batch_tokens))
    found = parts.read() if resume and process.is_main_process else {}
    finished = on_main_process(lambda: list(found))
    if finished and process.is_main_process:
        say(f"{folder}: {len(finished)} of {len(parts.batches)} parts were computed before")
    pending = [part for part in range(len(parts.batches)) if part not in finished]
    own = pending[process.process_index :: process.num_processes]

    computed = {}
    total = sum(len(parts.batches[part]) for part in own)
    with Progress(total, "evaluating", unit="batches") as progress:
        for part in own:
            results = []
            for batch in parts.batches[part]:
                excluded = [each and [each[row] for row in batch] for each in exclusions.values()]
                own_tokens = [tokens[row] for row in batch]
                results.append(
                    engine.beam_search(own_tokens, num_beams, exclusions=excluded, length_penalty=length_penalty)
                )
                progress.update()
            computed[part] = _joined(results)
            parts.write(part, computed[part])
    everything = gather_object([computed])
    if not process.is_main_process:
        return None

    for each in everything:
        found |= each
    shape = (len(exclusions), len(prompts), min(num_beams, engine.trie.n_leaves))
    sid_rows, scores = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    for part, arrays in found.items():
        rows = parts.rows(part)
        sid_rows[:, rows], scores[:, rows] = arrays["sid_rows"], arrays["scores"]
    return {name: Predictions(*both) for name, *both in zip(exclusions, sid_rows, scores, strict=True)}


def _joined(batches: Sequence[Sequence[Beams]]) -> dict[str, np.ndarray]:
    """The beams of each batch and search -> arrays (searches, rows, beams)."""
    sid_rows = [np.stack([beams.row.cpu().numpy() for beams in batch]) for batch in batches]
    scores = [np.stack([beams.score.cpu().numpy() for beams in batch]) for batch in batches]
    return {"sid_rows": np.concatenate(sid_rows, axis=1), "scores": np.concatenate(scores, axis=1)}
