"""The custom operator `tilewise::fwht`, shared by all engines. Its matrix is symmetric: it is its own backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tilewise.kernels.fwht.call import Call

IMPLEMENTATIONS: dict[str, Callable[[Call], Tensor]] = {}


def run(call: Call, engine: str) -> Tensor:
    """Run `call` on the registered engine.

    Through the custom operator where something has to see it: autograd, the compiler or a tensor that is none of
    PyTorch's own. Otherwise directly: the operator's way through Python takes longer than the transform of a few
    thousand numbers.
    """
    x = call.x
    if torch.compiler.is_compiling() or type(x) is not Tensor or (x.requires_grad and torch.is_grad_enabled()):
        return torch.ops.tilewise.fwht(x, call.scale, engine)
    return IMPLEMENTATIONS[engine](call)


@torch.library.custom_op("tilewise::fwht", mutates_args=())
def fwht(x: Tensor, scale: float, engine: str) -> Tensor:
    """`tilewise::fwht`: the rows of `x` transformed by the named engine."""
    return IMPLEMENTATIONS[engine](Call(x, scale))


@fwht.register_fake
def _(x, scale, engine):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.scale, ctx.engine = inputs[1:]


def _backward(ctx, gradient):
    return torch.ops.tilewise.fwht(gradient, ctx.scale, ctx.engine), None, None


fwht.register_autograd(_backward, setup_context=_setup_context)
