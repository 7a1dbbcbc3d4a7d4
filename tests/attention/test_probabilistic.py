"""Drawn blocks follow their distribution and stay causal; rotary and linear positions add up; caches step down."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.conformance.common import exact, grid, naive, over_budget, repeat
from tilewise.attention import Own, Pooled, Tiles, TopK, alibi_slopes, attend, plan
from tilewise.attention.probabilistic.block_distances import (
    BlockDistances,
    PrFlashAttention,
    block_profile,
    participation,
)
from tilewise.attention.probabilistic.harmonic import HarmonicPositions, harmonic_slopes
from tilewise.attention.probabilistic.reshaping import attend_reshaped
from tilewise.attention.probabilistic.staircase import PackedBits, StaircaseCache
from tilewise.tiles import BlockCausal, Causal, Padding

HEADS, ROWS, ROUNDS = 512, 24, 8


def near_likes_near(n: int, heads: int = 2, reach: float = 48, strength: float = 6, seed: int = 0):
    """q, k, v `[1, heads, n, 32]` whose products fall off over about `reach` tokens, from `strength` on average."""
    g = torch.Generator().manual_seed(seed)
    stay = math.exp(-1 / reach)
    x = torch.randn(1, heads, n, 32, generator=g)
    for t in range(1, n):
        x[:, :, t] = stay * x[:, :, t - 1] + math.sqrt(1 - stay**2) * x[:, :, t]
    size = math.sqrt(strength / math.sqrt(32))
    noise = torch.randn(2, 1, heads, n, 32, generator=g) / 2
    return size * x + noise[0], size * x + noise[1], torch.randn(1, heads, n, 32, generator=g)


def off(got: Tensor, want: Tensor) -> float:
    """Relative error."""
    return float((got - want).norm() / want.norm())


def draws(budget: int, **law) -> Tensor:
    """Tiles kept beside their own, by distance: bool `[ROUNDS * HEADS, ROWS, ROWS - 1]`, in the last rows."""
    q = torch.zeros(1, HEADS, ROWS, 1)
    methods = (PrFlashAttention(budget=budget, tile=1, round=r, **law) for r in range(ROUNDS))
    return torch.cat([plan(method, q, q, mask="causal").tile_maps[0].keep[0] for method in methods])


def chance(counts: Tensor, expected: Tensor) -> float:
    """The chance of counts at least as far from what is expected (Pearson's chi-square)."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2.0), statistic / 2))


def weights_of(decay: float = 1.0, weights: tuple[float, ...] | None = None) -> Tensor:
    """The weight of the distances 1, 2, ... that a row can draw, written out."""
    table = None if weights is None else [*weights, *[weights[-1]] * ROWS]
    return torch.tensor([(1 + d) ** -decay if table is None else table[d] for d in range(1, ROWS)]).double()


LAWS = {
    "harmonic": {"decay": 1.0},
    "uniform": {"decay": 0.0},
    "steeper": {"decay": 1.25},
    "a table": {"weights": (9.0, 8.0, 1.0, 1.0, 6.0, 2.0)},
}


@pytest.mark.evidence
@pytest.mark.parametrize("name", LAWS)
def test_blocks_take_part_as_often_as_the_distribution_says(name):
    """One drawn tile per row: its distances pass a chi-square test. Control: every other law is refused."""
    drawn = draws(2, **LAWS[name])[:, -1].flip(-1)  # by distance
    assert drawn[:, 0].all() and (drawn.sum(1) == 2).all()
    counts = drawn[:, 1:].double().sum(0)
    for other, law in LAWS.items():
        weights = weights_of(**law)
        found = chance(counts, HEADS * ROUNDS * weights / weights.sum())
        assert found > 1e-3 if other == name else found < 1e-6, (name, other, found)


@pytest.mark.evidence
@pytest.mark.parametrize("budget", [5, 9])
def test_several_draws_take_part_as_often_as_foretold(budget):
    """Frequencies of draws without replacement agree with `participation`. Control: with replacement not."""
    drawn = draws(budget)[:, -1].flip(-1)[:, 1:].double()
    logs = weights_of().log()
    foretold = participation(logs, budget - 1)
    assert float(foretold.sum()) == pytest.approx(budget - 1, abs=1e-12)

    def worst(p: Tensor) -> float:
        return float(((drawn.mean(0) - p) / (p * (1 - p) / len(drawn)).sqrt()).abs().max())

    assert worst(foretold) < 4.5  # of 23 normal deviations one exceeds 4.5 in 6,000 tables
    assert worst(1 - (1 - logs.softmax(-1)) ** (budget - 1)) > 6


def test_rows_heads_and_rounds_draw_independently():
    """No pair of neighbours shares draws more often than chance lets them."""
    drawn = draws(2, decay=0.0).unflatten(0, (ROUNDS, HEADS))
    place = drawn[:, :, -6:, : ROWS - 6].double().argmax(-1).clamp(max=ROWS - 7)  # few are cut off: all alike
    seen = drawn[:, :, -6:, : ROWS - 6].any(-1)
    for axis in (0, 1, 2):
        both = seen.narrow(axis, 1, seen.shape[axis] - 1) & seen.narrow(axis, 0, seen.shape[axis] - 1)
        a = place.narrow(axis, 1, seen.shape[axis] - 1)[both]
        b = place.narrow(axis, 0, seen.shape[axis] - 1)[both]
        table = torch.zeros(6, 6, dtype=torch.float64)
        table.index_put_((a // 3, b // 3), torch.ones(len(a), dtype=torch.float64), accumulate=True)
        expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
        statistic = ((table - expected) ** 2 / expected).sum()
        assert float(torch.special.gammaincc(torch.tensor(12.5), statistic / 2)) > 1e-3


@pytest.mark.evidence
def test_sums_over_drawn_blocks_are_unbiased():
    """Drawn tiles' shares of the output, each divided by its probability to take part, average to dense attention.

    Control: divided by the probability that a uniform draw would give, they do not.
    """
    n, tile, budget, heads = 128, 16, 4, 128
    q, k, v = near_likes_near(n, heads=1)
    mass = (q @ k.mT / math.sqrt(32)).masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf).softmax(-1)
    shares = torch.einsum(
        "qtj,tjd->qtd", mass[0, 0].unflatten(1, (-1, tile)), v[0, 0].unflatten(0, (-1, tile))
    )
    many = [x.expand(-1, heads, -1, -1) for x in (q, k)]
    keep = torch.cat(
        [
            plan(PrFlashAttention(budget, tile=tile, round=r), *many, mask="causal").tile_maps[0].keep[0]
            for r in range(4)
        ]
    )[:, -1]  # [draws, tiles], in the last row, where most tiles compete
    distance = torch.arange(n // tile - 1, 0, -1)
    dense = mass[0, 0, -tile:] @ v[0, 0]

    def spread(decay: float) -> float:
        """Mean square of the deviation from dense attention, in standard errors; 1 when unbiased."""
        p = participation(BlockDistances(decay).log_weights(distance), budget - 1)
        weight = keep / torch.cat([p, torch.ones(1)])
        estimates = torch.einsum("st,qtd->sqd", weight, shares[-tile:].double())
        return float(((estimates.mean(0) - dense) ** 2 / (estimates.var(0) / len(keep))).mean())

    assert spread(1.0) < 2 and spread(0.0) > 8, (spread(1.0), spread(0.0))


@pytest.mark.evidence
def test_near_draws_err_less_than_uniform_ones_at_equal_density():
    """Where near keys matter, drawing near blocks more often errs less at the same number of tiles.

    Controls: drawing far ones more often errs more than a uniform draw, and with tokens shuffled, so that near ones
    matter no more, there is no difference.
    """
    laws = {
        "near": {"decay": 1.0},
        "uniform": {"decay": 0.0},
        "far": {"weights": tuple(range(1, 33))},
    }
    for seed in range(2):
        local = near_likes_near(512, seed=seed)
        order = torch.randperm(512, generator=torch.Generator().manual_seed(seed))
        for shuffled, qkv in ((False, local), (True, [x[:, :, order] for x in local])):
            dense, errors, densities = attend(*qkv, mask="causal"), {}, set()
            for name, law in laws.items():
                plans = [
                    plan(PrFlashAttention(6, tile=16, round=r, **law), *qkv[:2], mask="causal")
                    for r in range(6)
                ]
                densities |= {made.density for made in plans}
                errors[name] = torch.tensor([off(attend(*qkv, made), dense) for made in plans])
            assert len(densities) == 1
            gap = errors["uniform"].mean() - errors["near"].mean()
            noise = ((errors["uniform"].var() + errors["near"].var()) / 6).sqrt()
            if shuffled:
                assert abs(gap) < 4 * noise, (gap, noise)
            else:
                assert gap > 8 * noise and errors["near"].mean() < 0.75 * errors["uniform"].mean(), errors
                assert errors["far"].mean() > errors["uniform"].mean() + 0.05, errors


@pytest.mark.evidence
def test_a_measured_distribution_errs_less_and_rounds_average_out():
    """Drawn by the mass that blocks hold, errors fall further; the mean of rounds errs less than one round."""
    q, k, v = near_likes_near(512, strength=10)
    dense = attend(q, k, v, mask="causal")
    profile = block_profile(q, k, tile=16)
    assert sum(profile) == pytest.approx(1) and profile[0] > 5 * profile[4]
    outs = {
        law: [
            attend(q, k, v, PrFlashAttention(6, weights=weights, tile=16, round=r), mask="causal")
            for r in range(6)
        ]
        for law, weights in (("measured", profile), ("harmonic", None))
    }
    one = {law: sum(off(out, dense) for out in some) / 6 for law, some in outs.items()}
    assert one["measured"] < 0.8 * one["harmonic"], one
    assert off(torch.stack(outs["harmonic"]).mean(0), dense) < 0.8 * one["harmonic"]


@pytest.mark.evidence
@pytest.mark.parametrize("n", [1, 15, 16, 33, 160])
def test_reshaped_tensors_keep_the_lower_triangle(n):
    """Drawn blocks side by side under plain causal attention give what the drawn tiles give in place.

    Both agree with the exact answer over the kept pairs, all of which lie in the lower triangle. Control: with the
    last block seen whole, which is what the triangle prevents, the answer is another.
    """
    q, k, v = (torch.randn(2, h, n, 8, dtype=torch.float64) for h in (4, 2, 2))
    method = PrFlashAttention(3, tile=16)
    made = plan(method, q, k, mask="causal")
    seen = grid(made, 2, 4, n, n)
    assert not seen.triu(1).any() and seen.diagonal(dim1=-2, dim2=-1).all()
    want = exact(q, k, v, seen)
    want.check({"out": attend_reshaped(q, k, v, method)})
    want.check({"out": attend(q, k, v, method, mask="causal")})
    if n > 1:
        with pytest.raises(AssertionError, match="out: .* wrong"):
            want.check({"out": attend(q, k, v, method, mask=BlockCausal(16))})


@pytest.mark.evidence
def test_the_future_never_leaks():
    """Later tokens change no earlier output, bit for bit, in place or re-shaped. Control: without a mask."""
    q, k, v = (torch.randn(1, 2, 100, 8) for _ in range(3))
    later = torch.arange(100).ge(57).view(-1, 1)
    changed = [torch.where(later, 50 * torch.randn_like(x), x) for x in (q, k, v)]
    method = PrFlashAttention(3, tile=16)
    for run in (
        lambda *x: attend(*x, method, mask="causal"),
        lambda *x: attend_reshaped(*x, method),
    ):
        assert torch.equal(run(q, k, v)[:, :, :57], run(*changed)[:, :, :57])
    assert not torch.equal(attend(q, k, v, method)[:, :, :57], attend(*changed, method)[:, :, :57])


def test_decoding_draws_what_the_prompt_drew():
    q, k, v = (torch.randn(1, 2, 80, 8, dtype=torch.float64) for _ in range(3))
    method = PrFlashAttention(3, tile=16)
    seen = grid(plan(method, q, k, mask="causal"), 1, 2, 80, 80)
    for t in (0, 17, 47, 79):
        one = plan(method, q[:, :, t : t + 1], k[:, :, : t + 1], mask="causal")
        assert torch.equal(grid(one, 1, 2, 1, t + 1)[:, :, 0], seen[:, :, t, : t + 1])


def test_draws_do_not_depend_on_padding_by_whole_tiles_or_on_the_batch():
    q, k = (torch.randn(2, 2, 96, 8) for _ in range(2))
    method = PrFlashAttention(3, tile=16)
    keep = torch.arange(96).ge(torch.tensor([[0], [32]]))
    padded = grid(plan(method, q, k, mask=Causal() & Padding(keep)), 2, 2, 96, 96)
    alone = grid(plan(method, q[1:, :, 32:], k[1:, :, 32:], mask="causal"), 1, 2, 64, 64)
    assert torch.equal(padded[1:, :, 32:, 32:], alone)
    assert torch.equal(padded[:1], grid(plan(method, q[:1], k[:1], mask="causal"), 1, 2, 96, 96))


def test_seed_and_round_draw_anew_and_a_full_budget_is_dense():
    q, k, v = (torch.randn(1, 2, 200, 8, dtype=torch.float64) for _ in range(3))
    keeps = [
        plan(PrFlashAttention(4, tile=16, seed=s, round=r), q, k, mask="causal").tile_maps[0].keep
        for s, r in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0))
    ]
    assert torch.equal(keeps[0], keeps[4])
    assert not any(torch.equal(a, b) for i, a in enumerate(keeps[:4]) for b in keeps[:i])
    full = PrFlashAttention(13, tile=16)
    exact(q, k, v, torch.ones(200, 200).tril().bool()).check({"out": attend(q, k, v, full, mask="causal")})


def test_the_stage_composes_with_others():
    """Drawn tiles, the mean of each other tile standing for it: errs less than drawn tiles alone."""
    q, k, v = near_likes_near(512, strength=3)
    dense = attend(q, k, v, mask="causal")
    stages = {"score": BlockDistances(seed=3), "select": TopK(6), "tile": (16, 16), "always": (Own(),)}
    alone, pooled = Tiles(**stages), Tiles(**stages, rest=Pooled())
    assert alone.lookahead == "none"
    assert off(attend(q, k, v, pooled, mask="causal"), dense) < 0.8 * off(
        attend(q, k, v, alone, mask="causal"), dense
    )


def test_participation_of_small_sets():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    both = 0.5 * 0.3 / 0.5 + 0.3 * 0.5 / 0.7  # the first two, in either order
    torch.testing.assert_close(participation(p.log(), 2)[2], torch.tensor(1 - both, dtype=torch.float64))
    torch.testing.assert_close(participation(p.log(), 1), p)
    logs = torch.tensor([[0.0, -torch.inf, -1.0, -9.0], [0.0, 0.0, -torch.inf, -torch.inf]])
    assert participation(logs, 4).tolist() == [[1, 0, 1, 1], [1, 1, 0, 0]]
    assert participation(logs, 2)[1].tolist() == [1, 1, 0, 0]
    assert participation(torch.zeros(0), 1).shape == (0,)


@pytest.mark.evidence
@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
@pytest.mark.parametrize("first", [None, 0.7])
def test_harmonic_positions_are_rotation_plus_bias(pairs, first):
    """Against RoPE as complex numbers and the bias written out; grouped heads, fewer queries, given places.

    Controls: ALiBi's geometric slopes, and keys without their rotation, give other answers.
    """
    q, k, v = (torch.randn(2, h, n, 16, dtype=torch.float64) for h, n in ((6, 40), (3, 70), (3, 70)))
    positions = HarmonicPositions(heads=6, first=first, base=1000.0, pairs=pairs)
    speed = 1000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)

    def turned(x: Tensor, pos: Tensor) -> Tensor:
        first, second = (x[..., :8], x[..., 8:]) if pairs == "halves" else (x[..., 0::2], x[..., 1::2])
        angle = pos.unsqueeze(1) * speed
        z = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], -1)  # an order of features is the same on both sides

    steepest = 2 ** (-8 / 4) if first is None else first  # of 6 heads: ALiBi's series for 4 comes first
    slopes = (steepest / torch.arange(1, 7)).double().view(1, 6, 1, 1)
    for pos in (
        torch.arange(70),
        torch.randint(1, 4, (70,)).cumsum(0),
    ):  # the usual ones, and given ones with gaps
        last = pos[30:]
        given = {} if pos[0] == 0 else {"q_pos": last, "k_pos": pos}
        distance = last.unsqueeze(1) - pos
        seen = distance >= 0
        got = positions.attend(q, k, v, **given)
        exact(turned(q, last), turned(k, pos), v, seen, bias=-slopes * distance).check({"out": got})
        for wrong in (
            exact(
                turned(q, last), turned(k, pos), v, seen, bias=-alibi_slopes(6).view(1, 6, 1, 1) * distance
            ),
            exact(turned(q, last), k, v, seen, bias=-slopes * distance),
        ):
            with pytest.raises(AssertionError, match="out: .* wrong"):
                wrong.check({"out": got})


