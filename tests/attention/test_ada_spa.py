"""AdaSpa: the search sums the true attention, budgets follow the heads, and what was found holds over steps."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.attention.test_svg2 import captured
from tests.attention.video_like import video_qkv
from tests.conformance.common import qkv
from tests.conformance.weighted import error
from tilewise.attention import (
    Boxes,
    Layout,
    MeanPool,
    Plan,
    RandomTiles,
    Share,
    Tiles,
    TrueMass,
    attend,
    plan,
)
from tilewise.attention.recipes import ada_spa
from tilewise.attention.recipes.ada_spa import AdaSpa, block_mass, head_shares
from tilewise.models.video import load_video, sample
from tilewise.tiles import Everything, Tiling

STEPS, LAYERS = 8, (1, 2, 3)


def at(step: int | None, layer: int = 0, steps: int = STEPS) -> SimpleNamespace:
    return SimpleNamespace(layer=layer, step=step, steps=steps)


def recall(made: Plan, q: Tensor, k: Tensor) -> Tensor:
    """The share of each head's attention in the tiles of a plan."""
    tokens = torch.arange(q.shape[2])
    weights = (q @ k.mT * q.shape[3] ** -0.5).softmax(-1)
    return (weights * made.kept(tokens, tokens, q.shape[1])).sum((0, 2, 3)) / q.shape[2]


def lse_of(q: Tensor, k: Tensor) -> Tensor:
    return torch.logsumexp(q @ k.mT * q.shape[3] ** -0.5, -1)


@functools.lru_cache(maxsize=1)
def steps() -> dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]:
    """q, k and v by (layer, step) of a dense run of the sampler."""
    seen = {}

    def keep(event):
        seen[event.moment.layer, event.moment.step] = (event.q, event.k, event.v)

    sample(load_video(), STEPS, observer=keep)
    return seen


@pytest.mark.evidence
@pytest.mark.parametrize(("q_tiling", "k_tiling"), [(Tiling(16), Tiling(24)), (Tiling(7), Tiling.from_bounds(
    torch.tensor([0, 3, 3, 40, 50])))], ids=["even", "uneven"])  # fmt: skip
def test_one_pass_with_the_log_sum_exp_is_the_true_attention(q_tiling, k_tiling, monkeypatch):
    """The sums over tiles that two passes give, whole or a few rows at a time. Control: another log-sum-exp."""
    q, k, v = qkv(2, 4, 2, 50)
    view = Everything().bind(50, 50)
    layout = Layout(q, k, view, q_tiling, k_tiling, 8**-0.5)
    lse = attend(q, k, v, return_lse=True).lse
    true = TrueMass().score(layout, torch.ones(1, dtype=torch.bool))
    for at_once in (ada_spa.AT_ONCE, 400 * 3):
        monkeypatch.setattr(ada_spa, "AT_ONCE", at_once)
        torch.testing.assert_close(block_mass(layout, lse).float(), true, rtol=1e-5, atol=1e-6)
    assert (block_mass(layout, lse.flip(2)).float() - true).abs().max() > 0.1


@pytest.mark.evidence
@pytest.mark.parametrize("layer", LAYERS)
def test_precise_search_beats_pooled_scores_at_equal_density(layer):
    """On q, k and v of a trained video model: more of the attention, and less error. Control: chance."""
    q, k, v = captured(layer)
    dense = attend(q, k, v)
    rule = AdaSpa(share=0.125, tile=32, adaptive=False)
    made = rule.find(q, k, lse_of(q, k))
    others = [
        plan(Tiles(score=score, select=Share(0.125), tile=(32, 32)), q, k)
        for score in (MeanPool(), RandomTiles())
    ]
    assert made.density == others[0].density == others[1].density
    mine, pooled, chance = (recall(x, q, k) for x in (made, *others))
    assert (
        (mine > pooled).all() and mine.mean() > pooled.mean() + 0.005 and pooled.mean() > chance.mean() + 0.1
    )
    errors = [error(attend(q, k, v, x), dense) for x in (made, *others)]
    print(f"layer {layer}: recall {mine.mean():.3f} {pooled.mean():.3f} {chance.mean():.3f}, errors", *errors)
    assert errors[0] < errors[1] < errors[2], errors


