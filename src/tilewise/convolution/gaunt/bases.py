"""From spherical harmonics to the 2-D Fourier basis of a torus and back, order by order: O(L^3) for a
function.

On a torus of angles theta and phi a harmonic of order m is cos(m phi) or sin(-m phi) times a polynomial of
cos(u theta) (m even) or sin(u theta) (m odd), u up to its degree: half of a real function's Fourier
coefficients, all others follow. An array `[m, u]` of these, m from -L to L and u from 0 to L, is "Fourier
coefficients" here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tilewise.convolution.gaunt.harmonics import check_degree, degree_of, legendre


@lru_cache(maxsize=512)
def _made(
    make: Callable[..., Any], arguments: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Constants of a size, once for each dtype and device; ordinary tensors even inside inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        found = make(*arguments)
        found = found if isinstance(found, tuple) else (found,)
        kinds = [
            dtype.to_complex() if x.is_complex() else dtype if x.is_floating_point() else x.dtype
            for x in found
        ]
        return tuple(x.to(device, kind) for x, kind in zip(found, kinds))


def constants(make: Callable[..., Any], arguments: tuple[int, ...], like: Tensor) -> tuple[Tensor, ...]:
    """What `make(*arguments)` gives in float64, in the dtype and on the device of `like`, made once."""
    return _made(make, arguments, like.dtype, like.device)


def orders(degree: int) -> Tensor:
    """m from -degree to degree."""
    return torch.arange(-degree, degree + 1)


def _by_zero(degree: int, zero: float, other: float) -> Tensor:
    """Of every order: `zero` for m = 0, else `other`; float64."""
    made = torch.full((2 * degree + 1,), other, dtype=torch.float64)
    made[degree] = zero
    return made


def _angles(count: int) -> Tensor:
    """Half of an even grid of the circle, `[count]`: what a cosine or sine series is known from."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) * (math.pi / count)


def _series(degree: int, band: int, theta: Tensor) -> Tensor:
    """`[m, u, T]`: cos(u theta) where m is even, sin(u theta) where it is odd; u up to `band`."""
    turns = torch.arange(band + 1, dtype=torch.float64).unsqueeze(1) * theta
    odd = (orders(degree) % 2).bool().view(-1, 1, 1)
    return torch.where(odd, turns.sin(), turns.cos())


def gathering(degree: int) -> tuple[Tensor, Tensor]:
    """Places of coefficients `[m, l]` in a list of harmonics, and of the list in that array, flattened.

    An order m has no degree l < |m|: the place of its first degree stands there, and matrices have a zero
    row.
    """
    m, n = orders(degree).unsqueeze(1), torch.arange(degree + 1)
    used = torch.maximum(n, m.abs())
    listed = [(m + degree) * (degree + 1) + n for n in range(degree + 1) for m in range(-n, n + 1)]
    return used * used + used + m, torch.tensor(listed)


def expansion(degree: int) -> Tensor:
    """`[m, l, u]`: a harmonic's Fourier coefficients. Interpolation of exact polynomials, float64."""
    theta = _angles(degree + 1)
    values = legendre(degree, theta)[orders(degree).abs()]  # [m, l, T]
    return _coefficients(degree, values) * _by_zero(degree, 1, math.sqrt(2)).view(-1, 1, 1)


def _coefficients(degree: int, values: Tensor) -> Tensor:
    """`[m, ..., T]` on half a grid to `[m, ..., u]`, u below T."""
    count = values.shape[-1]
    weights = torch.full((count, 1), 2 / count, dtype=torch.float64)
    weights[0] = 1 / count
    return values @ (_series(degree, count - 1, _angles(count)) * weights).mT


def projection(band: int, degree: int) -> Tensor:
    """`[m, u, l]`: what Fourier coefficients with u up to `band` are in harmonics up to `degree`, exactly.

    Integrals over the sphere of products of two series; that of cos(k theta) sin(theta) is (1 + (-1)^k) / (1
    - k^2).
    """

    def integral(k: Tensor) -> Tensor:
        return torch.where(k % 2 == 0, 2 / torch.where(k % 2 == 0, 1.0 - k * k, 1.0), 0.0)

    u, v = torch.arange(band + 1).double().unsqueeze(1), torch.arange(degree + 1).double()
    odd = (orders(degree) % 2).bool().view(-1, 1, 1)
    product = 0.5 * (integral(u - v) + torch.where(odd, -1.0, 1.0) * integral(u + v))
    around = _by_zero(degree, 2 * math.pi, math.pi).view(-1, 1, 1)
    return around * (product @ expansion(degree).mT)


