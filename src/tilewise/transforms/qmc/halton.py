"""Halton points: radical inverses in the first primes, with the randomisations of digits."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from tilewise.kernels.digit_sums.digits import BITS
from tilewise.kernels.digit_sums.memory import empty
from tilewise.transforms.qmc import scrambling
from tilewise.transforms.qmc.digits import below, fold, mix, step, words
from tilewise.transforms.qmc.sequence import PointSequence

TABLE = 1 << 12  # radical inverses of this many indices are tabulated; all others are sums of two entries
PERMUTATION, SHIFT, MATRIX, TREE = 1, 2, 3, 4  # what random words are for


class Halton(PointSequence):
    """Halton's sequence: coordinate j of point i mirrors the digits of i in the j-th prime at the point.

    Any number of points and of dimensions; a coordinate has as many digits as 52 bits hold. Randomisations:

    - "permutations": every digit of every coordinate is permuted by a random permutation of its own; the
    default;
    - "digital-shift": every digit is moved by a random amount, modulo the base;
    - "lms": linear matrix scrambling modulo the base, then a digital shift;
    - "nus": nested uniform scrambling by a hash of the tree's nodes; a point costs about `base` hashes a
    digit;
    - None: the radical inverses, point 0 is the origin.

    Args:
        dim: coordinates.
        randomize, replications, seed, device, dtype: as for every `PointSequence`.

    After QMCPy (Sorokin, 2025, arXiv 2502.14256), whose NUS stores trees where this one hashes.
    """

    choices = ("permutations", "digital-shift", "lms", "nus", None)

    def __init__(
        self,
        dim: int,
        *,
        randomize: str | None = "permutations",
        replications: int | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(
            dim, randomize=randomize, replications=replications, seed=seed, device=device, dtype=dtype
        )
        self.bases = primes(dim)

    def _make(self, start: int, n: int, dtype: torch.dtype) -> Tensor:
        out = empty((self.copies, n, self.dim), dtype, self.device)
        for j, base in enumerate(self.bases):
            digits = int(BITS / math.log2(base))
            if self.randomize == "lms":
                made = self._lms(out, start, base, digits, j)
            elif self.randomize == "nus":
                made = self._nus(out, start, base, digits, j)
            else:
                made = self._permuted(out, start, base, digits, j)
            x = made.to(torch.float64) / base**digits
            if dtype != torch.float64:
                x = (x * 2.0**24).floor() * 2.0**-24  # cut, so that rounding cannot reach 1
            out[:, :, j] = x
        return out

    def _permuted(self, out: Tensor, start: int, base: int, digits: int, j: int) -> Tensor:
        """Whole numbers of `digits` digits, `[copies, n]`: sums of what each digit of the index brings."""
        make = (
            scrambling.shift_permutations
            if self.randomize == "digital-shift"
            else scrambling.digit_permutations
        )
        if self.randomize is None:
            maps = torch.arange(base, device=out.device).expand(1, digits, base)
        else:
            maps = make(base, digits, fold(self.seed, PERMUTATION, j), self.copies, out.device)
        worth = maps * _powers(base, digits, out.device).unsqueeze(1)  # [copies, digits, base]
        low = min(digits, max(1, int(math.log(TABLE, base))))
        first, last = start // base**low, (start + out.shape[1] - 1) // base**low + 1
        ends = _sums(worth[:, :low], torch.arange(base**low, device=out.device), base)
        offsets = _sums(worth[:, low:], torch.arange(first, last, device=out.device), base)
        all_ = (offsets.unsqueeze(2) + ends.unsqueeze(1)).flatten(1)
        skipped = start - first * base**low
        return all_[:, skipped : skipped + out.shape[1]]

    def _lms(self, out: Tensor, start: int, base: int, digits: int, j: int) -> Tensor:
        """Products of matrices modulo the base in float64, which holds all sums here exactly."""
        used = digits_of(start + out.shape[1], base)
        matrix = scrambling.scrambling_matrices(
            base, digits, digits, fold(self.seed, MATRIX, j), self.copies, out.device
        )[..., : min(used, digits)].double()
        shift = below(base, words(fold(self.seed, SHIFT, j), (self.copies, 1, digits), out.device))
        index = torch.arange(start, start + out.shape[1], device=out.device)
        given = torch.stack([index // base**k % base for k in range(matrix.shape[2])], -1).double()
        made = (given @ matrix.mT + shift).remainder_(base)
        return (made * _powers(base, digits, out.device)).sum(-1)

    def _nus(self, out: Tensor, start: int, base: int, digits: int, j: int) -> Tensor:
        """By the tree where two of the first 2^32 points can differ; all digits below at random."""
        levels = min(digits, digits_of(self.max_points, base))
        roots = words(fold(self.seed, TREE, j), (self.copies, 1), out.device)
        index = torch.arange(start, start + out.shape[1], device=out.device)
        made = scrambling.nested_permutations(index, base, levels, roots)
        powers = _powers(base, digits, out.device)
        rest = below(base ** (digits - levels), step(mix(roots - 1), index))
        return (made * powers[:levels]).sum(-1) + rest


def digits_of(bound: int, base: int) -> int:
    """Digits that the numbers below `bound` have in a base, at least 1."""
    count, power = 1, base
    while power < bound:
        count, power = count + 1, power * base
    return count


@lru_cache
def primes(count: int) -> tuple[int, ...]:
    """The first primes, by Eratosthenes' sieve."""
    bound = 15 if count < 6 else int(count * (math.log(count) + math.log(math.log(count)))) + 1
    sieve = bytearray([1]) * (bound + 1)
    found = []
    for number in range(2, bound + 1):
        if sieve[number]:
            found.append(number)
            sieve[number * number :: number] = bytes(len(range(number * number, bound + 1, number)))
    return tuple(found[:count])


def _powers(base: int, digits: int, device: torch.device) -> Tensor:
    """What a digit is worth, first to last: base^(digits - 1) ... 1."""
    return torch.tensor([base ** (digits - 1 - k) for k in range(digits)], device=device)


def _sums(worth: Tensor, index: Tensor, base: int) -> Tensor:
    """`[copies, n]`: what the digits of indices bring, by a table `[copies, digits, base]`."""
    total = torch.zeros(worth.shape[0], len(index), dtype=torch.int64, device=index.device)
    for k in range(worth.shape[1]):
        if index[-1] < base**k:  # this digit and all after it are 0 for every index
            return total + worth[:, k:, :1].sum(1)
        total += worth[:, k, index // base**k % base]
    return total
