"""SVG-EAR: tiles of like tokens act as their means, but for those whose means err most for what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.recipes.svg2 import SVG2, Either
from tilewise.attention.rests import Pooled
from tilewise.attention.scores import AT_ONCE, MeanPool, grouped
from tilewise.attention.selects import Edges, Mass, Share
from tilewise.attention.stages import Chosen, Layout
from tilewise.tiles import NONE, TileMap, Visibility
from tilewise.tiles.visibility import take, to_heads


@dataclass(frozen=True, eq=False)
class MeansError:
    """The log of how much a tile's mean is off for a tile of queries, per cost: what to compute exactly first.

    For the mean query of a row, the sum over a tile's keys of `|exp(s) v - exp(s') v'|^2`, where s is the score
    and v the value of a key, and s' and v' those of the tile's mean. Divided by the number of keys to the power
    of `gamma`. All scores are shifted by the row's largest, so only tiles of a row compare. Costs a product of
    every mean query with every key. Grouped heads: each query head for itself.

    Args:
        values: `[B, H_kv, N_k, D_v]`, the values of the call in the tokens' own order; `attend` and
            `plan(..., v=v)` fill them in.
        gamma: 0 does not look at the cost, 1 is error per key.
        weights_only: take all values alike: the error is that of the weights alone.

    Raises ValueError without values, unless it looks at weights only, and for such as do not fit the keys.
    """

    values: Tensor | None = None
    gamma: float = 1.0
    weights_only: bool = False
    looks = "tile"

    def with_values(self, v: Tensor) -> MeansError:
        return replace(self, values=v)

    def score(self, layout: Layout, among: Tensor) -> Tensor:
        seen = layout.view.keys_seen()
        q, (k, counts) = layout.q_tiling.mean(layout.q)[0], layout.k_tiling.mean(layout.k, seen)
        (b, heads, rows, _), (n, tiles) = q.shape, (layout.k.shape[2], k.shape[2])
        norms, dots, centre = self._values(layout, seen)
        own = to_heads(layout.k_tiling.ids(n, q.device), heads).expand(b, heads, n)
        counts = to_heads(counts, heads).unsqueeze(2).to(q.dtype)
        hidden = ~to_heads(seen, heads).unsqueeze(2)
        keys = layout.k.to(q.dtype).masked_fill(~seen.unsqueeze(-1), 0)
        out, step = [], max(1, AT_ONCE // max(1, b * heads * n))
        if torch.compiler.is_compiling():  # a loop over lengths would compile again for each
            step = max(1, rows)
        for some in q.split(step, 2) if rows else ():
            scores = (grouped(some, keys) * layout.scale).masked_fill(hidden, -torch.inf)
            top = scores.amax(-1, keepdim=True) if n else scores.sum(-1, keepdim=True)
            top = top.masked_fill(top == -torch.inf, 0)
            weights, of_mean = (scores - top).exp(), (grouped(some, k) * layout.scale - top).exp()
            into = own.unsqueeze(2).expand_as(weights)
            both = [
                torch.zeros(*weights.shape[:3], tiles, dtype=q.dtype, device=q.device).scatter_add_(
                    3, into, x
                )
                for x in (weights.square() * norms, weights * dots)
            ]
            error = both[0] - 2 * of_mean * both[1] + of_mean.square() * centre * counts
            out.append(
                error.clamp(min=torch.finfo(error.dtype).tiny).log() - self.gamma * counts.clamp(min=1).log()
            )
        return torch.cat(out, 2) if out else q.new_zeros(b, heads, 0, tiles)

    def _values(self, layout: Layout, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`|v|^2` and `v v'` of every key `[B, H_q, 1, N_k]`, `|v'|^2` of every tile `[B, H_q, 1, T_k]`."""
        k = layout.k
        wide = torch.float64 if k.dtype == torch.float64 else torch.float32
        if self.weights_only:
            v = torch.ones(*k.shape[:3], 1, dtype=wide, device=k.device)
        elif self.values is None:
            raise ValueError("MeansError looks at values: plan(..., v=v), or weights_only=True")
        elif self.values.shape[:3] != k.shape[:3]:
            raise ValueError(
                f"values must be [{', '.join(map(str, k.shape[:3]))}, D_v], one for each key, got"
                f" {list(self.values.shape)}"
            )
        else:
            v = take(self.values.detach(), layout.k_order).to(wide)
        v = v.masked_fill(~seen.unsqueeze(-1), 0)
        means = layout.k_tiling.mean(v, seen)[0]
        own = take(means, layout.k_tiling.ids(k.shape[2], k.device))
        made = (v.square().sum(-1), (v * own).sum(-1), means.square().sum(-1))
        norms, dots, centre = (to_heads(x, layout.heads).unsqueeze(2) for x in made)
        return norms, dots, centre


