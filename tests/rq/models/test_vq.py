"""One level of quantisation.

Invariants: distances are right far from the origin; Sinkhorn balances columns exactly and rows nearly, for small and
large epsilon; a batch of problems equals the single problems.
"""

import pytest
import torch

from rq.models.vq import VectorQuantizer, sinkhorn, squared_distances


@pytest.mark.parametrize("offset", [0, 10, 1000])
def test_nearest_codes_far_from_the_origin(offset):
    generator = torch.Generator().manual_seed(0)
    x = offset + 0.05 * torch.randn(400, 32, generator=generator)
    level = VectorQuantizer(n_codes=64, dim=32, beta=0.25)
    level.codebook.data = x[:64] + 0.01 * torch.randn(64, 32, generator=generator)
    exact = (x[:, None].double() - level.codebook.detach().double()).square().sum(-1)
    assert torch.equal(level.assign(x), exact.argmin(1))
    torch.testing.assert_close(squared_distances(x, level.codebook).double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.003, 0.05, 1.0])
def test_sinkhorn_is_balanced(epsilon):
    plan = sinkhorn(torch.rand(60, 6, generator=torch.Generator().manual_seed(0)), epsilon, 2000)
    assert plan.dtype == torch.float64 and torch.isfinite(plan).all()
    torch.testing.assert_close(plan.sum(0), torch.full((6,), 10.0, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(1), torch.ones(60, dtype=torch.float64), atol=2e-2, rtol=0)


def test_sinkhorn_of_a_stack_is_sinkhorn_of_each():
    distances = torch.rand(3, 20, 6, generator=torch.Generator().manual_seed(0))
    each = torch.stack([sinkhorn(d, 0.05, 30) for d in distances])
    torch.testing.assert_close(sinkhorn(distances, 0.05, 30), each)
