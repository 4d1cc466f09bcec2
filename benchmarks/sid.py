"""SID construction, measured side by side in one run. On two cores:

    python -m benchmarks.sid --json True

prints the epochs per second of RQ-VAE's training loop next to the same model in a per-row DataLoader loop; the seconds,
sizes and cost of a bounded assignment by min-cost flow and by optimal transport; the seconds to resolve collisions of a
million items. `--part` picks some of these.

The DataLoader loop is the published one (LC-Rec, LETTER, MiniOneRec): `Dataset.__getitem__` makes a tensor of one row,
four workers start again in each epoch, and the loss is read after each step. Both loops train the same model; --layers
sets its size. With the published layers (2048 and on) a CPU spends nearly all of an epoch in matrix products, which
both loops share, so their ratio is near 1 there. The cost of the loop shows where the model is small or the device fast.
"""

import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from minionerec.common.devices import pick_device
from minionerec.common.errors import UserError
from minionerec.common.options import option, run
from rq import rqvae
from rq.balanced import flow_assignment, size_bounds, transport_assignment
from rq.collisions import collision_rate, resolve
from rq.models.rqvae import RQVAE
from rq.trainer import MAX_GRADIENT_NORM, Trainer

PARTS = ("rqvae", "assignment", "million", "collision")


@dataclass
class Options:
    part: list[str] = option(list(PARTS), f"some of {', '.join(PARTS)}")
    json: bool = option(False, "print the figures as JSON in the last line")
    rows: int = option(3686, "rqvae: items")
    dim: int = option(2560, "rqvae: dimension of the embeddings")
    layers: list[int] = option([64], "rqvae: hidden sizes")
    workers: int = option(4, "rqvae: workers of the DataLoader; the published number")
    batch_size: int = option(1024, "rqvae: rows per step of both loops")
    repeats: int = option(5, "rqvae: timed repetitions; medians are printed")
    compile: bool = option(False, "rqvae: compile our training step (GPU only)")
    device: str = option("cpu", "rqvae: cpu or cuda")
    codes: int = option(256, "assignment, million: centres")
    sizes: list[int] = option([4000, 20000], "assignment: numbers of items; the last one's figures are reported")
    million: int = option(1_000_000, "million, collision: items")

    def __post_init__(self):
        for part in self.part:
            if part not in PARTS:
                raise UserError(f"--part {part}: expected some of {', '.join(PARTS)}")


# ------------------------------------------------------------------------------------------------ RQ-VAE epochs


class Rows(Dataset):
    """The embeddings, a row at a time."""

    def __init__(self, matrix: np.ndarray):
        self.matrix = matrix

    def __len__(self) -> int:
        return len(self.matrix)

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.FloatTensor(self.matrix[row])