@pytest.mark.evidence
@pytest.mark.parametrize("start", [1, 1000, 10**6])
def test_only_distances_matter(start):
    """All positions moved alike change the result by rounding alone. Controls: queries alone moved, or one key."""
    n, d, eps = 50, 16, torch.finfo(torch.float64).eps
    q, k, v = (torch.randn(1, 4, n, d, dtype=torch.float64) for _ in range(3))
    positions, pos = HarmonicPositions(4), torch.arange(n)

    def run(q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return positions.attend(q, k, v, mask=None, q_pos=q_pos, k_pos=k_pos)

    usual = positions.attend(q, k, v, mask=None)
    # A position of size p costs an angle p eps and a bias slope p eps; a softmax at most doubles what scores err.
    score = (
        8
        * eps
        * (start + n)
        * (float(harmonic_slopes(4)[0]) + float(q.norm(dim=-1).max() * k.norm(dim=-1).max()))
    )
    allowed = 2 * score * float(v.abs().max())
    assert float((run(pos + start, pos + start) - usual).abs().max()) < allowed
    assert float((run(pos + start, pos) - usual).abs().max()) > 1e-2 > allowed
    assert (
        float((run(pos, pos.clone().index_fill_(0, torch.tensor(7), start + 9)) - usual).abs().max()) > 1e-2
    )


@pytest.mark.evidence
def test_the_linear_part_keeps_attention_near_as_texts_grow():
    """The share of the last 64 tokens stays in 8 times the length. Control: with RoPE alone it falls."""

    def share(positions: HarmonicPositions, n: int) -> Tensor:
        g = torch.Generator().manual_seed(0)
        q, k = torch.randn(1, 8, 16, 32, generator=g), torch.randn(1, 8, n, 32, generator=g)
        near = torch.arange(n).ge(n - 64 - 16).double().view(1, 1, n, 1).expand(-1, 8, -1, -1)
        return positions.attend(q.double(), k.double(), near).mean((0, 2, 3))

    both, rope = (HarmonicPositions(8, first=first) for first in (None, 0.0))
    assert (share(both, 2048) > 0.95 * share(both, 256)).all() and (share(both, 2048) > 0.9).all()
    assert (share(rope, 2048) < 0.3 * share(rope, 256)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_harmonic_positions_in_low_precision(dtype):
    """At most twice the error of the same in plain PyTorch at that precision."""
    q, k, v = (torch.randn(1, 4, 90, 16, dtype=torch.float64).to(dtype) for _ in range(3))
    positions, seen = HarmonicPositions(4), torch.ones(90, 90).tril().bool()
    distance = torch.arange(90).unsqueeze(1) - torch.arange(90)
    bias = -harmonic_slopes(4).view(1, 4, 1, 1) * distance
    turned = [positions.rotate(x) for x in (q, k)]
    assert turned[0].dtype == dtype
    want = naive(*(positions.rotate(x.double()) for x in (q, k)), v.double(), seen, bias.double())
    got = positions.attend(q, k, v)
    assert over_budget(got, naive(*turned, v, seen, bias.to(dtype)), want) is None
    assert over_budget(torch.zeros_like(got), naive(*turned, v, seen, bias.to(dtype)), want)


def test_positions_take_methods_masks_gradients_and_no_tokens():
    positions = HarmonicPositions(2)
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    out, lse = positions.attend(
        q, k, v, PrFlashAttention(2, tile=8), mask="causal", scale=0.5, engine="torch", return_lse=True
    )
    assert lse.shape == (1, 2, 40)
    assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(out.sum(), (q, k)))
    assert torch.autograd.gradcheck(
        positions.rotate, (torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True),)
    )
    for n in (0, 1):
        none = torch.randn(1, 2, n, 8)
        assert positions.attend(none, none, none).shape == (1, 2, n, 8)
    torch.testing.assert_close(positions.rotate(q).norm(dim=-1), q.norm(dim=-1))
    assert positions.bias(3, 5, device="cpu").dense().shape == (1, 2, 3, 5)
    x, pos = torch.randn(2, 2, 9, 8), torch.randint(0, 50, (2, 1, 9))
    both = positions.attend(x, x, x, q_pos=pos, k_pos=pos)
    for i in range(2):  # positions of their own for each batch entry
        one = x[i : i + 1]
        torch.testing.assert_close(
            both[i : i + 1], positions.attend(one, one, one, q_pos=pos[i, 0], k_pos=pos[i, 0])
        )


