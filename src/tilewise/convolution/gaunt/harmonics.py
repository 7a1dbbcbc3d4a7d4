"""Real spherical harmonics: their order, their values, and the Legendre functions they are made of.

A function of degree L has `(L + 1)^2` coefficients, that of degree l and order m (-l to l) at `l^2 + l + m`.
The harmonics are orthonormal, the polar axis is z, there is no Condon-Shortley phase: those of degree 1 are
`sqrt(3 / 4 pi)` times y, z and x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def degree_of(coefficients: int, name: str = "x") -> int:
    """L of `(L + 1)^2` coefficients; ValueError naming the argument for other counts."""
    degree = math.isqrt(coefficients) - 1
    if degree < 0 or (degree + 1) ** 2 != coefficients:
        raise ValueError(f"{name} must have (L + 1)^2 coefficients in its last dimension, got {coefficients}")
    return degree


def check_degree(name: str, degree: int) -> int:
    """ValueError unless a degree is an integer >= 0."""
    if not isinstance(degree, int) or isinstance(degree, bool) or degree < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {degree!r}")
    return degree


def legendre(degree: int, theta: Tensor) -> Tensor:
    """Normalised associated Legendre functions at angles `theta [T]`: `[m, l, T]` of both from 0 to `degree`.

    Entry (m, l) times cos(m phi) sqrt(2) (1 for m = 0) is a harmonic; it is 0 for l < m. Angles beyond pi get
    the trigonometric polynomial that the function is, which is what a torus in place of a sphere needs. By
    the stable recurrence over l; float64.
    """
    theta = theta.double()
    cos, sin = theta.cos(), theta.sin()
    zero = torch.zeros_like(theta)
    rows, seed = [], torch.full_like(theta, math.sqrt(1 / (4 * math.pi)))
    for m in range(degree + 1):
        if m:
            seed = math.sqrt((2 * m + 1) / (2 * m)) * sin * seed
        row = [zero] * m + [seed]
        for n in range(m + 1, degree + 1):
            before = row[n - 2] if n > m + 1 else zero
            up = math.sqrt((4 * n * n - 1) / (n * n - m * m))
            down = math.sqrt(((n - 1) ** 2 - m * m) / (4 * (n - 1) ** 2 - 1)) if n > 1 else 0.0
            row.append(up * (cos * row[n - 1] - down * before))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def real_harmonics(directions: Tensor, degree: int) -> Tensor:
    """Values of all harmonics up to a degree: directions `[..., 3]` of any length but 0 to `[..., (degree +
    1)^2]`.

    Computed in float64 and given in the dtype of `directions`. Raises ValueError for another shape or degree.
    """
    check_degree("degree", degree)
    if not isinstance(directions, Tensor) or not directions.ndim or directions.shape[-1] != 3:
        given = list(directions.shape) if isinstance(directions, Tensor) else type(directions).__name__
        raise ValueError(f"directions must be [..., 3], got {given}")
    x, y, z = directions.double().reshape(-1, 3).unbind(1)
    phi = torch.atan2(y, x)
    values = legendre(degree, torch.atan2(torch.hypot(x, y), z))
    columns = []
    for n in range(degree + 1):
        for m in range(-n, n + 1):
            turn = math.sqrt(2) * (m * phi).cos() if m > 0 else math.sqrt(2) * (-m * phi).sin() if m else 1.0
            columns.append(values[abs(m), n] * turn)
    return torch.stack(columns, 1).reshape(*directions.shape[:-1], -1).to(directions.dtype)