def onto_grid(degree: int, band: int, count: int) -> tuple[Tensor, Tensor]:
    """Matrices from harmonics to a grid of `band + 1` thetas and `count` phis: `[m, l, theta]` and `[m,
    phi]`."""
    theta = expansion(degree) @ _series(degree, degree, _angles(band + 1))
    return theta, _around(degree, count)


def off_grid(band: int, degree: int, count: int) -> tuple[Tensor, Tensor]:
    """Matrices from such a grid to harmonics up to `degree`: `[m, phi]` and `[m, theta, l]`."""
    points = torch.eye(band + 1, dtype=torch.float64).expand(2 * degree + 1, -1, -1)
    weights = _by_zero(degree, 1 / count, 2 / count)
    return _around(degree, count) * weights.unsqueeze(1), _coefficients(degree, points) @ projection(
        band, degree
    )


def _around(degree: int, count: int) -> Tensor:
    """cos(m phi) of m >= 0 and sin(-m phi) of m < 0 on a whole grid: `[m, phi]`."""
    phi = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    turns = orders(degree).abs().unsqueeze(1) * phi
    return torch.where(orders(degree).unsqueeze(1) < 0, turns.sin(), turns.cos())


def by_order(x: Tensor, degree: int, matrices: Tensor) -> Tensor:
    """Harmonics `x [B, (L + 1)^2]` times a matrix `[m, l, K]` of each order: `[m, B, K]`."""
    places = constants(gathering, (degree,), x)[0]
    return torch.bmm(x[:, places].transpose(0, 1), matrices)


def listed(x: Tensor, degree: int) -> Tensor:
    """`[m, B, l]` as a list of harmonics `[B, (L + 1)^2]`."""
    places = constants(gathering, (degree,), x)[1]
    return x.transpose(0, 1).flatten(1).index_select(1, places)


def to_fourier(x: Tensor) -> Tensor:
    """Harmonics `[..., (L + 1)^2]` to Fourier coefficients `[..., 2 L + 1, L + 1]` (orders, then u); float32
    or 64.

    Raises ValueError for another number of coefficients.
    """
    degree = degree_of(x.shape[-1] if x.ndim else 0)
    made = by_order(x.reshape(-1, x.shape[-1]), degree, constants(expansion, (degree,), x)[0])
    return made.transpose(0, 1).reshape(*x.shape[:-1], 2 * degree + 1, degree + 1)


def from_fourier(coefficients: Tensor, degree: int | None = None) -> Tensor:
    """Fourier coefficients `[..., 2 L + 1, band + 1]` to harmonics `[..., (degree + 1)^2]`, `degree <= L`
    (None: L).

    The inverse of `to_fourier` where the coefficients are those of a function on the sphere; else the nearest
    such function, in the mean square over the sphere. Raises ValueError for a shape that does not fit.
    """
    if coefficients.ndim < 2 or coefficients.shape[-2] % 2 == 0 or not coefficients.shape[-1]:
        raise ValueError(f"coefficients must be [..., 2 L + 1, band + 1], got {list(coefficients.shape)}")
    rows, lead = coefficients.shape[-2] // 2, coefficients.shape[:-2]
    degree = rows if degree is None else check_degree("degree", degree)
    if degree > rows:
        raise ValueError(f"degree must be <= {rows}, the highest order given, got {degree}")
    kept = coefficients[..., rows - degree : rows + degree + 1, :]
    flat = kept.reshape(-1, *kept.shape[-2:]).transpose(0, 1)
    made = torch.bmm(flat, constants(projection, (coefficients.shape[-1] - 1, degree), coefficients)[0])
    return listed(made, degree).reshape(*lead, (degree + 1) ** 2)
