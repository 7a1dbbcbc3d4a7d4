"""Adaptive frequency filters: a token mixer whose filter each picture makes of its own spectrum, and its
network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.convolution.spectral.grids import (
    check_count,
    check_divides,
    check_grid,
    from_modes,
    laid_out,
    to_modes,
)


class ComplexGroups(nn.Module):
    """Two layers of complex numbers, shared by all frequencies, each group of channels by itself.

    `forward(z [..., width] complex)` gives `[..., width]`: a ReLU on real and imaginary parts between the
    layers, and a soft threshold on both of the result.

    Args:
        width, groups: channels and how many groups they form. hidden: times as wide between the layers.
            threshold: of
        the soft threshold, >= 0; what is smaller becomes 0.
    """

    def __init__(
        self, width: int, groups: int, hidden: int = 1, threshold: float = 0.01, scale: float = 0.02
    ) -> None:
        super().__init__()
        check_divides("groups", groups, "width", check_count("width", width))
        check_count("hidden", hidden)
        if not threshold >= 0:
            raise ValueError(f"threshold must be >= 0, got {threshold}")
        size = width // groups
        self.groups, self.threshold = groups, float(threshold)
        self.up = nn.Parameter(scale * torch.randn(2, groups, size, size * hidden))
        self.up_bias = nn.Parameter(scale * torch.randn(2, groups, size * hidden))
        self.down = nn.Parameter(scale * torch.randn(2, groups, size * hidden, size))
        self.down_bias = nn.Parameter(scale * torch.randn(2, groups, size))

    def forward(self, z: Tensor) -> Tensor:
        real, imag = (part.unflatten(-1, (self.groups, -1)) for part in (z.real, z.imag))
        real, imag = (F.relu(part) for part in self._layer(real, imag, self.up, self.up_bias))
        parts = self._layer(real, imag, self.down, self.down_bias)
        real, imag = (F.softshrink(part, self.threshold).flatten(-2) for part in parts)
        return torch.complex(real, imag)

    @staticmethod
    def _layer(real: Tensor, imag: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """A complex matrix for each group: `[..., G, size]` of both parts."""
        (a, b), (c, d) = weight.to(real.dtype), bias.to(real.dtype)

        def times(x: Tensor, w: Tensor) -> Tensor:
            return torch.einsum("...gi,gio->...go", x, w)

        return times(real, a) - times(imag, b) + c, times(imag, a) + times(real, b) + d


class AFF(nn.Module):
    """Adaptive frequency filtering: multiply a picture's spectrum by a mask that a small network makes of it.

    By the convolution theorem this is a circular convolution of each channel with a kernel as large as the
    picture, another one for each picture (`kernel`), at the price of two Fourier transforms.

    Args:
        width: channels. groups: of the network, which runs on every frequency alike and on each group by
            itself.
        hidden, threshold: as of the network, `ComplexGroups`.

    `forward(x [B, N, width], grid=None)`: N places of a grid (H, W), row-major, or of a line; any dtype,
    computed in float32 at least. Raises ValueError for settings and inputs that do not fit.

    After Huang et al., 2023 (arXiv 2307.14008). As in the authors' code; the residual around the mixer is the
    block's.
    """

    def __init__(self, width: int, groups: int = 8, *, hidden: int = 1, threshold: float = 0.01) -> None:
        super().__init__()
        self.width = width
        self.network = ComplexGroups(width, groups, hidden, threshold)

    def forward(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        sides = check_grid(x, grid, self.width)
        if not x.numel():
            return x
        modes = to_modes(laid_out(x, sides))
        return from_modes(modes * self.network(modes), sides).reshape(x.shape).to(x.dtype)

    def kernel(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """The convolution that `forward` does to this x: `[B, *grid, width]`, entry 0 at the place itself."""
        sides = check_grid(x, grid, self.width)
        modes = to_modes(laid_out(x, sides))
        return from_modes(self.network(modes), sides, "backward")


class AFFBlock(nn.Module):
    """Channels by an inverted bottleneck with a depthwise convolution, then tokens by `AFF`; residuals around
    both.

    Args:
        width, groups, hidden, threshold: as of `AFF`. expand: times as wide inside the bottleneck.

    `forward(x [B, H * W, width], grid)`. Differs from the paper: layer norms where it has batch norms, so
    that a picture does not depend on its batch.
    """

    def __init__(
        self, width: int, groups: int = 8, *, expand: int = 2, hidden: int = 1, threshold: float = 0.01
    ) -> None:
        super().__init__()
        inner = width * check_count("expand", expand)
        self.norm, self.mix_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.near = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.mixer: nn.Module = AFF(width, groups, hidden=hidden, threshold=threshold)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        if not isinstance(grid, (tuple, list, torch.Size)) or len(grid) != 2:
            raise ValueError(f"grid must be (H, W), got {grid!r}")
        sides = check_grid(x, grid, self.norm.normalized_shape[0])
        if not x.numel():
            return x
        inner = F.silu(self.up(self.norm(x))).unflatten(1, sides).permute(0, 3, 1, 2)
        inner = F.silu(self.near(inner)).flatten(2).mT
        x = x + self.down(inner)
        return x + self.mixer(self.mix_norm(x), sides)


class AFFNet(nn.Module):
    """A small classifier of AFF blocks: patches, stages with twice the width and half the sides each, a mean,
    a layer.

    Args:
        classes, channels: of the answer and the picture. width: of the first stage. depths: blocks in each
            stage.
        patch: side of a patch. groups, expand, threshold: as of `AFFBlock`.

    `forward(pixels [B, channels, H, W])` gives logits `[B, classes]`; H and W must be multiples of
    `patch * 2^(stages - 1)`, else ValueError.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        *,
        width: int = 32,
        depths: Sequence[int] = (1, 1),
        patch: int = 2,
        groups: int = 8,
        expand: int = 2,
        threshold: float = 0.01,
    ) -> None:
        super().__init__()
        for name, value in (("classes", classes), ("channels", channels), ("patch", patch)):
            check_count(name, value)
        self.step = patch * 2 ** (len(depths) - 1)
        widths = [width * 2**i for i in range(len(depths))]
        made = [(channels, patch), *((wide, 2) for wide in widths[:-1])]
        self.shrink = nn.ModuleList(nn.Conv2d(c, w, p, stride=p) for (c, p), w in zip(made, widths))
        self.stages = nn.ModuleList(
            nn.ModuleList(AFFBlock(w, groups, expand=expand, threshold=threshold) for _ in range(depth))
            for w, depth in zip(widths, depths)
        )
        self.norm, self.head = nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 4 or any(side % self.step or not side for side in pixels.shape[2:]):
            raise ValueError(
                f"pixels must be [B, C, H, W], sides multiples of {self.step}, got {list(pixels.shape)}"
            )
        x = pixels
        for shrink, stage in zip(self.shrink, self.stages):
            x = shrink(x)
            sides = x.shape[2:]
            tokens = x.flatten(2).mT
            for block in stage:  # type: ignore[attr-defined]
                tokens = block(tokens, tuple(sides))
            x = tokens.mT.unflatten(2, tuple(sides))
        return self.head(self.norm(x.flatten(2).mean(2)))
