"""The native engine: C++ for CPUs, compiled on first use (see `tilewise.kernels.building`).

Each sequence and head goes tile by tile with its state in the nearest caches, on as many threads as PyTorch uses;
short sequences, and so decoding, go token by token. Inputs are float32, bfloat16 or float16; products and sums are
float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tilewise.kernels.library import KernelLibrary, unsuited
from tilewise.kernels.scan import op
from tilewise.kernels.scan.call import Call

LIBRARY = KernelLibrary("scan", Path(__file__).parent, tensors=17, numbers=5)
SOURCES = LIBRARY.sources


def refuse(call: Call) -> str | None:
    """Why this engine cannot run the call."""
    return unsuited(call.q) or unavailable()


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Outputs and final states of `call`."""
    return op.run(call, "native")


def unavailable() -> str | None:
    """Why there is no native engine on this machine, or None; builds it the first time."""
    return LIBRARY.unavailable()


# What torch.compiler.assume_constant_result does, which would import the compiler with `import tilewise`.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _call_library(entry: str, call: Call, *made: Tensor | None) -> None:
    """Run an entry point on the call and the tensors `made` for it, in the order of native_call.h."""
    tensors = (call.q, call.k, call.v, call.decay, call.beta, call.state, call.offsets, *made)
    settings = (torch.get_num_threads(), int(call.rule == "delta"), int(call.by_channel), call.chunk or 0)
    LIBRARY.run(entry, tensors, *settings, float(call.scale))


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The operator's forward on this engine."""
    # Tokens that belong to no sequence get 0.
    out = (call.q.new_empty if call.offsets is None else call.q.new_zeros)(*call.q.shape[:3], call.v.shape[3])
    after = call.q.new_empty(call.state_shape(), dtype=torch.float32)
    if after.numel() or out.numel():
        _call_library("forward", call, out, after)
    return out, after


def backward(call: Call, d_out: Tensor, d_state: Tensor) -> op.Gradients:
    """Gradients of q, k, v, decay, beta and state."""
    given = (call.q, call.k, call.v, call.decay, call.beta)
    made = [
        None if x is None else (x.new_empty if call.offsets is None else x.new_zeros)(x.shape) for x in given
    ]
    d_first = None if call.state is None else call.state.new_empty(call.state.shape)
    if call.q.numel() or call.state is not None:
        _call_library("backward", call, None, None, d_out, d_state, *made, d_first)
    d_q, d_k, d_v, d_decay, d_beta = made
    return d_q, d_k, d_v, d_decay, d_beta, d_first  # type: ignore[return-value]


op.IMPLEMENTATIONS["native"] = op.Implementation(forward, backward)
