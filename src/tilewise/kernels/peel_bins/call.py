"""What an engine of the peeling decoder receives and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """Bins of a sparse Walsh-Hadamard spectrum, to be explained by single coefficients.

    Group c puts coefficient X at place k (n bits) into bin `j`, whose bit i is the parity of `hashes[c, i] & k`, where
    it is seen at offset p as `X (-1)^parity(offsets[c, p] & k)`, plus noise. A decoder t of the group gives k from a
    bin: the exclusive or of `decoders[c, t, e]` over the equations e that are 1; the first b are the bits of j, the
    others say whether what is seen at the offsets `chosen[c, t]` is negative. Bit n of the result is the sign of X.

    In a round every bin with more than `allowed` in it (mean square over offsets) is decoded. The decoder whose place
    correlates best is taken; the coefficient is the mean over offsets with its signs taken off. It is alone if what it
    leaves of the bin is allowed and what it is itself is not. All that are alone in a round, by the mean over the
    groups in which they are, are then taken out of all groups. Rounds go on until one finds nothing.

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
    """Places int64 `[found]` in rising order, with values float64; whether all bins are allowed; rounds it took."""

    index: Tensor
    value: Tensor
    explained: bool
    rounds: int
