"""K-means and the tilings made of clusters."""

from __future__ import annotations

import pytest
import torch

from tilewise.tiles import Tiling
from tilewise.tiles.clustering import by_label, kmeans


def _blobs(n: int, clusters: int, d: int = 4, noise: float = 0.05):
    """Tokens around well-separated centres, and which centre each belongs to: `[1, 2, n, d]`, `[2, n]`."""
    g = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(2, clusters, d, generator=g)
    own = torch.randint(clusters, (2, n), generator=g)
    x = centres.gather(1, own.unsqueeze(-1).expand(-1, -1, d)) + noise * torch.randn(2, n, d, generator=g)
    return x.unsqueeze(0), own


def test_lloyd_finds_separated_clusters_and_never_gets_worse():
    x, own = _blobs(400, 5)
    spread = []
    for iterations in (0, 1, 4, 20):
        found = kmeans(x, 24, iterations=iterations, seed=1)
        mean = found.centres.gather(2, found.labels.unsqueeze(-1).expand_as(x))
        spread.append(float((x - mean).square().sum()))
        assert int(found.counts.sum()) == 800
    assert spread == sorted(spread, reverse=True)
    # More clusters than blobs, so every blob starts with a centre: no cluster then holds tokens of two.
    for h in range(2):
        for c in range(24):
            assert len(own[h][found.labels[0, h] == c].unique()) <= 1


def test_centres_are_means_and_tokens_go_to_the_nearest(monkeypatch):
    from tilewise.tiles import clustering

    x = torch.randn(2, 3, 50, 4, dtype=torch.float64)
    found = kmeans(x=x, clusters=7, iterations=3, seed=2, keep=None, start=None)
    for c in range(7):
        for b in range(2):
            for h in range(3):
                own = x[b, h][found.labels[b, h] == c]
                if len(own):
                    torch.testing.assert_close(found.centres[b, h, c], own.mean(0))
    again = kmeans(x, 7, iterations=0, start=found.centres)
    nearest = torch.cdist(x.flatten(0, 1), found.centres.flatten(0, 1)).argmin(-1).view(2, 3, 50)
    assert torch.equal(again.labels, nearest)
    monkeypatch.setattr(clustering, "AT_ONCE", 1)
    assert torch.equal(kmeans(x, 7, 3, 2).labels, found.labels)


def test_padding_neither_moves_a_centre_nor_starts_one():
    x, _ = _blobs(60, 3)
    keep = torch.arange(60).lt(45).view(1, 1, 60)
    noisy = x.masked_fill(~keep.unsqueeze(-1), 1e6)
    one, other = (kmeans(y, 4, keep=keep) for y in (x, noisy))
    assert torch.equal(one.centres, other.centres) and torch.equal(
        one.labels[..., :45], other.labels[..., :45]
    )
    assert int(one.counts.sum()) == 90
    kmeans(x, 4, keep=torch.zeros(1, 1, 60, dtype=torch.bool))  # nothing counts: no NaN, no error


@pytest.mark.parametrize("n", [0, 1, 3, 50])
def test_clusters_are_a_tiling(n):
    x = torch.randn(2, 3, n, 4)
    labels = kmeans(x, 5).labels
    order, tiling = by_label(labels=labels, clusters=5)
    assert torch.equal(order.sort(-1).values, torch.arange(n).expand(2, 3, n))
    tiling.check(n, "key", 2, 3)
    assert torch.equal(tiling.ids(n, "cpu"), labels.gather(2, order))
    if n:
        torch.testing.assert_close(tiling.join(tiling.split(x, 0), n), x)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 33])
def test_join_undoes_split(n):
    x = torch.randn(2, 3, n, 4)
    assert torch.equal(Tiling(16).join(x=Tiling(16).split(x, 0), n=n), x)
    bounds = torch.tensor([0, n // 3, n // 3, n])
    tiling = Tiling.from_bounds(bounds)
    if n:
        assert torch.equal(tiling.join(tiling.split(x, 7), n), x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clusters": 0}, "clusters must be an integer >= 1, got 0"),
        ({"iterations": -1}, "iterations must be an integer >= 0, got -1"),
        ({"start": torch.zeros(1, 1, 3, 4)}, r"start must be \[B, H, 5, 4\], got \[1, 1, 3, 4\]"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        kmeans(torch.randn(1, 1, 9, 4), **{"clusters": 5, **settings})
