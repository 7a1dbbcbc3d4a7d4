"""Fourier-VLM: vision tokens as the low corner of their cosine transform, fewer tokens of the same width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tilewise.convolution.spectral.grids import check_count, wide
from tilewise.transforms import dct, idct


@dataclass(frozen=True)
class Compressed:
    """Fewer vision tokens, and what they kept.

    tokens: `[B, h * w, C]`. energy: the share of each picture's sum of squares that the kept frequencies
    hold, `[B]` (1 for a picture of zeros). grid: (h, w). before: (H, W), from which they came.
    """

    tokens: Tensor
    energy: Tensor
    grid: tuple[int, int]
    before: tuple[int, int]

    @property
    def ratio(self) -> float:
        """Tokens before over tokens now."""
        return math.prod(self.before) / math.prod(self.grid)


class FourierVLM(nn.Module):
    """Compresses a grid of vision tokens by a low pass; no parameters.

    A 2-D cosine transform of every channel, the corner of the h x w lowest frequencies, and the inverse
    transform on an h x w grid: tokens that are the picture drawn with fewer points, whose mean is the
    picture's mean. `expand` gives the smoothest grid of the old size that has these frequencies: the
    low-passed picture itself.

    Args:
        grid: (H, W) of the tokens that come. kept: (h, w) of those that stay, h <= H and w <= W.

    `forward(x [B, H * W, C])` gives `Compressed`; float16, bfloat16, float32 or float64 (transforms in
    float32 at least). Raises ValueError for settings and inputs that do not fit.

    After Fourier-VLM (Wang et al., 2025, arXiv 2508.06038). The language model and its training are not part
    of this; scaled so that a constant picture keeps its value, as a model trained on the tokens expects.
    """

    def __init__(self, grid: Sequence[int], kept: Sequence[int]) -> None:
        super().__init__()
        self.grid, self.kept = _pair("grid", grid), _pair("kept", kept)
        if any(few > many for few, many in zip(self.kept, self.grid)):
            raise ValueError(f"kept must not exceed grid, got {self.kept} and {self.grid}")

    def forward(self, x: Tensor) -> Compressed:
        coefficients = self._transform(x, self.grid)
        low = coefficients[:, : self.kept[0], : self.kept[1]]
        whole = coefficients.square().sum((1, 2, 3))
        energy = torch.where(
            whole > 0, low.square().sum((1, 2, 3)) / whole.clamp(min=whole.new_tensor(1e-30)), 1.0
        )
        tokens = self._inverse(low * self._scale(), self.kept).to(x.dtype)
        return Compressed(tokens, energy, self.kept, self.grid)

    def expand(self, tokens: Tensor) -> Tensor:
        """`[B, h * w, C]` to `[B, H * W, C]`: what of the picture the tokens hold."""
        low = self._transform(tokens, self.kept) / self._scale()
        whole = low.new_zeros(low.shape[0], *self.grid, low.shape[3])
        whole[:, : self.kept[0], : self.kept[1]] = low
        return self._inverse(whole, self.grid).to(tokens.dtype)

    def _scale(self) -> float:
        """Orthonormal transforms of another size: so that the mean stays."""
        return math.sqrt(math.prod(self.kept) / math.prod(self.grid))

    @staticmethod
    def _transform(x: Tensor, sides: tuple[int, int]) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[1] != math.prod(sides):
            given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be [B, {sides[0]} * {sides[1]}, C], got {given}")
        return dct2(wide(x).unflatten(1, sides))

    @staticmethod
    def _inverse(z: Tensor, sides: tuple[int, int]) -> Tensor:
        return idct2(z).flatten(1, 2)


def _pair(name: str, sides: Sequence[int]) -> tuple[int, int]:
    found = tuple(sides) if isinstance(sides, (tuple, list, torch.Size)) else ()
    if len(found) != 2:
        raise ValueError(f"{name} must be two integers >= 1, got {sides!r}")
    return check_count(name, found[0]), check_count(name, found[1])


def dct2(x: Tensor) -> Tensor:
    """Orthonormal 2-D cosine transform of `[B, H, W, C]` over H and W."""
    return dct(dct(x, 1), 2) if x.numel() else x


def idct2(z: Tensor) -> Tensor:
    """The inverse of `dct2`."""
    return idct(idct(z, 1), 2) if z.numel() else z
