"""Kernels as functions of a place: implicit networks over coordinates, alone or told what an image shows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def coordinates(size: int, dims: int, like: Tensor) -> Tensor:
    """Every cell's place from -1 to 1 along each axis, `[size ** dims, dims]`, the last axis fastest."""
    line = torch.linspace(-1, 1, size, dtype=like.dtype, device=like.device)
    return torch.stack(torch.meshgrid(*[line] * dims, indexing="ij"), -1).flatten(0, -2)


def begin(linear: nn.Linear, bias: float) -> None:
    """Weights that keep the size of what passes; biases all alike."""
    nn.init.kaiming_uniform_(linear.weight, nonlinearity="linear")
    nn.init.constant_(linear.bias, bias)


class SineFilters(nn.Module):
    """`sin(W c)` of coordinates c: frequencies are spread by a gamma distribution, lower in later layers."""

    def __init__(self, dims: int, hidden: int, layer: int, omega: float, alpha: float = 6.0) -> None:
        super().__init__()
        self.linear = nn.Linear(dims, hidden)
        spread = torch.distributions.Gamma(alpha / (layer + 1), 1.0).sample((hidden, dims))
        with torch.no_grad():
            self.linear.weight.mul_(2 * math.pi * omega * spread)
            self.linear.bias.zero_()

    def forward(self, places: Tensor) -> Tensor:
        return torch.sin(self.linear(places))


class HyperKernel(nn.Module):
    """A slow network: a kernel `[channels, size, ...]` as an implicit function of the place.

    `h_0 = g_0(c)`, `h_i = g_i(c) * (A_i h_{i-1}) + b(c)`, and the kernel is `A h` (a multiplicative filter
    network, as in the paper): g are `SineFilters`, b one number for each place.

    Args:
        channels, size: of the kernel. dims: its axes. hidden, layers: of the network. omega: frequencies at
            first.

    Raises ValueError for sizes below 1.
    """

    def __init__(
        self, channels: int, size: int, dims: int = 2, hidden: int = 32, layers: int = 2, omega: float = 1.0
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("size", size), ("dims", dims), ("hidden", hidden)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        self.size, self.dims = size, dims
        self.filters = nn.ModuleList(SineFilters(dims, hidden, i, omega) for i in range(layers + 1))
        self.linears = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.places = nn.Parameter(torch.zeros(size**dims, 1))
        self.out = nn.Linear(hidden, channels)
        with torch.no_grad():
            for linear in self.linears:
                begin(linear, 1.0)  # type: ignore[arg-type]
            begin(self.out, 0.0)
            self.out.weight.mul_(size ** (-dims / 2))

    def forward(self) -> Tensor:
        places = coordinates(self.size, self.dims, self.places)
        made = self.filters[0](places)
        for wave, linear in zip(self.filters[1:], self.linears):
            made = wave(places) * linear(made) + self.places
        return self.out(made).T.unflatten(1, [self.size] * self.dims)


class ContextKernel(HyperKernel):
    """A slow network that is told what the image shows: a depthwise kernel `[B, channels, size, size]` for
    each.

    The image, pooled to the kernel's size, makes factors for each layer of the network. Between layers the
    values are
    renormalised: `alpha stop(h) + beta h / |h|`, so that gradients flow through the second part only.

    Differs from the authors' code in a kernel for each image, where theirs is of the mean over the batch, and
    in that alpha and beta are trained.
    """

    def __init__(
        self, channels: int, size: int, hidden: int = 32, layers: int = 2, omega: float = 1.0
    ) -> None:
        super().__init__(channels, size, 2, hidden, layers, omega)
        self.look = nn.Sequential(nn.Linear(channels, hidden), nn.Linear(hidden, hidden), nn.GELU())
        self.factors = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.alpha = nn.Parameter(torch.full((layers, hidden), 1.0))
        self.beta = nn.Parameter(torch.full((layers, hidden), 0.1))
        with torch.no_grad():
            for factor in self.factors:
                begin(factor, 1.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        places = coordinates(self.size, 2, self.places)
        seen = self.look(F.adaptive_avg_pool2d(x, self.size).flatten(2).mT)  # [b, k * k, hidden]
        made = self.filters[0](places).unsqueeze(0)
        for i, (wave, linear) in enumerate(zip(self.filters[1:], self.linears)):
            made = wave(places) * linear(made) + self.places
            # Each channel's values over all places have length 1.
            made = self.alpha[i] * made.detach() + self.beta[i] * F.normalize(made, dim=1)
            made = made * self.factors[i](seen)
        return self.out(made).mT.unflatten(2, (self.size, self.size))
