"""The functions of the attention room: attend, attend_tiles, plan, explain."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.attention.biases import LowRankBias
from tilewise.attention.method import Method, as_method
from tilewise.attention.plans import Pass, Plan
from tilewise.tiles import Mask, Partial, TileMap, Visibility, as_mask


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: Method | Plan | str | None = None,
    *,
    mask: Mask | Tensor | str | None = None,
    bias: Tensor | LowRankBias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    engine: str = "auto",
    return_lse: bool = False,
    layout: str = "bhnd",
) -> Tensor | Partial:
    """Attention, `softmax(scale * q k^T + bias) v`, by a method of choice.

    Args:
        q: `[B, H_q, N_q, D]`, float16, bfloat16, float32 or float64, any strides.
        k: `[B, H_kv, N_k, D]`; v: `[B, H_kv, N_k, D_v]`. H_q is a multiple of H_kv; query head h reads kv head
            h // (H_q // H_kv).
        method: None for dense, a name (see `tilewise papers`), a configured method, or a `Plan` made before.
        mask: None (everything visible), "causal" (aligned bottom-right), a mask object, or a tensor: boolean
            (True = may attend) or floating (additive), `[N_q, N_k]` or `[B|1, H|1, N_q, N_k]`.
        bias: additive and differentiable: a floating tensor broadcastable to `[B, H_q, N_q, N_k]`, or a
            `LowRankBias`, of which nothing N x N is made. Methods choose their tiles from q and k, without it.
        scale: factor of the scores; None is 1/sqrt(D). softcap: cap scores smoothly at this magnitude.
        engine: "auto", or the name of an engine, which then runs or raises.
        return_lse: also return the natural log of each row's sum of exponentials.
        layout: "bhnd", or "bnhd" for `[B, N, H, D]` inputs and output (a stride view, never a copy).

    Returns:
        `[B, H_q, N_q, D_v]` in q's dtype, or with `return_lse` a `Partial(out, lse)`, lse float32
        `[B, H_q, N_q]`. A query that sees nothing gets out 0, lse -inf and gradient 0.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and what is accepted. Also
            when the method does not support this mode (prefill, decode, ...) or a named engine cannot run.
    """
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f"layout must be 'bhnd' or 'bnhd', got {layout!r}")
    if layout == "bnhd":
        for name, x in (("q", q), ("k", k), ("v", v)):
            _check_tensor(name, x, "[B, N, H, D]")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    view, added, scale = bind(q, k, v, mask, bias, scale, softcap)
    plan = _plan(method, q, k, v, view, scale)
    q, k = _extend(q, k, bias, scale, softcap)
    partial = plan.run(q, k, v, bias=added, scale=scale, softcap=softcap, engine=engine, need_lse=return_lse)
    if layout == "bnhd":
        partial = partial._replace(out=partial.out.transpose(1, 2))
    return partial if return_lse else partial.out


def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_map: TileMap,
    *,
    mask: Mask | Tensor | str | None = None,
    bias: Tensor | LowRankBias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    engine: str = "auto",
    return_lse: bool = False,
) -> Tensor | Partial:
    """Attention over given tiles: like `attend`, with `tile_map` saying which tiles are computed.

    The mask still holds within them. Raises as `attend` does, and ValueError for a map of other sizes.
    """
    view, added, scale = bind(q, k, v, mask, bias, scale, softcap)
    if not isinstance(tile_map, TileMap):
        raise TypeError(f"tile_map must be a TileMap, got {type(tile_map).__name__}")
    tile_map.check(q.shape[0], q.shape[1], q.shape[2], k.shape[2], k.shape[1])
    plan = Plan((Pass(view, tile_map),), view)
    q, k = _extend(q, k, bias, scale, softcap)
    partial = plan.run(q, k, v, bias=added, scale=scale, softcap=softcap, engine=engine, need_lse=return_lse)
    return partial if return_lse else partial.out


def plan(
    method: Method | str | None,
    q: Tensor,
    k: Tensor,
    *,
    mask: Mask | Tensor | str | None = None,
    scale: float | None = None,
    v: Tensor | None = None,
) -> Plan:
    """What `method` decides for these queries and keys: its passes and tile maps, density, and seconds spent.

    The plan can be given to `attend` in place of the method, for other values or to decide once for many calls.
    A method whose choice looks at values needs `v`, as `attend` takes it, and raises ValueError without.
    """
    view, _, scale = bind(q, k, k if v is None else v, mask, None, scale, None)
    if q.is_cuda:
        torch.cuda.synchronize(q.device)
    start = time.perf_counter()
    made = _plan(method, q, k, v, view, scale)
    if q.is_cuda:
        torch.cuda.synchronize(q.device)
    return dataclasses.replace(made, seconds=time.perf_counter() - start)


@dataclass(frozen=True)
class Explanation:
    """Which engine runs each pass of a call, and why each other engine does not; `choices`: the same of engines
    that choose keys for it."""

    method: str
    passes: tuple[tuple[str, Mapping[str, str]], ...]
    choices: tuple[tuple[str, Mapping[str, str]], ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.method}: {len(self.passes)} pass" + ("es" if len(self.passes) != 1 else "")]
        said = [(f"choice {number} of keys", *choice) for number, choice in enumerate(self.choices, 1)]
        said += [(f"pass {number}", *one) for number, one in enumerate(self.passes, 1)]
        for what, engine, refused in said:
            lines.append(f"  {what} runs on {engine}")
            lines += [f"    not {name}: {reason}" for name, reason in refused.items()]
        return "\n".join(lines)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: Method | Plan | str | None = None,
    *,
    mask: Mask | Tensor | str | None = None,
    bias: Tensor | LowRankBias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    engine: str = "auto",
    return_lse: bool = False,
) -> Explanation:
    """The engine that `attend` with the same arguments would run, and why each other one would not."""
    view, added, scale = bind(q, k, v, mask, bias, scale, softcap)
    made = _plan(method, q, k, v, view, scale)
    q, k = _extend(q, k, bias, scale, softcap)
    choices = made.explain(q, k, v, engine, bias=added, scale=scale, softcap=softcap, need_lse=return_lse)
    name = "a given plan" if isinstance(method, Plan) else str(as_method(method))
    passes, chosen = (tuple((c.engine, c.refused) for c in some) for some in (choices, made.choices))
    return Explanation(name, passes, chosen)


def _plan(method, q: Tensor, k: Tensor, v: Tensor | None, view: Visibility, scale: float) -> Plan:
    if isinstance(method, Plan):
        method.check(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])
        if view.simple != "everything" and not view.same(method.view):
            raise ValueError(
                "mask must be None or the one the plan was made for; plan again for another mask"
            )
        return method
    chosen = as_method(method)
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v))
    chosen.check_mode(q.shape[2], k.shape[2], train)
    with torch.no_grad():
        if v is not None:
            chosen = chosen.with_values(v.detach())
        return chosen.plan(q.detach(), k.detach(), view, scale)


def bind(q, k, v, mask, bias, scale, softcap) -> tuple[Visibility, Tensor | None, float]:
    """Check the arguments; the mask as a Visibility, what is added to scores as a tensor, the scale as a number.

    Float masks are added to the bias. Low-rank biases are left to `_extend`.
    """
    if isinstance(bias, LowRankBias):
        bias = None
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, "[B, H, N, D]")
        if not x.is_floating_point() or x.dtype != q.dtype or x.device != q.device:
            raise TypeError(
                f"q, k and v must share one floating dtype and device, got q {q.dtype} on {q.device} and"
                f" {name} {x.dtype} on {x.device}"
            )
    (b, heads, n_q, d), (kv_heads, n_k) = q.shape, k.shape[1:3]
    if k.shape[0] != b or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"k and v must be [{b}, H_kv, N_k, *] alike, got {list(k.shape)} and {list(v.shape)}"
        )
    if k.shape[3] != d or not 1 <= d <= 512:
        raise ValueError(f"q and k must share a head_dim in 1..512, got {d} and {k.shape[3]}")
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of kv heads, got {heads} and {kv_heads}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be None or > 0, got {softcap!r}")
    if bias is not None:
        bias = _check_additive("bias", bias, (b, heads, n_q, n_k))
    if isinstance(mask, Tensor) and mask.is_floating_point():
        added = _check_additive("mask", mask, (b, heads, n_q, n_k))
        mask, bias = None, added if bias is None else bias + added
    view = as_mask(mask).bind(n_q, n_k, device=q.device)
    for name, x in (("batch", 0), ("heads", 1)):
        sizes = {view.lo.shape[x], view.pos.shape[x], 1 if view.dense is None else view.dense.shape[x]}
        if not sizes <= {1, (b, heads)[x]}:
            raise ValueError(f"the mask has {max(sizes)} {name}, the call has {(b, heads)[x]}")
    return view, bias, 1 / math.sqrt(d) if scale is None else float(scale)


def _extend(q: Tensor, k: Tensor, bias, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """q and k with the factors of a low-rank bias beside them; with any other bias as they are."""
    if not isinstance(bias, LowRankBias):
        return q, k
    if softcap is not None:
        raise ValueError(
            "softcap takes no low-rank bias: scores are capped before a bias is added, and factors add it before;"
            " give the bias as a tensor, bias.dense()"
        )
    return bias.extend(q, k, scale)


def _check_tensor(name: str, x: Tensor, axes: str) -> None:
    if not isinstance(x, Tensor) or x.ndim != 4:
        given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a tensor {axes}, got {given}")


def _check_additive(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim > 4:
        hint = " or a LowRankBias" if name == "bias" else ""
        raise TypeError(f"{name} must be a floating tensor broadcastable to [B, H_q, N_q, N_k]{hint}")
    x = x[(None,) * (4 - x.ndim)]
    if any(have not in (1, want) for have, want in zip(x.shape, shape)):
        raise ValueError(f"{name} must broadcast to {list(shape)}, got {list(x.shape)}")
    return x