BLOCK = 32


def recalled(
    bits: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, reverse: bool = False
) -> tuple[float, int]:
    """Error of attention over a cache, and its bytes; `reverse` gives it the newest tokens as the oldest."""
    cache = StaircaseCache(bits=bits, block=BLOCK, group=BLOCK)
    flip = [x.flip(2) if reverse else x for x in (k, v)]
    state = cache.append(None, *flip)
    held = [x.flip(2) if reverse else x for x in cache.read(state)]
    return off(attend(q, *held, mask="causal"), attend(q, k, v, mask="causal")), state.nbytes


@pytest.mark.evidence
def test_a_staircase_lies_between_and_beats_uniform_bits_of_equal_bytes():
    """On attention that fades with age: 8, 4, 2, 2 bits against 8, 4 and 2 throughout, and the stairs turned round.

    Controls: the reversed staircase, as many bytes, errs more than uniform bits; and where attention does not fade
    the staircase loses to uniform bits.
    """
    for seed in range(4):
        q, k, v = near_likes_near(4 * BLOCK, heads=4, reach=20, seed=seed)
        k, v = k[:, :1], v[:, :1]  # multi-query
        q = (q[:, :1] + 0.3 * torch.randn(1, 4, 4 * BLOCK, 32))[:, :, -8:]
        (high, most), (even, same), (low, least) = (recalled((bits,), q, k, v) for bits in (8, 4, 2))
        stairs, held = recalled((8, 4, 2), q, k, v)
        turned, as_many = recalled((8, 4, 2), q, k, v, reverse=True)
        assert least < held == same == as_many < most
        assert high < stairs < low
        assert stairs < even < turned, (stairs, even, turned)
        flat = torch.randn_like(k)
        assert recalled((8, 4, 2), q / 8, flat, v)[0] > recalled((4,), q / 8, flat, v)[0]


