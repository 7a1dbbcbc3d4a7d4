"""Precision: in how many bits the tiles that are paid for are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from tilewise.kernels.attend_tiles import Call
from tilewise.kernels.attend_tiles.rounding import Fold, means, round_tokens
from tilewise.tiles import Partial
from tilewise.tiles.visibility import HIDDEN, to_heads

LARGEST = {"int8": 127, "int4": 7}
FP8 = torch.float8_e4m3fn
QUERY_BLOCK = 128  # queries that are smoothed together

# How queries and how keys share a scale. A GPU thread of the paper's kernel holds every eighth query of a warp's
# 32, and of a block of 64 keys two neighbours out of every eight.
GROUPS: dict[str, tuple[Fold, Fold]] = {
    "token": (Fold(1, 1, 1, 1), Fold(1, 1, 1, 1)),
    "thread": (Fold(32, 4, 8, 1), Fold(64, 8, 4, 2)),
    "warp": (Fold(32, 32, 1, 1), Fold(64, 64, 1, 1)),
    "block": (Fold(128, 128, 1, 1), Fold(64, 64, 1, 1)),
    "tensor": (Fold(0, 1, 1, 1), Fold(0, 1, 1, 1)),
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
        for name, known in (("qk", LARGEST), ("pv", ("native", "fp8")), ("group", GROUPS)):
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
        most, (q_fold, k_fold) = LARGEST[self.qk], GROUPS[self.group]
        q = round_tokens(call.q, most, q_fold, smooth=QUERY_BLOCK if self.smooth_q else 0)
        n_k = call.k.shape[2]
        k = round_tokens(call.k, most, k_fold, smooth=n_k if self.smooth_k else 0, seen=seen)
        changes: dict = {"q": q.integers, "q_scale": q.scale, "k": k.integers, "k_scale": k.scale}
        shift = None
        if k.mean is not None and n_k and call.need_lse:
            shift = call.scale * _by_group(call.q.to(k.mean.dtype), k.mean.mT).squeeze(3)
        if q.mean is not None:
            keys = call.k.to(q.mean.dtype)
            keys = keys if k.mean is None or not n_k else keys - k.mean
            changes |= _with_bias(call, call.scale * _by_group(q.mean, keys.mT))
        if self.pv == "native":
            return Applied(replace(call, **changes), lambda partial: _restore(partial, shift, None, None))
        v, scales, centres = self._values(call.v, seen)
        changes |= {"v": v, "weights": FP8, "need_lse": True}
        channel, middle = (None if x is None else to_heads(x, call.q.shape[1]) for x in (scales, centres))
        return Applied(replace(call, **changes), lambda partial: _restore(partial, shift, channel, middle))

    def _values(self, v: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values in steps of E4M3 (in their own dtype), scale and mean of each channel `[B, H_kv, 1, D_v]`."""
        wide = torch.float64 if v.dtype == torch.float64 else torch.float32
        x = v.to(wide)
        finite, middle = x.isfinite(), None
        if self.smooth_v and v.shape[2]:
            counted = finite.all(-1)
            middle = means(x, counted if seen is None else counted & seen, v.shape[2])
            x = x - middle
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


def _by_group(x: Tensor, y: Tensor) -> Tensor:
    """`x [B, H_q, N, D]` times `y [B, H_kv, D, M]` of its kv head."""
    heads, kv_heads = x.shape[1], y.shape[1]
    grouped = x.unflatten(1, (kv_heads, heads // kv_heads)) @ y.unsqueeze(2)
    return grouped.flatten(1, 2)


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
