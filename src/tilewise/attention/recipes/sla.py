"""SLA: critical tiles exactly, marginal tiles by linear attention, negligible tiles not at all; trainable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.attention.api import attend, plan
from tilewise.attention.plans import Added
from tilewise.attention.scores import AT_ONCE, MeanPool
from tilewise.attention.selects import Edges, Share
from tilewise.attention.stages import AsGiven, Chosen, Layout, Order, Recipe, Skip, Tiles
from tilewise.tiles import FULL, Mask, TileMap
from tilewise.tiles.visibility import take, to_heads

Feature = Literal["softmax", "elu", "relu"]


def features(x: Tensor, kind: Feature) -> Tensor:
    """What linear attention takes in place of queries and keys: the softmax over head_dim, elu + 1, or relu."""
    if kind == "softmax":
        return x.softmax(-1)
    return F.elu(x) + 1 if kind == "elu" else F.relu(x)


@dataclass(frozen=True, eq=False)
class LinearTiles:
    """Linear attention of each tile of queries over tiles of keys of its own: the part of SLA outside the softmax.

    With phi the features, a tile of queries that reads the tiles M gets `phi(q) H / (phi(q) z)`, where H is the sum
    over M of `phi(k)^T v` and z that of `phi(k)`. These sums are made once per tile of keys and added up over M for
    each tile of queries, a few at a time. Differentiable in q, k, v and the projection. float32 or wider.

    Args:
        tiles: M, in the order of `q_order` and `k_order`; only tiles that their queries see whole.
        seen: bool `[B|1, H_kv|1, N_k]` in the tokens' own order, keys that are no padding.
        feature: see `features`. project: applied to the result along D_v; None gives it out as it is.
        work: scores' worth of work, float64 `[B|1, H|1]`.
    """

    tiles: TileMap
    seen: Tensor
    feature: Feature
    project: nn.Module | None
    work: Tensor
    q_order: Tensor | None = None
    k_order: Tensor | None = None

    def run(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = self.attend(q, k, v)
        if self.project is None:
            return out
        wanted = getattr(self.project, "in_features", v.shape[3])
        if v.shape[3] != wanted:
            raise ValueError(f"v must have the layer's head_dim {wanted}, got {v.shape[3]}")
        weight = next(self.project.parameters(), None)
        return self.project(out if weight is None else out.to(weight.dtype))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The linear attention before the projection, `[B, H_q, N_q, D_v]`; 0 for queries without such tiles."""
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        (b, heads, n_q, d), kv_heads, d_v = q.shape, k.shape[1], v.shape[3]
        hidden = ~take(self.seen, self.k_order).unsqueeze(-1)
        q, k, v = (take(x, order) for x, order in ((q, self.q_order), (k, self.k_order), (v, self.k_order)))
        k, v = (x.to(wide).masked_fill(hidden, 0) for x in (k, v))  # what is hidden may be NaN
        made = features(k, self.feature).masked_fill(hidden, 0)
        ones = torch.ones_like(v[..., :1])  # z is the column of H that belongs to a value of 1
        keys, values = (self.tiles.k_tiling.split(x, 0) for x in (made, torch.cat([v, ones], -1)))
        sums = (keys.mT @ values).flatten(3)  # [b, h_kv, T_k, d * (d_v + 1)]
        rows = self.tiles.q_tiling.split(features(q.to(wide), self.feature), 0)  # [b, h, T_q, size, d]
        keep = (
            to_heads(self.tiles.keep, heads)
            .expand(b, heads, -1, -1)
            .unflatten(1, (kv_heads, heads // kv_heads))
        )
        step = max(1, AT_ONCE // max(1, b * heads * sums.shape[3]))
        if torch.compiler.is_compiling():  # a loop over lengths would compile again for each
            step = max(1, rows.shape[2])
        out = []
        for some, marked in zip(rows.split(step, 2), keep.split(step, 3)):
            state = (marked.to(wide).flatten(2, 3) @ sums).view(b, heads, -1, d, d_v + 1)
            out.append(some @ state)
        both = self.tiles.q_tiling.join(torch.cat(out, 2), n_q)
        weight = both[..., d_v:]
        result = both[..., :d_v] / weight.masked_fill(weight == 0, 1)
        return result if self.q_order is None else take(result, self.q_order.argsort(-1))

    def cost(self) -> Tensor:
        return self.work


@dataclass(frozen=True, eq=False)
class LinearRest(Skip):
    """Rest: tiles that were not chosen give linear attention, added outside the softmax, but for the least of them.

    Args:
        negligible: share of a row's visible tiles, those of the lowest scores, that give nothing, in [0, 1);
            rounded down, and only tiles that were not chosen.
        feature, project: see `LinearTiles`. value_dim: D_v, to count the work.
    """

    negligible: float
    feature: Feature = "softmax"
    project: nn.Module | None = None
    value_dim: int | None = None

    def added(self, layout: Layout, chosen: Chosen) -> tuple[Added, ...]:
        if not layout.q.shape[2] or not layout.k.shape[2]:
            return ()
        given = layout.view if layout.given is None else layout.given
        tiles = TileMap(self.marginal(layout, chosen), layout.q_tiling, layout.k_tiling)
        work = self._work(layout, tiles.keep)
        seen = given.keys_seen()
        return (LinearTiles(tiles, seen, self.feature, self.project, work, layout.q_order, layout.k_order),)

    def marginal(self, layout: Layout, chosen: Chosen) -> Tensor:
        """Which tiles give linear attention, bool `[B, H_q, T_q, T_k]`."""
        visible = (chosen.keep | chosen.left).sum(-1, keepdim=True)
        least = (self.negligible * visible + 1e-6).floor()
        ranked = chosen.scores.masked_fill(~chosen.left, torch.inf)
        order = ranked.argsort(dim=-1, stable=True)
        place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, place)
        return chosen.left & (rank >= least) & (layout.kinds() == FULL)

    def _work(self, layout: Layout, marginal: Tensor) -> Tensor:
        """Multiplications over those of one score, head_dim + D_v: float64 `[B, H_q]`."""
        d, (n_q, n_k) = layout.q.shape[3], (layout.q.shape[2], layout.k.shape[2])
        d_v = d if self.value_dim is None else self.value_dim
        share = layout.heads // layout.k.shape[1]  # query heads that share the sums over a tile
        applied = n_q * (d * (d_v + 1) + (d_v * d_v if self.project is not None else 0))
        added = marginal.sum((2, 3)).double() * d * (d_v + 1)
        return (n_k * d * (d_v + 1) / share + added + applied) / (d + d_v)


@dataclass(frozen=True, eq=False)
class SparseLinear(Recipe):
    """The method of an `SLA` module, which see."""

    critical: float
    negligible: float
    tile: tuple[int, int]
    feature: Feature
    order: Order
    project: nn.Module | None
    value_dim: int | None = None
    modes = ("train", "prefill", "chunked prefill")
    reads = "q, k"
    needs = "a learned projection"

    def tiles(self) -> Tiles:
        return Tiles(
            score=MeanPool(counted=True),
            select=Share(self.critical),
            tile=self.tile,
            order=self.order,
            always=(Edges(),),
            rest=LinearRest(self.negligible, self.feature, self.project, self.value_dim),
        )


def _ridge(grams: Tensor, moments: Tensor) -> Tensor:
    """The matrix W for `X W ~ Y`, from `X^T X` and `X^T Y` of several calls, `[calls, D, D]`, with a ridge that is
    chosen on calls left out in turn; 0 where that is best."""
    whole, wanted = grams.sum(0), moments.sum(0)
    size = whole.trace() / len(whole)
    best, least = torch.zeros_like(wanted), 0.0
    if not size > 0:
        return best
    for ridge in (1e-6, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0):
        add = ridge * size * torch.eye(len(whole), dtype=whole.dtype, device=whole.device)
        lost = 0.0
        for gram, moment in zip(grams, moments):
            made = torch.linalg.solve(whole - gram + add, wanted - moment)
            lost += float(
                (made * (gram @ made - 2 * moment)).sum()
            )  # squares that are left, less those of W = 0
        if lost < least:
            best, least = torch.linalg.solve(whole + add, wanted), lost
    return best


class SLA(nn.Module):
    """Sparse-linear attention, made to be fine-tuned (Zhang et al., 2025, arXiv 2509.24006).

    Each row of tiles is parted by the pooled scores: the best share is critical and computed exactly, in a softmax
    over these tiles alone; the lowest share is negligible and skipped; the rest is marginal and gets linear
    attention. The answer is the sum, `sparse + project(linear)`, with one learned matrix for all heads, 0 at the
    start: training sets out from sparse attention alone. Forward and backward run through one call:

        layer = SLA(head_dim=64)
        out = attend(q, k, v, layer.method())

    Beside a model that stays as it is, `fit` sets the projection alone, by ridge regression.

    Follows the paper, not the authors' open code, whose linear part runs over all keys, critical and negligible
    ones too. Differs from both: the projection has no constant term, so that queries without marginal tiles get
    nothing from it; tiles that the mask cuts through are critical, whatever their score, so any mask works; the
    negligible share is of the visible tiles. Grouped heads: each query head chooses for itself.

    Args:
        head_dim: D_v of the calls. critical, negligible: shares of a row's visible tiles, in (0, 1] and [0, 1).
        tile: (queries, keys) per tile. feature: phi of the linear part, "softmax" over head_dim, "elu" + 1, "relu".
        order: which tokens share a tile; None as given, for a video `Boxes(grid, box)`.

    Raises ValueError for settings outside these, and when called with values of another width.
    """

    kind: ClassVar[str] = "linear"

    def __init__(
        self,
        head_dim: int,
        critical: float = 0.05,
        negligible: float = 0.1,
        *,
        tile: tuple[int, int] = (64, 64),
        feature: Feature = "softmax",
        order: Order | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(head_dim, int) or head_dim < 1:
            raise ValueError(f"head_dim must be an integer >= 1, got {head_dim!r}")
        if not 0 < critical <= 1:
            raise ValueError(f"critical must be in (0, 1], got {critical!r}")
        if not 0 <= negligible < 1:
            raise ValueError(f"negligible must be in [0, 1), got {negligible!r}")
        if feature not in ("softmax", "elu", "relu"):
            raise ValueError(f"feature must be 'softmax', 'elu' or 'relu', got {feature!r}")
        self.head_dim, self.critical, self.negligible = head_dim, critical, negligible
        self.tile, self.feature = cast(tuple[int, int], tuple(tile)), feature
        self.order = AsGiven() if order is None else order
        self.project = nn.Linear(head_dim, head_dim, bias=False)
        nn.init.zeros_(self.project.weight)
        self.method().tiles()

    @torch.no_grad()
    def fit(
        self, calls: Iterable[tuple[Tensor, Tensor, Tensor]], *, mask: Mask | Tensor | str | None = None
    ) -> None:
        """Set the projection alone, to what brings the answers to such calls nearest to dense attention's.

        Args:
            calls: of one layer, at least two, `q [B, H_q, N, D]`, `k [B, H_kv, N, D]`, `v [B, H_kv, N, head_dim]`:
                what the frozen model's attention sees. mask: as in `attend`.

        Ridge regression over all queries and heads, in float64: how much the matrix is drawn towards 0 is what does
        best on each call when it is fitted to the others. Where no matrix helps on calls left out it stays 0.
        Raises ValueError for fewer than two calls.
        """
        method, grams, moments = replace(self.method(), project=None), [], []
        for q, k, v in calls:
            made = plan(method, q, k, mask=mask)
            sparse = attend(q, k, v, replace(made, added=()), mask=mask)
            missing = (cast(Tensor, attend(q, k, v, mask=mask)) - cast(Tensor, sparse)).flatten(0, 2).double()
            linear = torch.stack([part.run(q, k, v, q.shape[3] ** -0.5) for part in made.added]).sum(0)
            linear = linear.flatten(0, 2).double()
            grams.append(linear.mT @ linear)
            moments.append(linear.mT @ missing)
        if len(grams) < 2:
            raise ValueError(f"calls must hold at least two (q, k, v), got {len(grams)}")
        self.project.weight.copy_(_ridge(torch.stack(grams), torch.stack(moments)).mT)

    def settings(self) -> dict[str, Any]:
        """What it is made with, for a file's header. Raises ValueError for an order, which files do not hold."""
        if not isinstance(self.order, AsGiven):
            raise ValueError(f"a file holds an SLA in the tokens' own order, this one has {self.order!r}")
        names = ("head_dim", "critical", "negligible", "feature")
        return {**{name: getattr(self, name) for name in names}, "tile": list(self.tile)}

    def method(self) -> SparseLinear:
        """The method with this layer's projection, to be given to `attend`."""
        return SparseLinear(
            self.critical, self.negligible, self.tile, self.feature, self.order, self.project, self.head_dim
        )
