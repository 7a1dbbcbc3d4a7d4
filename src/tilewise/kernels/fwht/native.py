"""The native engine: C++ for CPUs, compiled on first use (see `tilewise.kernels.building`).

Sums and differences of 256 numbers (64 without AVX-512) are made in registers, then of 16 (8) parts at a time, in an
order that goes to the next larger cache last. Rows are spread over as many threads as PyTorch uses; where there are
fewer rows, parts and then columns of a row. float16 and bfloat16 are widened on reading and rounded on writing. The
block of a size that is not a power of two is PyTorch's product of matrices.
"""

from __future__ import annotations

import array
import struct
from pathlib import Path

import torch
from torch import Tensor

from tilewise.kernels.fwht import op
from tilewise.kernels.fwht.call import Call
from tilewise.kernels.fwht.orders import block
from tilewise.kernels.library import KernelLibrary

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 7}
LIBRARY = KernelLibrary("fwht", Path(__file__).parent, tensors=0, numbers=9)
SOURCES = LIBRARY.sources


def refuse(call: Call) -> str | None:
    """Why this engine cannot run the call."""
    if call.x.device.type != "cpu":
        return f"runs on CPUs, the call's tensors are on {call.x.device.type}"
    if call.x.dtype not in KINDS:
        return f"computes in float32 and float64, the call is in {call.x.dtype}"
    return unavailable()


def run(call: Call) -> Tensor:
    """`[rows, n]` in x's dtype."""
    return op.run(call, "native")


def unavailable() -> str | None:
    """Why there is no native engine on this machine, or None; builds it the first time."""
    return LIBRARY.unavailable()


# What torch.compiler.assume_constant_result does, which would import the compiler with `import tilewise`.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward(call: Call) -> Tensor:
    """The operator on this engine."""
    x, made = call.x, call.factors
    if x.stride(1) != 1 or (made.order > 1 and x.stride(0) != call.n):
        x = x.contiguous()
    if made.order == 1:
        return _transform(x, x.new_empty(call.x.shape), made.power, call.scale, len(x), x.stride(0))
    parts = _transform(
        x, x.new_empty(call.x.shape, dtype=call.wide), made.power, call.scale, len(x) * made.order, made.power
    )
    matrix = block(made.order, made.kind).to(call.wide)
    if made.power == 1:
        return (parts @ matrix).to(x.dtype)
    return (matrix @ parts.view(-1, made.order, made.power)).view(call.x.shape).to(x.dtype)


def _transform(x: Tensor, out: Tensor, n: int, scale: float, rows: int, stride: int) -> Tensor:
    """Write the transforms of `rows` rows of `n` numbers, `stride` apart in `x`, to `out`, where they are packed."""
    if rows:
        words = struct.pack(
            "qqqqqqqdq",
            x.data_ptr(), out.data_ptr(), KINDS[x.dtype], KINDS[out.dtype], rows, n, stride,
            scale, torch.get_num_threads(),
        )  # fmt: skip
        LIBRARY.call("tilewise_fwht_forward", array.array("q", words))
    return out


op.IMPLEMENTATIONS["native"] = forward
