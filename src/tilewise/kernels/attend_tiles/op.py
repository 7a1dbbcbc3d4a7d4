"""The custom operators `tilewise::attend_tiles` and its backward, shared by all engines that compute tiles.

Being `torch.library` operators with fake and autograd registrations, they stay whole inside torch.compile. The
operator takes plain tensors and numbers; `pack` and `unpack` translate from and to a `Call`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.kernels.attend_tiles.call import Call
from tilewise.tiles import Partial, TileMap, Tiling, Visibility


class Implementation(NamedTuple):
    """What an engine registers: both take a Call whose tensors need no gradient."""

    forward: Callable[[Call], Partial]
    backward: Callable[[Call, Partial, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor | None]]


IMPLEMENTATIONS: dict[str, Implementation] = {}


def run(call: Call, engine: str) -> Partial:
    """Run `call` on the registered engine through the custom operator."""
    return Partial(*torch.ops.tilewise.attend_tiles(*pack(call), engine))


def pack(call: Call) -> tuple:
    """The operator's arguments for `call`, without the engine."""
    view, tiles = call.view, call.tiles
    keep = q_bounds = k_bounds = None
    q_size = k_size = 1  # not used when no map is given: every visible tile is computed
    if tiles is not None:
        keep, q_bounds, k_bounds = tiles.keep, tiles.q_tiling.bounds, tiles.k_tiling.bounds
        q_size, k_size = tiles.q_tiling.size, tiles.k_tiling.size
    grid = (call.q, call.k, call.v, view.lo, view.hi, view.pos, view.q_pos, view.dense)
    tiled = (keep, q_bounds, k_bounds, q_size, k_size, call.q_order, call.k_order)
    stored = (call.pages, call.lists, call.q_scale, call.k_scale)
    scoring = (float(call.scale), float(call.softcap or 0.0), call.unified_max)
    return (*grid, *tiled, call.bias, call.bias_rows, *stored, *scoring, call.weights, call.need_lse)


def unpack(q, k, v, lo, hi, pos, q_pos, dense, keep, q_bounds, k_bounds, q_size, k_size, q_order, k_order,
           bias, bias_rows, pages, lists, q_scale, k_scale, scale, softcap, unified_max, weights,
           need_lse) -> Call:  # fmt: skip
    """The Call for the operator's arguments."""
    tiles = None if keep is None else TileMap(keep, Tiling(q_size, q_bounds), Tiling(k_size, k_bounds))
    view = Visibility(lo, hi, pos, q_pos, dense)
    return Call(q, k, v, view, tiles, q_order, k_order, bias, scale, softcap or None, need_lse, pages, unified_max,
                q_scale, k_scale, bias_rows, weights, lists)  # fmt: skip


_FIELDS = (*inspect.signature(unpack).parameters, "engine")


@torch.library.custom_op("tilewise::attend_tiles", mutates_args=())
def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, pos: Tensor, q_pos: Tensor, dense: Tensor | None,
    keep: Tensor | None, q_bounds: Tensor | None, k_bounds: Tensor | None, q_size: int, k_size: int,
    q_order: Tensor | None, k_order: Tensor | None, bias: Tensor | None, bias_rows: int, pages: Tensor | None,
    lists: Tensor | None, q_scale: Tensor | None, k_scale: Tensor | None, scale: float, softcap: float,
    unified_max: float | None, weights: torch.dtype | None, need_lse: bool, engine: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`tilewise::attend_tiles`: out and lse of the packed call on the named engine."""
    call = unpack(q, k, v, lo, hi, pos, q_pos, dense, keep, q_bounds, k_bounds, q_size, k_size, q_order, k_order,
                  bias, bias_rows, pages, lists, q_scale, k_scale, scale, softcap, unified_max, weights,
                  need_lse)  # fmt: skip
    out, lse = IMPLEMENTATIONS[engine].forward(call)
    return out, lse


@attend_tiles.register_fake
def _(q, k, v, *rest):
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    return v.new_empty(*q.shape[:3], v.shape[3]), v.new_empty(q.shape[:3], dtype=wide)


@torch.library.custom_op("tilewise::attend_tiles_backward", mutates_args=())
def attend_tiles_backward(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, pos: Tensor, q_pos: Tensor, dense: Tensor | None,
    keep: Tensor | None, q_bounds: Tensor | None, k_bounds: Tensor | None, q_size: int, k_size: int,
    q_order: Tensor | None, k_order: Tensor | None, bias: Tensor | None, bias_rows: int, pages: Tensor | None,
    lists: Tensor | None, q_scale: Tensor | None, k_scale: Tensor | None, scale: float, softcap: float,
    unified_max: float | None, weights: torch.dtype | None, need_lse: bool, engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and bias of the packed call; that of the bias is empty where there is none."""
    call = unpack(q, k, v, lo, hi, pos, q_pos, dense, keep, q_bounds, k_bounds, q_size, k_size, q_order, k_order,
                  bias, bias_rows, pages, lists, q_scale, k_scale, scale, softcap, unified_max, weights,
                  need_lse)  # fmt: skip
    d_q, d_k, d_v, d_bias = IMPLEMENTATIONS[engine].backward(call, Partial(out, lse), d_out, d_lse)
    return d_q, d_k, d_v, q.new_empty(0) if d_bias is None else d_bias


@attend_tiles_backward.register_fake
def _(d_out, d_lse, out, lse, q, k, v, *rest):
    bias = rest[_FIELDS.index("bias") - 3]
    contiguous = [x.new_empty(x.shape) for x in (q, k, v)]
    return (*contiguous, q.new_empty(0) if bias is None else bias.new_empty(bias.shape))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output, *(x for x in inputs if isinstance(x, Tensor)))
    ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]


def _backward(ctx, d_out, d_lse):
    out, lse, *tensors = ctx.saved_tensors
    saved = iter(tensors)
    inputs = [next(saved) if x is None else x[0] for x in ctx.others]
    gradients = torch.ops.tilewise.attend_tiles_backward(d_out, d_lse, out, lse, *inputs)
    by_name = dict(zip(("q", "k", "v", "bias"), gradients))
    if inputs[_FIELDS.index("bias")] is None:
        del by_name["bias"]
    return tuple(by_name.get(name) for name in _FIELDS)


attend_tiles.register_autograd(_backward, setup_context=_setup_context)
