"""The operators `tilewise::local_linear_attention` and its backward, which stay whole inside torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.attention.local_linear.blockwise import Problem, Solved, backward, forward
from tilewise.tiles import Visibility


def run(p: Problem) -> tuple[Tensor, Tensor]:
    """The output in the dtype of v, and the residual of each query's solve; differentiable once."""
    view = (p.view.lo, p.view.hi, p.view.pos, p.view.q_pos, p.view.dense)
    numbers = (float(p.scale), float(p.tolerance), p.steps, *p.tile)
    out, *_, residual = torch.ops.tilewise.local_linear_attention(p.q, p.k, p.v, p.ridge, *view, *numbers)
    return out.to(p.v.dtype), residual


def _problem(
    q, k, v, ridge, lo, hi, pos, q_pos, dense, scale, tolerance, steps, height, width
) -> Problem:  # fmt: skip
    view = Visibility(lo, hi, pos, q_pos, dense)
    return Problem(q, k, v, ridge, view, scale, tolerance, steps, (height, width))


@torch.library.custom_op("tilewise::local_linear_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, ridge: Tensor,
    lo: Tensor, hi: Tensor, pos: Tensor, q_pos: Tensor, dense: Tensor | None,
    scale: float, tolerance: float, steps: int, height: int, width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The fields of `Solved`, in float32 or, for float64 inputs, float64."""
    problem = _problem(q, k, v, ridge, lo, hi, pos, q_pos, dense, scale, tolerance, steps, height, width)
    out, top, total, mean, rho, residual = forward(problem)
    return out, top, total, mean, rho, residual


@_forward.register_fake
def _(q, k, v, ridge, *rest):
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    sizes = (v.shape[3], 1, 1, q.shape[3], q.shape[3], 1)
    return tuple(q.new_empty(*q.shape[:3], size, dtype=wide) for size in sizes)


@torch.library.custom_op("tilewise::local_linear_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor, out: Tensor, top: Tensor, total: Tensor, mean: Tensor, rho: Tensor,
    q: Tensor, k: Tensor, v: Tensor, ridge: Tensor,
    lo: Tensor, hi: Tensor, pos: Tensor, q_pos: Tensor, dense: Tensor | None,
    scale: float, tolerance: float, steps: int, height: int, width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and ridge."""
    problem = _problem(q, k, v, ridge, lo, hi, pos, q_pos, dense, scale, tolerance, steps, height, width)
    d_q, d_k, d_v, d_ridge = backward(problem, Solved(out, top, total, mean, rho, total), d_out)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_ridge


@_backward.register_fake
def _(d_out, out, top, total, mean, rho, q, k, v, ridge, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, ridge))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[:5], *inputs[:9])
    ctx.numbers = inputs[9:]


def _differentiate(ctx, d_out, *unused):
    *saved, dense = ctx.saved_tensors
    gradients = torch.ops.tilewise.local_linear_attention_backward(d_out, *saved, dense, *ctx.numbers)
    return (*gradients, *[None] * 10)


_forward.register_autograd(_differentiate, setup_context=_save)
