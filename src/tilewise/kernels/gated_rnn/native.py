"""The native engine: C++ for CPUs, compiled on first use (see `tilewise.kernels.building`).

R is packed once and stays in the caches for a whole sequence. Heads and blocks of sequences go to threads;
where these are too few, threads share a block, each with units of its own (`tiling` chooses). Inputs are
float32, bfloat16 or float16; products and sums are float32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tilewise.kernels.gated_rnn import op, tiling
from tilewise.kernels.gated_rnn.call import KINDS, Call
from tilewise.kernels.library import KernelLibrary, unsuited

LIBRARY = KernelLibrary("gated_rnn", Path(__file__).parent, tensors=15, numbers=7)
SOURCES = LIBRARY.sources
_NETWORKS = {kind: number for number, kind in enumerate(KINDS)}


def refuse(call: Call) -> str | None:
    """Why this engine cannot run the call."""
    return unsuited(call.wx) or unavailable()


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Outputs and final states of `call`."""
    return op.run(call, "native")


def unavailable() -> str | None:
    """Why there is no native engine on this machine, or None; builds it the first time."""
    return LIBRARY.unavailable()


# What torch.compiler.assume_constant_result does, which would import the compiler with `import tilewise`.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _rows(x: Tensor | None) -> Tensor | None:
    """The same numbers with those of the last axis beside one another, as the library takes them."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _four(x: Tensor | None) -> Tensor | None:
    """The first four of five axes, in the same memory; the library knows how long the fifth is."""
    return x if x is None or x.ndim < 5 else x.select(4, 0)


def _run(entry: str, call: Call, *made: Tensor | None) -> None:
    """Run an entry point on the call and the tensors `made` for it."""
    given = (_rows(call.wx), call.R, _rows(call.bias), _rows(call.state), call.mask, call.offsets)
    whole = [*given, *(_rows(x) for x in made)]  # copies live until the call is over
    heads, width, threads = call.wx.shape[1], call.wx.shape[4], torch.get_num_threads()
    size = 2 if call.wx.dtype == torch.bfloat16 else 4
    cut = tiling.tile_sizes(call.sequences, heads, KINDS[call.kind].gates, width, threads, size)
    sizes = (_NETWORKS[call.kind], width, threads, cut.rows, cut.team, cut.parts, cut.depth)
    LIBRARY.run(entry, [_four(x) for x in whole], *sizes)


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's forward on this engine."""
    out = call.new_out()
    if call.offsets is not None:
        out.zero_()  # tokens that belong to no sequence
    after = call.wx.new_empty(call.state_shape(), dtype=torch.float32)
    kept = call.wx.new_empty(call.kept_shape(), dtype=torch.float32)
    if after.numel() or out.numel():
        _run("forward", call, out, after, kept if call.keep else None)
    return out, after, kept


def backward(call: Call, kept: Tensor, d_out: Tensor | None, d_after: Tensor | None) -> op.Gradients:
    """The operator's backward on this engine."""
    d_wx, d_R = op.new_gradient(call.wx), call.R.new_empty(call.R.shape)
    if call.offsets is not None:
        d_wx.zero_()
    d_bias, d_state = (None if x is None else x.new_empty(x.shape) for x in (call.bias, call.state))
    sized = replace(call, wx=d_wx)  # the call's own wx has no content and no strides
    _run("backward", sized, None, None, kept, d_out, d_after, d_wx, d_R, d_bias, d_state)
    return d_wx, d_R, d_bias, d_state


op.IMPLEMENTATIONS["native"] = op.Implementation(forward, backward)
