"""The native engine: C++ for CPUs, compiled on first use (see `tilewise.kernels.building`).

It executes a whole call: tile maps of any height, uneven tilings, permuted orders, boxes, bias and soft cap, in
float32, bfloat16 and float16. Products run in float32 or, where the machine multiplies it, in bfloat16; softmax and
sums are float32 always.
"""

from __future__ import annotations

import array
import math
import struct
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tilewise.kernels.attend_tiles import op
from tilewise.kernels.attend_tiles.call import Call
from tilewise.kernels.library import GRID, Library, grid
from tilewise.tiles import Partial

_HERE = Path(__file__).parent
SOURCES = [*sorted(_HERE.glob("native*.cpp")), _HERE.parent / "native.h", *sorted(_HERE.glob("native_*.h"))]
_GRIDS = 25
LIBRARY = Library("attention", SOURCES, ("tilewise_call_words", GRID * _GRIDS + 9))
# Queries of a kv head up to which decoding goes by loops, by dtype; `tilewise.attention.measure_flat` sets it anew.
STREAMED = {torch.float32: 2, torch.bfloat16: 2, torch.float16: 2}


def refuse(call: Call) -> str | None:
    """Why this engine cannot run the call."""
    if call.q.device.type != "cpu":
        return f"runs on CPUs, the call's tensors are on {call.q.device.type}"
    if call.v.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32 at most, the call is in {call.v.dtype}"
    if call.weights is not None:
        return f"does not round weights to {call.weights}"
    if call.bias is not None and call.bias.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes a bias in float32 at most, the call's is in {call.bias.dtype}"
    return unavailable()


def run(call: Call) -> Partial:
    """Attention over the kept tiles of `call`."""
    return op.run(call, "native")


def unavailable() -> str | None:
    """Why there is no native engine on this machine, or None; builds it the first time."""
    return LIBRARY.unavailable()


# What torch.compiler.assume_constant_result does, which would import the compiler with `import tilewise`.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def multiplies_bfloat16() -> bool:
    """Whether products run in bfloat16 on this machine; elsewhere bfloat16 is widened to float32 tile by tile."""
    return LIBRARY.asks("tilewise_bfloat16_products")


def multiplies_int8() -> bool:
    """Whether products of quantised queries and keys run in integers; elsewhere they are dequantised."""
    return LIBRARY.asks("tilewise_int8_products")


def _words(call: Call, **made: Tensor | None) -> array.array:
    """`Call` of native_call.h: every tensor of the call and of `made`, then sizes, threads and factors."""
    view, tiles = call.view, call.tiles
    keep = q_bounds = k_bounds = None
    q_size = k_size = 0
    if tiles is not None:
        keep, q_bounds, k_bounds = tiles.keep, tiles.q_tiling.bounds, tiles.k_tiling.bounds
        q_size, k_size = tiles.q_tiling.size, tiles.k_tiling.size
    tensors = [call.q, call.k, call.v, view.lo, view.hi, view.pos, view.dense, keep, q_bounds, k_bounds,
               call.q_order, call.k_order, call.bias]  # fmt: skip
    tensors += [made.get(x) for x in ("out", "lse", "d_out", "d_lse", "d_q", "d_k", "d_v", "d_bias")]
    tensors += [call.pages, call.q_scale, call.k_scale, call.lists]
    words = array.array("q")
    for x in tensors:
        words.extend(grid(x))
    threads = torch.get_num_threads()
    words.extend((q_size, k_size, threads, STREAMED[call.v.dtype], call.bias_rows, not call.need_lse))
    unified = math.nan if call.unified_max is None else call.unified_max
    words.extend(struct.unpack("3q", struct.pack("3d", call.scale, call.softcap or 0.0, unified)))
    return words


def forward(call: Call) -> Partial:
    """The operator's forward on this engine."""
    if call.q_scale is not None and not multiplies_int8():
        call, wanted = replace(call.dequantised(), v=call.v.float()), call.v.dtype
        out, lse = forward(call)
        return Partial(out.to(wanted), lse)
    b, heads, n_q, _ = call.q.shape
    out = call.v.new_empty(b, heads, n_q, call.v.shape[3])
    lse = call.v.new_empty(b, heads, n_q, dtype=torch.float32)
    if out.numel() or lse.numel():
        LIBRARY.call("tilewise_attend_forward", _words(call, out=out, lse=lse))
    return Partial(out, lse)


def backward(
    call: Call, result: Partial, d_out: Tensor, d_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and, where there is one, the bias."""
    call.refuse_gradients()
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (call.q, call.k, call.v))
    bias = call.bias
    d_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32)
    if call.q.numel() and call.k.numel():
        made = {"out": result.out, "lse": result.lse, "d_out": d_out.to(call.q.dtype), "d_lse": d_lse.float()}
        LIBRARY.call(
            "tilewise_attend_backward", _words(call, **made, d_q=d_q, d_k=d_k, d_v=d_v, d_bias=d_bias)
        )
    else:
        for gradient in (d_q, d_k, d_v):
            gradient.zero_()
    return d_q, d_k, d_v, None if d_bias is None or bias is None else d_bias.to(bias.dtype)


op.IMPLEMENTATIONS["native"] = op.Implementation(forward, backward)
