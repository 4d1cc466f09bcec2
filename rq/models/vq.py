"""One level of vector quantisation, and the Sinkhorn assignment that balances the use of its codes.

Straight-through gradients and the two loss terms are VQ-VAE's (arXiv 1711.00937, equation 3); the balanced assignment
by entropic optimal transport is Sinkhorn's (arXiv 1306.0895), as LC-Rec (arXiv 2311.09049) uses it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minionerec.common.errors import UserError


class VQOutput(NamedTuple):
    """The quantisation of n vectors by one level."""

    quantized: Tensor  # (n, dim) vectors of the chosen codes; no gradient
    loss: Tensor  # () codebook + beta * commitment, each a mean squared error over coordinates
    codes: Tensor  # (n,) int64


def squared_distances(x: Tensor, codebook: Tensor) -> Tensor:
    """||x_i - e_k||^2 as (n, K) for x (n, dim) and codebook (K, dim).

    Both are centred at the codebook's mean first: far from the origin, float32 would lose the distance in the difference
    of large squares.
    """
    center = codebook.mean(0)
    x, codebook = x - center, codebook - center
    return x.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * x @ codebook.T


@torch.no_grad()
def sinkhorn(distances: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The balanced soft assignment (…, n, K), float64: rows sum to about 1, columns to exactly n / K.

    Distances (…, n, K) are first centred and scaled to [-1, 1]. `epsilon` is in that unit; a smaller one gives a harder
    assignment. Rows and columns are scaled alternately, `iterations` times (arXiv 1306.0895, algorithm 1). Leading
    dimensions are separate problems.
    """
    d = distances.double()
    high, low = d.amax(dim=(-2, -1), keepdim=True), d.amin(dim=(-2, -1), keepdim=True)
    d = (d - (high + low) / 2) / ((high - low) / 2).clamp_min(1e-12)
    # A constant per row does not change the plan, and without it exp() overflows for a small epsilon.
    plan = torch.exp(-(d - d.amin(dim=-1, keepdim=True)) / epsilon)
    n, n_codes = plan.shape[-2:]
    tiny = torch.finfo(torch.float64).tiny
    column = torch.ones_like(plan[..., :1, :])  # (..., 1, K)
    for _ in range(iterations):
        row = 1 / (plan @ column.mT).clamp_min(tiny)  # (..., n, 1)
        column = (n / n_codes) / (row.mT @ plan).clamp_min(tiny)
    return row * plan * column


class VectorQuantizer(nn.Module):
    """A codebook of `n_codes` vectors. With `sk_epsilon` > 0, training assigns codes by Sinkhorn."""

    def __init__(self, *, n_codes: int, dim: int, beta: float, sk_epsilon: float = 0.0, sk_iters: int = 50):
        super().__init__()
        self.beta, self.sk_epsilon, self.sk_iters = beta, sk_epsilon, sk_iters
        self.codebook = nn.Parameter(torch.empty(n_codes, dim).uniform_(-1 / n_codes, 1 / n_codes))

    @torch.no_grad()
    def assign(self, x: Tensor, *, balanced: bool = False, allowed: Tensor | None = None) -> Tensor:
        """The code (n,) of each row of x (n, dim): the nearest, or the one that Sinkhorn chooses if `balanced`.

        `allowed` (K,) is False for codes that must not be chosen.
        """
        distances = squared_distances(x, self.codebook)
        if allowed is not None:
            distances = distances.masked_fill(~allowed, torch.inf)
        if balanced and self.sk_epsilon > 0:
            return sinkhorn(distances, self.sk_epsilon, self.sk_iters).argmax(dim=1)
        return distances.argmin(dim=1)

    def forward(self, x: Tensor) -> VQOutput:
        codes = self.assign(x.detach(), balanced=self.training)
        chosen = self.codebook[codes]
        loss = F.mse_loss(chosen, x.detach()) + self.beta * F.mse_loss(x, chosen.detach())
        return VQOutput(chosen.detach(), loss, codes)

    @torch.no_grad()
    def restart_dead_codes(self, x: Tensor, counts: Tensor, threshold: float) -> None:
        """Codes with `counts` (K,) below `threshold` restart at vectors drawn from x (n, dim) without replacement.

        As SoundStream does against codebook collapse (arXiv 2107.03312, section III-C; also Jukebox, 2005.00341).
        """
        dead = (counts < threshold).nonzero().squeeze(1)[: len(x)]
        self.codebook[dead] = x[torch.randperm(len(x), device=x.device)[: len(dead)]].to(self.codebook.dtype)

    @torch.no_grad()
    def init_by_kmeans(self, x: Tensor, *, iterations: int, seed: int) -> None:
        """Set the codebook to the k-means centres of x (n, dim); raises `UserError` for fewer rows than codes."""
        from sklearn.cluster import KMeans  # imported here: it takes 2 s
        from threadpoolctl import threadpool_limits

        n, n_codes = len(x), len(self.codebook)
        if n < n_codes:
            raise UserError(
                f"k-means needs at least one row per code: n={n} rows in the first batch, K={n_codes}; lower "
                f"--num_emb_list, raise --batch_size if the data has more rows, or give --kmeans_init False"
            )
        kmeans = KMeans(n_codes, n_init=1, max_iter=iterations, random_state=seed)
        with threadpool_limits(limits=1):  # one thread, so that bytes repeat
            centers = kmeans.fit(x.float().cpu().numpy()).cluster_centers_
        self.codebook.copy_(torch.from_numpy(centers))
