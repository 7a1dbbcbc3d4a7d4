"""PISA: selected tiles exactly, all others by a Taylor expansion around their mean keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tilewise.attention.rests import Pooled, Skip
from tilewise.attention.scores import AT_ONCE, MeanPool, grouped, mass
from tilewise.attention.selects import Edges, Share
from tilewise.attention.stages import AsGiven, Layout, Order, Recipe, Score, Tiles
from tilewise.tiles.visibility import take, to_heads


@dataclass(frozen=True, eq=False)
class MomentPool:
    """Softmax over tiles of the product of means plus `log |H|`: what a tile weighs times what its mean leaves out.

    H is the sum of `(k - mean key) v^T` over a tile's tokens, the coefficient of the first order of its expansion,
    and |H| its Frobenius norm (with 1e-5 added, as in the authors' code). Tiles whose values depend on their keys
    are then more likely to be computed exactly. Grouped heads: each query head for itself.

    Args:
        values: `[B, H_kv, N_k, D_v]`, the values of the call in the tokens' own order; `attend` and
            `plan(..., v=v)` fill them in.

    Raises ValueError without values, and for such as do not fit the keys.
    """

    values: Tensor | None = None
    looks = "tile"

    def with_values(self, v: Tensor) -> MomentPool:
        return MomentPool(v)

    def score(self, layout: Layout, among: Tensor) -> Tensor:
        return mass(_pooled(layout) + to_heads(self._norms(layout), layout.heads).log().unsqueeze(2), among)

    def _norms(self, layout: Layout) -> Tensor:
        """`|H| + 1e-5` of every key tile, `[B, H_kv, T_k]`."""
        k = layout.k
        if self.values is None:
            raise ValueError("MomentPool looks at values: plan(..., v=v)")
        if self.values.shape[:3] != k.shape[:3]:
            raise ValueError(
                f"values must be [{', '.join(map(str, k.shape[:3]))}, D_v], one for each key, got"
                f" {list(self.values.shape)}"
            )
        wide = torch.float64 if k.dtype == torch.float64 else torch.float32
        seen = layout.view.keys_seen()
        means = layout.k_tiling.mean(k, seen)[0]
        own = layout.k_tiling.ids(k.shape[2], k.device)
        hidden = ~seen.unsqueeze(-1)
        centred = layout.k_tiling.split((k.to(wide) - take(means, own)).masked_fill(hidden, 0), 0)
        v = take(self.values.detach(), layout.k_order).to(wide).masked_fill(hidden, 0)
        v = layout.k_tiling.split(v, 0)
        step = max(1, AT_ONCE // max(1, centred.shape[0] * centred.shape[1] * k.shape[3] * v.shape[4]))
        if torch.compiler.is_compiling():  # a loop over lengths would compile again for each
            step = max(1, centred.shape[2])
        parts = [
            (one.mT @ other).flatten(3).norm(dim=-1)
            for one, other in zip(centred.split(step, 2), v.split(step, 2))
        ]
        return torch.cat(parts, 2) + 1e-5


def _pooled(layout: Layout) -> Tensor:
    """Scaled products of mean queries and mean keys plus the log of a tile's count, `[B, H_q, T_q, T_k]`."""
    q = layout.q_tiling.mean(layout.q)[0]
    k, counts = layout.k_tiling.mean(layout.k, layout.view.keys_seen())
    weight = to_heads(counts.clamp(min=1).to(k.dtype).log(), layout.heads).unsqueeze(2)
    return grouped(q, k.to(q.dtype)) * layout.scale + weight


@dataclass(frozen=True)
class PISA(Recipe):
    """Piecewise sparse attention: exact or approximate, never dropped (Li et al., 2026, arXiv 2602.01077).

    Each row of tiles computes its best share exactly. Every other tile is expanded around its mean key: order 0 is
    the mean key with the mean value, weighing as its count of tokens; order 1 adds, per query, one product with the
    mean of `(k - mean key of its tile) v^T`, one matrix for all the tiles of a row. All of it in one softmax.

    Differs from the paper: the first-order matrix is the mean over the tiles that a row of tiles reads as means,
    where the authors' kernel takes one over all tiles of the head, also those computed exactly and those to come;
    it is theirs when nothing is selected. Tiles that the mask cuts through are computed exactly, so any mask works
    and nothing visible is left out; they count within the share. The share is rounded up, not down. Tiles of
    uneven size (boxes at borders) are compared with their counts. Grouped heads: each query head chooses for
    itself.

    Args:
        density: share of each row's tiles computed exactly, in (0, 1]; 1 is dense attention.
        taylor: order of the expansion, 0 or 1.
        tile: tokens per tile side. order: which tokens share a tile; for a video `Boxes(grid, box)`.
        aware: choose tiles by the paper's covariance-aware score, which looks at values as well (see `MomentPool`).

    A bias per key has no meaning for means of keys and raises ValueError, as does a softcap with `taylor=1`.
    """

    density: float = 0.15
    taylor: Literal[0, 1] = 1
    tile: int = 64
    order: Order = field(default_factory=AsGiven)
    aware: bool = False
    modes = ("train", "prefill", "chunked prefill")
    reads = "q, k, if aware v"

    def __post_init__(self) -> None:
        if not isinstance(self.density, int | float) or not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density!r}")
        if self.taylor not in (0, 1):
            raise ValueError(f"taylor must be 0 or 1, got {self.taylor!r}")
        if not isinstance(self.tile, int) or self.tile < 1:
            raise ValueError(f"tile must be an integer >= 1, got {self.tile!r}")
        if not isinstance(self.aware, bool):
            raise ValueError(f"aware must be True or False, got {self.aware!r}")
        self.tiles()

    def tiles(self) -> Tiles:
        score: Score = MomentPool() if self.aware else MeanPool(counted=True)
        return Tiles(
            score=score,
            select=Share(self.density),
            tile=(self.tile, self.tile),
            order=self.order,
            always=(Edges(),),
            rest=Skip() if self.density == 1 else Pooled(float(self.taylor)),
        )
