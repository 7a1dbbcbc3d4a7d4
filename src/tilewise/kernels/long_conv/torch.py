"""The torch engine: `torch.fft` over windows, any device and dtype, temporaries bounded.

It keeps its inputs alone for the backward pass, which computes transforms again; windows follow the kernel's
length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.kernels.long_conv import op
from tilewise.kernels.long_conv.call import Call
from tilewise.kernels.long_conv.plan import Plan, plan
from tilewise.kernels.long_conv.windows import Transform, backward, forward

FOURIER = Transform(
    torch.fft.rfft,
    lambda made, length: torch.fft.irfft(made, length),
    lambda counts: counts[: counts.shape[0] // 2 + 1],
)


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> Tensor:
    """Outputs of `call`."""
    return op.run(call, "torch")


def _plan(call: Call) -> Plan:
    # The shorter a transform, the larger the share of its rounding that each output gets.
    return plan(call, shortest=128, exact=lambda n: n > 0)


op.IMPLEMENTATIONS["torch"] = op.Implementation(
    lambda call: forward(call, _plan(call), FOURIER),
    lambda call, d_out, for_kernel: backward(call, _plan(call), FOURIER, d_out, for_kernel),
)
