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
from tilewise.kernels.attend_tiles.lists import by_rows
from tilewise.tiles import Partial, TileMap, Tiling, Visibility
from tilewise.tiles.visibility import take, to_heads

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

    Heads that share a list share its gathering. Of a bias, too, only what the lists name is read. Where a gradient
    is needed keys and values are gathered first, which holds N_q x K copies; in float32, in which the gradients of
    the copies of a key are added up, and rounded once.

    Args:
        index: int32 or int64 `[B|1, H, N_q, K]`, tokens that each query reads, -1 for none; no token twice in a
            list. H is 1 (all heads share a list), the kv heads or the query heads.

    The pass's view is that of the tokens; its tiles and orders must be None. Raises ValueError for a boolean grid
    in the view, for heads that share a list but not a mask, and for lists that do not fit the call.
    """

    index: Tensor
    by_query: ClassVar[bool] = True

    def apply(self, call: Call) -> Applied:
        (b, heads, n_q, _), kv_heads, groups = call.q.shape, call.k.shape[1], self.index.shape[1]
        if self.index.shape[0] not in (1, b) or self.index.shape[2] != n_q:
            raise ValueError(
                f"lists must be [{b}, H, {n_q}, K] for this call, got {list(self.index.shape)}: choose again"
            )
        if groups not in (1, kv_heads, heads):
            raise ValueError(f"lists must be for 1, {kv_heads} or {heads} heads, got {groups}")
        if call.view.dense is not None:
            raise ValueError("token-level selection takes masks made of positions, not a boolean grid")
        view = call.view
        lo, hi, pos, q_pos = (_for_lists(x, groups) for x in (view.lo, view.hi, view.pos, view.q_pos))
        made = replace(call, view=Visibility(lo, hi, pos, q_pos), tiles=None, lists=self.index)
        given = (call.q, call.k, call.v, call.bias)
        if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)):
            return Applied(made, lambda partial: partial)
        dtype, low = call.v.dtype, call.v.dtype in (torch.float16, torch.bfloat16)
        if low:
            bias = None if call.bias is None else call.bias.float()
            made = replace(made, q=call.q.float(), k=call.k.float(), v=call.v.float(), bias=bias)
        made, restore = by_rows(made, gathered=True)

        def narrow(partial: Partial) -> Partial:
            partial = restore(partial)
            return partial._replace(out=partial.out.to(dtype)) if low else partial

        return Applied(made, narrow)

    def cost(self, view: Visibility) -> Tensor | None:
        return (self.index >= 0).sum((2, 3)).double()

    def read(self, queries: Tensor) -> Tensor | None:
        return self.index[:, :, queries].long()


def _for_lists(x: Tensor, groups: int) -> Tensor:
    """Metadata per head as metadata per list: `[b, h, ...]` to `[b, groups|1, ...]`, repeated or shared."""
    if x.shape[1] in (1, groups):
        return x
    if x.shape[1] < groups:
        return to_heads(x, groups)
    if not torch.compiler.is_compiling() and bool((x != x[:, :1]).any()):
        raise ValueError("heads that share a list must share a mask")
    return x[:, :1]
