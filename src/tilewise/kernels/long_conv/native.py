"""The native engine: C++ for CPUs, compiled on first use (see `tilewise.kernels.building`).

A channel at a time: its kernel is transformed once, then two windows of inputs at a time, as the real and
imaginary parts of one row, are gated, transformed, multiplied, transformed back, and written with skip and
gate in one go. No transform is ever put in order, and blocks of frequencies that do not count are not
computed. Short kernels and short sequences are summed directly. Inputs are float32, bfloat16 or float16;
everything is computed in float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tilewise.kernels.library import KernelLibrary, unsuited
from tilewise.kernels.long_conv import op
from tilewise.kernels.long_conv.call import Call
from tilewise.kernels.long_conv.plan import Plan, plan

LIBRARY = KernelLibrary("long_conv", Path(__file__).parent, tensors=16, numbers=7)
SOURCES = LIBRARY.sources
LONGEST = 1 << 24  # of a transform: beyond, single precision of its factors begins to tell
# A product of a tap costs as much as so many of a number's stages (one AVX-512 machine).
DIRECT = 0.25


def refuse(call: Call) -> str | None:
    """Why this engine cannot run the call."""
    if reason := unsuited(call.x) or unavailable():
        return reason
    n = call.x.shape[2]
    if call.sparse and not _exact(n):
        return f"leaves out frequencies of powers of 2 from {_leaf()} on, the length is {n}"
    if n + call.kernel.shape[1] > LONGEST:
        return f"transforms up to {LONGEST} numbers, the call has {n} and {call.kernel.shape[1]} taps"
    return None


def run(call: Call) -> Tensor:
    """Outputs of `call`."""
    return op.run(call, "native")


def unavailable() -> str | None:
    """Why there is no native engine on this machine, or None; builds it the first time."""
    return LIBRARY.unavailable()


# What torch.compiler.assume_constant_result does, which would import the compiler with `import tilewise`.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _leaf() -> int:
    """The shortest transform."""
    return LIBRARY.number("tilewise_long_conv_leaf")


_leaf._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _exact(n: int) -> bool:
    return n >= _leaf() and n & (n - 1) == 0


def cut(call: Call) -> Plan:
    """How the call is cut; a prepared kernel brings the length of its transform."""
    length = None if call.transform is None else call.transform.shape[2]
    return plan(call, shortest=_leaf(), exact=_exact, direct=DIRECT, rows=2, length=length)


def prepare(call: Call) -> Tensor:
    """The transforms of the call's kernels, `[C, 2, L]`, for later calls like it."""
    made = plan(call, shortest=_leaf(), exact=_exact, rows=2)
    transform = call.kernel.new_empty(call.kernel.shape[0], 2, made.length)
    LIBRARY.run("prepare", [call.x, call.kernel, *[None] * 4, transform, _kept(call)], *_numbers(call, made))
    return transform


def _kept(call: Call) -> Tensor | None:
    if not call.sparse:
        return None
    kept = torch.zeros(call.rows, dtype=torch.bool)
    kept[list(call.kept)] = True
    return kept


def _given(call: Call) -> list[Tensor | None]:
    x, gate_in, gate_out = (
        one if one is None or one.stride(2) == 1 else one.contiguous()
        for one in (call.x, call.gate_in, call.gate_out)
    )
    return [x, call.kernel, gate_in, gate_out, call.skip, call.before, call.transform, _kept(call)]


def _numbers(call: Call, made: Plan) -> tuple[int, ...]:
    circular = int(not call.causal)
    return made.length, made.lead, made.step, made.taps, circular, call.cut(), torch.get_num_threads()


def forward(call: Call) -> Tensor:
    """The operator's forward on this engine."""
    # A row of its own for each: views of x with time in the middle are put in order once.
    out = call.x.new_empty(call.x.shape)
    if out.numel():
        LIBRARY.run("forward", [*_given(call), out], *_numbers(call, cut(call)))
    return out


def backward(call: Call, d_out: Tensor, for_kernel: bool) -> op.Gradients:
    """Gradients of x, kernel, gate_in, gate_out, skip and before."""

    def fresh(one: Tensor | None) -> Tensor | None:
        if one is None:
            return None
        return one.new_empty(one.shape) if call.x.numel() else one.new_zeros(one.shape)

    d_x, d_kernel, d_gate_in, d_gate_out, d_skip, d_before = map(
        fresh,
        (call.x, call.kernel if for_kernel else None, call.gate_in, call.gate_out, call.skip, call.before),
    )
    made = (d_x, d_kernel, d_gate_in, d_gate_out, d_skip, d_before)
    if call.x.numel():
        d_out = d_out if d_out.stride(2) == 1 else d_out.contiguous()
        LIBRARY.run("backward", [*_given(call), None, d_out, *made], *_numbers(call, cut(call)))
    return made  # type: ignore[return-value]


op.IMPLEMENTATIONS["native"] = op.Implementation(forward, backward)
