"""Sinkhorn: columns are balanced exactly, rows nearly, for small and large epsilon; a batch equals its single problems."""

import pytest
import torch

from rq.models.vq import sinkhorn


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
