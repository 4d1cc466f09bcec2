"""Quality figures of an index: collisions, use of the codes, error.

collision_rate         1 - distinct SIDs / items
items_per_sid          how many SIDs have 1, 2, … items
sid_entropy            entropy of the SIDs in nats
codes_used             distinct codes, per level
items_per_code         fewest and most items of a used code, per level
perplexity             exp of the entropy of the codes in nats, per level: K where K codes are used equally often
reconstruction_error   share of the embeddings' variance left after 1, 2, … levels, by the codebooks or the decoder
fitted_error           the same by the mean residual of each code's items: needs only the index and the embeddings,
                       so it compares indexes of different quantizers
"""

import numpy as np
import torch
from torch import Tensor

from rq.collisions import keys_of


def quality(codes: np.ndarray) -> dict:
    """The figures of codes (items, depth), -1 for no token, that need nothing else."""
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
    """The sum of squares of embeddings (items, dim) around their mean."""
    return (embeddings - embeddings.mean(dim=0)).square().sum(dtype=torch.float64).item()


@torch.inference_mode()
def fitted_error(embeddings: Tensor, codes: np.ndarray) -> list[float]:
    """Share of the variance of embeddings (items, dim) left after each level at which all items have a code."""
    residual, shares = embeddings - embeddings.mean(dim=0), []
    total = residual.square().sum(dtype=torch.float64).item()
    for column in codes.T[(codes >= 0).all(axis=0)]:
        code = torch.from_numpy(np.unique(column, return_inverse=True)[1].reshape(-1)).to(residual.device)
        sums = residual.new_zeros(int(code.max()) + 1, residual.shape[1]).index_add_(0, code, residual)
        residual = residual - (sums / torch.bincount(code).unsqueeze(1))[code]
        shares.append(round(residual.square().sum(dtype=torch.float64).item() / total, 6))
    return shares
