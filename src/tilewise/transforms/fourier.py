"""Discrete Fourier transforms whose samples may lie in bit-reversed order."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.transforms.checks import NORMS, ORDERS, check_choice, check_dim, nothing, widened
from tilewise.transforms.kept import kept


def fft(x: Tensor, dim: int = -1, *, order: str = "natural", norm: str = "backward") -> Tensor:
    """The discrete Fourier transform along a dimension, `X[k] = sum_j x[j] exp(-2 pi i j k / n)`.

    With `order="bit-reversed"` the samples come in bit-reversed order, as a lattice in radical-inverse order
    has
    them: x[r(j)] is sample j, where r reverses the log2(n) bits of j. The spectrum is in natural order either
        way.

    Args:
        x: floating or complex tensor, any strides. float16 and bfloat16 are computed in float32.
        dim: the dimension to transform.
        order: "natural" or "bit-reversed" (n a power of two), of the samples.
        norm: "backward" (no factor; `ifft` divides by n), "ortho" (n^-1/2) or "forward" (1/n), as in
            `torch.fft`.

    Returns:
        A complex tensor of x's shape. Differentiable. Raises ValueError and TypeError for arguments that do
        not fit.
    """
    _check(x, dim, order, norm, is_complex=True)
    if not x.numel():
        return nothing(x, dim, x.shape[dim], _complex(x))
    return torch.fft.fft(_to_natural(widened(x), dim, order), dim=dim, norm=norm)


def ifft(x: Tensor, dim: int = -1, *, order: str = "natural", norm: str = "backward") -> Tensor:
    """The inverse of `fft` with the same arguments: the spectrum in natural order, the samples in `order`."""
    _check(x, dim, order, norm, is_complex=True)
    if not x.numel():
        return nothing(x, dim, x.shape[dim], _complex(x))
    return _from_natural(torch.fft.ifft(widened(x), dim=dim, norm=norm), dim, order)


def rfft(x: Tensor, dim: int = -1, *, order: str = "natural", norm: str = "backward") -> Tensor:
    """The first n // 2 + 1 numbers of the spectrum of real samples; arguments as those of `fft`."""
    _check(x, dim, order, norm, is_complex=False)
    if not x.numel():
        return nothing(x, dim, x.shape[dim] // 2 + 1, _complex(x))
    return torch.fft.rfft(_to_natural(widened(x), dim, order), dim=dim, norm=norm)


def irfft(
    x: Tensor, n: int | None = None, dim: int = -1, *, order: str = "natural", norm: str = "backward"
) -> Tensor:
    """The inverse of `rfft`: `n` real samples from n // 2 + 1 numbers of a spectrum along `dim`.

    `n` is by default the even one. Raises ValueError where x has not as many numbers as n asks for:
    `torch.fft` would cut or pad.
    """
    size = check_dim(x, dim, is_complex=True)
    n = max(1, 2 * (size - 1)) if n is None else n
    if isinstance(n, bool) or not isinstance(n, int) or n < 1 or n // 2 + 1 != size:
        raise ValueError(
            f"n must be one of {max(1, 2 * size - 2)} and {2 * size - 1} for {size} numbers along dim {dim},"
            f" got {n!r}"
        )
    check_choice("order", order, ORDERS)
    check_choice("norm", norm, NORMS)
    _check_power(n, order)
    if not x.numel():
        return nothing(x, dim, n, _complex(x).to_real())
    return _from_natural(torch.fft.irfft(widened(x), n=n, dim=dim, norm=norm), dim, order)


def bit_reversed(n: int, device: torch.device | str | None = None) -> Tensor:
    """The numbers 0 .. n - 1 with their log2(n) bits reversed, int64 `[n]`; an involution.

    Raises ValueError unless n is a power of two.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1 or n & (n - 1):
        raise ValueError(f"n must be a power of two, got {n!r}")
    found = torch.zeros(1, dtype=torch.int64, device=device)
    while len(found) < n:
        found = torch.cat((2 * found, 2 * found + 1))
    return found


def _complex(x: Tensor) -> torch.dtype:
    """The complex dtype that transforms of `x` have."""
    return torch.complex128 if x.dtype in (torch.float64, torch.complex128) else torch.complex64


def _check(x: Tensor, dim: int, order: str, norm: str, *, is_complex: bool) -> None:
    n = check_dim(x, dim, is_complex=is_complex)
    check_choice("order", order, ORDERS)
    check_choice("norm", norm, NORMS)
    _check_power(n, order)


def _check_power(n: int, order: str) -> None:
    if order == "bit-reversed" and n & (n - 1):
        nearest = 1 << (n.bit_length() - 1)
        raise ValueError(
            f"order 'bit-reversed' needs a power of two, got {n}; the nearest are {nearest} and {2 * nearest}"
        )


def _to_natural(x: Tensor, dim: int, order: str) -> Tensor:
    return x if order == "natural" else x.index_select(dim, kept(bit_reversed, x.shape[dim], x.device))


_from_natural = _to_natural  # reversing bits twice does nothing
