"""PSA: every tile of queries reads every tile of keys at a pooling level of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tilewise.attention.plans import Pass
from tilewise.attention.reads import Means
from tilewise.attention.scores import Antidiagonal
from tilewise.attention.selects import Edges, First, Mass, Share
from tilewise.attention.stages import (
    Always,
    AsGiven,
    Chosen,
    Layout,
    Order,
    Recipe,
    Score,
    Select,
    Skip,
    Tiles,
)
from tilewise.tiles import FULL, TileMap, Tiling, Visibility
from tilewise.tiles.visibility import take, to_heads

By = Literal["mass", "share"]
Levels = tuple[tuple[int, float], ...]


def runs(tiling: Tiling, pool: int, device: torch.device) -> tuple[Tiling, Tiling]:
    """A tiling cut finer, into runs of `pool` tokens that never cross a tile; and the cut of those runs into tiles.

    Where tiles are uneven all get as many runs as the longest needs; runs beyond a tile's end are empty.
    """
    if tiling.bounds is None and tiling.size % pool == 0:
        return Tiling(pool), Tiling(tiling.size // pool)
    if tiling.bounds is None:
        raise ValueError(f"tiles of {tiling.size} keys cannot be pooled by {pool}: take a multiple")
    bounds = tiling.bounds.to(device)
    each = -(-tiling.size // pool)
    starts = bounds[..., :-1, None] + torch.arange(each, device=device) * pool  # [b, h, T, each]
    starts = torch.minimum(starts, bounds[..., 1:, None]).flatten(2)
    return Tiling(pool, torch.cat([starts, bounds[..., -1:]], -1)), Tiling(each)


def read_means(layout: Layout, means: Tiling, keep: Tensor, q_tiling: Tiling, k_tiling: Tiling) -> Pass:
    """A pass over the means of runs of keys, over the tiles `keep` of a cut of queries and a cut of those means."""
    given = layout.view if layout.given is None else layout.given
    n_means = means.count(layout.k.shape[2])
    view = Visibility.everything(given.q_pos, torch.arange(n_means, device=layout.k.device).view(1, 1, -1))
    if means.bounds is not None:
        view = view.hide(means.sizes(layout.k.shape[2], layout.k.device) == 0)
    reads = Means(means, layout.k_order, given.keys_seen())
    return Pass(view, TileMap(keep, q_tiling, k_tiling), layout.q_order, reads=reads)


@dataclass(frozen=True)
class Pyramid(Skip):
    """Rest: tiles that were not chosen are read as means of runs of their keys, longer runs for lower scores.

    Tiles of a row stand in order of their scores, chosen ones first. A tile is read at the first level whose bound
    is above what stands before it: a share of the row's score (`by="mass"`, for scores >= 0) or of its number of
    tiles (`by="share"`). Tiles beyond the last bound contribute nothing, nor do tiles that the mask cuts through.

    Args:
        levels: (keys per mean, upper bound) for each level, both rising.
        alike: for each level the least mean cosine of the first and the last key of its runs. A tile is read at no
            coarser level than the coarsest whose keys are that much alike; where none is, exactly.
    """

    levels: Levels
    by: By = "mass"
    alike: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_levels(self.levels)
        if self.by not in ("mass", "share"):
            raise ValueError(f"by must be 'mass' or 'share', got {self.by!r}")
        if self.alike is not None and len(self.alike) != len(self.levels):
            raise ValueError(
                f"alike must have one entry for each of {len(self.levels)} levels, got {self.alike!r}"
            )

    def passes(self, layout: Layout, chosen: Chosen) -> tuple[Pass, ...]:
        if not layout.q.shape[2] or not layout.k.shape[2] or not self.levels:
            return ()
        at = self.level(layout, chosen)
        out = []
        if self.alike is not None:
            given = layout.view if layout.given is None else layout.given
            exact = TileMap(at == 0, layout.q_tiling, layout.k_tiling)
            out.append(Pass(given, exact, layout.q_order, layout.k_order))
        for number, (pool, _) in enumerate(self.levels, 1):
            means, k_tiling = runs(layout.k_tiling, pool, layout.k.device)
            out.append(read_means(layout, means, at == number, layout.q_tiling, k_tiling))
        return tuple(out)

    def level(self, layout: Layout, chosen: Chosen) -> Tensor:
        """The level of each tile, int64 `[B, H_q, T_q, T_k]`: 1 is `levels[0]`, 0 exactly, -1 none of these."""
        taking = chosen.keep | chosen.left
        scores = chosen.scores.masked_fill(~taking, 0)
        ranked = chosen.scores.masked_fill(~taking, -torch.inf).masked_fill(chosen.keep, torch.inf)
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        if self.by == "mass":
            ordered = scores.gather(-1, order)
            before, total = ordered.cumsum(-1) - ordered, scores.sum(-1, keepdim=True)
        else:
            before = torch.arange(order.shape[-1], device=order.device).expand_as(order).to(scores.dtype)
            total = taking.sum(-1, keepdim=True).to(scores.dtype) - 1e-6  # 0.1 of 30 tiles are 3
        at = torch.ones_like(order)
        for _, bound in self.levels:
            if bound < 1:  # a bound of 1 takes all, whatever sums round to
                at = at + (before >= bound * total)
        at = torch.empty_like(order).scatter_(-1, order, at)
        reads = chosen.left & (layout.kinds() == FULL) & (at <= len(self.levels))
        if self.alike is not None:
            at = torch.minimum(at, to_heads(self._coarsest(layout), layout.heads).unsqueeze(2))
        return at.masked_fill(~reads, -1)

    def _coarsest(self, layout: Layout) -> Tensor:
        """The coarsest level at which the keys of each tile are alike enough, int64 `[B, H_kv, T_k]`."""
        k, n = layout.k, layout.k.shape[2]
        wide = torch.float64 if k.dtype == torch.float64 else torch.float32
        best = torch.zeros(*k.shape[:2], layout.k_tiling.count(n), dtype=torch.int64, device=k.device)
        for number, ((pool, _), least) in enumerate(zip(self.levels, self.alike or ()), 1):
            means, k_tiling = runs(layout.k_tiling, pool, k.device)
            sizes = means.sizes(n, k.device)
            first = (sizes.cumsum(-1) - sizes).clamp(max=n - 1)
            last = (first + sizes - 1).clamp(min=0)
            start, end = (take(k, place).to(wide) for place in (first, last))
            cosine = torch.nn.functional.cosine_similarity(start, end, dim=-1)
            alike = k_tiling.mean(cosine.unsqueeze(-1), sizes > 0)[0].squeeze(-1) > least
            best = best.masked_fill(alike, number)
        return best


@dataclass(frozen=True)
class PSA(Recipe):
    """Pyramid sparse attention (Li et al., 2025, arXiv 2512.04025).

    In place of keeping or dropping a tile, each row of tiles reads each tile of keys at a level: all its keys,
    means of runs of 2, 4, 8 keys and values, or nothing. Levels are allotted by importance: tiles in order of
    their estimated mass, each level up to a bound. A mean weighs as its count of keys. One pass of the kernel per
    level, merged exactly.

    Differs from the paper: a tile takes a level while the mass before it is below the bound, so that the best tile
    is always read exactly; tiles that the mask cuts through are read exactly, where the authors' causal kernel
    masks means by position; the authors' video models estimate mass from random tokens of a tile and their
    language model from antidiagonals, the default here; their rounding of a level's tiles to whole hardware tiles
    has no counterpart. Runs never cross a tile. Grouped heads: each query head chooses for itself.

    Args:
        levels: (keys per mean, upper bound) for each level, both rising; the first is (1, bound), read exactly.
        by: what bounds are shares of: the row's estimated "mass" (the paper's thresholds) or its "share" of tiles
            (its fixed quotas).
        alike: the paper's similarity rule: for each level but the first the least mean cosine of the keys at the
            two ends of its runs, (0.7, 0.65, 0.6) in the authors' settings for video; None applies none.
        tile: (queries, keys) per tile; keys a multiple of every level, unless `order` cuts uneven tiles.
        score: estimates a tile's mass. always: tiles read exactly whatever their score.
        order: which tokens share a tile; for a video `Boxes(grid, box)`, where runs follow the last axis.

    A bias per key has no meaning for means of keys and raises ValueError.
    """

    levels: Levels = ((1, 0.4), (2, 0.5), (4, 0.6), (8, 0.8))
    by: By = "mass"
    alike: tuple[float, ...] | None = None
    tile: tuple[int, int] = (128, 64)
    score: Score = field(default_factory=lambda: Antidiagonal(16))
    always: tuple[Always, ...] = (First(),)
    order: Order = field(default_factory=AsGiven)
    modes = ("train", "prefill", "chunked prefill")
    reads = "q, k"

    def __post_init__(self) -> None:
        _check_levels(self.levels)
        if not self.levels or self.levels[0][0] != 1:
            raise ValueError(
                f"levels must start with (1, bound), the tiles read exactly, got {self.levels!r}"
            )
        for pool, _ in self.levels if isinstance(self.order, AsGiven) else ():
            if self.tile[1] % pool:
                raise ValueError(
                    f"tile must have keys in a multiple of every level, got {self.tile[1]} for {pool}"
                )
        self.tiles()

    def tiles(self) -> Tiles:
        bound = self.levels[0][1]
        select: Select = Mass(bound) if self.by == "mass" else Share(bound)
        rest = Pyramid(self.levels[1:], self.by, self.alike)
        return Tiles(
            score=self.score,
            select=select,
            tile=self.tile,
            order=self.order,
            always=(*self.always, Edges()),
            rest=rest if self.levels[1:] else Skip(),
        )


def _check_levels(levels: Levels) -> None:
    """Raise ValueError unless pools are integers >= 1 and bounds in (0, 1], both rising."""
    pools, bounds = [pool for pool, _ in levels], [bound for _, bound in levels]
    whole = all(isinstance(pool, int) and pool >= 1 for pool in pools)
    if not whole or any(a >= b for a, b in zip(pools, pools[1:])):
        raise ValueError(f"levels must have rising numbers of keys >= 1, got {levels!r}")
    if any(not 0 < bound <= 1 for bound in bounds) or any(a > b for a, b in zip(bounds, bounds[1:])):
        raise ValueError(f"levels must have rising bounds in (0, 1], got {levels!r}")
