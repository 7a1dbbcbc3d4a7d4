"""What an engine of the Walsh-Hadamard transform receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.kernels.fwht.orders import Factors, factors


@dataclass(frozen=True, eq=False)
class Call:
    """Rows to be multiplied by a symmetric orthogonal matrix, `scale * (block kron H)`.

    H is the Hadamard matrix of a power of two in natural order, `H[i, j] = (-1)^popcount(i & j)`; `block` that of
    `orders` for what is left of the size.

    Args:
        x: `[rows, n]`, any strides, n >= 1 with `orders.factors(n)` not None.
        scale: multiplies the result; `n ** -0.5` makes the matrix orthonormal.
    """

    x: Tensor
    scale: float

    @property
    def n(self) -> int:
        """Numbers of a row."""
        return self.x.shape[1]

    @property
    def factors(self) -> Factors:
        """How the size is made up."""
        found = factors(self.n)
        if found is None:
            raise ValueError(f"no block for rows of {self.n} numbers")
        return found

    @property
    def wide(self) -> torch.dtype:
        """What sums are kept in."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32