@pytest.mark.evidence
@pytest.mark.parametrize("case", ["made up", *LAYERS])
def test_budgets_by_head_keep_more_attention_at_equal_density(case):
    """A quarter of the tiles on average. Controls: equal budgets, and more for the heads that need less."""
    if case == "made up":
        made = video_qkv((8, 16, 16), heads=6, strength=6.0)
        q, k, v = made.q, made.k, made.v
    else:
        q, k, v = captured(case)
    lse = lse_of(q, k)
    same, own = (AdaSpa(0.25, tile=32, adaptive=adaptive).find(q, k, lse) for adaptive in (False, True))
    assert own.density == same.density
    shares = own.density_by_head().flatten()
    assert sorted(set(shares.tolist())) in ([0.125, 0.25, 0.375], [0.125, 0.375])
    mine, theirs = recall(own, q, k), recall(same, q, k)
    turned = AdaSpa(0.25, tile=32)
    wrong = recall(_turned(turned, q, k, lse), q, k)
    print(f"{case}: recall {theirs.mean():.3f} -> {mine.mean():.3f}, turned {wrong.mean():.3f}")
    assert mine.mean() > theirs.mean() + 0.005 and wrong.mean() < theirs.mean() - 0.005
    assert mine.min() >= theirs.min()
    if case == "made up":
        dense = attend(q, k, v)
        assert error(attend(q, k, v, own), dense) < 0.95 * error(attend(q, k, v, same), dense)


def _turned(rule: AdaSpa, q: Tensor, k: Tensor, lse: Tensor) -> Plan:
    """The plan of a rule whose shares are dealt the other way round."""
    right = ada_spa.head_shares
    try:
        ada_spa.head_shares = lambda mass, keep, share: 2 * share - right(mass, keep, share)
        return rule.find(q, k, lse)
    finally:
        ada_spa.head_shares = right


def replayed(rule: AdaSpa, layer: int) -> list[Tensor | Plan | str]:
    """What a rule does at every step of a dense run."""
    return [rule(*steps()[layer, step], at(step, layer)) for step in range(STEPS)]


def same_tiles(one: Plan, other: Plan) -> bool:
    return torch.equal(*(made.tile_maps[0].keep for made in (one, other)))


@pytest.mark.evidence
@pytest.mark.parametrize("layer", LAYERS)
def test_log_sum_exp_and_tiles_hold_over_steps(layer):
    """Found at step 2 of 8 and used later, on q and k of a dense run of the sampler.

    At steps 4 and 7 the tiles of step 2 hold more than 0.85 of what tiles found there would, and were not looked
    for again. A second search, at step 5, finds with the log-sum-exp of step 2 what holds 0.99 of what a precise
    one finds, in one pass over the scores in place of two. Controls: tiles of the next head hold less; a search
    with the log-sum-exp of other queries is twice as far from the best; the tiles of step 2 are not those of 5.
    """
    once, twice = AdaSpa(0.25, search=(2,), tile=32), AdaSpa(0.25, search=(2, 5), tile=32)
    done, again = replayed(once, layer), replayed(twice, layer)
    assert (once.searched, twice.searched) == (1, 2)
    assert done[:2] == again[:2] == ["dense"] * 2
    torch.testing.assert_close(done[2], attend(*steps()[layer, 2]))
    rule = AdaSpa(0.25, tile=32)
    lses = {step: lse_of(*steps()[layer, step][:2]) for step in range(STEPS)}
    fresh = {step: rule.find(*steps()[layer, step][:2], lses[step]) for step in range(STEPS)}
    assert all(same_tiles(made, fresh[2]) for made in done[3:])
    second = rule.find(*steps()[layer, 5][:2], lses[2])
    assert all(same_tiles(made, fresh[2]) for made in again[3:5])
    assert all(same_tiles(made, second) for made in again[5:])
    assert not same_tiles(second, fresh[2])
    shuffle = torch.randperm(2048, generator=torch.Generator().manual_seed(0))
    for step in (4, 7):
        q, k, _ = steps()[layer, step]
        best = recall(fresh[step], q, k).mean()
        kept, other = (
            float(recall(done[step], *x).mean() / best) for x in ((q, k), (q.roll(1, 1), k.roll(1, 1)))
        )
        print(f"layer {layer}, step {step}: tiles kept {kept:.3f}, of the next head {other:.3f}")
        assert kept > 0.85 and kept > other + 0.03
    q, k, _ = steps()[layer, 5]
    found, blind = (recall(x, q, k).mean() for x in (again[5], rule.find(q, k, lses[2][:, :, shuffle])))
    best = recall(fresh[5], q, k).mean()
    print(f"layer {layer}: with the kept log-sum-exp {found / best:.4f}, of other queries {blind / best:.4f}")
    assert found > 0.99 * best and best - found < 0.5 * (best - blind)


