"""How the Triton engine sees a call: where tokens lie in tiles, and which tiles meet.

A *unit* is one query tile of one head. Tall units go one program each, over a list of their key tiles. Flat ones
(queries routed alone) are gathered: a program takes one key tile and as many of the units that chose it as fill a
block, so that the arithmetic stays dense; their partial results lie in *slots* until they are merged.

All of it is made by PyTorch from O(tokens + tiles) metadata.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.kernels.attend_tiles.call import Call
from tilewise.kernels.attend_tiles.triton_arguments import (
    Axis,
    Bias,
    Lists,
    Pieces,
    View,
    four_strides,
    two_strides,
)
from tilewise.tiles import FULL, NONE, PARTIAL, TileMap, Tiling
from tilewise.tiles.visibility import to_heads

FLAT = 16  # query tiles lower than this, the least that a matrix unit multiplies at once, are gathered by key tile
PARTS = 1 << 27  # numbers held for partial results before they are merged: 512 MiB of float32


class Range(NamedTuple):
    """Some consecutive flat units: slots of unit `first + i` are `starts[i]` up to `starts[i + 1]`."""

    first: int
    units: int
    starts: Tensor
    pieces: Pieces

    @property
    def slots(self) -> int:
        return len(self.pieces.slots)

    def programs(self, block_m: int, block_n: int) -> int:
        """One for each piece, whatever the blocks: pieces were cut for them."""
        return len(self.pieces.first)


@dataclass(frozen=True, eq=False)
class Layout:
    """A call as the kernels read it.

    Attributes:
        rows, columns: the query axis and the key axis.
        state: int8 `[B|1, H|1, T_q, T_k]`, NONE for tiles that are not computed, PARTIAL for those that hide
            tokens or are shorter than the others, FULL for the rest.
    """

    call: Call
    rows: Axis
    columns: Axis
    view: View
    state: Tensor

    @classmethod
    def of(cls, call: Call) -> Layout:
        (heads, n_q), kv_heads, n_k = call.q.shape[1:3], call.k.shape[1], call.view.pos.shape[2]
        tiles = call.tiles or TileMap.everything(n_q, n_k, call.q.device)
        view = call.view.permute(call.q_order, call.k_order)
        kinds = to_heads(view.tiles(tiles.q_tiling, tiles.k_tiling), heads)
        keep = to_heads(tiles.keep, heads)
        if tiles.k_tiling.bounds is None:
            short = tiles.k_tiling.sizes(n_k, keep.device) < tiles.k_tiling.size
            kinds = kinds.where((kinds != FULL) | ~short.unsqueeze(2), PARTIAL)
        return cls(
            call,
            _axis(call.q_order, tiles.q_tiling, n_q, heads, call.q.device),
            _axis(call.k_order, tiles.k_tiling, n_k, kv_heads, call.q.device),
            _view(call, heads),
            kinds.where(keep, NONE),
        )

    @property
    def batch(self) -> int:
        return self.call.q.shape[0]

    @property
    def heads(self) -> int:
        return self.call.q.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.call.k.shape[1]

    @property
    def group(self) -> int:
        """Query heads that read one kv head."""
        return self.heads // self.kv_heads

    @property
    def flat(self) -> bool:
        return self.rows.size < FLAT

    def bias(self, grad: Tensor | None = None) -> Bias:
        """The bias, with where its gradient goes."""
        return Bias(self.call.bias, *four_strides(self.call.bias), grad, *four_strides(grad))

    def by_unit(self) -> Lists:
        """Key tiles of every tall unit."""
        return _lists(self.state)

    def by_key_tile(self) -> Lists:
        """Units of every key tile and kv head, as `head within the group * T_q + query tile`."""
        if self.flat:
            key, entries, _ = self._pairs(0, self._units)
            cuts = torch.searchsorted(key, torch.arange(2 * self._columns + 1, device=key.device))
            counts = torch.stack([cuts[1::2] - cuts[:-1:2], cuts[2::2] - cuts[:-2:2]], -1)
            per_batch = self.kv_heads * self.columns.tiles
            return Lists(
                entries, cuts[:-1:2].contiguous(), counts.to(torch.int32), per_batch, self.columns.tiles
            )
        turned = self.state.transpose(2, 3)  # [b, h, T_k, T_q]
        if turned.shape[1] == self.heads:
            turned = turned.unflatten(1, (self.kv_heads, self.group)).transpose(2, 3).flatten(3)
        else:
            turned = turned.repeat(1, 1, 1, self.group)
        return _lists(turned)

    def ranges(self, height: int, width: int) -> Iterator[Range]:
        """Flat units in ranges whose partial results, `width` numbers a query, fit in PARTS.

        `height` is the number of queries that are gathered in one block.
        """
        counts = self._chosen.sum(1)
        most = int(counts.max())
        units = max(1, PARTS // max(1, most * self.rows.size * width))
        for first in range(0, self._units, units):
            last = min(first + units, self._units)
            starts = torch.nn.functional.pad(counts[first:last].cumsum(0), (1, 0))
            key, entries, slots = self._pairs(first, last)
            yield Range(first, last - first, starts, _pieces(key, entries, slots, height // self.rows.size))

    @property
    def _units(self) -> int:
        return self.batch * self.heads * self.rows.tiles

    @property
    def _columns(self) -> int:
        return self.batch * self.kv_heads * self.columns.tiles

    @cached_property
    def _states(self) -> Tensor:
        """`state` of every unit, `[units, T_k]`."""
        return self.state.expand(self.batch, self.heads, -1, -1).flatten(0, 2)

    @cached_property
    def _chosen(self) -> Tensor:
        return self._states != NONE

    def _pairs(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Every (unit, key tile) that is computed, of units `first` to `last`, by key tile, masked ones first.

        Returns `2 * (kv head and key tile) + full`, sorted, int64; the unit, int32; its slot, int64. Slots are
        numbered unit by unit.
        """
        units, tiles = self._chosen[first:last].nonzero(as_tuple=True)
        units = units + first
        full = self._states[units, tiles] == FULL
        row, tile = units // self.rows.tiles, units % self.rows.tiles
        head = row % self.heads
        kv = (row // self.heads) * self.kv_heads + head // self.group
        key, slots = ((kv * self.columns.tiles + tiles) * 2 + full).sort(stable=True)
        entries = (head % self.group) * self.rows.tiles + tile
        return key, entries[slots].to(torch.int32), slots


def _axis(order: Tensor | None, tiling: Tiling, n: int, heads: int, device: torch.device) -> Axis:
    bounds = tiling.bounds
    if order is not None:
        order = to_heads(order, heads).contiguous()
    if bounds is not None:
        bounds = to_heads(bounds.to(device), heads).contiguous()
    size, tiles = tiling.size, tiling.count(n)
    return Axis(order, *two_strides(order), bounds, *two_strides(bounds), size, tiles, n)


def _view(call: Call, heads: int) -> View:
    view = call.view
    limits = torch.cat(torch.broadcast_tensors(view.lo, view.hi), -1)
    limits = to_heads(limits, heads).contiguous()
    pos = view.pos.contiguous()
    dense = None if view.dense is None else to_heads(view.dense, heads).view(torch.uint8)
    return View(limits, *two_strides(limits), pos, *two_strides(pos), dense, *four_strides(dense))


def _lists(state: Tensor) -> Lists:
    """Lists over the last axis of `state [b, h, rows, T]`."""
    b, h, count, tiles = state.shape
    masked, full = state == PARTIAL, state == FULL
    place = torch.full_like(state, 2).masked_fill_(masked, 0).masked_fill_(full, 1)
    entries = place.argsort(dim=-1, stable=True).to(torch.int32).contiguous()
    masked = masked.sum(-1, dtype=torch.int32)
    counts = torch.stack([masked, masked + full.sum(-1, dtype=torch.int32)], -1)
    starts = torch.arange(b * h * count, device=state.device) * tiles
    return Lists(entries, starts, counts, h * count if b > 1 else 0, count if h > 1 else 0)


def _pieces(key: Tensor, entries: Tensor, slots: Tensor, most: int) -> Pieces:
    """Runs of equal `key` cut into pieces of at most `most`."""
    columns, sizes = key.unique_consecutive(return_counts=True)
    pieces = (sizes + most - 1) // most
    run = torch.arange(len(columns), device=key.device).repeat_interleave(pieces)
    within = (torch.arange(len(run), device=key.device) - (pieces.cumsum(0) - pieces)[run]) * most
    first = (sizes.cumsum(0) - sizes)[run] + within
    return Pieces(entries, slots, columns[run], first, (sizes[run] - within).clamp(max=most))
