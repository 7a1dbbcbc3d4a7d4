"""Coordinates as whole numbers of 52 binary digits."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 52
MASK = (1 << BITS) - 1
ONE = 0x3FF << BITS  # the bits of 1.0 in float64; set above 52 digits x they make the number 1 + x 2^-52


def to_unit(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The points `x 2^-52` of whole numbers of 52 digits; float32 keeps 24, so 1 is never reached."""
    if dtype == torch.float64:
        return (x | ONE).view(torch.float64) - 1
    return (x >> BITS - 24).to(dtype) * 2.0**-24
