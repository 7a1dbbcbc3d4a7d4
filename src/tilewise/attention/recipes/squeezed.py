"""Squeezed attention: a fixed context's keys, clustered once, and read cluster by cluster for each query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.scores import grouped
from tilewise.tiles import TileMap, Tiling, Visibility
from tilewise.tiles.clustering import by_label, kmeans
from tilewise.tiles.visibility import to_heads


class Thresholds(NamedTuple):
    """Estimated shares of attention, per key, above which keys are read; `coarse` for the first of two levels."""

    fine: float
    coarse: float | None = None


@dataclass(frozen=True, eq=False)
class SqueezedContext:
    """The keys of a fixed context by clusters, made once and used for every query that follows.

    Holds centroids and places of tokens, not the keys: these stay where the call has them, as its first tokens.

    Attributes:
        length: tokens of the context. order: int64 `[B, H_kv, M]`, its tokens by cluster; tokens from M on, the
            last of the context, are in no cluster and are always read.
        tiling: the clusters, in `order`. centroids: float32 `[B, H_kv, C, D]`, mean keys.
        coarse: float32 `[B, H_kv, G, D]`, centroids of groups of clusters, and groups: int64 `[B, H_kv, C]`, the
            group of each cluster; both None without a second level.
    """

    length: int
    order: Tensor
    tiling: Tiling
    centroids: Tensor
    coarse: Tensor | None = None
    groups: Tensor | None = None

    @classmethod
    def from_keys(
        cls,
        k: Tensor,
        clusters: float = 0.05,
        coarse: float | None = None,
        *,
        window: int = 100,
        iterations: int = 10,
        seed: int = 0,
    ) -> SqueezedContext:
        """Cluster the keys `[B, H_kv, N, D]` of a context, each head by itself, by the angles between them.

        Args:
            clusters: their number, as a share of the tokens. coarse: the number of groups of clusters, as a share
                of the tokens (the paper's 0.01); None for one level.
            window: last tokens of the context, which are left out: always read, and their queries calibrate.
            iterations, seed: of k-means.

        Raises ValueError for shares outside (0, 1] and a context of no tokens or of no more than `window`.
        """
        for name, share in (("clusters", clusters), ("coarse", coarse)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {share!r}")
        n = k.shape[2] - window
        if not k.shape[2]:
            raise ValueError(f"a context must have at least one token, got keys {list(k.shape)}")
        if window < 0 or n < 1:
            raise ValueError(
                f"window must be in 0..{k.shape[2] - 1}, below the context's length, got {window}"
            )
        keys = k[:, :, :n].detach().float()
        count = max(1, round(clusters * n))
        order, tiling = by_label(kmeans(normalize(keys, dim=-1), count, iterations, seed).labels, count)
        ordered = keys.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, k.shape[3]))
        centroids, sizes = tiling.mean(ordered)
        if coarse is None:
            return cls(k.shape[2], order, tiling, centroids)
        groups = max(1, round(coarse * n))
        labels = kmeans(normalize(centroids, dim=-1), groups, iterations, seed, keep=sizes > 0).labels
        sums = centroids.new_zeros(*k.shape[:2], groups, k.shape[3] + 1)
        weighed = torch.cat([centroids, torch.ones_like(centroids[..., :1])], -1) * sizes.unsqueeze(-1)
        sums.scatter_add_(2, labels.unsqueeze(-1).expand(-1, -1, -1, sums.shape[3]), weighed)
        means = sums[..., :-1] / sums[..., -1:].clamp(min=1)
        return cls(k.shape[2], order, tiling, centroids, means, labels)

    def sizes(self) -> Tensor:
        """Tokens of each cluster, float32 `[B, H_kv, C]`."""
        return self.tiling.sizes(self.order.shape[2], self.order.device).float()

    def shares(
        self, q: Tensor, scale: float, over: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What share of the context's attention each key of a cluster is estimated to get from each query.

        Every key of a cluster counts as its centroid: `exp(q . c) / sum_j n_j exp(q . c_j)`. With `over`,
        clusters of groups whose estimated share per key is at most that are out of the sum, and their shares are 0.

        Returns the shares, float32 `[B, H_q, N_q, C]`; the number of centroids that each query is multiplied with,
        `[B, H_q, N_q]`; and the shares of groups `[B, H_q, N_q, G]` if there is a second level.
        """
        heads, q = q.shape[1], q.detach().float() * scale
        b = q.shape[0]
        sizes = to_heads(self.sizes(), heads).unsqueeze(2).expand(b, heads, 1, -1)
        fine = grouped(q, self.centroids.expand(b, -1, -1, -1))
        if over is None or self.coarse is None or self.groups is None:
            looked = (sizes > 0).expand_as(fine)
            groups, products = None, looked.sum(-1)
        else:
            coarse = grouped(q, self.coarse.expand(b, -1, -1, -1))
            groups = _per_key(coarse, to_heads(self.members(), heads).unsqueeze(2))
            own = to_heads(self.groups, heads).unsqueeze(2).expand(b, heads, q.shape[2], -1)
            looked = (groups > over).gather(-1, own) & (sizes > 0)
            products = looked.sum(-1) + self.coarse.shape[2]
        return _per_key(fine, torch.where(looked, sizes, 0)), products, groups

    def members(self) -> Tensor:
        """Tokens of each group of clusters, float32 `[B, H_kv, G]`. Raises ValueError without a second level."""
        if self.coarse is None or self.groups is None:
            raise ValueError("the context has one level: from_keys(..., coarse=0.01) makes two")
        members = torch.zeros(*self.coarse.shape[:3], device=self.groups.device)
        return members.scatter_add_(2, self.groups, self.sizes())

    def check(self, k: Tensor, n_q: int) -> None:
        """Raise ValueError unless keys `[B, H_kv, N_k, D]` can begin with this context, and queries follow it."""
        b, kv_heads, _, d = self.centroids.shape
        if k.shape[0] % b or b not in (1, k.shape[0]) or k.shape[1] != kv_heads or k.shape[3] != d:
            raise ValueError(
                f"the context has batch {b}, {kv_heads} kv heads and head_dim {d}, the call has {k.shape[0]},"
                f" {k.shape[1]} and {k.shape[3]}: cluster its own context"
            )
        if k.shape[2] < self.length + n_q:
            raise ValueError(
                f"the context has {self.length} tokens, and {n_q} queries need as many keys after it; the call has"
                f" {k.shape[2]} keys"
            )


def _per_key(scores: Tensor, sizes: Tensor) -> Tensor:
    """`exp(score) / sum_j n_j exp(score_j)`, 0 where there are no keys."""
    some = sizes.expand_as(scores) > 0
    scores = scores.masked_fill(~some, -torch.inf)
    total = (scores + sizes.clamp(min=1).log()).logsumexp(-1, keepdim=True)
    return (scores - total.masked_fill(total == -torch.inf, 0)).exp()


def calibrate_thresholds(
    contexts: Sequence[SqueezedContext],
    queries: Sequence[Tensor],
    keep: float,
    *,
    coarse_keep: float = 0.5,
    scale: float | None = None,
) -> Thresholds:
    """Thresholds at which a share `keep` of the clustered keys is read, over all heads and contexts together.

    One number for all heads, and all layers whose contexts are given: a head that attends to few keys reads few,
    and one that attends to many reads more. The first of two levels is set to leave `coarse_keep` of the keys.

    Args:
        contexts: one for each layer. queries: `[B, H_q, W, D]` for each, as a rule those of the context's window.
        keep, coarse_keep: shares in (0, 1]. scale: factor of the scores; None is 1/sqrt(D).

    Raises ValueError for shares out of range, and contexts and queries that do not match in number.
    """
    for name, share in (("keep", keep), ("coarse_keep", coarse_keep)):
        if not 0 < share <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {share!r}")
    if not contexts or len(contexts) != len(queries):
        raise ValueError(
            f"queries must be one tensor for each context, got {len(queries)} for {len(contexts)}"
        )
    levels = {context.coarse is not None for context in contexts}
    if len(levels) > 1:
        raise ValueError("contexts must all have one level or all have two")
    factors = [q.shape[3] ** -0.5 if scale is None else scale for q in queries]
    coarse = None
    if levels == {True}:
        pairs = []
        for context, q, factor in zip(contexts, queries, factors):
            groups = context.shares(q, factor, over=-1.0)[2]
            if groups is not None:
                pairs.append((groups, context.members()))
        coarse = _level(pairs, coarse_keep)
    pairs = [
        (context.shares(q, f, over=coarse)[0], context.sizes())
        for context, q, f in zip(contexts, queries, factors)
    ]
    return Thresholds(_level(pairs, keep), coarse)


def _level(pairs: Sequence[tuple[Tensor, Tensor]], keep: float) -> float:
    """The value that a share `keep` of keys exceeds; each pair holds values `[B, H, W, C]` and numbers of keys."""
    values, weights = [], []
    for shares, sizes in pairs:
        values.append(shares.flatten())
        weights.append(to_heads(sizes, shares.shape[1]).unsqueeze(2).expand_as(shares).flatten())
    value, weight = torch.cat(values), torch.cat(weights).double()
    value, order = value.sort(descending=True)
    held = weight[order].cumsum(0)
    at = int((held <= keep * held[-1]).sum()) if len(held) else 0
    return float(value[at]) if at < len(value) else -1.0


@dataclass(frozen=True)
class SqueezedAttention(Method):
    """Attention over a fixed context of which each query reads some clusters, and all that follows it (Hooper et
    al., 2024, arXiv 2411.09688).

    A query is multiplied with centroids; clusters whose keys are estimated to get more than `thresholds.fine` of
    the context's attention each are read, key by key and exactly. With two levels, groups of clusters are
    compared first, and only clusters of groups above `thresholds.coarse` after them. Tokens after the context
    (the user's and those generated), and its window, are always read. Clusters are tiles of uneven size in the
    order of the context, so any mask, bias and engine serves. Grouped heads: each query head chooses for itself,
    among its kv head's clusters.

    Differs from the paper: every query is routed alone, where the authors average estimates over blocks of a
    prompt's queries, and the thresholds are calibrated for that. The choice among clusters of the second level is
    made by
    masks, for all at once: `SqueezedContext.shares` counts what a kernel would multiply.

    Args:
        context: of the first `context.length` keys of every call. thresholds: from `calibrate_thresholds`.

    Calls have queries after the context only, chunked or one by one; the context itself is read densely, once, when
    its keys are made. Raises ValueError for calls of other shapes, see `SqueezedContext.check`.
    """

    context: SqueezedContext = field(repr=False, compare=False)
    thresholds: Thresholds
    modes = ("train", "chunked prefill", "decode")
    reads = "q, centroids of k"
    needs = "clusters of a fixed context"

    def __post_init__(self) -> None:
        if not isinstance(self.context, SqueezedContext):
            raise TypeError(f"context must be a SqueezedContext, got {type(self.context).__name__}")
        if self.thresholds.coarse is not None and self.context.coarse is None:
            raise ValueError("thresholds of two levels need a context of two: from_keys(..., coarse=0.01)")

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        context, n_k = self.context, k.shape[2]
        context.check(k, q.shape[2])
        keep = context.shares(q, scale, self.thresholds.coarse)[0] > self.thresholds.fine
        clustered, tiling = context.order.shape[2], context.tiling
        # What follows the clusters is cut into tiles no longer than the longest of them.
        starts = torch.arange(clustered, n_k, max(tiling.size, 16), device=k.device)
        count = len(starts)
        ends = torch.cat([starts[1:], starts.new_tensor([n_k])])
        cuts = tiling.sizes(clustered, k.device).cumsum(-1)
        bounds = pad(torch.cat([cuts, ends.expand(*cuts.shape[:2], -1)], -1), (1, 0))
        rest = torch.arange(clustered, n_k, device=k.device).expand(*context.order.shape[:2], -1)
        order = torch.cat([context.order, rest], -1)
        tiles = TileMap(pad(keep, (0, count), value=True), Tiling(1), Tiling(max(tiling.size, 16), bounds))
        return Plan((Pass(view, tiles, None, order),), view)