def row_epoch(model: RQVAE, loader: DataLoader, optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """One epoch of the published loop; returns the sum of the losses."""
    total = 0.0
    for batch in loader:
        loss = model(batch.to(device)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        total += loss.item()
    return total


def seconds_of(work: Callable, device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_rqvae(o: Options) -> dict:
    """Epochs per second of both loops, which take turns, after one warm-up epoch of each."""
    device = pick_device(o.device)
    matrix = np.random.default_rng(0).normal(size=(o.rows, o.dim)).astype(np.float32)
    never = 10**6  # epochs: no evaluation, no checkpoint
    options = rqvae.Options(layers=o.layers, batch_size=o.batch_size, epochs=never, eval_step=never, warmup_epochs=0)
    models = [RQVAE(in_dim=o.dim, layers=o.layers).to(device) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        ours = Trainer(models[0], matrix, options, folder, device, o.compile)
        theirs = torch.optim.AdamW(models[1].parameters(), lr=options.lr, weight_decay=options.weight_decay)
        loader = DataLoader(
            Rows(matrix), o.batch_size, shuffle=True, num_workers=o.workers, pin_memory=device.type == "cuda"
        )
        loops = {"ours": ours._train_epoch, "rows": lambda: row_epoch(models[1], loader, theirs, device)}
        times = {name: [] for name in loops}
        for turn in range(o.repeats + 1):
            for name, loop in loops.items():
                seconds = seconds_of(loop, device)
                if turn:
                    times[name].append(seconds)
    rate = {name: 1 / statistics.median(seconds) for name, seconds in times.items()}
    ratio = statistics.median([b / a for a, b in zip(times["ours"], times["rows"], strict=True)])
    print(
        f"RQ-VAE, {o.rows} x {o.dim}, layers {o.layers}, batch {o.batch_size}, {device}: {rate['ours']:.2f} epochs/s, "
        f"per-row DataLoader with {o.workers} workers {rate['rows']:.2f}; ratio {ratio:.2f}"
    )
    return {"rqvae_ratio": ratio, "rqvae_epochs_per_second": rate["ours"], "rows_epochs_per_second": rate["rows"]}


# ------------------------------------------------------------------------------------------------ assignments


def clustered(n: int, dim: int = 64) -> np.ndarray:
    """(n, dim) points around 64 centres of unequal weight."""
    rng = np.random.default_rng(n)
    weight = rng.dirichlet(np.ones(64))
    return (rng.normal(size=(64, dim))[rng.choice(64, size=n, p=weight)] + rng.normal(size=(n, dim))).astype(np.float32)


def centers_of(x: np.ndarray, k: int) -> np.ndarray:
    """(k, dim) centres by a few rounds of k-means on 20 000 of the points."""
    from sklearn.cluster import KMeans

    return KMeans(k, n_init=1, max_iter=5, random_state=0).fit(x[:20000]).cluster_centers_.astype(np.float32)


def describe(name: str, x: np.ndarray, centers: np.ndarray, codes: np.ndarray, seconds: float) -> float:
    """Print one solver's line; returns the cost, the mean squared distance to the centre."""
    sizes = np.bincount(codes, minlength=len(centers))
    bounds = size_bounds(len(x), len(centers))
    step = 50_000
    cost = sum(float(np.square(x[i : i + step] - centers[codes[i : i + step]]).sum()) for i in range(0, len(x), step))
    cost /= len(x)
    print(
        f"n={len(x):>8} K={len(centers)} {name:<10} {seconds:8.2f} s  sizes {sizes.min()} to {sizes.max()} "
        f"(bounds {bounds.low} to {bounds.high})  cost {cost:.4f}"
    )
    assert bounds.low <= sizes.min() and sizes.max() <= bounds.high
    return cost


def timed_transport(x: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    codes, _ = transport_assignment(torch.from_numpy(x), torch.from_numpy(centers), size_bounds(len(x), len(centers)))
    return codes.numpy(), time.perf_counter() - start


def measure_assignment(o: Options) -> dict:
    """Flow and transport at each size; the reported seconds are those of the last."""
    figures = {}
    for n in o.sizes:
        x = clustered(n)
        centers = centers_of(x, o.codes)
        start = time.perf_counter()
        codes = flow_assignment(x, centers, size_bounds(n, o.codes))
        seconds = time.perf_counter() - start
        flow = describe("flow", x, centers, codes, seconds)
        codes, transport_seconds = timed_transport(x, centers)
        transport = describe("transport", x, centers, codes, transport_seconds)
        figures |= {"flow_seconds": seconds, "transport_seconds": transport_seconds}
        figures[f"transport_cost_{n}"] = transport / flow
        print(f"           the transport's cost is {transport / flow:.4f} of the flow's")
    return figures


def measure_million(o: Options) -> dict:
    """The transport, and how much it raises the peak memory of the process."""
    x = clustered(o.million)
    centers = centers_of(x, o.codes)
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the peak counts from here
    except OSError:
        print("           the peak memory cannot be reset here: it counts from the start of the process")
    before = peak_gib()
    codes, seconds = timed_transport(x, centers)
    extra = peak_gib() - before
    describe("transport", x, centers, codes, seconds)
    print(f"           {extra:.2f} GiB more at its peak than before")
    return {"million_seconds": seconds, "million_gib": extra}


def peak_gib() -> float:
    """The largest resident set of this process, since the counter was reset."""
    try:
        with open("/proc/self/status") as f:
            return int(next(line.split()[1] for line in f if line.startswith("VmHWM"))) / 2**20
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ------------------------------------------------------------------------------------------------ collisions


def measure_collision(o: Options) -> dict:
    """Each mode at a collision rate of 1 %: 2 % of the items are in pairs. The reported seconds are nearest_free's."""
    rng = np.random.default_rng(0)
    n, pairs = o.million, o.million // 100
    flat = rng.choice(2**24, size=n - pairs, replace=False)
    flat = rng.permutation(np.concatenate([flat, flat[:pairs]]))
    codes = np.stack([flat >> 16, (flat >> 8) & 255, flat & 255], axis=1)
    residuals, codebook = rng.normal(size=(n, 32)).astype(np.float32), rng.normal(size=(256, 32)).astype(np.float32)
    figures = {}
    for mode in ("nearest_free", "extra_token", "sinkhorn"):
        start = time.perf_counter()
        solved = resolve(codes, mode, residuals, codebook)
        seconds = time.perf_counter() - start
        print(
            f"n={n:>8} collisions, {mode:<12} {seconds:8.2f} s  rate {collision_rate(codes):.4f} to "
            f"{collision_rate(solved):.6f}"
        )
        if mode != "sinkhorn":
            assert collision_rate(solved) == 0
        if mode == "nearest_free":
            figures["collision_seconds"] = seconds
    return figures


MEASURES = dict(zip(PARTS, (measure_rqvae, measure_assignment, measure_million, measure_collision), strict=True))


def main(options: Options) -> None:
    print(f"{torch.get_num_threads()} threads")
    figures = {}
    for part in options.part:
        figures |= MEASURES[part](options)
    if options.json:
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    run(main, Options)
