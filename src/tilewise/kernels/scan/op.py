"""The custom operators `tilewise::scan` and its backward, shared by all engines.

Being `torch.library` operators with fake and autograd registrations, they stay whole inside torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.kernels.scan.call import Call

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class Implementation(NamedTuple):
    """What an engine registers; both take a Call whose tensors need no gradient.

    `backward` gets the gradients of the outputs and of the final states, and gives those of q, k, v, decay, beta
    and state, None for those that the call has not.
    """

    forward: Callable[[Call], tuple[Tensor, Tensor]]
    backward: Callable[[Call, Tensor, Tensor], Gradients]


IMPLEMENTATIONS: dict[str, Implementation] = {}
_TENSORS = ("q", "k", "v", "decay", "beta", "state")


def run(call: Call, engine: str) -> tuple[Tensor, Tensor]:
    """Run `call` on the registered engine through the custom operator."""
    return torch.ops.tilewise.scan(
        call.q, call.k, call.v, call.decay, call.beta, call.state, call.offsets, call.rule, float(call.scale),
        call.chunk, engine,
    )  # fmt: skip


@torch.library.custom_op("tilewise::scan", mutates_args=())
def scan(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, state: Tensor | None,
    offsets: Tensor | None, rule: str, scale: float, chunk: int | None, engine: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`tilewise::scan`: outputs and final states of the packed call on the named engine."""
    call = Call(q, k, v, decay, beta, state, offsets, rule, scale, chunk)
    return IMPLEMENTATIONS[engine].forward(call)


@scan.register_fake
def _(q, k, v, decay, beta, state, offsets, *rest):
    call = Call(q, k, v, decay, beta, state, offsets)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(call.state_shape(), dtype=call.wide)


@torch.library.custom_op("tilewise::scan_backward", mutates_args=())
def scan_backward(
    d_out: Tensor, d_state: Tensor,
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, state: Tensor | None,
    offsets: Tensor | None, rule: str, scale: float, chunk: int | None, engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, decay, beta and state; empty for those that are not there."""
    call = Call(q, k, v, decay, beta, state, offsets, rule, scale, chunk)
    d_q, d_k, d_v, *rest = IMPLEMENTATIONS[engine].backward(call, d_out, d_state)
    d_decay, d_beta, d_first = (q.new_empty(0) if x is None else x for x in rest)
    return d_q, d_k, d_v, d_decay, d_beta, d_first


@scan_backward.register_fake
def _(d_out, d_state, q, k, v, decay, beta, state, *rest):
    given = [x.new_empty(x.shape) for x in (q, k, v)]
    return (*given, *(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (decay, beta, state)))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.others = inputs[7:]


def _backward(ctx, d_out, d_state):
    gradients = torch.ops.tilewise.scan_backward(d_out, d_state, *ctx.saved_tensors, *ctx.others)
    given = ctx.saved_tensors[: len(_TENSORS)]
    found = [None if x is None else gradient for x, gradient in zip(given, gradients)]
    return (*found, None, *(None for _ in ctx.others))


scan.register_autograd(_backward, setup_context=_setup_context)
