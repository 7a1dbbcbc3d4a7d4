"""Queries, keys and values as a video transformer has them, made so that their attention is known in closed form.

Three kinds of heads, in turn: head 0 is spatial, head 1 temporal, head 2 semantic, head 3 spatial again, and so on.
Tokens stand on a grid (T, H, W), token (t, h, w) at (t * H + h) * W + w.

spatial    the score of a pair is `strength * ([same frame] + (near(h - h') + near(w - w')) / 2)`: neighbours in the
           own frame. Attention is a product of three softmaxes, over t, h and w.
temporal   `strength * (near(h - h') + near(w - w')) / 2`, sharper, whatever the frame: one place in all frames.
semantic   `strength * [same cluster]`, for clusters of uneven sizes that lie scattered over the whole grid, so that
           no tile of neighbouring tokens is of one cluster, and k-means of q or k finds them.

`near` is 1 at 0 and falls to both sides, up to the 15 steps of a side of 16. On top of that every entry of q and k
has normal noise of standard deviation `noise`, which gives a score a standard deviation of
`noise * sqrt(2 * s / sqrt(D) + noise**2)`, s being the score of a token with itself (twice `strength` in spatial
heads, `strength` in others). Every head is turned by a rotation of its own, so no dimension stands out.
Values are a smooth field over the grid plus, where clusters exist, a vector of the cluster, plus 0.3 of noise.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("spatial", "temporal", "semantic")
SPATIAL_RATES = (0.1, 0.3, 0.5, 0.7)  # radians per step: `near` halves at 2.4 steps, then stays below 0.3
TEMPORAL_RATES = (0.3, 0.7, 1.0, 1.4)  # it halves at 1.2 steps, then stays below 0.05


class VideoQKV(NamedTuple):
    """What `video_qkv` makes.

    q, k, v: float32 `[1, heads, N, dim]`. kinds: of each head. clusters: int64 `[heads, N]`, the cluster of every
    token in semantic heads and -1 in others. grid, strength: as given.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    kinds: tuple[str, ...]
    clusters: Tensor
    grid: tuple[int, int, int]
    strength: float

    def clean_scores(self, head: int) -> Tensor:
        """The scores of a head without its noise, after the scale 1/sqrt(D): the definition, `[N, N]`."""
        t, h, w = places(self.grid)
        if self.kinds[head] == "semantic":
            own = self.clusters[head]
            return self.strength * (own[:, None] == own).float()
        rates = SPATIAL_RATES if self.kinds[head] == "spatial" else TEMPORAL_RATES
        flat = (near(h[:, None] - h, rates) + near(w[:, None] - w, rates)) / 2
        same = (t[:, None] == t).float() if self.kinds[head] == "spatial" else 0.0
        return self.strength * (flat + same)


def video_qkv(
    grid: tuple[int, int, int] = (8, 16, 16),
    heads: int = 3,
    dim: int = 32,
    seed: int = 0,
    *,
    clusters: int = 8,
    strength: float = 10.0,
    noise: float = 0.2,
) -> VideoQKV:
    """q, k and v of `heads` heads over a grid, with the structure that this file describes.

    Args:
        grid: tokens along time, height and width, at most 16 in height and width. heads: kinds in turn.
        dim: of a head, at least 16 + the number of frames and at least `clusters`.
        seed: equal seeds give equal tensors. clusters: of a semantic head; the largest is about as many times as
            large as the smallest. strength: of scores, after the scale. noise: standard deviation, 0 for none.
    """
    t, h, w = places(grid)
    n = len(t)
    if dim < max(16 + grid[0], clusters):
        raise ValueError(f"dim must be at least {max(16 + grid[0], clusters)} here, got {dim}")
    if max(grid[1:]) > 16:
        raise ValueError(f"grid must be at most 16 high and wide, got {grid}")
    g = torch.Generator().manual_seed(seed)
    kinds = tuple(KINDS[head % 3] for head in range(heads))
    owners = torch.full((heads, n), -1)
    q, k, v = (torch.empty(1, heads, n, dim) for _ in range(3))
    for head, kind in enumerate(kinds):
        field = _field(grid, dim, g)
        features = torch.zeros(n, dim)
        if kind == "semantic":
            owners[head] = _scatter(n, clusters, g)
            features[:, :clusters] = torch.nn.functional.one_hot(owners[head], clusters).float()
            field = field + torch.randn(clusters, dim, generator=g)[owners[head]]
        else:
            rates = SPATIAL_RATES if kind == "spatial" else TEMPORAL_RATES
            features[:, :8], features[:, 8:16] = (_waves(x, rates) / math.sqrt(2) for x in (h, w))
            if kind == "spatial":
                features[:, 16 : 16 + grid[0]] = torch.nn.functional.one_hot(t, grid[0]).float()
        turned = features @ torch.linalg.qr(torch.randn(dim, dim, generator=g)).Q
        turned = turned * math.sqrt(strength * math.sqrt(dim))
        q[0, head] = turned + noise * torch.randn(n, dim, generator=g)
        k[0, head] = turned + noise * torch.randn(n, dim, generator=g)
        v[0, head] = field + 0.3 * torch.randn(n, dim, generator=g)
    return VideoQKV(q, k, v, kinds, owners, grid, strength)


def places(grid: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The coordinates of every token, int64 `[N]` each."""
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    return t.flatten(), h.flatten(), w.flatten()


def near(distance: Tensor, rates: tuple[float, ...]) -> Tensor:
    """The mean cosine of distance times rate: 1 at 0, and a product of features, so that q k^T can be it."""
    return torch.stack([(distance * rate).cos() for rate in rates]).mean(0)


def _waves(place: Tensor, rates: tuple[float, ...]) -> Tensor:
    """Features `[N, 2 * rates]` whose products are `near`."""
    angles = place[:, None] * torch.tensor(rates)
    return torch.cat((angles.cos(), angles.sin()), 1) / math.sqrt(len(rates))


def _scatter(n: int, clusters: int, g: torch.Generator) -> Tensor:
    """A cluster for every token: cluster i has a share proportional to i + 1, at places drawn at random."""
    shares = torch.arange(1, clusters + 1).float().cumsum(0)
    rank = (torch.arange(n) + 0.5) / n * shares[-1]
    return torch.searchsorted(shares, rank)[torch.randperm(n, generator=g)]


def _field(grid: tuple[int, int, int], dim: int, g: torch.Generator) -> Tensor:
    """A smooth random field over the grid, `[N, dim]`, of variance about 1."""
    coarse = torch.randn(1, dim, *(max(2, size // 4) for size in grid), generator=g)
    smooth = torch.nn.functional.interpolate(coarse, size=grid, mode="trilinear", align_corners=True)
    return smooth.flatten(2)[0].T * 1.5