@pytest.mark.evidence
def test_sampling_with_kept_tiles():
    """Whole runs of 8 steps, dense up to step 2, searches at steps 2 and 5; how far clips are from the dense one.

    The kept log-sum-exp gives the clip of searches that compute it anew, in two thirds of their passes. Control:
    random tiles of the same density, from the same step on, end twice as far away.
    """
    model = load_video()
    dense = sample(model, STEPS)
    errors, passes, densities = {}, {}, {}
    chance = Tiles(score=RandomTiles(), select=Share(0.25), tile=(32, 32))
    for name, rule in (
        ("kept", AdaSpa(0.25, search=(2, 5), tile=32)),
        ("anew", AdaSpa(0.25, search=(2, 5), tile=32, reuse=False)),
        ("chance", lambda q, k, v, moment: "dense" if moment.step < 3 else chance),
    ):
        seen: list[float] = []
        clip = sample(
            model, STEPS, attention=rule,
            observer=lambda event, seen=seen: seen.append(1.0 if event.plan is None else event.plan.density),
        )  # fmt: skip
        errors[name], densities[name] = error(clip, dense), sum(seen) / len(seen)
        passes[name] = getattr(rule, "searched", 0)
    print(errors, passes, densities)
    assert passes == {"kept": 4 * 2, "anew": 4 * 3, "chance": 0}
    assert densities["kept"] == densities["anew"] == densities["chance"] < 0.6
    assert abs(errors["kept"] / errors["anew"] - 1) < 0.1 and errors["kept"] < 0.5 * errors["chance"]


def test_shares_of_heads():
    mass = torch.tensor([[0.95, 0.9, 0.3, 0.5, 0.85, 0.7]]).view(1, 6, 1, 1)
    mass = torch.cat([mass, 1 - mass], 3)
    keep = torch.tensor([True, False]).expand(1, 6, 1, 2)
    assert head_shares(mass, keep, 0.2).flatten().tolist() == pytest.approx([0.1, 0.1, 0.3, 0.3, 0.1, 0.3])
    assert head_shares(mass[:, :3], keep[:, :3], 0.2).flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert head_shares(mass[:, 2:4], keep[:, 2:4], 0.2).flatten().tolist() == pytest.approx([0.2, 0.2])
    assert head_shares(mass, keep, 0.9).flatten().tolist() == pytest.approx([0.8, 0.8, 1.0, 1.0, 0.8, 1.0])
    assert (head_shares(mass, keep, 1.0) == 1).all()
    assert head_shares(mass[:, :1], keep[:, :1], 0.2).item() == pytest.approx(0.2)
    assert (head_shares(torch.zeros_like(mass), keep, 0.2) == 0.2).all()


