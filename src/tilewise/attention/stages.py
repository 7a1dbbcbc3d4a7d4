"""The stages of a tile method, and `Tiles`, which composes them.

order    which tokens share a tile          score    how much a tile matters
select   which tiles are paid for           always   tiles paid for whatever their score
rest     what the other tiles contribute    precision  in what numbers tiles are computed
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tilewise.attention.method import LOOKAHEADS, Method
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.precisions import Precision
from tilewise.tiles import NONE, TileMap, Tiling, Visibility
from tilewise.tiles.visibility import take, to_heads


@dataclass(frozen=True, eq=False)
class Layout:
    """What the stages after `order` work on: queries and keys in tile order, and how they are cut."""

    q: Tensor
    k: Tensor
    view: Visibility
    q_tiling: Tiling
    k_tiling: Tiling
    scale: float

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    def kinds(self) -> Tensor:
        """NONE, PARTIAL or FULL for every tile, int8 `[B|1, H_q|1, T_q, T_k]`."""
        return to_heads(self.view.tiles(self.q_tiling, self.k_tiling), self.heads)


class Order(Protocol):
    """Chooses permutations of queries and keys."""

    looks: str

    def permutations(
        self, q: Tensor, k: Tensor, view: Visibility, scale: float
    ) -> tuple[Tensor | None, Tensor | None]:
        """Orders `[B|1, H_q|1, N_q]` and `[B|1, H_kv|1, N_k]`; None leaves tokens where they are."""


class Score(Protocol):
    """Says how much a tile matters."""

    looks: str

    def score(self, layout: Layout, among: Tensor) -> Tensor:
        """Float32 `[B, H_q, T_q, T_k]`; only compared within a row. `among` marks the tiles to compare."""


class Always(Protocol):
    """Names tiles that are paid for whatever their score."""

    def tiles(self, layout: Layout, visible: Tensor) -> Tensor:
        """Bool `[B|1, H_q|1, T_q, T_k]`."""


class Select(Protocol):
    """Turns scores into a choice of tiles."""

    def select(self, scores: Tensor, among: Tensor, forced: Tensor) -> Tensor:
        """Bool `[B, H_q, T_q, T_k]`: chosen tiles of `among`; `forced` tiles are chosen first."""


class Rest(Protocol):
    """Says what tiles that were not chosen contribute."""

    def passes(self, layout: Layout, view: Visibility, left: Tensor, q_order, k_order) -> tuple[Pass, ...]:
        """Further passes for the tiles `left` (bool `[B, H_q, T_q, T_k]`, all visible)."""


@dataclass(frozen=True)
class AsGiven:
    """Order: tokens stay where they are."""

    looks = "none"

    def permutations(self, q, k, view, scale):
        return None, None


@dataclass(frozen=True)
class Skip:
    """Rest: tiles that were not chosen contribute nothing."""

    def passes(self, layout, view, left, q_order, k_order):
        return ()


@dataclass(frozen=True)
class Tiles(Method):
    """A method composed of stages; every combination is a method, named by a paper or not.

    Args:
        tile: (queries, keys) per tile; a height of 1 routes every query alone.
        score, select: how tiles are compared and chosen.
        order: which tokens share a tile. always: tiles chosen whatever their score. rest: what others give.
        compare_forced: whether tiles of `always` take part in the comparison of scores.
        precision: in what numbers the chosen tiles are computed; None is the inputs' own precision.
    """

    score: Score
    select: Select
    tile: tuple[int, int] = (128, 128)
    order: Order = field(default_factory=AsGiven)
    always: tuple[Always, ...] = ()
    rest: Rest = field(default_factory=Skip)
    compare_forced: bool = True
    precision: Precision | None = None

    def __post_init__(self) -> None:
        if len(self.tile) != 2 or not all(isinstance(size, int) and size >= 1 for size in self.tile):
            raise ValueError(f"tile must be two integers >= 1, (queries, keys), got {self.tile!r}")

    @property
    def lookahead(self) -> str:
        """The farthest look of its stages; a query routed alone looks at no other."""
        score = self.score.looks
        if score == "tile" and self.tile[0] == 1 and self._own_apart():
            score = "none"
        return max(self.order.looks, score, key=LOOKAHEADS.index)

    def _own_apart(self) -> bool:
        """Whether a tile that holds later keys, the query's own, has no say in the choice of others."""
        own = any(getattr(stage, "holds_own", False) for stage in self.always)
        return own and (not self.compare_forced or getattr(self.select, "by_rank", False))

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        q_order, k_order = self.order.permutations(q, k, view, scale)
        q_tiling, k_tiling = Tiling(self.tile[0]), Tiling(self.tile[1])
        ordered = view.permute(q_order, k_order)
        layout = Layout(take(q, q_order), take(k, k_order), ordered, q_tiling, k_tiling, scale)
        kinds = layout.kinds()
        visible = kinds != NONE
        forced = visible & False
        for stage in self.always:
            forced = forced | (to_heads(stage.tiles(layout, visible), layout.heads) & visible)
        among = visible if self.compare_forced else visible & ~forced
        keep = self.select.select(self.score.score(layout, among), among, forced) & visible | forced
        exact = Pass(view, TileMap(keep, q_tiling, k_tiling), q_order, k_order, precision=self.precision)
        rest = self.rest.passes(layout, view, visible & ~keep, q_order, k_order)
        return Plan((exact, *rest), view)


class Recipe(Method):
    """A named method with a paper's defaults: subclasses give `tiles()`, the composition they stand for."""

    def tiles(self) -> Tiles:
        """The stages this recipe is made of."""
        raise TypeError(f"{type(self).__name__} does not name its stages")

    @property
    def lookahead(self) -> str:
        return self.tiles().lookahead

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        return self.tiles().plan(q, k, view, scale)
