"""Coupling coefficients by exact rational sums: the table that a product of spherical functions must
equal."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from math import factorial

import torch
from torch import Tensor

from tilewise.convolution.gaunt.harmonics import check_degree


@lru_cache(maxsize=1 << 18)
def _squared_3j(l1: int, l2: int, l3: int, m1: int, m2: int, m3: int) -> tuple[int, Fraction]:
    """Sign and exact square of a 3j symbol, by Racah's sum of rationals."""
    outside = m1 + m2 + m3 or l3 < abs(l1 - l2) or l3 > l1 + l2
    if outside or abs(m1) > l1 or abs(m2) > l2 or abs(m3) > l3:
        return 0, Fraction(0)
    low = max(0, l2 - l3 - m1, l1 - l3 + m2)
    high = min(l1 + l2 - l3, l1 - m1, l2 + m2)
    total = Fraction(0)
    for t in range(low, high + 1):
        below = factorial(t) * factorial(l3 - l2 + t + m1) * factorial(l3 - l1 + t - m2)
        below *= factorial(l1 + l2 - l3 - t) * factorial(l1 - t - m1) * factorial(l2 - t + m2)
        total += Fraction((-1) ** t, below)
    triangle = Fraction(
        factorial(l1 + l2 - l3) * factorial(l1 - l2 + l3) * factorial(l2 + l3 - l1),
        factorial(l1 + l2 + l3 + 1),
    )
    orders = math.prod(factorial(n + m) * factorial(n - m) for n, m in ((l1, m1), (l2, m2), (l3, m3)))
    sign = (total > 0) - (total < 0)
    return -sign if (l1 - l2 - m3) % 2 else sign, triangle * orders * total**2


def wigner_3j(l1: int, l2: int, l3: int, m1: int, m2: int, m3: int) -> float:
    """The 3j symbol of integer degrees and orders, rounded once from its exact square; 0 where it vanishes.

    Raises ValueError for degrees that are not integers >= 0.
    """
    for name, degree in (("l1", l1), ("l2", l2), ("l3", l3)):
        check_degree(name, degree)
    sign, square = _squared_3j(l1, l2, l3, m1, m2, m3)
    return sign * math.sqrt(square)


def _to_real(degree: int) -> Tensor:
    """Rows: real harmonics of a degree; columns: complex ones, Condon and Shortley's phase in these.
    Unitary."""
    made = torch.zeros(2 * degree + 1, 2 * degree + 1, dtype=torch.complex128)
    made[degree, degree] = 1
    for m in range(1, degree + 1):
        half, sign = math.sqrt(0.5), (-1) ** m
        rows = torch.tensor([[half, sign * half], [1j * half, -1j * sign * half]], dtype=torch.complex128)
        plus, minus = degree + m, degree - m
        made[plus, minus], made[plus, plus], made[minus, minus], made[minus, plus] = rows.flatten()
    return made


def real_3j(l1: int, l2: int, l3: int) -> Tensor:
    """3j symbols between real harmonics: `[2 l1 + 1, 2 l2 + 1, 2 l3 + 1]`, float64, of norm 1 (0 outside the
    triangle).

    Clebsch and Gordan's coefficients are `sqrt(2 l3 + 1)` times these. Where l1 + l2 + l3 is odd they are
    antisymmetric and imaginary between real harmonics; their imaginary part is given.
    """
    made = torch.zeros(2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1, dtype=torch.complex128)
    for m1 in range(-l1, l1 + 1):
        for m2 in range(max(-l2, -l3 - m1), min(l2, l3 - m1) + 1):
            made[m1 + l1, m2 + l2, l3 - m1 - m2] = wigner_3j(l1, l2, l3, m1, m2, -m1 - m2)
    turned = torch.einsum("abc,ia,jb,kc->ijk", made, _to_real(l1), _to_real(l2), _to_real(l3))
    return turned.imag if (l1 + l2 + l3) % 2 else turned.real


def gaunt_table(left: int, right: int, out: int | None = None) -> Tensor:
    """Integrals of three real harmonics over the sphere: `[(left + 1)^2, (right + 1)^2, (out + 1)^2]`,
    float64.

    Contracted with the coefficients of two functions it gives those of their product, of degrees up to `out`
    (None: left + right, the whole product). `O(L^6)` numbers: a definition to test against, slow to make
    beyond degree 10. Raises ValueError for degrees that are not integers >= 0.
    """
    out = left + right if out is None else out
    for name, degree in (("left", left), ("right", right), ("out", out)):
        check_degree(name, degree)
    table = torch.zeros((left + 1) ** 2, (right + 1) ** 2, (out + 1) ** 2, dtype=torch.float64)
    for a in range(left + 1):
        for b in range(right + 1):
            for c in range(abs(a - b), min(a + b, out) + 1, 2):  # a + b + c even: no other integral is not 0
                scale = math.sqrt((2 * a + 1) * (2 * b + 1) * (2 * c + 1) / (4 * math.pi))
                block = scale * wigner_3j(a, b, c, 0, 0, 0) * real_3j(a, b, c)
                table[a * a : (a + 1) ** 2, b * b : (b + 1) ** 2, c * c : (c + 1) ** 2] = block
    return table
