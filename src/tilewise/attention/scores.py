"""Scores: how much a tile of the attention matrix matters, from queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tilewise.attention.stages import Layout
from tilewise.tiles import FULL, NONE, Tiling
from tilewise.tiles.visibility import to_heads

AT_ONCE = 1 << 23  # numbers in a temporary: 32 MiB of float32


def grouped(q: Tensor, k: Tensor) -> Tensor:
    """`q [B, H_q, M, D] @ k [B, H_kv, W, D]` transposed, without repeating k: `[B, H_q, M, W]`."""
    b, heads, m, d = q.shape
    kv_heads = k.shape[1]
    folded = q.reshape(b, kv_heads, heads // kv_heads * m, d)
    return (folded @ k.mT).view(b, heads, m, k.shape[2])


def mass(scores: Tensor, among: Tensor) -> Tensor:
    """Softmax over the tiles `among`; rows without any are 0."""
    scores = scores.masked_fill(~among, -torch.inf)
    return scores.softmax(-1).masked_fill(~among, 0)


def _seen(layout: Layout, x: Tensor) -> Tensor:
    """Keys with padding set to 0."""
    return x.masked_fill(~layout.view.keys_seen().unsqueeze(-1), 0)


@dataclass(frozen=True)
class MeanPool:
    """Softmax over tiles of the product of mean query and mean key. Grouped heads: each for itself.

    Args:
        counted: whether a tile weighs as its number of keys, as it must where tiles differ in size (clusters).
    """

    counted: bool = False
    looks = "tile"

    def score(self, layout: Layout, among: Tensor) -> Tensor:
        q = layout.q_tiling.mean(layout.q)[0]
        k, counts = layout.k_tiling.mean(layout.k, layout.view.keys_seen())
        scores = grouped(q, k.to(q.dtype)) * layout.scale
        if self.counted:
            scores = scores + to_heads(counts.to(scores.dtype).log(), layout.heads).unsqueeze(2)
        return mass(scores, among)


@dataclass(frozen=True)
class PageBounds:
    """Quest's score: the largest product that a key of a tile could have with a query, from its minima and maxima.

    Summed over the queries of a tile. Never below the true largest product. Grouped heads: each query head for
    itself. (Tang et al., 2024, arXiv 2406.10774)
    """

    looks = "tile"

    def score(self, layout: Layout, among: Tensor) -> Tensor:
        wide = layout.q.dtype if layout.q.dtype == torch.float64 else torch.float32
        hidden = ~layout.view.keys_seen().unsqueeze(-1)
        k = layout.k.to(wide)
        most = layout.k_tiling.split(k.masked_fill(hidden, -torch.inf), -torch.inf).amax(3)
        least = layout.k_tiling.split(k.masked_fill(hidden, torch.inf), torch.inf).amin(3)
        most, least = (x.masked_fill(~x.isfinite(), 0) for x in (most, least))  # tiles without a key
        q = layout.q_tiling.split(layout.q.to(wide) * layout.scale, 0)
        up, down = q.clamp(min=0).sum(3), q.clamp(max=0).sum(3)
        return grouped(up, most) + grouped(down, least)


@dataclass(frozen=True)
class RandomTiles:
    """Scores drawn at random, for controls: what a choice is worth that looks at nothing. `seed` fixes them."""

    seed: int = 0
    looks = "none"

    def score(self, layout: Layout, among: Tensor) -> Tensor:
        b, heads, n_q, _ = layout.q.shape
        shape = (b, heads, layout.q_tiling.count(n_q), layout.k_tiling.count(layout.k.shape[2]))
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(shape, generator=generator).to(layout.q.device)


@dataclass(frozen=True)
class Centroid:
    """Product of each query with the mean key of a tile, summed over the queries of the tile.

    With tiles one query high this is MoBA's router.
    """

    looks = "tile"

    def score(self, layout: Layout, among: Tensor) -> Tensor:
        q = layout.q_tiling.mean(layout.q)[0] if layout.q_tiling.size > 1 else layout.q
        k = layout.k_tiling.mean(layout.k, layout.view.keys_seen())[0]
        return grouped(q.to(k.dtype), k) * layout.scale


@dataclass(frozen=True)
class Antidiagonal:
    """XAttention's score: the mass of a softmax over strided antidiagonal sums.

    Queries and keys are taken in groups of `stride` tokens. The score of a pair of groups is the sum along the
    antidiagonal of its `stride x stride` square, so every row and column of the square is read once. A softmax
    over visible groups, summed within tiles, estimates a tile's attention mass at 1/stride of the cost of the
    full scores. Tile sizes must be multiples of `stride`. Grouped heads: each query head for itself.
    """

    stride: int = 8
    looks = "tile"

    def __post_init__(self) -> None:
        if not isinstance(self.stride, int) or self.stride < 1:
            raise ValueError(f"stride must be an integer >= 1, got {self.stride!r}")

    def score(self, layout: Layout, among: Tensor) -> Tensor:
        for tiling in (layout.q_tiling, layout.k_tiling):
            if tiling.bounds is not None or tiling.size % self.stride:
                raise ValueError(f"antidiagonal scores need tiles in multiples of stride {self.stride}")
        every = Tiling(self.stride)
        scaled = layout.q * (layout.scale / self.stride)  # before the product, which float16 would overflow
        q = every.split(scaled, 0).flip(3).flatten(3)  # [b, h, groups, stride * d], last token first
        k = every.split(_seen(layout, layout.k), 0).flatten(3)
        hidden = to_heads(layout.view.tiles(every, every), layout.heads) == NONE
        rows, columns = (
            Tiling(layout.q_tiling.size // self.stride),
            Tiling(layout.k_tiling.size // self.stride),
        )

        b, heads, groups_q, _ = q.shape
        out = []
        step = max(1, AT_ONCE // max(1, b * heads * k.shape[2] * rows.size)) * rows.size
        if torch.compiler.is_compiling():  # a loop over lengths would compile again for each
            step = groups_q
        starts = [0] if torch.compiler.is_compiling() else range(0, groups_q, step)
        for start in starts:
            some = slice(start, start + step)
            logits = grouped(q[:, :, some], k).float()
            logits.masked_fill_(hidden[:, :, some], -torch.inf)
            weights = logits.softmax(-1).nan_to_num_(0)  # rows that see nothing
            summed = columns.split(weights.transpose(2, 3), 0).sum(3).transpose(2, 3)  # [b, h, some, T_k]
            out.append(rows.split(summed, 0).sum(3))
        if not out:
            return q.new_zeros(b, heads, 0, layout.k_tiling.count(layout.k.shape[2]), dtype=torch.float32)
        return torch.cat(out, 2)


IN_CACHE = 1 << 20  # weights at a time: 4 MiB of float32, which the passes over them find in cache


def true_weights(layout: Layout, height: int = 1) -> Iterator[Tensor]:
    """Attention weights of some queries after another, in multiples of `height`: float32 `[B, H_q, rows, W]`.

    W is the keys up to the end of the last tile that one of these queries sees; what is beyond has no weight.
    Products with keys that nobody sees are not made, and keys that all see need no mask.
    """
    (b, heads, n_q, _), n_k = layout.q.shape, layout.k.shape[2]
    step = max(1, IN_CACHE // max(1, b * heads * n_k * height)) * height
    reach = _reach(layout, step)
    for number, start in enumerate(range(0, n_q, step)):
        whole, width = reach[number]
        rows = torch.arange(start, min(start + step, n_q), device=layout.q.device).view(1, 1, -1)
        columns = torch.arange(whole, width, device=layout.q.device).view(1, 1, -1)
        logits = grouped(layout.q[:, :, start : start + step] * layout.scale, layout.k[:, :, :width]).float()
        if whole < width:
            seen = to_heads(layout.view.permute(rows, columns).tokens(), heads)
            logits[..., whole:].masked_fill_(~seen, -torch.inf)
        weights = logits.softmax(-1)
        yield weights if whole else weights.nan_to_num_(0)  # rows that see nothing


def _reach(layout: Layout, step: int) -> list[tuple[int, int]]:
    """For every `step` queries, how many keys at the start all of them see and how many there are to the last."""
    n_q, n_k, size = layout.q.shape[2], layout.k.shape[2], layout.k_tiling.size
    pieces = Tiling(step)
    if layout.k_tiling.bounds is not None or torch.compiler.is_compiling():
        return [(0, n_k)] * pieces.count(n_q)
    kinds = layout.view.tiles(pieces, layout.k_tiling)
    whole = (kinds == FULL).all(0).all(0).long().cumprod(-1).sum(-1).tolist()
    tiles = torch.arange(1, kinds.shape[-1] + 1, device=kinds.device)
    last = (tiles * (kinds != NONE).any(0).any(0)).amax(-1).tolist() if n_k else whole
    return [(min(n_k, size * a), min(n_k, size * max(a, z))) for a, z in zip(whole, last, strict=True)]


def by_tile(tiling: Tiling, x: Tensor, n: int, sums: bool) -> Tensor:
    """Sums, or the largest, of `x [..., W]` over each tile of `n` columns, those from W on being 0: `[..., T]`."""
    if tiling.bounds is not None:
        parts = tiling.split(x.transpose(2, 3), 0)
        return (parts.sum(3) if sums else parts.amax(3)).transpose(2, 3)
    tiles = -(-x.shape[-1] // tiling.size)
    parts = pad(x, (0, tiles * tiling.size - x.shape[-1])).unflatten(-1, (tiles, tiling.size))
    return pad(parts.sum(-1) if sums else parts.amax(-1), (0, tiling.count(n) - tiles))


@dataclass(frozen=True)
class TrueMass:
    """The oracle: a tile's true share of attention, summed over its queries. Costs more than dense attention."""

    looks = "tile"

    def score(self, layout: Layout, among: Tensor) -> Tensor:
        b, heads, n_q, _ = layout.q.shape
        n_k = layout.k.shape[2]
        out = [by_tile(layout.k_tiling, weights, n_k, sums=True) for weights in true_weights(layout)]
        columns = layout.k_tiling.count(n_k)
        by_query = torch.cat(out, 2) if out else layout.q.new_zeros(b, heads, 0, columns, dtype=torch.float32)
        return layout.q_tiling.split(by_query, 0).sum(3)
