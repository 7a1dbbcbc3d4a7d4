"""A photograph as a function of place, and the networks that training/train_fields.py fits to it."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.convolution import NSTR

SIDE = 128
IMAGES = ("camera", "coffee")


@cache
def picture(name: str) -> Tensor:
    """The middle square of one of scikit-image's photographs, grey, averaged to 128 x 128, from -1 to 1:
    `[N]`."""
    from skimage import data

    pixels = torch.from_numpy(getattr(data, name)()).double()
    grey = pixels if pixels.ndim == 2 else pixels.mean(2)
    side = min(grey.shape) // SIDE * SIDE
    top, left = ((n - side) // 2 for n in grey.shape)
    grey = grey[top : top + side, left : left + side]
    small = F.avg_pool2d(grey[None, None], side // SIDE)[0, 0]
    return (small / 127.5 - 1).float().flatten()


@cache
def places() -> Tensor:
    """Middles of the pixels in the unit square, row-major: `[N, 2]`."""
    line = (torch.arange(SIDE) + 0.5) / SIDE
    return torch.cartesian_prod(line, line)


def held_out() -> Tensor:
    """Which pixels no fit has seen: every fifth, at random."""
    return torch.rand(SIDE * SIDE, generator=torch.Generator().manual_seed(3)) < 0.2


class Siren(nn.Module):
    """Sines of sines (Sitzmann et al., 2020, arXiv 2006.09661), with its initialisation."""

    def __init__(self, width: int = 51, layers: int = 3, pace: float = 30.0) -> None:
        super().__init__()
        sizes = [2] + [width] * layers
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.head, self.pace = nn.Linear(width, 1), pace
        for i, layer in enumerate([*self.layers, self.head]):
            bound = 1 / 2 if i == 0 else math.sqrt(6 / width) / pace
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x - 1
        for layer in self.layers:
            x = torch.sin(self.pace * layer(x))
        return self.head(x)


class Features(nn.Module):
    """A perceptron of random Fourier features (Tancik et al., 2020, arXiv 2006.10739)."""

    def __init__(self, count: int = 32, width: int = 48, layers: int = 2, scale: float = 8.0) -> None:
        super().__init__()
        self.register_buffer("waves", 2 * math.pi * scale * torch.randn(2, count))
        sizes = [2 * count] + [width] * layers
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.waves
        x = torch.cat((x.sin(), x.cos()), 1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


class Global(NSTR):
    """NSTR whose spectrum is the same everywhere: more frequencies in place of the field."""

    def __init__(self) -> None:
        super().__init__(frequencies=1350, cells=1, hidden=16)
        self.spectrum = Same(1350)
        self.law = nn.Identity()


class Same(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.values = nn.Parameter(0.1 * torch.randn(1, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.values.expand(len(x), -1)


NETWORKS = {
    "nstr": lambda: NSTR(frequencies=16, cells=14, hidden=16),
    "nstr-free": lambda: NSTR(frequencies=16, cells=14, hidden=16),
    "nstr-global": Global,
    "siren": Siren,
    "features": Features,
}
TRANSPORT = {"nstr": 1e-3}  # weight of the regulariser, of those that have one


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def decibels(model: nn.Module, image: str, which: Tensor) -> float:
    """Peak signal to noise over some pixels."""
    missed = (model(places()[which])[:, 0] - picture(image)[which]).square().mean()
    return float(10 * torch.log10(4 / missed))
