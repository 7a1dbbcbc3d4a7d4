"""The torch engine: Kronecker factors of at most 16 as matrix products, on any device and dtype.

Larger factors would be fewer passes, but a product of 64 terms, added up one after the other, errs more than twice as
much as sums and differences do.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tilewise.kernels.fwht import op
from tilewise.kernels.fwht.call import Call
from tilewise.kernels.fwht.orders import block

LARGEST = 16


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> Tensor:
    """`[rows, n]` in x's dtype."""
    return op.run(call, "torch")


def forward(call: Call) -> Tensor:
    """The operator on this engine."""
    made, wide = call.factors, call.wide
    x = call.x.to(wide).reshape(-1, made.power)
    width, scale = 1, call.scale
    while width < made.power:
        factor = min(LARGEST, made.power // width)
        matrix = scale * _hadamard(factor).to(device=x.device, dtype=wide)
        if width == 1:
            x = x.reshape(-1, factor) @ matrix
        else:
            x = matrix @ x.reshape(-1, factor, width)
        width, scale = width * factor, 1.0
    if made.order > 1:
        matrix = scale * block(made.order, made.kind).to(device=x.device, dtype=wide)
        x = x.reshape(-1, made.order) @ matrix if made.power == 1 else matrix @ x.reshape(-1, made.order, made.power)
        scale = 1.0
    if scale != 1.0:  # rows of one number
        x = scale * x
    # A new tensor even where nothing was done: an operator's result is never its input.
    return x.reshape(call.x.shape).to(call.x.dtype, copy=call.n == 1)


@lru_cache
def _hadamard(n: int) -> Tensor:
    """The Hadamard matrix of a power of two, float64."""
    two, matrix = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), torch.ones(1, 1).double()
    while len(matrix) < n:
        matrix = torch.kron(two, matrix)
    return matrix


op.IMPLEMENTATIONS["torch"] = forward
