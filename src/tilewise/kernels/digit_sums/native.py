"""The native engine: C++ for CPUs, compiled on first use (see `tilewise.kernels.building`).

A table of the first points stays in the second-level cache; every further number is one load from it, the
join, and one store. Ranges of points are spread over as many threads as PyTorch uses.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tilewise.kernels.digit_sums import op
from tilewise.kernels.digit_sums.call import Call
from tilewise.kernels.digit_sums.memory import empty
from tilewise.kernels.library import KernelLibrary

KINDS = {torch.int64: 0, torch.float64: 1, torch.float32: 2}
LIBRARY = KernelLibrary("digit_sums", Path(__file__).parent, tensors=0, numbers=12)
SOURCES = LIBRARY.sources


def refuse(call: Call) -> str | None:
    """Why this engine cannot run the call."""
    if call.shift.device.type != "cpu":
        return f"runs on CPUs, the call's tensors are on {call.shift.device.type}"
    return unavailable()


def run(call: Call) -> Tensor:
    """`[copies, n, d]` of the call's dtype."""
    return op.run(call, "native")


def unavailable() -> str | None:
    """Why there is no native engine on this machine, or None; builds it the first time."""
    return LIBRARY.unavailable()


# What torch.compiler.assume_constant_result does, which would import the compiler with `import tilewise`.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward(call: Call) -> Tensor:
    """The operator on this engine."""
    copies, n, d = call.shape
    out = empty(call.shape, call.dtype, call.shift.device)
    if out.numel():
        # Columns of one bit lie side by side.
        columns, shift = call.columns.mT.contiguous(), call.shift.contiguous()
        LIBRARY.run(
            "points", (),
            columns.data_ptr(), shift.data_ptr(), out.data_ptr(), copies, columns.shape[0], d, columns.shape[1],
            call.start, n, int(call.add), KINDS[call.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return out


op.IMPLEMENTATIONS["native"] = forward
