"""The multi-layer perceptron that encodes and decodes."""

from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them and none after the last: (..., sizes[0]) -> (..., sizes[-1]).

    Dropout comes before each linear layer, batch norm after each one except the last. Weights start from Xavier's
    normal distribution, biases at zero.
    """

    def __init__(self, sizes: Sequence[int], *, dropout: float = 0.0, batch_norm: bool = False):
        super().__init__()
        steps: list[nn.Module] = []
        for position, (n_in, n_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            linear = nn.Linear(n_in, n_out)
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
            steps += [nn.Dropout(dropout), linear]
            if position < len(sizes) - 2:
                steps += [nn.BatchNorm1d(n_out), nn.ReLU()] if batch_norm else [nn.ReLU()]
        self.steps = nn.Sequential(*steps)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(x)
