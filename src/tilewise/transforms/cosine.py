"""Discrete cosine transforms of types I to IV through the FFT."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewise.transforms.checks import check_choice, check_dim, nothing, widened

TYPES = (1, 2, 3, 4)
SCALES = ("ortho", None)


def dct(x: Tensor, dim: int = -1, *, type: int = 2, norm: str | None = "ortho") -> Tensor:
    """The discrete cosine transform along a dimension, in O(n log n).

    With `norm=None`, as SciPy defines them, for k = 0 .. n - 1:

        type 1    x[0] + (-1)^k x[n-1] + 2 sum_{0<j<n-1} x[j] cos(pi j k / (n - 1)),  n >= 2
        type 2    2 sum_j x[j] cos(pi k (2j + 1) / 2n)
        type 3    x[0] + 2 sum_{j>0} x[j] cos(pi j (2k + 1) / 2n)
        type 4    2 sum_j x[j] cos(pi (2j + 1)(2k + 1) / 4n)

    With `norm="ortho"` the first and last terms are weighted so that each is orthonormal: types 1 and 4 are
    then their own inverses, 2 and 3 each other's. Types 2 and 3 are one real FFT of the samples reordered
    (Makhoul, 1980), type 1 one of 2n - 2, type 4 a complex one of 2n.

    Args:
        x: floating tensor, any strides; float16 and bfloat16 are computed in float32.
        dim: the dimension to transform. type: 1, 2, 3 or 4. norm: "ortho" or None.

    Returns:
        A tensor of x's shape and dtype. Differentiable. Raises ValueError and TypeError for arguments that do
        not fit.
    """
    n = check_dim(x, dim)
    check_choice("type", type, TYPES)
    check_choice("norm", norm, SCALES)
    if type == 1 and n < 2:
        raise ValueError(f"x must have two numbers or more along dim {dim} for type 1, got {n}")
    if not x.numel():
        return nothing(x, dim, n, x.dtype)
    wide, scaled = widened(x).movedim(dim, -1), norm == "ortho"
    out = (_first, _second, _third, _fourth)[type - 1](wide, scaled)
    return out.movedim(-1, dim).to(x.dtype)


def idct(x: Tensor, dim: int = -1, *, type: int = 2, norm: str | None = "ortho") -> Tensor:
    """The inverse of `dct` with the same arguments."""
    n = check_dim(x, dim)
    check_choice("type", type, TYPES)
    check_choice("norm", norm, SCALES)
    out = dct(x, dim, type={2: 3, 3: 2}.get(type, type), norm=norm)
    return out if norm == "ortho" else out / (2 * (n - 1) if type == 1 else 2 * n)


def _turns(n: int, x: Tensor, numerator: Tensor, denominator: int) -> Tensor:
    """exp(-i pi numerator / denominator), complex, in the precision of x; angles are made in float64."""
    angle = (-math.pi / denominator) * numerator.double()
    made = torch.polar(torch.ones_like(angle), angle)
    return made.to(torch.complex128 if x.dtype == torch.float64 else torch.complex64)


def _ends(n: int, x: Tensor, which: tuple[int, ...], weight: float) -> Tensor:
    """Ones, with `weight` at the places `which`."""
    ends = torch.ones(n, dtype=x.dtype, device=x.device)
    ends[list(which)] = weight
    return ends


def _first(x: Tensor, scaled: bool) -> Tensor:
    n = x.shape[-1]
    if scaled:
        x = x * _ends(n, x, (0, n - 1), math.sqrt(2))
    out = torch.fft.rfft(torch.cat((x, x[..., 1:-1].flip(-1)), -1)).real
    if scaled:
        out = out * (_ends(n, x, (0, n - 1), math.sqrt(0.5)) / math.sqrt(2 * (n - 1)))
    return out


def _second(x: Tensor, scaled: bool) -> Tensor:
    n = x.shape[-1]
    spectrum = torch.fft.rfft(torch.cat((x[..., ::2], x[..., 1::2].flip(-1)), -1))
    spectrum = 2 * spectrum * _turns(n, x, torch.arange(n // 2 + 1, device=x.device), 2 * n)
    out = torch.cat((spectrum.real, -spectrum.imag[..., 1 : (n + 1) // 2].flip(-1)), -1)
    return out * (_ends(n, x, (0,), math.sqrt(0.5)) / math.sqrt(2 * n)) if scaled else out


def _third(x: Tensor, scaled: bool) -> Tensor:
    """The transpose of type 2 with the first sample halved: its steps backwards."""
    n = x.shape[-1]
    if scaled:
        x = x * (_ends(n, x, (0,), math.sqrt(2)) / math.sqrt(2 * n))
    half = n // 2 + 1
    mirrored = torch.cat((torch.zeros_like(x[..., :1]), x[..., 1:].flip(-1)), -1)[..., :half]
    turns = _turns(n, x, torch.arange(half, device=x.device), 2 * n).conj()
    out = torch.fft.irfft(torch.complex(x[..., :half], -mirrored) * turns, n=n, norm="forward")
    evens, odds = out[..., : (n + 1) // 2], out[..., (n + 1) // 2 :].flip(-1)
    if n % 2:
        odds = torch.cat((odds, odds.new_zeros(*odds.shape[:-1], 1)), -1)
    return torch.stack((evens, odds), -1).flatten(-2)[..., :n]


def _fourth(x: Tensor, scaled: bool) -> Tensor:
    n = x.shape[-1]
    at = torch.arange(n, device=x.device)
    spectrum = torch.fft.fft(x * _turns(n, x, at, 2 * n), n=2 * n)[..., :n]
    out = 2 * (spectrum * _turns(n, x, 2 * at + 1, 4 * n)).real
    return out / math.sqrt(2 * n) if scaled else out
