"""Residual quantisation.

Invariants: codes, residuals and losses equal a plain loop over rows and levels; decoding codes gives the quantised
vectors; the gradient of the quantised vectors goes straight to the input; each level's loss reaches the encoder and its
codebook; dead codes restart at residuals of their level.
"""

import numpy as np
import pytest
import torch
from rq_helpers import clustered

from rq.models.rq import ResidualQuantizer


def quantizer(epsilons=(0.0, 0.0, 0.0)) -> ResidualQuantizer:
    torch.manual_seed(1)
    stack = ResidualQuantizer(num_emb_list=[5, 6, 7], dim=3, beta=0.25, sk_epsilons=epsilons, sk_iters=50)
    for level in stack.levels:
        torch.nn.init.normal_(level.codebook)
    return stack


def test_residual_quantisation_equals_a_plain_loop():
    stack, z = quantizer(), torch.randn(20, 3)
    output, encoded = stack(z), stack.encode(z)
    books = [level.codebook.detach().numpy() for level in stack.levels]
    losses = np.zeros(3)
    for row, vector in enumerate(z.numpy()):
        residual = vector
        for i, book in enumerate(books):
            if i == 2:
                np.testing.assert_allclose(encoded.last_residual[row], residual, atol=1e-6)
            code = min(range(len(book)), key=lambda k: ((residual - book[k]) ** 2).sum())
            assert output.codes[row, i] == encoded.codes[row, i] == code
            losses[i] += 1.25 * ((residual - book[code]) ** 2).mean() / len(z)
            residual = residual - book[code]
        np.testing.assert_allclose(output.quantized[row].detach(), vector - residual, atol=1e-6)
    assert output.loss.item() == pytest.approx(losses.mean(), rel=1e-5)
    torch.testing.assert_close(stack.decode(output.codes), output.quantized.detach())
    assert stack.sizes == [5, 6, 7]


def test_gradient_goes_straight_through():
    stack, z = quantizer(), torch.randn(20, 3, requires_grad=True)
    weight = torch.randn(20, 3)
    (stack(z).quantized * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)
    assert all(level.codebook.grad is None for level in stack.levels)


def test_losses_reach_encoder_and_codebooks():
    stack, z = quantizer(), torch.randn(20, 3, requires_grad=True)
    output = stack(z)
    output.loss.backward()
    residual, expected = z.detach(), torch.zeros(20, 3)
    for i, level in enumerate(stack.levels):
        assert level.codebook.grad.abs().sum() > 0
        residual = residual - level.codebook.detach()[output.codes[:, i]]
        expected += 0.25 * 2 * residual / residual.numel() / 3  # d/dz of beta * mse(r, e), mean over levels
    torch.testing.assert_close(z.grad, expected)


def test_sinkhorn_balances_in_training_only():
    stack, z = quantizer((0.01, 0.01, 0.01)), torch.randn(60, 3) * 0.1
    used = stack.levels[0].assign(z).unique().numel()
    assert stack.levels[0].assign(z, balanced=True).unique().numel() == 5 > used
    assert torch.equal(stack.eval()(z).codes, stack.encode(z).codes)


def test_dead_codes_restart_at_residuals():
    stack, z = quantizer(), torch.randn(20, 3)
    before = [level.codebook.clone() for level in stack.levels]
    counts = [torch.tensor([3, 0, 2, 1, 3]), torch.full((6,), 9), torch.tensor([9, 9, 9, 9, 9, 9, 0])]
    stack.restart_dead_codes(z, counts, threshold=2)
    moved = [(level.codebook != old).any(1).tolist() for level, old in zip(stack.levels, before, strict=True)]
    assert moved == [[False, True, False, True, False], [False] * 6, [False] * 6 + [True]]
    first, *_, last = stack.levels
    assert all((z == first.codebook[code]).all(1).any() for code in (1, 3)), "each is a row of z"
    assert not torch.equal(first.codebook[1], first.codebook[3]), "and not the same row"
    residual = stack.encode(z).last_residual
    assert (residual - last.codebook[6]).abs().sum(1).min() < 1e-5


def test_kmeans_start_finds_the_clusters():
    stack = ResidualQuantizer(num_emb_list=[8], dim=12, beta=0.25, sk_epsilons=[0.0], sk_iters=50)
    z = torch.from_numpy(clustered())
    before = stack(z).loss
    stack.init_by_kmeans(z, iterations=100, seed=0)
    assert stack(z).loss < before / 5
