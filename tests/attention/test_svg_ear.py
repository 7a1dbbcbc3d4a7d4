"""SVG-EAR: means in place of skipped tiles, and exact tiles where means err rather than where attention is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.attention.test_svg2 import captured, least
from tests.conformance.common import ENGINES, qkv
from tests.conformance.weighted import (
    MASKS,
    check_full,
    check_plan,
    error,
)
from tilewise.attention import (
    Arrangement,
    Layout,
    Mass,
    MeanPool,
    Plan,
    Pooled,
    Share,
    Tiles,
    TopK,
    attend,
    plan,
)
from tilewise.attention.recipes import svg_ear
from tilewise.attention.recipes.svg2 import SVG2
from tilewise.attention.recipes.svg_ear import SVGEAR, MeansError
from tilewise.tiles import FULL, NONE, PARTIAL, Padding, Tiling

CLUSTERS = SVG2(5, 7, threshold=0.4, least=0.1, tile=(16, 16), iterations=3)
SMALL = SVGEAR(clusters=CLUSTERS, gamma=1.0)
VIDEO = SVG2(64, 64, threshold=0.1, least=0.05, tile=(128, 64))


def by_score(clusters: SVG2, density: float, q: Tensor, k: Tensor, **options) -> list[Plan]:
    """The same clusters, chosen by their mass: equal shares of each row, or equal masses; at no less density."""
    tiles = replace(clusters.over(clusters.order()), always=(), **options)
    return [least(tiles, select, density, q, k) for select in (Share, Mass)]


@pytest.mark.evidence
@pytest.mark.parametrize("layer", [1, 3])
def test_error_aware_routing_errs_less_than_routing_by_score(layer, monkeypatch):
    """On q, k and v of a trained video model, with compensation in both, at no more density.

    The routing by score gets equal shares of every row as well as equal shares of mass, whichever errs less.
    Controls: plain SVG2, which skips the rest, errs far more; routing by an error of the wrong sign errs more
    than either; and without values the estimate still finds most of the gain.
    """
    q, k, v = (x[:, :2] for x in captured(layer))
    dense = attend(q, k, v)
    made = plan(SVGEAR(VIDEO), q, k, v=v)
    mine = error(attend(q, k, v, made), dense)
    others = by_score(VIDEO, made.density, q, k, rest=Pooled())
    skipping = by_score(VIDEO, made.density, q, k)
    assert min(other.density for other in (*others, *skipping)) >= made.density
    score = min(error(attend(q, k, v, other), dense) for other in others)
    skip = min(error(attend(q, k, v, other), dense) for other in skipping)
    weights_only = plan(SVGEAR(VIDEO, weights_only=True), q, k)
    unvalued = error(attend(q, k, v, weights_only), dense)
    monkeypatch.setattr(svg_ear, "MeansError", Turned)
    wrong = error(attend(q, k, v, SVGEAR(VIDEO)), dense)
    print(f"layer {layer}: density {made.density:.3f}, error {mine:.4f}, weights only {unvalued:.4f},"
          f" by score {score:.4f}, SVG2 {skip:.4f}, turned {wrong:.4f}")  # fmt: skip
    assert mine < 0.93 * score < 0.7 * skip, (mine, score, skip)
    assert unvalued < 0.96 * score, (unvalued, score)
    assert wrong > 1.1 * score, (wrong, score)


class Turned(MeansError):
    """The tiles whose means err least come first."""

    def score(self, layout, among):
        return -super().score(layout, among)


def tight_and_loose(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every other cluster of keys is loose; tight ones get more attention, and lose nothing as means."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(16, 32, generator=g), dim=-1)
    own = torch.arange(1024) % 16
    loose = (own % 2 == 1).float().unsqueeze(1)
    k = centres[own] * (4.5 - 0.5 * loose) + 0.9 * loose * torch.randn(1024, 32, generator=g)
    v = torch.randn(16, 32, generator=g)[own] + loose * torch.randn(1024, 32, generator=g)
    q = 3 * centres.mean(0) * 4 + torch.randn(1024, 32, generator=g)
    return tuple(x.view(1, 1, 1024, 32) for x in (q, k, v))  # type: ignore[return-value]


@pytest.mark.evidence
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_tiles_go_where_means_fail(seed):
    """Tight clusters get the attention, loose ones the exact tiles; by score it is the other way round."""
    q, k, v = tight_and_loose(seed)
    dense = attend(q, k, v)
    clusters = SVG2(8, 24, threshold=0.3, least=0.02, tile=(128, 128), iterations=20)
    made = plan(SVGEAR(clusters), q, k, v=v)
    score = by_score(clusters, made.density, q, k, rest=Pooled())
    mine, others = error(attend(q, k, v, made), dense), [error(attend(q, k, v, x), dense) for x in score]
    assert mine < 0.95 * min(others), (mine, others)
    loose = torch.arange(1024) % 2 == 1
    tokens = torch.arange(1024)
    shares = [float(x.kept(tokens, tokens, 1)[..., loose].float().mean() / x.kept(tokens, tokens, 1).float().mean())
              for x in (made, score[0])]  # fmt: skip
    assert shares[0] > 1.05 and shares[1] < 0.96, shares


def uneven(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eight large clusters that are a little loose, and eight a seventh as large that are twice as loose."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(16, 32, generator=g), dim=-1)
    own = torch.arange(16).repeat_interleave(torch.tensor([112, 16] * 8))[torch.randperm(1024, generator=g)]
    loose = torch.tensor([0.4, 0.9] * 8)[own].unsqueeze(1)
    k = 4 * centres[own] + loose * torch.randn(1024, 32, generator=g)
    v = torch.randn(16, 32, generator=g)[own] + torch.randn(1024, 32, generator=g)
    q = 12 * centres.mean(0) + torch.randn(1024, 32, generator=g)
    return tuple(x.view(1, 1, 1024, 32) for x in (q, k, v))  # type: ignore[return-value]


@pytest.mark.evidence
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_errors_are_weighed_against_their_cost(seed):
    """Where large clusters err more in all and small ones more per key, the small ones are computed.

    Controls: routing by error whatever its cost, and by score, both at no less density to a hundredth.
    """
    q, k, v = uneven(seed)
    dense = attend(q, k, v)
    clusters = SVG2(8, 24, threshold=0.3, least=0.02, tile=(128, 128), iterations=20)
    made, blind = (plan(SVGEAR(clusters, gamma=gamma, values=v), q, k) for gamma in (1.0, 0.0))
    mine, others = (
        error(attend(q, k, v, made), dense),
        [blind, *by_score(clusters, made.density, q, k, rest=Pooled())],
    )
    assert min(other.density for other in others) > made.density - 0.01
    errors = [error(attend(q, k, v, other), dense) for other in others]
    assert mine < 0.75 * min(errors), (mine, errors)


@pytest.mark.evidence
def test_means_of_like_tokens_stand_for_them():
    """All tiles but one or two of a row as means: finer clusters err less, though ever less is computed exactly.

    Controls: SVG2, which skips them, errs several times as much; so do as many means of neighbours, where tokens
    are shuffled. On all heads of two layers of a trained video model.
    """
    shuffled = torch.randperm(2048, generator=torch.Generator().manual_seed(0))
    for q, k, v in (captured(1), captured(3)):
        q, k, v = (x[:, :, shuffled] for x in (q, k, v))
        dense, errors = attend(q, k, v), []
        for count in (16, 64, 256):
            clusters = SVG2(64, count, threshold=1e-9, least=1e-9, tile=(128, 128))
            made = plan(SVGEAR(clusters, values=v), q, k)
            assert float(made.passes[0].cost().mean()) < 0.08 * 2048**2
            errors.append(error(attend(q, k, v, made), dense))
        skipped = error(attend(q, k, v, replace(clusters, least=2 / 256)), dense)
        placed = Tiles(MeanPool(), TopK(2), (32, 8), rest=Pooled())
        neighbours = error(attend(q, k, v, placed), dense)
        print(errors, skipped, neighbours)
        assert errors[0] > 1.08 * errors[1] > 1.08**2 * errors[2], errors
        assert skipped > 2 * errors[2] and neighbours > 1.5 * errors[2], (errors, skipped, neighbours)


@pytest.mark.evidence
@pytest.mark.parametrize("values", [False, True], ids=["", "values"])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_exact_tiles_are_those_of_the_largest_errors_that_the_budget_buys(values, gamma):
    """Row by row: the tiles with the most mass first, then the largest errors until SVG2's budget is spent.

    Control: the choice of another power of the cost, or without values, is another.
    """
    q, k, v = qkv(1, 4, 2, 200)
    method = SVGEAR(replace(CLUSTERS, keys=20), gamma=gamma, weights_only=not values, values=v)
    made = plan(method, q, k)
    one = made.passes[0]
    keep, sizes = one.tiles.keep, one.tiles.k_tiling.sizes(200, "cpu").repeat_interleave(2, 1)
    at = Arrangement(one.tiles.q_tiling, one.tiles.k_tiling, one.q_order, one.k_order)
    layout = Layout.arranged(at, q, k, made.view, 8**-0.5)
    errors = MeansError(v, gamma, weights_only=not values).score(layout, layout.kinds() != NONE)
    mass = MeanPool(counted=True).score(layout, layout.kinds() != NONE)
    bought = plan(method.clusters, q, k).passes[0].tiles.keep
    for head in range(4):
        live = [j for j in range(keep.shape[3]) if sizes[0, head, j]]
        for row in range(keep.shape[2]):
            if not one.tiles.q_tiling.sizes(200, "cpu")[0, head, row]:
                continue
            best = sorted(live, key=lambda j: -mass[0, head, row, j])
            least = best[: -(-len(live) // 10)]
            both = {*best[: -(-len(live) // 5)], *bought[0, head, row].nonzero().flatten().tolist()}
            left = int(sum(sizes[0, head, j] for j in both - {*least}))
            taken = {*least}
            for j in sorted({*live} - {*least}, key=lambda j: -errors[0, head, row, j]):
                if left <= 0:
                    break
                taken.add(j)
                left -= int(sizes[0, head, j])
            assert set(keep[0, head, row].nonzero().flatten().tolist()) == taken
    for other in (replace(method, gamma=1 - gamma), replace(method, weights_only=values)):
        assert not torch.equal(plan(other, q, k).passes[0].tiles.keep, keep)


@pytest.mark.evidence
@pytest.mark.parametrize("values", [False, True], ids=["", "values"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_estimate_is_its_formula(values, gamma):
    """Key by key, against means of tiles of uneven size, with padding and grouped heads."""
    q, k, v = qkv(2, 4, 2, 50, d=8, d_v=5)
    seen = torch.arange(50).lt(torch.tensor([[41], [50]]))
    view = Padding(seen).bind(50, 50)
    tilings = Tiling(16), Tiling.from_bounds(torch.tensor([0, 3, 20, 20, 36, 50]))
    layout = Layout(q, k, view, *tilings, 0.3)
    got = MeansError(values=v if values else None, gamma=gamma, weights_only=not values).score(
        layout, layout.kinds() != NONE
    )
    bounds = tilings[1].bounds.flatten().tolist()
    for b in range(2):
        for h in range(4):
            for i in range(4):
                mean_q = q[b, h, 16 * i : 16 * i + 16].mean(0)
                logs = []
                for j, (start, end) in enumerate(zip(bounds, bounds[1:])):
                    some = [t for t in range(start, end) if seen[b, t]]
                    if not some:
                        continue
                    keys = k[b, h // 2, some]
                    own = v[b, h // 2, some] if values else torch.ones(len(some), 1, dtype=v.dtype)
                    weights, mean = (0.3 * keys @ mean_q).exp(), (0.3 * keys.mean(0) @ mean_q).exp()
                    off = (weights.unsqueeze(1) * own - mean * own.mean(0)).square().sum()
                    logs.append((j, float(off.log() - gamma * torch.tensor(float(len(some))).log())))
                mine = got[b, h, i, [j for j, _ in logs]]
                want = torch.tensor([x for _, x in logs], dtype=torch.float64)
                torch.testing.assert_close(mine - mine[0], want - want[0], rtol=1e-6, atol=1e-6)


def test_a_row_spends_what_svg2_spends():
    q, k, v = qkv(1, 2, 2, 130)
    made, bought = plan(SMALL, q, k, v=v), plan(CLUSTERS, q, k)
    both = [x.passes[0].tiles for x in (made, bought)]
    sizes = both[0].k_tiling.sizes(130, "cpu").unsqueeze(2)
    mine, theirs = ((x.keep * sizes).sum(-1) for x in both)
    twice = plan(replace(CLUSTERS, threshold=1e-9, least=0.2), q, k).passes[0].tiles
    budget = torch.maximum(theirs, (twice.keep * sizes).sum(-1))
    assert (mine >= budget).all() and (mine - budget < sizes.amax()).all()
    first = plan(replace(CLUSTERS, threshold=1e-9), q, k).passes[0].tiles.keep
    assert not (first & ~both[0].keep).any(), "the tiles with the most mass"
    assert not torch.equal(both[0].keep, both[1].keep)


def test_tiles_that_a_mask_cuts_through_are_exact_and_nothing_is_left_out():
    q, k, v = qkv(2, 4, 2, 130)
    for mask in MASKS.values():
        made = plan(SMALL, q, k, mask=mask, v=v)
        one = made.passes[0]
        ordered = made.view.permute(one.q_order, one.k_order)
        kinds = ordered.tiles(one.tiles.q_tiling, one.tiles.k_tiling)
        kinds = kinds.repeat_interleave(4 // kinds.shape[1], 1)
        exact, coarse = (tiles.keep for tiles in made.tile_maps)
        assert (exact | (kinds != PARTIAL)).all() and not (exact & coarse).any()
        assert (
            torch.equal(exact & (kinds != NONE) | coarse, kinds != NONE)
            and not (coarse & (kinds != FULL)).any()
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine(engine):
    check_plan(SMALL, None, engine=engine)


def test_full_density_is_dense_and_reads_no_means():
    full = SVGEAR(replace(CLUSTERS, threshold=1.0))
    q, k, v = qkv()
    assert len(plan(full, q, k, v=v).passes) == 1
    check_full(full)


def test_padding_may_hold_anything():
    q, k, v = qkv(1, 2, 2, 64, dtype=torch.float32)
    mask = Padding(torch.arange(64).lt(40).unsqueeze(0))
    outs = []
    for value in (0.0, 1e30):
        filled = [x.clone() for x in (k, v)]
        for x in filled:
            x[:, :, 40:] = value
        outs.append(attend(q, *filled, SMALL, mask=mask))
    assert torch.equal(*outs) and outs[0].isfinite().all()


def test_scores_too_large_for_an_exponential_compare():
    q, k, v = (50 * x for x in qkv(1, 2, 2, 130, dtype=torch.float32))
    made = plan(SMALL, q, k, v=v)
    assert attend(q, k, v, made).isfinite().all()
    layout = Layout(q, k, made.view, Tiling(16), Tiling(16), 1.0)
    assert MeansError(v).score(layout, layout.kinds() != NONE).isfinite().all()


@pytest.mark.parametrize(
    ("options", "problem", "message"),
    [
        ({"clusters": "svg2"}, TypeError, "clusters must be an SVG2, got str"),
        ({"gamma": -1}, ValueError, "gamma must be a number >= 0"),
        ({"gamma": "1"}, ValueError, "gamma must be a number >= 0"),
    ],
)
def test_bad_settings(options, problem, message):
    with pytest.raises(problem, match=message):
        SVGEAR(**options)


def test_what_does_not_fit_is_refused():
    q, k, v = qkv(n_q=64)
    with pytest.raises(ValueError, match="takes no bias"):
        attend(q, k, v, SMALL, bias=torch.zeros(64, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"values must be \[1, 2, 64, D_v\], one for each key, got \[1, 2, 63, 8\]"
    ):
        plan(SVGEAR(CLUSTERS, values=v[:, :, 1:]), q, k)
