"""RQ-VAE, an autoencoder whose latent is residually quantised, and RQ-KMeans+, its variant that starts from k-means.

RQ-VAE: arXiv 2107.03312; for semantic IDs: TIGER, arXiv 2305.05065. RQ-KMeans+: GPR, arXiv 2511.10138.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rq.models.layers import MLP
from rq.models.rq import ResidualModel, ResidualQuantizer


class RQVAEOutput(NamedTuple):
    """One forward pass over n embeddings."""

    loss: Tensor  # () reconstruction + quant_loss_weight * quantisation
    reconstruction_loss: Tensor  # () mean over coordinates
    quantization_loss: Tensor  # () mean over levels
    reconstruction: Tensor  # (n, in_dim)
    codes: Tensor  # (n, levels) int64


class RQVAE(ResidualModel):
    """Encoder in_dim-layers-e_dim, residual quantizer, decoder e_dim-layers reversed-in_dim.

    `layers` are the hidden sizes only, as in LC-Rec and LETTER. `sk_epsilons` has one value per level; 0 means the
    nearest code. `config` holds the arguments of the constructor.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        layers: Sequence[int] = (2048, 1024, 512, 256, 128, 64),
        e_dim: int = 32,
        num_emb_list: Sequence[int] = (256, 256, 256),
        beta: float = 0.25,
        dropout_prob: float = 0.0,
        bn: bool = False,
        loss_type: str = "mse",
        quant_loss_weight: float = 1.0,
        sk_epsilons: Sequence[float] = (0.0, 0.0, 0.0),
        sk_iters: int = 50,
    ):
        super().__init__()
        self.config = {
            "in_dim": in_dim, "layers": list(layers), "e_dim": e_dim, "num_emb_list": list(num_emb_list), "beta": beta,
            "dropout_prob": dropout_prob, "bn": bn, "loss_type": loss_type, "quant_loss_weight": quant_loss_weight,
            "sk_epsilons": list(sk_epsilons), "sk_iters": sk_iters,
        }  # fmt: skip
        self.in_dim = in_dim
        sizes = [in_dim, *layers, e_dim]
        self.reconstruction_loss = {"mse": F.mse_loss, "l1": F.l1_loss}[loss_type]
        self.quant_loss_weight = quant_loss_weight
        self.encoder = MLP(sizes, dropout=dropout_prob, batch_norm=bn)
        self.quantizer = ResidualQuantizer(
            num_emb_list=num_emb_list, dim=e_dim, beta=beta, sk_epsilons=sk_epsilons, sk_iters=sk_iters
        )
        self.decoder = MLP(sizes[::-1], dropout=dropout_prob, batch_norm=bn)

    def latent(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def reconstruct(self, quantized: Tensor) -> Tensor:
        return self.decoder(quantized)

    def forward(self, x: Tensor) -> RQVAEOutput:
        quantized = self.quantizer(self.latent(x))
        reconstruction = self.reconstruct(quantized.quantized)
        reconstruction_loss = self.reconstruction_loss(reconstruction, x)
        loss = reconstruction_loss + self.quant_loss_weight * quantized.loss
        return RQVAEOutput(loss, reconstruction_loss, quantized.loss, reconstruction, quantized.codes)

    @torch.no_grad()
    def init_by_kmeans(self, x: Tensor, *, iterations: int, seed: int) -> None:
        """Set all codebooks by k-means on the latents of the batch x (n, in_dim)."""
        self.quantizer.init_by_kmeans(self.latent(x), iterations=iterations, seed=seed)

    @torch.no_grad()
    def restart_dead_codes(self, x: Tensor, counts: Sequence[Tensor], threshold: float) -> None:
        """Codes with `counts` (one (K,) per level) below `threshold` restart at latents of the batch x (n, in_dim)."""
        self.quantizer.restart_dead_codes(self.latent(x), counts, threshold)


class RQKMeansPlus(RQVAE):
    """z = x + MLP(x), and the last linear layer of the MLP starts at zero: at first z = x.

    Departure from the paper, which does not describe its decoder: the decoder has the same shortcut, so that training
    starts at the reconstruction error of the codebooks, not at that of a random network.
    """

    def __init__(self, *, in_dim: int, e_dim: int, **options):
        if e_dim != in_dim:
            raise ValueError(f"e_dim {e_dim} must equal in_dim {in_dim}: z = x + MLP(x)")
        super().__init__(in_dim=in_dim, e_dim=e_dim, **options)
        for network in (self.encoder, self.decoder):
            nn.init.zeros_(network.steps[-1].weight)
            nn.init.zeros_(network.steps[-1].bias)

    def latent(self, x: Tensor) -> Tensor:
        return x + self.encoder(x)

    def reconstruct(self, quantized: Tensor) -> Tensor:
        return quantized + self.decoder(quantized)
