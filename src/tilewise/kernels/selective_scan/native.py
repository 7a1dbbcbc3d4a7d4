"""The native engine: C++ for CPUs, compiled on first use (see `tilewise.kernels.building`).

Channels are worked on as many at a time as a register has lanes, their states in registers over a tile of tokens. A
block of channels goes through its sequence tile by tile, blocks and sequences on as many threads as PyTorch uses.
The backward pass keeps the states between tiles and computes those within again. Inputs are float32, bfloat16 or
float16; states and sums are float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tilewise.kernels.library import KernelLibrary, unsuited
from tilewise.kernels.selective_scan import op
from tilewise.kernels.selective_scan.call import Call

LIBRARY = KernelLibrary("selective_scan", Path(__file__).parent, tensors=19, numbers=1)
SOURCES = LIBRARY.sources


def refuse(call: Call) -> str | None:
    """Why this engine cannot run the call."""
    return unsuited(call.x) or unavailable()


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Outputs and final states of `call`."""
    return op.run(call, "native")


def unavailable() -> str | None:
    """Why there is no native engine on this machine, or None; builds it the first time."""
    return LIBRARY.unavailable()


# What torch.compiler.assume_constant_result does, which would import the compiler with `import tilewise`.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _given(call: Call) -> list[Tensor | None]:
    return [call.x, call.delta, call.A, call.B, call.C, call.D, call.state, call.offsets]


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The operator's forward on this engine."""
    # Tokens that belong to no sequence get 0.
    out = (call.x.new_empty if call.offsets is None else call.x.new_zeros)(call.x.shape)
    after = call.x.new_empty(call.state_shape(), dtype=torch.float32)
    if after.numel() or out.numel():
        LIBRARY.run("forward", [*_given(call), out, after], torch.get_num_threads())
    return out, after


def backward(call: Call, d_out: Tensor, d_state: Tensor) -> op.Gradients:
    """Gradients of x, delta, A, B, C, D and state."""
    d_x, d_delta, d_B, d_C = (
        (one.new_empty if call.offsets is None else one.new_zeros)(one.shape)
        for one in (call.x, call.delta, call.B, call.C)
    )
    d_A, d_D, d_first = (
        None if one is None else one.new_empty(one.shape) for one in (call.A, call.D, call.state)
    )
    made = (d_x, d_delta, d_A, d_B, d_C, d_D, d_first)
    LIBRARY.run("backward", [*_given(call), None, None, d_out, d_state, *made], torch.get_num_threads())
    return made  # type: ignore[return-value]


op.IMPLEMENTATIONS["native"] = op.Implementation(forward, backward)
