"""T1, "transform once": an operator network that stays among the lowest modes from first layer to last."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.convolution.spectral.grids import check_count
from tilewise.transforms.kept import kept

INITS, TRANSFORMS = ("preserving", "plain"), ("cosine", "fourier")


def low_modes(transform: str, points: int, modes: int, like: Tensor) -> Tensor:
    """The lowest real modes of a line of points, orthonormal, as rows `[modes, points]`; not to be written to.

    "cosine": those of the cosine transform (type II), for fields between walls. "fourier": 1, cos, sin, cos
    of two waves, ..., for periodic ones.
    """
    return kept(_modes, transform, points, modes, like.dtype, like.device)


def _modes(transform: str, points: int, modes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    wave = torch.arange(modes, dtype=torch.float64).unsqueeze(1)
    place = torch.arange(points, dtype=torch.float64)
    if transform == "cosine":
        made = torch.cos(math.pi / points * wave * (place + 0.5))
    else:
        turn = 2 * math.pi / points * ((wave + 1) // 2) * place
        made = torch.where(wave % 2 == 1, turn.cos(), turn.sin())
        made[0] = 1
    made[0] *= math.sqrt(0.5)
    return (made * math.sqrt(2 / points)).to(device=device, dtype=dtype)


def to_modes(x: Tensor, transform: str, modes: int) -> Tensor:
    """`[..., H, W]` to its lowest modes `[..., m, m]`: the rows of a transform that are kept are all that is
    computed of it."""
    rows, columns = (low_modes(transform, n, modes, x) for n in x.shape[-2:])
    return rows @ x @ columns.mT


def from_modes(z: Tensor, transform: str, size: Sequence[int]) -> Tensor:
    """The field `[..., H, W]` whose lowest modes are `z [..., m, m]` and whose others are 0."""
    rows, columns = (low_modes(transform, n, z.shape[-1], z) for n in size)
    return rows.mT @ z @ columns


class T1Layer(nn.Module):
    """Mixes modes directly: a matrix of channels for each mode; matrices along both sides to more numbers
    than modes, an activation, matrices back.

    `forward(z [B, width, m, m])` gives its shape, a residual included.

    Args:
        width, modes: sizes. hidden: numbers along each side where the activation is.
    """

    def __init__(self, width: int, modes: int, hidden: int) -> None:
        super().__init__()
        self.channels = nn.Parameter(torch.randn(modes, modes, width, width) / math.sqrt(width))
        self.bias = nn.Parameter(torch.zeros(width, modes, modes))
        self.rows = nn.Parameter(torch.randn(width, hidden, modes) / math.sqrt(modes))
        self.columns = nn.Parameter(torch.randn(width, modes, hidden) / math.sqrt(modes))
        self.inner_bias = nn.Parameter(torch.zeros(width, hidden, hidden))
        self.rows_back = nn.Parameter(torch.randn(width, modes, hidden) / math.sqrt(hidden))
        self.columns_back = nn.Parameter(torch.randn(width, hidden, modes) / math.sqrt(hidden))

    def forward(self, z: Tensor) -> Tensor:
        mixed = torch.einsum("bixy,xyio->boxy", z, self.channels) + self.bias
        inner = F.gelu(self.rows @ mixed @ self.columns + self.inner_bias)
        return z + self.rows_back @ inner @ self.columns_back


class T1(nn.Module):
    """Learns an operator between fields with one transform: the lowest modes, layers among them, and back at
    the end.

    A Fourier neural operator goes to its modes and back in every layer. Here all layers work on the `modes x
    modes` lowest ones of an orthonormal transform: real numbers, a fraction of the grid, the same for any
    resolution.

    Variance: a signal of N points whose modes are cut to m keeps a share m / N of a white one's variance, so
    the first weights are larger by sqrt(N / m) (`init="preserving"`, the paper's; "plain" leaves it out), and
    layers that see m modes alone need none.

    Args:
        inputs, outputs: channels of the fields. size: (H, W) of the grid it is made for. width, modes,
            layers: of the operator; modes <= both sides. hidden: numbers along each side in a layer's
            activation. transform: "cosine" for fields between walls, "fourier" for periodic ones, odd modes.
            init: as above.

    `forward(x [B, inputs, H, W])` gives `[B, outputs, H, W]`; `modes_of(x)` the output's `[B, outputs, m, m]`
    modes, on which it can be trained without any inverse transform. Raises ValueError for sizes that do not
    fit.

    After Poli et al., 2022 (arXiv 2211.14453). Modes have biases in place of channels of places. The authors'
    layers mix modes after the activation, m to m; here it stands between two mixings, in a wider space, and
    modes can be scaled by their deviation in the data (`scale_to`): measured on docs/spectral.md. Other
    grids than `size` work: modes are scaled by their points.
    """

    in_mean: Tensor
    in_scale: Tensor
    out_mean: Tensor
    out_scale: Tensor

    def __init__(
        self,
        inputs: int = 1,
        outputs: int = 1,
        *,
        size: Sequence[int] = (32, 32),
        width: int = 8,
        modes: int = 11,
        layers: int = 4,
        hidden: int = 16,
        transform: str = "cosine",
        init: str = "preserving",
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, got {init!r}")
        if transform not in TRANSFORMS:
            raise ValueError(
                f"transform must be one of {', '.join(map(repr, TRANSFORMS))}, got {transform!r}"
            )
        self.inputs, self.modes = check_count("inputs", inputs), check_count("modes", modes)
        if transform == "fourier" and modes % 2 == 0:
            raise ValueError(f"modes must be odd for 'fourier' (a sine with each cosine), got {modes}")
        self.size, self.transform = tuple(size), transform
        if len(self.size) != 2 or modes > min(self.size):
            raise ValueError(f"size must be (H, W) of at least {modes} modes, got {size!r}")
        gain = math.sqrt(math.prod(self.size)) / modes if init == "preserving" else 1.0
        self.lift = nn.Parameter(torch.randn(modes, modes, inputs, width) * (gain / math.sqrt(inputs)))
        self.lift_bias = nn.Parameter(0.1 * torch.randn(width, modes, modes))
        self.layers = nn.ModuleList(
            T1Layer(width, modes, check_count("hidden", hidden)) for _ in range(check_count("layers", layers))
        )
        self.drop = nn.Parameter(torch.randn(modes, modes, width, outputs) / math.sqrt(width))
        for name, channels in (("in", inputs), ("out", outputs)):
            self.register_buffer(f"{name}_mean", torch.zeros(channels, modes, modes))
            self.register_buffer(f"{name}_scale", torch.ones(channels, modes, modes))

    @torch.no_grad()
    def scale_to(self, x: Tensor, y: Tensor, floor: float = 1e-3) -> None:
        """Means and deviations of each mode of inputs and answers `[B, ., H, W]`, B >= 2: layers then see
        modes of one size, where high ones are smaller by orders. `floor`: least deviation, as a part of all
        modes'."""
        if len(x) < 2 or len(x) != len(y):
            raise ValueError(f"x and y must be as many fields, two at least, got {len(x)} and {len(y)}")
        for name, z in (("in", self._cut(x)), ("out", self._cut(y))):
            getattr(self, f"{name}_mean").copy_(z.mean(0))
            getattr(self, f"{name}_scale").copy_(z.std(0) + floor * z.std())

    def modes_of(self, x: Tensor) -> Tensor:
        """The lowest modes of the answer, orthonormal on a grid of `size` points: `[B, outputs, m, m]`."""
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != self.inputs:
            given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be [B, {self.inputs}, H, W], got {given}")
        z = (self._cut(x) - self.in_mean) / self.in_scale
        z = torch.einsum("bixy,xyio->boxy", z, self.lift) + self.lift_bias
        for layer in self.layers:
            z = layer(z)
        return self.out_mean + self.out_scale * torch.einsum("bixy,xyio->boxy", z, self.drop)

    def forward(self, x: Tensor) -> Tensor:
        z = self.modes_of(x)
        side = x.shape[-2:]
        return from_modes(z, self.transform, side) * math.sqrt(math.prod(side) / math.prod(self.size))

    def _cut(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to its lowest modes, as of a grid of `size`."""
        h, w = x.shape[-2:]
        if min(h, w) < self.modes:
            raise ValueError(f"a grid must have at least {self.modes} points a side, got {h} x {w}")
        return to_modes(x, self.transform, self.modes) * math.sqrt(math.prod(self.size) / (h * w))
