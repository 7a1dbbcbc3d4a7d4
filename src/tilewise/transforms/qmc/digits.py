"""Coordinates as whole numbers of 52 binary digits, and random words made of a seed and a place alone.

A coordinate x in [0, 1) is kept as the integer x 2^52. float64 holds every such number exactly, so nothing
is rounded between a generator and the points that a user sees. Random words come from a hash of counters
rather than from a generator with a state: the same seed gives the same points on every device, from any
point on, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewise.kernels.digit_sums.digits import BITS

_GOLDEN, _A, _B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def from_unit(x: Tensor) -> Tensor:
    """The first 52 digits of points in [0, 1)."""
    return (x.double() * 2.0**BITS).long()


def reverse(x: Tensor, bits: int) -> Tensor:
    """The lowest `bits` binary digits of whole numbers, in reverse."""
    back = torch.zeros_like(x)
    for k in range(bits):
        back |= (x >> k & 1) << bits - 1 - k
    return back


def gray(x: Tensor) -> Tensor:
    """The binary-reflected Gray code of whole numbers: one and the next differ in one digit."""
    return x ^ (x >> 1)


def mix(x: Tensor) -> Tensor:
    """Words of 64 bits, stirred: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed(_A)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed(_B)
    return x ^ (x >> 31 & (1 << 33) - 1)


def fold(*parts: int) -> int:
    """One word made of numbers, by the same stirring."""
    state = 0
    for part in parts:
        state = state + _GOLDEN + part & _WORD
        state = (state ^ state >> 30) * _A & _WORD
        state = (state ^ state >> 27) * _B & _WORD
        state ^= state >> 31
    return _signed(state)


def words(key: int, shape: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Random words of 64 bits: SplitMix64's stream from `key` on, in a tensor of this shape."""
    size = 1
    for length in shape:
        size *= length
    count = torch.arange(1, size + 1, device=device)
    return mix(count * _signed(_GOLDEN) + key).reshape(tuple(shape))


def step(node: Tensor, choice: Tensor | int) -> Tensor:
    """The word of a child of each node of a tree of words."""
    moved = choice + 1
    if isinstance(moved, int):
        return mix(node + _signed(moved * _GOLDEN & _WORD))
    return mix(node + moved * _signed(_GOLDEN))


def below(bound: int, word: Tensor) -> Tensor:
    """Words as random numbers 0 .. bound - 1 (biased by less than bound 2^-63)."""
    return (word & (1 << 63) - 1) % bound


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
