"""The stages of a tile method, and `Tiles`, which composes them.

order    which tokens share a tile          score    how much a tile matters
select   which tiles are paid for           always   tiles paid for whatever their score
rest     what the other tiles contribute    precision  in what numbers tiles are computed
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol, cast

from torch import Tensor

from tilewise.attention.method import LOOKAHEADS, Method
from tilewise.attention.plans import Added, Pass, Plan
from tilewise.attention.precisions import Precision
from tilewise.tiles import NONE, TileMap, Tiling, Visibility
from tilewise.tiles.visibility import take, to_heads


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Which tokens share a tile: how queries and keys are ordered, and then cut.

    Args:
        q_tiling, k_tiling: the cuts. q_order `[B|1, H_q|1, N_q]`, k_order `[B|1, H_kv|1, N_k]`: which token stands
            at each place; None leaves tokens where they are.
    """

    q_tiling: Tiling
    k_tiling: Tiling
    q_order: Tensor | None = None
    k_order: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """What the stages after `order` work on: queries and keys in tile order, and how they are cut.

    `view` is in tile order; `given` is the same in the tokens' own order, from which `q_order` and `k_order` lead.
    """

    q: Tensor
    k: Tensor
    view: Visibility
    q_tiling: Tiling
    k_tiling: Tiling
    scale: float
    q_order: Tensor | None = None
    k_order: Tensor | None = None
    given: Visibility | None = None

    @classmethod
    def arranged(cls, at: Arrangement, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Layout:
        """Queries, keys and what they see, all in the tokens' own order, put in that of an arrangement."""
        return cls(
            take(q, at.q_order), take(k, at.k_order), view.permute(at.q_order, at.k_order), at.q_tiling,
            at.k_tiling, scale, at.q_order, at.k_order, view,
        )  # fmt: skip

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    def kinds(self) -> Tensor:
        """NONE, PARTIAL or FULL for every tile, int8 `[B|1, H_q|1, T_q, T_k]`."""
        return to_heads(self.view.tiles(self.q_tiling, self.k_tiling), self.heads)


class Order(Protocol):
    """Chooses which tokens share a tile."""

    @property
    def looks(self) -> str:
        """How far the choice for a query depends on later queries, see `Method.lookahead`."""

    def arrange(
        self, q: Tensor, k: Tensor, view: Visibility, scale: float, tile: tuple[int, int]
    ) -> Arrangement:
        """How tokens are ordered and cut; `tile` is the (queries, keys) asked for, which clusters may ignore."""


class Score(Protocol):
    """Says how much a tile matters."""

    @property
    def looks(self) -> str:
        """As in `Order`."""

    def score(self, layout: Layout, among: Tensor) -> Tensor:
        """Float32 `[B, H_q, T_q, T_k]`; only compared within a row. `among` marks the tiles to compare."""


class Always(Protocol):
    """Names tiles that are paid for whatever their score."""

    def tiles(self, layout: Layout, visible: Tensor) -> Tensor:
        """Bool `[B|1, H_q|1, T_q, T_k]`."""


class SeesValues(Protocol):
    """What a score has besides if it looks at values."""

    def with_values(self, v: Tensor) -> Score:
        """The same score, for a call with the values `v [B, H_kv, N_k, D_v]`, in the tokens' own order."""


class Select(Protocol):
    """Turns scores into a choice of tiles."""

    @property
    def looks(self) -> str:
        """As in `Order`."""

    def select(self, scores: Tensor, among: Tensor, forced: Tensor) -> Tensor:
        """Bool `[B, H_q, T_q, T_k]`: chosen tiles of `among`; `forced` tiles are chosen first."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """What select decided.

    Args:
        scores: float32 `[B, H_q, T_q, T_k]`. keep: bool, the tiles that are paid for. left: bool, visible tiles
            that are not.
    """

    scores: Tensor
    keep: Tensor
    left: Tensor


class Rest(Protocol):
    """Says what tiles that were not chosen contribute."""

    def passes(self, layout: Layout, chosen: Chosen) -> tuple[Pass, ...]:
        """Further passes, over the tiles `chosen.left` or some of them."""

    def added(self, layout: Layout, chosen: Chosen) -> tuple[Added, ...]:
        """What they give outside the softmax."""


@dataclass(frozen=True)
class AsGiven:
    """Order: tokens stay where they are."""

    looks = "none"

    def arrange(self, q, k, view, scale, tile):
        return Arrangement(Tiling(tile[0]), Tiling(tile[1]))


@dataclass(frozen=True)
class Skip:
    """Rest: tiles that were not chosen contribute nothing."""

    def passes(self, layout, chosen):
        return ()

    def added(self, layout, chosen):
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
        return max(self.order.looks, score, self.select.looks, key=LOOKAHEADS.index)

    def _own_apart(self) -> bool:
        """Whether a tile that holds later keys, the query's own, has no say in the choice of others."""
        own = any(getattr(stage, "holds_own", False) for stage in self.always)
        return own and (not self.compare_forced or getattr(self.select, "by_rank", False))

    def with_values(self, v: Tensor) -> Tiles:
        if not hasattr(self.score, "with_values"):
            return self
        return replace(self, score=cast(SeesValues, self.score).with_values(v))

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        at = self.order.arrange(q, k, view, scale, self.tile)
        layout = Layout.arranged(at, q, k, view, scale)
        kinds = layout.kinds()
        visible = kinds != NONE
        forced = visible & False
        for stage in self.always:
            forced = forced | (to_heads(stage.tiles(layout, visible), layout.heads) & visible)
        among = visible if self.compare_forced else visible & ~forced
        scores = self.score.score(layout, among)
        keep = self.select.select(scores, among, forced) & visible | forced
        tiles = TileMap(keep, at.q_tiling, at.k_tiling)
        exact = Pass(view, tiles, at.q_order, at.k_order, precision=self.precision)
        chosen = Chosen(scores, keep, visible & ~keep)
        passes = (exact, *self.rest.passes(layout, chosen))
        return Plan(passes, view, added=self.rest.added(layout, chosen))


class Recipe(Method):
    """A named method with a paper's defaults: subclasses give `tiles()`, the composition they stand for."""

    def tiles(self) -> Tiles:
        """The stages this recipe is made of."""
        raise TypeError(f"{type(self).__name__} does not name its stages")

    @property
    def lookahead(self) -> str:
        return self.tiles().lookahead

    def with_values(self, v: Tensor) -> Method:
        tiles = self.tiles()
        given = tiles.with_values(v)
        return self if given is tiles else given

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        return self.tiles().plan(q, k, view, scale)
