"""What a pass reads in place of the keys themselves: means of tiles, a weighted sample, a list for each query.

Each is a change of the kernel's call, as a precision is: it gives the call to run and how the result is restored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tilewise.attention.precisions import Applied
from tilewise.kernels.attend_tiles import Call
from tilewise.tiles import Partial, TileMap, Tiling, Visibility
from tilewise.tiles.visibility import HIDDEN, take, to_heads

AT_ONCE = 1 << 23  # numbers in a temporary: 32 MiB of float32


class Reads(Protocol):
    """Says what a pass reads.

    `by_query` says whether queries have lists of their own; the pass's view is then that of the tokens.
    """

    by_query: ClassVar[bool]

    def apply(self, call: Call) -> Applied:
        """The call to run. `call` has the keys and values in their own order, and the pass's view and tiles."""

    def cost(self, view: Visibility) -> Tensor | None:
        """Scores computed, float64 `[B|1, H|1]`; None where the tiles of the pass say it."""

    def read(self, queries: Tensor) -> Tensor | None:
        """Which token each entry of the key axis is for these queries: int64 `[B|1, H|1, len(queries)|1, M]`.

        -1 is none. None where entries are no tokens. For drawings and tests.
        """


@dataclass(frozen=True, eq=False)
class Means:
    """Keys and values replaced by their means over the tiles of a tiling, each standing for its count of tokens.

    The log of the count is added to the scores, so that a mean weighs as much as that many keys equal to it.

    Args:
        tiling: over the keys, in `order`. order: int64 `[B|1, H_kv|1, N_k]`; None = as given.
        seen: bool `[B|1, H_kv|1, N_k]` in the keys' own order, tokens that count (padding does not).
        slope: also add the first order of the expansion around the means, `slope * scale * q C`, where C is the
            mean of `(k - mean of its tile) v^T` over the tokens that a tile of queries reads as means: what scores
            within tiles have to do with values. Tiles weigh alike in it, whatever their scores. 1, or 0 to leave
            it out.

    Raises ValueError for a bias per key, which has no meaning for means of keys, and with `slope` for a soft cap.
    """

    tiling: Tiling
    order: Tensor | None = None
    seen: Tensor | None = None
    slope: float = 0.0
    by_query: ClassVar[bool] = False

    def apply(self, call: Call) -> Applied:
        if call.bias is not None:
            raise ValueError(
                "a pooled remainder takes no bias: a bias per key has no meaning for means of keys"
            )
        if self.slope and call.softcap is not None:
            raise ValueError("the first order of a pooled remainder takes no softcap, which bends scores")
        k, v = take(call.k, self.order), take(call.v, self.order)
        seen = None if self.seen is None else take(self.seen, self.order)
        (keys, counts), (values, _) = (self.tiling.mean(x, seen) for x in (k, v))
        weight = counts.clamp(min=1).to(keys.dtype).log()
        bias = to_heads(weight, call.q.shape[1]).unsqueeze(2)  # [b, h, 1, T]
        made = replace(call, k=keys.to(k.dtype), v=values.to(v.dtype), bias=bias)
        if not self.slope:
            return Applied(made, lambda partial: partial)
        tiles = (
            TileMap.everything(call.q.shape[2], keys.shape[2], k.device) if call.tiles is None else call.tiles
        )
        shift = self._first_order(call, tiles, k, v, seen, keys, counts) * (self.slope * call.scale)

        def restore(partial: Partial) -> Partial:
            moved = partial.out.to(shift.dtype) + shift.masked_fill(
                (partial.lse == -torch.inf).unsqueeze(-1), 0
            )
            return partial._replace(out=moved.to(partial.out.dtype))

        return Applied(replace(made, need_lse=True), restore)

    def _first_order(self, call: Call, tiles: TileMap, k, v, seen, keys: Tensor, counts: Tensor) -> Tensor:
        """`q C` of each query, C over the means that its tile reads: `[B, H_q, N_q, D_v]`."""
        wide, (b, heads, n_q, _) = keys.dtype, call.q.shape
        kv_heads, n_means = keys.shape[1:3]
        centred = self.tiling.split(k.to(wide), 0) - keys.unsqueeze(3)
        filled = torch.ones(1, 1, k.shape[2], dtype=torch.bool, device=k.device) if seen is None else seen
        filled = to_heads(self.tiling.split(filled, False), kv_heads).unsqueeze(-1)  # [b|1, h|1, T, size, 1]
        centred = centred.masked_fill(~filled, 0)
        values = self.tiling.split(v.to(wide), 0).masked_fill(~filled, 0)
        moments = (centred.mT @ values).flatten(3)  # [b, h_kv, T, d * d_v]
        keep = to_heads(tiles.keep, heads).expand(b, heads, -1, -1)
        # A tile of the pass holds one mean or several.
        keep = keep.repeat_interleave(tiles.k_tiling.size, 3)[..., :n_means].to(wide)
        tokens = (keep * to_heads(counts, heads).unsqueeze(2)).sum(-1, keepdim=True).clamp(min=1)
        rows = tiles.q_tiling.split(take(call.q, call.q_order).to(wide), 0)  # [b, h, T_q, size, d]
        out, step = [], max(1, AT_ONCE // max(1, b * heads * moments.shape[3]))
        if torch.compiler.is_compiling():  # a loop over lengths would compile again for each
            step = max(1, rows.shape[2])
        for start in range(0, rows.shape[2], step):
            some = slice(start, start + step)
            share = (keep[:, :, some] / tokens[:, :, some]).unflatten(1, (kv_heads, heads // kv_heads))
            mean = (share.flatten(2, 3) @ moments).view(b, heads, -1, k.shape[3], v.shape[3])
            out.append(rows[:, :, some] @ mean)
        shift = tiles.q_tiling.join(torch.cat(out, 2), n_q)
        return shift if call.q_order is None else take(shift, call.q_order.argsort(-1))

    def cost(self, view: Visibility) -> Tensor | None:
        return None

    def read(self, queries: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True, eq=False)
class Sample:
    """Some of the keys, the same for all queries of a head, each with a weight.

    A key drawn with probability p stands for 1 / p keys when its log weight is -log p, which makes sums over the
    sample unbiased. `view` and `tiles` of the pass speak of the sample.

    Args:
        index: int64 `[B|1, H_kv|1, M]`, tokens read, in any order. log_weight: float `[B|1, H_kv|1, M]` added to
            their scores; None = 0. A column that is to be left out is hidden in the pass's view.
    """

    index: Tensor
    log_weight: Tensor | None = None
    by_query: ClassVar[bool] = False

    def apply(self, call: Call) -> Applied:
        bias = call.bias
        if bias is not None and bias.shape[3] != 1:
            heads = max(bias.shape[1], self.index.shape[1])
            columns = take(to_heads(bias, heads).transpose(2, 3), to_heads(self.index, heads))
            bias = columns.transpose(2, 3)
        if self.log_weight is not None:
            weight = to_heads(self.log_weight, call.q.shape[1]).unsqueeze(2)
            bias = weight if bias is None else bias + weight.to(bias.dtype)
        k, v = take(call.k, self.index), take(call.v, self.index)
        return Applied(replace(call, k=k, v=v, bias=bias), lambda partial: partial)

    def cost(self, view: Visibility) -> Tensor | None:
        return None

    def read(self, queries: Tensor) -> Tensor | None:
        return self.index.unsqueeze(2)


@dataclass(frozen=True, eq=False)
class Lists:
    """A list of keys for every query: token-level selection.

    Every query becomes a sequence of its own over a cache whose pages hold one token, so the engine that decodes
    from paged caches runs it. Heads that share a list share its gathering. Where a gradient is needed the keys
    are gathered instead, which holds N_q x K of them.

    Args:
        index: int64 `[B, H|1, N_q, K]`, tokens that each query reads, -1 for none; no token twice in a list. H is
            1 (all heads share a list), the kv heads or the query heads.

    The pass's view is that of the tokens; its tiles and orders must be None. Raises ValueError for a bias.
    """

    index: Tensor
    by_query: ClassVar[bool] = True

    def apply(self, call: Call) -> Applied:
        if call.bias is not None:
            raise ValueError("token-level selection takes no bias")
        b, heads, n_q, d = call.q.shape
        kv_heads, n_k, d_v = call.k.shape[1], call.k.shape[2], call.v.shape[3]
        groups = self.index.shape[1]
        index = self.index.expand(b, -1, -1, -1)
        rows, listed = b * groups * n_q, index.shape[3]
        share_q, share_k = heads // groups, max(1, kv_heads // groups)
        q = call.q.unflatten(1, (groups, share_q)).transpose(2, 3).reshape(rows, share_q, 1, d)
        # Pages of one token: all tokens of the heads that a list serves, list after list.
        own = torch.arange(groups, device=index.device) // max(1, groups // kv_heads)
        first = torch.arange(b, device=index.device).view(b, 1) * min(groups, kv_heads) + own
        pages = (first.view(b, groups, 1, 1) * n_k + index.clamp(min=0)).reshape(rows, listed)
        view = self._view(call.view, index, heads)
        pools = [self._pool(x, share_k) for x in (call.k, call.v)]
        made = replace(call, q=q, k=pools[0], v=pools[1], view=view, tiles=None, q_order=None, pages=pages)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
            made = made.gathered()

        def restore(partial: Partial) -> Partial:
            out = partial.out.view(b, groups, n_q, share_q, d_v).transpose(2, 3).reshape(b, heads, n_q, d_v)
            lse = partial.lse
            if lse is not None:
                lse = lse.view(b, groups, n_q, share_q).transpose(2, 3).reshape(b, heads, n_q)
            return Partial(out, lse)

        return Applied(made, restore)

    @staticmethod
    def _pool(x: Tensor, share: int) -> Tensor:
        """`[B, H_kv, N, D]` as pages of one token, `[B * (H_kv / share) * N, share, 1, D]`."""
        b, heads, n, d = x.shape
        return x.unflatten(1, (heads // share, share)).transpose(2, 3).reshape(-1, share, 1, d)

    @staticmethod
    def _view(view: Visibility, index: Tensor, heads: int) -> Visibility:
        """What every query, now a sequence of its own, sees of its list."""
        b, groups, n_q, listed = index.shape
        if view.dense is not None:
            raise ValueError("token-level selection takes masks made of positions, not a boolean grid")

        def rows(x: Tensor) -> Tensor:  # [b|1, h|1, n_q, a] to [rows, 1, 1, a]
            x = x if x.shape[1] in (1, groups) else _first_of_group(x, groups)
            return x.expand(b, groups, n_q, -1).reshape(-1, 1, 1, x.shape[3])

        axes = view.pos.shape[3]
        pos = view.pos if view.pos.shape[1] in (1, groups) else _first_of_group(view.pos, groups)
        pos = pos.expand(b, groups, -1, -1)
        flat = index.clamp(min=0).flatten(2).unsqueeze(-1).expand(-1, -1, -1, axes)
        got = pos.gather(2, flat).view(b, groups, n_q, listed, axes)
        got = got.masked_fill((index < 0).unsqueeze(-1), HIDDEN).reshape(-1, 1, listed, axes)
        lo, hi = (rows(x) for x in torch.broadcast_tensors(view.lo, view.hi))
        return Visibility(lo, hi, got, rows(view.q_pos.unsqueeze(-1))[..., 0])

    def cost(self, view: Visibility) -> Tensor | None:
        return (self.index >= 0).sum((2, 3)).double()

    def read(self, queries: Tensor) -> Tensor | None:
        return self.index[:, :, queries]


def _first_of_group(x: Tensor, groups: int) -> Tensor:
    """Metadata per head as metadata per list: `[b, h, ...]` to `[b, groups, ...]`, repeated or shared."""
    if x.shape[1] < groups:
        return to_heads(x, groups)
    if not torch.compiler.is_compiling() and bool((x != x[:, :1]).any()):
        raise ValueError("heads that share a list must share a mask")
    return x[:, :1]
