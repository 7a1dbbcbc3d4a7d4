"""Variables other than the unit cube's, made from its points, and integrands made periodic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tilewise.kernels.digit_sums.digits import BITS


class Uniform:
    """Uniform on a box; `low` and `high` are numbers or `[dim]`, and low < high."""

    def __init__(self, low: float | Sequence[float] | Tensor, high: float | Sequence[float] | Tensor) -> None:
        self.low, self.high = (torch.as_tensor(x, dtype=torch.float64) for x in (low, high))
        if not (self.low < self.high).all():
            raise ValueError(f"low must lie below high, got {self.low.tolist()} and {self.high.tolist()}")

    def __call__(self, u: Tensor) -> Tensor:
        check_cube(u)
        low, high = self.low.to(u.device), self.high.to(u.device)
        return (low + (high - low) * u).to(u.dtype)


class Normal:
    """Gaussian, by the inverse of its distribution function.

    Args:
        mean: a number or `[dim]`.
        covariance: a variance, `[dim]` variances, or a positive definite `[dim, dim]`.
        by: how a full covariance is factored: "pca" puts the largest variances on the first coordinates,
            which points are best in; "cholesky" takes the coordinates as they come.

    A point of the cube is taken to be the middle of its cell of side 2^-52 (2^-24 in float32), so 0 gives a
    finite number.
    """

    def __init__(
        self,
        mean: float | Sequence[float] | Tensor = 0.0,
        covariance: float | Sequence[float] | Sequence[Sequence[float]] | Tensor = 1.0,
        *,
        by: str = "pca",
    ) -> None:
        self.mean, given = (torch.as_tensor(x, dtype=torch.float64) for x in (mean, covariance))
        if by not in ("pca", "cholesky"):
            raise ValueError(f'by must be "pca" or "cholesky", got {by!r}')
        if given.ndim < 2:
            if not (given > 0).all():
                raise ValueError(f"covariance must be positive, got {given.tolist()}")
            self.factor = given.sqrt()
            return
        if given.shape != given.T.shape or given.ndim > 2 or not torch.allclose(given, given.T):
            raise ValueError(f"covariance must be symmetric [dim, dim], got shape {tuple(given.shape)}")
        values, vectors = torch.linalg.eigh(given)
        if values[0] <= 0:
            raise ValueError(f"covariance must be positive definite, its least eigenvalue is {values[0]:.3g}")
        pca = vectors.flip(1) * values.flip(0).sqrt()
        self.factor = pca if by == "pca" else torch.linalg.cholesky(given)

    def __call__(self, u: Tensor) -> Tensor:
        check_cube(u)
        half = 2.0 ** -(BITS + 1) if u.dtype == torch.float64 else 2.0**-25
        z = torch.special.ndtri(u.double() + half)
        factor, mean = self.factor.to(u.device), self.mean.to(u.device)
        return (mean + (z * factor if factor.ndim < 2 else z @ factor.T)).to(u.dtype)


def tent(u: Tensor) -> tuple[Tensor, Tensor | float]:
    """Points folded, `1 - |2 u - 1|`, and their weight: a function becomes continuous as a periodic one."""
    return (1 - (2 * u - 1).abs()).clamp(max=1 - torch.finfo(u.dtype).eps), 1.0


def sine(u: Tensor) -> tuple[Tensor, Tensor | float]:
    """Points moved by `u - sin(2 pi u) / 2 pi`, and their weight: its first derivative is continuous too."""
    turned = 2 * math.pi * u
    moved = (u - turned.sin() / (2 * math.pi)).clamp(0, 1 - torch.finfo(u.dtype).eps)
    return moved, (1 - turned.cos()).prod(-1)


PERIODIZERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor | float]]] = {"tent": tent, "sine": sine}


def check_cube(u: Tensor) -> None:
    """Raise unless all points lie in [0, 1)."""
    if u.numel() and not ((u >= 0) & (u < 1)).all():
        raise ValueError(f"points must lie in [0, 1), got values from {u.min():.4g} to {u.max():.4g}")
