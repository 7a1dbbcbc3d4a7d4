"""Visibility: which key each query may see, held as one box of positions per query."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tilewise.tiles.tiling import Tiling, to_heads

NONE, PARTIAL, FULL = 0, 1, 2  # how much of a tile may be seen
FAR = 2**61  # beyond every position
HIDDEN = -(2**62)  # the position of a key that nobody sees


@dataclass(frozen=True, eq=False)
class Visibility:
    """A mask bound to given sequences: query i sees key j when `lo[i] <= pos[j] <= hi[i]` on every axis.

    Causal, window, document, block-causal and prefix masks, and all their conjunctions, are such boxes: a few
    integers per token instead of a grid. A mask that is no box is carried as `dense`.

    Args:
        lo, hi: int64 `[B|1, H_q|1, N_q, A]`, inclusive limits per query on A position axes (usually one).
        pos: int64 `[B|1, H_kv|1, N_k, A]`, positions of the keys.
        q_pos: int64 `[B|1, H|1, N_q]`, positions of the queries.
        dense: bool `[B|1, H|1, N_q, N_k]` or None; True = may be seen.
        simple: "everything" or "causal" when the mask is exactly that and positions are the usual ones (a hint
            that lets an engine take a short cut), else None.
    """

    lo: Tensor
    hi: Tensor
    pos: Tensor
    q_pos: Tensor
    dense: Tensor | None = None
    simple: str | None = None

    @classmethod
    def everything(cls, q_pos: Tensor, k_pos: Tensor) -> Visibility:
        """Every query sees every key; `q_pos [B|1, H|1, N_q]`, `k_pos [B|1, H|1, N_k]`."""
        far = torch.full_like(q_pos, FAR).unsqueeze(-1)
        return cls(-far, far, k_pos.unsqueeze(-1), q_pos)

    @property
    def k_pos(self) -> Tensor:
        """Positions of the keys on the first axis, `[B|1, H|1, N_k]`."""
        return self.pos[..., 0]

    def limit(self, lo: Tensor | int | None = None, hi: Tensor | int | None = None) -> Visibility:
        """Narrow the first axis: `lo`, `hi` int or `[B|1, H|1, N_q]`."""
        new_lo = self.lo if lo is None else _narrow(self.lo, lo, torch.maximum)
        new_hi = self.hi if hi is None else _narrow(self.hi, hi, torch.minimum)
        new_lo, new_hi = torch.broadcast_tensors(new_lo, new_hi)
        return replace(self, lo=new_lo, hi=new_hi, simple=None)

    def with_axis(self, lo: Tensor, hi: Tensor, pos: Tensor) -> Visibility:
        """Add a position axis: `lo`, `hi [B|1, H|1, N_q]`, `pos [B|1, H|1, N_k]`."""
        hidden = self.k_pos == HIDDEN
        pos = pos.masked_fill(hidden, HIDDEN)
        new_lo, new_hi = torch.broadcast_tensors(_stack(self.lo, lo), _stack(self.hi, hi))
        return replace(self, lo=new_lo, hi=new_hi, pos=_stack(self.pos, pos), simple=None)

    def hide(self, hidden: Tensor) -> Visibility:
        """Hide keys from everybody: `hidden` bool `[B|1, H|1, N_k]`."""
        shape = torch.broadcast_shapes(hidden.shape, self.k_pos.shape)
        pos = self.pos.expand(*shape, -1).masked_fill(hidden.unsqueeze(-1), HIDDEN)
        return replace(self, pos=pos, simple=None)

    def with_dense(self, dense: Tensor) -> Visibility:
        """Narrow by a boolean grid `[B|1, H|1, N_q, N_k]`."""
        return replace(self, dense=dense if self.dense is None else self.dense & dense, simple=None)

    def tokens(self) -> Tensor:
        """The whole grid, bool `[B|1, H|1, N_q, N_k]`. For definitions and tests: it is N_q x N_k."""
        heads = max(x.shape[1] for x in (self.lo, self.pos, self.dense) if x is not None)
        pos = to_heads(self.pos, heads).unsqueeze(2)
        lo, hi = (to_heads(x, heads).unsqueeze(3) for x in (self.lo, self.hi))
        seen = ((lo <= pos) & (pos <= hi)).all(-1)
        return seen if self.dense is None else seen & to_heads(self.dense, heads)

    def keys_seen(self) -> Tensor:
        """Bool `[B|1, H|1, N_k]`: keys that padding does not hide from everybody."""
        return self.k_pos != HIDDEN

    def same(self, other: Visibility) -> bool:
        """Whether both are made of the same numbers; while compiling, which cannot look at them, True."""
        pairs = [(self.lo, other.lo), (self.hi, other.hi), (self.pos, other.pos), (self.dense, other.dense)]
        if torch.compiler.is_compiling():
            return True
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    def permute(self, q_order: Tensor | None, k_order: Tensor | None) -> Visibility:
        """The same visibility with tokens re-ordered: `q_order [B|1, H|1, N_q]`, `k_order [B|1, H|1, N_k]`."""
        dense = self.dense
        if dense is not None and q_order is not None:
            dense = take(dense, q_order)
        if dense is not None and k_order is not None:
            heads = max(dense.shape[1], k_order.shape[1])
            columns = to_heads(dense, heads).transpose(2, 3)
            dense = take(columns, to_heads(k_order, heads)).transpose(2, 3)
        return Visibility(
            lo=take(self.lo, q_order),
            hi=take(self.hi, q_order),
            pos=take(self.pos, k_order),
            q_pos=take(self.q_pos, q_order),
            dense=dense,
        )

    def tiles(self, q_tiling: Tiling, k_tiling: Tiling) -> Tensor:
        """Classify every tile as NONE, PARTIAL or FULL: int8 `[B|1, H, T_q, T_k]`, from O(N) metadata.

        H is 1, the kv heads or the query heads, whichever the metadata tells apart (see `to_heads`).

        NONE and FULL are certain; PARTIAL may be said of a tile that is in fact wholly seen or unseen.
        """
        hidden = self.pos == HIDDEN
        parts = [
            *_extent(self.lo, q_tiling),
            *_extent(self.hi, q_tiling),
            k_tiling.split(self.pos.masked_fill(hidden, FAR), FAR).amin(3),
            k_tiling.split(self.pos, HIDDEN).amax(3),
            k_tiling.split(hidden[..., 0], False).any(-1),
        ]
        if self.dense is not None:
            parts.append(_tile_grid(self.dense, q_tiling, k_tiling, False).any(-1))
            parts.append(_tile_grid(self.dense, q_tiling, k_tiling, True).all(-1))
        heads = max(x.shape[1] for x in parts)
        lo_min, lo_max, hi_min, hi_max, pos_min, pos_max, some_hidden, *grids = (
            to_heads(x, heads) for x in parts
        )

        none = torch.zeros((), dtype=torch.bool, device=self.pos.device)
        full = ~none
        for axis in range(self.lo.shape[-1]):
            first, last = pos_min[..., axis].unsqueeze(2), pos_max[..., axis].unsqueeze(2)
            none = none | (hi_max[..., axis].unsqueeze(3) < first) | (lo_min[..., axis].unsqueeze(3) > last)
            full = full & (lo_max[..., axis].unsqueeze(3) <= first) & (last <= hi_min[..., axis].unsqueeze(3))
        full = full & ~some_hidden.unsqueeze(2)
        if grids:
            none, full = none | ~grids[0], full & grids[1]
        return torch.where(none, NONE, torch.where(full, FULL, PARTIAL)).to(torch.int8)


def take(x: Tensor, order: Tensor | None) -> Tensor:
    """Re-order tokens: `x [b, h, N, ...]` by `order [b', h', N']`; sizes 1 broadcast."""
    if order is None:
        return x
    batch, heads = torch.broadcast_shapes(x.shape[:2], order.shape[:2])
    order = order.expand(batch, heads, -1)
    index = order.reshape(*order.shape, *[1] * (x.ndim - 3)).expand(-1, -1, -1, *x.shape[3:])
    return x.expand(batch, heads, *x.shape[2:]).gather(2, index)


def _narrow(current: Tensor, new: Tensor | int, pick) -> Tensor:
    if not isinstance(new, Tensor):
        new = torch.full_like(current[..., 0], new)
    first = pick(*torch.broadcast_tensors(current[..., 0], new)).unsqueeze(-1)
    if current.shape[-1] == 1:
        return first
    return torch.cat([first, current[..., 1:].expand(*first.shape[:3], -1)], -1)


def _stack(current: Tensor, new: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(current.shape[:3], new.shape)
    return torch.cat([current.expand(*shape, -1), new.expand(shape).unsqueeze(-1)], -1)


def _extent(limits: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Smallest and largest limit within each tile, `[b, h, T, A]`; empty slots never count."""
    return tiling.split(limits, FAR).amin(3), tiling.split(limits, -FAR).amax(3)


def _tile_grid(dense: Tensor, q_tiling: Tiling, k_tiling: Tiling, fill: bool) -> Tensor:
    """`[b, h, N_q, N_k]` to `[b, h, T_q, T_k, size_q * size_k]`."""
    rows = q_tiling.split(dense, fill)  # [b, h, T_q, s_q, N_k]
    b, h, t_q, s_q, n_k = rows.shape
    columns = rows.permute(0, 1, 4, 2, 3).reshape(b, h, n_k, t_q * s_q)
    grid = k_tiling.split(columns, fill)  # [b, h, T_k, s_k, t_q * s_q]
    grid = grid.unflatten(4, (t_q, s_q)).permute(0, 1, 4, 2, 5, 3)
    return grid.flatten(4)
