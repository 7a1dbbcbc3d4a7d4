"""Bytes that our engines' tilings move, so that one can ask which tile suits a cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tilewise.kernels.attend_tiles import Call
from tilewise.kernels.attend_tiles.blocks import SCORES, TALL
from tilewise.tiles import NONE, TileMap
from tilewise.tiles.tilemap import cut
from tilewise.tiles.visibility import to_heads

WIDE = 4  # bytes of scores, running outputs and statistics, which are float32 whatever q, k and v are


class Shapes(NamedTuple):
    """Sizes of one call: q `[batch, heads, n_q, d]`, k `[batch, kv_heads, n_k, d]`, v `[..., n_k, d_v]`."""

    batch: int
    heads: int
    kv_heads: int
    n_q: int
    n_k: int
    d: int
    d_v: int

    @classmethod
    def of(cls, call: Call) -> Shapes:
        """The sizes of a call."""
        (batch, heads, n_q, d), (_, kv_heads, n_k, d_v) = call.q.shape, call.v.shape
        return cls(batch, heads, kv_heads, n_q, n_k, d, d_v)


@dataclass(frozen=True)
class TilingCost:
    """What one pass over the tiles moves.

    Attributes:
        tile: (queries, keys). order: "rows" (a query tile against all of its key tiles) or "columns" (a key tile
            against the query tiles that chose it, partial results written and read again).
        read_bytes, written_bytes: between the cache and memory, as long as the working set fits.
        working_bytes: what a tile, or as many as are in work at once, holds. cache_bytes: what there is.
    """

    tile: tuple[int, int]
    order: str
    read_bytes: int
    written_bytes: int
    working_bytes: int
    cache_bytes: int

    @property
    def bytes(self) -> int:
        """Bytes moved."""
        return self.read_bytes + self.written_bytes

    @property
    def fits(self) -> bool:
        """Whether the working set fits; where it does not, more is moved than is counted here."""
        return self.working_bytes <= self.cache_bytes


def tiling_cost(
    work: Call | Shapes, tile: tuple[int, int] | None = None, *, cache_bytes: int, element_size: int | None = None,
    order: str | None = None, packed: bool = False, at_once: int = 1,
) -> TilingCost:  # fmt: skip
    """Bytes moved by one pass of tile attention, its loops as in our engines (FlashAttention-2 by rows).

    Args:
        work: a call (its tile map and mask count: only tiles that are kept and not hidden are computed), or sizes,
            of which all is computed.
        tile: (queries, keys); by default that of the call's map, otherwise 128 x 128, lower for fewer queries.
        element_size: bytes of a number of q, k, v and out; that of the call, otherwise 4.
        order: "rows" or "columns"; by default what the torch engine does, columns for tiles below 32 queries.
        packed: k and v are copied once into another layout and read from there (native engine).
        at_once: tiles in work at the same time in this cache (threads, or a batch of products); each holds its own.

    Raises ValueError for a tile with a call that brings its own, sizes below 1 and unknown orders.
    """
    if isinstance(work, Call):
        shapes, map_ = Shapes.of(work), _map(work, tile)
        element_size = work.q.element_size() if element_size is None else element_size
        seen = work.view.permute(work.q_order, work.k_order).tiles(map_.q_tiling, map_.k_tiling) != NONE
        keep = to_heads(map_.keep, shapes.heads) & to_heads(seen, shapes.heads)
    else:
        shapes = work
        map_ = TileMap.everything(shapes.n_q, shapes.n_k, tile=_checked(tile, shapes.n_q))
        keep = map_.keep
    height, width = map_.q_tiling.size, map_.k_tiling.size
    order = ("rows" if height >= TALL else "columns") if order is None else order
    if order not in ("rows", "columns") or at_once < 1 or cache_bytes < 1:
        raise ValueError(
            "order must be 'rows' or 'columns', at_once and cache_bytes >= 1, got"
            f" {order!r}, {at_once} and {cache_bytes}"
        )
    element_size = 4 if element_size is None else element_size
    keep = keep.expand(shapes.batch, shapes.heads, -1, -1)
    heights, widths = (
        to_heads(tiling.sizes(n, keep.device), shapes.heads)
        for tiling, n in ((map_.q_tiling, shapes.n_q), (map_.k_tiling, shapes.n_k))
    )
    read, written = _moved(keep, heights, widths, shapes, order, element_size)
    if packed:
        copies = shapes.batch * shapes.kv_heads * shapes.n_k * (shapes.d + shapes.d_v) * element_size
        read, written = read + copies, written + copies
    height, width = min(height, shapes.n_q), min(width, shapes.n_k)
    operands = height * shapes.d + width * (shapes.d + shapes.d_v)
    holds = element_size * operands + WIDE * (height * (shapes.d_v + width + 3))
    return TilingCost((height, width), order, read, written, at_once * holds, cache_bytes)


def best_height(
    work: Shapes, width: int, *, cache_bytes: int, heights: Iterable[int] = (16, 32, 64, 128, 256),
    element_size: int = 4, packed: bool = False, at_once: int = 1,
) -> TilingCost:  # fmt: skip
    """The cost of the height that moves the fewest bytes by rows, among those that fit; the lower of two equals.

    Raises ValueError when none fits.
    """
    costs = [
        tiling_cost(
            work, (height, width), cache_bytes=cache_bytes, element_size=element_size, order="rows", packed=packed,
            at_once=at_once,
        )
        for height in sorted(heights)
    ]  # fmt: skip
    fitting = [cost for cost in costs if cost.fits]
    if not fitting:
        least = min((cost.working_bytes for cost in costs), default=0)
        raise ValueError(f"no height fits in {cache_bytes} bytes; the smallest tile needs {least}")
    return min(fitting, key=lambda cost: cost.bytes)


def torch_tile(n_q: int, n_k: int) -> tuple[tuple[int, int], int]:
    """What the torch engine works on at once without a map: (queries, keys) of a block, and how many together.

    Its blocks hold SCORES scores: key tiles of one query tile side by side, and several rows if one is less.
    """
    height, width = cut(n_q)
    across = max(1, min(-(-n_k // width), SCORES // (height * width)))
    return (height, across * width), max(1, SCORES // (height * across * width))


def _moved(
    keep: Tensor, heights: Tensor, widths: Tensor, shapes: Shapes, order: str, element_size: int
) -> tuple[int, int]:
    """Bytes read and written for `keep [B, H, T_q, T_k]` and sizes `[B|1, H|1, T]`."""
    d, d_v = shapes.d, shapes.d_v
    tall = int((heights.unsqueeze(3) * keep).sum())  # query rows over all kept tiles
    final = shapes.batch * shapes.heads * shapes.n_q * (d_v * element_size + WIDE)
    if order == "rows":
        queries = int((heights * keep.any(3)).sum()) * d
        keys = int((widths.unsqueeze(2) * keep).sum()) * (d + d_v)
        return (queries + keys) * element_size, final
    # Query heads that share a kv head share its key tiles.
    chosen = keep.unflatten(1, (shapes.kv_heads, -1)).any(3).any(2)
    shared = widths if widths.shape[1] == 1 else widths[:, :: shapes.heads // shapes.kv_heads]
    keys = int((shared * chosen).sum()) * (d + d_v)
    parts = tall * (d_v + 1) * WIDE
    return (tall * d + keys) * element_size + parts, final + parts


def _map(call: Call, tile: tuple[int, int] | None) -> TileMap:
    if call.tiles is None:
        n_q, n_k = call.q.shape[2], call.k.shape[2]
        return TileMap.everything(n_q, n_k, call.q.device, _checked(tile, n_q))
    if tile is not None:
        raise ValueError(f"the call brings its own tiles; tile must be None, got {tile!r}")
    return call.tiles


def _checked(tile: tuple[int, int] | None, n_q: int) -> tuple[int, int]:
    tile = cut(n_q) if tile is None else tile
    if len(tile) != 2 or min(tile) < 1:
        raise ValueError(f"tile must be (queries, keys), each >= 1, got {tile!r}")
    return tile
