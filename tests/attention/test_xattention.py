"""XAttention: what its score is, that it finds the true mass better than mean pooling, and its mass rule."""

from __future__ import annotations

import pytest
import torch

from tests.attention.synthetic import stripes, true_mass
from tilewise.attention import Antidiagonal, Layout, Mass, MeanPool, TopK, XAttention, attend, plan
from tilewise.tiles import NONE, Causal, Tiling

TILE = 64


def _layout(q, k, tile=TILE):
    view = Causal().bind(q.shape[2], k.shape[2])
    return Layout(q, k, view, Tiling(tile), Tiling(tile), q.shape[3] ** -0.5)


def _recall(score, q, k, per_row: int) -> float:
    """Share of the true attention mass in the `per_row` tiles of each row that `score` likes best."""
    layout = _layout(q, k)
    visible = layout.kinds() != NONE
    chosen = TopK(per_row).select(score.score(layout, visible), visible, visible & False)
    mass, _ = true_mass(q, k, (TILE, TILE))
    return float((mass * chosen).sum() / mass.sum())


class _ShuffledKeys(Antidiagonal):
    """The same arithmetic on keys of other places: what the score must lose to be broken."""

    def score(self, layout, among):
        g = torch.Generator().manual_seed(1)
        order = torch.randperm(layout.k.shape[2], generator=g)
        return super().score(
            Layout(
                layout.q, layout.k[:, :, order], layout.view, layout.q_tiling, layout.k_tiling, layout.scale
            ),
            among,
        )


@pytest.mark.evidence
def test_recall_beats_mean_pool_at_equal_density():
    """At the same number of tiles, antidiagonal sums find more of the true mass than pooled means do.

    Controls: the same score with keys shuffled must not win, and true mass itself must bound both from above.
    """
    wins = []
    for seed in range(4):
        q, k = stripes(2048, seed=seed)
        oracle, mean = (_best(q, k, 6), _recall(MeanPool(), q, k, 6))
        anti, broken = _recall(Antidiagonal(8), q, k, 6), _recall(_ShuffledKeys(8), q, k, 6)
        assert anti <= oracle + 1e-6
        wins.append((anti - mean, broken - mean, (oracle - anti) / oracle))
    gain, broken, short = (torch.tensor(x) for x in zip(*wins, strict=True))
    assert gain.min() > 0.03, f"antidiagonal gains only {gain.tolist()} over mean pooling"
    assert broken.max() < 0, f"shuffled keys do as well: {broken.tolist()}"
    assert short.max() < 0.25


def _best(q, k, per_row: int) -> float:
    mass, visible = true_mass(q, k, (TILE, TILE))
    chosen = TopK(per_row).select(mass, visible, visible & False)
    return float((mass * chosen).sum() / mass.sum())


@pytest.mark.evidence
def test_score_is_the_antidiagonal_sum():
    """Against sums written out, token by token, for every pair of groups."""
    q, k = (torch.randn(1, 1, 24, 8) for _ in range(2))
    stride, scale = 4, 8**-0.5
    logits = torch.full((6, 6), -torch.inf)
    for i in range(6):
        for j in range(i + 1):
            pairs = [(i * stride + stride - 1 - s, j * stride + s) for s in range(stride)]
            logits[i, j] = sum((q[0, 0, a] @ k[0, 0, b]) for a, b in pairs) * scale / stride
    mass = logits.softmax(-1)
    tiles = mass.view(3, 2, 3, 2).sum((1, 3))
    layout = _layout(q, k, 8)
    torch.testing.assert_close(Antidiagonal(stride).score(layout, layout.kinds() != NONE)[0, 0], tiles)


def test_stride_one_is_the_true_mass():
    q, k = (torch.randn(1, 2, 96, 8) for _ in range(2))
    layout = _layout(q, k, 32)
    mass, visible = true_mass(q, k, (32, 32))
    torch.testing.assert_close(Antidiagonal(1).score(layout, visible), mass)


@pytest.mark.evidence
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9, 0.99])
def test_mass_rule_keeps_the_fewest_tiles_that_suffice(threshold):
    scores = torch.rand(2, 3, 8, 16)
    among = torch.rand(2, 3, 8, 16) < 0.7
    chosen = Mass(threshold).select(scores, among, among & False)
    live = scores * among
    need = threshold * live.sum(-1)
    got = (live * chosen).sum(-1)
    assert (got >= need * (1 - 1e-6)).all()
    smallest = live.masked_fill(~chosen, 2).amin(-1)
    assert ((got - smallest < need) | (chosen.sum(-1) == 0)).all(), "a tile could be left out"
    assert not (chosen & ~among).any()


def test_first_and_diagonal_tiles_are_always_kept():
    q, k = stripes(1024)
    keep = plan(XAttention(threshold=0.05, tile=64), q, k, mask="causal").tile_maps[0].keep
    assert keep[..., 0].all() and keep.diagonal(dim1=-2, dim2=-1).all()
    assert keep.float().mean() < 0.2


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_more_mass_costs_more_and_errs_less(threshold):
    q, k = stripes(1024)
    v = torch.randn(1, 2, 1024, 32)
    dense = attend(q, k, v, mask="causal")
    low, high = (
        plan(XAttention(threshold=t, tile=64), q, k, mask="causal") for t in (threshold / 2, threshold)
    )
    assert low.density < high.density
    errors = [(attend(q, k, v, p, mask="causal") - dense).norm() / dense.norm() for p in (low, high)]
    assert errors[1] < errors[0]
