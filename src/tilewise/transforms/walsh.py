"""The Walsh-Hadamard transform, and orthogonal matrices like it for sizes that are not powers of two."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.kernels import Choice
from tilewise.kernels import fwht as kernel
from tilewise.kernels.fwht import orders
from tilewise.transforms.checks import check_dim


def fwht(x: Tensor, dim: int = -1, *, normalize: bool = True, engine: str = "auto") -> Tensor:
    """The fast Walsh-Hadamard transform along a dimension, in O(n log n), in natural (Hadamard) order.

    For n a power of two, `out[i] = n^-1/2 sum_j (-1)^popcount(i & j) x[j]`. For other sizes `n = m 2^k` the matrix
    is a Kronecker product of a symmetric orthogonal block of order m and the transform of size 2^k; nothing is
    padded or cut. The block is a Hadamard matrix of Paley's where he has one of at most 512 (n = 96: 12 x 8, 1536:
    12 x 128, 11008: 344 x 32), else a Hartley matrix (13696: 107 x 128), which is as orthogonal but whose entries
    are of many sizes; `transform_factors` says which. The block costs m more products for each number.

    The matrix is symmetric at every size, so the transform is its own transpose, and with `normalize` its own
    inverse. Differentiable, any number of times.

    Args:
        x: floating tensor, any shape and strides, with at least one number along `dim`. Sums of float16 and
            bfloat16 are kept in float32 and rounded once.
        dim: the dimension to transform.
        normalize: orthonormal if True; otherwise without the factor `n^-1/2`, so that a Hadamard matrix has entries
            -1 and 1.
        engine: "auto", or the name of an engine, which then runs or raises: "native" (C++ for CPUs), "torch",
            "definition".

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        ValueError, TypeError: an argument that does not fit; a size whose odd part exceeds 1024, with the nearest
            sizes that work.
    """
    rows, call = _bind(x, dim, normalize)
    out = kernel.fwht(call, engine).view(rows.shape)
    return out if rows is x else out.movedim(-1, dim)


def explain_fwht(x: Tensor, dim: int = -1, *, normalize: bool = True, engine: str = "auto") -> Choice:
    """The engine that `fwht` with the same arguments would run, and why each other one would not."""
    return kernel.explain(_bind(x, dim, normalize)[1], engine)


def _bind(x: Tensor, dim: int, normalize: bool) -> tuple[Tensor, kernel.Call]:
    """`x` with the dimension last, and the kernel's call over its rows."""
    n = check_dim(x, dim)
    # While compiling the operator itself has to find out: a size may be a symbol there.
    if not torch.compiler.is_compiling() and orders.factors(n) is None:
        sizes = " and ".join(map(str, orders.nearest(n)))
        raise ValueError(
            f"x must have a size along dim {dim} whose odd part is at most {orders.MOST_ODD}, got {n}; the nearest"
            f" sizes that work are {sizes}"
        )
    rows = x if dim in (-1, x.ndim - 1) else x.movedim(dim, -1)
    flat = rows if rows.ndim == 2 else rows.reshape(-1, n)
    return rows, kernel.Call(flat, n**-0.5 if normalize else 1.0)


def transform_factors(n: int) -> orders.Factors | None:
    """How the matrix of `fwht` for size `n` is made: order and kind of its block and its power of two.

    None where there is none. Raises ValueError unless n is an integer >= 1.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be an integer >= 1, got {n!r}")
    return orders.factors(n)


def hadamard(n: int, *, normalize: bool = True, dtype: torch.dtype = torch.float32, device=None) -> Tensor:
    """The symmetric matrix `[n, n]` of `fwht`, made of its entries' formulas.

    Raises ValueError where `fwht` has no transform of this size.
    """
    made = transform_factors(n)
    if made is None:
        sizes = " and ".join(map(str, orders.nearest(n)))
        raise ValueError(f"n must have an odd part of at most {orders.MOST_ODD}, got {n}; the nearest are {sizes}")
    at = torch.arange(made.power)
    common = at.unsqueeze(1) & at
    signs = torch.zeros_like(common)
    while bool(common.any()):
        signs, common = signs ^ (common & 1), common >> 1
    matrix = (1 - 2 * signs).double()
    if made.order > 1:
        matrix = torch.kron(orders.block(made.order, made.kind), matrix)
    return (matrix * (n**-0.5 if normalize else 1.0)).to(device=device, dtype=dtype)
