"""Vertical-slash attention: columns and diagonals that the last queries of the prompt point out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.reads import Sample
from tilewise.attention.scores import grouped
from tilewise.tiles import TileMap, Tiling, Visibility
from tilewise.tiles.visibility import to_heads


@dataclass(frozen=True)
class VerticalSlash(Method):
    """MInference's vertical-slash pattern (Jiang et al., 2024, arXiv 2407.02490).

    The attention of the last `probe` queries is computed in full. Summed over these queries it says which columns
    (single keys) matter; summed along diagonals it says which distances do. Every head reads its `vertical` best
    columns, one by one, and the tiles that its `slash` best diagonals run through. The first columns and the
    nearest diagonals are always among them. Grouped heads: each query head for itself.

    Two passes: diagonals as tiles of `tile x tile`, and columns as a sample of the keys in which a column is left
    out for those queries whose tiles hold it already.

    Differs from the paper: one setting for all heads, not a table found by a search over patterns and sizes;
    tiles stand on a grid, so that a diagonal costs up to two of them where the authors' blocks follow the
    diagonal; distances are counted between places in the sequence (queries at its end), and only those that some
    of the last queries see can be found, which under a causal mask is all of them.

    Args:
        vertical, slash: columns and diagonals per head. tile: tokens per tile side.
        probe: queries at the end of the prompt that judge.
        sinks, local: how many first columns, padding not counted, and nearest diagonals are always kept.
    """

    vertical: int = 1000
    slash: int = 6096
    tile: int = 64
    probe: int = 64
    sinks: int = 30
    local: int = 100
    name = "vertical-slash"
    modes = ("train", "prefill", "chunked prefill")
    reads = "q, k, the last queries of the prompt"

    def __post_init__(self) -> None:
        for name, least in (
            ("vertical", 1),
            ("slash", 1),
            ("tile", 1),
            ("probe", 1),
            ("sinks", 0),
            ("local", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")

    @property
    def lookahead(self) -> str:
        return "prompt"

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        n_q, n_k = q.shape[2], k.shape[2]
        if not n_q or not n_k:
            return Plan((Pass(view),), view)
        weights = last_attention(q, k, view, scale, self.probe)
        columns = self._columns(weights.sum(2), to_heads(view.keys_seen(), q.shape[1]))
        slashes = diagonal_tiles(self._diagonals(diagonals(weights, n_q)), n_q, n_k, self.tile)
        tiles = TileMap(slashes, Tiling(self.tile), Tiling(self.tile))
        return Plan((Pass(view, tiles), self._reading(columns, slashes, view, k.shape[1])), view)

    def _columns(self, sums: Tensor, seen: Tensor) -> Tensor:
        """The best columns of each head, int64 `[B, H_q, vertical]`."""
        first = seen & (seen.cumsum(-1) <= min(self.sinks, self.vertical))
        ranked = sums.masked_fill(first, torch.inf).argsort(dim=-1, descending=True, stable=True)
        return ranked[..., : self.vertical]

    def _diagonals(self, sums: Tensor) -> Tensor:
        """Which diagonals each head keeps, bool as `sums`."""
        near = torch.arange(sums.shape[-1], device=sums.device) < min(self.local, self.slash)
        ranked = sums.masked_fill(near, torch.inf).argsort(dim=-1, descending=True, stable=True)
        return torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, ranked[..., : self.slash], True)

    def _reading(self, columns: Tensor, slashes: Tensor, view: Visibility, kv_heads: int) -> Pass:
        """The pass over columns: all that the query heads of a kv head chose, each read by the head that did."""
        b, heads, count = columns.shape
        held = columns // self.tile
        rows = slashes.shape[2]
        in_tiles = slashes.gather(3, held.unsqueeze(2).expand(-1, -1, rows, -1))  # [b, h, T_q, count]
        group = heads // kv_heads
        own = torch.eye(group, dtype=torch.bool, device=columns.device).repeat(kv_heads, 1)  # [h, group]
        keep = (own.view(1, heads, 1, group, 1) & ~in_tiles.unsqueeze(3)).flatten(3)
        index = columns.reshape(b, kv_heads, group * count)
        if view.dense is not None:  # a grid for each query head: columns differ between kv heads
            view = replace(view, dense=view.dense.expand(-1, heads, -1, -1))
        tiles = TileMap(keep, Tiling(self.tile), Tiling(1))
        return Pass(view.permute(None, index), tiles, reads=Sample(index))


def last_attention(q: Tensor, k: Tensor, view: Visibility, scale: float, probe: int) -> Tensor:
    """Attention of the last `probe` queries in full, float32 `[B, H_q, probe, N_k]`; blind rows are 0."""
    heads, n_q = q.shape[1:3]
    first = n_q - min(probe, n_q)
    some = torch.arange(first, n_q, device=q.device).view(1, 1, -1)
    seen = to_heads(view.permute(some, None).tokens(), heads)
    logits = grouped(q[:, :, first:] * scale, k).float()  # scaled first: float16 overflows
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)


def diagonals(weights: Tensor, n_q: int) -> Tensor:
    """Sums of the last queries' attention by distance: float32 `[B, H_q, N_k + N_q - 1]`.

    Entry d < N_k is the distance d from a query back to a key, counted from the end of both sequences; entries
    from N_k on are -1, -2, ..., keys behind the query, which only masks that are not causal show.
    """
    b, heads, rows, n_k = weights.shape
    # Rows from the last to the first, each one place further right: diagonals stand one above the other.
    skewed = pad(weights.flip(2), (0, rows)).flatten(2)[..., : rows * (n_k + rows - 1)]
    sums = skewed.view(b, heads, rows, n_k + rows - 1).sum(2)  # entry c is the distance n_k - 1 - c
    return pad(torch.cat([sums[..., :n_k].flip(-1), sums[..., n_k:]], -1), (0, n_q - rows))


def diagonal_tiles(kept: Tensor, n_q: int, n_k: int, tile: int) -> Tensor:
    """Tiles that some kept diagonal runs through: bool `[B, H_q, T_q, T_k]`, `kept` as `diagonals` orders them."""
    by_distance = torch.cat([kept[..., n_k:].flip(-1), kept[..., :n_k]], -1)  # from 1 - n_q to n_k - 1
    counts = pad(by_distance.cumsum(-1), (1, 0))  # [b, h, n_q + n_k], how many before each entry
    rows = torch.arange(-(-n_q // tile), device=kept.device).unsqueeze(1) * tile
    columns = torch.arange(-(-n_k // tile), device=kept.device) * tile
    # A query's place is counted as a key's: the last query stands at the last key. Entry = distance + n_q - 1.
    nearest = rows + (n_k - 1) - (columns + tile - 1).clamp(max=n_k - 1)
    farthest = (rows + tile - 1).clamp(max=n_q - 1) + (n_k - 1) - columns
    within = counts[..., farthest + 1] - counts[..., nearest]
    return within > 0
