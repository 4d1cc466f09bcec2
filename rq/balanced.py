"""Assignment to centres under bounds on cluster sizes: exact by min-cost flow, and by entropic optimal transport.

Both minimise the sum of squared distances with the size of each cluster in [low, high]. The flow (Bradley, Bennett &
Demiriz 2000, built and solved by `k-means-constrained`) is exact up to the rounding of costs to integers. Its time and
memory grow with n * K arcs. The transport holds one block of distances at a time and a few numbers per item:

    1. Prices (K,) by Sinkhorn's column scaling for size bounds (Benamou et al. 2015, arXiv 1412.5154, section 3):
           price_k += epsilon * log(clip(1, low / size_k, high / size_k))
           size_k = sum_i softmax_k((price - d_i) / epsilon)
       epsilon falls to a small share of the gap between the two nearest centres of an item. Prices are found first on a
       sample of the items, then on all of them.
    2. Each item takes argmin_k d_ik - price_k.
    3. Items of clusters outside the bounds are moved, those with the lowest extra cost first.

With 6 or more items per cluster its cost is 0.1 to 2.5 % above that of the flow (`python -m benchmarks.sid`). With one
or two items per cluster it can be 50 % higher.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rq.models.vq import squared_distances

BLOCK = 1 << 22  # distances computed at a time
KEPT = 1 << 26  # most distances that are kept between rounds (256 MiB)
SAMPLE_PER_CODE = 64  # items per centre in the sample for the first prices
ANNEALING = [4.0 * 0.5**i for i in range(9)]  # epsilon as a multiple of the mean gap between the two nearest centres
WARM, FULL = ANNEALING[4:], ANNEALING[3:]  # starting from known prices; on all items after a sample
SAMPLE_ROUNDS, FULL_ROUNDS = 15, 3  # updates at each epsilon
OVERRELAXATION = 1.5  # factor on the logarithm of an update: half as many rounds (arXiv 1711.01851)


class Bounds(NamedTuple):
    """The smallest and the largest number of items of a cluster."""

    low: int
    high: int


def size_bounds(n: int, n_codes: int) -> Bounds:
    """[max(1, n//K - 1), n//K + 1], the published bounds for n items and K clusters."""
    return Bounds(max(1, n // n_codes - 1), n // n_codes + 1)


# ------------------------------------------------------------------------------------------------ min-cost flow


def flow_assignment(x: np.ndarray, centers: np.ndarray, bounds: Bounds) -> np.ndarray:
    """The cheapest assignment (n,) of x (n, dim) to centers (K, dim) within `bounds`, by min-cost flow."""
    from k_means_constrained.k_means_constrained_ import minimum_cost_flow_problem_graph, solve_min_cost_flow_graph

    distances = squared_distances(torch.from_numpy(x).double(), torch.from_numpy(centers).double()).numpy()
    # The solver takes integers, 1000 to the unit: this scale leaves a resolution of 1e-8 of the largest distance.
    distances *= 1e5 / (distances.max() or 1.0)
    graph = minimum_cost_flow_problem_graph(x, centers, distances, bounds.low, bounds.high)
    return solve_min_cost_flow_graph(*graph)


# ------------------------------------------------------------------------------------------------ optimal transport


def transport_assignment(
    x: Tensor, centers: Tensor, bounds: Bounds, *, seed: int = 0, prices: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A cheap assignment (n,) of x (n, dim) to centers (K, dim) within `bounds`, and its prices (K,).

    `prices` from an assignment to nearly the same centres replace the search on a sample.
    """
    n, n_codes = len(x), len(centers)
    generator = torch.Generator(device=x.device).manual_seed(seed)
    sample = x[torch.randperm(n, generator=generator, device=x.device)[: SAMPLE_PER_CODE * n_codes]]
    nearest = [d.topk(min(2, n_codes), dim=1, largest=False).values for d in _distance_blocks(sample, centers)]
    gap = torch.cat([d[:, -1] - d[:, 0] for d in nearest]).mean()
    gap = torch.where(gap > 0, gap, 1.0)

    cold = prices is None
    prices = torch.zeros(n_codes, device=x.device) if cold else prices
    if cold or len(sample) == n:
        kept = list(_distance_blocks(sample, centers)) if len(sample) * n_codes <= KEPT else None
        for epsilon in ANNEALING if cold else WARM:
            for _ in range(SAMPLE_ROUNDS):
                prices = _update(prices, kept or _distance_blocks(sample, centers), bounds, n, epsilon * gap)
    if len(sample) < n:
        for epsilon in FULL if cold else WARM:
            for _ in range(FULL_ROUNDS):
                prices = _update(prices, _distance_blocks(x, centers), bounds, n, epsilon * gap)
    codes = torch.cat([(d - prices).argmin(dim=1) for d in _distance_blocks(x, centers)])
    return _repair(codes, x, centers, prices, bounds), prices


def _distance_blocks(x: Tensor, centers: Tensor) -> Iterator[Tensor]:
    """Squared distances (rows, K) of x (n, dim) to centers (K, dim), for as many rows at a time as `BLOCK` allows."""
    for rows in x.split(max(1, BLOCK // len(centers))):
        yield squared_distances(rows, centers)


def _update(prices: Tensor, distances: Iterable[Tensor], bounds: Bounds, n: int, epsilon: Tensor) -> Tensor:
    """The next prices (K,). `distances`: blocks (rows, K) of all n items, or of a sample of them."""
    sizes = torch.zeros(len(prices), dtype=torch.float64, device=prices.device)
    items = 0
    for block in distances:
        sizes += torch.softmax((prices - block) / epsilon, dim=1).sum(dim=0)
        items += len(block)
    sizes *= n / items
    change = (sizes.clamp(bounds.low, bounds.high) / sizes.clamp_min(1e-30)).log().clamp(-50, 50)
    return prices + OVERRELAXATION * epsilon * change.to(prices.dtype)


def _repair(codes: Tensor, x: Tensor, centers: Tensor, prices: Tensor, bounds: Bounds) -> Tensor:
    """`codes` (n,) with as few items as needed moved, cheapest first, until every size is within `bounds`."""
    sizes = torch.bincount(codes, minlength=len(centers))
    # Clusters above the bounds release the items with the lowest extra cost elsewhere …
    crowded = (sizes > bounds.high)[codes].nonzero().squeeze(1)
    released = []
    if len(crowded):
        room = sizes < bounds.high
        losses = []
        for rows in crowded.split(max(1, BLOCK // len(centers))):
            cost = squared_distances(x[rows], centers) - prices
            own = cost.gather(1, codes[rows, None])
            losses.append(cost.masked_fill(~room, torch.inf).min(dim=1).values - own.squeeze(1))
        losses = torch.cat(losses)
        order = losses.argsort(stable=True)
        order = order[codes[crowded[order]].argsort(stable=True)]  # by cluster, cheapest first
        sorted_codes = codes[crowded[order]]
        place = torch.arange(len(order), device=x.device) - torch.searchsorted(sorted_codes, sorted_codes)
        released = crowded[order[place < (sizes - bounds.high)[sorted_codes]]]
        sizes = sizes.clamp_max(bounds.high)
        codes = codes.clone()
        _place(released, codes, sizes, x, centers, prices, bounds.high)
    # … and clusters below the bounds take the items with the lowest extra cost there.
    for code in (sizes < bounds.low).nonzero().squeeze(1).tolist():
        loss = (x - centers[code]).square().sum(dim=1) - (x - centers[codes]).square().sum(dim=1) + prices[codes]
        for row in loss.argsort(stable=True).tolist():
            if sizes[code] >= bounds.low:
                break
            if codes[row] != code and sizes[codes[row]] > bounds.low:
                sizes[codes[row]] -= 1
                sizes[code] += 1
                codes[row] = code
    return codes


def _place(rows: Tensor, codes: Tensor, sizes: Tensor, x: Tensor, centers: Tensor, prices: Tensor, high: int) -> None:
    """Give each of `rows` a code with room, in place.

    In each round the rows ask for their cheapest code, and the cheapest requests are granted as far as there is room.
    """
    while len(rows):
        room = sizes < high
        asked, price = [], []
        for part in rows.split(max(1, BLOCK // len(centers))):
            cost = (squared_distances(x[part], centers) - prices).masked_fill(~room, torch.inf)
            best = cost.min(dim=1)
            asked.append(best.indices)
            price.append(best.values)
        asked, price = torch.cat(asked), torch.cat(price)
        order = price.argsort(stable=True)
        order = order[asked[order].argsort(stable=True)]
        rows, asked = rows[order], asked[order]
        place = torch.arange(len(rows), device=rows.device) - torch.searchsorted(asked, asked)
        accepted = place < (high - sizes)[asked]
        codes[rows[accepted]] = asked[accepted]
        sizes += torch.bincount(asked[accepted], minlength=len(sizes))
        rows = rows[~accepted].sort().values
