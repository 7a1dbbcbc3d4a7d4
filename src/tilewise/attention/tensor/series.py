"""Polynomials that approximate exp on an interval, with a bound on their relative error; the degree for an error.

Softmax weights are exp of scores, and only their ratios matter, so what counts is the relative error

    epsilon = max over |x| <= R of |P(x) / exp(x) - 1|.

If it is below 1, the polynomial is positive there, and attention with weights P(score) instead of exp(score) errs
by at most epsilon / (1 - epsilon) times the largest value (see `output_error`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

SERIES = ("chebyshev", "taylor")
SMALLEST = 2.0**-10  # smaller radii count as this one, which keeps powers of them from vanishing
HIGHEST = 256  # degrees beyond it are not tried


@dataclass(frozen=True)
class Series:
    """A polynomial for exp on [-radius, radius].

    chebyshev: the Chebyshev series of exp, cut after `degree`; its coefficients are Bessel functions I_l(R), and
    what is cut off is at most 2 (I_(g+1) + I_(g+2) + ...). The paper's degree is that of such a polynomial.
    taylor: the Taylor series at 0, cut after `degree`; what is cut off is at most R^(g+1) / (g+1)! where x <= 0,
    and e^x times that elsewhere. About 2^g times worse.
    """

    kind: str
    radius: float
    degree: int

    def __post_init__(self) -> None:
        if self.kind not in SERIES:
            raise ValueError(f"series must be one of {SERIES}, got {self.kind!r}")
        if not math.isfinite(self.radius) or self.radius < 0:
            raise ValueError(f"radius must be a finite number >= 0, got {self.radius!r}")
        if not isinstance(self.degree, int) or not 0 <= self.degree <= HIGHEST:
            raise ValueError(f"degree must be an integer in 0..{HIGHEST}, got {self.degree!r}")
        object.__setattr__(self, "radius", max(self.radius, SMALLEST))

    @property
    def relative_error(self) -> float:
        """An upper bound on epsilon: what is cut off, over the smallest exp of the interval, e^-R."""
        r, g = self.radius, self.degree
        if r > HIGHEST:
            return math.inf
        if self.kind == "chebyshev":
            return math.exp(2 * r) * 2 * _scaled_tail(g + 1, r)  # the Bessel functions come divided by e^R
        return math.exp(min(r + (g + 1) * math.log(r) - math.lgamma(g + 2), 700))

    def rounding(self, dtype: torch.dtype) -> float:
        """An allowance for rounding in `dtype`, as a relative error: (4 degree + 32) units times e^(2R).

        Where P is least, e^-R, it is a sum of terms up to e^R, whose roundings therefore count e^(2R) times. Each
        term is a few times `degree` multiplications; long sums add to them. Not proven, for sums depend on the
        machine: equal scores of -R (the worst case found) lost at most 41 units with degrees of 10 to 28.
        """
        units = (4 * self.degree + 32) * torch.finfo(dtype).eps / 2
        return units * math.exp(min(2 * self.radius, 700))

    def error(self, dtype: torch.dtype) -> float:
        """How far the output may be off, as a share of the largest |value|, computed in `dtype`."""
        return output_error(self.relative_error + self.rounding(dtype))

    def coefficients(self) -> list[float]:
        """c_0, ..., c_g with P(x) = sum of c_l x^l."""
        if self.kind == "taylor":
            return [1 / math.factorial(level) for level in range(self.degree + 1)]
        return _in_powers(self.radius, self.degree)


def output_error(epsilon: float) -> float:
    """How far the output may be off, as a share of the largest |value|, for weights with relative error epsilon.

    With true weights p (sum 1), errors e (|e| <= epsilon) and values y in [-M, M] of mean m, the output is off by
    (sum p e (y - m)) / (1 + sum p e): at most epsilon M / (1 - epsilon), as the mean of |y - m| is at most M.
    """
    return epsilon / (1 - epsilon) if epsilon < 1 else math.inf


def lowest_degree(
    radius: float, error: float, kind: str = "chebyshev", dtype: torch.dtype = torch.float64
) -> int | None:
    """The lowest degree that keeps the output within `error` of the largest |value| in `dtype`; None if none does.

    It grows as max(R, log(1/error) / log(log(1/error) / R)), the paper's rule, with R = B^m for entries up to B.
    """
    if not error > 0:
        raise ValueError(f"error must be > 0, got {error!r}")
    if output_error(Series(kind, radius, 0).rounding(dtype)) > error:
        return None  # rounding alone is too much, and more so with higher degrees
    for degree in range(HIGHEST + 1):
        if Series(kind, radius, degree).error(dtype) <= error:
            return degree
    return None


def _scaled_tail(first: int, x: float) -> float:
    """The sum of I_l(x) / e^x over all l >= first, from above."""
    terms = [_scaled_bessel(first, x)]
    while first + len(terms) <= x or terms[-1] > 1e-17 * terms[0]:
        terms.append(_scaled_bessel(first + len(terms), x))
    return math.fsum(terms) + terms[-1]  # beyond l = x each is less than half of the one before


@lru_cache(maxsize=4096)
def _scaled_bessel(order: int, x: float) -> float:
    """I_order(x) / e^x, x > 0, by its power series: all terms are positive, so nothing cancels."""
    log_half = math.log(x / 2)
    terms, k = [], 0
    while True:
        log_term = (2 * k + order) * log_half - math.lgamma(k + 1) - math.lgamma(k + order + 1) - x
        terms.append(math.exp(log_term) if log_term > -745 else 0.0)
        k += 1
        if k > x / 2 and (terms[-1] <= 1e-18 * terms[0] or terms[-1] <= 1e-18 * max(terms)):
            return math.fsum(terms)


def _in_powers(radius: float, degree: int) -> list[float]:
    """The cut Chebyshev series of exp on [-R, R] in powers of x; the Chebyshev polynomials' own are integers."""
    before, now = [1], [0, 1]
    table = [before, now]
    while len(table) <= degree:
        after = [0, *(2 * c for c in now)]
        for power, c in enumerate(before):
            after[power] -= c
        before, now = now, after
        table.append(now)
    grown = math.exp(radius)
    heights = [
        _scaled_bessel(level, radius) * grown * (1 if level == 0 else 2) for level in range(degree + 1)
    ]
    return [
        math.fsum(heights[level] * table[level][power] for level in range(power, degree + 1)) / radius**power
        for power in range(degree + 1)
    ]
