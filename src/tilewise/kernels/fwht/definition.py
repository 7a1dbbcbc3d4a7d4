"""The meaning of the transform: sums and differences of halves, and the block as it is, in the call's own format."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.kernels.fwht.call import Call
from tilewise.kernels.fwht.orders import block


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> Tensor:
    """`[rows, n]` in x's dtype: `scale * x (block kron H)`."""
    made = call.factors
    x = call.x.reshape(-1, made.order, made.power)
    width = 1
    while width < made.power:
        first, second = x.unflatten(2, (-1, 2, width)).unbind(3)
        x = torch.stack((first + second, first - second), 3).flatten(2)
        width *= 2
    if made.order > 1:
        x = block(made.order, made.kind).to(x) @ x
    return call.scale * x.reshape(call.x.shape)
