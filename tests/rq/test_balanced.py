"""Assignment under bounds on cluster sizes.

Invariants: both solvers keep the published bounds; the flow is the cheapest; the transport is near it, also from known
prices, on a sample, in blocks, and where all rows are equal; unit and origin do not matter.
"""

import numpy as np
import pytest
import torch
from rq_helpers import points

from rq.balanced import Bounds, flow_assignment, size_bounds, transport_assignment


@pytest.mark.parametrize(
    ("n", "k", "bounds"), [(1000, 256, (2, 4)), (256, 256, (1, 2)), (300, 256, (1, 2)), (3686, 256, (13, 15))]
)
def test_published_bounds(n, k, bounds):
    assert size_bounds(n, k) == bounds


def cost(x, centers, codes):
    return np.square(x - centers[codes]).sum()


def test_assignments_on_a_line():
    """Six points, two centres, three points each: the crowd is cut at its far end."""
    x, centers = np.array([[0.0], [0.1], [0.2], [0.3], [0.4], [5.0]], dtype=np.float32), np.array([[0.0], [5.0]])
    centers = centers.astype(np.float32)
    expected = [0, 0, 0, 1, 1, 1]
    assert flow_assignment(x, centers, Bounds(3, 3)).tolist() == expected
    codes, _ = transport_assignment(torch.from_numpy(x), torch.from_numpy(centers), Bounds(3, 3))
    assert codes.tolist() == expected


# With about one item per cluster the rounding costs more: the transport is for large n.
@pytest.mark.parametrize(("n", "k", "share"), [(1000, 32, 1.03), (150, 64, 1.03), (70, 64, 1.5)])
def test_transport_is_within_bounds_and_near_the_flow(n, k, share):
    x = points(n)
    centers, bounds = x[np.random.default_rng(1).permutation(n)[:k]], size_bounds(n, k)
    exact = flow_assignment(x, centers, bounds)
    codes, prices = transport_assignment(torch.from_numpy(x), torch.from_numpy(centers), bounds)
    for some in (exact, codes.numpy()):
        sizes = np.bincount(some, minlength=k)
        assert bounds.low <= sizes.min() and sizes.max() <= bounds.high
    assert cost(x, centers, exact) <= cost(x, centers, codes.numpy()) * (1 + 1e-6) <= share * cost(x, centers, exact)
    again, _ = transport_assignment(torch.from_numpy(x), torch.from_numpy(centers), bounds, prices=prices)
    assert cost(x, centers, again.numpy()) <= share * cost(x, centers, exact)


@pytest.mark.parametrize(("scale", "offset"), [(1e-6, 0), (1, 3000), (1e6, 0)])
def test_assignments_do_not_depend_on_unit_and_origin(scale, offset):
    x = points(400)
    bounds, centers = size_bounds(len(x), 16), x[:16]
    exact = cost(x, centers, flow_assignment(x, centers, bounds))
    moved = (x * scale + offset).astype(np.float32), (centers * scale + offset).astype(np.float32)
    assert cost(x, centers, flow_assignment(*moved, bounds)) <= exact * (1 + 1e-4)
    codes, _ = transport_assignment(*map(torch.from_numpy, moved), bounds)
    assert cost(x, centers, codes.numpy()) <= 1.03 * exact


def test_transport_on_a_sample_and_in_blocks(monkeypatch):
    """As for a million items: prices from a sample, distances a block at a time."""
    x, k = points(3000), 16
    monkeypatch.setattr("rq.balanced.BLOCK", 1000)
    monkeypatch.setattr("rq.balanced.KEPT", 0)
    bounds, centers = size_bounds(len(x), k), x[:k]
    codes = transport_assignment(torch.from_numpy(x), torch.from_numpy(centers), bounds)[0].numpy()
    sizes = np.bincount(codes, minlength=k)
    assert bounds.low <= sizes.min() and sizes.max() <= bounds.high
    assert cost(x, centers, codes) <= 1.03 * cost(x, centers, flow_assignment(x, centers, bounds))


def test_transport_of_equal_rows():
    bounds = size_bounds(100, 8)
    codes, _ = transport_assignment(torch.ones(100, 3), torch.ones(8, 3), bounds)
    sizes = torch.bincount(codes, minlength=8)
    assert bounds.low <= sizes.min() and sizes.max() <= bounds.high
