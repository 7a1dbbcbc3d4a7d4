"""Tasks for one layer of HCFSSNet alone: lines to follow across a grid, and noise to tell by its spectrum."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tilewise.convolution import AFMM
from tilewise.convolution.images.vonss import DIRECTIONS

SIDE, WINDOW, WIDTH = 16, 8, 12
LOUD = 2.0  # deviation of what a window holds at its frequencies; that of the noise is 1


def _lines() -> tuple[Tensor, Tensor]:
    """Which line of each of `DIRECTIONS` a place lies on, and whether it is its end: `[4, SIDE, SIDE]` each."""
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    lines = torch.stack((row, column, row + column, row - column + SIDE - 1))
    last = SIDE - 1
    across, along = (column == 0) | (column == last), (row == 0) | (row == last)
    return lines, torch.stack((across, along, across | along, across | along)).float()


def lines(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Values at the ends of lines, and along them: what is seen `[count, SIDE, SIDE, 8]`, what is wanted
    `[count, SIDE, SIDE, 4]`, a channel for each direction and (seen) one that says where the ends are."""
    on, ends = _lines()
    gen = torch.Generator().manual_seed(seed)
    levels = torch.randn(count, len(DIRECTIONS), 2 * SIDE, generator=gen)
    wanted = levels.gather(2, on.flatten(1).expand(count, -1, -1)).unflatten(2, (SIDE, SIDE))
    seen = torch.cat((wanted * ends, ends.expand(count, -1, -1, -1)), 1)
    return seen.movedim(1, 3), wanted.movedim(1, 3)


class Follower(nn.Module):
    """One layer between linear ones: `[B, SIDE, SIDE, 8]` to `[B, SIDE, SIDE, 4]`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(8, WIDTH), layer, nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.layer(x))


def lines_loss(model: nn.Module, seed: int) -> Tensor:
    seen, wanted = lines(8, seed)
    return (model(seen) - wanted).square().mean()


def _octaves() -> Tensor:
    """Frequencies of a window, from slow to fast, in eight groups of eight: the group of each, `[WINDOW ** 2]`."""
    k = torch.arange(WINDOW).square()
    radius = (k.unsqueeze(1) + k).flatten()
    return radius.argsort(stable=True).argsort() // WINDOW


def bands(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows that hold one group of frequencies each, with noise and without, `[count, SIDE, SIDE, 1]`."""
    gen = torch.Generator().manual_seed(seed)
    across = SIDE // WINDOW
    group = torch.randint(WINDOW, (count, across, across, 1), generator=gen)
    loud = LOUD * torch.randn(count, across, across, WINDOW**2, generator=gen)
    held = ((_octaves() == group) * loud).unflatten(3, (WINDOW, WINDOW))  # [b, h, w, vertical, horizontal]
    k = torch.arange(WINDOW, dtype=torch.float32)
    waves = (2 / WINDOW) ** 0.5 * torch.cos(math.pi * k.unsqueeze(1) * (2 * k + 1) / (2 * WINDOW))
    waves[0] *= 0.5**0.5
    windows = torch.einsum("bhwij,iy,jx->bhywx", held, waves, waves)
    clean = windows.flatten(3).flatten(1, 2).unsqueeze(3)
    return clean + torch.randn(clean.shape, generator=gen), clean


def bands_loss(model: nn.Module, seed: int) -> Tensor:
    seen, clean = bands(64, seed)
    return (model(seen) - clean).square().mean()


class ByOthers(AFMM):
    """Weights made of another picture's spectrum. A control."""

    def modulation(self, spectrum: Tensor) -> Tensor:
        return super().modulation(spectrum.roll(1, 0))


def weigher(kind: type[AFMM] = AFMM, places: bool = False, **settings: bool) -> AFMM:
    """A layer that begins by changing nothing: with one channel it cannot come by the sign that its last layer
    lacks. `places` weighs places in a window instead of frequencies, without a cosine transform. A control."""
    layer = kind(1, WINDOW, **settings)
    nn.init.ones_(layer.out.weight)
    nn.init.zeros_(layer.out.bias)
    if places:
        layer.basis = torch.eye(WINDOW**2, dtype=torch.float64)
    return layer
