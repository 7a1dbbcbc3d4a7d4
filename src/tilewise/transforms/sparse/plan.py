"""Which samples a sparse transform reads, and what its bins say about where a coefficient is."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tilewise.transforms.sparse.binary import bits_of, independent, inverse, random_rows, span


@dataclass(frozen=True, eq=False)
class Plan:
    """Samples and decoders for transforms of 2^n numbers, C groups of 2^b bins seen at P offsets.

    Group c reads the samples `M_c l + d` for all l of b bits and its offsets d; the transform over l of those at one
    offset puts coefficient k into bin `M_c^T k`, with sign (-1)^<d, k>. Signs at n - b offsets more and the bin are
    n equations for k. A decoder is such a set of offsets and the inverse of its equations; with noise every bin is
    read by several.

    Args:
        positions: int64 `[C, P, 2^b]`, samples to read.
        hashes, offsets: bits of M_c^T, float64 `[C, b, n]`, and of the offsets `[C, P, n]`.
        bins: bits of the bins' numbers, float64 `[b, 2^b]`.
        chosen: int64 `[C, T, n - b + 1]`, offsets of each decoder; the one more tells the coefficient's own sign.
        decoders: float64 `[C, T, n + 1, n + 1]`, from the bits of a bin and the signs at its offsets to those of k
            and its sign.
    """

    n: int
    b: int
    positions: Tensor
    hashes: Tensor
    offsets: Tensor
    bins: Tensor
    chosen: Tensor
    decoders: Tensor

    @property
    def samples(self) -> int:
        """Different samples that are read."""
        return int(self.positions.unique().numel())


@lru_cache(maxsize=16)
def make_plan(n: int, b: int, groups: int, offsets: int | None, decoders: int, seed: int) -> Plan:
    """A plan with random hashes. `offsets` random ones a group, or None for the n - b + 1 that suffice without noise."""
    source = random.Random(seed)
    made = [_group(n, b, offsets, decoders if offsets else 1, source) for _ in range(groups)]
    positions, hashes, own, chosen, inverses = (torch.stack(parts) for parts in zip(*made))
    at = torch.arange(1 << b)
    bins = torch.stack([at >> i & 1 for i in range(b)]).double() if b else torch.zeros(0, 1).double()
    return Plan(n, b, positions, hashes, own, bins, chosen, inverses)


def _group(n: int, b: int, offsets: int | None, decoders: int, source: random.Random) -> tuple[Tensor, ...]:
    """One group's positions, bits of its hash and offsets, and decoders."""
    columns, sign = random_rows(b, n, source), 1 << n
    if offsets is None:
        units = [1 << i for i in range(n)]
        own = [0, *(units[i] for i in independent(columns, units, n))]
    else:
        own = [0]
        while len(own) < offsets or len(independent(columns, own, n)) < n - b:
            own.append(source.getrandbits(n))
    # An equation at an offset has the coefficient's own sign as one more unknown, bit n.
    equations, chosen, inverses = [sign | d for d in own], [], []
    for _ in range(decoders):
        order = list(range(len(own)))
        if decoders > 1:
            source.shuffle(order)
        taken = [order[i] for i in independent(columns, [equations[i] for i in order], n + 1)]
        chosen.append(torch.tensor(taken))
        inverses.append(bits_of(inverse([*columns, *(equations[i] for i in taken)]), n + 1))
    samples = span(columns)
    positions = torch.stack([samples ^ d for d in own])
    return positions, bits_of(columns, n), bits_of(own, n), torch.stack(chosen), torch.stack(inverses)
