"""LLSA: the choice level by level against one written out, its cost over N, its error, its gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.attention.compared import captured
from tests.attention.video_like import video_qkv
from tests.conformance.common import qkv
from tests.conformance.weighted import MASKS, N, check_plan, error
from tilewise.attention import Boxes, Centroid, Skip, Tiles, TopK, attend, plan
from tilewise.attention.recipes.llsa import LLSA
from tilewise.attention.recipes.pisa import Edges
from tilewise.tiles import NONE, PARTIAL, Tiling

SMALL = LLSA(block=4, top_k=3)
LENGTHS = (512, 1024, 2048, 4096, 8192)


def _cost(method, n: int) -> float:
    """Scores that the choice computes, counted by PyTorch as it runs, and pairs that attention scores."""
    d = 8
    q, k, _ = qkv(1, 1, 1, n, d=d, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        made = plan(method, q, k)
    return counter.get_total_flops() / (2 * d) + float(sum(p.cost() for p in made.passes))


def _misfit(costs: list[float], growth) -> float:
    """How far costs lie from a constant times `growth(N)`, at most: 0.1 is 10 %, the best constant taken."""
    ratios = [math.log(cost / growth(n)) for cost, n in zip(costs, LENGTHS, strict=True)]
    return math.expm1((max(ratios) - min(ratios)) / 2)


@pytest.mark.evidence
def test_cost_grows_as_n_log_n():
    """Scores and pairs over five doublings of N fit N log N to a few per cent, and N^2 not at all.

    Controls: one level of the same blocks, with and without coarse blocks read, fits N^2 better than N log N.
    """
    method = LLSA(block=4, top_k=4)
    costs = [_cost(method, n) for n in LENGTHS]
    assert _misfit(costs, lambda n: n * math.log2(n)) < 0.03, costs
    assert _misfit(costs, lambda n: n**2) > 2, costs
    assert _misfit(costs, lambda n: n) > 0.1, (
        costs
    )  # nor is it linear: there is a level more for every doubling or two
    assert [method.depth(n) for n in LENGTHS] == [3, 4, 4, 5, 5]
    flat = Tiles(score=Centroid(), select=TopK(4), tile=(4, 4))
    for control in (flat, replace(method, levels=1)):
        costs = [_cost(control, n) for n in LENGTHS]
        quadratic, log_linear = (_misfit(costs, f) for f in (lambda n: n**2, lambda n: n * math.log2(n)))
        assert quadratic < 0.25 and log_linear > 1, (control, costs)


def _flat(method: LLSA, density: float, q: Tensor, k: Tensor, mask, order=None):
    """Top-k over one level of blocks, nothing else read, with at least as many pairs."""
    options = {} if order is None else {"order": order}
    for top_k in range(1, 512):
        flat = Tiles(
            score=Centroid(),
            select=TopK(top_k),
            tile=(method.block, method.block),
            always=(Edges(),),
            rest=Skip(),
            **options,
        )
        made = plan(flat, q, k, mask=mask)
        if made.density >= density:
            return made
    raise AssertionError("not dense enough")


@pytest.mark.evidence
@pytest.mark.parametrize("layer", [2, 3, 4, 5])
def test_enrichment_errs_less_than_a_flat_top_k_at_equal_cost(layer):
    """q, k and v of a trained model, blocks of 4 on three levels; the flat choice scores and reads more pairs.

    Levels apart err less than the paper's overlapping ones, which cost more. Control: the same choice without the
    coarse levels errs more than the flat one.
    """
    q, k, v = captured(2048, (2, 3, 4, 5))[layer]
    dense = attend(q, k, v, mask="causal")
    method = LLSA(block=4, top_k=16, levels=3)
    made, both = (plan(x, q, k, mask="causal") for x in (method, replace(method, overlap=True)))
    flat = _flat(method, made.density, q, k, "causal")
    assert made.density <= flat.density < 1.1 * made.density and made.density < both.density
    alone = replace(made, passes=made.passes[:1])
    mine, twice, one_level, bare = (
        error(attend(q, k, v, x, mask="causal"), dense) for x in (made, both, flat, alone)
    )
    assert mine < 0.92 * one_level < bare, (mine, one_level, bare)
    assert mine < 0.8 * twice, (mine, twice)


@pytest.mark.evidence
def test_enrichment_errs_less_on_a_video():
    """The same on a temporal head of a made-up video, tokens in boxes of a block."""
    made = video_qkv(strength=5.0)
    q, k, v = (x[:, 1:2] for x in made[:3])
    order = Boxes((8, 16, 16), (1, 4, 4))
    dense = attend(q, k, v)
    for levels in (1, 2):
        method = LLSA(16, 8, levels, order=order)
        chosen = plan(method, q, k)
        flat = _flat(method, chosen.density, q, k, None, order)
        assert error(attend(q, k, v, chosen), dense) < 0.5 * error(attend(q, k, v, flat), dense)


def _choice(method: LLSA, q: Tensor, k: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """For one head of N tokens, nothing masked: blocks taken and blocks left at each level, coarsest first."""
    n, block, depth = len(k), method.block, method.depth(len(k))
    taken, left, candidates = [], [], None
    for level in range(depth, 0, -1):
        size = block**level
        count = -(-n // size)
        means_q, means_k = (
            torch.stack([x[i * size : (i + 1) * size].mean(0) for i in range(count)]) for x in (q, k)
        )
        if candidates is None:
            candidates = torch.ones(count, count, dtype=torch.bool)
        scores = (means_q @ means_k.T).masked_fill(~candidates, -torch.inf)
        best = torch.zeros_like(candidates)
        for i in range(count):
            best[i, scores[i].argsort(descending=True)[: method.top_k]] = True
        best &= candidates
        taken.append(best)
        left.append(candidates if method.overlap else candidates & ~best)
        finer = -(-n // block ** (level - 1))
        candidates = best.repeat_interleave(block, 0).repeat_interleave(block, 1)[:finer, :finer]
    return taken, left


@pytest.mark.evidence
@pytest.mark.parametrize(
    "method", [SMALL, replace(SMALL, overlap=True), LLSA(3, 2, 4), LLSA(8, 1, 2)], ids=str
)
def test_choice_descends_from_chosen_parents(method):
    """Against the rule written out over dense maps, level by level."""
    q, k, _ = qkv(1, 2, 2, 203)
    made = plan(method, q, k)
    exact, *coarse = made.tile_maps
    assert [p.reads.tiling.size for p in made.passes[1:]] == [
        method.block**level for level in range(method.depth(203), 0, -1)
    ]
    for head in range(2):
        taken, left = _choice(method, q[0, head], k[0, head])
        assert torch.equal(exact.keep[0, head], taken[-1])
        for tiles, want in zip(coarse, left, strict=True):
            assert torch.equal(tiles.keep[0, head], want)


def test_every_token_is_read_once_unless_levels_overlap():
    """Counts of the means and tokens that a query reads add up to N; overlapping levels count children twice."""
    q, k, _ = qkv(1, 2, 2, 203)
    for overlap in (False, True):
        made = plan(replace(SMALL, overlap=overlap), q, k)
        read = torch.zeros(1, 2, 203)
        for one in made.passes:
            size = 4 if one.reads is None else one.reads.tiling.size
            width = Tiling(size).sizes(203, "cpu")[0, 0].float()
            read += (one.tiles.keep * width).sum(-1).repeat_interleave(one.tiles.q_tiling.size, 2)[:, :, :203]
        assert (read > 203).all() if overlap else (read == 203).all()


@pytest.mark.evidence
def test_trains_through_tokens_and_means():
    """Gradients equal those of the explicit formula, where tokens that no query chose have a part by their means.

    Control: with the coarse levels taken away, most keys and values get no gradient at all.
    """
    made = check_plan(LLSA(4, 2, 2), None, n=N)
    q, k, v = (x.requires_grad_() for x in qkv(2, 4, 2, N))
    for one, reached in ((made, True), (replace(made, passes=made.passes[:1]), False)):
        out = attend(q, k, v, one)[:, :, :16]
        _, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
        share = float((dv != 0).any(-1).float().mean()), float((dk != 0).any(-1).float().mean())
        assert share == (1.0, 1.0) if reached else max(share) < 0.6


def test_blocks_that_the_mask_cuts_through_are_entered():
    """Under any mask nothing hidden is read, nothing visible is lost, and means are of tokens that are all seen."""
    q, k, _ = qkv(2, 4, 2, N)
    for mask in MASKS.values():
        made = plan(SMALL, q, k, mask=mask)
        seen = made.view.tokens().expand(2, 4, N, N)
        read = torch.zeros(2, 4, N, N)
        for one in made.passes:
            size = 4 if one.reads is None else one.reads.tiling.size
            keep = one.tiles.keep.expand(2, 4, -1, -1)
            kinds = made.view.tiles(Tiling(size), Tiling(size)).expand_as(keep)
            assert not (keep & (kinds == NONE)).any()
            if one.reads is not None:
                assert not (keep & (kinds == PARTIAL)).any()
            read += keep.repeat_interleave(size, 2)[:, :, :N].repeat_interleave(size, 3)[..., :N] * seen
        assert torch.equal(read, seen.float())


@pytest.mark.parametrize(("grid", "box", "before"), [((4, 4, 8), (1, 2, 2), 0), ((3, 5, 7), (2, 2, 4), 6)])
def test_boxes_of_a_video(grid, box, before):
    n = before + grid[0] * grid[1] * grid[2]
    order = Boxes(grid, box, before)
    check_plan(replace(SMALL, order=order), None, n=n)
    q, k, v = qkv(n_q=n + 1)
    with pytest.raises(ValueError, match=f"has {n} tokens, got {n + 1}"):
        attend(q, k, v, replace(SMALL, order=order))


def test_the_choice_does_look_ahead():
    """The reason for that: with more tokens of the coarsest block changed, earlier queries choose other blocks."""
    q, k, _ = qkv(1, 1, 1, 256, dtype=torch.float32)
    other = q.clone()
    other[:, :, 200:] *= -50
    one, two = (plan(LLSA(4, 2, 3), x, k, mask="causal").tile_maps[0].keep for x in (q, other))
    assert not torch.equal(one[:, :, :49], two[:, :, :49])
    assert torch.equal(one[:, :, :48], two[:, :, :48])  # blocks of 4 in earlier blocks of 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 1}, "block must be an integer >= 2, got 1"),
        ({"top_k": 0}, "top_k must be an integer >= 1, got 0"),
        ({"top_k": 2.0}, "top_k must be an integer >= 1, got 2.0"),
        ({"levels": 0}, "levels must be an integer >= 1, got 0"),
        ({"overlap": 1}, "overlap must be True or False"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        LLSA(**options)


def test_what_it_cannot_do_is_refused():
    q, k, v = qkv(n_q=64)
    with pytest.raises(ValueError, match="takes no bias"):
        attend(q, k, v, SMALL, bias=torch.zeros(64, dtype=torch.float64))
    with pytest.raises(ValueError, match="does not support chunked prefill"):
        attend(q[:, :, :9], k, v, SMALL)
