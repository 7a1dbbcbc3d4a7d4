"""S2O: keys read from the most to the least important, until they no longer add anything."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.precisions import Applied
from tilewise.attention.scores import AT_ONCE
from tilewise.kernels.attend_tiles import Call
from tilewise.tiles import NONE, Partial, TileMap, Tiling, Visibility
from tilewise.tiles.visibility import HIDDEN, take, to_heads


@dataclass(frozen=True)
class S2O(Method):
    """Early stopping over keys permuted online (Zhang et al., 2026, arXiv 2602.22575).

    Queries are taken in segments. A segment reads its own keys in full; all other keys that it sees are ranked by
    their product with the mean of its queries, and its queries by their product with the mean of the best ranked
    keys. Tiles of the ranked keys are then read from the first on, each tile of queries for itself, until a tile
    adds less than `threshold` to the softmax's sum of weights, relative to what was summed before it; that tile is
    the last. Order is an index: keys are reached through a table with pages of one token, and copied nowhere.

    What the threshold promises: where gains fall along the ranking, the `r` tiles that are left hold at most
    `skipped_bound(threshold, r)` of a query's attention. Gains fall for the mean query; for others only as far as
    they are like it.

    Differs from the paper: gains are measured while planning, on `probe` queries of each tile, of which the largest
    counts, where the authors' kernel sees them as it goes; tiles are then known beforehand, and scores of probed
    queries are computed twice. Grouped heads: one ranking per kv head, from the sum over its query heads. How the
    authors' guide for queries is made was not to be found; this is the one of `SegmentSort`. Any mask works:
    ranked are the keys outside a segment that some query of it sees.

    Args:
        segment: queries and keys per segment, a multiple of `tile`. threshold: >= 0; 0 reads everything.
        tile: tokens per tile side. probe: queries of a tile whose gains are measured, at most `tile`.
        queries: also rank queries, for the tiles outside their segment.
    """

    segment: int = 128
    threshold: float = 0.1
    tile: int = 64
    probe: int = 8
    queries: bool = True
    name = "s2o"
    modes = ("train", "prefill", "chunked prefill")
    reads = "q, k"

    def __post_init__(self) -> None:
        if not isinstance(self.tile, int) or self.tile < 1:
            raise ValueError(f"tile must be an integer >= 1, got {self.tile!r}")
        if not isinstance(self.segment, int) or self.segment < 1 or self.segment % self.tile:
            raise ValueError(f"segment must be a multiple of the tile size {self.tile}, got {self.segment!r}")
        if not isinstance(self.threshold, (int, float)) or not self.threshold >= 0:
            raise ValueError(f"threshold must be >= 0, got {self.threshold!r}")
        if not isinstance(self.probe, int) or not 1 <= self.probe <= self.tile:
            raise ValueError(f"probe must be an integer in 1..{self.tile}, got {self.probe!r}")

    @property
    def lookahead(self) -> str:
        """A query's choice depends on the later queries of its segment, which is its tile for that matter."""
        return "tile"

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        n_q, n_k = q.shape[2], k.shape[2]
        if not n_q or not n_k:
            return Plan((Pass(view),), view)
        own = self._own(n_q, n_k, q.device)  # [segments, n_k]
        index = self._ranking(q, k, view, own)
        order = self._query_order(q, k, index) if self.queries else None
        keep = self._read(self._probes(q, k, view, scale, own, index, order), index)
        if not torch.compiler.is_compiling():  # what nobody reads need not be listed
            tiles = max(1, int(keep.flatten(0, 3).any(0).sum()))
            keep, index = keep[..., :tiles], index[..., : tiles * self.tile]
        ranked = Ranked(index, keep, self.segment, self.tile, order)
        local = own[:, :: self.tile].repeat_interleave(self.segment // self.tile, 0)[: -(-n_q // self.tile)]
        tiles_of_own = TileMap(local[None, None], Tiling(self.tile), Tiling(self.tile))
        return Plan((Pass(view, tiles_of_own), Pass(view, reads=ranked)), view)

    def _own(self, n_q: int, n_k: int, device: torch.device) -> Tensor:
        """Keys that each segment of queries reads in full: bool `[segments, N_k]`, in whole segments of keys."""
        # Queries are the last of the sequence; a chunk may begin in the middle of a segment of keys.
        first = torch.arange(0, n_q, self.segment, device=device) + (n_k - n_q)
        last = (first + (self.segment - 1)).clamp(max=n_k - 1)
        begin, end = (x.div(self.segment, rounding_mode="floor").unsqueeze(1) for x in (first, last))
        keys = torch.arange(n_k, device=device).div(self.segment, rounding_mode="floor")
        return (begin <= keys) & (keys <= end)

    def _ranking(self, q: Tensor, k: Tensor, view: Visibility, own: Tensor) -> Tensor:
        """Other keys that each segment sees, most important first: int64 `[B, H_kv, segments, N_k]`, -1 behind."""
        b, heads = q.shape[:2]
        kv_heads, n_k = k.shape[1:3]
        mean = Tiling(self.segment).mean(q)[0].unflatten(1, (kv_heads, -1)).sum(2)
        kinds = to_heads(view.tiles(Tiling(self.segment), Tiling(1)), heads).expand(b, heads, -1, -1)
        seen = (kinds != NONE).unflatten(1, (kv_heads, heads // kv_heads)).any(2) & ~own
        importance = (mean @ k.to(mean.dtype).mT).masked_fill(~seen, -torch.inf)
        order = importance.argsort(dim=-1, descending=True, stable=True)
        return order.masked_fill(~seen.gather(3, order), -1)

    def _query_order(self, q: Tensor, k: Tensor, index: Tensor) -> Tensor:
        """Queries of each segment, best first: int64 `[B, H_q, segments, segment]`, places within the segment."""
        b, heads, n_q, d = q.shape
        best = index[..., : self.tile]
        keys = take(k, best.clamp(min=0).flatten(2)).view(*best.shape, d)
        wide = torch.promote_types(k.dtype, torch.float32)
        guide = keys.masked_fill((best < 0).unsqueeze(-1), 0).sum(3, dtype=wide)  # orders as the mean does
        score = Tiling(self.segment).split(q.to(wide), 0) @ to_heads(guide, heads).unsqueeze(-1)
        real = torch.arange(score.shape[2] * self.segment, device=q.device).view(score.shape[2:4]) < n_q
        return score.squeeze(-1).masked_fill(~real, -torch.inf).argsort(dim=-1, descending=True, stable=True)

    def _probes(self, q, k, view, scale, own: Tensor, index: Tensor, order: Tensor | None) -> _Probes:
        """The queries whose gains are measured, over lists of a segment's own keys and then its ranked ones."""
        b, heads, _, d = q.shape
        local = own.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, : 2 * self.segment]
        local = local.masked_fill(~own.gather(1, local), -1)
        local = pad(local, (0, 2 * self.segment - local.shape[1]), value=-1)
        lists = torch.cat([local.expand(b, k.shape[1], -1, -1), index], -1)
        lists = pad(lists, (0, -lists.shape[3] % self.tile), value=-1)
        every = lists.new_ones(b, heads, lists.shape[2], 1, 1, dtype=torch.bool)
        whole = Ranked(lists, every, self.segment, self.tile)
        probed = torch.arange(self.segment // self.tile, device=q.device).unsqueeze(1) * self.tile
        probed = (probed + torch.arange(self.probe, device=q.device) * self.tile // self.probe).flatten()
        probed = whole.rows(probed.expand(*every.shape[:3], -1) if order is None else order[..., probed])
        queries = take(whole.fold(q, 0), probed) * scale
        seen = whole.view(view).permute(probed, None)
        return _Probes(queries, seen, whole.pages(k.shape[2]), k.reshape(-1, d), self.tile)

    def _read(self, probes: _Probes, index: Tensor) -> Tensor:
        """Tiles of the ranking that are read: bool `[B, H_q, segments, T_q, T_k]`, T_q being those of a segment.

        Gains are taken a few tiles at a time, and only for lists that some tile of queries still reads.
        """
        compiling = torch.compiler.is_compiling()  # which cannot stop where numbers say: it takes all at once
        own, count = 2 * self.segment // self.tile, probes.pages.shape[1] // self.tile
        total = probes.masses(slice(None), 0, own).logsumexp(-1)  # [lists, group, r]
        shape = (*total.shape[:2], self.segment // self.tile)
        keep = torch.zeros(*shape, count - own, dtype=torch.bool, device=index.device)
        reading, first = torch.ones_like(keep[..., 0]), own
        while first < count and (compiling or bool(reading.any())):
            some = slice(None) if compiling else reading.flatten(1).any(1).nonzero().squeeze(1)
            last = count if compiling else min(count, first + probes.at_once())
            mass = probes.masses(some, first, last)
            before = torch.cat([total[some].unsqueeze(-1), mass], -1).logcumsumexp(-1)
            gain = (mass - before[..., :-1]).exp().masked_fill(mass == -torch.inf, 0)
            low = gain.unflatten(2, (shape[2], self.probe)).amax(3) < self.threshold
            reached = low.cumsum(-1) - low.long() == 0  # no tile before it added too little
            keep[some, :, :, first - own : last - own] = reading[some].unsqueeze(-1) & reached
            reading[some] &= ~low.any(-1)
            total[some], first = before[..., -1], last
        listed = Tiling(self.tile).split(index.movedim(3, 2), -1).amax(3).movedim(2, 3) >= 0
        keep = keep.unflatten(0, index.shape[:3]).transpose(2, 3).flatten(1, 2)
        return keep & to_heads(listed, keep.shape[1]).unsqueeze(3)


def skipped_bound(threshold: float, tiles: Tensor | int) -> Tensor:
    """The largest share of a query's attention that `tiles` tiles left unread hold, where gains fall.

    The tile that ended the reading added less than `threshold` t to the sum before it, and none of the r that
    follow adds more: their share is at most r t / (1 + t + r t). Equal keys reach it. `tiles` may be a tensor.
    """
    left = torch.as_tensor(tiles) * threshold
    return left / (1 + threshold + left)


class _Probes(NamedTuple):
    """Scaled queries `[lists, group, r, D]`, what they see of their lists, and where the listed keys lie."""

    queries: Tensor
    view: Visibility
    pages: Tensor
    pool: Tensor
    tile: int

    def masses(self, some: Tensor | slice, first: int, last: int) -> Tensor:
        """Log of the sum of weights in tiles of some lists: `[some, group, r, last - first]`, float32 at least."""
        part, v = slice(first * self.tile, last * self.tile), self.view
        dense = None if v.dense is None else v.dense[some][..., part]
        seen = Visibility(v.lo[some], v.hi[some], v.pos[some][:, :, part], v.q_pos[some], dense).tokens()
        wide = torch.promote_types(self.queries.dtype, torch.float32)
        keys = self.pool[self.pages[some][:, part]].to(wide)
        logits = self.queries[some].to(wide).flatten(1, 2) @ keys.mT
        logits = logits.unflatten(1, self.queries.shape[1:3]).masked_fill(~seen, -torch.inf)
        return logits.unflatten(3, (-1, self.tile)).logsumexp(-1)

    def at_once(self) -> int:
        """How many tiles to take at a time, so that temporaries stay small: at most 8."""
        lists, group, probed, d = self.queries.shape
        return min(8, max(1, AT_ONCE // max(1, lists * self.tile * (group * probed + d))))


@dataclass(frozen=True, eq=False)
class Ranked:
    """A list of keys for every segment of queries, read in tiles, through a table of pages of one token.

    Segments of a kv head's queries become sequences of their own over one pool of keys. For gradients the listed
    keys are gathered instead.

    Args:
        index: int64 `[B, H_kv, segments, M]`, tokens in the order they are read, -1 for none.
        keep: bool `[B, H_q, segments, T_q, T_k]`, tiles of a segment's queries and of its list, that are read.
        segment, tile: their sizes. q_order: int64 `[B, H_q, segments, segment]`; None = as given.

    The pass's view is that of the tokens; its tiles and orders must be None.
    """

    index: Tensor
    keep: Tensor
    segment: int
    tile: int
    q_order: Tensor | None = None
    by_query: ClassVar[bool] = True

    def apply(self, call: Call) -> Applied:
        k, v = (x.reshape(-1, 1, 1, x.shape[3]) for x in (call.k, call.v))
        made = replace(
            call, q=self.fold(call.q, 0), k=k, v=v, view=self.view(call.view), bias=self._bias(call.bias),
            tiles=TileMap(self.rows(self.keep), Tiling(self.tile), Tiling(self.tile)),
            q_order=None if self.q_order is None else self.rows(self.q_order),
            pages=self.pages(call.k.shape[2]),
        )  # fmt: skip
        changing = (call.q, call.k, call.v, call.bias)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in changing):
            made = made.gathered()

        # Not a slice: whether its memory has gaps would be asked when compiling, and change with the length.
        real = torch.arange(call.q.shape[2], device=call.q.device)

        def restore(partial: Partial) -> Partial:
            parts = (x.unflatten(0, self.index.shape[:3]).transpose(2, 3).flatten(3, 4) for x in partial)
            return Partial(*(x.flatten(1, 2).index_select(2, real) for x in parts))

        return Applied(made, restore)

    def pages(self, keys: int) -> Tensor:
        """Where each listed token lies in the pool of all kv heads' `keys` tokens: `[B * H_kv * segments, M]`."""
        listed = self.index.flatten(0, 2)
        first = torch.arange(listed.shape[0], device=listed.device) // self.index.shape[2] * keys
        return first.unsqueeze(1) + listed.clamp(min=0)

    def rows(self, x: Tensor) -> Tensor:
        """`[B, H_q, segments, ...]` to `[B * H_kv * segments, group, ...]`."""
        kv_heads = self.index.shape[1]
        return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).transpose(2, 3).flatten(0, 2)

    def fold(self, x: Tensor, fill: float | int) -> Tensor:
        """`[B|1, H|1, N_q, ...]` to `[B * H_kv * segments, group, segment, ...]`."""
        b, heads = self.keep.shape[:2]
        whole = to_heads(x, heads).expand(b, heads, *x.shape[2:])
        return self.rows(Tiling(self.segment).split(whole, fill))

    def _columns(self, x: Tensor) -> Tensor:
        """`[B * H_kv * segments, group, s|1, N_k]` at the tokens of each list."""
        return x.gather(3, self.index.clamp(min=0).flatten(0, 2)[:, None, None].expand(*x.shape[:3], -1))

    def view(self, view: Visibility) -> Visibility:
        """What every query, now of a sequence of its segment's, sees of the list."""
        b, kv_heads, _, _ = self.index.shape
        pos = view.pos.expand(b, kv_heads, -1, -1)
        pos = take(pos, self.index.clamp(min=0).flatten(2)).unflatten(2, self.index.shape[2:]).flatten(0, 2)
        pos = pos.masked_fill((self.index < 0).flatten(0, 2).unsqueeze(-1), HIDDEN).unsqueeze(1)
        dense = None if view.dense is None else self._columns(self.fold(view.dense, False))
        return Visibility(self.fold(view.lo, 1), self.fold(view.hi, 0), pos, self.fold(view.q_pos, 0), dense)

    def _bias(self, bias: Tensor | None) -> Tensor | None:
        """A bias `[B|1, H_q|1, N_q|1, N_k|1]` for the lists."""
        if bias is None:
            return None
        if bias.shape[2] == 1:
            every = bias.expand(*self.keep.shape[:2], -1, -1).unsqueeze(2)
            bias = self.rows(every.expand(-1, -1, self.index.shape[2], -1, -1))
        else:
            bias = self.fold(bias, 0)
        return bias if bias.shape[3] == 1 else self._columns(bias)

    def cost(self, view: Visibility) -> Tensor:
        heads, segments = self.keep.shape[1:3]
        real = torch.arange(segments * self.segment, device=self.keep.device) < view.q_pos.shape[2]
        tiles = Tiling(self.tile)
        heights = tiles.split(real.view(1, segments, -1), False).sum(-1)  # [1, segments, T_q]
        widths = tiles.split((self.index >= 0).flatten(1, 2), False).sum(-1).view(*self.index.shape[:3], -1)
        area = heights[..., None] * to_heads(widths, heads).unsqueeze(3)  # [b, h, segments, T_q, T_k]
        return (self.keep * area).sum((2, 3, 4)).double()

    def read(self, queries: Tensor) -> Tensor:
        heads = self.keep.shape[1]
        segment, place = queries // self.segment, queries % self.segment
        index = self.index.repeat_interleave(heads // self.index.shape[1], 1)[:, :, segment]  # [b, h, q, M]
        places = place.expand(*index.shape[:3])
        if self.q_order is not None:
            places = self.q_order.argsort(-1)[:, :, segment].gather(3, places.unsqueeze(-1)).squeeze(-1)
        tiles = (places // self.tile)[..., None, None].expand(-1, -1, -1, 1, self.keep.shape[4])
        kept = self.keep[:, :, segment].gather(3, tiles).squeeze(3).repeat_interleave(self.tile, -1)
        return index.masked_fill(~kept[..., : index.shape[3]], -1)
