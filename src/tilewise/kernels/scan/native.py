"""The native engine: C++ for CPUs, compiled on first use (see `tilewise.kernels.building`).

Each sequence and head goes tile by tile with its state in the nearest caches, on as many threads as PyTorch uses;
short sequences, and so decoding, go token by token. Inputs are float32, bfloat16 or float16; products and sums are
float32.
"""

from __future__ import annotations

import array
import ctypes
import struct
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tilewise.kernels import building
from tilewise.kernels.scan import op
from tilewise.kernels.scan.call import Call

_HERE = Path(__file__).parent
SOURCES = [*sorted(_HERE.glob("native*.cpp")), _HERE.parent / "native.h", *sorted(_HERE.glob("native_*.h"))]
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: 3}
_ABSENT = [0] * 10
_GRIDS = 17


def refuse(call: Call) -> str | None:
    """Why this engine cannot run the call."""
    if call.q.device.type != "cpu":
        return f"runs on CPUs, the call's tensors are on {call.q.device.type}"
    if call.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32, the call is in {call.q.dtype}"
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
        library = building.load("scan", SOURCES)
    except building.BuildFailed as reason:
        warnings.warn(f"tilewise runs without its native engine: {reason}", stacklevel=2)
        return str(reason)
    if library.tilewise_scan_words() != len(_ABSENT) * _GRIDS + 5:
        return "the compiled library and this version of Tilewise disagree"  # a wrong build would crash
    return library


def _grid(x: Tensor | None) -> list[int]:
    """A tensor of up to four axes as the library reads it."""
    if x is None:
        return _ABSENT
    missing = 4 - x.ndim
    return [x.data_ptr(), _KINDS[x.dtype], *x.shape, *[1] * missing, *x.stride(), *[0] * missing]


def _call_library(entry: str, call: Call, *made: Tensor | None) -> None:
    """Run an entry point on the call and the tensors `made` for it; RuntimeError with its message if it fails."""
    words = array.array("q")
    for x in (call.q, call.k, call.v, call.decay, call.beta, call.state, call.offsets, *made):
        words.extend(_grid(x))
    words.extend(_ABSENT * (_GRIDS - len(words) // len(_ABSENT)))
    words.extend((torch.get_num_threads(), call.rule == "delta", call.by_channel, call.chunk or 0))
    words.extend(struct.unpack("q", struct.pack("d", call.scale)))
    message = ctypes.create_string_buffer(200)
    address, _ = words.buffer_info()
    if getattr(_library(), entry)(ctypes.c_void_p(address), message, ctypes.c_int64(len(message))):
        raise RuntimeError(f"the native engine failed: {message.value.decode(errors='replace')}")


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The operator's forward on this engine."""
    # Tokens that belong to no sequence get 0.
    out = (call.q.new_empty if call.offsets is None else call.q.new_zeros)(*call.q.shape[:3], call.v.shape[3])
    after = call.q.new_empty(call.state_shape(), dtype=torch.float32)
    if after.numel() or out.numel():
        _call_library("tilewise_scan_forward", call, out, after)
    return out, after


def backward(call: Call, d_out: Tensor, d_state: Tensor) -> op.Gradients:
    """Gradients of q, k, v, decay, beta and state."""
    given = (call.q, call.k, call.v, call.decay, call.beta)
    made = [
        None if x is None else (x.new_empty if call.offsets is None else x.new_zeros)(x.shape) for x in given
    ]
    d_first = None if call.state is None else call.state.new_empty(call.state.shape)
    if call.q.numel() or call.state is not None:
        _call_library("tilewise_scan_backward", call, None, None, d_out, d_state, *made, d_first)
    d_q, d_k, d_v, d_decay, d_beta = made
    return d_q, d_k, d_v, d_decay, d_beta, d_first  # type: ignore[return-value]


op.IMPLEMENTATIONS["native"] = op.Implementation(forward, backward)
