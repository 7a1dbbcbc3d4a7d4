"""PyTorch's FlexAttention, for calls whose tiles and mask it can express.

It is generated and compiled for each kind of call, which takes seconds the first time, so it runs only when named
or when nothing before it accepts. On CPUs PyTorch gives it neither a backward pass nor the log-sum-exp.

Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels",
https://arxiv.org/abs/2412.05496.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import types
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.kernels.attend_tiles.call import Call
from tilewise.tiles import FULL, PARTIAL, Partial, TileMap
from tilewise.tiles.visibility import to_heads

BLOCK = 128  # the generated GPU kernels cut tiles into blocks that divide this
KEPT = 256  # kernels that are kept
LOWEST = 16  # query tiles lower than this are mostly padding to the generated kernels


class Kind(NamedTuple):
    """What a kernel is generated for."""

    shapes: tuple[torch.Size, ...]
    tile: tuple[int, int]
    axes: int
    group: int
    scale: float
    softcap: float | None
    biased: bool
    lse: bool
    device: str


def refuse(call: Call) -> str | None:
    """Why FlexAttention cannot run this call."""
    q, tiles = call.q, call.tiles
    if torch.compiler.is_compiling():
        return "is compiled by itself, not inside torch.compile"
    if call.q_scale is not None or call.weights is not None or call.bias_rows != 1:
        return "multiplies no quantised operands"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"has no {str(q.dtype).removeprefix('torch.')}"
    if not q.numel() or not call.k.numel():
        return "an empty sequence"
    if call.pages is not None:
        return "reads no pages"
    if call.lists is not None:
        return "reads no lists of keys"
    if call.q_order is not None or call.k_order is not None:
        return "tiles are cut over tokens in another order"
    if tiles is not None and (tiles.q_tiling.bounds is not None or tiles.k_tiling.bounds is not None):
        return "tiles differ in size"
    if tiles is not None and tiles.q_tiling.size < LOWEST:
        return f"query tiles are lower than {LOWEST}"
    if call.view.dense is not None:
        return "the mask is a grid of N_q x N_k"
    if call.view.pos.shape[1] not in (1, call.k.shape[1]):
        return "positions of keys differ between query heads that share a kv head"
    if call.bias is not None and call.bias.requires_grad and torch.is_grad_enabled():
        return "gives the bias no gradient"
    return _refuse_on_cpu(call) if q.device.type == "cpu" else _refuse_on_gpu(call)


def _refuse_on_cpu(call: Call) -> str | None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
        return "has no backward pass on CPUs"
    if call.need_lse:
        return "gives no log-sum-exp on CPUs"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return "needs a CPU with AVX2"
    if not shutil.which(os.environ.get("CXX", "g++")):
        return "needs a C++ compiler"
    return None


def _refuse_on_gpu(call: Call) -> str | None:
    dims = call.q.shape[3], call.v.shape[3]
    if call.q.device.type != "cuda":
        return f"runs on CPUs and CUDA GPUs, the tensors are on {call.q.device.type}"
    if min(dims) < 16 or max(dims) > 256:
        return f"takes head_dims from 16 to 256 on GPUs, the call has {dims[0]} and {dims[1]}"
    if call.tiles is not None and (call.tiles.q_tiling.size % BLOCK or call.tiles.k_tiling.size % BLOCK):
        return f"takes tiles that are multiples of {BLOCK} on GPUs"
    return None


def run(call: Call) -> Partial:
    """Attention over the kept tiles of `call`; the lse is None where it was not asked for."""
    b, heads, n_q, _ = call.q.shape
    n_k = call.k.shape[2]
    tiles = call.tiles or TileMap.everything(n_q, n_k, call.q.device, (BLOCK, BLOCK))
    kinds = to_heads(call.view.tiles(tiles.q_tiling, tiles.k_tiling), heads)
    kinds = kinds.masked_fill(~to_heads(tiles.keep, heads), 0)
    kind = Kind(
        (call.q.shape, call.k.shape, call.v.shape),
        (tiles.q_tiling.size, tiles.k_tiling.size),
        call.view.pos.shape[3],
        heads // call.k.shape[1],
        float(call.scale),
        call.softcap,
        call.bias is not None,
        call.need_lse,
        call.q.device.type,
    )
    limits = (to_heads(x, heads).expand(b, heads, -1, -1) for x in (call.view.lo, call.view.hi))
    pos = call.view.pos.expand(b, call.k.shape[1], -1, -1)
    bias = call.q.new_zeros(1) if call.bias is None else call.bias.detach().expand(b, heads, n_q, n_k)
    listed = (*_list(kinds == PARTIAL), *_list(kinds == FULL))
    out, lse = _kernel(kind)(call.q, call.k, call.v, *listed, *limits, pos, bias)
    return Partial(out, lse)  # type: ignore[arg-type]


def _list(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row are chosen, and which: int32 `[b, h, T_q]` and `[b, h, T_q, T_k]`."""
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


@functools.lru_cache(KEPT)
def _kernel(kind: Kind) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The compiled attention for a kind of call."""
    with warnings.catch_warnings():  # PyTorch's compiler is, on import, deprecated by PyTorch itself
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._inductor.compile_fx")
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    def attend(q, k, v, partial, partial_tiles, full, full_tiles, lo, hi, pos, bias):
        def within(b, h, i, j, axis):
            at = pos[b, h // kind.group, j, axis]
            return (lo[b, h, i, axis] <= at) & (at <= hi[b, h, i, axis])

        def seen(b, h, i, j):
            found = within(b, h, i, j, 0)
            for axis in range(1, kind.axes):
                found = found & within(b, h, i, j, axis)
            return found

        def score(s, b, h, i, j):
            if kind.softcap is not None:
                s = kind.softcap * torch.tanh(s / kind.softcap)
            return s + bias[b, h, i, j].to(s.dtype) if kind.biased else s

        mask = BlockMask.from_kv_blocks(
            partial, partial_tiles, full, full_tiles, BLOCK_SIZE=kind.tile, mask_mod=seen,
            seq_lengths=(q.shape[2], k.shape[2]), compute_q_blocks=kind.device != "cpu",
        )  # fmt: skip
        plain = kind.softcap is None and not kind.biased
        out, aux = flex_attention(
            q, k, v, None if plain else score, mask, kind.scale, enable_gqa=kind.group > 1,
            return_aux=AuxRequest(lse=kind.lse),
        )  # fmt: skip
        return out, aux.lse

    # Code of its own for each kind: the compiler counts its attempts by code, and gives up after a few.
    own = types.FunctionType(
        attend.__code__.replace(co_name=f"attend_{abs(hash(kind))}"),
        attend.__globals__,
        closure=attend.__closure__,
    )
    return torch.compile(own, fullgraph=True, dynamic=False)