def test_what_a_layer_does_step_by_step():
    rule = AdaSpa(share=0.5, search=(2, 4), tile=8)
    q, k, v = qkv(1, 2, 1, 40, dtype=torch.float32)
    done = [rule(q, k, v, at(step)) for step in range(6)]
    assert done[:2] == ["dense", "dense"]
    torch.testing.assert_close(done[2], attend(q, k, v))
    assert all(isinstance(x, Plan) for x in done[3:]) and rule.searched == 2
    assert done[3] is not done[4] and done[4] is done[5]
    assert isinstance(rule(q, k, v, at(3, layer=1)), Tensor), "a layer without tiles searches"
    assert isinstance(rule(q, k, v, at(5)), Tensor), "an earlier step, or the same, is another run"
    assert isinstance(rule(*qkv(1, 2, 1, 30, dtype=torch.float32), at(6)), Tensor), "other lengths"
    assert rule(q, k, v, at(0)) == "dense"
    with pytest.raises(ValueError, match="needs to know the step"):
        rule(q, k, v, at(None))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [0, 1, 15, 33, 130])
def test_full_share_is_dense_for_any_length_and_format(n, dtype):
    q, k, v = qkv(2, 4, 2, n, dtype=dtype)
    rule = AdaSpa(share=1.0, search=(0,), tile=16)
    first = rule(q, k, v, at(0))
    made = rule(q, k, v, at(1))
    assert first.dtype == dtype and torch.equal(attend(q, k, v, made), attend(q, k, v)) or n == 0 or torch.allclose(
        attend(q, k, v, made).double(), attend(q, k, v).double(), atol=4 * torch.finfo(dtype).eps)  # fmt: skip
    small = AdaSpa(share=0.3, search=(0,), tile=16)
    small(q, k, v, at(0))
    assert attend(q, k, v, small(q, k, v, at(1))).isfinite().all()


def test_gradients_are_those_of_the_tiles():
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 2, 40))
    made = AdaSpa(0.5, tile=8).find(q.detach(), k.detach(), lse_of(q, k).detach())
    tokens = torch.arange(40)
    kept = made.kept(tokens, tokens, 2)
    want = (q @ k.mT * 8**-0.5).masked_fill(~kept, -torch.inf).softmax(-1) @ v
    got = attend(q, k, v, made)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), (q, k, v)),
        torch.autograd.grad(want.square().sum(), (q, k, v)),
    ):
        torch.testing.assert_close(a, b)


def test_text_before_the_video_is_always_computed_and_boxes_share_tiles():
    q, k, _ = qkv(1, 4, 2, 6 + 64)
    lse = lse_of(q, k.repeat_interleave(2, 1))
    rule = AdaSpa(share=0.1, tile=16, before=6, order=Boxes((4, 4, 4), (2, 2, 4), before=6))
    made = rule.find(q, k, lse)
    tokens = torch.arange(70)
    kept = made.kept(tokens, tokens, 4)
    assert kept[:, :, :6].all() and kept[..., :6].all() and kept.float().mean() < 0.6
    boxes = Boxes((4, 4, 4), (2, 2, 4), before=6).blocks().order() + 6
    first = kept[0, 0][6:, boxes[:16]]
    assert (first == first[:, :1]).all(), "a box is kept whole"
    for before in (6, 0):
        line = AdaSpa(share=0.1, tile=16, before=before, adaptive=False).find(q, k, lse)
        assert line.kept(tokens, tokens, 4)[:, :, :6].all() == (before == 6)
    with pytest.raises(ValueError, match="before must be at most the number of tokens 70, got 71"):
        AdaSpa(before=71).find(q, k, lse)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0}, "share must be in"),
        ({"share": 1.5}, "share must be in"),
        ({"search": ()}, "search must be rising integers"),
        ({"search": (3, 3)}, "search must be rising integers"),
        ({"search": [1]}, "search must be rising integers"),
        ({"tile": 0}, "tile must be an integer >= 1"),
        ({"before": -1}, "before must be an integer >= 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        AdaSpa(**options)
