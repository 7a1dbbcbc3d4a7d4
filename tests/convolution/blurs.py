"""Blur of known kernels: straight motion and bells, with a little noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 15  # of kernels
NOISE = 1 / 255


def kernels(count: int, seed: int) -> Tensor:
    """`[count, SIDE, SIDE]`, each of sum 1 with its centre of mass in the middle; even ones are motion along a
    line of 4 to 13 pixels, odd ones bells of two widths from 0.6 to 2.4 pixels, in any direction. All are the
    same after half a turn, so convolution and correlation with them are one."""
    gen = torch.Generator().manual_seed(seed)
    first, second, angle = torch.rand(3, count, 1, 1, generator=gen).unbind(0)
    at = torch.arange(SIDE) - SIDE // 2.0
    angle = angle * math.pi
    along = angle.cos() * at + angle.sin() * at.unsqueeze(1)
    across = angle.cos() * at.unsqueeze(1) - angle.sin() * at
    line = (0.5 + (4 + 9 * first) / 2 - along.abs()).clamp(0, 1) * (1 - across.abs()).clamp(min=0)
    bell = torch.exp(-((along / (0.6 + 1.8 * first)).square() + (across / (0.6 + 1.8 * second)).square()) / 2)
    made = torch.where((torch.arange(count) % 2 == 0).view(-1, 1, 1), line, bell)
    return made / made.sum((1, 2), keepdim=True)


def blurred(images: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sharp and blurred images without the margin that a kernel reaches over, and the kernels, one for each."""
    used = kernels(len(images), seed)
    margin = SIDE // 2
    seen = F.conv2d(images.transpose(0, 1), used.unsqueeze(1), groups=len(images)).transpose(0, 1)
    gen = torch.Generator().manual_seed(seed)
    seen = seen + NOISE * torch.randn(seen.shape, generator=gen)
    return images[:, :, margin:-margin, margin:-margin], seen, used


def at_corner(used: Tensor, height: int, width: int) -> Tensor:
    """Kernels `[B, SIDE, SIDE]` on a plane `[B, height, width]` with the origin in the upper left corner."""
    padded = F.pad(used, (0, width - SIDE, 0, height - SIDE))
    return padded.roll((-(SIDE // 2), -(SIDE // 2)), (1, 2))


def centred(found: Tensor) -> Tensor:
    """The way back: `[B, H, W]` to `[B, SIDE, SIDE]`."""
    return found.roll((SIDE // 2, SIDE // 2), (1, 2))[:, :SIDE, :SIDE]


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Of each pair of kernels, `[B]`, by Pearson."""
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (a, b))
    return F.cosine_similarity(a, b, 1)
