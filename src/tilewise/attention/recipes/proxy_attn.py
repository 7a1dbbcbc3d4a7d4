"""ProxyAttn: few representative heads say which tiles matter to all, and every head how many it needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.recipes.vertical_slash import last_attention
from tilewise.attention.scores import AT_ONCE, grouped
from tilewise.attention.selects import First, Own
from tilewise.attention.stages import Layout
from tilewise.tiles import NONE, TileMap, Tiling, Visibility
from tilewise.tiles.visibility import to_heads


@dataclass(frozen=True)
class ProxyAttn(Method):
    """Tiles scored by proxy heads, with a budget for every head (Wang et al., 2025, arXiv 2509.24745).

    Heads of a layer look at much the same tokens and differ in how many. So the scores of `ProxyHeads`, token by
    token but for a few mean heads only, rank the tiles for all heads (of a group). How many of the best tiles a
    head reads in every row is estimated from its own attention of the last `tile` queries: as many as hold
    `threshold` of it there, at least `min_budget` tokens. The first tile and the diagonal are always among them.

    Differs from the paper: the first and diagonal tiles are kept in every row. As its formula says, a budget is a
    number of tiles, the same in every row, so that causal rows of fewer tiles are read whole.

    Args:
        proxies: proxy heads; a divisor of the kv heads, or a multiple of them that divides the query heads.
        stride: one token in so many is scored, of queries and of keys, a divisor of `tile`.
        threshold: share of the last queries' attention that sets a budget, in (0, 1]; 1 keeps every tile.
        min_budget: tokens, >= 1. tile: tokens per tile side.
    """

    proxies: int = 1
    stride: int = 4
    threshold: float = 0.95
    min_budget: int = 2048
    tile: int = 128
    name = "proxy-attn"
    modes = ("train", "prefill", "chunked prefill")
    reads = "q, k, the last queries of the prompt"

    def __post_init__(self) -> None:
        for name in ("min_budget", "tile"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not isinstance(self.threshold, (int, float)) or not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold!r}")
        if self.tile % ProxyHeads(self.proxies, self.stride).stride:
            raise ValueError(f"stride must divide the tile size {self.tile}, got {self.stride!r}")

    @property
    def lookahead(self) -> str:
        return "prompt"

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        if not q.shape[2] or not k.shape[2]:
            return Plan((Pass(view),), view)
        layout = Layout(q, k, view, Tiling(self.tile), Tiling(self.tile), scale)
        visible = layout.kinds() != NONE
        forced = visible & (
            First().tiles(layout, visible) | to_heads(Own().tiles(layout, visible), layout.heads)
        )
        scores = ProxyHeads(self.proxies, self.stride).score(layout, visible)
        if self.threshold == 1:
            keep = visible.expand_as(scores)
        else:
            count = budgets(layout, self.threshold).clamp(min=-(-self.min_budget // self.tile))
            keep = best(scores, visible, forced, count)
        return Plan((Pass(view, TileMap(keep, layout.q_tiling, layout.k_tiling)),), view)


@dataclass(frozen=True)
class ProxyHeads:
    """Score: the largest attention weight in a tile, of proxy heads that stand for groups of heads.

    A proxy head's queries and keys are the means over its group's heads; its attention is taken token by token, for
    the first of every `stride` queries over the first of every `stride` keys. This takes proxies / heads of the
    products that every head for itself would. Tiles must be cut evenly, in multiples of `stride`.

    Args:
        proxies: a divisor of the kv heads, or a multiple of them that divides the query heads; then each proxy has
            its own kv head's keys.
        stride: >= 1.
    """

    proxies: int = 1
    stride: int = 4
    looks = "tile"

    def __post_init__(self) -> None:
        for name in ("proxies", "stride"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")

    def score(self, layout: Layout, among: Tensor) -> Tensor:
        cuts = layout.q_tiling, layout.k_tiling
        if any(cut.bounds is not None or cut.size % self.stride for cut in cuts):
            raise ValueError(f"proxy scores need tiles in multiples of stride {self.stride}")
        heads, n_q, n_k = layout.heads, layout.q.shape[2], layout.k.shape[2]
        rows, columns = (torch.arange(0, n, self.stride, device=layout.q.device) for n in (n_q, n_k))
        q, k = self._pooled(layout.q[:, :, :: self.stride], layout.k[:, :, :: self.stride])
        height, width = (Tiling(cut.size // self.stride) for cut in cuts)
        step = max(1, AT_ONCE // max(1, q.shape[0] * self.proxies * len(columns) * height.size)) * height.size
        if torch.compiler.is_compiling():  # a loop over lengths would compile again for each
            step = len(rows)
        starts = [0] if torch.compiler.is_compiling() else range(0, len(rows), step)
        out = []
        for start in starts:
            some = slice(start, start + step)
            seen = to_heads(
                layout.view.permute(rows[some].view(1, 1, -1), columns.view(1, 1, -1)).tokens(), heads
            )
            if seen.shape[1] > 1:  # a proxy sees what some head of its group does
                seen = seen.unflatten(1, (self.proxies, heads // self.proxies)).any(2)
            logits = grouped(q[:, :, some] * layout.scale, k).masked_fill(~seen, -torch.inf)
            weights = logits.softmax(-1).nan_to_num(0)
            best = width.split(weights.transpose(2, 3), 0).amax(3).transpose(2, 3)
            out.append(height.split(best, 0).amax(3))
        shape = (*q.shape[:2], 0, layout.k_tiling.count(n_k))
        scores = torch.cat(out, 2) if out else q.new_zeros(shape)
        return scores.repeat_interleave(heads // self.proxies, 1)

    def _pooled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Proxy queries `[B, proxies, *, D]` and keys `[B, proxies or H_kv, *, D]`, in at least float32."""
        heads, kv_heads = q.shape[1], k.shape[1]
        if heads % self.proxies or (kv_heads % self.proxies and self.proxies % kv_heads):
            raise ValueError(
                f"proxies must divide the kv heads, or be a multiple of them that divides the query heads, got"
                f" {self.proxies} for {kv_heads} kv heads and {heads} query heads"
            )
        wide = torch.promote_types(q.dtype, torch.float32)
        q = q.unflatten(1, (self.proxies, heads // self.proxies)).mean(2, dtype=wide)
        shared = min(self.proxies, kv_heads)
        return q, k.unflatten(1, (shared, kv_heads // shared)).mean(2, dtype=wide)


def budgets(layout: Layout, threshold: float) -> Tensor:
    """How many tiles of keys hold a share `threshold` of the last tile's queries' attention: int64 `[B, H_q]`.

    Attention of the last queries, as many as a tile is high, is averaged over them and summed within tiles.
    """
    weights = last_attention(layout.q, layout.k, layout.view, layout.scale, layout.q_tiling.size)
    shares = layout.k_tiling.split(weights.mean(2).unsqueeze(-1), 0).sum((3, 4))
    ordered = shares.sort(dim=-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    return (before < threshold * shares.sum(-1, keepdim=True)).sum(-1)


def best(scores: Tensor, among: Tensor, forced: Tensor, count: Tensor) -> Tensor:
    """The `count [B, H_q]` best tiles of every row, forced ones first and all of them: bool as `scores`."""
    ranked = scores.masked_fill(~among, -torch.inf).masked_fill(forced, torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return (rank < count[..., None, None]) & among | forced
