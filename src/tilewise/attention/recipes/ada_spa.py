"""AdaSpa: tiles found by the true attention of one denoising step, and kept for the steps that follow."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tilewise.attention.api import attend
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.recipes.svg2 import Step
from tilewise.attention.scores import AT_ONCE, grouped
from tilewise.attention.selects import Share
from tilewise.attention.stages import AsGiven, Layout, Order
from tilewise.tiles import Everything, Partial, TileMap
from tilewise.tiles.visibility import take, to_heads

GOOD_RECALL = 0.8  # heads that keep more of their attention give up tiles


def block_mass(layout: Layout, lse: Tensor) -> Tensor:
    """The attention in every tile, float32 `[B, H_q, T_q, T_k]`, in one pass over the scores.

    Args:
        lse: of every query over all its keys, float32 `[B, H_q, N_q]` in tile order: `exp(score - lse)` is the
            weight, and nothing needs to be known of a row but this. Of an earlier step, it makes an estimate.

    Sums within tiles; a few rows at a time, so nothing N x N is held. Everything is visible.
    """
    (b, heads, n_q, _), n_k = layout.q.shape, layout.k.shape[2]
    out, step = [], max(1, AT_ONCE // max(1, b * heads * n_k))
    wide = torch.float64 if layout.q.dtype == torch.float64 else torch.float32
    for start in range(0, n_q, step):
        some = slice(start, start + step)
        scores = grouped(layout.q[:, :, some] * layout.scale, layout.k).to(wide)
        weights = (scores - lse[:, :, some].unsqueeze(3).to(wide)).clamp(max=60).exp()
        out.append(layout.k_tiling.split(weights.transpose(2, 3), 0).sum(3).transpose(2, 3))
    columns = layout.k_tiling.count(n_k)
    by_query = torch.cat(out, 2) if out else layout.q.new_zeros(b, heads, 0, columns, dtype=wide)
    return layout.q_tiling.split(by_query, 0).sum(3)


def head_shares(mass: Tensor, keep: Tensor, share: float) -> Tensor:
    """What each head may compute, `[B, H]`, `share` on average: half as much, as much, or half as much again.

    Heads are ranked by recall, the part of their `mass [B, H, T_q, T_k]` in the tiles `keep` of an equal share.
    The n best give up half their tiles and the n worst get them, n being how many have a recall above 0.8, and at
    most half of the heads, or as many as a share above 1 would not come of.
    """
    recall = (mass * keep).sum((2, 3)) / mass.sum((2, 3)).clamp(min=torch.finfo(mass.dtype).tiny)
    heads = recall.shape[1]
    rank = recall.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    most = heads // 2
    moved = (recall > GOOD_RECALL).sum(1, keepdim=True).clamp(max=most)
    step = min(share / 2, 1 - share)
    return share - step * (rank < moved).to(mass.dtype) + step * (rank >= heads - moved).to(mass.dtype)


@dataclass(eq=False)
class AdaSpa:
    """Adaptive sparse attention over the steps of a sampler (Xia et al., 2025, arXiv 2502.21079).

    To be given as `attention=` of `tilewise.models.video.sample`; it keeps what it found for every layer. Up to
    the first of the `search` steps attention is dense. That step is dense too, keeps the log-sum-exp of every
    query, and with it sums the true attention of every tile in one more pass over the scores. Of each row of
    tiles the best are computed in the steps that follow. At each later search step that pass alone is made, with
    the kept log-sum-exp, which hardly changes from step to step: half of what a precise search costs. Budgets
    differ by head (see `head_shares`), with the mean they were given.

    Differs from the paper: shares of a row are rounded up to whole tiles; n is at most half of the heads. The
    paper's blocks are runs of 64 tokens, `order=Boxes(grid, box)` makes them boxes of a video. No masks.

    Args:
        share: of the tiles to compute, in (0, 1]. search: the steps that search, rising; the paper's are 10 and
            30 of 50. tile: tokens per tile side.
        adaptive: whether budgets differ by head. reuse: whether later searches use the kept log-sum-exp; False
            computes it anew. before: tokens before the video (text): rows and columns that are always computed.
        order: which tokens share a tile.

    Attributes:
        searched: passes over all scores of a layer made for searching so far.

    Raises ValueError for settings out of range, and for more tokens `before` than there are.
    """

    share: float = 0.2
    search: tuple[int, ...] = (10, 30)
    tile: int = 64
    adaptive: bool = True
    reuse: bool = True
    before: int = 0
    order: Order = field(default_factory=AsGiven)
    searched: int = field(default=0, init=False)
    _found: dict[int, Found] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share!r}")
        steps = self.search
        whole = isinstance(steps, tuple) and all(isinstance(s, int) and s >= 0 for s in steps)
        if not whole or not steps or any(a >= b for a, b in zip(steps, steps[1:])):
            raise ValueError(f"search must be rising integers >= 0, at least one, got {steps!r}")
        for name, value, least in (("tile", self.tile, 1), ("before", self.before, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")

    @torch.no_grad()
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, moment: Step) -> Tensor | Plan | str:
        """What a layer does at a step: the dense output, or the tiles to compute.

        Raises ValueError outside a sampler, where there are no steps.
        """
        if moment.step is None:
            raise ValueError("AdaSpa needs to know the step; give it to a sampler")
        if moment.step < self.search[0]:
            self._found.pop(moment.layer, None)
            return "dense"
        found = self._found.get(moment.layer)
        if (
            found is None
            or found.step >= moment.step
            or found.lse.shape != q.shape[:3]
            or found.keys != k.shape[2]
        ):
            out, lse = self._dense(q, k, v)
            plan = self.find(q, k, lse)
            self._found[moment.layer] = Found(moment.step, k.shape[2], lse, plan)
            return out
        plan = found.plan
        if moment.step in self.search:
            plan = self.find(q, k, found.lse if self.reuse else self._search_lse(q, k))
        self._found[moment.layer] = Found(moment.step, k.shape[2], found.lse, plan)
        return plan

    def find(self, q: Tensor, k: Tensor, lse: Tensor) -> Plan:
        """The tiles that hold most attention, by the log-sum-exp `[B, H_q, N_q]` of this or an earlier step."""
        scale = q.shape[3] ** -0.5
        view = Everything().bind(q.shape[2], k.shape[2], device=q.device)
        at = self.order.arrange(q, k, view, scale, (self.tile, self.tile))
        layout = Layout.arranged(at, q, k, view, scale)
        self.searched += 1
        mass = block_mass(layout, take(lse, at.q_order))
        keep = self._choose(mass, self._text(layout))
        return Plan((Pass(view, TileMap(keep, at.q_tiling, at.k_tiling), at.q_order, at.k_order),), view)

    def _choose(self, mass: Tensor, forced: Tensor) -> Tensor:
        every = torch.ones_like(mass, dtype=torch.bool)
        keep = Share(self.share).select(mass, every, forced) | forced
        if not self.adaptive or not mass.numel():
            return keep
        shares = head_shares(mass, keep, self.share).view(*mass.shape[:2], 1, 1)
        best = mass.masked_fill(forced, torch.inf).argsort(dim=-1, descending=True, stable=True)
        place = torch.arange(mass.shape[3], device=mass.device).expand_as(best)
        rank = torch.empty_like(best).scatter_(-1, best, place)
        return (rank < (shares * mass.shape[3] - 1e-6).ceil()) | forced

    def _text(self, layout: Layout) -> Tensor:
        """The rows and columns that hold tokens before the video."""
        marks = []
        for tiling, order, x in (
            (layout.q_tiling, layout.q_order, layout.q),
            (layout.k_tiling, layout.k_order, layout.k),
        ):
            n = x.shape[2]
            if self.before > n:
                raise ValueError(f"before must be at most the number of tokens {n}, got {self.before}")
            place = torch.arange(n, device=x.device).view(1, 1, n) if order is None else order
            marks.append(to_heads(tiling.split(place < self.before, False).any(3), layout.heads))
        return marks[0].unsqueeze(3) | marks[1].unsqueeze(2)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        partial = attend(q, k, v, return_lse=True)
        if not isinstance(partial, Partial) or partial.lse is None:
            raise TypeError("dense attention gave no log-sum-exp")
        return partial.out, partial.lse

    def _search_lse(self, q: Tensor, k: Tensor) -> Tensor:
        """The log-sum-exp of this step, at the price of another pass over the scores."""
        self.searched += 1
        return self._dense(q, k, k[..., :1])[1]


@dataclass(frozen=True, eq=False)
class Found:
    """What a layer keeps: the last step, the number of keys, the log-sum-exp of the first search, the tiles."""

    step: int
    keys: int
    lse: Tensor
    plan: Plan
