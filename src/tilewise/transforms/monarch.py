"""The discrete Fourier transform as products of small dense matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewise.transforms.checks import NORMS, check_choice, check_dim, widened
from tilewise.transforms.kept import kept

MONARCH_ORDERS = ("natural", "monarch")


def monarch_dft(
    x: Tensor,
    factors: tuple[int, ...],
    dim: int = -1,
    *,
    inverse: bool = False,
    order: str = "natural",
    norm: str = "backward",
) -> Tensor:
    """The discrete Fourier transform of `n = n1 n2 [n3 ...]` numbers as one matrix product for each factor.

    A Monarch decomposition (Fu et al., 2023, arXiv 2311.05908; Dao et al., 2022, arXiv 2204.00595): the samples as
    a matrix [n1, n2], a product with the DFT matrix of order n1 over its columns, factors of size 1 between, and the
    transform of n2 over its rows, which is decomposed again. Dense products run where FFTs are poor: on matrix
    units, and fused with what comes before and after. On a CPU an FFT is faster; this is the same map for engines and
    for checking them.

    Args:
        x: floating or complex tensor, any strides; float16 and bfloat16 are computed in float32.
        factors: integers >= 1 whose product is the size along `dim`; at least one.
        dim: the dimension to transform.
        inverse: the inverse transform.
        order: of the spectrum, "natural" or "monarch": as the products leave it, frequency `k1 + n1 (k2 + n2 k3)`
            at place `(k1 n2 + k2) n3 + k3`, one transposition less. A pointwise product with another spectrum in the
            same order needs no other. With `inverse` it is the order of the input.
        norm: "backward" (the inverse divides by n), "ortho" or "forward".

    Returns:
        A complex tensor of x's shape. Differentiable. Raises ValueError and TypeError for arguments that do not fit.
    """
    n = check_dim(x, dim, is_complex=True)
    factors = _check_factors(factors, n)
    check_choice("order", order, MONARCH_ORDERS)
    check_choice("norm", norm, NORMS)
    x = widened(x).movedim(dim, -1)
    x = x if x.is_complex() else torch.complex(x, torch.zeros_like(x))
    steps = _inverse if inverse else _forward
    out = steps(x, factors, order == "natural")
    power = {"backward": float(inverse), "ortho": 0.5, "forward": float(not inverse)}[norm]
    return (out if power == 0 else out * n**-power).movedim(-1, dim)


def monarch_order(factors: tuple[int, ...], device: torch.device | str | None = None) -> Tensor:
    """The frequency at each place of a spectrum in "monarch" order, int64 `[n]`.

    Raises ValueError unless factors are integers >= 1.
    """
    factors = _check_factors(factors, None)
    found = torch.arange(math.prod(factors), device=device).view(factors[::-1])
    return found.permute(*reversed(range(len(factors)))).flatten()


def _check_factors(factors: tuple[int, ...], n: int | None) -> tuple[int, ...]:
    try:
        given = tuple(factors)
    except TypeError:
        given = ()
    if not given or any(isinstance(f, bool) or not isinstance(f, int) or f < 1 for f in given):
        raise ValueError(f"factors must be integers >= 1, got {factors!r}")
    if n is not None and math.prod(given) != n:
        raise ValueError(f"factors must multiply to the size {n}, got {given}, which make {math.prod(given)}")
    return given


def _forward(x: Tensor, factors: tuple[int, ...], natural: bool) -> Tensor:
    first, *rest = factors
    n = x.shape[-1]
    if not rest:
        return x @ kept(_dft, n, x.dtype, x.device)
    columns = x.unflatten(-1, (first, n // first))  # sample j1 n2 + j2
    columns = (kept(_dft, first, x.dtype, x.device) @ columns) * kept(_turns, first, n, x.dtype, x.device)
    rows = _forward(columns, tuple(rest), natural)  # [.., k1, k2], frequency k1 + n1 k2
    return (rows.mT if natural else rows).flatten(-2)


def _inverse(x: Tensor, factors: tuple[int, ...], natural: bool) -> Tensor:
    """The steps of `_forward` backwards, each conjugated."""
    first, *rest = factors
    n = x.shape[-1]
    if not rest:
        return x @ kept(_dft, n, x.dtype, x.device).conj()
    rows = x.unflatten(-1, (n // first, first)).mT if natural else x.unflatten(-1, (first, n // first))
    columns = _inverse(rows, tuple(rest), natural) * kept(_turns, first, n, x.dtype, x.device).conj()
    return (kept(_dft, first, x.dtype, x.device).conj() @ columns).flatten(-2)


def _dft(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The symmetric matrix exp(-2 pi i j k / n)."""
    at = torch.arange(n, device=device)
    return _unit(at.unsqueeze(1) * at % n, n, dtype)


def _turns(first: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The factors exp(-2 pi i k1 j2 / n) between two products, `[first, n // first]`."""
    return _unit(
        torch.arange(first, device=device).unsqueeze(1) * torch.arange(n // first, device=device), n, dtype
    )


def _unit(numerator: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """exp(-2 pi i numerator / n); angles are made in float64."""
    angle = (-2 * math.pi / n) * numerator.double()
    return torch.polar(torch.ones_like(angle), angle).to(dtype)
