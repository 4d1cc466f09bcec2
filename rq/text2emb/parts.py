"""Embeddings of many texts, by one or several processes, in parts that survive a kill.

    order    texts by number of characters, longest first: texts of a part are of similar length
    part     the next PART texts of that order; process r of n computes the parts r, r + n, r + 2n, …
    batch    within a part, texts by number of tokens, longest first, as many as the token budget allows
    write    the main process writes a round of n parts into a memory-mapped matrix, then counts them as done

Parts and batches depend on the texts and the options only. So a resumed run computes what an unbroken run would have
computed, and another number of processes gives the same batches.
"""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from minionerec.common.console import Progress
from minionerec.common.errors import UserError
from minionerec.common.files import write_json
from minionerec.common.processes import on_main_process

SMALLEST_PART, LARGEST_PART, PARTS = 512, 4096, 64  # texts, texts, parts where neither limit applies


def part_size(n_texts: int) -> int:
    """Texts of a part: few enough that several processes get equal shares, enough to fill batches of a GPU."""
    return min(LARGEST_PART, max(SMALLEST_PART, -(-n_texts // PARTS)))


def batches(lengths: Sequence[int], budget: int, most: int) -> list[list[int]]:
    """Positions in `lengths`, longest first, in batches of at most `most` with at most `budget` tokens, padding included.

    A text longer than the budget is a batch. With budget 10, lengths [2, 5, 4] make [[1, 2], [0]].
    """
    found: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not found or len(found[-1]) == most or (len(found[-1]) + 1) * longest > budget:
            found.append([])
            longest = lengths[i]
        found[-1].append(i)
    return found


class PartialMatrix:
    """float32 (items, dim) in a file next to `path`, filled in parts; only the main process opens it."""

    def __init__(self, path: Path, identity: dict, shape: tuple[int, int]):
        """identity: what the matrix is made from; parts that were made from something else are not used."""
        self.path, self.shape = path, shape
        self.file = path.with_name(f".{path.name}.partial")
        self.progress = path.with_name(f".{path.name}.progress.json")
        self.part_size = part_size(shape[0])
        self.identity = identity | {"shape": list(shape), "part": self.part_size}

    def open(self, resume: bool) -> int:
        """Open or create the file; returns how many parts are in it."""
        done = self._read_progress() if resume else 0
        renamed = done * self.part_size >= self.shape[0] and not self.file.exists() and self.path.exists()
        if not self.file.exists() and not renamed:
            done = 0
        if not done:
            self._create()
        self.matrix = np.lib.format.open_memmap(self.path if renamed else self.file, mode="r+")
        return done

    def _read_progress(self) -> int:
        try:
            content = json.loads(self.progress.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0
        return content["done"] if content.get("identity") == self.identity else 0

    def _create(self) -> None:
        """An empty matrix whose space on the disk is reserved: writing to a mapped file on a full disk kills a process."""
        self.progress.unlink(missing_ok=True)
        matrix = np.lib.format.open_memmap(self.file, mode="w+", dtype=np.float32, shape=self.shape)
        size = matrix.offset + matrix.nbytes
        try:
            with open(self.file, "r+b") as f:
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(f.fileno(), 0, size)
        except OSError as error:
            self.file.unlink()
            error.filename = str(self.path)
            raise

    def write(self, rows: np.ndarray, embeddings: np.ndarray, done: int) -> None:
        """Put the embeddings of items `rows` into the matrix; `done` parts are in it now."""
        bad = rows[~np.isfinite(embeddings).all(axis=1)]
        if len(bad):
            raise UserError(
                f"the encoder returns NaN or Inf for {len(bad)} items, first item {bad.min()}; use another encoder or "
                f"--dtype float32"
            )
        self.matrix[rows] = embeddings
        self.matrix.flush()
        write_json(self.progress, {"identity": self.identity, "done": done})

    def finish(self) -> None:
        """Give the whole matrix its name."""
        self.matrix.flush()
        if self.file.exists():
            os.replace(self.file, self.path)

    def remove_progress(self) -> None:
        self.progress.unlink(missing_ok=True)


def embed_texts(
    texts: Sequence[str], encoder, matrix: PartialMatrix, process, *, resume: bool, budget: int, most: int
) -> None:
    """Fill `matrix` with the embeddings of all texts.

    process: an `accelerate.PartialState`, or None where there is one process; budget: tokens of a batch; most: texts of a
    batch.
    """
    order = np.argsort([-len(text) for text in texts], kind="stable")
    size, dim = matrix.part_size, matrix.shape[1]
    parts = [order[begin : begin + size] for begin in range(0, len(order), size)]
    rank, world = (process.process_index, process.num_processes) if process else (0, 1)
    start = on_main_process(lambda: matrix.open(resume))
    if start and rank == 0:
        print(f"{start} of {len(parts)} parts were computed before")
    with Progress(len(texts), "embedding", start=min(start * size, len(texts)), unit="texts") as progress:
        for first in range(start, len(parts), world):
            now = parts[first : first + world]
            block = torch.zeros(size, dim, device=encoder.device)  # of this process: one part
            if rank < len(now):
                embed_part([texts[i] for i in now[rank]], encoder, block, budget, most)
            blocks = gathered(block, rank, world)
            on_main_process(functools.partial(store, matrix, now, blocks, first + len(now)))
            progress.update(sum(map(len, now)))


def store(matrix: PartialMatrix, parts: Sequence[np.ndarray], blocks: Sequence[torch.Tensor], done: int) -> None:
    """Write a round: block i has the embeddings of part i in its first rows."""
    whole = torch.cat([block[: len(part)] for part, block in zip(parts, blocks, strict=False)])
    matrix.write(np.concatenate(parts), whole.cpu().numpy(), done)


def embed_part(texts: Sequence[str], encoder, block: torch.Tensor, budget: int, most: int) -> None:
    """Write the embeddings of `texts` into the first rows of `block`."""
    features, shared = encoder.tokenize(texts)
    for batch in batches([encoder.length(row) for row in features], budget, most):
        block[torch.tensor(batch, device=block.device)] = encoder.embed([features[i] for i in batch], shared)


def gathered(block: torch.Tensor, rank: int, world: int) -> list[torch.Tensor]:
    """The blocks of all processes, in the main process; nothing in the others."""
    if world == 1:
        return [block]
    blocks = [torch.empty_like(block) for _ in range(world)] if rank == 0 else None
    torch.distributed.gather(block, blocks, dst=0)
    return blocks or []
