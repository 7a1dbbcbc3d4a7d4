"""How the torch engine cuts a call into dense blocks of equal shape.

A *unit* is one query tile of one head; units are numbered through batch, heads and tiles. A `Block` is a batch
of r dense products, each of some units against some key tiles of the same kv head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.kernels.attend_tiles.call import Call
from tilewise.tiles import NONE, PARTIAL, TileMap, Tiling
from tilewise.tiles.visibility import HIDDEN, take, to_heads

SCORES = 1 << 19  # scores in one batch of blocks: 2 MiB of float32, beyond which they fall out of the cache
PARTS = 1 << 20  # numbers held for partial results before they are merged: 4 MiB of float32
TALL = 32  # query tiles at least this high go row by row
GROUP = 128  # queries gathered against one key tile otherwise


@dataclass(frozen=True, eq=False)
class Block:
    """`units [r, u]` against `tiles [r, c]`; the first `partial` tile columns may hide tokens.

    Padding: unit number `Prepared.units` and tile number -1, which occurs only from column `whole` on. `slots
    [r, u]` says where a column block's partial results go. `rows` are the rows of the units that are meant, when
    units are taken one by one.
    """

    units: Tensor
    tiles: Tensor
    partial: int
    whole: int
    slots: Tensor | None = None
    rows: slice = field(default_factory=lambda: slice(None))

    def split_rows(self, p: Prepared) -> Iterator[Block]:
        """This block of one unit each in pieces of fewer rows, where even one of its tiles is too large."""
        most = max(1, SCORES // (len(self.units) * p.width))
        if most >= p.height:
            yield self
            return
        for start in range(0, p.height, most):
            yield replace(self, rows=slice(start, min(start + most, p.height)))

    def split(self, p: Prepared) -> Iterator[Block]:
        """This block in pieces of at most SCORES scores, cut between tile columns."""
        r, u = self.units.shape
        height = len(range(p.height)[self.rows])
        columns = max(1, SCORES // (r * u * height * p.width))
        total = self.tiles.shape[1]
        if total <= columns:
            yield self
            return
        for start in range(0, total, columns):
            yield replace(
                self,
                tiles=self.tiles[:, start : start + columns],
                partial=min(max(self.partial - start, 0), columns),
                whole=max(self.whole - start, 0),
            )

    def key_tiles(self, p: Prepared) -> Tensor:
        """Rows of `Prepared.k` for the tiles, `[r, c]`; padding points at some real tile."""
        return p.key_base[self.units[:, :1]] + self.tiles.clamp(min=0)


class Scored(NamedTuple):
    """A block's operands and scores: queries `[r, m, D]` (scaled), keys, values `[r, w, D]`, scores `[r, m, w]`.

    `slope` is the derivative of the soft cap, where there is one and it was asked for.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor
    slope: Tensor | None


