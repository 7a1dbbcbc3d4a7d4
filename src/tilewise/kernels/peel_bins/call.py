"""What an engine of the peeling decoder receives and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """Bins of a sparse Walsh-Hadamard spectrum, to be explained by single coefficients.

    Group c puts coefficient X at place k (n bits) into bin `j`, whose bit i is the parity of `hashes[c, i] &
    k`, where it is seen at offset p as `X (-1)^parity(offsets[c, p] & k)`, plus noise. A decoder t of the
    group gives k from a bin: the exclusive or of `decoders[c, t, e]` over the equations e that are 1; the
    first b are the bits of j, the others say whether what is seen at the offsets `chosen[c, t]` is negative.
    Bit n of the result is the sign of X.

    In a round every bin with more than `allowed` in it (mean square over offsets) is decoded. With a decoder's
    place the coefficient is the mean v over offsets with its signs taken off; it is alone if what it leaves of the
    bin is allowed, and `P v^2 > 12 allowed`, some five deviations of a mean of noise. The first decoder that finds one
    alone is believed. All that are found in a round, each as the mean of what the groups say in which it is, are then
    taken out of all groups. Rounds go on until one finds nothing. A place whose values have added up to less than
    that, which was found by mistake and taken back, is left out.

    Args:
        left: what is seen, float64 `[C, P, B]`, B = 2^b. hashes: int64 `[C, b]`. offsets: int64 `[C, P]`.
        chosen: int64 `[C, T, n - b + 1]`. decoders: int64 `[C, T, n + 1]`.
        n: bits of a place, at most 61. allowed: as above. rounds: at most so many.
    """

    left: Tensor
    hashes: Tensor
    offsets: Tensor
    chosen: Tensor
    decoders: Tensor
    n: int
    allowed: float
    rounds: int


class Peeled(NamedTuple):
    """Places int64 `[found]`, rising, and values float64; whether all bins are allowed; rounds it took."""

    index: Tensor
    value: Tensor
    explained: bool
    rounds: int
