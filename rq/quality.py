"""TODO."""

import numpy as np
import torch
from torch import Tensor

from rq.collisions import keys_of


def quality(codes: np.ndarray) -> dict:
    """Figures of an index: items, distinct SIDs, collision rate, how many SIDs hold 1, 2, ... items, the entropy of the
    SIDs in nats, and by level the codes used, the fewest and most items of a used code, and the perplexity, which is
    exp of the entropy in nats: the number of codes in even use that would be as varied.
    """
    sizes = np.unique(keys_of(codes), return_counts=True)[1]
    used, spread, perplexity = [], [], []
    for level in codes.T:
        counts = np.unique(level[level >= 0], return_counts=True)[1]
        used.append(len(counts))
        spread.append([int(counts.min()), int(counts.max())])
        perplexity.append(round(float(np.exp(_entropy(counts))), 2))
    return {
        "n_items": len(codes),
        "distinct_sids": len(sizes),
        "collision_rate": 1 - len(sizes) / len(codes),
        "max_items_per_sid": int(sizes.max()),
        "items_per_sid": {str(n): int(c) for n, c in zip(*np.unique(sizes, return_counts=True), strict=True)},
        "sid_entropy": round(_entropy(sizes), 4),
        "codes_used": used,
        "items_per_code": spread,
        "perplexity": perplexity,
    }


def _entropy(counts: np.ndarray) -> float:
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def variance(embeddings: Tensor) -> float:
    """The sum of squares around the mean."""
    return (embeddings - embeddings.mean(dim=0)).square().sum(dtype=torch.float64).item()


@torch.inference_mode()
def fitted_error(embeddings: Tensor, codes: np.ndarray) -> list[float]:
    """Share of the variance of embeddings (items, dim) left after each level that every item has a code at."""
    residual, shares = embeddings - embeddings.mean(dim=0), []
    total = residual.square().sum(dtype=torch.float64).item()
    for column in codes.T[(codes >= 0).all(axis=0)]:
        code = torch.from_numpy(np.unique(column, return_inverse=True)[1].reshape(-1)).to(residual.device)
        sums = residual.new_zeros(int(code.max()) + 1, residual.shape[1]).index_add_(0, code, residual)
        residual = residual - (sums / torch.bincount(code).unsqueeze(1))[code]
        shares.append(round(residual.square().sum(dtype=torch.float64).item() / total, 6))
    return shares
