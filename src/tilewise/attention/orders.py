"""Orders: which tokens share a tile."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.attention.scores import grouped
from tilewise.attention.stages import Arrangement
from tilewise.tiles import Tiling, Visibility
from tilewise.tiles.clustering import by_label, kmeans
from tilewise.tiles.grid import Blocks, grid_axes
from tilewise.tiles.visibility import to_heads


@dataclass(frozen=True)
class SegmentSort:
    """Sorts keys by importance within segments of the sequence, so that important ones share tiles.

    Importance is the mean attention that a key gets from the last `probe` queries. Segments keep their places,
    so causality between segments stays tile by tile. Grouped heads: one order per kv head, from the mean over
    its query heads, so that keys are never repeated.

    Args:
        segment: tokens per segment. probe: queries at the end of the prompt that judge.
        queries: also sort queries within segments, by their product with the mean of the `probe` most important
            keys; scattered queries that look for those keys then share tiles.
    """

    segment: int
    probe: int = 128
    queries: bool = False
    looks = "prompt"

    def __post_init__(self) -> None:
        for name, value in (("segment", self.segment), ("probe", self.probe)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")

    def arrange(
        self, q: Tensor, k: Tensor, view: Visibility, scale: float, tile: tuple[int, int]
    ) -> Arrangement:
        return Arrangement(Tiling(tile[0]), Tiling(tile[1]), *self.permutations(q, k, view, scale))

    def permutations(
        self, q: Tensor, k: Tensor, view: Visibility, scale: float
    ) -> tuple[Tensor | None, Tensor | None]:
        """Orders of queries `[B, H_q, N_q]` and keys `[B, H_kv, N_k]`; None leaves tokens where they are."""
        b, heads, n_q, _ = q.shape
        kv_heads, n_k = k.shape[1:3]
        if not n_q or n_k <= self.segment:
            return None, None
        last = torch.arange(max(n_q - self.probe, 0), n_q, device=q.device).view(1, 1, -1)
        seen = to_heads(view.permute(last, None).tokens(), heads)
        logits = grouped(q[:, :, -self.probe :] * scale, k).float()  # scaled first: float16 overflows
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num_(0)
        importance = weights.mean(2).view(b, kv_heads, heads // kv_heads, n_k).mean(2)  # [b, h_kv, n_k]
        k_order = self._sort(importance)
        if not self.queries:
            return None, k_order
        best = importance.topk(min(self.probe, n_k), -1).indices  # [b, h_kv, probe]
        centre = k.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, k.shape[3])).mean(2, keepdim=True)
        return self._sort(grouped(q * scale, centre).float().squeeze(-1)), k_order

    def _sort(self, importance: Tensor) -> Tensor:
        """Descending within whole segments; a last short segment stays as it is."""
        n = importance.shape[-1]
        place = torch.arange(n, device=importance.device)
        tail = place >= n // self.segment * self.segment
        by_importance = importance.masked_fill(tail, 0).argsort(dim=-1, descending=True, stable=True)
        return by_importance.gather(-1, (by_importance // self.segment).argsort(dim=-1, stable=True))


@dataclass(frozen=True)
class Boxes:
    """Tokens of a grid share a tile when they lie in the same box: blocks of a video or an image.

    Keeps tiles of even size where boxes divide the grid. `Tiles.tile` is not used.

    Args:
        grid: tokens along each axis, slowest first: (T, H, W), (H, W) or (N,).
        box: tokens of a box along each axis; longer than an axis means all of it.
        before: tokens before the grid (text), cut by themselves.

    Raises ValueError for other numbers of axes, and for queries or keys that are not `before` + the grid.
    """

    grid: tuple[int, ...]
    box: tuple[int, ...]
    before: int = 0
    looks = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.before, int) or self.before < 0:
            raise ValueError(f"before must be an integer >= 0, got {self.before!r}")
        self.blocks()

    def blocks(self) -> Blocks:
        """The cut of the grid."""
        return Blocks(grid_axes(self.grid, self.grid), self.box)

    def arrange(
        self, q: Tensor, k: Tensor, view: Visibility, scale: float, tile: tuple[int, int]
    ) -> Arrangement:
        n = self.before + math.prod(self.grid)
        for name, x in (("queries", q), ("keys", k)):
            if x.shape[2] != n:
                raise ValueError(
                    f"grid {self.grid} with {self.before} tokens before it has {n} tokens, got {x.shape[2]} {name}"
                )
        blocks = self.blocks()
        first = torch.arange(self.before, device=q.device)
        order = torch.cat([first, blocks.order(q.device) + self.before]).view(1, 1, n)
        tiling = blocks.tiling(q.device, self.before)
        return Arrangement(tiling, tiling, order, order)


@dataclass(frozen=True)
class Clusters:
    """Tokens share a tile when k-means puts them together: tiles of like tokens, and of uneven size.

    Queries and keys of every head are clustered by themselves. `Tiles.tile` is not used. Fewer tokens than clusters
    leave some empty.

    Args:
        queries, keys: number of clusters. iterations: rounds of Lloyd's algorithm.
        seed: which tokens the centres start from.
    """

    queries: int
    keys: int
    iterations: int = 4
    seed: int = 0
    looks = "prompt"

    def __post_init__(self) -> None:
        for name in ("queries", "keys", "iterations"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")

    def arrange(
        self, q: Tensor, k: Tensor, view: Visibility, scale: float, tile: tuple[int, int]
    ) -> Arrangement:
        seen = view.keys_seen()
        q_labels = kmeans(q, self.queries, self.iterations, self.seed).labels
        k_labels = kmeans(k, self.keys, self.iterations, self.seed, keep=seen).labels
        (q_order, q_tiling), (k_order, k_tiling) = (
            by_label(q_labels, self.queries),
            by_label(k_labels, self.keys),
        )
        return Arrangement(q_tiling, k_tiling, q_order, k_order)
