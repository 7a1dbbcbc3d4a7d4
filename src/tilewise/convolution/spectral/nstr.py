"""NSTR: a signal as waves whose amplitudes vary over space as a learned transport equation says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tilewise.convolution.spectral.grids import check_count


class SpectrumGrid(nn.Module):
    """A smooth field of channels over the cube [0, 1]^D: cubic B-splines over a coarse grid of learned
    values.

    Args:
        channels, dim: sizes; dim from 1 to 3. cells: along each side. scale: standard deviation of values at
            first.

    `forward(places [N, D])` gives `[N, channels]`, `slopes(places)` its exact derivatives `[N, D, channels]`.
    Places outside of the cube get what is at its border. Raises ValueError for sizes and places that do not
    fit.
    """

    def __init__(self, channels: int, dim: int = 2, cells: int = 4, scale: float = 0.3) -> None:
        super().__init__()
        self.channels, self.cells = check_count("channels", channels), check_count("cells", cells)
        if dim not in (1, 2, 3):
            raise ValueError(f"dim must be 1, 2 or 3, got {dim!r}")
        self.dim, self.knots = dim, cells + 3
        self.values = nn.Parameter(scale * torch.randn(self.knots**dim, channels))

    def forward(self, places: Tensor) -> Tensor:
        return self._read(self._near(places, _spline).unbind(1))

    def slopes(self, places: Tensor) -> Tensor:
        weights, rates = self._near(places, _spline), self.cells * self._near(places, _spline_slopes)
        made = []
        for axis in range(self.dim):
            sides = [rates[:, i] if i == axis else weights[:, i] for i in range(self.dim)]
            made.append(self._read(sides))
        return torch.stack(made, 1)

    def _near(self, places: Tensor, pieces: Callable[[Tensor], tuple[Tensor, ...]]) -> Tensor:
        """`pieces` of the four knots around each place along each side, `[N, D, knots]`; others have 0."""
        if not isinstance(places, Tensor) or places.ndim != 2 or places.shape[1] != self.dim:
            given = list(places.shape) if isinstance(places, Tensor) else type(places).__name__
            raise ValueError(f"places must be [N, {self.dim}], got {given}")
        scaled = places.clamp(0, 1) * self.cells
        first = scaled.detach().floor().clamp(max=self.cells - 1)
        numbers = first.long().unsqueeze(2) + torch.arange(4, device=places.device)
        none = places.new_zeros(*places.shape, self.knots)
        return none.scatter(2, numbers, torch.stack(pieces(scaled - first), 2))

    def _read(self, sides: Sequence[Tensor]) -> Tensor:
        """Sums over the knots, side by side; `sides` are D of `[N, knots]`."""
        made = sides[0] @ self.values.view(self.knots, -1)
        for side in sides[1:]:
            made = (side.unsqueeze(1) @ made.view(len(side), self.knots, -1)).squeeze(1)
        return made


def _spline(t: Tensor) -> tuple[Tensor, ...]:
    """Shares of the four knots around a place that is t of a cell after the second of them."""
    return (1 - t) ** 3 / 6, 2 / 3 - t**2 + t**3 / 2, 1 / 6 + (t + t**2 - t**3) / 2, t**3 / 6


def _spline_slopes(t: Tensor) -> tuple[Tensor, ...]:
    return -((1 - t) ** 2) / 2, -2 * t + 1.5 * t**2, 0.5 + t - 1.5 * t**2, t**2 / 2


class SineLayer(nn.Linear):
    """`sin(pace (W x + b))`, with the first weights of SIREN (Sitzmann et al., 2020, arXiv 2006.09661).

    Args:
        width_in, width: sizes. pace: which frequencies it begins with. first: of places in [-1, 1], not of
            other layers.
    """

    def __init__(self, width_in: int, width: int, pace: float = 30.0, *, first: bool = False) -> None:
        super().__init__(width_in, width)
        self.pace = pace
        bound = 1 / width_in if first else math.sqrt(6 / width_in) / pace
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.pace * super().forward(x))


class NSTR(nn.Module):
    """An implicit representation whose waves are global and whose spectrum is local.

    `f(x) = g(A S(x) * sin(W x + b))`: learned waves over all of space, a smooth field S(x) of their amplitudes,
    and a decoder g of sine layers that sees sums A of the scaled waves. S is a coarse grid of few channels,
    `S(x) = M s(x) + c`, so that it costs few parameters. A transport network F learns to say how the spectrum
    changes where it is what it is, `grad s(x) = F(x, s(x))`; the distance, `transport(places)`, can be added to
    a fit's loss, so that the field follows one law where nothing forces it away.

    Args:
        dim, outputs: of places and signal. frequencies: K, also the width of the decoder. layers: sine layers
            of the decoder; with 0 it is a sum. rank, cells: channels of the field and its grid along each side.
            hidden: width of the transport network. pace: the waves' frequencies at first, as SIREN's.

    `forward(places [N, dim])`, in [0, 1]^dim, gives `[N, outputs]`; `spectrum(places)` gives S, `[N, K]`;
    `frequencies` are the waves' `[K, dim]`, in radians over the cube's side. Raises ValueError for sizes that do
    not fit.

    After NSTR (Versace, 2025, arXiv 2511.18384), built from its abstract and summaries: the full text was not
    at hand. The field is a grid of cubic B-splines of low rank, whose derivatives are exact, and the decoder
    one of sine layers: with a spectrum made by a network, or read at full rank through a small perceptron,
    photographs came out several decibels worse than from SIREN (docs/spectral.md).
    """

    def __init__(
        self,
        dim: int = 2,
        outputs: int = 1,
        *,
        frequencies: int = 32,
        layers: int = 3,
        rank: int = 8,
        cells: int = 4,
        hidden: int = 16,
        pace: float = 30.0,
    ) -> None:
        super().__init__()
        sizes = {"outputs": outputs, "frequencies": frequencies, "rank": rank, "hidden": hidden}
        for name, given in sizes.items():
            check_count(name, given)
        check_count("layers", layers, least=0)
        self.field = SpectrumGrid(rank, dim, cells)
        self.waves = SineLayer(dim, frequencies, pace, first=True)
        # At first every wave is there everywhere, as in SIREN, a little more here and less there.
        self.mix = nn.Linear(rank, frequencies)
        nn.init.normal_(self.mix.weight, std=rank**-0.5)
        nn.init.ones_(self.mix.bias)
        sums = [SineLayer(frequencies, frequencies, pace) for _ in range(layers)]
        head = nn.Linear(frequencies, outputs)
        bound = math.sqrt(6 / frequencies) / pace
        nn.init.uniform_(head.weight, -bound, bound)
        self.decoder = nn.Sequential(*sums, head)
        self.law = nn.Sequential(nn.Linear(dim + rank, hidden), nn.SiLU(), nn.Linear(hidden, dim * rank))

    @property
    def frequencies(self) -> Tensor:
        return 2 * self.waves.pace * self.waves.weight

    def spectrum(self, places: Tensor) -> Tensor:
        return self.mix(self.field(places))

    def forward(self, places: Tensor) -> Tensor:
        return self.decoder(self.spectrum(places) * self.waves(2 * places - 1))

    def transport(self, places: Tensor) -> Tensor:
        """Mean square of `grad s - F(x, s)` over places, distances measured in cells: the regulariser."""
        spectrum = self.field(places)
        said = self.law(torch.cat((places, spectrum), 1)).unflatten(1, (places.shape[1], -1))
        return (self.field.slopes(places) / self.field.cells - said).square().mean()

    def groups(self, rate: float, quicker: float = 30.0) -> list[dict[str, Any]]:
        """Parameters for an optimizer, `torch.optim.Adam(model.groups(4e-3))`: the spectrum learns `quicker`
        times as fast as the rest. At one rate for all it hardly moves, and the fit is no better than
        SIREN's."""
        spectrum = [*self.field.parameters(), *self.mix.parameters()]
        others = [p for part in (self.waves, self.decoder, self.law) for p in part.parameters()]
        return [{"params": others, "lr": rate}, {"params": spectrum, "lr": quicker * rate}]
