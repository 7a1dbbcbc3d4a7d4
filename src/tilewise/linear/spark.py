"""Spark Transformer's feed-forward layer: some channels of the input say which neurons are worth computing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.attention import statistical
from tilewise.kernels.choose_keys.compact import compact


class SparkFFN(nn.Module):
    """A gated layer with about `active` neurons per token (You et al., 2025, arXiv 2506.06644).

    The first `rank` channels predict each neuron, `s = K1 x[:rank]`; a neuron whose prediction lies above the
    Gaussian quantile of its token (`StatisticalTopK`) is active. The answer is

        V (gelu(soft(s)) * (K2 x[rank:]))

    where `soft` is the prediction less the threshold, and 0 for all other neurons: K2 and V are read for active
    ones only. K1 and K2 together are as large as the first matrix of a plain layer, and all parameters as many.
    Gradients flow through the prediction, the threshold and the active neurons; no loss is added.

    Args:
        width: of the input and output. neurons: of the hidden layer. active: neurons to expect per token, a share
            in (0, 1] (the paper's is 0.08). rank: channels that predict; None is half of `width`.

    `forward`: `[..., width]` to the same. With `sparse=True` it gathers active rows, `2 x active` at most for each
    token, for few tokens at a time (decoding); by default it multiplies all and masks. Both give the same numbers
    where no token has more than that. Raises ValueError for settings out of range.
    """

    def __init__(self, width: int, neurons: int, *, active: float = 0.08, rank: int | None = None) -> None:
        super().__init__()
        for name, value in (("width", width), ("neurons", neurons)):
            if not isinstance(value, int) or value < 2:
                raise ValueError(f"{name} must be an integer >= 2, got {value!r}")
        if not 0 < active <= 1:
            raise ValueError(f"active must be in (0, 1], got {active!r}")
        self.rank = width // 2 if rank is None else rank
        if not isinstance(self.rank, int) or not 1 <= self.rank < width:
            raise ValueError(f"rank must be an integer in 1..{width - 1}, got {rank!r}")
        self.choose = statistical.StatisticalTopK(max(1, round(active * neurons)))
        self.predict = nn.Linear(self.rank, neurons, bias=False)
        self.gate = nn.Linear(width - self.rank, neurons, bias=False)
        self.out = nn.Linear(neurons, width, bias=False)

    def forward(self, x: Tensor, sparse: bool = False) -> Tensor:
        first, rest = x[..., : self.rank], x[..., self.rank :]
        opened = F.gelu(self.choose.soft(self.predict(first)))
        if not sparse:
            return self.out(opened * self.gate(rest))
        most = min(2 * self.choose.k, opened.shape[-1])
        index = compact(opened != 0, most).long()  # [..., most]
        none, at = index < 0, index.clamp(min=0)
        gate = (self.gate.weight[at] @ rest.unsqueeze(-1)).squeeze(-1)
        hidden = (opened.gather(-1, at) * gate).masked_fill(none, 0)
        return (hidden.unsqueeze(-2) @ self.out.weight.T[at]).squeeze(-2)

    def active(self, x: Tensor) -> Tensor:
        """Neurons active for each token of `x [..., width]`, int64 `[...]`."""
        with torch.no_grad():
            return (self.choose.soft(self.predict(x[..., : self.rank])) > 0).sum(-1)

    def work(self, x: Tensor) -> float:
        """Multiplications per token of this input, on average, over those of a plain layer as large."""
        neurons, width = self.out.in_features, self.out.out_features
        active = float(self.active(x).double().mean())
        return (self.rank * neurons + active * (width - self.rank) + active * width) / (2 * width * neurons)
