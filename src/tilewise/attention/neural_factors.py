"""Low-rank biases that depend on the input: factors from small networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tilewise.attention.biases import LowRankBias


class NeuralFactors(nn.Module):
    """Factors of a bias that depends on the input, from two small networks (the paper's third case).

    Each is three linear layers with tanh between, from features of the tokens to `heads * rank` numbers, as the
    authors fit to AlphaFold 3's pair bias (width 256, rank 96). Ours have offsets, theirs have none.

    Args:
        features: per token. heads: of the bias (kv heads share nothing here: as many keys' factors as heads).
        rank: of the factors. width: of the hidden layers.

    Shapes: `x_q [B, N_q, F]`, `x_k [B, N_k, F]` to a `LowRankBias` with factors `[B, heads, N, rank]`.
    """

    def __init__(self, features: int, heads: int, rank: int = 96, width: int = 256) -> None:
        super().__init__()
        for name, value in (("features", features), ("heads", heads), ("rank", rank), ("width", width)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        self.heads = heads
        self.q_net, self.k_net = (
            nn.Sequential(
                nn.Linear(features, width), nn.Tanh(),
                nn.Linear(width, width), nn.Tanh(),
                nn.Linear(width, heads * rank),
            )
            for _ in range(2)
        )  # fmt: skip

    def forward(self, x_q: Tensor, x_k: Tensor) -> LowRankBias:
        q, k = (
            net(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for net, x in ((self.q_net, x_q), (self.k_net, x_k))
        )
        return LowRankBias(q, k)

    def loss(self, x_q: Tensor, x_k: Tensor, dense: Tensor) -> Tensor:
        """Mean squared difference to the bias `dense [B|1, heads, N_q, N_k]`: what the paper trains on."""
        return (self(x_q, x_k).dense() - dense).square().mean()

    def fit(self, x_q: Tensor, x_k: Tensor, dense: Tensor, steps: int = 500, lr: float = 1e-3) -> float:
        """Train on one batch with Adam; returns the last loss. For more data, train on `loss` yourself."""
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        loss = torch.zeros(())
        for _ in range(steps):
            optimizer.zero_grad()
            loss = self.loss(x_q, x_k, dense)
            loss.backward()
            optimizer.step()
        return float(loss.detach())
