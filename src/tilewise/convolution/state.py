"""What a causal convolution carries from one call to the next."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tilewise.recurrence import Carried


@dataclass(frozen=True, eq=False)
class ConvState(Carried):
    """The past inputs that a kernel still reaches, for training, prefill and decoding alike.

    Attributes:
        inputs: `[S, C, K - 1]` of each of S sequences: gated inputs `gate_in * x`, the oldest first, 0 before
            the first token. float32, float64 for float64 inputs.
    """

    inputs: Tensor
