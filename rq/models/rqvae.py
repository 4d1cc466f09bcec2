"""RQ-VAE: an autoencoder whose code is residually quantised (arXiv 2107.03312; as semantic IDs: TIGER, 2305.05065)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rq.models.layers import MLP
from rq.models.rq import Codes, ResidualQuantizer


class RQVAEOutput(NamedTuple):
    """One forward pass over n embeddings."""

    loss: Tensor  # () reconstruction + quant_loss_weight * quantisation
    reconstruction_loss: Tensor  # () mean over coordinates
    quantization_loss: Tensor  # () mean over levels
    reconstruction: Tensor  # (n, in_dim)
    codes: Tensor  # (n, levels) int64


class RQVAE(nn.Module):
    """Encoder in_dim-layers-e_dim, residual quantizer, decoder the other way round.

    `layers` are the hidden sizes: the input dimension is put before them and `e_dim` after them, as in LC-Rec and
    LETTER. `sk_epsilons` has one value a level, 0 for nearest-code assignment.
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
        sizes = [in_dim, *layers, e_dim]
        self.reconstruction_loss = {"mse": F.mse_loss, "l1": F.l1_loss}[loss_type]
        self.quant_loss_weight = quant_loss_weight
        self.encoder = MLP(sizes, dropout=dropout_prob, batch_norm=bn)
        self.quantizer = ResidualQuantizer(
            num_emb_list=num_emb_list, dim=e_dim, beta=beta, sk_epsilons=sk_epsilons, sk_iters=sk_iters
        )
        self.decoder = MLP(sizes[::-1], dropout=dropout_prob, batch_norm=bn)

    def forward(self, x: Tensor) -> RQVAEOutput:
        quantized = self.quantizer(self.encoder(x))
        reconstruction = self.decoder(quantized.quantized)
        reconstruction_loss = self.reconstruction_loss(reconstruction, x)
        loss = reconstruction_loss + self.quant_loss_weight * quantized.loss
        return RQVAEOutput(loss, reconstruction_loss, quantized.loss, reconstruction, quantized.codes)

    @torch.inference_mode()
    def encode(self, x: Tensor, batch_size: int = 20480) -> Codes:
        """Codes of x (n, in_dim), each level's nearest, without dropout; leaves the model in evaluation mode."""
        self.eval()
        parts = [self.quantizer.encode(self.encoder(batch)) for batch in x.split(batch_size)]
        return Codes(torch.cat([p.codes for p in parts]), torch.cat([p.last_residual for p in parts]))

    @torch.no_grad()
    def init_by_kmeans(self, x: Tensor, *, iterations: int, seed: int) -> None:
        """All codebooks from k-means on the encoded batch x (n, in_dim)."""
        self.quantizer.init_by_kmeans(self.encoder(x), iterations=iterations, seed=seed)
