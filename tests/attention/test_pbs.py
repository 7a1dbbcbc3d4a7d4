"""PBS-Attn: permutation gathers scattered keys, keeps causality, and changes nothing at full density."""

from __future__ import annotations

import pytest
import torch

from tests.attention.synthetic import stripes
from tilewise.attention import AsGiven, Mass, Own, PBSAttention, SegmentSort, Tiles, TrueMass, attend, plan

N, TILE, SEGMENT = 2048, 32, 256


def _important(seed: int):
    """All queries look for the same scattered keys, a fortieth of all: q, k `[1, 2, N, 32]`."""
    g = torch.Generator().manual_seed(seed)
    q, k = stripes(N, every=10**9, strength=0.0, seed=seed)
    direction = torch.nn.functional.normalize(torch.randn(1, 2, 1, 32, generator=g), dim=-1)
    carriers = torch.randperm(N, generator=g)[: N // 40]
    q = q + 5 * direction
    k[:, :, carriers] += 7 * direction
    return q, k


class _RandomSort(SegmentSort):
    """The same segments in random order."""

    def _sort(self, importance):
        g = torch.Generator().manual_seed(3)
        return super()._sort(torch.rand(importance.shape, generator=g))


def _density_for(order, q, k, share: float) -> tuple[float, float]:
    """Density that true tile mass needs for `share` of every row, and the output error then."""
    method = Tiles(TrueMass(), Mass(share), (TILE, TILE), order=order, always=(Own(),))
    made = plan(method, q, k, mask="causal")
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    dense = attend(q, k, v, mask="causal")
    return made.density, float((attend(q, k, v, made, mask="causal") - dense).norm() / dense.norm())


@pytest.mark.evidence
def test_permuted_needs_fewer_tiles_at_equal_recall():
    """For 90 % of every row's true mass, sorted keys need far fewer tiles than keys in place.

    Choosing by true mass on both sides makes this a statement about the permutation alone. Control: a random
    order within the same segments gains nothing.
    """
    for seed in range(3):
        q, k = _important(seed)
        plain, _ = _density_for(AsGiven(), q, k, 0.9)
        sorted_, _ = _density_for(SegmentSort(SEGMENT, 128), q, k, 0.9)
        random, _ = _density_for(_RandomSort(SEGMENT, 128), q, k, 0.9)
        assert sorted_ < 0.75 * plain, (sorted_, plain)
        assert random > 0.9 * plain, (random, plain)


@pytest.mark.evidence
def test_recipe_reads_more_mass_than_unpermuted_at_equal_density():
    """The recipe as published, pooled scores and all: at no more tiles, less error than the same without sorting.

    Control: the same recipe with a random order in its place.
    """
    v = torch.randn(1, 2, N, 32, generator=torch.Generator().manual_seed(1))

    def error(order, q, k, dense, threshold):
        recipe = PBSAttention(SEGMENT, threshold, TILE).tiles()
        made = plan(
            Tiles(recipe.score, recipe.select, recipe.tile, order, recipe.always, recipe.rest, False),
            q,
            k,
            mask="causal",
        )
        return made.density, float((attend(q, k, v, made, mask="causal") - dense).norm() / dense.norm())

    for seed in range(2):
        q, k = _important(seed)
        dense = attend(q, k, v, mask="causal")
        density, with_sort = error(SegmentSort(SEGMENT, 128), q, k, dense, 0.9)
        for order in (AsGiven(), _RandomSort(SEGMENT, 128)):
            others = [error(order, q, k, dense, t) for t in (0.5, 0.7, 0.8, 0.9, 0.95)]
            at_least = [wrong for have, wrong in others if have >= density]
            assert at_least, "no unsorted setting is as dense"
            assert with_sort < 0.8 * min(at_least[:1]), (density, with_sort, others)


@pytest.mark.evidence
@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("n", [700, 1024])
def test_full_density_is_exact_after_unpermuting(queries, n):
    q, k, v = (torch.randn(2, h, n, 16, dtype=torch.float64) for h in (4, 2, 2))
    made = plan(PBSAttention(128, 1.0, 32, queries), q, k, mask="causal")
    assert made.passes[0].k_order is not None and (made.passes[0].q_order is not None) == queries
    torch.testing.assert_close(attend(q, k, v, made, mask="causal"), attend(q, k, v, mask="causal"))


def test_keys_stay_in_their_segment():
    q, k = _important(0)
    order = plan(PBSAttention(SEGMENT, 0.9, TILE), q, k, mask="causal").passes[0].k_order
    assert torch.equal(order.sort(-1).values, torch.arange(N).expand_as(order))
    assert torch.equal(order // SEGMENT, (torch.arange(N) // SEGMENT).expand_as(order))


def test_own_segment_and_first_tokens_are_always_read():
    q, k = _important(1)
    made = plan(PBSAttention(SEGMENT, 0.01, TILE), q, k, mask="causal")
    tokens = torch.arange(N)
    read = made.kept(tokens, tokens, 2)
    own = (tokens.unsqueeze(1) // SEGMENT == tokens // SEGMENT) & (tokens.unsqueeze(1) >= tokens)
    assert (read | ~own).all(), "some key of a query's own segment is not read"
    assert made.density < 0.35
