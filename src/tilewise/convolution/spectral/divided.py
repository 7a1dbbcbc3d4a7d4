"""Divided differences of exp(-i s): what the Fourier transform of a simplex is made of, stable for any
nodes."""

from __future__ import annotations

import torch
from torch import Tensor

CLOSE = 1.0  # nodes nearer than this in all are expanded around their mean; farther ones are subtracted
TERMS = {
    torch.float32: 10,
    torch.float64: 17,
}  # terms of the expansion until what is left is below a rounding


def divided_exp(nodes: Tensor) -> Tensor:
    """The divided difference of `exp(-i s)` at all nodes of the last dimension: `[..., J + 1]` real to
    `[...]` complex.

    `sum_t exp(-i s_t) / prod_{l != t} (s_t - s_l)` where the nodes differ; where some are equal, its limit, a
    derivative. That sum loses everything where nodes are near; here the nodes are sorted, the difference is
    built from neighbours, and every run of nodes within 1 radian is taken from the series around its mean
    instead. So no subtraction is divided by less than 1, and errors stay a few roundings of the largest
    summand. Differentiable.

    Args:
        nodes: float32 or float64, at least one node; in practice up to 4.

    Raises ValueError or TypeError for another dtype and for no nodes.
    """
    if nodes.dtype not in TERMS:
        raise TypeError(f"nodes must be float32 or float64, got {nodes.dtype}")
    if not nodes.ndim or not nodes.shape[-1]:
        raise ValueError(f"nodes must be [..., J + 1] with at least one node, got {list(nodes.shape)}")
    nodes = nodes.sort(-1).values
    row = [torch.polar(torch.ones_like(s), -s) for s in nodes.unbind(-1)]
    for order in range(1, nodes.shape[-1]):
        row = [_wider(nodes[..., i : i + order + 1], row[i], row[i + 1]) for i in range(len(row) - 1)]
    return row[0]


def _wider(run: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The difference over a sorted run of nodes, given those without its last and without its first."""
    spread = run[..., -1] - run[..., 0]
    close = spread < CLOSE
    apart = (right - left) / torch.where(close, torch.ones_like(spread), spread)
    mean = run.mean(-1)
    # Where the run is wide its series is not used, and must not overflow: a 0 times inf would be a gradient of NaN.
    offsets = torch.where(close.unsqueeze(-1), run - mean.unsqueeze(-1), torch.zeros_like(run))
    return torch.where(close, _series(mean, offsets), apart)


def _series(mean: Tensor, offsets: Tensor) -> Tensor:
    """exp(-i mean) sum_k (-i)^(k + J) / (k + J)! h_k(offsets), h_k the complete symmetric polynomial."""
    order = offsets.shape[-1] - 1
    # h_k of the first nodes, node by node: h_k(a, b) = h_k(a) + b h_{k-1}(a, b)
    symmetric = [torch.ones_like(mean)] + [torch.zeros_like(mean)] * (TERMS[mean.dtype] - 1)
    for offset in offsets.unbind(-1):
        for k in range(1, len(symmetric)):
            symmetric[k] = symmetric[k] + offset * symmetric[k - 1]
    real, imag = torch.zeros_like(mean), torch.zeros_like(mean)
    scale = 1.0
    for k in range(1, order + 1):
        scale /= k
    for k, h in enumerate(symmetric):
        power = (k + order) % 4  # of -i: 1, -i, -1, i
        if power % 2 == 0:
            real = real + (scale if power == 0 else -scale) * h
        else:
            imag = imag + (-scale if power == 1 else scale) * h
        scale /= k + order + 1
    return torch.polar(torch.ones_like(mean), -mean) * torch.complex(real, imag)
