"""The custom operators `tilewise::long_conv` and its backward, shared by all engines.

Being `torch.library` operators with fake and autograd registrations, they stay whole inside torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.kernels.long_conv.call import Call

Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Implementation(NamedTuple):
    """What an engine registers; both take a Call whose tensors need no gradient.

    `backward` also gets the outputs' gradient and whether that of the kernel is wanted, and gives those of x,
    kernel, gate_in, gate_out, skip and before, None for what is not there or not wanted.
    """

    forward: Callable[[Call], Tensor]
    backward: Callable[[Call, Tensor, bool], Gradients]


IMPLEMENTATIONS: dict[str, Implementation] = {}


def run(call: Call, engine: str) -> Tensor:
    """Run `call` on the registered engine through the custom operator."""
    return torch.ops.tilewise.long_conv(
        call.x, call.kernel, call.gate_in, call.gate_out, call.skip, call.before, call.transform, call.causal,
        call.rows, call.kept, call.band, engine,
    )  # fmt: skip


@torch.library.custom_op("tilewise::long_conv", mutates_args=())
def long_conv(
    x: Tensor, kernel: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, skip: Tensor | None,
    before: Tensor | None, transform: Tensor | None, causal: bool, rows: int, kept: Sequence[int],
    band: float, engine: str,
) -> Tensor:  # fmt: skip
    """`tilewise::long_conv`: outputs of the packed call on the named engine."""
    call = Call(x, kernel, gate_in, gate_out, skip, before, transform, causal, rows, tuple(kept), band)
    return IMPLEMENTATIONS[engine].forward(call)


@long_conv.register_fake
def _(x, kernel, gate_in, gate_out, skip, before, transform, causal, rows, kept, band, engine):
    return x.new_empty(x.shape)


@torch.library.custom_op("tilewise::long_conv_backward", mutates_args=())
def long_conv_backward(
    d_out: Tensor,
    x: Tensor, kernel: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, skip: Tensor | None,
    before: Tensor | None, causal: bool, rows: int, kept: Sequence[int], band: float, engine: str,
    for_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, kernel, gate_in, gate_out, skip and before; empty for those that are not there."""
    call = Call(x, kernel, gate_in, gate_out, skip, before, None, causal, rows, tuple(kept), band)
    d_x, *others = IMPLEMENTATIONS[engine].backward(call, d_out, for_kernel)
    d_kernel, d_gate_in, d_gate_out, d_skip, d_before = (
        x.new_empty(0) if gradient is None else gradient for gradient in others
    )
    return d_x, d_kernel, d_gate_in, d_gate_out, d_skip, d_before


@long_conv_backward.register_fake
def _(d_out, x, kernel, gate_in, gate_out, skip, before, causal, rows, kept, band, engine, for_kernel):
    given = (kernel if for_kernel else None, gate_in, gate_out, skip, before)
    others = (x.new_empty(0) if one is None else one.new_empty(one.shape) for one in given)
    return (x.new_empty(x.shape), *others)


def _setup_context(ctx, inputs, output) -> None:
    if inputs[6] is not None and ctx.needs_input_grad[1]:
        raise ValueError("a prepared kernel learns nothing: give the kernel itself where it needs a gradient")
    ctx.save_for_backward(*inputs[:6])
    ctx.rest = inputs[7:]


def _backward(ctx, d_out):
    given, for_kernel = ctx.saved_tensors, ctx.needs_input_grad[1]
    gradients = torch.ops.tilewise.long_conv_backward(d_out, *given, *ctx.rest, for_kernel)
    found = [None if one is None else gradient for one, gradient in zip(given, gradients)]
    if not for_kernel:
        found[1] = None
    return (*found, *[None] * 6)


long_conv.register_autograd(_backward, setup_context=_setup_context)
