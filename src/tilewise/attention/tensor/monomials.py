"""Monomials of a vector's entries up to a degree, which turn powers of a product sum into a product of features.

(sum over d of x_d y_d z_d)^l = sum over |a| = l of  l! / a!  x^a y^a z^a        (multinomial theorem)
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def count(dim: int, degree: int) -> int:
    """How many monomials of `dim` variables have degree at most `degree`: binomial(dim + degree, degree)."""
    return math.comb(dim + degree, degree)


def monomials(x: Tensor, degree: int) -> Tensor:
    """All monomials up to `degree` of the entries of x `[..., D]`, by degree: `[..., count(D, degree)]`.

    Each is one multiplication: those of degree l + 1 whose last variable is d are those of degree l whose last is
    at most d, times x_d, and they stand in a row when monomials of a degree are sorted by their last variable.
    """
    level = torch.ones_like(x[..., :1])
    levels, ends = [level], [1] * x.shape[-1]
    for _ in range(degree):
        level = torch.cat([level[..., :end] * x[..., d : d + 1] for d, end in enumerate(ends)], -1)
        ends = list(_running(ends))
        levels.append(level)
    return torch.cat(levels, -1)


@lru_cache(maxsize=32)
def multinomials(dim: int, degree: int) -> tuple[Tensor, Tensor]:
    """For each monomial, in the order of `monomials`: l! / a! (float64) and its degree l (int64), `[count]`."""
    factors, runs = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    all_factors, sizes, ends = [factors], [1], [1] * dim
    for level in range(1, degree + 1):
        new_factors, new_runs = [], []
        for d, end in enumerate(ends):
            run = torch.ones(end, dtype=torch.float64)
            first = ends[d - 1] if d else 0
            run[first:] += runs[first:end]  # those whose last variable is d already: its power grows by one
            new_factors.append(factors[:end] * level / run)
            new_runs.append(run)
        factors, runs, ends = torch.cat(new_factors), torch.cat(new_runs), list(_running(ends))
        all_factors.append(factors)
        sizes.append(len(factors))
    degrees = torch.repeat_interleave(torch.arange(degree + 1), torch.tensor(sizes))
    return torch.cat(all_factors), degrees


def _running(sizes: list[int]):
    total = 0
    for size in sizes:
        total += size
        yield total
