"""Kernels of the difference of two points alone: modulo 1, or digit by digit without carry.

Both are products over coordinates, `k(x, y) = scale prod_j (1 + weight_j K(x_j - y_j))`, where K has mean 0
over [0, 1), so the integral of k over either argument is `scale`. The Gram matrix of such a kernel at the
points of a lattice, or of a digital net, is diagonal in the Fourier, or Walsh, basis: see `Gram`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from tilewise.kernels.digit_sums.digits import BITS, to_unit
from tilewise.transforms.qmc.digits import from_unit
from tilewise.transforms.qmc.sequence import whole_number


class ProductKernel(ABC):
    """Smoothness of each coordinate, weights and scale; tensors among them are differentiated through.

    Calling a kernel broadcasts points `[..., dim]` in [0, 1) against one another and gives `[...]`,
    float64.
    """

    def __init__(
        self,
        dim: int,
        smoothness: int | Sequence[int] = 2,
        weights: float | Sequence[float] | Tensor = 1.0,
        scale: float | Tensor = 1.0,
    ) -> None:
        whole_number("dim", dim, 1)
        each = [smoothness] * dim if isinstance(smoothness, int) else list(smoothness)
        if len(each) != dim:
            raise ValueError(f"smoothness must be one number or {dim}, got {len(each)}")
        for one in each:
            self._check_smoothness(one)
        given = torch.as_tensor(weights, dtype=torch.float64)
        if given.ndim > 1 or (given.ndim and len(given) != dim):
            raise ValueError(f"weights must be one number or {dim}, got shape {tuple(given.shape)}")
        size = torch.as_tensor(scale, dtype=torch.float64)
        if size.ndim or not (size > 0) or not (given > 0).all():
            raise ValueError("weights and scale must be positive, and scale one number")
        self.dim, self.smoothness, self.weights, self.scale = dim, tuple(each), given.expand(dim), size

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        for name, points in (("x", x), ("y", y)):
            self._check_points(name, points)
        return self.of_features(self.features(self.difference(x, y)))

    def of_features(self, features: Tensor) -> Tensor:
        """The kernel `[...]` from `features` `[..., dim]`."""
        return self.scale * (1 + self.weights.to(features.device) * features).prod(-1)

    def features(self, difference: Tensor) -> Tensor:
        """K of each coordinate of a difference, `[..., dim]`."""
        if len(set(self.smoothness)) == 1:
            return self.feature(difference, self.smoothness[0])
        parts = [self.feature(difference[..., j], one) for j, one in enumerate(self.smoothness)]
        return torch.stack(parts, -1)

    def _check_points(self, name: str, points: Tensor) -> None:
        if points.shape[-1:] != (self.dim,):
            raise ValueError(f"{name} must be [..., {self.dim}], got {tuple(points.shape)}")
        if not points.is_floating_point():
            raise TypeError(f"{name} must be floating-point points, got {points.dtype}")
        if points.numel() and not ((points >= 0) & (points < 1)).all():
            low, high = points.min().item(), points.max().item()
            raise ValueError(f"{name} must lie in [0, 1), got values from {low:.4g} to {high:.4g}")

    @abstractmethod
    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        """Of two points, broadcast, as `features` takes it."""

    @abstractmethod
    def difference_of_integers(self, x: Tensor, y: Tensor) -> Tensor:
        """The same of points given as whole numbers of 52 digits."""

    @abstractmethod
    def feature(self, difference: Tensor, smoothness: int) -> Tensor:
        """K, elementwise."""

    @abstractmethod
    def _check_smoothness(self, one: int) -> None:
        """Raise where there is no such kernel."""


class ShiftInvariant(ProductKernel):
    """Periodic kernels of Korobov spaces, for lattices.

    With smoothness a, `K(x) = (-1)^(a+1) (2 pi)^(2a) / (2a)! B_2a(x mod 1) = sum over h != 0 of |h|^(-2a)
    e^(2 pi i h x)`, B the Bernoulli polynomials, in float64.

    Args:
        dim: coordinates.
        smoothness: a >= 1, one for all or one for each coordinate; functions have a square-integrable
            derivatives.
        weights: positive, one for all or one for each.
        scale: positive.

    After QMCPy (Sorokin, 2025, arXiv 2502.14256).
    """

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.remainder(x.double() - y.double(), 1)

    def difference_of_integers(self, x: Tensor, y: Tensor) -> Tensor:
        return to_unit((x - y) & (1 << BITS) - 1)

    def feature(self, difference: Tensor, smoothness: int) -> Tensor:
        # A Bernoulli polynomial of even degree is one of half the degree in x (1 - x).
        square = difference * (1 - difference)
        total = torch.zeros_like(square)
        for coefficient in reversed(bernoulli(smoothness)):
            total = total * square + float(coefficient)
        factor = (2 * math.pi) ** (2 * smoothness) / math.factorial(2 * smoothness)
        return (-1) ** (smoothness + 1) * factor * total

    def _check_smoothness(self, one: int) -> None:
        whole_number("smoothness", one, 1)
        if one > 16:
            raise ValueError(f"smoothness must be at most 16, where float64 still holds the terms, got {one}")


@lru_cache
def bernoulli(n: int) -> tuple[Fraction, ...]:
    """Coefficients c_0 ... c_n of B_2n(x) in powers of y = x (1 - x).

    From B_2n'' = 2n (2n - 1) B_2n-2, where (y^k)'' = k (k - 1) y^(k-2) (1 - 4 y) - 2 k y^(k-1), and from
    the integral 0.
    """
    if n == 0:
        return (Fraction(1),)
    lower = bernoulli(n - 1)
    c = [Fraction(0)] * (n + 2)
    for k in range(n, 0, -1):
        c[k] = ((k + 1) * k * c[k + 1] - 2 * n * (2 * n - 1) * lower[k - 1]) / (4 * k * (k - 1) + 2 * k)
    # The integral of y^k is (k!)^2 / (2k + 1)!.
    c[0] = -sum(
        (c[k] * Fraction(math.factorial(k) ** 2, math.factorial(2 * k + 1)) for k in range(1, n + 1)),
        Fraction(0),
    )
    return tuple(c[: n + 1])


class DigitallyShiftInvariant(ProductKernel):
    """Kernels of Walsh spaces in base 2, for digital nets, orders 1 to 4.

    For order a >= 2, `K(x) = sum over k >= 1 of 2^(-mu(k)) wal_k(x)`, where mu(k) sums the places of the a
    highest ones of k, counted from 1 (Dick, 2008): functions with a derivatives lie in that space. For
    order 1 the sum is of `2^(-2 floor(log2 k) - 1) wal_k(x)`. The sums have closed forms (Sorokin, 2025,
    arXiv 2502.14256), with b = -floor(log2 x) and t_v = 2^(-v b), both 0 at x = 0:

        order 1:  1 - 3 t_1
        order 2:  5/2 (1 - t_1) - b x - 1
        order 3:  43/18 (1 - t_2) - 5 (1 - t_1) x + b x^2 - 1
        order 4:  701/294 (1 - t_3) - 43/9 (1 - t_2) x + 5 (1 - t_1) x^2 - 2/3 b x^3
                  + b (1/48 sum over r >= 0 of (-1)^(digit r + 1 of x) 8^-r - 1/42) - 1

    Points are taken to 52 digits.

    Args:
        dim: coordinates.
        smoothness: the order, one for all or one for each coordinate.
        weights: positive, one for all or one for each.
        scale: positive.
    """

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        return from_unit(x) ^ from_unit(y)

    def difference_of_integers(self, x: Tensor, y: Tensor) -> Tensor:
        return x ^ y

    def feature(self, difference: Tensor, smoothness: int) -> Tensor:
        x = to_unit(difference)
        bits = x.view(torch.int64)
        t = (bits & 0x7FF << BITS).view(torch.float64)  # only the exponent is left: 2^floor(log2 x), 0 at 0
        if smoothness == 1:
            return 1 - 3 * t
        b = torch.where(difference == 0, 0, 1023 - (bits >> BITS)).double()
        if smoothness == 2:
            return 2.5 * (1 - t) - b * x - 1
        t2 = t * t
        if smoothness == 3:
            return 43 / 18 * (1 - t2) - 5 * (1 - t) * x + b * x * x - 1
        inner = 43 / 9 * (t2 - 1) + x * (5 * (1 - t) - 2 / 3 * b * x)
        return 701 / 294 * (1 - t * t2) + x * inner + b * (_eighths(difference) / 48 - 1 / 42) - 1

    def _check_smoothness(self, one: int) -> None:
        whole_number("smoothness", one, 1)
        if one > 4:
            raise ValueError(f"smoothness must be 1 to 4, the orders with a closed form, got {one}")


def _eighths(x: Tensor) -> Tensor:
    """The sum over r >= 0 of (-1)^(digit r + 1 of x) 8^-r, by tables of nine digits at a time."""
    index = torch.arange(512, device=x.device)
    signs = torch.stack([1 - 2 * (index >> 8 - r & 1) for r in range(9)], -1).double()
    table = signs @ (8.0 ** -torch.arange(9, device=x.device, dtype=torch.float64))
    # 18 digits are enough for float64; the digits after them count as 0, a sum of 8^-18 (1 + 1/8 + ...) =
    # 8^-17 / 7.
    return table[x >> BITS - 9] + 8.0**-9 * table[x >> BITS - 18 & 511] + 8.0**-17 / 7
