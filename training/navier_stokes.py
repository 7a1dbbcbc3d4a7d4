"""A spectral solver of the Navier-Stokes equations on a torus, and fields to start from.

Vorticity w on the unit square: w_t + u grad w = viscosity laplace w + force, u from the stream function.
Fourier modes, two thirds kept in products, Crank-Nicolson for viscosity and Heun's rule for all else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def waves(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Angular wave numbers of the half spectrum `[n, n // 2 + 1]` along both sides."""
    x = 2 * math.pi * torch.fft.fftfreq(n, 1 / n, dtype=dtype)
    y = 2 * math.pi * torch.fft.rfftfreq(n, 1 / n, dtype=dtype)
    return x.unsqueeze(1).expand(n, len(y)), y.expand(n, -1)


def random_fields(count: int, n: int, seed: int, smooth: float = 2.5, scale: float = 7.0) -> Tensor:
    """`[count, n, n]` vorticities: Gaussian fields of covariance 2 scale^(2 smooth - 2) (-laplace +
    scale^2)^(-smooth).

    The modes drawn are those of a grid of 16 points whatever n is, so a seed is the same field on every grid.
    """
    coarse = 16
    gen = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, coarse, coarse, generator=gen, dtype=torch.float64)
    kx, ky = waves(coarse)
    spread = math.sqrt(2) * scale ** (smooth - 1) * (kx**2 + ky**2 + scale**2) ** (-smooth / 2)
    z = torch.fft.rfft2(noise, norm="ortho") * spread
    z[:, 0, 0] = 0
    z[:, coarse // 2], z[:, :, coarse // 2] = (
        0,
        0,
    )  # a wave that is its own mirror image is another one on fine grids
    return finer(torch.fft.irfft2(z, s=(coarse, coarse), norm="forward"), n)


def finer(w: Tensor, n: int) -> Tensor:
    """The same trigonometric polynomial on a grid of n points a side: `[B, m, m]` to `[B, n, n]`, m even, n
    >= m."""
    m = w.shape[-1]
    if n == m:
        return w
    z, half = torch.fft.rfft2(w, norm="forward"), m // 2
    whole = z.new_zeros(len(w), n, n // 2 + 1)
    whole[:, :half, :half], whole[:, 1 - half :, :half] = z[:, :half, :half], z[:, 1 - half :, :half]
    return torch.fft.irfft2(whole, s=(n, n), norm="forward")


def forcing(n: int) -> Tensor:
    """0.1 (sin 2 pi (x + y) + cos 2 pi (x + y)), `[n, n]`."""
    x = torch.arange(n, dtype=torch.float64) / n
    turn = 2 * math.pi * (x.unsqueeze(1) + x)
    return 0.1 * (turn.sin() + turn.cos())


def solve(
    w: Tensor, time: float, *, step: float = 0.04, viscosity: float = 1e-3, force: Tensor | None = None
) -> Tensor:
    """Vorticity `[B, n, n]` after `time`. In the dtype given."""
    n, count = w.shape[-1], round(time / step)
    kx, ky = (k.to(w) for k in waves(n))
    square = kx**2 + ky**2
    poisson = 1 / torch.where(square == 0, torch.ones_like(square), square)
    kept = ((kx.abs() < 2 * math.pi * n / 3) & (ky.abs() < 2 * math.pi * n / 3)).to(w)
    pushed = 0 if force is None else torch.fft.rfft2(force.to(w))
    z = torch.fft.rfft2(w)

    def rate(z: Tensor) -> Tensor:
        stream = z * poisson
        parts = torch.fft.irfft2(
            torch.stack((1j * ky * stream, -1j * kx * stream, 1j * kx * z, 1j * ky * z)), s=(n, n)
        )
        return pushed - kept * torch.fft.rfft2(parts[0] * parts[2] + parts[1] * parts[3])

    half = 0.5 * step * viscosity * square
    for _ in range(count):
        first = rate(z)
        guess = ((1 - half) * z + step * first) / (1 + half)
        z = ((1 - half) * z + 0.5 * step * (first + rate(guess))) / (1 + half)
    return torch.fft.irfft2(z, s=(n, n))


def pairs(count: int, seed: int, n: int = 32, time: float = 8.0) -> tuple[Tensor, Tensor]:
    """Fields and what becomes of them, float32 `[count, 1, n, n]` each; solved on 32 points, which hold all
    of it."""
    w = random_fields(count, 32, seed)
    later = torch.cat([solve(part, time, force=forcing(32)) for part in w.split(50)])
    return finer(w, n).float().unsqueeze(1), finer(later, n).float().unsqueeze(1)
