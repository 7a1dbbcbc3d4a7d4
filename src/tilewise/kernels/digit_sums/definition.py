"""The meaning: every bit of the index in turn, every point on its own."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.kernels.digit_sums.call import Call
from tilewise.kernels.digit_sums.digits import MASK, to_unit


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> Tensor:
    """`[copies, n, d]` of the call's dtype."""
    index = torch.arange(call.start, call.start + call.n, device=call.shift.device)[:, None]
    total = call.shift.unsqueeze(1).repeat(1, call.n, 1)
    for k in range(call.columns.shape[2]):
        brought = (index >> k & 1) * call.columns[:, None, :, k]
        total = total + brought & MASK if call.add else total ^ brought
    return total if call.dtype == torch.int64 else to_unit(total, call.dtype)
