"""MoBA: every query attends to the key blocks whose mean it likes best."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.attention.scores import Centroid
from tilewise.attention.selects import Own, TopK
from tilewise.attention.stages import AsGiven, Recipe, Skip, Tiles


@dataclass(frozen=True)
class MoBA(Recipe):
    """Mixture of block attention with small blocks (Xiao et al., 2025, arXiv 2511.11571; Lu et al., 2025).

    Every query is routed alone: to its own block, always, and to the blocks whose mean key has the largest
    product with it, `top_k` in all. Tiles are one query high. Grouped heads: each query head routes for itself.

    The paper's guidance is in `router_snr` (why smaller blocks route better) and `KeyConvolution` (which makes
    neighbouring keys alike, for models trained with it).

    Args:
        block: keys per block. top_k: blocks per query, its own included.
    """

    block: int = 128
    top_k: int = 8
    name = "moba"
    reads = "q, k"

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"block must be an integer >= 1, got {self.block!r}")
        self.tiles()

    def tiles(self) -> Tiles:
        return Tiles(
            score=Centroid(),
            select=TopK(self.top_k),
            tile=(1, self.block),
            order=AsGiven(),
            always=(Own(),),
            rest=Skip(),
        )


class KeyConvolution(nn.Module):
    """The paper's short convolution on keys: `k + silu(causal depthwise convolution of k)`.

    Keys then carry some of their predecessors, so that a relevant token raises the mean of its whole
    neighbourhood. Applied before routing and attention; part of a model's training, not of a pretrained model.

    Args:
        channels: kv heads times head_dim. width: taps, the current token's included (the paper uses 3 and 5).

    Shapes: `[B, H_kv, N, D] -> [B, H_kv, N, D]`. Starts as the identity (zero taps).
    """

    def __init__(self, channels: int, width: int = 3) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be >= 1, got {width}")
        self.width = width
        self.taps = nn.Parameter(torch.zeros(channels, 1, width))

    def forward(self, k: Tensor) -> Tensor:
        b, h, n, d = k.shape
        flat = k.transpose(2, 3).reshape(b, h * d, n)
        mixed = F.conv1d(F.pad(flat, (self.width - 1, 0)), self.taps.to(k.dtype), groups=h * d)
        return k + F.silu(mixed).view(b, h, d, n).transpose(2, 3)


def router_snr(head_dim: int, block: int, gap: float, clustered: int = 1, cluster_gap: float = 0.0) -> float:
    """Signal-to-noise ratio of routing by block means, in the paper's statistical model.

    Keys are directions whose products with the query have variance 1/head_dim; one key of the right block stands
    out by `gap`, and `clustered - 1` neighbours in the same block by `cluster_gap`. The score of a block is the
    mean over its keys. Then SNR = (gap + (clustered - 1) cluster_gap) sqrt(head_dim / (2 block)): halving the
    block gains sqrt(2).
    """
    if head_dim < 1 or block < 1 or not 1 <= clustered <= block:
        raise ValueError("head_dim and block must be >= 1 and clustered in 1..block")
    return (gap + (clustered - 1) * cluster_gap) * math.sqrt(head_dim / (2 * block))


def router_recall(snr: float, blocks: int, top_k: int) -> float:
    """Probability that the right block is among the `top_k` best of `blocks`, in the same model.

    The right block's score is N(sqrt(2) snr, 1) and the others' N(0, 1), in units of their deviation; given the
    right one's score the number of others above it is binomial. Integrated numerically.
    """
    if not 1 <= top_k or blocks < 1:
        raise ValueError("blocks and top_k must be >= 1")
    if top_k >= blocks:
        return 1.0
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    above = torch.special.ndtr(-(z + math.sqrt(2) * snr))  # chance that one other block is better
    others = blocks - 1
    counts = torch.arange(top_k, dtype=torch.float64).unsqueeze(1)
    choose = torch.lgamma(torch.tensor(others + 1.0, dtype=torch.float64)) - torch.lgamma(counts + 1)
    choose = choose - torch.lgamma(others - counts + 1)
    binomial = (choose + torch.xlogy(counts, above) + torch.xlogy(others - counts, 1 - above)).exp()
    return float(torch.trapezoid(density * binomial.sum(0), z))
