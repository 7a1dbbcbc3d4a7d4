"""Rests: what the tiles that were not chosen contribute."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilewise.attention.plans import Pass
from tilewise.attention.reads import Means
from tilewise.attention.stages import Chosen, Layout, Skip
from tilewise.tiles import FULL, TileMap, Tiling, Visibility


@dataclass(frozen=True)
class Pooled(Skip):
    """Every tile that was not chosen and may be seen whole acts as its mean key and value, times its token count.

    One more pass of the same kernel: over means, with the log of the count as bias.

    Args:
        slope: 1 adds the first order of the expansion around the means, one product per query (see `Means`).
    """

    slope: float = 0.0

    def passes(self, layout: Layout, chosen: Chosen) -> tuple[Pass, ...]:
        if not layout.q.shape[2]:
            return ()
        whole = chosen.left & (layout.kinds() == FULL)
        n_means = layout.k_tiling.count(layout.k.shape[2])
        means = torch.arange(n_means, device=layout.q.device).view(1, 1, -1)
        given = layout.view if layout.given is None else layout.given
        view = Visibility.everything(given.q_pos, means)
        reads = Means(layout.k_tiling, layout.k_order, given.keys_seen(), self.slope)
        return (Pass(view, TileMap(whole, layout.q_tiling, Tiling(1)), layout.q_order, reads=reads),)


__all__ = ["Pooled", "Skip"]
