"""RQ-KMeans+ is the identity before its first step, because the last layers start at zero."""

import torch

from rq.models.rqvae import RQKMeansPlus


def test_plus_needs_zero_last_layers():
    """Without them z would not be x."""
    torch.manual_seed(0)
    model = RQKMeansPlus(in_dim=6, e_dim=6, layers=[8], num_emb_list=[4], sk_epsilons=[0.0])
    x = torch.randn(5, 6)
    assert torch.equal(model.latent(x), x) and torch.equal(model.reconstruct(x), x)
    torch.nn.init.normal_(model.encoder.steps[-1].weight)
    assert not torch.equal(model.latent(x), x)
