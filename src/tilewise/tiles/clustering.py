"""K-means: tokens that are alike, as labels and as a tiling."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.tiles.tiling import Tiling, to_heads

AT_ONCE = 1 << 23  # distances in a temporary: 32 MiB of float32


class Clustering(NamedTuple):
    """Clusters of tokens.

    Attributes:
        labels: int64 `[B, H, N]`, the cluster of each token.
        centres: `[B, H, C, D]`, at least float32, the mean of each cluster's tokens; of an empty cluster, what its
            centre was last.
        counts: int64 `[B, H, C]`, tokens in each cluster that count.
    """

    labels: Tensor
    centres: Tensor
    counts: Tensor


def kmeans(
    x: Tensor,
    clusters: int,
    iterations: int = 4,
    seed: int = 0,
    *,
    keep: Tensor | None = None,
    start: Tensor | None = None,
) -> Clustering:
    """Lloyd's algorithm on the tokens of every head by themselves, by Euclidean distance.

    Args:
        x: `[B, H, N, D]` tokens. clusters: how many.
        iterations: rounds of assigning and averaging, >= 0; tokens are assigned once more at the end.
        seed: draws which tokens the centres start from, the same places in every head.
        keep: bool `[B|1, H|1, N]`, tokens that count in means (padding does not); the others get a label too.
        start: `[B|1, H|1, clusters, D]` centres to start from, such as those of an earlier step.

    Memory is bounded: distances are taken for some tokens at a time. Raises ValueError for settings out of range
    and for starting centres of another shape.
    """
    if not isinstance(clusters, int) or clusters < 1:
        raise ValueError(f"clusters must be an integer >= 1, got {clusters!r}")
    if not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations must be an integer >= 0, got {iterations!r}")
    b, heads, n, d = x.shape
    x = x if x.dtype == torch.float64 else x.float()
    if keep is not None:
        keep = to_heads(keep, heads).expand(b, heads, n)
        x = x.masked_fill(~keep.unsqueeze(-1), 0)
    centres = _start(x, clusters, seed, keep) if start is None else start.to(x.dtype)
    if centres.shape[-2:] != (clusters, d):
        raise ValueError(f"start must be [B, H, {clusters}, {d}], got {list(centres.shape)}")
    centres = centres.expand(b, heads, clusters, d)
    labels = _assign(x, centres)
    for _ in range(iterations):
        centres = _means(x, labels, centres, keep)[0]
        labels = _assign(x, centres)
    return Clustering(labels, *_means(x, labels, centres, keep))


def by_label(labels: Tensor, clusters: int) -> tuple[Tensor, Tiling]:
    """Tokens sorted by cluster, and the tiling whose tiles are the clusters: order `[B, H, N]`."""
    order = labels.argsort(dim=-1, stable=True)
    counts = torch.zeros(*labels.shape[:2], clusters, dtype=torch.int64, device=labels.device)
    counts.scatter_add_(2, labels, torch.ones_like(labels))
    bounds = torch.nn.functional.pad(counts.cumsum(-1), (1, 0))
    if torch.compiler.is_compiling():
        return order, Tiling(max(labels.shape[2], 1), bounds)  # sizes are not known inside a graph
    return order, Tiling(max(1, int(counts.max()) if counts.numel() else 1), bounds)


def _start(x: Tensor, clusters: int, seed: int, keep: Tensor | None) -> Tensor:
    """Tokens at random places, repeated when there are fewer of them than clusters."""
    n = x.shape[2]
    if not n:
        return x.new_zeros(*x.shape[:2], clusters, x.shape[3])
    places = torch.rand(n, generator=torch.Generator().manual_seed(seed)).to(x.device)
    if keep is not None:
        places = places + (~keep).to(places.dtype)  # those that count come first
    first = places.expand(*x.shape[:2], n).argsort(-1)
    most = n if keep is None else keep.sum(-1, keepdim=True).clamp(min=1)
    chosen = first.gather(2, (torch.arange(clusters, device=x.device) % most).expand(*x.shape[:2], clusters))
    return x.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))


def _assign(x: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of each token; of equally near ones the first."""
    b, heads, n, _ = x.shape
    half = centres.square().sum(-1).unsqueeze(2) / 2
    if torch.compiler.is_compiling():  # a loop over lengths would compile again for each
        return (half - x @ centres.mT).argmin(-1)
    step = max(1, AT_ONCE // max(1, b * heads * centres.shape[2]))
    parts = [
        (half - x[:, :, s : s + step] @ centres.mT).argmin(-1) for s in range(0, max(n, 1), max(step, 1))
    ]
    return torch.cat(parts, -1)


def _means(x: Tensor, labels: Tensor, centres: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    counted = torch.ones_like(labels) if keep is None else keep.to(labels.dtype)
    counts = torch.zeros(centres.shape[:3], dtype=torch.int64, device=x.device).scatter_add_(
        2, labels, counted
    )
    sums = torch.zeros_like(centres).scatter_add_(2, labels.unsqueeze(-1).expand_as(x), x)
    means = sums / counts.clamp(min=1).unsqueeze(-1)
    return torch.where((counts > 0).unsqueeze(-1), means, centres), counts
