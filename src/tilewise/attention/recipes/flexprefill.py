"""FlexPrefill: every head picks its pattern, and as many tiles as hold a share of its attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.recipes.vertical_slash import diagonals, last_attention
from tilewise.attention.scores import MeanPool, grouped, mass
from tilewise.attention.selects import First, Mass, Own, TopK
from tilewise.attention.stages import Layout
from tilewise.tiles import NONE, TileMap, Tiling, Visibility
from tilewise.tiles.visibility import to_heads


@dataclass(frozen=True)
class FlexPrefill(Method):
    """Patterns and budgets for each head from the prompt itself (Lai et al., 2025, arXiv 2502.20766).

    The attention of the last `tile` queries is computed in full and summed by tiles of keys. Means of the same
    queries and of the tiles' keys estimate the same sums. Where the two lie closer than `tau`, by the square root
    of their Jensen-Shannon divergence, means can be trusted with the whole map: the head is query-aware, and keeps
    the fewest tiles of the map that hold `gamma` of all pooled attention. Other heads are vertical-slash: they keep
    the fewest columns of tiles, and the fewest diagonals of tiles, that hold `gamma` of the last queries' attention
    each. All heads keep the `min_budget` tokens' worth of best columns and diagonals, the first tile and the
    diagonal. Grouped heads: each query head for itself.

    Differs from the paper: lines are counted in whole tiles, where the authors' code counts the single lines that
    hold `gamma` and keeps 1/tile as many of tiles; a tile is taken while the mass before it is below the share, so
    that rounding leaves no row empty; there is no largest budget.

    Args:
        gamma: share of attention kept, in (0, 1]; 1 keeps every tile. tau: >= 0, at 0 all heads are vertical-slash.
        min_budget: tokens, >= 1. tile: tokens per tile side.
    """

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    tile: int = 128
    name = "flexprefill"
    modes = ("train", "prefill", "chunked prefill")
    reads = "q, k, the last queries of the prompt"

    def __post_init__(self) -> None:
        if not isinstance(self.gamma, (int, float)) or not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {self.gamma!r}")
        if not isinstance(self.tau, (int, float)) or not self.tau >= 0:
            raise ValueError(f"tau must be >= 0, got {self.tau!r}")
        for name in ("min_budget", "tile"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")

    @property
    def lookahead(self) -> str:
        return "prompt"

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        n_q, n_k = q.shape[2], k.shape[2]
        if not n_q or not n_k:
            return Plan((Pass(view),), view)
        layout = Layout(q, k, view, Tiling(self.tile), Tiling(self.tile), scale)
        visible = layout.kinds() != NONE
        forced = visible & (
            First().tiles(layout, visible) | to_heads(Own().tiles(layout, visible), layout.heads)
        )
        weights = last_attention(q, k, view, scale, self.tile)
        by_means, by_tokens = self._estimates(layout, visible, weights)
        aware = divergence(by_means, by_tokens) < self.tau  # [b, h]
        keep = forced | self._lines(weights, by_tokens, visible, ~aware, n_q)
        pooled = MeanPool().score(layout, visible)
        chosen = Mass(self.gamma, over="head").select(pooled, visible, visible & False)
        keep = (keep | (chosen & aware[..., None, None])) & visible
        return Plan((Pass(view, TileMap(keep, layout.q_tiling, layout.k_tiling)),), view)

    def _estimates(self, layout: Layout, visible: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of the last queries by tiles of keys, from means and in truth: `[B, H_q, T_k]`, sums of 1."""
        wide = layout.q.dtype if layout.q.dtype == torch.float64 else torch.float32
        mean = layout.q[:, :, -self.tile :].mean(2, keepdim=True, dtype=wide) * layout.scale
        means = layout.k_tiling.mean(layout.k, layout.view.keys_seen())[0]
        by_means = mass(grouped(mean, means), visible[:, :, -1:])
        by_tokens = layout.k_tiling.split(weights.mean(2).unsqueeze(-1), 0).sum((3, 4))
        return by_means[:, :, 0], by_tokens

    def _lines(self, weights: Tensor, columns: Tensor, visible: Tensor, by_share: Tensor, n_q: int) -> Tensor:
        """Tiles on the columns and diagonals of tiles that each head keeps: bool `[B, H_q, T_q, T_k]`."""
        n_k = weights.shape[3]
        sums = diagonals(weights, n_q)[..., :n_k]
        slashes = Tiling(self.tile).split(sums.unsqueeze(-1), 0).sum((3, 4))  # by distance, in tiles
        kept_columns, kept_slashes = (self._cover(x, by_share) for x in (columns, slashes))
        # The tile of keys in which the last query of each tile of queries stands; queries are the last keys.
        last = (torch.arange(visible.shape[2], device=columns.device) + 1) * self.tile
        own = (last.clamp(max=n_q) - 1 + n_k - n_q).div(self.tile, rounding_mode="floor")
        back = own.unsqueeze(1) - torch.arange(visible.shape[3], device=columns.device)  # [T_q, T_k]
        on_slash = kept_slashes[..., back.clamp(min=0)] & (back >= 0)
        return kept_columns.unsqueeze(2) | on_slash

    def _cover(self, sums: Tensor, by_share: Tensor) -> Tensor:
        """The best lines of each head: bool `[B, H_q, lines]`, by share where `by_share [B, H_q]` says so."""
        scores = sums.unsqueeze(2)
        every = torch.ones_like(scores, dtype=torch.bool)
        least = TopK(-(-self.min_budget // self.tile)).select(scores, every, every & False)
        share = Mass(self.gamma).select(scores, every, every & False)
        return (least | share & by_share[..., None, None])[:, :, 0]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of distributions over the last axis, natural logs.

    From 0 for equal ones to sqrt(log 2) for those that share nothing; `[..., n]` to `[...]`.
    """
    middle = (p + q) / 2

    def half(x: Tensor) -> Tensor:
        ratio = x / middle.masked_fill(middle == 0, 1)
        return torch.special.xlogy(x, ratio).sum(-1) / 2

    return (half(p) + half(q)).clamp(min=0).sqrt()
