"""A small Fourier neural operator (Li et al., 2020, arXiv 2010.08895): what T1 and AFNO are compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.convolution.spectral.grids import check_count


class SpectralConv(nn.Module):
    """A matrix of channels for each of the lowest modes of a picture: `[B, width, H, W]` to its shape.

    Args:
        width: channels. modes: modes with fewer waves than this along each side are kept, of both signs along
            H.

    Raises ValueError for a grid with fewer than 2 * modes - 1 points along a side.
    """

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.width, self.modes = check_count("width", width), check_count("modes", modes)
        self.weight = nn.Parameter(torch.randn(2, 2 * modes - 1, modes, width, width) / width)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        if min(h, w) < 2 * self.modes - 1:
            raise ValueError(f"a grid must have at least {2 * self.modes - 1} points a side, got {h} x {w}")
        if not x.numel():
            return x.clone()
        z = torch.fft.rfft2(x)
        rows = torch.arange(1 - self.modes, self.modes, device=x.device) % h
        kept = z[:, :, rows, : self.modes]
        mixed = torch.einsum("bihw,hwio->bohw", kept, torch.complex(*self.weight.to(x.dtype)))
        out = torch.zeros_like(z)
        out[:, :, rows, : self.modes] = mixed
        return torch.fft.irfft2(out, s=(h, w))


class FNO(nn.Module):
    """The operator network: a lift, layers of `SpectralConv` beside a matrix of channels, two layers at the
    end.

    Args:
        inputs, outputs: channels of the fields. width, modes, layers: of the operator. hidden: of the last
            layer.

    `forward(x [B, inputs, H, W])` gives `[B, outputs, H, W]`; places are given to it as two more channels.
    Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        inputs: int = 1,
        outputs: int = 1,
        *,
        width: int = 16,
        modes: int = 8,
        layers: int = 4,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        self.inputs = check_count("inputs", inputs)
        self.lift = nn.Conv2d(inputs + 2, width, 1)
        self.spectral = nn.ModuleList(
            SpectralConv(width, modes) for _ in range(check_count("layers", layers))
        )
        self.local = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(layers))
        self.up, self.down = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(with_places(x, self.inputs))
        for i, (spectral, local) in enumerate(zip(self.spectral, self.local)):
            x = spectral(x) + local(x)
            x = F.gelu(x) if i < len(self.spectral) - 1 else x
        return self.down(F.gelu(self.up(x)))


def with_places(x: Tensor, inputs: int) -> Tensor:
    """`[B, inputs, H, W]` and its places from 0 to 1 as two more channels; ValueError for another shape."""
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != inputs:
        given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be [B, {inputs}, H, W], got {given}")
    lines = [torch.arange(n, device=x.device, dtype=x.dtype) / n for n in x.shape[2:]]
    places = torch.stack(torch.meshgrid(*lines, indexing="ij")).expand(len(x), -1, -1, -1)
    return torch.cat((x, places), 1)
