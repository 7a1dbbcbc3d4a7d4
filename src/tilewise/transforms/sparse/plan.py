"""Which samples a sparse transform reads, and what its bins say about where a coefficient is."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from tilewise.transforms.sparse.binary import independent, inverse, random_rows, span, transposed


@dataclass(frozen=True, eq=False)
class Plan:
    """Samples and decoders for transforms of 2^n numbers, C groups of 2^b bins seen at P offsets.

    Group c reads the samples `M_c l + d` for all l of b bits and its offsets d; the transform over l of those
    at one offset puts coefficient k into bin `M_c^T k`, with sign (-1)^<d, k>. Signs at n - b offsets more
    and the bin are n equations for k. A decoder is such a set of offsets and the inverse of its equations;
    with noise every bin is read by several.

    Args:
        n, b: as above.
        positions: int64 `[C, P, 2^b]`, samples to read.
        hashes, offsets, chosen, decoders: as `kernels.peel_bins.Call` has them.
    """

    n: int
    b: int
    positions: Tensor
    hashes: Tensor
    offsets: Tensor
    chosen: Tensor
    decoders: Tensor

    @cached_property
    def samples(self) -> int:
        """Different samples that are read."""
        return int(self.positions.unique().numel())


@lru_cache(maxsize=16)
def make_plan(n: int, b: int, groups: int, offsets: int | None, decoders: int, seed: int) -> Plan:
    """A plan with random hashes and offsets; None is for the n - b + 1 offsets that suffice without noise."""
    source = random.Random(seed)
    made = [_group(n, b, offsets, decoders if offsets else 1, source) for _ in range(groups)]
    return Plan(n, b, *(torch.stack(parts) for parts in zip(*made)))


def _group(n: int, b: int, offsets: int | None, decoders: int, source: random.Random) -> tuple[Tensor, ...]:
    """One group's positions, hashes, offsets, chosen ones and decoders."""
    columns, sign = random_rows(b, n, source), 1 << n
    if offsets is None:
        units = [1 << i for i in range(n)]
        own = [0, *(units[i] for i in independent(columns, units, n))]
    else:
        own = []
        while len(independent(columns, own, n)) < n - b or not own:  # hardly ever twice, unless there are few
            own = [0, *(source.getrandbits(n) if n else 0 for _ in range(offsets - 1))]
    # An equation at an offset has the coefficient's own sign as one more unknown, bit n.
    equations, chosen, inverses = [sign | d for d in own], [], []
    for _ in range(decoders):
        order = list(range(len(own)))
        if decoders > 1:
            source.shuffle(order)
        taken = [order[i] for i in independent(columns, [equations[i] for i in order], n + 1)]
        chosen.append(taken)
        inverses.append(transposed(inverse([*columns, *(equations[i] for i in taken)])))
    samples = span(columns)
    positions = torch.stack([samples ^ d for d in own])
    return positions, *(torch.tensor(x, dtype=torch.int64) for x in (columns, own, chosen, inverses))
