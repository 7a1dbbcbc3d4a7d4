"""PBS-Attn: block-sparse attention over permuted tokens."""

from __future__ import annotations

from dataclasses import dataclass

from tilewise.attention.orders import SegmentSort
from tilewise.attention.scores import MeanPool
from tilewise.attention.selects import First, Mass, Own
from tilewise.attention.stages import Recipe, Skip, Tiles


@dataclass(frozen=True)
class PBSAttention(Recipe):
    """Block-sparse attention over keys sorted within segments (Wang et al., 2025, arXiv 2510.21270).

    Keys that matter to the end of the prompt are gathered at the front of their segment, so that fewer tiles
    hold them. Tiles of the query's own segment and the tile of the first token are always computed; earlier
    segments' tiles compete by mean-pooled scores up to a share of their mass. At full density the result is
    exact: an order changes nothing but which tokens share a tile.

    Differs from the paper: with grouped heads one key order serves a kv head (its query heads' mean importance)
    where the authors repeat keys and sort per query head; the mass rule takes a tile while the mass before it is
    below the share, where theirs can take none when rounded sums stay below it; masks other than causal work.

    Args:
        segment: tokens per segment, a multiple of `tile`. threshold: share of pooled mass kept, in (0, 1].
        tile: tokens per tile side. queries: also permute queries (the authors' code leaves them in place).
    """

    segment: int = 256
    threshold: float = 0.9
    tile: int = 128
    queries: bool = False
    name = "pbs"
    modes = ("train", "prefill")
    reads = "q, k, the last queries of the prompt"

    def __post_init__(self) -> None:
        if not isinstance(self.tile, int) or self.tile < 1:
            raise ValueError(f"tile must be an integer >= 1, got {self.tile!r}")
        if not isinstance(self.segment, int) or self.segment < 1 or self.segment % self.tile:
            raise ValueError(f"segment must be a multiple of the tile size {self.tile}, got {self.segment!r}")
        self.tiles()

    def tiles(self) -> Tiles:
        return Tiles(
            score=MeanPool(),
            select=Mass(self.threshold),
            tile=(self.tile, self.tile),
            order=SegmentSort(self.segment, self.tile, self.queries),
            always=(Own(self.segment), First()),
            rest=Skip(),
            compare_forced=False,
        )
