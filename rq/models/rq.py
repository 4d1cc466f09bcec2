"""Residual quantisation: each level quantises the residual of the levels before it (SoundStream, arXiv 2107.03312).

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
    """The quantisation of n vectors."""

    quantized: Tensor  # (n, dim) sum of the chosen vectors; straight-through gradient to the input
    loss: Tensor  # () mean of the levels' losses
    codes: Tensor  # (n, levels) int64


class Codes(NamedTuple):
    """Codes and the input of the last level: enough to choose another code at that level."""

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

    @property
    def sizes(self) -> list[int]:
        """Codes of each level."""
        return [len(level.codebook) for level in self.levels]

    def forward(self, z: Tensor) -> RQOutput:
        residual, losses, codes = z, [], []
        for level in self.levels:
            output = level(residual)
            residual = (
                residual - output.quantized
            )  # the code is detached: the commitment of each level reaches the encoder
            losses.append(output.loss)
            codes.append(output.codes)
        straight_through = z - residual.detach()  # value z - r = sum of the chosen vectors, gradient 1
        return RQOutput(straight_through, torch.stack(losses).mean(), torch.stack(codes, dim=1))

    @torch.no_grad()
    def encode(self, z: Tensor, allowed: Sequence[Tensor | None] | None = None) -> Codes:
        """The nearest codes of z (n, dim), level by level, without Sinkhorn; of each level only the `allowed` (K,)."""
        residual, codes = z, []
        for i, level in enumerate(self.levels):
            last_residual = residual
            codes.append(level.assign(residual, allowed=allowed[i] if allowed else None))
            residual = residual - level.codebook[codes[-1]]
        return Codes(torch.stack(codes, dim=1), last_residual)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The sum of the vectors of `codes` (n, any number of leading levels), as (n, dim)."""
        chosen = [level.codebook[code] for level, code in zip(self.levels, codes.T, strict=False)]
        return sum(chosen, start=self.levels[0].codebook.new_zeros(len(codes), 1))

    @torch.no_grad()
    def restart_dead_codes(self, z: Tensor, counts: Sequence[Tensor], threshold: float) -> None:
        """Each level's codes with `counts` below `threshold` restart at that level's residuals of z (n, dim)."""
        for level, count in zip(self.levels, counts, strict=True):
            level.restart_dead_codes(z, count, threshold)
            z = z - level.codebook[level.assign(z)]

    @torch.no_grad()
    def load_codebooks(self, codebooks: Sequence[Tensor]) -> None:
        """Set each level's codebook to the given (K, dim)."""
        for level, codebook in zip(self.levels, codebooks, strict=True):
            level.codebook.copy_(codebook)

    @torch.no_grad()
    def init_by_kmeans(self, z: Tensor, *, iterations: int, seed: int) -> None:
        """Codebooks from k-means on z (n, dim), each level on the residuals of the one before it."""
        for level in self.levels:
            level.init_by_kmeans(z, iterations=iterations, seed=seed)
            z = z - level.codebook[level.assign(z)]


class ResidualModel(nn.Module):
    """Embeddings to codes and back through a `quantizer` in a latent space; here the latents are the embeddings."""

    quantizer: ResidualQuantizer
    in_dim: int  # columns of the embeddings

    @property
    def device(self) -> torch.device:
        return self.quantizer.levels[0].codebook.device

    def latent(self, x: Tensor) -> Tensor:
        """The vectors (n, dim) to quantise, from embeddings x (n, in_dim)."""
        return x

    def reconstruct(self, quantized: Tensor) -> Tensor:
        """Embeddings (n, in_dim) from quantised latents (n, dim)."""
        return quantized

    @torch.inference_mode()
    def encode(self, x: Tensor, batch_size: int = 20480, allowed: Sequence[Tensor | None] | None = None) -> Codes:
        """The nearest codes of x (n, in_dim) at each level, among the `allowed` ones, without dropout.

        Leaves the model in evaluation mode.
        """
        self.eval()
        parts = [self.quantizer.encode(self.latent(batch), allowed) for batch in x.split(batch_size)]
        return Codes(torch.cat([p.codes for p in parts]), torch.cat([p.last_residual for p in parts]))

    @torch.inference_mode()
    def last_residual(self, x: Tensor, codes: Tensor) -> Tensor:
        """The input of the last level, (n, dim), where x (n, in_dim) has `codes` (n, levels), nearest or not."""
        self.eval()
        return self.latent(x) - self.quantizer.decode(codes[:, : len(self.quantizer.levels) - 1])

    @torch.inference_mode()
    def squared_error(self, x: Tensor, codes: Tensor, batch_size: int = 20480) -> Tensor:
        """Squared error, summed over x (n, in_dim), of reconstructions from the first 1, 2, … levels of `codes`: (levels,)."""
        self.eval()
        total = torch.zeros(codes.shape[1], dtype=torch.float64, device=x.device)
        for batch, code in zip(x.split(batch_size), codes.split(batch_size), strict=True):
            for level in range(codes.shape[1]):
                reconstruction = self.reconstruct(self.quantizer.decode(code[:, : level + 1]))
                total[level] += (batch - reconstruction).double().square().sum()
        return total


class Codebooks(ResidualModel):
    """Codebooks (K, dim) of a residual k-means; they quantise the embeddings (n, dim) directly."""

    def __init__(self, codebooks: Sequence[Tensor]):
        super().__init__()
        sizes, self.in_dim = [len(codebook) for codebook in codebooks], codebooks[0].shape[1]
        self.quantizer = ResidualQuantizer(
            num_emb_list=sizes, dim=self.in_dim, beta=0.0, sk_epsilons=[0.0] * len(sizes), sk_iters=1
        )
        self.quantizer.load_codebooks(codebooks)
