"""Symmetric orthogonal matrices of small orders, and how a size is made of one of them and a power of two.

All blocks are symmetric, so that every transform made of them is its own transpose and, scaled, its own inverse.
Hadamard matrices are Paley's (1933); his first construction is made symmetric by reading the rows of its core
backwards. Where he has none of a size, the block is the Hartley matrix, cos + sin, which exists for every order and
whose entries are not all of one size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MOST_HADAMARD = 512  # largest block of Paley's that is taken: the work per number grows with it
MOST_ODD = 1024  # largest Hartley block


@dataclass(frozen=True)
class Factors:
    """A size as `order * power`: a block of that order, times the transform of a power of two.

    `kind` is "hadamard" (all entries of one size), "hartley", or "none" where the size is a power of two.
    """

    order: int
    power: int
    kind: str


@lru_cache(maxsize=1024)
def factors(n: int) -> Factors | None:
    """How a transform of `n` numbers is made, or None where its odd part is larger than MOST_ODD."""
    odd = n
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return Factors(1, n, "none")
    order = odd
    while n % order == 0 and order <= MOST_HADAMARD:
        if paley(order):
            return Factors(order, n // order, "hadamard")
        order *= 2
    return Factors(odd, n // odd, "hartley") if odd <= MOST_ODD else None


def nearest(n: int) -> list[int]:
    """The sizes next to `n`, below and above, that have factors; `n` itself where it has."""
    below, above = n, n
    while factors(below) is None:
        below -= 1
    while factors(above) is None:
        above += 1
    return sorted({below, above})


def paley(order: int) -> int:
    """1 or 2 for the construction of Paley's that has a matrix of this order, 0 where neither has."""
    if order % 4 == 0 and prime_power(order - 1):
        return 1
    if order % 4 == 0 and order // 2 % 4 == 2 and prime_power(order // 2 - 1):
        return 2
    return 0


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) where `q = p ** k` for a prime p, else None."""
    p = next((p for p in range(2, q + 1) if q % p == 0), 0)
    if not p:
        return None
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


@lru_cache(maxsize=64)
def block(order: int, kind: str) -> Tensor:
    """The symmetric block `[order, order]`, float64 on the CPU, whose square is `order` times the identity."""
    if kind == "hartley":
        at = torch.arange(order)
        angle = (at.unsqueeze(1) * at % order).double() * (2 * torch.pi / order)
        return angle.cos() + angle.sin()
    which = paley(order)
    if not which:
        raise ValueError(f"order must be one of a Paley matrix (12, 20, 28, ...), got {order}")
    if which == 1:
        core = -torch.eye(order - 1, dtype=torch.float64)
        backwards, character = _field(order - 1)
        core = (core + character)[backwards]
        return _bordered(core, 1.0)
    conference = _bordered(_field(order // 2 - 1)[1], 0.0)
    eye = torch.eye(order // 2, dtype=torch.float64)
    plus, turned = torch.tensor([[[1.0, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.float64)
    return torch.kron(conference, plus) + torch.kron(eye, turned)


def _bordered(core: Tensor, corner: float) -> Tensor:
    """`core` under a row and behind a column of ones."""
    whole = torch.ones(len(core) + 1, len(core) + 1, dtype=core.dtype)
    whole[0, 0], whole[1:, 1:] = corner, core
    return whole


def _field(q: int) -> tuple[Tensor, Tensor]:
    """For the field of q elements: the index of each element's negative, and the quadratic character of differences.

    Elements are polynomials over the integers modulo p, numbered by their coefficients. The character is 1 for
    even powers of a generator, -1 for odd ones and 0 for 0.
    """
    found = prime_power(q)
    if found is None:
        raise ValueError(f"q must be a power of a prime, got {q}")
    p, k = found
    places = p ** torch.arange(k)
    digits = torch.arange(q).unsqueeze(1) // places % p  # [q, k]
    character = torch.zeros(q, dtype=torch.float64)
    for i, power in enumerate(_powers(p, k)):
        character[sum(digit * p**place for place, digit in enumerate(power))] = 1 - 2 * (i % 2)
    differences = ((digits.unsqueeze(1) - digits) % p @ places).long()
    return ((-digits) % p @ places).long(), character[differences]


def _powers(p: int, k: int) -> list[tuple[int, ...]]:
    """The powers x^0 .. x^(q-2) of an element that generates all q - 1 = p^k - 1 nonzero ones.

    x is a root of a primitive polynomial, found by trying: `lowest` are the coefficients that x^k equals.
    """
    one = (1, *[0] * (k - 1))
    for number in range(1, p**k):
        lowest = [number // p**place % p for place in range(k)]
        powers, now = [one], _times_x(one, lowest, p)
        while now != one and any(now) and len(powers) < p**k:
            powers.append(now)
            now = _times_x(now, lowest, p)
        if len(powers) == p**k - 1 and now == one:
            return powers
    raise ArithmeticError(f"no generator of the field of {p}^{k} elements")


def _times_x(a: tuple[int, ...], lowest: list[int], p: int) -> tuple[int, ...]:
    return tuple((low + a[-1] * c) % p for low, c in zip((0, *a[:-1]), lowest))
