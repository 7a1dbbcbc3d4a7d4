"""PSA: how levels are allotted and read; where they err less than keeping or dropping tiles, and where not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.attention.compared import captured, least_share
from tests.attention.video_like import video_qkv
from tests.conformance.common import qkv
from tests.conformance.weighted import MASKS, N, check_plan, error, explicit
from tilewise.attention import (
    Antidiagonal,
    Boxes,
    Chosen,
    First,
    Layout,
    MeanPool,
    Own,
    RandomTiles,
    Share,
    Tiles,
    attend,
    plan,
)
from tilewise.attention.recipes.psa import PSA, Pyramid, runs
from tilewise.tiles import FULL, NONE, PARTIAL, Causal, Tiling

SMALL = PSA(levels=((1, 0.3), (2, 0.5), (4, 0.7), (8, 0.9)), tile=(32, 16), score=Antidiagonal(4))
QUOTAS = ((1, 0.05), (2, 0.15), (4, 0.25), (8, 0.5))  # the authors' shares of tiles
GRID = (8, 16, 16)


def _head(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """One head of a made-up video."""
    made = video_qkv(GRID, strength=5.0)
    head = made.kinds.index(kind)
    return tuple(x[:, head : head + 1] for x in made[:3])  # type: ignore[return-value]


def _binary(method: PSA, density: float, q, k, mask=None, always=()):
    """Tiles kept or dropped by the same score over the same tiles, at least as many scores."""
    keep = Tiles(score=method.score, select=Share(1.0), tile=method.tile, order=method.order, always=always)
    return least_share(keep, density, q, k, mask)


@pytest.mark.evidence
@pytest.mark.parametrize("box", [(8, 2, 4), (2, 4, 8)], ids=str)
@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_levels_err_less_than_keeping_or_dropping_at_equal_cost(kind, box):
    """On heads of a video, by the paper's thresholds and by its quotas; keeping and dropping computes more scores.

    Control: the same quotas allotted at random, at the same cost, err far more.
    """
    q, k, v = _head(kind)
    dense = attend(q, k, v)
    quotas = PSA(QUOTAS, "share", score=MeanPool(), order=Boxes(GRID, box), always=())
    for method in (quotas, PSA(score=MeanPool(), order=Boxes(GRID, box), always=())):
        made = plan(method, q, k)
        binary = _binary(method, made.density, q, k)
        assert made.density <= binary.density < 1.25 * made.density
        mine, kept = (error(attend(q, k, v, x), dense) for x in (made, binary))
        assert mine < 0.75 * kept, (method.by, mine, kept)
    made, chance = plan(quotas, q, k), plan(replace(quotas, score=RandomTiles()), q, k)
    assert chance.density == made.density
    assert error(attend(q, k, v, chance), dense) > 1.5 * error(attend(q, k, v, made), dense)


@pytest.mark.evidence
def test_the_similarity_rule_pools_only_keys_that_are_alike():
    """In a head of scattered clusters means of unlike keys err more than dropping tiles.

    The rule reads such tiles exactly. In a head whose neighbours are alike it changes nothing. Control: thresholds
    that let everything through.
    """
    order, rule = Boxes(GRID, (8, 2, 4)), (0.7, 0.65, 0.6)
    errors = {}
    for kind in ("semantic", "spatial"):
        q, k, v = _head(kind)
        dense = attend(q, k, v)
        for name, alike in (("none", None), ("lets all through", (-1.1,) * 3), ("rule", rule)):
            method = PSA(QUOTAS, "share", alike, score=MeanPool(), order=order, always=())
            made = plan(method, q, k)
            binary = _binary(method, made.density, q, k)
            errors[kind, name] = error(attend(q, k, v, made), dense) / error(attend(q, k, v, binary), dense)
    assert errors["semantic", "none"] > 1.3 and errors["semantic", "lets all through"] > 1.3, errors
    assert errors["semantic", "rule"] < 1.05, errors
    assert errors["spatial", "rule"] == errors["spatial", "none"] < 0.5, errors


@pytest.mark.evidence
def test_on_text_importance_allots_better_than_chance():
    """q, k and v of a trained byte model: on every layer quotas by importance err less than at random.

    Against keeping or dropping, levels err less in two of these five layers only: bytes are less alike than pixels.
    """
    layers = (1, 2, 3, 4, 5)
    for layer, (q, k, v) in captured(2048, layers).items():
        dense = attend(q, k, v, mask="causal")
        method = PSA(QUOTAS, "share", tile=(64, 64))
        made, chance = (plan(x, q, k, mask="causal") for x in (method, replace(method, score=RandomTiles())))
        assert made.density == pytest.approx(chance.density, rel=1e-3)
        mine, random = (error(attend(q, k, v, x, mask="causal"), dense) for x in (made, chance))
        assert mine < 0.97 * random, (layer, mine, random)
        if layer in (2, 3):
            binary = _binary(method, made.density, q, k, "causal", (First(), Own()))
            assert mine < 0.9 * error(attend(q, k, v, binary, mask="causal"), dense), layer


@pytest.mark.evidence
@pytest.mark.parametrize("by", ["mass", "share"])
def test_levels_follow_the_thresholds(by):
    """Tile by tile: the level is the first whose bound is above what stands before the tile."""
    q, k, _ = qkv(1, 2, 2, 256)
    method = replace(SMALL, by=by, always=())
    made = plan(method, q, k)
    layout = Layout(q, k, made.view, Tiling(32), Tiling(16), 8**-0.5)
    scores = SMALL.score.score(layout, layout.kinds() != NONE)
    maps = [tiles.keep for tiles in made.tile_maps]
    assert [p.reads and p.reads.tiling.size for p in made.passes] == [None, 2, 4, 8]
    for head in range(2):
        for row in range(8):
            one = scores[0, head, row]
            before = 0.0
            for place, tile in enumerate(one.argsort(descending=True).tolist()):
                share = before / float(one.sum()) if by == "mass" else place / 16
                level = sum(share >= bound - 1e-9 for _, bound in SMALL.levels)
                have = [bool(keep[0, head, row, tile]) for keep in maps]
                assert have == [level == number for number in range(4)], (head, row, tile)
                before += float(one[tile])


def test_a_last_bound_of_one_leaves_nothing_out():
    q, k, _ = qkv(1, 2, 2, 512, dtype=torch.float32)
    q = 8 * q  # scores so far apart that the mass before the last tiles rounds to all of it
    for by in ("mass", "share"):
        method = PSA(
            levels=((1, 0.2), (4, 0.5), (16, 1.0)), by=by, tile=(16, 16), score=MeanPool(), always=()
        )
        maps = [tiles.keep for tiles in plan(method, q, k).tile_maps]
        assert (sum(keep.int() for keep in maps) == 1).all()


def test_cost_is_counted_by_the_means_read():
    q, k, _ = qkv(1, 1, 1, 1024, dtype=torch.float32)
    made = plan(PSA(QUOTAS, "share", tile=(64, 64), always=()), q, k)
    # Of 16 tiles: 1 exactly, 2 at 2, 1 at 4, 4 at 8 keys per mean (shares of 16, each rounded up).
    assert made.density == pytest.approx((1 + 2 / 2 + 1 / 4 + 4 / 8) / 16)


def test_a_level_of_whole_tiles_is_a_pooled_rest():
    from tilewise.attention import Pooled

    q, k, v = qkv(n_q=128)
    pooled = Tiles(score=MeanPool(), select=Share(0.25), tile=(16, 16), rest=Pooled())
    pyramid = replace(pooled, rest=Pyramid(levels=((16, 1.0),), by="share"))
    torch.testing.assert_close(attend(q, k, v, pyramid), attend(q, k, v, pooled))


def test_runs_never_cross_a_tile():
    tiling = Tiling.from_bounds(torch.tensor([0, 5, 5, 12, 20]))
    fine, cut = runs(tiling, 4, torch.device("cpu"))
    assert fine.bounds.tolist() == [[[0, 4, 5, 5, 5, 9, 12, 16, 20]]] and cut.size == 2
    even = runs(Tiling(16), 4, torch.device("cpu"))
    assert even[0].bounds is None and (even[0].size, even[1].size) == (4, 4)
    with pytest.raises(ValueError, match="tiles of 10 keys cannot be pooled by 4"):
        runs(Tiling(10), 4, torch.device("cpu"))


def test_similarity_is_that_of_the_ends_of_runs():
    k = torch.randn(1, 1, 22, 8, dtype=torch.float64)
    bounds = torch.tensor([0, 5, 12, 22])
    view = Causal().bind(22, 22)
    layout = Layout(k, k, view, Tiling(22), Tiling.from_bounds(bounds), 1.0)

    def mean(first: int, end: int) -> float:
        ends = [(s, min(s + 4, end) - 1) for s in range(first, end, 4)]
        return float(sum(torch.cosine_similarity(k[0, 0, a], k[0, 0, b], 0) for a, b in ends) / len(ends))

    means = [mean(int(a), int(b)) for a, b in zip(bounds, bounds[1:])]
    for least in sorted(means):
        coarsest = Pyramid(((4, 1.0),), alike=(least - 1e-9,))._coarsest(layout)
        assert coarsest[0, 0].tolist() == [int(x > least - 1e-9) for x in means]


def test_tiles_that_the_mask_cuts_through_are_exact_and_nothing_is_read_twice():
    q, k, _ = qkv(2, 4, 2, N)
    for alike in (None, (0.3, 0.2, 0.1)):
        for mask in MASKS.values():
            made = plan(replace(SMALL, alike=alike), q, k, mask=mask)
            layout = Layout(q, k, made.view, Tiling(32), Tiling(16), 1.0)
            kinds = layout.kinds().expand(2, 4, -1, -1)
            times = sum(t.keep.expand(2, 4, -1, -1).int() for t in made.tile_maps)
            assert (times <= (kinds != NONE)).all()
            assert (made.tile_maps[0].keep.expand(2, 4, -1, -1) | (kinds != PARTIAL)).all()
            assert not (made.tile_maps[-1].keep & (kinds != FULL)).any()


def test_a_pyramid_leaves_out_tiles_that_the_mask_cuts_through():
    """As a stage by itself it never reads a mean of which a query sees a part."""
    q, k, _ = qkv(n_q=64)
    view = Causal().bind(64, 64)
    layout = Layout(q, k, view, Tiling(16), Tiling(16), 1.0)
    visible = layout.kinds() != NONE
    chosen = Chosen(torch.rand(1, 2, 4, 4), visible & False, visible.expand(1, 2, -1, -1))
    (one,) = Pyramid(((2, 1.0),)).passes(layout, chosen)
    assert torch.equal(one.tiles.keep, (layout.kinds() == FULL).expand(1, 2, -1, -1))


@pytest.mark.parametrize(("grid", "box", "before"), [((4, 4, 8), (2, 2, 4), 0), ((3, 5, 7), (2, 2, 4), 6)])
@pytest.mark.parametrize("alike", [None, (0.1, 0.0, -0.1)], ids=["", "alike"])
def test_boxes_of_a_video_even_and_uneven(grid, box, before, alike):
    n = before + grid[0] * grid[1] * grid[2]
    order = Boxes(grid, box, before)
    check_plan(PSA(SMALL.levels, alike=alike, score=MeanPool(counted=True), order=order), None, n=n)
    q, k, v = qkv(n_q=n + 1)
    with pytest.raises(ValueError, match=f"has {n} tokens, got {n + 1}"):
        attend(q, k, v, PSA(order=order))


def test_one_plan_serves_other_values():
    q, k, v = qkv(n_q=160)
    made = plan(SMALL, q, k, mask="causal")
    torch.testing.assert_close(attend(q, k, 2 * v, made), 2 * explicit(made, q, k, v))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": ((2, 0.5),)}, "levels must start with"),
        ({"levels": ()}, "levels must start with"),
        ({"levels": ((1, 0.5), (1, 0.6))}, "rising numbers of keys"),
        ({"levels": ((1, 0.5), (2.5, 0.6))}, "rising numbers of keys"),
        ({"levels": ((1, 0.5), (2, 0.4))}, "rising bounds"),
        ({"levels": ((1, 0.0),)}, "rising bounds in"),
        ({"by": "rank"}, "by must be"),
        ({"alike": (0.5,)}, "alike must have one entry for each of 3"),
        ({"tile": (64, 60)}, "multiple of every level, got 60 for 8"),
        ({"tile": (0, 64)}, "tile must be two integers"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        PSA(**options)


def test_what_means_cannot_do_is_refused():
    q, k, v = qkv(n_q=64)
    with pytest.raises(ValueError, match="takes no bias"):
        attend(q, k, v, SMALL, bias=torch.zeros(64, dtype=torch.float64))
    assert attend(q, k, v, SMALL, softcap=5.0).isfinite().all()
