"""Fast construction of generating vectors, component by component, for all powers of two at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tilewise.transforms.qmc.sequence import whole_number


def search_lattice(
    dim: int, log2_points: int = 20, *, weights: Sequence[float] | None = None, least: int = 6
) -> list[int]:
    """A generating vector for lattices of 2^least, 2^(least + 1), ... 2^log2_points points.

    Component by component, the number is taken for which the worst-case error in the weighted Korobov space
    of smoothness 1, divided by the best possible with the components before, is least at its worst number
    of points (after Cools, Kuo and Nuyens, 2006, who divide by errors of vectors searched for each number
    of points). Costs O(dim n log n): modulo 2^m the odd numbers are, up to their sign, the powers of 5, so
    what all candidates gain at the points u / 2^m, u odd, is one cyclic correlation. The lattices are
    embedded, so errors of fewer points are partial sums of those of more.

    Args:
        dim: components.
        log2_points: m, 3 to 26.
        weights: product weights of the coordinates, positive; None: 1 / j^2.
        least: the logarithm of the fewest points that count.

    Returns:
        `dim` odd numbers below 2^m / 2, the first of them 1.
    """
    whole_number("dim", dim, 1)
    whole_number("log2_points", log2_points, 3)
    if not 0 <= least <= log2_points <= 26:
        raise ValueError(f"log2_points must be from least={least} to 26, got {log2_points}")
    gammas = [1 / (j * j) for j in range(1, dim + 1)] if weights is None else list(weights)
    if len(gammas) < dim or min(gammas) <= 0:
        raise ValueError(f"weights must be {dim} positive numbers, got {weights!r}")
    levels = [_Level(k) for k in range(log2_points + 1)]
    vector: list[int] = []
    for gamma in gammas[:dim]:
        best = _best(levels, gamma, least) if vector else 0
        for level in levels:
            level.take(best, gamma)
        z = pow(5, best, 1 << log2_points)
        vector.append(min(z, (1 << log2_points) - z))
    return vector


class _Level:
    """The points u / 2^k, u odd: of each pair u, -u the power of 5, in the order of the powers."""

    def __init__(self, k: int) -> None:
        self.k, self.pairs = k, max(1, 1 << max(k - 2, 0))
        self.each = 1 if k < 2 else 2  # points that share a value
        odd, steps = torch.ones(1, dtype=torch.int64), 1
        while steps < self.pairs:  # 5^e by doubling
            odd = torch.cat((odd, odd * pow(5, steps, 1 << k) % (1 << k)))
            steps *= 2
        x = (odd if k else torch.zeros(1)).double() / (1 << k)
        self.omega = 2 * math.pi**2 * (x * x - x + 1 / 6)
        self.spectrum = torch.fft.rfft(self.omega)
        self.products = torch.ones(self.pairs, dtype=torch.float64)

    def gain(self) -> Tensor:
        """For the candidates 5^e: the sum over points of products times the new coordinate's omega."""
        found = torch.fft.irfft(torch.fft.rfft(self.products).conj() * self.spectrum, self.pairs)
        return self.each * found

    def take(self, exponent: int, gamma: float) -> None:
        self.products *= 1 + gamma * self.omega.roll(-exponent)


def _best(levels: list[_Level], gamma: float, least: int) -> int:
    """The exponent e whose number 5^e is best at its worst number of points."""
    total, worst = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for level in levels:
        now = level.each * level.products.sum() + gamma * level.gain()
        total = total.repeat(len(now) // len(total)) + now  # numbers alike modulo 2^k have the same sum
        if level.k >= least:
            error = total / (1 << level.k) - 1
            worst = worst.repeat(len(now) // len(worst)).maximum(error / error.min())
    return int(worst.argmin())
