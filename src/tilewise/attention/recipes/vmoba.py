"""VMoBA: queries of a video routed to blocks of frames, of places, or of both, layer by layer in turn."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tilewise.attention.orders import Boxes
from tilewise.attention.scores import Centroid
from tilewise.attention.selects import Mass
from tilewise.attention.stages import Arrangement, Layout, Order, Recipe, Select, Skip, Tiles
from tilewise.tiles import Tiling, Visibility
from tilewise.tiles.visibility import take, to_heads


@dataclass(frozen=True)
class EachQuery:
    """Order: keys share tiles as `order` says, and every query is a tile of its own, where it stood."""

    order: Order

    @property
    def looks(self) -> str:
        return self.order.looks

    def arrange(
        self, q: Tensor, k: Tensor, view: Visibility, scale: float, tile: tuple[int, int]
    ) -> Arrangement:
        made = self.order.arrange(q, k, view, scale, tile)
        return Arrangement(Tiling(1), made.k_tiling, None, made.k_order)


@dataclass(frozen=True)
class OwnTile:
    """Always: the tile of keys that a query lies in itself, whatever the order. Needs as many queries as keys."""

    def tiles(self, layout: Layout, visible: Tensor) -> Tensor:
        n = layout.k.shape[2]
        if layout.q.shape[2] != n:
            raise ValueError(
                f"a query's own tile needs as many queries as keys, got {layout.q.shape[2]} and {n}"
            )
        own = layout.k_tiling.ids(n, layout.q.device)
        if layout.k_order is not None:
            own = take(own, to_heads(layout.k_order, layout.heads).argsort(-1))
        own = take(own, layout.q_order).unsqueeze(-1)
        mine = own == torch.arange(layout.k_tiling.count(n), device=own.device)
        return layout.q_tiling.split(mine, False).any(3)


@dataclass(frozen=True)
class Similarity:
    """Score: the product of a query with the mean key of a tile, scaled to run from 0 to 1 over each head.

    Comparable between the queries of a head, and never negative, so that shares of its sum can be taken. Where all
    are equal they are 1. Grouped heads: each query head for itself.
    """

    looks = "prompt"

    def score(self, layout: Layout, among: Tensor) -> Tensor:
        scores = Centroid().score(layout, among).float()
        low = scores.masked_fill(~among, torch.inf).flatten(2)
        high = scores.masked_fill(~among, -torch.inf).flatten(2)
        if not low.shape[2]:
            return scores
        low, high = (x[..., None, None] for x in (low.amin(2), high.amax(2)))
        flat = high <= low
        return torch.where(flat, 1.0, (scores - low) / (high - low).masked_fill(flat, 1)).masked_fill(
            ~among, 0
        )


@dataclass(frozen=True)
class VMoBA(Recipe):
    """Mixture of block attention for video (Wu et al., 2025, arXiv 2506.23858).

    Every query is routed alone, as in MoBA, to blocks of keys by the product with their mean key. Three things
    differ: blocks are boxes of the grid, cut anew in each layer, along time, along height and width, along all
    three, and so on in turn; pairs of a query and a block compete over a whole head, so that queries which matter
    get more of them; and as many are taken as hold a share of the head's similarity, so that heads which spread
    get more. A query's own block is always read. Trains like any attention: choices have no gradient.

    Differs from the paper: where the grid does not divide, blocks at its end are smaller; a mask holds as well.
    Similarity is scaled from 0 to 1 over each head before shares of it are taken, as in the authors' code.

    Args:
        grid: tokens along time, height and width, in this order, time slowest.
        layer: which layer this is, from 0.
        time: frames of a block in layers 0, 3, ...: all places of so many frames.
        space: (height, width) of a block in layers 1, 4, ...: these places of all frames.
        cube: (time, height, width) of a block in layers 2, 5, ...
        select: how blocks are chosen; `TopK(k, over="head")` takes k for each query on average.
        before: tokens before the grid (text), a block by themselves.

    Raises ValueError for settings outside these and for other numbers of tokens than the grid's.
    """

    grid: tuple[int, int, int]
    layer: int = 0
    time: int = 1
    space: tuple[int, int] = (4, 4)
    cube: tuple[int, int, int] = (2, 4, 4)
    select: Select = field(default_factory=lambda: Mass(0.25, over="head"))
    before: int = 0
    modes = ("train", "prefill")
    reads = "q, k"
    needs = "a grid of tokens"

    def __post_init__(self) -> None:
        if not isinstance(self.grid, tuple) or len(self.grid) != 3:
            raise ValueError(f"grid must be three integers, (time, height, width), got {self.grid!r}")
        if not isinstance(self.layer, int) or isinstance(self.layer, bool) or self.layer < 0:
            raise ValueError(f"layer must be an integer >= 0, got {self.layer!r}")
        for name, value, axes in (("space", self.space, 2), ("cube", self.cube, 3)):
            if not isinstance(value, tuple) or len(value) != axes:
                raise ValueError(f"{name} must be {axes} integers, got {value!r}")
        self.boxes()

    def boxes(self) -> Boxes:
        """The blocks of this layer."""
        frames, height, width = self.grid
        box = ((self.time, height, width), (frames, *self.space), self.cube)[self.layer % 3]
        return Boxes(self.grid, box, self.before)

    def tiles(self) -> Tiles:
        return Tiles(
            score=Similarity(),
            select=self.select,
            tile=(1, 1),
            order=EachQuery(self.boxes()),
            always=(OwnTile(),),
            rest=Skip(),
        )
