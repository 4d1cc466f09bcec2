"""Residual quantisation: each level quantises what the levels before it left over (SoundStream, arXiv 2107.03312).

r = z                                     (n, dim)
for level l:
    k_l = argmin_k ||r - e_{l,k}||^2      (n,)
    r   = r - e_{l,k_l}
quantized = z - r
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rq.models.vq import VectorQuantizer


class RQOutput(NamedTuple):
    """What the stack makes of n vectors."""

    quantized: Tensor  # (n, dim) sum of the chosen vectors; its gradient goes straight through to the input
    loss: Tensor  # () mean of the levels' losses
    codes: Tensor  # (n, levels) int64


class Codes(NamedTuple):
    """Codes and what the last level saw: enough to choose another code at that level."""

    codes: Tensor  # (n, levels) int64
    last_residual: Tensor  # (n, dim) the input of the last level


class ResidualQuantizer(nn.Module):
    """A stack of `VectorQuantizer`s. Shapes are as in the module docstring."""

    def __init__(
        self, *, num_emb_list: Sequence[int], dim: int, beta: float, sk_epsilons: Sequence[float], sk_iters: int
    ):
        super().__init__()
        self.levels = nn.ModuleList(
            VectorQuantizer(n_codes=n_codes, dim=dim, beta=beta, sk_epsilon=epsilon, sk_iters=sk_iters)
            for n_codes, epsilon in zip(num_emb_list, sk_epsilons, strict=True)
        )

    def forward(self, z: Tensor) -> RQOutput:
        residual, losses, codes = z, [], []
        for level in self.levels:
            output = level(residual)
            residual = residual - output.quantized  # detached: every level's commitment reaches the encoder
            losses.append(output.loss)
            codes.append(output.codes)
        straight_through = z - residual.detach()  # value z - r = sum of the chosen vectors, gradient 1
        return RQOutput(straight_through, torch.stack(losses).mean(), torch.stack(codes, dim=1))

    @torch.no_grad()
    def encode(self, z: Tensor) -> Codes:
        """The nearest codes of z (n, dim), level by level, never balanced."""
        residual, codes = z, []
        for level in self.levels:
            last_residual = residual
            codes.append(level.assign(residual))
            residual = residual - level.codebook[codes[-1]]
        return Codes(torch.stack(codes, dim=1), last_residual)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The vectors (n, dim) that `codes` (n, levels) stand for."""
        return sum(level.codebook[codes[:, i]] for i, level in enumerate(self.levels))

    @torch.no_grad()
    def init_by_kmeans(self, z: Tensor, *, iterations: int, seed: int) -> None:
        """Codebooks from k-means on z (n, dim), each level on the residuals of the one before it."""
        for level in self.levels:
            level.init_by_kmeans(z, iterations=iterations, seed=seed)
            z = z - level.codebook[level.assign(z)]
