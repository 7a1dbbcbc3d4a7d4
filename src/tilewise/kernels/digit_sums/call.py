"""What an engine of sums of digits receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """Points start .. start + n - 1: point i joins a shift and the columns of the bits that are set in i.

    Args:
        columns: int64 `[copies or 1, d, m]` of 52 digits, column k what bit k of the index brings; any
            strides; `start + n <= 2^m`.
        shift: int64 `[copies, d]` of 52 digits, what point 0 is.
        start, n: which points.
        add: join by addition modulo 2^52 (lattices) instead of exclusive or (digital nets).
        dtype: int64 for the digits, float64 or float32 for the points in [0, 1).
    """

    columns: Tensor
    shift: Tensor
    start: int
    n: int
    add: bool
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the result, `(copies, n, d)`."""
        return self.shift.shape[0], self.n, self.shift.shape[1]
