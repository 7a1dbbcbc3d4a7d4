"""Rests: what the tiles that were not chosen contribute."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilewise.attention.plans import Pass
from tilewise.attention.stages import Layout, Skip
from tilewise.tiles import FULL, TileMap, Tiling, Visibility


@dataclass(frozen=True)
class Pooled:
    """Every tile that was not chosen and may be seen whole acts as its mean key and value, times its token count.

    One more pass of the same kernel: over pooled keys, with the log of the count as bias.
    """

    def passes(self, layout: Layout, view: Visibility, left, q_order, k_order) -> tuple[Pass, ...]:
        whole = left & (layout.kinds() == FULL)
        n_q = layout.q.shape[2]
        n_means = layout.k_tiling.count(layout.k.shape[2])
        means = torch.arange(n_means, device=layout.q.device).view(1, 1, -1)
        pooled = Visibility.everything(view.q_pos, means)
        tiles = TileMap(whole, layout.q_tiling, Tiling(1))
        keep = view.keys_seen()
        if not n_q:
            return ()
        return (Pass(pooled, tiles, q_order, k_order, pool=layout.k_tiling, keep=keep),)


__all__ = ["Pooled", "Skip"]
