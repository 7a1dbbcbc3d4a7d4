"""T1, "transform once": an operator network that stays among the lowest cosine modes from first layer to
last."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.convolution.fno import with_places
from tilewise.convolution.grids import check_count
from tilewise.transforms import dct, idct

INITS = ("preserving", "plain")


class T1Layer(nn.Module):
    """Mixes modes directly: a matrix of channels for each mode, an activation, a matrix of modes along each
    side.

    `forward(z [B, width, m, m])` gives its shape, a residual included.

    Args:
        width, modes: sizes. gain: of the channels' matrices, whose entries begin with standard deviation
            `gain / sqrt(width)`; those along the sides with `1 / sqrt(modes)`.
    """

    def __init__(self, width: int, modes: int, gain: float = 1.0) -> None:
        super().__init__()
        self.channels = nn.Parameter(torch.randn(modes, modes, width, width) * (gain / math.sqrt(width)))
        self.rows = nn.Parameter(torch.randn(width, modes, modes) / math.sqrt(modes))
        self.columns = nn.Parameter(torch.randn(width, modes, modes) / math.sqrt(modes))

    def forward(self, z: Tensor) -> Tensor:
        mixed = F.gelu(torch.einsum("bixy,xyio->boxy", z, self.channels))
        return z + self.rows @ mixed @ self.columns


class T1(nn.Module):
    """Learns an operator between fields with one transform: cosine modes, layers among the lowest, and back
    at the end.

    A Fourier neural operator goes to its modes and back in every layer. Here all layers work on the `modes x
    modes` lowest ones of an orthonormal cosine transform: real numbers, a fraction of the grid, the same for
    any resolution.

    Variance: a signal of N points whose modes are cut to m keeps a share m / N of a white one's variance, so
    the first layer's weights are larger by sqrt(N / m) (`init="preserving"`, the paper's; "plain" leaves it
    out), and layers that see m modes alone need none.

    Args:
        inputs, outputs: channels of the fields. size: (H, W) of the grid it is made for. width, modes,
            layers: of the operator; modes <= both sides. hidden: of the last layer. init: as above.

    `forward(x [B, inputs, H, W])` gives `[B, outputs, H, W]`; `modes_of(x)` the output's `[B, outputs, m, m]`
    cosine modes, on which it can be trained without any inverse transform. Raises ValueError for sizes that
    do not fit.

    After Poli et al., 2022 (arXiv 2211.14453). Other grids than `size` work: modes are scaled by their
    points.
    """

    def __init__(
        self,
        inputs: int = 1,
        outputs: int = 1,
        *,
        size: Sequence[int] = (32, 32),
        width: int = 16,
        modes: int = 12,
        layers: int = 4,
        hidden: int = 64,
        init: str = "preserving",
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, got {init!r}")
        self.inputs, self.modes = check_count("inputs", inputs), check_count("modes", modes)
        self.size = tuple(size)
        if len(self.size) != 2 or modes > min(self.size):
            raise ValueError(f"size must be (H, W) of at least {modes} modes, got {size!r}")
        gain = math.sqrt(math.prod(self.size)) / modes if init == "preserving" else 1.0
        self.lift = nn.Conv2d(inputs + 2, width, 1)
        first = [gain] + [1.0] * (check_count("layers", layers) - 1)
        self.layers = nn.ModuleList(T1Layer(width, modes, gain) for gain in first)
        self.up, self.down = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, outputs, 1)

    def modes_of(self, x: Tensor) -> Tensor:
        """The lowest cosine modes of the answer, orthonormal on a grid of `size` points: `[B, outputs, m,
        m]`."""
        x = self.lift(with_places(x, self.inputs))
        z = self.to_modes(x)
        for layer in self.layers:
            z = layer(z)
        return self.down(F.gelu(self.up(z)))

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        z = self.modes_of(x) * math.sqrt(h * w / math.prod(self.size))
        if not z.numel():
            return z.new_zeros(*z.shape[:2], h, w)
        columns = idct(F.pad(z, (0, 0, 0, h - self.modes)), 2)
        return idct(F.pad(columns, (0, w - self.modes)), 3)

    def to_modes(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to its lowest cosine modes `[B, C, m, m]`, as of a grid of `size`."""
        h, w = x.shape[2:]
        if min(h, w) < self.modes:
            raise ValueError(f"a grid must have at least {self.modes} points a side, got {h} x {w}")
        if not x.numel():
            return x[:, :, : self.modes, : self.modes]
        z = dct(dct(x, 3)[..., : self.modes], 2)[:, :, : self.modes]
        return z * math.sqrt(math.prod(self.size) / (h * w))
