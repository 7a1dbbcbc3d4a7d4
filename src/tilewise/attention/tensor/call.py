"""The arguments of one call of tensor attention, checked, and the mask bound to each sequence of keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.tiles import Mask, Visibility, as_mask


@dataclass(frozen=True, eq=False)
class Call:
    """Attention of order m = len(keys) + 1: every query weighs every tuple of one key from each sequence.

    Attributes:
        q: `[B, H_q, N_q, D]`. keys: m - 1 tensors `[B, H_kv, N_t, D]`. values: as many, `[B, H_kv, N_t, D_v]`.
            Keys and values that nobody may see (padding) are zeros.
        views: the mask bound to each sequence of keys; a tuple is visible where each of its keys is.
        scale: factor of the scores.
    """

    q: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    views: tuple[Visibility, ...]
    scale: float

    @classmethod
    def bind(
        cls,
        q: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        mask: Mask | Tensor | str | None = None,
        scale: float | None = None,
    ) -> Call:
        """Check the arguments and bind the mask. Raises ValueError or TypeError naming what does not fit."""
        keys, values = tuple(keys), tuple(values)
        _check(q, keys, values)
        mask = as_mask(mask)
        lengths = {k.shape[2] for k in keys}
        bound = {n: mask.bind(q.shape[2], n, device=q.device) for n in lengths}
        for view in bound.values():
            _check_view(view, q.shape[0], q.shape[1])
        views = tuple(bound[k.shape[2]] for k in keys)
        keys = tuple(_without_padding(x, view) for x, view in zip(keys, views))
        values = tuple(_without_padding(x, view) for x, view in zip(values, views))
        return cls(q, keys, values, views, 1 / q.shape[3] if scale is None else float(scale))

    @property
    def order(self) -> int:
        """m: 3 for pairs of keys."""
        return len(self.keys) + 1

    @property
    def kv_heads(self) -> int:
        return self.keys[0].shape[1]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of accumulation: float32, or float64 for float64 inputs."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


def fold(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, H_q, N, D]` to `[B, H_kv, G N, D]`: the queries that read one head of keys, G = H_q / H_kv, in a row."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).flatten(2, 3)


def unfold(x: Tensor, heads: int) -> Tensor:
    """The inverse of `fold`: `[B, H_kv, G N, ...]` to `[B, H_q, N, ...]`."""
    group = heads // x.shape[1]
    return x.unflatten(2, (group, x.shape[2] // group)).flatten(1, 2)


def _without_padding(x: Tensor, view: Visibility) -> Tensor:
    keep = view.keys_seen()
    if keep.shape[1] not in (1, x.shape[1]) or bool(keep.all()):
        return x
    return x.masked_fill(~keep.unsqueeze(-1), 0)  # padding may be NaN, and 0 * NaN is NaN


def _check(q: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    if not keys or len(keys) != len(values):
        raise ValueError(
            f"keys and values must be as many, one or more, got {len(keys)} keys and {len(values)} values"
        )
    named = [("q", q)]
    for t, (k, v) in enumerate(zip(keys, values), 1):
        named += [(f"k{t}", k), (f"v{t}", v)]
    for name, x in named:
        if not isinstance(x, Tensor) or x.ndim != 4:
            given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor [B, H, N, D], got {given}")
        if not x.is_floating_point() or x.dtype != q.dtype or x.device != q.device:
            raise TypeError(
                f"all inputs must share one floating dtype and device, got q {q.dtype} on {q.device} and"
                f" {name} {x.dtype} on {x.device}"
            )
    (b, heads, _, d), kv_heads, d_v = q.shape, keys[0].shape[1], values[0].shape[3]
    if d < 1 or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"q must have head_dim >= 1 and a multiple of the kv heads, got head_dim {d}, {heads} query heads"
            f" and {kv_heads} kv heads"
        )
    for t, (k, v) in enumerate(zip(keys, values), 1):
        if (k.shape[0], k.shape[1], k.shape[3]) != (b, kv_heads, d):
            raise ValueError(f"k{t} must be [{b}, {kv_heads}, N, {d}] like q and k1, got {list(k.shape)}")
        if v.shape != (*k.shape[:3], d_v):
            raise ValueError(f"v{t} must be {[*k.shape[:3], d_v]} like k{t} and v1, got {list(v.shape)}")


def _check_view(view: Visibility, batch: int, heads: int) -> None:
    for name, axis, size in (("batch", 0, batch), ("heads", 1, heads)):
        parts = [view.lo, view.pos, *([] if view.dense is None else [view.dense])]
        have = {x.shape[axis] for x in parts}
        if not have <= {1, size}:
            raise ValueError(f"the mask has {max(have)} {name}, the call has {size}")
