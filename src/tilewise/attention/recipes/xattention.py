"""XAttention: block-sparse attention with antidiagonal scoring."""

from __future__ import annotations

from dataclasses import dataclass

from tilewise.attention.scores import Antidiagonal
from tilewise.attention.selects import First, Mass, Own
from tilewise.attention.stages import AsGiven, Recipe, Skip, Tiles


@dataclass(frozen=True)
class XAttention(Recipe):
    """Tiles chosen by strided antidiagonal sums, up to a share of their mass (Xu et al., 2025, arXiv 2503.16428).

    The sum along antidiagonals of `stride x stride` squares touches every query and key once; a softmax over
    these sums, added up within tiles, estimates each tile's attention mass at 1/stride of the full cost. Each
    row of tiles keeps the fewest that reach `threshold` of the estimated mass, first and diagonal tiles always.

    Differs from the paper: the threshold is one number, not a per-head table found by a search; causality
    between groups follows positions, so any mask, padding and offset works; a row never depends on the length
    of the others' padding.

    Args:
        stride: tokens per group of the estimate, a divisor of `tile`.
        threshold: share of the estimated mass to keep, in (0, 1]; 1 keeps every tile.
        tile: tokens per tile side.
    """

    stride: int = 8
    threshold: float = 0.9
    tile: int = 128
    name = "xattention"
    modes = ("train", "prefill", "chunked prefill")
    reads = "q, k"

    def __post_init__(self) -> None:
        if not isinstance(self.tile, int) or self.tile < 1:
            raise ValueError(f"tile must be an integer >= 1, got {self.tile!r}")
        if not isinstance(self.stride, int) or self.stride < 1 or self.tile % self.stride:
            raise ValueError(f"stride must divide the tile size {self.tile}, got {self.stride!r}")
        self.tiles()

    def tiles(self) -> Tiles:
        return Tiles(
            score=Antidiagonal(self.stride),
            select=Mass(self.threshold),
            tile=(self.tile, self.tile),
            order=AsGiven(),
            always=(First(), Own()),
            rest=Skip(),
        )
