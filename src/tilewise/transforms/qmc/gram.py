"""Gram matrices of n points in O(n log n): products, solves and determinants."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.transforms.fourier import irfft, rfft
from tilewise.transforms.qmc.kernels import DigitallyShiftInvariant, ProductKernel, ShiftInvariant
from tilewise.transforms.qmc.lattice import Lattice
from tilewise.transforms.qmc.nets import DigitalNet
from tilewise.transforms.qmc.sequence import power_of_two
from tilewise.transforms.walsh import fwht

EPS = torch.finfo(torch.float64).eps


class Gram:
    """The matrix `K = k(x_i, x_j) + noise I` of the first n = 2^m points of a sequence, never formed.

    A shift-invariant kernel at lattice points, numbered as they come ("bit-reversed"), is a circulant
    matrix whose rows and columns are bit-reversed, so the FFT that takes its input in that order
    diagonalises it. A digitally shift-invariant kernel at a digital net depends on the exclusive or of two
    indices alone, so the Walsh-Hadamard transform does. One row of K, n values of the kernel, gives all
    eigenvalues.

    Args:
        kernel: `ShiftInvariant` with a `Lattice`, `DigitallyShiftInvariant` with a `DigitalNet`.
        sequence: of the kernel's dimension; a lattice of order "bit-reversed" or "natural", a net of any
            order. Under nested uniform scrambling a net is no group any more: that is refused.
        n: a power of two.
        noise: added to the diagonal, >= 0; a tensor is differentiated through.

    Replications of the sequence are matrices of their own: vectors are then `[..., replications, n]`. All
    is float64. After QMCPy (Sorokin, 2025, arXiv 2502.14256); a real FFT takes the place of its complex
    one.

    Raises:
        TypeError, ValueError: pairs that do not fit, n that is no power of two, negative noise.
    """

    def __init__(
        self, kernel: ProductKernel, sequence: Lattice | DigitalNet, n: int, *, noise: float | Tensor = 0.0
    ) -> None:
        features = first_features(kernel, sequence, n)
        self.kernel, self.sequence, self.n = kernel, sequence, n
        self.noise = torch.as_tensor(noise, dtype=torch.float64)
        if self.noise.ndim or not (self.noise >= 0):
            raise ValueError(f"noise must be one number >= 0, got {noise!r}")
        self._basis = Basis(sequence)
        self._spectrum = self._basis.eigenvalues(kernel.of_features(features)) + self.noise

    @property
    def eigenvalues(self) -> Tensor:
        """All n of them, `[..., n]`, by frequency: of Walsh functions, or of Fourier's from 0 to n - 1."""
        if self._basis.digital:
            return self._spectrum
        mirrored = self._spectrum[..., 1 : (self.n + 1) // 2].flip(-1)
        return torch.cat((self._spectrum, mirrored), -1)

    def matmul(self, x: Tensor) -> Tensor:
        """K x for vectors `[..., n]`."""
        return self._apply(x, self._spectrum)

    def solve(self, x: Tensor) -> Tensor:
        """K^-1 x for vectors `[..., n]`; ValueError where K is singular to float64."""
        least, most = self._spectrum.detach().aminmax()
        # Rounding moves every eigenvalue by about this much.
        if least <= EPS * most:
            raise ValueError(
                f"the matrix is singular to float64 (eigenvalues from {least:.1e} to {most:.1e}); give it noise, at"
                f" least {100 * EPS * most:.1e} for two digits, or a rougher kernel"
            )
        return self._apply(x, 1 / self._spectrum)

    def logdet(self) -> Tensor:
        """log det K, `[]` or `[replications]`."""
        return self.eigenvalues.log().sum(-1)

    def dense(self) -> Tensor:
        """K itself, `[..., n, n]`, from the kernel at every pair of points, to check the rest against."""
        x = self.sequence.integers(0, self.n)
        delta = self.kernel.difference_of_integers(x.unsqueeze(-2), x.unsqueeze(-3))
        full = self.kernel.of_features(self.kernel.features(delta))
        return full + self.noise * torch.eye(self.n, dtype=torch.float64, device=full.device)

    def _apply(self, x: Tensor, diagonal: Tensor) -> Tensor:
        if x.shape[-1:] != (self.n,):
            raise ValueError(f"the vector must be [..., {self.n}], got {tuple(x.shape)}")
        return self._basis.backward(self._basis.forward(x.double()) * diagonal, self.n)


class Basis:
    """The orthonormal basis in which a sequence's Gram matrices are diagonal, there and back."""

    def __init__(self, sequence: Lattice | DigitalNet) -> None:
        self.digital = isinstance(sequence, DigitalNet)
        self.order = sequence.order

    def forward(self, x: Tensor) -> Tensor:
        """Coordinates of vectors `[..., n]`; a lattice's of frequencies 0 to n / 2, which the rest mirror."""
        return fwht(x) if self.digital else rfft(x, order=self.order, norm="ortho")

    def backward(self, spectrum: Tensor, n: int) -> Tensor:
        """The vectors `[..., n]` with these coordinates."""
        return fwht(spectrum) if self.digital else irfft(spectrum, n, order=self.order, norm="ortho")

    def eigenvalues(self, row: Tensor) -> Tensor:
        """Of the matrix with this first row, one a coordinate; rounding lets none fall below 0."""
        made = self.forward(row)
        return (made if self.digital else made.real).clamp(min=0) * row.shape[-1] ** 0.5


def first_features(kernel: ProductKernel, sequence: Lattice | DigitalNet, n: int) -> Tensor:
    """Features between the first point and all n, `[..., n, dim]`; raises where there is no fast Gram."""
    power_of_two("n", n)
    fits = ((ShiftInvariant, Lattice), (DigitallyShiftInvariant, DigitalNet))
    if not any(isinstance(kernel, kind) and isinstance(sequence, points) for kind, points in fits):
        raise TypeError(
            "kernel and sequence must be ShiftInvariant with Lattice, or DigitallyShiftInvariant with DigitalNet,"
            f" got {type(kernel).__name__} with {type(sequence).__name__}"
        )
    if kernel.dim != sequence.dim:
        raise ValueError(f"sequence must have the kernel's dimension {kernel.dim}, got {sequence.dim}")
    if sequence.randomize == "nus":
        raise ValueError(
            'sequence must not be scrambled by "nus", whose points are no group; "lms" keeps them one'
        )
    if sequence.order == "gray" and isinstance(sequence, Lattice):
        raise ValueError('sequence must have order "bit-reversed" or "natural", got "gray"')
    x = sequence.integers(0, n)
    return kernel.features(kernel.difference_of_integers(x, x[..., :1, :]))
