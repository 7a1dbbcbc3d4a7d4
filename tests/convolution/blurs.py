"""Motion blur of known kernels on grey photographs full of edges, circular and with a little noise."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.convolution import photographs as p
from tilewise.convolution import convolve

SIDE = 15  # of kernels
NOISE = 1 / 255
TRAINED = (*p.TRAINED[:3], "immunohistochemistry", "camera", "brick", "grass", "text")
HELD_OUT = ("chelsea", "gravel", "coins", "page")


@lru_cache
def _grey(name: str) -> tuple[Tensor, ...]:
    """A photograph as `[H, W]` from -0.5 to 0.5, and at half its size, where edges are sharper."""
    if name in (*p.TRAINED, *p.HELD_OUT):
        full = p.photograph(name).mean(0)
    else:
        from skimage import data

        full = torch.tensor(getattr(data, name)()).float() / 255 - 0.5
    return full, F.avg_pool2d(full[None], 2)[0]


def crops(count: int, side: int, seed: int, names: tuple[str, ...] = TRAINED) -> Tensor:
    """`[count, 1, side, side]`, turned and mirrored, without those that are nearly flat."""
    gen = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    while len(made) < count:
        name, size, turns, mirrored, y, x = torch.rand(6, generator=gen).tolist()
        whole = _grey(names[int(name * len(names))])[int(size * 2)]
        top, left = int(y * (whole.shape[0] - side + 1)), int(x * (whole.shape[1] - side + 1))
        crop = torch.rot90(whole[top : top + side, left : left + side], int(turns * 4))
        if crop.std() >= 0.1:
            made.append(crop.flip(1) if mirrored < 0.5 else crop)
    return torch.stack(made).unsqueeze(1)


def lines(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Kernels `[count, SIDE, SIDE]` of sum 1, straight motion of 7 to 13 pixels, and the directions, in radians."""
    gen = torch.Generator().manual_seed(seed)
    length, angle = torch.rand(2, count, 1, 1, generator=gen).unbind(0)
    at = torch.arange(SIDE) - SIDE // 2.0
    length, angle = 7 + 6 * length, angle * math.pi
    along = angle.cos() * at + angle.sin() * at.unsqueeze(1)
    across = angle.cos() * at.unsqueeze(1) - angle.sin() * at
    made = (0.5 + length / 2 - along.abs()).clamp(0, 1) * (1 - across.abs()).clamp(min=0)
    return made / made.sum((1, 2), keepdim=True), angle.flatten()


def blurred(images: Tensor, kernels: Tensor, seed: int) -> Tensor:
    """Each image convolved circularly with its kernel, and noise."""
    seen = convolve(images, at_corner(kernels, *images.shape[2:]).unsqueeze(1))
    return seen + NOISE * torch.randn(seen.shape, generator=torch.Generator().manual_seed(seed))


def at_corner(kernels: Tensor, height: int, width: int) -> Tensor:
    """Kernels `[B, SIDE, SIDE]` on a plane `[B, height, width]` with the origin in the upper left corner."""
    padded = F.pad(kernels, (0, width - SIDE, 0, height - SIDE))
    return padded.roll((-(SIDE // 2), -(SIDE // 2)), (1, 2))


def centred(found: Tensor) -> Tensor:
    """The way back: `[B, H, W]` to `[B, SIDE, SIDE]`."""
    return found.roll((SIDE // 2, SIDE // 2), (1, 2))[:, :SIDE, :SIDE]


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Of each pair of kernels, `[B]`, by Pearson."""
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (a, b))
    return F.cosine_similarity(a, b, 1)


def direction(kernels: Tensor) -> Tensor:
    """In which direction the positive part of each kernel is longest, in radians, `[B]`."""
    at = torch.arange(SIDE) - SIDE // 2.0
    weight = kernels.clamp(min=0)
    weight = weight / weight.sum((1, 2), keepdim=True)
    x, y = at - (weight * at).sum((1, 2), keepdim=True), at - (weight.mT * at).sum((1, 2), keepdim=True)
    xx, yy = (weight * x.square()).sum((1, 2)), (weight.mT * y.square()).sum((1, 2))
    return 0.5 * torch.atan2(2 * (weight * x * y.mT).sum((1, 2)), xx - yy)


def turned(a: Tensor, b: Tensor) -> Tensor:
    """By how many degrees the directions differ, 0 to 90."""
    apart = (a - b).remainder(math.pi)
    return torch.minimum(apart, math.pi - apart).rad2deg()


def wiener(seen: Tensor, kernels: Tensor, noise: float) -> Tensor:
    """The images, if these kernels blurred them; `noise` is its power beside that of the images."""
    factor = torch.fft.rfft2(at_corner(kernels, *seen.shape[2:])).unsqueeze(1)
    spectrum = torch.fft.rfft2(seen) * factor.conj() / (factor.abs().square() + noise)
    return torch.fft.irfft2(spectrum, seen.shape[2:])
