"""The native engine of the choice of keys: C++ for CPUs, compiled on first use (see `tilewise.kernels.building`).

Products run in float32, or in bfloat16 where queries and keys come in it and the machine multiplies it; sums over
heads and the choice are in float32.
"""

from __future__ import annotations

import array
import struct
from pathlib import Path

import torch
from torch import Tensor

from tilewise.kernels.choose_keys import op
from tilewise.kernels.choose_keys.call import Call
from tilewise.kernels.library import GRID, Library, grid

_HERE = Path(__file__).parent
SOURCES = [*sorted(_HERE.glob("native*.cpp")), _HERE.parent / "native.h", *sorted(_HERE.glob("native_*.h"))]
LIBRARY = Library("choice", SOURCES, ("tilewise_choice_words", GRID * 10 + 9))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuse(call: Call) -> str | None:
    """Why this engine cannot run the call."""
    if call.q.device.type != "cpu":
        return f"runs on CPUs, the call's tensors are on {call.q.device.type}"
    if call.q.dtype not in DTYPES:
        return f"computes in float32 at most, the call is in {call.q.dtype}"
    if call.k.shape[2] >= 2**31:
        return "names keys in 32 bits"
    return unavailable()


def run(call: Call) -> Tensor:
    """The keys of each query, int32 `[B, lists, N_q, W]`."""
    return op.run(call, "native")


def unavailable() -> str | None:
    """Why there is no native engine on this machine, or None; builds it the first time."""
    return LIBRARY.unavailable()


# What torch.compiler.assume_constant_result does, which would import the compiler with `import tilewise`.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward(call: Call) -> Tensor:
    """The operator on this engine."""
    out = torch.empty(call.shape, dtype=torch.int32)
    if not out.numel():
        return out
    view = call.view
    quantiles = None if call.most is None else _quantiles(call.top, call.sought)
    weight = None if call.weight is None else call.weight.float()
    tensors = [call.q, call.k, weight, view.lo, view.hi, view.pos, view.dense, call.among, quantiles, out]
    words = array.array("q")
    for x in tensors:
        words.extend(grid(x))
    words.extend((call.lists, call.block, call.covers, call.top, call.most or 0, call.ends, call.latest))
    words.append(torch.get_num_threads())
    words.extend(struct.unpack("q", struct.pack("d", call.slope)))
    LIBRARY.call("tilewise_choose_keys", words)
    return out


def scores_computed() -> int:
    """How many products of a query and a key this engine has computed since this was last asked."""
    return LIBRARY.number("tilewise_scores_computed")


def _quantiles(top: int, most: int) -> Tensor:
    """The quantile of the normal distribution above which `top` of n numbers are expected, for n up to `most`."""
    n = torch.arange(most + 1).clamp_(min=1).float()
    return torch.special.ndtri((1 - top / n).clamp_(min=0))


op.IMPLEMENTATIONS["native"] = forward