@dataclass(frozen=True)
class SVGEAR(Method):
    """SVG-EAR: compensation by centroids, error-aware routing (Zhou et al., 2026, arXiv 2603.08982).

    Queries and keys are clustered as in `SVG2`. A tile that is not computed acts as its mean key and mean value,
    as often as it has keys, in the same softmax, so nothing is left out. What is computed exactly are then not
    the tiles with the most attention but those whose means err most: each row spends what SVG2 would spend on it
    (the tokens of the tiles that hold the share `threshold` of the estimated mass) on the tiles of the highest
    error per key (see `MeansError`), after the `least` share of the tiles with the most mass.

    Differs from the authors' code as `SVG2` does. A row may exceed its budget by one tile, as there. Made for
    attention without a causal mask: tiles that a mask cuts through are computed exactly, and a causal mask cuts
    nearly all tiles of scattered tokens. The choice looks at the whole prompt. Grouped heads: each query head
    chooses for itself.

    Args:
        clusters: how tokens are clustered, and the budget: its `threshold` and `least`.
        gamma: power of the cost that errors are divided by, >= 0.
        weights_only: estimate the error of the attention weights, without a look at values.
        values: of the call, `[B, H_kv, N_k, D_v]`; `attend` and `plan(..., v=v)` fill them in.

    A bias per key has no meaning for means of keys and raises ValueError.
    """

    clusters: SVG2 = field(default_factory=lambda: SVG2())
    gamma: float = 1.0
    weights_only: bool = False
    values: Tensor | None = field(default=None, repr=False, compare=False)
    modes = ("train", "prefill", "chunked prefill")
    reads = "q, k, v"

    def __post_init__(self) -> None:
        if not isinstance(self.clusters, SVG2):
            raise TypeError(f"clusters must be an SVG2, got {type(self.clusters).__name__}")
        if not isinstance(self.gamma, int | float) or not 0 <= self.gamma:
            raise ValueError(f"gamma must be a number >= 0, got {self.gamma!r}")

    @property
    def lookahead(self) -> str:
        return "prompt"

    def with_values(self, v: Tensor) -> SVGEAR:
        return replace(self, values=v)

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        if not q.shape[2] or not k.shape[2]:
            return Plan((Pass(view),), view)
        at = self.clusters.order().arrange(q, k, view, scale, self.clusters.tile)
        layout = Layout.arranged(at, q, k, view, scale)
        visible = layout.kinds() != NONE
        scores = MeansError(self.values, self.gamma, self.weights_only).score(layout, visible)
        keep = self._route(layout, visible, scores)
        exact = Pass(view, TileMap(keep, at.q_tiling, at.k_tiling), at.q_order, at.k_order)
        rest = (
            ()
            if self.clusters.threshold == 1
            else Pooled().passes(layout, Chosen(scores, keep, visible & ~keep))
        )
        return Plan((exact, *rest), view)

    def _route(self, layout: Layout, visible: Tensor, errors: Tensor) -> Tensor:
        """The tiles computed exactly, bool `[B, H_q, T_q, T_k]`."""
        forced = Edges().tiles(layout, visible) & visible
        mass = MeanPool(counted=True).score(layout, visible)
        least = Share(self.clusters.least)
        twice = Share(min(1.0, 2 * self.clusters.least))
        bought = Either(Mass(self.clusters.threshold), twice).select(mass, visible, forced) | forced
        first = (least.select(mass, visible, forced) | forced).expand_as(bought)
        sizes = layout.k_tiling.sizes(layout.k.shape[2], layout.k.device)
        sizes = to_heads(sizes, layout.heads).unsqueeze(2).expand_as(bought)
        left = ((bought.long() - first.long()) * sizes).sum(-1, keepdim=True)  # `first` is part of `bought`
        ranked = errors.masked_fill(~visible | first, -torch.inf).argsort(
            dim=-1, descending=True, stable=True
        )
        price = sizes.masked_fill(~visible | first, 0).gather(-1, ranked)
        taken = price.cumsum(-1) - price < left
        return first | (torch.zeros_like(first).scatter_(-1, ranked, taken) & visible)