@dataclass(frozen=True, eq=False)
class Prepared:
    """A call laid out in tiles: permuted, widened, cut; and which tiles each unit pays for.

    Attributes:
        q: `[units + 1, height, D]`, scaled, the last unit empty; k, v: `[B * H_kv * T_k, width, D]`.
        key_base, view_base, pos_base: `[units + 1]`, first row of a unit's kv head in k, of its own row in lo and
            hi, and of its kv head in pos.
        lo, hi: `[*, height, A]`; pos: `[*, width, A]`, HIDDEN past the end of a tile.
        live, part: bool `[units, T_k]`: tiles to compute, and those of them that need a mask.
    """

    call: Call
    tiles: TileMap
    q: Tensor
    k: Tensor
    v: Tensor
    key_base: Tensor
    view_base: Tensor
    pos_base: Tensor
    lo: Tensor
    hi: Tensor
    pos: Tensor
    live: Tensor
    part: Tensor
    _scratch: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, call: Call) -> Prepared:
        tiles = call.tiles or TileMap.everything(call.q.shape[2], call.k.shape[2], call.q.device)
        wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
        b, heads, n_q, _ = call.q.shape
        kv_heads, n_k = call.k.shape[1:3]
        view = call.view.permute(call.q_order, call.k_order)
        q = tiles.q_tiling.split(take(call.q, call.q_order).to(wide), 0)
        k, v = (tiles.k_tiling.split(take(x, call.k_order).to(wide), 0) for x in (call.k, call.v))
        t_q, t_k = q.shape[2], k.shape[2]

        kinds = to_heads(view.tiles(tiles.q_tiling, tiles.k_tiling), heads).expand(b, heads, t_q, t_k)
        live = (kinds != NONE) & to_heads(tiles.keep, heads)
        short = tiles.k_tiling.sizes(n_k, q.device) < tiles.k_tiling.size  # a short tile has slots to hide
        part = live & ((kinds == PARTIAL) | to_heads(short, heads).unsqueeze(2))

        rows = torch.arange(b * heads, device=q.device)
        batch, head, group = rows // heads, rows % heads, (rows % heads) // (heads // kv_heads)

        def base(x_batch: int, x_heads: int, per_head: int) -> Tensor:
            """First row of each (batch, head) in a tensor of `x_batch * x_heads * per_head` rows."""
            which = group if x_heads == kv_heads and x_heads != heads else head
            return ((batch * (x_batch > 1)) * x_heads + which * (x_heads > 1)) * per_head

        own = torch.arange(t_q, device=q.device)
        lo, hi = (tiles.q_tiling.split(x, fill) for x, fill in ((view.lo, 1), (view.hi, 0)))
        pos = tiles.k_tiling.split(view.pos, HIDDEN)
        key_base = _pad_last((base(b, kv_heads, t_k).unsqueeze(1) + 0 * own).flatten())
        view_base = _pad_last((base(lo.shape[0], lo.shape[1], t_q).unsqueeze(1) + own).flatten())
        pos_base = _pad_last((base(pos.shape[0], pos.shape[1], t_k).unsqueeze(1) + 0 * own).flatten())
        return cls(
            call, tiles, _scaled(q, call.scale), k.flatten(0, 2), v.flatten(0, 2),
            key_base, view_base, pos_base, lo.flatten(0, 2), hi.flatten(0, 2), pos.flatten(0, 2),
            live.flatten(0, 2), part.flatten(0, 2),
        )  # fmt: skip

    @property
    def units(self) -> int:
        return self.q.shape[0] - 1

    @property
    def height(self) -> int:
        return self.q.shape[1]

    @property
    def width(self) -> int:
        return self.k.shape[1]

    @property
    def by_rows(self) -> bool:
        return self.height >= TALL

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Memory that every block uses again: fresh pages cost as much as the product that fills them."""
        size = math.prod(shape)
        held = self._scratch.get(name)
        if held is None or held.numel() < size:
            held = self._scratch[name] = self.q.new_empty(size)
        return held[:size].view(shape)

    def pick(self, name: str, rows: Tensor, index: Tensor) -> Tensor:
        """`rows [*, s, D]` at `index [r, c]`, side by side: `[r, c * s, D]` in scratch memory."""
        picked = self.scratch(name, index.numel(), *rows.shape[1:])
        torch.index_select(rows, 0, index.flatten(), out=picked)
        return picked.view(len(index), -1, rows.shape[2])

    def scores(self, block: Block, slope: bool = False) -> Scored:
        """The block's scores, hidden ones -inf. What it returns lies in scratch memory until the next call."""
        call = self.call
        queries = self.pick("q", self.q, block.units)[:, block.rows]
        keys = self.pick("k", self.k, block.key_tiles(self))
        r, m, w = len(queries), queries.shape[1], keys.shape[1]
        scores = torch.bmm(queries, keys.mT, out=self.scratch("scores", r, m, w))
        cap_slope = None
        if call.softcap is not None:
            capped = scores.div_(call.softcap).tanh_()
            cap_slope = 1 - capped.square() if slope else None
            capped.mul_(call.softcap)
        if call.bias is not None:
            scores += call.bias.reshape(-1)[self.bias_index(block)]
        if block.partial:
            shown = scores[:, :, : block.partial * self.width]
            shown.masked_fill_(~self.visible(block), -torch.inf)
        padded = block.tiles[:, block.whole :] < 0
        if padded.numel():
            tail = scores.view(r, m, -1, self.width)[:, :, block.whole :]
            tail.masked_fill_(padded[:, None, :, None], -torch.inf)
        return Scored(queries, keys, self.pick("v", self.v, block.key_tiles(self)), scores, cap_slope)

    def visible(self, block: Block) -> Tensor:
        """Which tokens of the block's first `partial` tile columns each query sees, bool `[r, m, *]`."""
        r = len(block.units)
        tiles = block.tiles[:, : block.partial].clamp(min=0)
        rows = self.view_base[block.units]
        pos = self.pos[self.pos_base[block.units[:, :1]] + tiles].view(r, 1, -1, self.pos.shape[2])
        lo, hi = (x[rows][:, :, block.rows].reshape(r, -1, 1, x.shape[2]) for x in (self.lo, self.hi))
        seen = (lo <= pos) & (pos <= hi)
        seen = seen[..., 0] if seen.shape[3] == 1 else seen.all(-1)
        if self.call.view.dense is not None:
            seen &= self.call.view.dense.reshape(-1)[
                self.token_index(block, self.call.view.dense, block.partial)
            ]
        return seen

    def bias_index(self, block: Block) -> Tensor:
        """Where each score's bias lies in the flattened bias, `[r, m, w]`."""
        return self.token_index(block, given(self.call.bias), block.tiles.shape[1], self.call.bias_rows)

    def token_index(self, block: Block, grid: Tensor, columns: int, rows: int = 1) -> Tensor:
        """Flat index into a contiguous `grid [B|1, H|1, N_q|1, N_k|1]` for the block's first tile columns.

        With `rows`, that many consecutive queries share a row of the grid.
        """
        call = self.call
        b, heads, n_q, _ = call.q.shape
        n_k = call.k.shape[2]
        t_q, t_k = self.tiles.q_tiling.count(n_q), self.tiles.k_tiling.count(n_k)
        units = block.units.clamp(max=self.units - 1)  # padding may read anything: it is hidden elsewhere
        row = units // t_q
        q_token = _tokens(call.q_order, self.tiles.q_tiling, n_q, b, heads, grid.device)[units]
        tiles = row[:, :1] * t_k + block.tiles[:, :columns].clamp(min=0)
        k_token = _tokens(call.k_order, self.tiles.k_tiling, n_k, b, heads, grid.device)[tiles]
        stride = [
            s if n > 1 else 0 for n, s in zip(grid.shape, torch.empty(grid.shape, device="meta").stride())
        ]
        r = len(units)
        start = (row // heads) * stride[0] + (row % heads) * stride[1]  # [r, u]
        queries = (start.unsqueeze(-1) + q_token[:, :, block.rows] // rows * stride[2]).view(r, -1, 1)
        return queries + (k_token * stride[3]).view(r, 1, -1)

    def cut_queries(self, x: Tensor) -> Tensor:
        """Per-query `[B, H, N, D]` to units, `[units + 1, height, D]`."""
        return _pad_last(self.tiles.q_tiling.split(take(x, self.call.q_order), 0).flatten(0, 2))

    def cut_rows(self, x: Tensor, fill: float) -> Tensor:
        """Per-query numbers `[B, H, N]` to `[units + 1, height]`; slots past the end hold `fill`."""
        cut = self.tiles.q_tiling.split(take(x.unsqueeze(-1), self.call.q_order), fill).flatten(0, 2)
        return torch.cat([cut, cut.new_full((1, *cut.shape[1:]), fill)])[..., 0]

    def restore(self, x: Tensor) -> Tensor:
        """Units `[units, height, D]` back to `[B, H, N, D]` in the tokens' own order."""
        return _restore(x, self.call.q.shape[:3], self.tiles.q_tiling, self.call.q_order)

    def restore_keys(self, x: Tensor) -> Tensor:
        """Key tiles back to `[B, H_kv, N_k, D]` in the tokens' own order."""
        return _restore(x, self.call.k.shape[:3], self.tiles.k_tiling, self.call.k_order)


def row_blocks(p: Prepared) -> Iterator[Block]:
    """Blocks of one unit each against all of its tiles, tiles that need a mask first.

    A unit's block is as wide as its own count of tiles asks, rounded up in small steps: the arithmetic of a row
    then never depends on what other rows chose.
    """
    counts = p.live.sum(1)
    if not counts.numel() or not int(counts.max()):
        return
    table = p.live.new_full((p.units, int(counts.max())), -1, dtype=torch.int64)
    units, tiles = p.live.nonzero(as_tuple=True)
    table[units, ranks(p)[units, tiles]] = tiles
    widths = _round_up(counts).clamp(max=table.shape[1])
    partial = p.part.sum(1)
    order = (widths * (p.live.shape[1] + 1) + partial).argsort()
    ordered = widths[order]
    for width, rows in zip(*(x.tolist() for x in ordered.unique_consecutive(return_counts=True))):
        chosen, order = order[:rows], order[rows:]
        if width == 0:
            continue
        at_once = max(1, SCORES // (p.height * width * p.width))
        for some in chosen.split(at_once):
            yield Block(
                some.unsqueeze(1), table[some, :width], int(partial[some].max()), int(counts[some].min())
            )


def column_blocks(p: Prepared) -> Iterator[tuple[int, int, int, list[Block]]]:
    """For ranges of units: (first, last, slots per unit, blocks of one key tile against many units)."""
    counts = p.live.sum(1)
    if not counts.numel() or not int(counts.max()):
        return
    most = max(1, GROUP // p.height)
    units_at_once = max(1, PARTS // (int(counts.max()) * p.height * p.v.shape[2]))
    for first in range(0, p.units, units_at_once):
        last = min(first + units_at_once, p.units)
        width = int(counts[first:last].max())
        if not width:
            continue
        units, tiles = p.live[first:last].nonzero(as_tuple=True)
        own = counts[first:last]
        within = torch.arange(len(units), device=units.device) - (own.cumsum(0) - own).repeat_interleave(own)
        slots = units * width + within
        units = units + first
        # One group per key tile and kv head; groups that need a mask are kept apart from those that do not.
        key = (p.key_base[units] + tiles) * 2 + p.part[units, tiles]
        key, order = key.sort(stable=True)
        units, tiles, slots = units[order], tiles[order], slots[order]
        sizes = key.unique_consecutive(return_counts=True)[1]
        group = min(most, int(sizes.max()))
        batches = (sizes + group - 1) // group
        start = sizes.cumsum(0) - sizes
        within = torch.arange(len(units), device=units.device) - start.repeat_interleave(sizes)
        place = ((batches.cumsum(0) - batches) * group).repeat_interleave(sizes) + within
        total = int(batches.sum())
        unit_table = torch.full((total * group,), p.units, device=units.device)
        slot_table = torch.full((total * group,), (last - first) * width, device=units.device)
        unit_table[place], slot_table[place] = units, slots
        unit_table, slot_table = unit_table.view(total, group), slot_table.view(total, group)
        tile_table = tiles[start].repeat_interleave(batches).unsqueeze(1)
        masked = (key[start] % 2).repeat_interleave(batches).bool()
        blocks = []
        for partial in (1, 0):
            chosen = (masked == bool(partial)).nonzero().squeeze(1)
            for some in chosen.split(max(1, SCORES // (group * p.height * p.width))):
                if len(some):
                    blocks.append(Block(unit_table[some], tile_table[some], partial, 1, slot_table[some]))
        yield first, last, width, blocks


def ranks(p: Prepared) -> Tensor:
    """A number for every kept tile within its unit: those that need a mask first, then the others."""
    full = (p.live & ~p.part).cumsum(1, dtype=torch.int32)
    first = p.part.cumsum(1, dtype=torch.int32)
    return torch.where(p.part, first, first[:, -1:] + full) - 1


def _round_up(counts: Tensor) -> Tensor:
    """Exact to 16, then multiples of 4 to 64, then of 16: at most a fifth is padding."""
    by_4, by_16 = (counts + 3) // 4 * 4, (counts + 15) // 16 * 16
    return torch.where(counts <= 16, counts, torch.where(counts <= 64, by_4, by_16))


def given(x: Tensor | None) -> Tensor:
    """A part of a call that is there whenever this is asked."""
    if x is None:
        raise TypeError("a tensor that this call needs was not given")
    return x


def _scaled(q: Tensor, scale: float) -> Tensor:
    """`q [B, H, T, size, D]` times `scale` as units, with the empty unit at the end, in one copy."""
    b, heads, tiles, size, d = q.shape
    units = q.new_empty(b * heads * tiles + 1, size, d)
    torch.mul(q, scale, out=units[:-1].view(q.shape))
    units[-1] = 0
    return units


def _pad_last(x: Tensor) -> Tensor:
    """One more row of zeros, for padding to point at."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


def _tokens(order: Tensor | None, tiling: Tiling, n: int, b: int, heads: int, device: torch.device) -> Tensor:
    """Which token stands at every slot of every tile, `[B * H * T, size]`; empty slots repeat token 0."""
    if order is None:
        order = torch.arange(n, device=device).view(1, 1, n)
    cut = tiling.split(to_heads(order, heads).expand(b, heads, n), 0)
    return cut.flatten(0, 2)


def _restore(x: Tensor, shape: Sequence[int], tiling: Tiling, order: Tensor | None) -> Tensor:
    b, heads, n = shape
    tiles = tiling.count(n)
    x = x.view(b, heads, tiles, tiling.size, x.shape[2])
    if tiling.bounds is None:
        x = x.flatten(2, 3)[:, :, :n]
    else:
        bounds = tiling.bounds.to(x.device)
        ids = tiling.ids(n, x.device)
        slot = torch.arange(n, device=x.device) - bounds[..., :-1].gather(2, ids)
        index = (ids * tiling.size + slot).expand(b, -1, -1)
        x = take(x.flatten(2, 3), to_heads(index, heads))
    if order is None:
        return x.contiguous()
    index = order.expand(b, heads, n).unsqueeze(-1).expand_as(x)
    return torch.empty_like(x).scatter_(2, index, x)
