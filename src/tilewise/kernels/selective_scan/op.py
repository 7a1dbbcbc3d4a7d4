"""The custom operators `tilewise::selective_scan` and its backward, shared by all engines.

Being `torch.library` operators with fake and autograd registrations, they stay whole inside torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.kernels.selective_scan.call import Call

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class Implementation(NamedTuple):
    """What an engine registers; both take a Call whose tensors need no gradient.

    `backward` gets the gradients of the outputs and of the final states, and gives those of x, delta, A, B, C, D
    and state, None for those that the call has not.
    """

    forward: Callable[[Call], tuple[Tensor, Tensor]]
    backward: Callable[[Call, Tensor, Tensor], Gradients]


IMPLEMENTATIONS: dict[str, Implementation] = {}


def run(call: Call, engine: str) -> tuple[Tensor, Tensor]:
    """Run `call` on the registered engine through the custom operator."""
    return torch.ops.tilewise.selective_scan(
        call.x, call.delta, call.A, call.B, call.C, call.D, call.state, call.offsets, engine
    )


@torch.library.custom_op("tilewise::selective_scan", mutates_args=())
def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None,
    offsets: Tensor | None, engine: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`tilewise::selective_scan`: outputs and final states of the packed call on the named engine."""
    return IMPLEMENTATIONS[engine].forward(Call(x, delta, A, B, C, D, state, offsets))


@selective_scan.register_fake
def _(x, delta, A, B, C, D, state, offsets, engine):
    call = Call(x, delta, A, B, C, D, state, offsets)
    return x.new_empty(x.shape), x.new_empty(call.state_shape(), dtype=call.wide)


@torch.library.custom_op("tilewise::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    d_out: Tensor, d_state: Tensor,
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None,
    offsets: Tensor | None, engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, delta, A, B, C, D and state; empty for those that are not there."""
    call = Call(x, delta, A, B, C, D, state, offsets)
    *given, d_D, d_first = IMPLEMENTATIONS[engine].backward(call, d_out, d_state)
    d_x, d_delta, d_A, d_B, d_C = given
    d_D, d_first = (x.new_empty(0) if gradient is None else gradient for gradient in (d_D, d_first))
    return d_x, d_delta, d_A, d_B, d_C, d_D, d_first


@selective_scan_backward.register_fake
def _(d_out, d_state, x, delta, A, B, C, D, state, offsets, engine):
    given = [one.new_empty(one.shape) for one in (x, delta, A, B, C)]
    return (*given, *(x.new_empty(0) if one is None else one.new_empty(one.shape) for one in (D, state)))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.engine = inputs[8]


def _backward(ctx, d_out, d_state):
    gradients = torch.ops.tilewise.selective_scan_backward(d_out, d_state, *ctx.saved_tensors, ctx.engine)
    found = [None if one is None else gradient for one, gradient in zip(ctx.saved_tensors, gradients)]
    return (*found, None, None)


selective_scan.register_autograd(_backward, setup_context=_setup_context)
