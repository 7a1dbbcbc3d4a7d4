"""NSTR: a signal as a few global sinusoids whose amplitudes vary over space as a learned transport equation
says."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.convolution.spectral.grids import check_count


class SpectrumGrid(nn.Module):
    """A smooth field of channels over the cube [0, 1]^D: cubic B-splines over a coarse grid of learned
    values.

    Args:
        channels, dim: sizes; dim from 1 to 3. cells: along each side. scale: standard deviation of values at
            first.

    `forward(places [N, D])` gives `[N, channels]`, `slopes(places)` its exact derivatives `[N, D, channels]`.
    Places outside of the cube get the field continued to its border's cells.
    """

    def __init__(self, channels: int, dim: int = 2, cells: int = 16, scale: float = 0.1) -> None:
        super().__init__()
        self.channels, self.cells = check_count("channels", channels), check_count("cells", cells)
        if dim not in (1, 2, 3):
            raise ValueError(f"dim must be 1, 2 or 3, got {dim!r}")
        self.dim, self.knots = dim, cells + 3
        self.values = nn.Parameter(scale * torch.randn(self.knots**dim, channels))

    def forward(self, places: Tensor) -> Tensor:
        first, weights, _ = self._near(places)
        return self._read(first, weights)

    def slopes(self, places: Tensor) -> Tensor:
        first, weights, rates = self._near(places)
        made = []
        for axis in range(self.dim):
            mixed = torch.cat((weights[:, :axis], rates[:, axis : axis + 1], weights[:, axis + 1 :]), 1)
            made.append(self._read(first, mixed))
        return torch.stack(made, 1)

    def _near(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First of four knots along each side `[N, D]`, their weights `[N, D, 4]` and these weights'
        derivatives."""
        if not isinstance(places, Tensor) or places.ndim != 2 or places.shape[1] != self.dim:
            given = list(places.shape) if isinstance(places, Tensor) else type(places).__name__
            raise ValueError(f"places must be [N, {self.dim}], got {given}")
        scaled = places.clamp(0, 1) * self.cells
        first = scaled.floor().clamp(max=self.cells - 1)
        t = scaled - first
        weights = ((1 - t) ** 3 / 6, 2 / 3 - t**2 + t**3 / 2, 1 / 6 + (t + t**2 - t**3) / 2, t**3 / 6)
        rates = (-((1 - t) ** 2) / 2, -2 * t + 1.5 * t**2, 0.5 + t - 1.5 * t**2, t**2 / 2)
        return first.long(), torch.stack(weights, 2), self.cells * torch.stack(rates, 2)

    def _read(self, first: Tensor, weights: Tensor) -> Tensor:
        """Sum over the 4^D knots near each place."""
        numbers, shares = [], []
        for steps in itertools.product(range(4), repeat=self.dim):
            number, share = torch.zeros_like(first[:, 0]), torch.ones_like(weights[:, 0, 0])
            for axis, step in enumerate(steps):
                number = number * self.knots + first[:, axis] + step
                share = share * weights[:, axis, step]
            numbers.append(number)
            shares.append(share)
        return F.embedding_bag(
            torch.stack(numbers, 1), self.values, per_sample_weights=torch.stack(shares, 1), mode="sum"
        )


class NSTR(nn.Module):
    """An implicit representation whose frequencies are global and whose spectrum is local.

    `f(x) = g(sum_i S_i(x) sin(w_i x + b_i))`: few learned frequencies, a smooth field S of their amplitudes
    (for each of `features` sums), and a small decoder g. A transport network F learns to say how the spectrum
    changes where it is what it is, `grad S(x) = F(x, S(x))`; the distance, `transport(places)`, is added to a
    fit's loss, so that the field follows one law where nothing forces it away.

    Args:
        dim, outputs: of places and signal. frequencies: K. cells: of the field's grid along each side.
            features: sums that the decoder sees. hidden: width of decoder and transport network. bandwidth:
            the frequencies' scale at first, in radians over the unit cube.

    `forward(places [N, dim])`, in [0, 1]^dim, gives `[N, outputs]`. Raises ValueError for sizes that do not
    fit.

    After NSTR (Versace, 2025, arXiv 2511.18384), built from its abstract and summaries: the full text was not
    at hand. The field is a grid of cubic B-splines, whose derivatives are exact; sums, not one sum, reach the
    decoder.
    """

    def __init__(
        self,
        dim: int = 2,
        outputs: int = 1,
        *,
        frequencies: int = 16,
        cells: int = 16,
        features: int = 1,
        hidden: int = 16,
        bandwidth: float = 60.0,
    ) -> None:
        super().__init__()
        self.features, self.count = check_count("features", features), check_count("frequencies", frequencies)
        check_count("outputs", outputs), check_count("hidden", hidden)
        self.spectrum = SpectrumGrid(frequencies * features, dim, cells)
        self.frequencies = nn.Parameter(bandwidth * torch.randn(frequencies, dim))
        # One nearly constant wave carries what is smooth.
        self.frequencies.data[0] = 0
        self.phases = nn.Parameter(torch.pi * torch.rand(frequencies))
        self.phases.data[0] = torch.pi / 2
        self.skip = nn.Linear(features, outputs)
        self.decoder = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, outputs))
        self.law = nn.Sequential(
            nn.Linear(dim + frequencies * features, hidden),
            nn.SiLU(),
            nn.Linear(hidden, dim * frequencies * features),
        )

    def forward(self, places: Tensor) -> Tensor:
        spectrum = self.spectrum(places).unflatten(1, (self.features, -1))
        waves = torch.sin(places @ self.frequencies.mT + self.phases)
        sums = torch.einsum("nfk,nk->nf", spectrum, waves)
        return self.skip(sums) + self.decoder(sums)

    def transport(self, places: Tensor) -> Tensor:
        """Mean square of `grad S - F(x, S)` over places: the regulariser."""
        spectrum = self.spectrum(places)
        said = self.law(torch.cat((places, spectrum), 1)).unflatten(1, (places.shape[1], -1))
        return (self.spectrum.slopes(places) / self.spectrum.cells - said).square().mean()
