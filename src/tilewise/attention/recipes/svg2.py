"""SVG2: like queries and like keys share tiles, whose centroids say which tiles are worth computing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tilewise.attention.method import Method
from tilewise.attention.scores import MeanPool
from tilewise.attention.selects import Mass, Share
from tilewise.attention.stages import Arrangement, Layout, Order, Recipe, Select, Skip, Tiles
from tilewise.tiles import Tiling, Visibility
from tilewise.tiles.clustering import Clustering, kmeans
from tilewise.tiles.visibility import to_heads


@dataclass(frozen=True, eq=False)
class Alike:
    """Order: tokens lie together when k-means puts them together, and every cluster is cut into tiles.

    Queries and keys of every head are clustered by themselves. Tiles are uneven: a cluster is one tile when it
    fits into one, and never shares it with another; in longer clusters, cut at the size asked for, tokens keep
    their order. So memory is bounded where one cluster holds most tokens, and shapes do not depend on numbers.
    Without given centres k-means starts from tokens at scattered places.

    Args:
        queries, keys: number of clusters. iterations: rounds of Lloyd's algorithm. seed: of the places.
        q_start: `[B|1, H_q|1, queries, D]`, k_start: `[B|1, H_kv|1, keys, D]`: centres to start from.
    """

    queries: int
    keys: int
    iterations: int = 10
    seed: int = 0
    q_start: Tensor | None = None
    k_start: Tensor | None = None
    looks = "prompt"

    def __post_init__(self) -> None:
        _whole(queries=(self.queries, 1), keys=(self.keys, 1), iterations=(self.iterations, 0))

    def clusterings(self, q: Tensor, k: Tensor, seen: Tensor) -> tuple[Clustering, Clustering]:
        """Clusters of the queries, and of the keys that are `seen [B|1, H_kv|1, N_k]`."""
        every = torch.ones(1, 1, q.shape[2], dtype=torch.bool, device=q.device)
        q_start = _places(q, self.queries, self.seed, every) if self.q_start is None else self.q_start
        k_start = _places(k, self.keys, self.seed, seen) if self.k_start is None else self.k_start
        return (
            kmeans(q, self.queries, self.iterations, start=q_start),
            kmeans(k, self.keys, self.iterations, keep=seen, start=k_start),
        )

    def arrange(
        self, q: Tensor, k: Tensor, view: Visibility, scale: float, tile: tuple[int, int]
    ) -> Arrangement:
        of_q, of_k = self.clusterings(q, k, view.keys_seen())
        q_order, q_tiling = cut(of_q.labels, self.queries, tile[0])
        k_order, k_tiling = cut(of_k.labels, self.keys, tile[1])
        return Arrangement(q_tiling, k_tiling, q_order, k_order)


def cut(labels: Tensor, clusters: int, size: int) -> tuple[Tensor, Tiling]:
    """Tokens sorted by cluster, `[B, H, N]`, and the tiling that cuts each cluster into tiles of `size`.

    As many tiles as any clusters of so many tokens may need; those beyond are empty.
    """
    (b, heads, n), device = labels.shape, labels.device
    order = labels.argsort(dim=-1, stable=True)
    counts = torch.zeros(b, heads, clusters, dtype=torch.int64, device=device)
    counts.scatter_add_(2, labels, torch.ones_like(labels))
    places, tiles = torch.arange(n, device=device), clusters + n // size
    starts = (counts.cumsum(-1) - counts).gather(2, labels.gather(2, order))
    first = (places - starts) % size == 0
    index = (first.cumsum(-1) - 1).masked_fill(~first, tiles + 1)
    bounds = torch.full((b, heads, tiles + 2), n, device=device).scatter_(
        2, index, places.expand(b, heads, n)
    )
    return order, Tiling(size, bounds[..., :-1])


def _places(x: Tensor, clusters: int, seed: int, seen: Tensor) -> Tensor:
    """Tokens of `x [B, H, N, D]` at scattered places, those that are `seen`, repeated when there are too few."""
    b, heads, n, d = x.shape
    x = x if x.dtype == torch.float64 else x.float()
    if not n:
        return x.new_zeros(b, heads, clusters, d)
    mixed = (torch.arange(n, device=x.device) + 1 + seed * 7919) * 2654435761 % 2**32
    mixed = (mixed ^ mixed // 2**15) * 739982445 % 2**32  # a hash: generators do not compile
    seen = seen.expand(b, heads, n)
    first = (mixed + (~seen) * 2**33).argsort(-1)
    most = seen.sum(-1, keepdim=True).clamp(min=1)
    chosen = first.gather(2, (torch.arange(clusters, device=x.device) % most).expand(b, heads, clusters))
    taken = x.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, d))
    return taken.masked_fill(~seen.gather(2, chosen).unsqueeze(-1), 0)  # what is hidden may be NaN


@dataclass(frozen=True)
class Either:
    """Select: tiles that one or the other rule takes."""

    one: Select
    other: Select

    @property
    def looks(self) -> str:
        return "prompt" if "prompt" in (self.one.looks, self.other.looks) else "none"

    def select(self, scores: Tensor, among: Tensor, forced: Tensor) -> Tensor:
        return self.one.select(scores, among, forced) | self.other.select(scores, among, forced)


@dataclass(frozen=True)
class OwnKeys:
    """Always: where a mask hides keys, the tiles that hold the keys at the queries' own positions.

    Tiles of scattered tokens are cut through by a causal mask nearly everywhere, and a query may see nothing in
    those that its tile of queries chose. With its own key it always sees something. Nothing where all is visible.
    """

    def tiles(self, layout: Layout, visible: Tensor) -> Tensor:
        given = layout.view if layout.given is None else layout.given
        b, (n_q, n_k) = layout.q.shape[0], (layout.q.shape[2], layout.k.shape[2])
        if given.simple == "everything" or not n_q or not n_k:
            return visible & False
        shape = (b, layout.heads)
        q_pos = to_heads(layout.view.q_pos, layout.heads).expand(*shape, n_q).contiguous()
        k_pos, places = to_heads(layout.view.k_pos, layout.heads).expand(*shape, n_k).sort(-1)
        at = torch.searchsorted(k_pos, q_pos).clamp(max=n_k - 1)
        own = k_pos.gather(-1, at) == q_pos
        rows, columns = (
            to_heads(tiling.ids(n, q_pos.device), layout.heads).expand(*shape, n)
            for tiling, n in ((layout.q_tiling, n_q), (layout.k_tiling, n_k))
        )
        columns = columns.gather(-1, places.gather(-1, at))
        t_q, t_k = layout.q_tiling.count(n_q), layout.k_tiling.count(n_k)
        index = (rows * t_k + columns).masked_fill(~own, t_q * t_k)
        held = torch.zeros(*shape, t_q * t_k + 1, dtype=torch.bool, device=q_pos.device)
        return held.scatter_(-1, index, True)[..., :-1].unflatten(-1, (t_q, t_k))


@dataclass(frozen=True)
class SVG2(Recipe):
    """Sparse VideoGen2: semantic-aware permutation (Yang et al., 2025, arXiv 2505.18875).

    Queries and keys of every head are sorted by k-means, so that those that are alike lie together wherever they
    stand in the video, and the clusters, uneven as they are, become the tiles. A tile of queries weighs tiles of
    keys by a softmax over products of centroids, each counted as often as it has keys, and takes the best of them
    up to a share of that mass, and no fewer than `least` of them.

    Made for video, without a causal mask; it has no name, as the numbers of clusters go with the length. Masks
    are honoured exactly, but clusters know nothing of positions: under a causal mask nearly every tile is cut
    through, centroids hold later keys, and every query reads the cluster of its own key besides, so that it sees
    something. Differs from the authors' code: clusters longer than a tile are cut, and each part is scored by its
    own mean; k-means of a call by itself takes fewer rounds than their 50. Their kept centroids and dense first
    steps are `SVG2Steps`. Grouped heads: each query head for itself, over the clusters of its kv head.

    Args:
        queries, keys: clusters. threshold: share of the estimated mass to take, in (0, 1].
        least: share of the tiles of keys taken at least, in (0, 1]. tile: (queries, keys) of the longest tiles.
        iterations: rounds of k-means. seed: of the places that it starts from.
    """

    queries: int = 300
    keys: int = 1000
    threshold: float = 0.9
    least: float = 0.1
    tile: tuple[int, int] = (128, 128)
    iterations: int = 10
    seed: int = 0
    modes = ("train", "prefill", "chunked prefill")
    reads = "q, k"

    def __post_init__(self) -> None:
        self.tiles()

    def order(self, start: tuple[Tensor, Tensor] | None = None, iterations: int | None = None) -> Alike:
        """Its clustering, from these centres of queries and keys."""
        rounds = self.iterations if iterations is None else iterations
        return Alike(self.queries, self.keys, rounds, self.seed, *(start or (None, None)))

    def tiles(self) -> Tiles:
        return self.over(self.order())

    def over(self, order: Order) -> Tiles:
        """Its stages over an order of choice."""
        return Tiles(
            score=MeanPool(counted=True),
            select=Either(Mass(self.threshold), Share(self.least)),
            tile=self.tile,
            order=order,
            always=(OwnKeys(),),
            rest=Skip(),
        )


class Step(Protocol):
    """Where in a sampler a call is, such as `tilewise.models.video.Moment`."""

    layer: int
    step: int | None
    steps: int | None


@dataclass(eq=False)
class SVG2Steps:
    """SVG2 over the steps of a sampler: dense at first, and each step's k-means from the centres of the one before.

    To be given as `attention=` of `tilewise.models.video.sample`. Centres are kept for every layer and dropped
    when a sampler begins anew or shapes change. Outside a sampler every call is on its own.

    Args:
        method: what runs. refine: rounds of k-means from kept centres. dense: share of the steps computed densely
            first, in [0, 1]; the authors' scripts take 0.2.

    Attributes:
        rounds: of k-means so far, over all calls.
    """

    method: SVG2 = field(default_factory=SVG2)
    refine: int = 2
    dense: float = 0.2
    rounds: int = field(default=0, init=False)
    _kept: dict[int, tuple[int, Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _whole(refine=(self.refine, 0))
        if not 0 <= self.dense <= 1:
            raise ValueError(f"dense must be a share of the steps in [0, 1], got {self.dense!r}")

    @torch.no_grad()
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, moment: Step) -> Method | str:
        """The method of this call; its tiles are those of kept centres, moved on."""
        if moment.step is not None and moment.steps and moment.step < self.dense * moment.steps:
            return "dense"
        start = self._start(q, k, moment)
        order = self.method.order(start, self.method.iterations if start is None else self.refine)
        self.rounds += order.iterations
        of_q, of_k = order.clusterings(q, k, torch.ones(1, 1, k.shape[2], dtype=torch.bool, device=k.device))
        if moment.step is not None:
            self._kept[moment.layer] = (moment.step, of_q.centres, of_k.centres)
        order = self.method.order((of_q.centres, of_k.centres), 0)
        return self.method.over(order)

    def centres(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The centres of queries and keys that are kept for a layer."""
        kept = self._kept.get(layer)
        return None if kept is None else kept[1:]

    def _start(self, q: Tensor, k: Tensor, moment: Step) -> tuple[Tensor, Tensor] | None:
        kept = self._kept.get(moment.layer)
        if kept is None or moment.step is None or moment.step <= kept[0]:
            return None
        fits = all(
            a.shape[:2] == b.shape[:2] and a.shape[3] == b.shape[3] for a, b in ((kept[1], q), (kept[2], k))
        )
        return (kept[1], kept[2]) if fits else None


def _whole(**values: tuple[int, int]) -> None:
    """Raise ValueError unless each value is an integer of at least its bound."""
    for name, (value, bound) in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            raise ValueError(f"{name} must be an integer >= {bound}, got {value!r}")
