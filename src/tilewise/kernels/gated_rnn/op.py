"""The custom operators `tilewise::gated_rnn` and its backward, shared by all engines.

Being `torch.library` operators with fake and autograd registrations, they stay whole inside torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.kernels.gated_rnn.call import Call

Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class Implementation(NamedTuple):
    """What an engine registers; both take a Call whose tensors need no gradient.

    `forward` gives outputs, final states and what it keeps. `backward` gets that, and the gradients of
    outputs and final states, either of which may be None; it gives those of wx, R, bias and state, None for
    what is not there. Its call's wx has the right size and dtype but no content.
    """

    forward: Callable[[Call], tuple[Tensor, Tensor, Tensor]]
    backward: Callable[[Call, Tensor, Tensor | None, Tensor | None], Gradients]


IMPLEMENTATIONS: dict[str, Implementation] = {}


def run(call: Call, engine: str) -> tuple[Tensor, Tensor]:
    """Run `call` on the registered engine through the custom operator."""
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (call.wx, call.R, call.bias, call.state)
    )
    out, after, _ = torch.ops.tilewise.gated_rnn(
        call.wx, call.R, call.bias, call.state, call.mask, call.offsets, call.kind, keep, engine
    )
    return out, after


@torch.library.custom_op("tilewise::gated_rnn", mutates_args=())
def gated_rnn(
    wx: Tensor, R: Tensor, bias: Tensor | None, state: Tensor | None, mask: Tensor | None,
    offsets: Tensor | None, kind: str, keep: bool, engine: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`tilewise::gated_rnn`: outputs, final states and what is kept for the backward pass, on the named
    engine."""
    return IMPLEMENTATIONS[engine].forward(Call(wx, R, bias, state, mask, offsets, kind, keep))


@gated_rnn.register_fake
def _(wx, R, bias, state, mask, offsets, kind, keep, engine):
    call = Call(wx, R, bias, state, mask, offsets, kind, keep)
    made = wx.new_empty(call.state_shape(), dtype=call.wide)
    return call.new_out(), made, wx.new_empty(call.kept_shape(), dtype=call.wide)


@torch.library.custom_op("tilewise::gated_rnn_backward", mutates_args=())
def gated_rnn_backward(
    d_out: Tensor | None, d_after: Tensor | None, kept: Tensor,
    wx: Tensor, R: Tensor, bias: Tensor | None, state: Tensor | None, mask: Tensor | None,
    offsets: Tensor | None, kind: str, engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of wx, R, bias and state; empty for those that are not there."""
    call = Call(wx, R, bias, state, mask, offsets, kind, True)
    d_wx, d_R, *rest = IMPLEMENTATIONS[engine].backward(call, kept, d_out, d_after)
    d_bias, d_state = (wx.new_empty(0) if x is None else x for x in rest)
    return d_wx, d_R, d_bias, d_state


@gated_rnn_backward.register_fake
def _(d_out, d_after, kept, wx, R, bias, state, mask, offsets, kind, engine):
    d_bias, d_state = (wx.new_empty(0) if x is None else x.new_empty(x.shape) for x in (bias, state))
    return new_gradient(wx), R.new_empty(R.shape), d_bias, d_state


def new_gradient(wx: Tensor) -> Tensor:
    """For the gradient of wx `[B, H, N, G, d]`; in memory the heads of a token lie together, as a projection
    gives them."""
    b, heads, n, gates, d = wx.shape
    return wx.new_empty(b, n, heads, gates, d).transpose(1, 2)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    wx, *tensors, ctx.kind, keep, ctx.engine = inputs
    ctx.kept_any = keep
    # Of wx only the size is asked for again; holding it would cost two thirds as much as all that is kept.
    ctx.save_for_backward(output[2], wx.new_empty(()).expand(wx.shape), *tensors)


def _backward(ctx, d_out, d_after, _):
    if not ctx.kept_any:
        raise RuntimeError("tilewise::gated_rnn was called with keep=False, which has no backward pass")
    kept, *tensors = ctx.saved_tensors
    given = tensors[:4]
    if d_out is None and d_after is None:
        return (*(None for _ in tensors), None, None, None)
    found = torch.ops.tilewise.gated_rnn_backward(d_out, d_after, kept, *tensors, ctx.kind, ctx.engine)
    gradients = [None if x is None else gradient for x, gradient in zip(given, found)]
    return (*gradients, None, None, None, None, None)


gated_rnn.register_autograd(_backward, setup_context=_setup_context)