@pytest.mark.evidence
def test_tokens_lose_bits_as_they_age_and_never_before():
    """Error by age, with four stairs: none in the newest, and more on each. Control: on one stair none grows."""
    k, v = torch.randn(2, 1, 1, 6 * BLOCK + 7, 64)
    for bits, falls in (((8, 6, 4, 2), True), ((4,), False)):
        cache = StaircaseCache(bits=bits, block=BLOCK, group=BLOCK)
        state = cache.append(None, k, v)
        assert state.bits == tuple(bits[min(age, len(bits) - 1)] for age in range(5, -1, -1))
        for held, x in zip(cache.read(state), (k, v)):
            assert torch.equal(held[:, :, -7:], x[:, :, -7:])
            errors = (held - x)[:, :, :-7].unflatten(2, (6, BLOCK)).square().mean((0, 1, 3, 4)).flip(0)
            steps = errors[1 : len(bits)] / errors[: len(bits) - 1]
            assert (steps > 4).all() if falls else errors.max() < 1.5 * errors.min()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_bits_err_by_half_a_step_and_count_their_bytes(bits, dtype):
    x = torch.randn(2, 3, 5, 37).to(dtype)
    packed = PackedBits.of(x, bits=bits, group=16)
    groups = [g.float() for g in x.split(16, -1)]
    width = torch.cat([(g.amax(-1) - g.amin(-1)).unsqueeze(-1).expand_as(g) for g in groups], -1)
    # Half a step, and what keeping the least value and the step in this dtype rounds off, over the whole range.
    allowed = width / (2**bits - 1) / 2 + torch.finfo(dtype).eps * (2 * width + 2 * x.float().abs().amax())
    assert ((packed.dense().float() - x.float()).abs() <= allowed).all()
    assert packed.dense().dtype == dtype and packed.dense().shape == x.shape
    assert packed.nbytes == -(-x.numel() * bits // 8) + 2 * 30 * 3 * x.element_size()
    assert torch.equal(PackedBits.of(torch.full((2, 5), 3.5), bits, 4).dense(), torch.full((2, 5), 3.5))
    assert PackedBits.of(torch.tensor([-65504.0, 65504.0]).half(), bits, 2).dense().isfinite().all()


def test_a_cache_is_the_same_however_tokens_come():
    k, v = torch.randn(2, 2, 2, 150, 24)
    v = v[..., :20]
    cache = StaircaseCache(bits=(8, 5, 3), block=16, group=10)
    whole = cache.append(None, k, v)
    for borders in (range(151), (0, 0, 7, 40, 150), (0, 149, 150)):
        state = None
        for a, b in zip(borders, borders[1:]):
            before = None if state is None else state.nbytes
            state, old = cache.append(state, k[:, :, a:b], v[:, :, a:b]), state
            assert old is None or old.nbytes == before
        assert state.bits == whole.bits and state.length == 150 and state.nbytes == whole.nbytes
        assert all(torch.equal(a, b) for a, b in zip(cache.read(state), cache.read(whole)))
    empty = cache.append(None, k[:, :, :0], v[:, :, :0])
    assert empty.length == 0 and empty.nbytes == 0 and cache.read(empty)[1].shape == (2, 2, 0, 20)
    q = torch.randn(2, 4, 9, 24)
    got = cache.attend(q, whole, scale=0.3, engine="torch", return_lse=True)
    seen = torch.arange(150) <= torch.arange(141, 150).unsqueeze(1)
    held = cache.read(whole)
    scores = 0.3 * q @ repeat(held[0], 4).mT
    torch.testing.assert_close(got.lse, scores.masked_fill(~seen, -torch.inf).logsumexp(-1))
    assert got.out.shape == (2, 4, 9, 20)


K = torch.randn(1, 2, 4, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BlockDistances(decay=-1), "decay must be a finite number >= 0, got -1"),
        (lambda: BlockDistances(weights=()), "weights must be None or a tuple of finite numbers > 0"),
        (lambda: BlockDistances(weights=(1.0, 0.0)), "weights must be None or a tuple"),
        (lambda: BlockDistances(seed=-1), r"seed must be an integer in 0..2\^32 - 1, got -1"),
        (lambda: BlockDistances(seed=2**32), r"seed must be an integer in 0..2\^32 - 1"),
        (lambda: BlockDistances(round=0.5), r"round must be an integer in 0..2\^32 - 1, got 0.5"),
        (lambda: PrFlashAttention(budget=0), "budget must be an integer >= 1, got 0"),
        (lambda: PrFlashAttention(tile=0), "tile must be an integer >= 1, got 0"),
        (lambda: PrFlashAttention(decay=math.inf), "decay must be"),
        (lambda: participation(torch.zeros(3), 0), "draws must be an integer >= 1, got 0"),
        (lambda: block_profile(K[:, :, :0], K), "q and k show no visible tile, got 0 queries and 4 keys"),
        (lambda: attend_reshaped(K[:, :, :1], K, K), "q and k must be of one length, got 1 and 4"),
        (lambda: attend_reshaped(K, K, K, "dense"), "method must be a PrFlashAttention, got str"),
        (lambda: harmonic_slopes(0), "heads must be an integer >= 1, got 0"),
        (lambda: HarmonicPositions(2, first=-1), "first must be None or a finite number >= 0, got -1"),
        (lambda: HarmonicPositions(0), "heads must be an integer >= 1, got 0"),
        (lambda: HarmonicPositions(2, base=1), "base must be a finite number > 1, got 1"),
        (lambda: HarmonicPositions(2, pairs="all"), "pairs must be one of 'halves', 'neighbours', got 'all'"),
        (
            lambda: HarmonicPositions(2).rotate(K[..., :7]),
            r"x must be .* D even, got torch.float32 \[1, 2, 4, 7\]",
        ),
        (lambda: HarmonicPositions(2).rotate(K, torch.arange(3)), r"pos must be integers \[4\]"),
        (
            lambda: HarmonicPositions(2).rotate(K, torch.zeros(4)),
            r"pos must be integers .* got torch.float32",
        ),
        (lambda: HarmonicPositions(3).attend(K, K, K), "these positions are for 3 query heads, q has 2"),
        (lambda: HarmonicPositions(2).attend(K[0], K, K), r"q must be a tensor \[B, H, N, D\]"),
        (lambda: StaircaseCache(bits=(4, 8)), r"bits must .* never rise, got \(4, 8\)"),
        (lambda: StaircaseCache(bits=()), "bits must be a tuple"),
        (lambda: StaircaseCache(bits=(9,)), "bits must be a tuple of integers in 1..8"),
        (lambda: StaircaseCache(block=0), "block must be an integer >= 1, got 0"),
        (lambda: StaircaseCache(group=0), "group must be an integer >= 1, got 0"),
        (lambda: StaircaseCache().append(None, K[0], K), r"k must be a floating tensor \[B, H_kv, n, D\]"),
        (lambda: StaircaseCache().append(None, K, K[:, :, :3]), r"k and v must be \[B, H_kv, n, \*\] alike"),
        (
            lambda: StaircaseCache().append(StaircaseCache().append(None, K, K), K.half(), K.half()),
            "k must be torch.float32 .* as before, got torch.float16",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
