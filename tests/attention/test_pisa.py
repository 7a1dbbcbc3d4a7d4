"""PISA: what unselected tiles give, that it errs less than leaving them out, and when the first order helps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.attention.compared import captured, least_share
from tests.conformance.common import qkv
from tests.conformance.weighted import (
    MASKS,
    N,
    check_full,
    check_plan,
    error,
)  # noqa
from tilewise.attention import (
    Boxes,
    Layout,
    MeanPool,
    Pooled,
    Skip,
    Tiles,
    TopK,
    attend,
    plan,
)
from tilewise.attention.recipes.pisa import PISA, Edges, MomentPool
from tilewise.tiles import NONE, PARTIAL, Causal, Padding, Tiling

SMALL = PISA(density=0.3, tile=16)
LAYERS = (2, 3, 4, 5)


def _orders(method: PISA) -> tuple[PISA, PISA, Tiles]:
    """Order 0, order 1, and order 1 with its sign turned."""
    return replace(method, taylor=0), method, replace(method.tiles(), rest=Pooled(-1.0))


@pytest.mark.evidence
@pytest.mark.parametrize("layer", LAYERS)
def test_each_order_errs_less_than_the_one_below_at_every_density(layer):
    """On q, k and v of a trained model: skipping > order 0 > order 1, skipping given at least as many scores.

    Control: with its sign turned, the first order makes order 0 worse.
    """
    q, k, v = captured(2048, LAYERS)[layer]
    dense = attend(q, k, v, mask="causal")
    for density in (0.05, 0.1, 0.2, 0.4):
        method = PISA(density)
        zero, one, turned = (error(attend(q, k, v, x, mask="causal"), dense) for x in _orders(method))
        as_dense = plan(replace(method, taylor=0), q, k, mask="causal").density
        skip = least_share(replace(method.tiles(), rest=Skip()), as_dense, q, k, "causal")
        assert as_dense <= skip.density < 1.1 * as_dense
        skipped = error(attend(q, k, v, skip, mask="causal"), dense)
        assert zero < 0.92 * skipped, (density, skipped, zero)
        assert one < 0.97 * zero, (density, zero, one)
        assert turned > 1.03 * zero, (density, zero, turned)


def _without_slope(k: Tensor, v: Tensor, size: int) -> Tensor:
    """Values of the same mean in each tile of `size` tokens, of which no part is a linear function of its keys."""
    k, v = (x.unflatten(2, (-1, size)).double() for x in (k, v))
    centred, rest = k - k.mean(3, keepdim=True), v - v.mean(3, keepdim=True)
    basis = torch.linalg.qr(centred).Q
    return (v - basis @ (basis.mT @ rest)).flatten(2, 3).to(torch.float32)


@pytest.mark.evidence
def test_the_first_order_lives_on_values_that_go_with_keys():
    """Keys at random, values a linear map of them and noise: the first order takes most of the error of order 0.

    Control: values without the part that goes with the keys of their tile, and nothing else changed. Then the first
    order adds nothing, with either sign.
    """
    g = torch.Generator().manual_seed(0)
    q, k, noise = (torch.randn(1, 2, 2048, 16, generator=g) for _ in range(3))
    v = (k @ torch.randn(16, 16, generator=g) + noise) / 4
    gains = []
    for values in (v, _without_slope(k, v, 32)):
        dense = attend(q, k, values)
        zero, one, turned = (error(attend(q, k, values, x), dense) for x in _orders(PISA(0.1, tile=32)))
        gains.append((1 - one / zero, 1 - turned / zero))
    (with_keys, wrong), without = gains
    assert with_keys > 0.5 and wrong < -0.5, gains
    assert max(map(abs, without)) < 1e-3, gains


@pytest.mark.evidence
def test_shuffled_values_of_a_trained_model_leave_the_first_order_little():
    """As the test before, on real heads: shuffled within tiles, values leave less than half of the gain."""
    g = torch.Generator().manual_seed(0)
    within = (torch.rand(32, 64, generator=g).argsort(-1) + 64 * torch.arange(32).view(-1, 1)).flatten()
    for layer in LAYERS:
        q, k, v = captured(2048, LAYERS)[layer]
        gains = []
        for values in (v, v[:, :, within]):
            dense = attend(q, k, values, mask="causal")
            zero, one, _ = (error(attend(q, k, values, x, mask="causal"), dense) for x in _orders(PISA(0.05)))
            gains.append(1 - one / zero)
        assert gains[1] < 0.5 * gains[0], (layer, gains)


@pytest.mark.evidence
def test_orders_are_those_of_a_taylor_expansion():
    """Keys drawn towards their tile's mean: order 0 errs as their spread does, order 1 as its square.

    The first order takes one matrix for all tiles, so this is so where tiles spread alike. Control: where each
    spreads in its own way, order 1 too falls as the spread.
    """
    d, tiles, size = 8, 8, 16

    def errors(spread: float, alike: bool) -> tuple[float, float]:
        g = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(1, 1, *shape, generator=g, dtype=torch.float64)

        q, (means, mean_values) = draw(32, d), (draw(tiles, 1, d) for _ in range(2))
        each = 1 if alike else tiles
        deviations, value_deviations = (
            x - x.mean(3, keepdim=True) for x in (draw(each, size, d), draw(each, size, d))
        )
        k = (means + spread * deviations).flatten(2, 3)
        v = (mean_values + value_deviations).flatten(2, 3)
        dense = attend(q, k, v)
        coarse = (Tiles(score=MeanPool(), select=TopK(1), tile=(16, 16), rest=Pooled(x)) for x in (0.0, 1.0))
        return tuple(error(attend(q, k, v, x), dense) for x in coarse)  # type: ignore[return-value]

    (zero, one), (zero_half, one_half) = errors(0.1, True), errors(0.05, True)
    assert zero / zero_half == pytest.approx(2, rel=0.05) and one / one_half == pytest.approx(4, rel=0.05)
    (_, one), (_, one_half) = errors(0.1, False), errors(0.05, False)
    assert one / one_half == pytest.approx(2, rel=0.1)


def _half_flat(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of which every other tile of 32 has one value for all its tokens, so that its mean says it all."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 2, 1024, 16, generator=g) for _ in range(2))
    v = (k @ torch.randn(2, 16, 16, generator=g) / 4).unflatten(2, (32, 32))
    v[:, :, ::2] = v[:, :, ::2].mean(3, keepdim=True)
    return q, k, v.flatten(2, 3)


@pytest.mark.evidence
def test_covariance_aware_selection_spends_where_means_fail():
    """At equal density the score that knows |H| errs less. Control: with |H| of other tiles it errs more."""
    for seed in range(3):
        q, k, v = _half_flat(seed)
        dense = attend(q, k, v)
        method = PISA(0.25, taylor=0, tile=32)
        shifted = v.roll(32, 2)  # the neighbouring tile's
        aware = replace(method, aware=True)
        plans = [plan(method, q, k), plan(aware, q, k, v=v), plan(aware, q, k, v=shifted)]
        assert len({made.density for made in plans}) == 1
        errors = [error(attend(q, k, v, x), dense) for x in plans]
        assert error(attend(q, k, v, aware), dense) == errors[1], "attend gives the values itself"
        assert errors[1] < 0.95 * errors[0] < 0.95 * errors[2], errors


def test_moment_score_is_its_formula():
    q, k, v = qkv(1, 2, 1, 40, d=8, d_v=5)
    view = Causal().bind(40, 40)
    layout = Layout(q, k, view, Tiling(16), Tiling(16), 0.3)
    among = layout.kinds() != NONE
    got = MomentPool(values=v).score(layout, among)[0]
    for head in range(2):
        logits = torch.full((3, 3), -torch.inf, dtype=torch.float64)
        for i in range(3):
            for j in range(i + 1):
                rows, columns = slice(16 * i, 16 * i + 16), slice(16 * j, 16 * j + 16)
                keys = k[0, 0, columns]
                moment = (keys - keys.mean(0)).T @ v[0, 0, columns]
                pooled = 0.3 * q[0, head, rows].mean(0) @ keys.mean(0) + torch.tensor(len(keys)).log()
                logits[i, j] = pooled + (moment.norm() + 1e-5).log()
        torch.testing.assert_close(got[head], logits.softmax(-1), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match=r"values must be \[1, 1, 40, D_v\].*got \[1, 2, 40, 5\]"):
        MomentPool(values=v.expand(1, 2, -1, -1)).score(layout, among)


def test_values_reach_the_score_in_tile_order():
    q, k, v = _half_flat(0)
    shuffled = torch.randperm(1024)
    boxes = Boxes((32, 32), (1, 32))
    one = plan(PISA(0.25, tile=32, aware=True), q, k, v=v).tile_maps[0].keep
    other = plan(PISA(0.25, aware=True, order=boxes), q, k, v=v).tile_maps[0].keep
    assert torch.equal(one, other)
    wrong = plan(PISA(0.25, aware=True, order=boxes), q, k, v=v[:, :, shuffled]).tile_maps[0].keep
    assert not torch.equal(one, wrong)


def test_tiles_that_the_mask_cuts_through_are_exact():
    q, k, _ = qkv(2, 4, 2, N)
    for mask in MASKS.values():
        made = plan(PISA(0.05, tile=16), q, k, mask=mask)
        layout = Layout(q, k, made.view, Tiling(16), Tiling(16), 1.0)
        kinds = layout.kinds().expand(2, 4, -1, -1)
        exact, coarse = (tiles.keep.expand(2, 4, -1, -1) for tiles in made.tile_maps)
        assert (exact | (kinds != PARTIAL)).all(), "a cut tile is left out"
        assert torch.equal(exact | coarse, kinds != NONE) and not (exact & coarse).any(), "not a partition"
    assert torch.equal(Edges().tiles(layout, kinds != NONE), layout.kinds() == PARTIAL)


@pytest.mark.parametrize(("grid", "box", "before"), [((4, 4, 8), (2, 2, 4), 0), ((3, 5, 7), (2, 2, 4), 6)])
def test_boxes_of_a_video_even_and_uneven(grid, box, before):
    n = before + grid[0] * grid[1] * grid[2]
    check_plan(PISA(density=0.2, order=Boxes(grid, box, before)), None, n=n)
    q, k, v = qkv(n_q=n + 1)
    with pytest.raises(ValueError, match=f"has {n} tokens, got {n + 1}"):
        attend(q, k, v, PISA(order=Boxes(grid, box, before)))


def test_full_density_is_dense_and_reads_no_means():
    full = PISA(density=1.0, tile=16)
    assert len(plan(full, *qkv()[:2]).passes) == 1
    check_full(full)


def test_padding_may_hold_anything():
    q, k, v = qkv(1, 2, 2, 64, dtype=torch.float32)
    mask = Padding(torch.arange(64).lt(40).unsqueeze(0))
    outs = []
    for value in (0.0, 1e30):
        filled = [x.clone() for x in (k, v)]
        for x in filled:
            x[:, :, 40:] = value
        outs.append(attend(q, *filled, replace(SMALL, aware=True), mask=mask))
    assert torch.equal(*outs) and outs[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "density must be in"),
        ({"density": 1.5}, "density must be in"),
        ({"taylor": 2}, "taylor must be 0 or 1"),
        ({"tile": 0}, "tile must be an integer"),
        ({"tile": 1.5}, "tile must be an integer"),
        ({"aware": 1}, "aware must be True or False, got 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        PISA(**options)


def test_what_means_cannot_do_is_refused():
    q, k, v = qkv(n_q=64)
    with pytest.raises(ValueError, match="takes no bias"):
        attend(q, k, v, SMALL, bias=torch.zeros(64, dtype=torch.float64))
    with pytest.raises(ValueError, match="takes no softcap"):
        attend(q, k, v, SMALL, softcap=5.0)
    assert attend(q, k, v, replace(SMALL, taylor=0), softcap=5.0).isfinite().all()
