"""Selects: which tiles are paid for, given their scores; and tiles that always are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from tilewise.attention.stages import Layout, Select
from tilewise.tiles import PARTIAL
from tilewise.tiles.visibility import HIDDEN, to_heads

Over = Literal["row", "head"]


@dataclass(frozen=True)
class TopK:
    """The `k` best tiles of each row; forced tiles are among them.

    With `over="head"` rows share one budget: the best `k` times the number of rows, wherever they lie. Scores must
    then be comparable between rows, and the choice for a query depends on the whole prompt.
    """

    k: int
    over: Over = "row"
    by_rank = True

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"top-k must be an integer >= 1, got {self.k!r}")
        _check_over(self.over)

    @property
    def looks(self) -> str:
        return "prompt" if self.over == "head" else "none"

    def select(self, scores: Tensor, among: Tensor, forced: Tensor) -> Tensor:
        if self.over == "head":
            return _by_head(TopK(max(1, self.k * scores.shape[2])), scores, among, forced)
        ranked = scores.masked_fill(~among, -torch.inf).masked_fill(forced, torch.inf)
        if self.k >= scores.shape[-1]:
            return among.expand_as(scores)
        best = ranked.topk(self.k, -1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & (among | forced)


@dataclass(frozen=True)
class Share:
    """The best `share` of each row's tiles, rounded up: as many as a density says. Forced tiles are among them.

    Shares of the tiles that take part and those that are forced, so a causal row of few tiles keeps few. `over` as
    in `TopK`.
    """

    share: float
    over: Over = "row"
    by_rank = True

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share!r}")
        _check_over(self.over)

    @property
    def looks(self) -> str:
        return "prompt" if self.over == "head" else "none"

    def select(self, scores: Tensor, among: Tensor, forced: Tensor) -> Tensor:
        if self.share == 1:
            return among.expand_as(scores)
        if self.over == "head":
            return _by_head(Share(self.share), scores, among, forced)
        taking = among | forced
        ranked = scores.masked_fill(~among, -torch.inf).masked_fill(forced, torch.inf)
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        place = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, place)
        # A count a hair above a whole number is that number: 0.1 of 30 tiles are 3.
        most = (self.share * taking.sum(-1, keepdim=True) - 1e-6).ceil()
        return (rank < most) & taking


@dataclass(frozen=True)
class Mass:
    """The fewest tiles of each row that hold a share `threshold` of the row's score.

    A tile is taken while the mass before it is below the share, so that rounding never leaves a row empty.
    Forced tiles come first and their mass counts. A threshold of 1 takes every tile. `over` as in `TopK`: the
    fewest tiles of a head that hold a share of the head's score.
    """

    threshold: float
    over: Over = "row"

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"mass threshold must be in (0, 1], got {self.threshold!r}")
        _check_over(self.over)

    @property
    def looks(self) -> str:
        return "prompt" if self.over == "head" else "none"

    def select(self, scores: Tensor, among: Tensor, forced: Tensor) -> Tensor:
        if self.threshold == 1:
            return among.expand_as(scores)
        if self.over == "head":
            return _by_head(Mass(self.threshold), scores, among, forced)
        scores = scores.masked_fill(~among, 0)
        first = scores.masked_fill(forced & among, torch.inf)
        order = first.argsort(dim=-1, descending=True, stable=True)
        ordered = scores.gather(-1, order)
        before = ordered.cumsum(-1) - ordered
        taken = before < self.threshold * scores.sum(-1, keepdim=True)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, taken) & among


def _check_over(over: str) -> None:
    if over not in ("row", "head"):
        raise ValueError(f"over must be 'row' or 'head', got {over!r}")


def _by_head(select: Select, scores: Tensor, among: Tensor, forced: Tensor) -> Tensor:
    """A choice over all rows of a head as if they were one."""
    among, forced = (x.expand(*scores.shape[:2], *x.shape[2:]) for x in (among, forced))
    flat = (x.flatten(2).unsqueeze(2) for x in (scores, among, forced))
    return select.select(*flat).view(scores.shape)


@dataclass(frozen=True)
class Own:
    """Always: tiles whose keys lie in the same segment of positions as some of the tile's queries.

    A segment of 1 gives the diagonal: tiles that include a query's own position.
    """

    segment: int = 1
    holds_own = True

    def __post_init__(self) -> None:
        if not isinstance(self.segment, int) or self.segment < 1:
            raise ValueError(f"segment must be an integer >= 1, got {self.segment!r}")

    def tiles(self, layout: Layout, visible: Tensor) -> Tensor:
        far = 2**61
        q = torch.div(layout.view.q_pos, self.segment, rounding_mode="floor").unsqueeze(-1)
        pos = to_heads(layout.view.pos[..., :1], layout.heads)
        k = torch.div(pos, self.segment, rounding_mode="floor")
        q_first = layout.q_tiling.split(q, far).amin(3)  # [b, h, T_q, 1]
        q_last = layout.q_tiling.split(q, -far).amax(3)
        k_first = layout.k_tiling.split(k.masked_fill(pos == HIDDEN, far), far).amin(3).mT  # [b, h, 1, T_k]
        k_last = layout.k_tiling.split(k, -far).amax(3).mT
        return (k_first <= q_last) & (q_first <= k_last)


@dataclass(frozen=True)
class First:
    """Always: the tile that holds the earliest position a row's tiles reach, where attention sinks lie."""

    def tiles(self, layout: Layout, visible: Tensor) -> Tensor:
        far = 2**61
        pos = to_heads(layout.view.pos[..., :1], layout.heads)
        k_first = layout.k_tiling.split(pos.masked_fill(pos == HIDDEN, far), far).amin(3).mT  # [b, h, 1, T_k]
        reached = torch.where(visible, k_first, far)
        earliest = pad(reached, (0, 1), value=far).amin(-1, keepdim=True)  # one more, as there may be no tile
        return visible & (reached == earliest)


@dataclass(frozen=True)
class Edges:
    """Always: tiles that the mask cuts through, of which a query sees some keys and not others.

    No mean of a tile stands for the part of it that is seen, so a method that reads means computes these exactly.
    """

    def tiles(self, layout: Layout, visible: Tensor) -> Tensor:
        return layout.kinds() == PARTIAL
