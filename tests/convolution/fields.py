"""Pictures as functions of place, and the networks that training/train_fields.py fits to them."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.convolution import NSTR
from tilewise.convolution.spectral.nstr import SineLayer

WEIGHTS = Path(__file__).parent / "weights"
SIDE = 128
SEEDS = (0, 1, 2)
DRAWN = ("rings", "bent")  # whose frequency drifts; their networks are kept
PHOTOGRAPHS = ("camera", "coffee", "astronaut", "brick", "coins")
SLANTED = ("slanted brick", "slanted gravel", "slanted grass")
BUDGET = 3800  # parameters


def turns(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Phase of a drawn picture, in turns; its slope is the local frequency.

    "rings" are around a corner, from wide ones to one in 2.5 pixels on the diagonal; "bent" are stripes of waves
    that bend.
    """
    if name == "rings":
        return 0.2 * SIDE / 2**0.5 * (x**2 + y**2) + 0.25
    bends = 3 * torch.sin(2 * math.pi * x) * torch.cos(2 * math.pi * y)
    return 20 * x + 14 * y + 6 * x * y + bends


def local_frequency(name: str) -> Tensor:
    """Turns over the picture's side, at every pixel of a drawn picture: `[N]`."""
    sides = [side.requires_grad_() for side in places().clone().unbind(1)]
    slopes = torch.autograd.grad(turns(name, *sides).sum(), sides)
    return torch.stack(slopes).norm(dim=0)


@cache
def picture(name: str) -> Tensor:
    """From -1 to 1: `[N]`. A drawn picture, or a photograph of scikit-image: its middle square, grey, averaged
    to 128 x 128, or as a plane that is eight times as far at the bottom as at the top."""
    if name in DRAWN:
        return 0.5 * torch.sin(2 * math.pi * turns(name, *places().mT))
    from skimage import data

    pixels = torch.from_numpy(getattr(data, name.removeprefix("slanted "))()).double()
    grey = pixels if pixels.ndim == 2 else pixels.mean(2)
    if name in SLANTED:
        return (F.avg_pool2d(slanted(grey)[None, None], 8)[0, 0] / 127.5 - 1).float().flatten()
    side = min(grey.shape) // SIDE * SIDE
    top, left = ((n - side) // 2 for n in grey.shape)
    grey = grey[top : top + side, left : left + side]
    small = F.avg_pool2d(grey[None, None], side // SIDE)[0, 0]
    return (small / 127.5 - 1).float().flatten()


def slanted(grey: Tensor, far: float = 8.0) -> Tensor:
    """A picture seen at a slant, eight points a pixel's side: `[8 SIDE, 8 SIDE]`."""
    n = 8 * SIDE
    down, across = torch.meshgrid([(torch.arange(n).double() + 0.5) / n] * 2, indexing="ij")
    distance = 1 / (1 - down * (1 - 1 / far))
    where = torch.stack(((2 * across - 1) * distance / far, 2 * (distance - 1) / (far - 1) - 1), 2)
    return F.grid_sample(grey[None, None], where[None], align_corners=False)[0, 0]


@cache
def places() -> Tensor:
    """Middles of the pixels in the unit square, row-major: `[N, 2]`."""
    line = (torch.arange(SIDE) + 0.5) / SIDE
    return torch.cartesian_prod(line, line)


def held_out() -> Tensor:
    """Which pixels no fit has seen: every fifth, at random."""
    return torch.rand(SIDE * SIDE, generator=torch.Generator().manual_seed(3)) < 0.2


def siren(width: int, layers: int) -> nn.Module:
    """Sines of sines (Sitzmann et al., 2020, arXiv 2006.09661)."""

    class Centred(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x - 1)

    head, bound = nn.Linear(width, 1), math.sqrt(6 / width) / 30
    nn.init.uniform_(head.weight, -bound, bound)
    sines = [SineLayer(2 if i == 0 else width, width, first=i == 0) for i in range(layers)]
    return Centred(*sines, head)


class Shifted(NSTR):
    """A control: the same field moves the waves in place of scaling them."""

    def forward(self, places: Tensor) -> Tensor:
        turned = F.linear(2 * places - 1, self.waves.weight, self.waves.bias) * self.waves.pace
        return self.decoder(torch.sin(turned + self.spectrum(places)))


class Features(nn.Module):
    """A perceptron of random Fourier features (Tancik et al., 2020, arXiv 2006.10739)."""

    def __init__(self, count: int = 24, width: int = 40, scale: float = 4.0) -> None:
        super().__init__()
        self.register_buffer("waves", 2 * math.pi * scale * torch.randn(2, count))
        sizes = [2 * count, width, width]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.waves
        x = torch.cat((x.sin(), x.cos()), 1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


class Grids(nn.Module):
    """Features of grids from coarse to fine and a perceptron: Instant-NGP's (Mueller et al., 2022, arXiv
    2201.05989) without hashing, which so few cells do not need."""

    def __init__(self, cells: tuple[int, ...] = (6, 12, 24), width: int = 40) -> None:
        super().__init__()
        self.grids = nn.ParameterList(nn.Parameter(0.1 * torch.randn(1, 2, n + 1, n + 1)) for n in cells)
        sizes = [2 * len(cells), width, width]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        where = (2 * x.flip(1) - 1)[None, None]
        x = torch.cat([F.grid_sample(grid, where, align_corners=True)[0, :, 0].mT for grid in self.grids], 1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def size(model: nn.Module) -> int:
    """Parameters that make the picture: the transport network only serves the fit."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("law."))


def made(kind: str, layers: int) -> nn.Module:
    """The widest network of a kind and depth within the budget."""
    kinds = {
        "nstr": lambda width: NSTR(frequencies=width, layers=layers - 1),
        "shifted": lambda width: Shifted(frequencies=width, layers=layers - 1),
        "siren": lambda width: siren(width, layers),
        "features": lambda width: Features(width=width),
        "grids": lambda width: Grids(width=width),
    }
    with torch.device("meta"):
        width = max(w for w in range(20, 80) if size(kinds[kind](w)) <= BUDGET)
    return kinds[kind](width)


@cache
def load(kind: str, image: str, seed: int) -> nn.Module:
    """As kept by the script, with the depth that served best."""
    found = load_file(WEIGHTS / f"field-{image}-{kind}-{seed}.safetensors")
    layers = int(found.pop("layers"))
    model = made(kind, layers)
    model.load_state_dict(found)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def decibels(model: nn.Module, image: str, which: Tensor) -> float:
    """Peak signal to noise over some pixels."""
    missed = (model(places()[which])[:, 0] - picture(image)[which]).square().mean()
    return float(10 * torch.log10(4 / missed))
