"""Precision: in how many bits the tiles that are paid for are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from tilewise.kernels.attend_tiles import Call
from tilewise.tiles import Partial
from tilewise.tiles.visibility import HIDDEN, to_heads

LARGEST = {"int8": 127, "int4": 7}
FP8 = torch.float8_e4m3fn
QUERY_BLOCK = 128  # queries that are smoothed together

# How tokens share a scale, for queries and for keys: tokens of a block, and the shape that a block is folded into,
# of whose axes 1 and 3 share. A GPU thread of the paper's kernel holds every eighth query of a warp's 32, and of a
# block of 64 keys two neighbours out of every eight.
GROUPS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "token": ((1, 1, 1, 1), (1, 1, 1, 1)),
    "thread": ((32, 4, 8, 1), (64, 8, 4, 2)),
    "warp": ((32, 32, 1, 1), (64, 64, 1, 1)),
    "block": ((128, 128, 1, 1), (64, 64, 1, 1)),
}


class Applied(NamedTuple):
    """A call in few bits, and what turns its result into that of the call it stands for."""

    call: Call
    restore: Callable[[Partial], Partial]


class Precision(Protocol):
    """Says in what numbers a pass is computed."""

    def apply(self, call: Call) -> Applied:
        """The call to run in place of `call`."""


@dataclass(frozen=True)
class Quantised:
    """Precision: integer queries and keys, weights and values as they are or in 8 bits (SageAttention2).

    Scores are products of integers times the scales of their groups. Smoothing takes out what tokens have in common
    before they are rounded, and is exact but for rounding: the mean key moves all scores of a query alike, which a
    softmax does not see (its log-sum-exp is corrected); the mean of 128 queries times the keys is added as a bias
    that the queries share; the mean value is added to the output, as weights sum to 1. Means and scales are taken
    over whole sequences, so the rounding of a token depends on later ones.

    Args:
        qk: "int8", or "int4" with numbers -7 to 7; the arithmetic is the same here, int4 is for its error.
        pv: "native" leaves weights and values to the engine; "fp8" rounds both to E4M3, weights with the static
            scale 1 / 448, values with one scale per channel.
        smooth_q, smooth_k, smooth_v: what is smoothed; smooth_v needs pv="fp8".
        group: how many tokens share a scale: "token"; "thread", 4 queries or 16 keys; "warp", 32 or 64; "block",
            128 or 64; "tensor", a head.

    Raises ValueError for other settings, for tensors that need a gradient, and with a soft cap while queries or
    keys are smoothed, as it bends what smoothing shifts.
    """

    qk: Literal["int8", "int4"] = "int8"
    pv: Literal["native", "fp8"] = "native"
    smooth_q: bool = False
    smooth_k: bool = True
    smooth_v: bool = False
    group: Literal["token", "thread", "warp", "block", "tensor"] = "thread"

    def __post_init__(self) -> None:
        for name, known in (("qk", LARGEST), ("pv", ("native", "fp8")), ("group", (*GROUPS, "tensor"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.smooth_v and self.pv != "fp8":
            raise ValueError("smooth_v needs pv='fp8': values that are not rounded gain nothing by it")

    def apply(self, call: Call) -> Applied:
        """`call` with int8 operands and, as asked, rounded values and weights."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
            raise ValueError("quantised attention takes no gradients; use it under torch.no_grad()")
        if call.softcap is not None and (self.smooth_q or self.smooth_k):
            raise ValueError(
                "softcap does not go with smoothing, which shifts scores before they are capped; set smooth_q and"
                " smooth_k to False"
            )
        call = call.gathered()
        seen = _seen(call)
        wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
        q, k = call.q, call.k
        changes: dict = {}
        shift = None
        if self.smooth_k:
            mean = _mean(k, seen, wide)
            if call.need_lse:
                shift = call.scale * _by_group(q.to(wide), mean.mT).squeeze(3)
            k = k.to(wide) - mean
        if self.smooth_q:
            blocks = _block_means(q.to(wide))
            bias = call.scale * _by_group(blocks, k.to(wide).mT)
            q = q.to(wide) - blocks.repeat_interleave(QUERY_BLOCK, 2)[:, :, : q.shape[2]]
            changes |= _with_bias(call, bias)
        changes |= dict(zip(("q", "q_scale"), self._integers(q, None, 0)))
        changes |= dict(zip(("k", "k_scale"), self._integers(k, seen, 1)))
        if self.pv == "native":
            return Applied(replace(call, **changes), lambda partial: _restore(partial, shift, None, None))
        v, scales, means = self._values(call.v, seen)
        changes |= {"v": v, "weights": FP8, "need_lse": True}
        channel, middle = to_heads(scales, q.shape[1]), None if means is None else to_heads(means, q.shape[1])
        return Applied(replace(call, **changes), lambda partial: _restore(partial, shift, channel, middle))

    def _integers(self, x: Tensor, seen: Tensor | None, side: int) -> tuple[Tensor, Tensor]:
        """`x [B, H, N, D]` as int8 and the scale of every token, float32 `[B, H, N]`; NaN for non-finite tokens."""
        low, high = torch.aminmax(x, dim=-1) if x.shape[3] else (x.new_zeros(x.shape[:3]),) * 2
        largest = torch.maximum(high, -low).float()
        finite = largest.isfinite()
        counted = largest.masked_fill(~(finite if seen is None else finite & seen), 0)
        scale = _shared(counted, self.group, side) / LARGEST[self.qk]
        inverse = torch.where(scale > 0, 1 / scale, 0).unsqueeze(3)
        most = LARGEST[self.qk]
        integers = (x * inverse.to(x.dtype if x.dtype == torch.float64 else torch.float32)).round_()
        if seen is not None or not _all(finite):  # tokens that were not counted may be larger than any
            integers = integers.nan_to_num_(0).clamp_(-most, most)
        return integers.to(torch.int8), scale.masked_fill(~finite, torch.nan)

    def _values(self, v: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values in steps of E4M3 (in their own dtype), scale and mean of each channel `[B, H_kv, 1, D_v]`."""
        wide = torch.float64 if v.dtype == torch.float64 else torch.float32
        x = v.to(wide)
        middle = _mean(v, seen, wide) if self.smooth_v else None
        if middle is not None:
            x = x - middle
        finite = x.isfinite()
        counted = x.masked_fill(~(finite if seen is None else finite & seen.unsqueeze(3)), 0).abs()
        most = torch.finfo(FP8).max
        scale = (
            counted.amax(2, keepdim=True) if v.shape[2] else x.new_zeros(*v.shape[:2], 1, v.shape[3])
        ) / most
        steps = torch.where(scale > 0, x / scale, 0)
        held = steps.clamp(-most, most).to(FP8).to(v.dtype)
        return torch.where(finite, held, v), scale, middle


def accuracy(got: Tensor, want: Tensor) -> tuple[float, float, float]:
    """Cosine similarity, relative L1 distance and root mean square error of `got`, the measures of the paper."""
    got, want = got.double().flatten(), want.double().flatten()
    cosine = float(got @ want / (got.norm() * want.norm()))
    return (
        cosine,
        float((got - want).abs().sum() / want.abs().sum()),
        float((got - want).square().mean().sqrt()),
    )


def _all(x: Tensor) -> bool:
    """Whether all of `x` holds; False also where that cannot be known, inside torch.compile."""
    return not torch.compiler.is_compiling() and bool(x.all())


def _seen(call: Call) -> Tensor | None:
    """Which keys anyone may see, bool `[B|1, H_kv|1, N_k]`; None for all."""
    seen = (call.view.pos != HIDDEN).all(-1)
    if _all(seen):
        return None
    heads = call.k.shape[1]
    if seen.shape[1] not in (1, heads):
        seen = seen.unflatten(1, (heads, -1)).any(2)
    return seen


def _mean(x: Tensor, seen: Tensor | None, wide: torch.dtype) -> Tensor:
    """The mean token `[B, H, 1, D]` of those that are seen and finite."""
    if not x.shape[2]:
        return x.new_zeros(*x.shape[:2], 1, x.shape[3], dtype=wide)
    mean = x.mean(2, keepdim=True, dtype=wide)
    if seen is None and _all(mean.isfinite()):
        return mean
    counted = x.isfinite().all(-1, keepdim=True)
    if seen is not None:
        counted = counted & seen.unsqueeze(3)
    total = x.to(wide).masked_fill(~counted, 0).sum(2, keepdim=True)
    return total / counted.sum(2, keepdim=True).clamp(min=1)


def _block_means(q: Tensor) -> Tensor:
    """Means of 128 consecutive queries `[B, H, T, D]`; queries that are not finite count as 0."""
    n = q.shape[2]
    tiles = -(-n // QUERY_BLOCK)
    padded = q.new_zeros(*q.shape[:2], tiles * QUERY_BLOCK, q.shape[3])
    padded[:, :, :n] = q
    if not _all(q.isfinite()):
        padded.masked_fill_(~padded.isfinite().all(-1, keepdim=True), 0)
    counts = (n - torch.arange(tiles, device=q.device) * QUERY_BLOCK).clamp(max=QUERY_BLOCK)
    return padded.unflatten(2, (tiles, QUERY_BLOCK)).sum(3) / counts.view(1, 1, -1, 1)


def _by_group(x: Tensor, y: Tensor) -> Tensor:
    """`x [B, H_q, N, D]` times `y [B, H_kv, D, M]` of its kv head."""
    heads, kv_heads = x.shape[1], y.shape[1]
    grouped = x.unflatten(1, (kv_heads, heads // kv_heads)) @ y.unsqueeze(2)
    return grouped.flatten(1, 2)


def _shared(largest: Tensor, group: str, side: int) -> Tensor:
    """The largest of each token's group, `[B, H, N]`."""
    n = largest.shape[2]
    if not n or group == "token":
        return largest
    if group == "tensor":
        return largest.amax(2, keepdim=True).expand_as(largest)
    size, *fold = GROUPS[group][side]
    blocks = -(-n // size)
    padded = torch.nn.functional.pad(largest, (0, blocks * size - n)).unflatten(2, (blocks, *fold))
    return padded.amax((3, 5), keepdim=True).expand_as(padded).flatten(2)[:, :, :n]


def _with_bias(call: Call, bias: Tensor) -> dict:
    """Fields of a call whose scores have `bias [B, H, T, N_k]`, a row for every block of queries, added."""
    if call.bias is None or call.bias.shape[2] == 1:
        return {
            "bias": bias if call.bias is None else bias + call.bias.to(bias.dtype),
            "bias_rows": QUERY_BLOCK,
        }
    rows = bias.repeat_interleave(QUERY_BLOCK, 2)[:, :, : call.q.shape[2]]
    return {"bias": rows + call.bias.to(bias.dtype)}


def _restore(
    partial: Partial, shift: Tensor | None, channel: Tensor | None, middle: Tensor | None
) -> Partial:
    """The partial of the call before it was quantised."""
    out, lse = partial
    if channel is not None:
        wide = out.to(channel.dtype) * channel
        if middle is not None:
            wide = torch.where((lse == -torch.inf).unsqueeze(3), 0, wide + middle)
        out = wide.to(out.dtype)
    return Partial(out, lse if shift is None or lse is None else lse + shift)
