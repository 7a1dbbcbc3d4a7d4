"""Quantiles of Student's t, for whole degrees of freedom."""

from __future__ import annotations

import math

from tilewise.transforms.qmc.sequence import whole_number


def two_sided_t(confidence: float, freedom: int) -> float:
    """The t with P(|T| <= t) = confidence, T of `freedom` degrees of freedom, by bisection of its
    distribution."""
    whole_number("freedom", freedom, 1)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        if _within(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan(angle)), the finite sum for whole degrees of freedom (Abramowitz and
    Stegun, 26.7)."""
    odd, sine, cosine = freedom % 2, math.sin(angle), math.cos(angle)
    term, total = cosine**odd, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
