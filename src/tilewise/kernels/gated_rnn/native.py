"""The native engine: C++ for CPUs, compiled on first use (see `tilewise.kernels.building`).

R is packed once and stays in the caches for a whole sequence. Heads and blocks of sequences go to threads; where
these are too few, threads share a block, each with units of its own (`tiling` chooses). Inputs are float32,
bfloat16 or float16; products and sums are float32.
"""

from __future__ import annotations

import array
import ctypes
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tilewise.kernels import building
from tilewise.kernels.gated_rnn import op, tiling
from tilewise.kernels.gated_rnn.call import KINDS, Call

_HERE = Path(__file__).parent
SOURCES = [*sorted(_HERE.glob("native*.cpp")), _HERE.parent / "native.h", *sorted(_HERE.glob("native_*.h"))]
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: 3, torch.bool: 4}
_NETWORKS = {kind: number for number, kind in enumerate(KINDS)}
_ABSENT = [0] * 10
_GRIDS = 15


def refuse(call: Call) -> str | None:
    """Why this engine cannot run the call."""
    if call.wx.device.type != "cpu":
        return f"runs on CPUs, the call's tensors are on {call.wx.device.type}"
    if call.wx.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32, the call is in {call.wx.dtype}"
    return unavailable()


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Outputs and final states of `call`."""
    return op.run(call, "native")


def unavailable() -> str | None:
    """Why there is no native engine on this machine, or None; builds it the first time."""
    found = _library()
    return found if isinstance(found, str) else None


# What torch.compiler.assume_constant_result does, which would import the compiler with `import tilewise`.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _library() -> ctypes.CDLL | str:
    """The compiled library, or why there is none, which is also said once as a warning."""
    try:
        library = building.load("gated_rnn", SOURCES)
    except building.BuildFailed as reason:
        warnings.warn(f"tilewise runs without its native engine: {reason}", stacklevel=2)
        return str(reason)
    if library.tilewise_gated_rnn_words() != len(_ABSENT) * _GRIDS + 7:
        return "the compiled library and this version of Tilewise disagree"  # a wrong build would crash
    return library


def _grid(x: Tensor | None) -> list[int]:
    """A tensor as the library reads it: its first four axes."""
    if x is None:
        return _ABSENT
    missing = 4 - x.ndim
    shape, strides = x.shape[:4], x.stride()[:4]
    return [x.data_ptr(), _FORMATS[x.dtype], *shape, *[1] * missing, *strides, *[0] * missing]


def _unit(x: Tensor | None) -> Tensor | None:
    """The same numbers with those of the last axis beside one another."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _call_library(entry: str, call: Call, *made: Tensor | None) -> None:
    """Run an entry point on the call and the tensors `made` for it; RuntimeError with its message if it fails."""
    units = [_unit(x) for x in (call.wx, call.bias, call.state, *made)]  # copies live until the call is over
    words = array.array("q")
    for x in (units[0], call.R, *units[1:3], call.mask, call.offsets, *units[3:]):
        words.extend(_grid(x))
    words.extend(_ABSENT * (_GRIDS - len(words) // len(_ABSENT)))
    tiles = tiling.tile_sizes(
        call.sequences, call.wx.shape[1], KINDS[call.kind].gates, call.wx.shape[4], torch.get_num_threads(),
        2 if call.wx.dtype == torch.bfloat16 else 4,
    )  # fmt: skip
    words.extend((_NETWORKS[call.kind], call.wx.shape[4], torch.get_num_threads()))
    words.extend((tiles.rows, tiles.team, tiles.parts, tiles.depth))
    message = ctypes.create_string_buffer(200)
    address, _ = words.buffer_info()
    if getattr(_library(), entry)(ctypes.c_void_p(address), message, ctypes.c_int64(len(message))):
        raise RuntimeError(f"the native engine failed: {message.value.decode(errors='replace')}")


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's forward on this engine."""
    out = call.new_out()
    if call.offsets is not None:
        out.zero_()  # tokens that belong to no sequence
    after = call.wx.new_empty(call.state_shape(), dtype=torch.float32)
    kept = call.wx.new_empty(call.kept_shape(), dtype=torch.float32)
    if after.numel() or out.numel():
        _call_library("tilewise_gated_rnn_forward", call, out, after, kept if call.keep else None)
    return out, after, kept


def backward(call: Call, kept: Tensor, d_out: Tensor | None, d_after: Tensor | None) -> op.Gradients:
    """The operator's backward on this engine."""
    d_wx, d_R = op.new_gradient(call.wx), call.R.new_empty(call.R.shape)
    if call.offsets is not None:
        d_wx.zero_()
    d_bias = None if call.bias is None else call.bias.new_empty(call.bias.shape)
    d_state = None if call.state is None else call.state.new_empty(call.state.shape)
    _call_library(
        "tilewise_gated_rnn_backward", call, None, None, kept, d_out, d_after, d_wx, d_R, d_bias, d_state
    )
    return d_wx, d_R, d_bias, d_state


op.IMPLEMENTATIONS["native"] = op.Implementation(forward, backward)
