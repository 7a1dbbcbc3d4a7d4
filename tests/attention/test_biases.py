"""Low-rank biases: exact ones against the dense bias, learned ones by rank, low precision, memory, bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tilewise
from tests.conformance.common import (
    ENGINES,
    METHODS,
    Exact,
    error,
    exact,
    naive,
    over_budget,
    qkv,
    repeat,
    run_or_refuse,
    with_grads,
)  # fmt: skip
from tests.conformance.test_memory import allocations
from tilewise.attention import Mass, MeanPool, Pooled, Tiles, attend, attend_tiles, explain, plan
from tilewise.attention.biases import LowRankBias, alibi_slopes
from tilewise.attention.neural_factors import NeuralFactors
from tilewise.tiles import Causal, Partial, TileMap


def alibi_by_formula(slopes: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """`[1, H, N_q, N_k]`."""
    return (-slopes.view(-1, 1, 1) * (q_pos.unsqueeze(1) - k_pos)).unsqueeze(0)


def distance_by_formula(q_xyz: Tensor, k_xyz: Tensor, weights: Tensor) -> Tensor:
    """`[B, H, N_q, N_k]` from points `[B, H, N, d]` and weights `[B, H, N_q]`, difference by difference."""
    return weights.unsqueeze(-1) * (q_xyz.unsqueeze(3) - k_xyz.unsqueeze(2)).square().sum(-1)


def alibi_case(n_q: int, n_k: int, heads: int = 4):
    slopes = alibi_slopes(heads).double().requires_grad_()
    low = LowRankBias.alibi(slopes, n_q, n_k)
    return low, alibi_by_formula(slopes, torch.arange(n_k - n_q, n_k), torch.arange(n_k)), [slopes]


def distance_case(n_q: int, n_k: int, heads: int = 4):
    q_xyz, k_xyz = (
        torch.randn(1, h, n, 3, dtype=torch.float64).requires_grad_() for h, n in ((1, n_q), (2, n_k))
    )
    weights = -torch.rand(1, heads, n_q, dtype=torch.float64).requires_grad_()
    low = LowRankBias.distance(q_xyz, k_xyz, weights)
    dense = distance_by_formula(q_xyz, repeat(k_xyz, heads), weights)
    return low, dense, [q_xyz, k_xyz]


CASES = {"alibi": alibi_case, "distance": distance_case}


def dense_attention(q, k, v, bias: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    scores = (q @ repeat(k, heads).mT / math.sqrt(q.shape[3]) + bias).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ repeat(v, heads), scores.logsumexp(-1)


@pytest.mark.evidence
@pytest.mark.parametrize(("n_q", "n_k"), [(70, 70), (30, 300)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_exact_biases_equal_the_dense_bias(case, n_q, n_k):
    """Output, log-sum-exp and all gradients, to those of slopes and points, to float64 rounding.

    Control: the nearest bias of one rank less gives another answer, so no rank is spent in vain.
    """
    low, dense, parameters = case(n_q, n_k)
    q, k, v = (x.requires_grad_() for x in qkv(heads=4, kv_heads=2, n_q=n_q, n_k=n_k))
    seen = torch.arange(n_k) <= torch.arange(n_k - n_q, n_k).unsqueeze(1)
    got = attend(q, k, v, mask="causal", bias=low, return_lse=True)
    want = dense_attention(q, k, v, dense, seen)
    torch.testing.assert_close(tuple(got), want, rtol=1e-10, atol=1e-11)
    d_out, d_lse = torch.randn_like(got.out), torch.randn_like(got.lse)
    leaves = [q, k, v, *parameters]
    grads = [torch.autograd.grad(x, leaves, (d_out, d_lse), retain_graph=True) for x in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)

    rank = int(torch.linalg.matrix_rank(dense.detach()).max())
    assert rank == {"alibi": 2, "distance": 5}[case.__name__.split("_")[0]]
    assert low.rank <= rank + (n_k > 256)  # a digit more of positions
    fewer = LowRankBias.svd(dense, rank - 1)
    fewer_out = attend(q, repeat(k, 4), repeat(v, 4), mask="causal", bias=fewer)
    assert error(fewer_out.detach(), want[0].detach()) > 1e-3 * float(want[0].detach().square().mean().sqrt())


@pytest.mark.evidence
def test_the_part_that_is_constant_in_a_row_is_kept():
    """Without it the output would be the same and the log-sum-exp wrong, and partial results merge by that."""
    low, dense, _ = alibi_case(40, 40)
    q, k, v = qkv(heads=4, n_q=40)
    seen = torch.ones(40, 40).tril().bool()
    out, lse = dense_attention(q, k, v, dense, seen)
    without = LowRankBias(low.q_factor[..., :-1].contiguous(), low.k_factor[..., :-1].contiguous())
    got = attend(q, k, v, mask="causal", bias=without, return_lse=True)
    torch.testing.assert_close(got.out, out, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.lse - lse, -low.q_factor[..., -1].expand_as(lse), rtol=1e-10, atol=1e-10)
    halves = []
    for first in (True, False):  # every other tile of 8 keys
        keep = ((torch.arange(5) % 2 == 0) == first).expand(1, 1, 5, 5)
        tiles = TileMap.from_mask(keep, (8, 8))
        halves.append(attend_tiles(q, k, v, tiles, mask="causal", bias=low, return_lse=True))
    torch.testing.assert_close(tuple(tilewise.tiles.merge(halves)), (out, lse), rtol=1e-10, atol=1e-12)


def relative_position_bias(side: int, heads: int) -> Tensor:
    """As in SwinV2: a two-layer network of log-spaced offsets in a window of `side x side`, then 16 sigmoid.

    Random weights stand for learned ones. `[1, heads, side^2, side^2]`.
    """
    g = torch.Generator().manual_seed(0)
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(-1, 2)
    offset = (at.unsqueeze(1) - at).double() * 8 / (side - 1)
    offset = offset.sign() * (offset.abs() + 1).log2() / 3
    first = torch.randn(2, 512, generator=g, dtype=torch.float64)
    shift = torch.randn(512, generator=g, dtype=torch.float64)
    second = torch.randn(512, heads, generator=g, dtype=torch.float64) / math.sqrt(512)
    return 16 * ((offset @ first + shift).relu() @ second).sigmoid().permute(2, 0, 1).unsqueeze(0)


@pytest.mark.evidence
def test_learned_biases_are_nearly_of_low_rank():
    """Of a bias over 256 tokens 99.5 % of the squares fit into rank 16; the error falls with the rank.

    Controls: factors with random columns, otherwise the best, err over four times as much at rank 16 and more at
    every rank; the same numbers in random places need more than ten times the rank.
    """
    side, heads = 16, 4
    dense, n = relative_position_bias(side, heads), side * side
    q, k, v = qkv(heads=heads, n_q=n, d=32)
    want = attend(q, k, v, bias=dense)
    by_energy = LowRankBias.svd(dense)
    assert by_energy.rank <= 16 and float(by_energy.energy.min()) >= 0.995
    errors, chance = [], []
    for rank in (1, 2, 4, 8, 16, 32, 64):
        low = LowRankBias.svd(dense, rank=rank)
        lost = (low.dense() - dense).square().sum((2, 3)) / dense.square().sum((2, 3))
        torch.testing.assert_close(1 - lost, low.energy, rtol=1e-9, atol=1e-9)
        errors.append(error(attend(q, k, v, bias=low), want))
        columns = torch.randn(1, heads, n, rank, generator=torch.Generator().manual_seed(1)).double()
        basis = torch.linalg.qr(columns)[0]
        random = LowRankBias(basis, (basis.mT @ dense).mT)
        chance.append(error(attend(q, k, v, bias=random), want))
    assert errors == sorted(errors, reverse=True), errors
    assert all(a < b for a, b in zip(errors, chance)) and errors[4] < chance[4] / 4, (errors, chance)
    mixed = dense.flatten(2)[..., torch.randperm(n * n)].view_as(dense)
    assert LowRankBias.svd(mixed).rank > 10 * by_energy.rank


@pytest.mark.evidence
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_alibi_in_low_precision(dtype):
    """Over 4,096 tokens the error stays within twice that of textbook attention with a dense bias.

    Control: positions as plain numbers of that precision, which holds integers to 256 (2,048), err far more.
    """
    heads, n_q, n_k = 6, 256, 4096  # the last queries: with the largest positions
    q, k, v = qkv(heads=heads, n_q=n_q, n_k=n_k, d=48, dtype=dtype)
    slopes, k_pos = alibi_slopes(heads), torch.arange(n_k)
    q_pos = k_pos[-n_q:]
    dense = alibi_by_formula(slopes.double(), q_pos, k_pos)
    seen = (k_pos <= q_pos.unsqueeze(1)).view(1, 1, n_q, n_k)
    want = naive(*(x.double() for x in (q, k, v)), seen, dense)
    baseline = naive(q, k, v, seen, dense.to(dtype))
    low = LowRankBias.alibi(slopes, n_q, n_k)
    got = attend(q, k, v, mask="causal", bias=low, return_lse=True)
    assert over_budget(got.out, baseline, want) is None, over_budget(got.out, baseline, want)
    scores = (q.double() @ k.double().mT / math.sqrt(48) + dense).masked_fill(~seen, -torch.inf)
    rounded = (q @ k.mT * 48**-0.5 + dense.to(dtype)).masked_fill(~seen, -torch.inf)
    assert over_budget(got.lse, rounded.logsumexp(-1), scores.logsumexp(-1)) is None

    slope = slopes.view(1, -1, 1, 1)
    q_factor = torch.cat([slope.expand(1, heads, n_q, 1), -slope * q_pos.view(1, 1, -1, 1)], -1)
    keys = torch.stack([k_pos, torch.ones_like(k_pos)], -1).view(1, 1, n_k, 2).float()
    plain = LowRankBias(q_factor=q_factor, k_factor=keys, pieces=(1, 1), energy=None)
    assert over_budget(attend(q, k, v, mask="causal", bias=plain), baseline, want) is not None
    torch.testing.assert_close(plain.dense(), low.dense(), rtol=1e-6, atol=1e-3)  # the same bias, in float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", ["distance", "svd"])
def test_other_biases_in_low_precision(make, dtype):
    n = 256
    q, k, v = qkv(heads=2, n_q=n, d=32, dtype=dtype)
    low = {
        "distance": lambda: LowRankBias.distance(torch.randn(n, 3), torch.randn(n, 3), weights=-0.5),
        "svd": lambda: LowRankBias.svd(relative_position_bias(16, 2), energy=0.99),
    }[make]()
    dense = low.dense().double()
    everything = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    want = naive(*(x.double() for x in (q, k, v)), everything, dense)
    baseline = naive(q, k, v, everything, dense.to(dtype))
    assert over_budget(attend(q, k, v, bias=low), baseline, want) is None


@pytest.mark.evidence
def test_factors_are_all_the_memory_there_is():
    """At 8,192 tokens the factors hold R (N + N) numbers where the bias holds N^2, and no call makes N x N.

    Control: the dense bias is seen by the same meter.
    """
    n = 8192
    inputs = [x.requires_grad_() for x in qkv(heads=1, n_q=n, d=8, dtype=torch.float32)]
    points = torch.randn(n, 3).requires_grad_()

    def both(bias) -> None:
        out = attend(*inputs, mask="causal", bias=bias(), engine="torch")
        torch.autograd.grad(out.sum(), [*inputs, points], allow_unused=True)

    low = LowRankBias.distance(points, points)
    assert low.rank == 5 and low.nbytes == 4 * 5 * 2 * n
    assert allocations(lambda: both(lambda: LowRankBias.distance(points, points)))[0] < 4 * n * n // 64
    small = 1024
    few = [x[:, :, :small] for x in inputs]
    dense = lambda: attend(*few, bias=LowRankBias.distance(points[:small], points[:small]).dense())  # noqa: E731
    assert allocations(dense)[0] >= 4 * small * small


@pytest.mark.evidence
def test_small_networks_learn_a_bias_of_the_input():
    """Fitted to a bias that is a function of pairs of tokens, they explain nine tenths of it for tokens never seen.

    Controls: networks fitted to the same numbers in random places explain nothing of it; rank 1 explains less.
    """
    torch.manual_seed(0)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.rand(8, 64, 2) * 2 - 1
        return x, (3 * torch.exp(-(x.unsqueeze(2) - x.unsqueeze(1)).square().sum(-1))).unsqueeze(1)

    (x, dense), (new, asked) = batch(), batch()
    variance = asked.var()

    def unexplained(rank: int, target: Tensor) -> float:
        torch.manual_seed(1)
        net = NeuralFactors(features=2, heads=1, rank=rank, width=64)
        net.fit(x_q=x, x_k=x, dense=target, steps=600, lr=3e-3)
        return float(net.loss(x_q=new, x_k=new, dense=asked).detach() / variance)

    places = torch.randperm(64 * 64)
    mixed = dense.flatten(2)[..., places].view_as(dense)
    good, poor, chance = unexplained(8, dense), unexplained(1, dense), unexplained(8, mixed)
    assert good < 0.1 and good < poor / 4 and chance > 0.5, (good, poor, chance)
    q, k, v = qkv(b=8, heads=1, n_q=64, dtype=torch.float32)
    low = NeuralFactors(2, 1, 4)(new, new)
    torch.testing.assert_close(attend(q, k, v, bias=low), attend(q, k, v, bias=low.dense()))


def exact_with(low: LowRankBias, q, k, v, seen: Tensor, d_out: Tensor) -> Exact:
    """The float64 answer and its rounding, that of the products of the factors included."""
    low = replace(low, q_factor=low.q_factor.detach().double(), k_factor=low.k_factor.detach().double())
    wide_q, wide_k = low.extend(q.double(), k.double(), 1 / math.sqrt(q.shape[3]))
    factor = math.sqrt(wide_q.shape[3] / q.shape[3])  # `exact` divides by the root of all columns
    want = exact(wide_q * factor, wide_k, v, seen, d_out)
    for table in (want.__dict__, want.rounding):
        table["dq"] = table["dq"][..., low.rank :] * factor
        table["dk"] = table["dk"][..., low.rank :]
    return want


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_engine(engine, case):
    low, dense, _ = case(60, 60)
    q, k, v = qkv(b=2, heads=4, kv_heads=2, n_q=60, dtype=torch.float32)
    seen = torch.ones(60, 60).tril().bool()
    run = run_or_refuse(engine, q, k, v, "dense", mask="causal", bias=low)
    if run is None:
        return
    d_out = torch.randn_like(q)
    want = exact_with(low, q, k, v, seen, d_out)
    torch.testing.assert_close(want.out, exact(q, k, v, seen, bias=dense).out, rtol=1e-9, atol=1e-10)
    want.check(with_grads(lambda q, k, v, _: run(q, k, v, low), q, k, v, d_out), torch.float32)


def test_the_cost_in_float32_is_known():
    """Positions in the thousands cancel in the products: the error is bounded by those, not by the bias."""
    q, k, v = qkv(heads=6, n_q=64, n_k=8192, d=48, dtype=torch.float32)
    low = LowRankBias.alibi(alibi_slopes(6), 64, 8192)
    seen = torch.arange(8192) <= torch.arange(8128, 8192).unsqueeze(1)
    want = exact_with(low, q, k, v, seen, torch.ones(1, 6, 64, 48))
    want.check({"out": attend(q, k, v, mask="causal", bias=low)}, torch.float32)


@pytest.mark.parametrize("name", METHODS)
def test_methods_choose_without_the_bias(name):
    """Tiles are those that q and k alone would get, as with a dense bias; the answer is that of the dense bias."""
    q, k, v = qkv(heads=4, kv_heads=2, n_q=160)
    low, dense, _ = alibi_case(160, 160)
    got = attend(q, k, v, METHODS[name], mask="causal", bias=low, return_lse=True)
    want = attend(q, k, v, METHODS[name], mask="causal", bias=dense, return_lse=True)
    torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-9, atol=1e-10)
    made = plan(METHODS[name], q, k, mask="causal")
    assert torch.equal(attend(q, k, v, made, mask="causal", bias=low), got.out)


def test_means_of_keys_carry_the_mean_of_the_bias():
    q, k, v = qkv(heads=2, n_q=64)
    low = LowRankBias.alibi(alibi_slopes(2).double(), 64)
    method = Tiles(score=MeanPool(), select=Mass(0.3), tile=(16, 16), rest=Pooled())
    with pytest.raises(ValueError, match="pooled remainder takes no bias"):
        attend(q, k, v, method, bias=low.dense())
    keep = plan(method, q, k).tile_maps[0].keep
    tile = torch.arange(64) // 16
    read = keep[:, :, tile][..., tile]
    mean_bias = low.dense().unflatten(-1, (4, 16)).mean(-1)
    means, values = (x.unflatten(2, (4, 16)).mean(3) for x in (k, v))
    pooled = (q @ means.mT / math.sqrt(8) + mean_bias + math.log(16)).masked_fill(
        keep[:, :, tile], -torch.inf
    )
    exactly = (q @ k.mT / math.sqrt(8) + low.dense()).masked_fill(~read, -torch.inf)
    want = torch.cat([exactly, pooled], -1).softmax(-1) @ torch.cat([v, values], 2)
    torch.testing.assert_close(attend(q, k, v, method, bias=low), want, rtol=1e-10, atol=1e-12)


def test_gradients_reach_the_factors():
    q, k, v = qkv(heads=2, kv_heads=1, n_q=5, n_k=7, d=3)
    factors = torch.randn(1, 2, 5, 2, dtype=torch.float64), torch.randn(1, 1, 7, 2, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, *factors)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, a, b: tuple(attend(q, k, v, bias=LowRankBias(a, b), return_lse=True)), inputs
    )


def test_gradients_pass_the_split():
    """In low precision an entry is several numbers; its gradient is that of their sum."""
    q, k, v = qkv(heads=2, n_q=33, d=16, dtype=torch.bfloat16)
    factors = [torch.randn(1, 2, 33, 3).requires_grad_() for _ in range(2)]
    wide = [x.detach().double().requires_grad_() for x in factors]
    for pieces in ((1, 1), (2, 2), (3, 1), (1, 3), (3, 3)):
        out = attend(q, k, v, bias=LowRankBias(*factors, pieces=pieces))
        want = attend(*(x.double() for x in (q, k, v)), bias=LowRankBias(*wide))
        got = torch.autograd.grad(out.float().square().sum(), factors)
        for mine, exactly in zip(got, torch.autograd.grad(want.square().sum(), wide)):
            assert error(mine, exactly) < 4 * torch.finfo(torch.bfloat16).eps * float(exactly.abs().max())


def test_columns_are_counted():
    low = LowRankBias(torch.randn(1, 1, 5, 4), torch.randn(1, 1, 6, 4))
    q, k, _ = qkv(n_q=5, n_k=6, dtype=torch.bfloat16)
    for pieces, times in (((1, 1), 1), ((2, 2), 3), ((3, 1), 3), ((1, 2), 2), ((3, 3), 6)):
        split = replace(low, pieces=pieces)
        assert split.columns(torch.bfloat16) == 4 * times and split.columns(torch.float32) == 4
        wide = split.extend(q, k, 0.3)
        assert [x.shape[3] for x in wide] == [8 + 4 * times] * 2 and wide[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_pieces_add_up(dtype):
    """The product of the split factors is the bias, nearly to float32; float16 overflows in neither of them."""
    low = LowRankBias(1e4 * torch.rand(1, 2, 50, 2), 1e2 * torch.rand(1, 1, 40, 2), pieces=(3, 3))
    low.q_factor[..., 1] = 0
    q, k = torch.zeros(1, 2, 50, 4, dtype=dtype), torch.zeros(1, 1, 40, 4, dtype=dtype)
    wide_q, wide_k = (x.double() for x in low.extend(q, k, 0.5))
    assert wide_q.isfinite().all()
    torch.testing.assert_close(0.5 * wide_q @ wide_k.mT, low.dense().double(), rtol=1e-6, atol=0.1)


def test_positions_may_be_given():
    q_pos, k_pos = torch.tensor([5, 70_000, 3]), torch.tensor([[[9, 1, 300, 70_001]], [[0, 2, 4, 6]]])
    slopes = torch.tensor([0.5, 0.125, 0.3], dtype=torch.float64)
    low = LowRankBias.alibi(slopes=slopes, n_q=3, n_k=4, q_pos=q_pos, k_pos=k_pos)
    want = torch.cat([alibi_by_formula(slopes, q_pos, k[0]) for k in k_pos])
    torch.testing.assert_close(low.dense(), want, rtol=1e-12, atol=1e-9)
    assert low.rank == 4, "three digits"
    assert torch.equal(low.k_factor.to(torch.bfloat16).double(), low.k_factor)
    shorter = LowRankBias.alibi(slopes, 3, 10)
    torch.testing.assert_close(
        shorter.dense(), alibi_by_formula(slopes, torch.arange(7, 10), torch.arange(10))
    )


def test_weights_of_distances():
    q_xyz, k_xyz = torch.randn(5, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    plain = (q_xyz.unsqueeze(1) - k_xyz).square().sum(-1)
    for weights, want in (
        (1.0, plain[None, None]),
        (torch.tensor([-1.0, 2.0]), plain * torch.tensor([-1.0, 2.0], dtype=torch.float64).view(1, 2, 1, 1)),
        (torch.arange(5.0).view(1, 1, 5), plain * torch.arange(5, dtype=torch.float64).view(1, 1, 5, 1)),
    ):
        low = LowRankBias.distance(q_xyz=q_xyz, k_xyz=k_xyz, weights=weights)
        torch.testing.assert_close(low.dense(), want, rtol=1e-10, atol=1e-12)
        assert low.rank == 4


def test_svd_of_grouped_heads_shares_the_keys_side():
    dense = torch.randn(2, 4, 6, 9, dtype=torch.float64)
    low = LowRankBias.svd(dense, energy=1.0, kv_heads=2)
    assert low.k_factor.shape == (2, 2, 9, 9) and low.energy.shape == (2, 2)
    torch.testing.assert_close(low.dense(), dense, rtol=1e-10, atol=1e-12)
    q, k, v = qkv(b=2, heads=4, kv_heads=2, n_q=6, n_k=9)
    torch.testing.assert_close(attend(q, k, v, bias=low), attend(q, k, v, bias=dense))
    assert LowRankBias.svd(torch.zeros(3, 5)).rank == 1 and bool(
        (LowRankBias.svd(torch.zeros(3, 5)).energy == 1).all()
    )


def test_slopes_are_those_of_the_authors():
    assert alibi_slopes(heads=8).tolist() == [2.0**-i for i in range(1, 9)]
    torch.testing.assert_close(alibi_slopes(3), torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]))
    assert len(alibi_slopes(12)) == 12 and alibi_slopes(12)[8] == 2.0**-0.5


def test_with_everything_else():
    """A floating mask, a window, the other layout, a scale of one's own, given tiles, and an explanation."""
    q, k, v = qkv(heads=2, n_q=40)
    low, dense, _ = alibi_case(40, 40, heads=2)
    mask = torch.randn(40, 40, dtype=torch.float64)
    got = attend(q, k, v, mask=mask, bias=low, scale=0.7)
    torch.testing.assert_close(got, attend(q, k, v, bias=dense + mask, scale=0.7), rtol=1e-9, atol=1e-10)
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(
        attend(*turned, bias=low, layout="bnhd").transpose(1, 2), attend(q, k, v, bias=low)
    )
    torch.testing.assert_close(attend(q, k, v, bias=low, scale=-0.5), attend(q, k, v, bias=dense, scale=-0.5))
    tiles = TileMap.everything(40, 40)
    part: Partial = attend_tiles(q, k, v, tiles, mask=Causal(), bias=low, return_lse=True)
    torch.testing.assert_close(part.out, attend(q, k, v, mask="causal", bias=dense))
    assert "N x N bias" not in str(explain(q, k, v, bias=low))


def test_no_tokens():
    q, k, v = qkv(n_q=0, n_k=0, dtype=torch.bfloat16)
    assert attend(q, k, v, bias=LowRankBias.alibi(alibi_slopes(2), 0)).shape == q.shape


def test_compiled_equals_eager(monkeypatch):
    monkeypatch.undo()  # the poisoned `torch.empty` is Python, which the compiler would trace
    torch._dynamo.reset()
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.requires_grad_() for x in qkv(n_q=37, dtype=dtype)]
        factors = [torch.randn(1, 2, 37, 3).requires_grad_() for _ in range(2)]

        def function(q, k, v, a, b):
            return attend(q, k, v, mask="causal", bias=LowRankBias(a, b))

        want = function(*inputs, *factors)
        got = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs, *factors)
        assert torch.equal(want, got)
        grads = [torch.autograd.grad(x.float().sum(), [*inputs, *factors]) for x in (want, got)]
        assert all(torch.equal(a, b) for a, b in zip(*grads))
    torch._dynamo.reset()


def _factors(*shapes, dtype=torch.float32):
    return [torch.randn(*shape, dtype=dtype) for shape in shapes]


ONES = torch.ones(1, 1, 3, 4)
BAD_TYPES = {
    "q_factor must be .* got torch.float32 \\[3, 4\\]": lambda: LowRankBias(ONES[0, 0], ONES),
    "k_factor must be .* got int": lambda: LowRankBias(ONES, 3),
    "share one dtype": lambda: LowRankBias(ONES, ONES.double()),
    "slopes must be a floating tensor": lambda: LowRankBias.alibi([0.5], 3),
    "q_xyz must be a floating tensor of 2 or 4 axes": lambda: LowRankBias.distance(torch.ones(3), ONES),
    "dense must be a floating tensor": lambda: LowRankBias.svd(torch.ones(3, 3).long()),
}
BAD_VALUES = {
    "share a rank >= 1, got 4 and 5": lambda: LowRankBias(ONES, torch.ones(1, 1, 3, 5)),
    "share a rank >= 1, got 0": lambda: LowRankBias(ONES[..., :0], ONES[..., :0]),
    "pieces must be two integers in 1..3, got \\(4, 1\\)": lambda: LowRankBias(ONES, ONES, pieces=(4, 1)),
    "k_pos must be integers \\[3\\]": lambda: LowRankBias.alibi(torch.ones(2), 3, k_pos=torch.arange(4)),
    "share their dimension, got 2 and 4": lambda: LowRankBias.distance(torch.ones(3, 2), ONES),
    "weights must be .* got \\[2, 2\\]": lambda: LowRankBias.distance(ONES, ONES, torch.ones(2, 2)),
    "rank or energy, not both": lambda: LowRankBias.svd(ONES, 1, energy=0.5),
    "rank must be in 1..3, got 4": lambda: LowRankBias.svd(ONES, 4),
    "energy must be in .* got 1.5": lambda: LowRankBias.svd(ONES, energy=1.5),
    "divide the 4 heads of the bias, got 3": lambda: LowRankBias.svd(ONES.expand(1, 4, 3, 4), 1, kv_heads=3),
    "heads must be an integer >= 1, got 0": lambda: alibi_slopes(0),
    "rank must be an integer >= 1, got 0": lambda: NeuralFactors(3, 2, 0),
}


@pytest.mark.parametrize("message", [*BAD_TYPES, *BAD_VALUES])
def test_bad_factors(message):
    with pytest.raises(TypeError if message in BAD_TYPES else ValueError, match=message):
        (BAD_TYPES | BAD_VALUES)[message]()


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (
            ((1, 4, 9, 2), (1, 4, 9, 2)),
            {},
            r"k_factor must be \[1 or 1, 2 or 1, 9, R\] for 2 kv heads, .*grouped heads",
        ),
        (((1, 2, 9, 2), (1, 2, 9, 2)), {}, r"q_factor must be \[1 or 1, 4 or 1, 9, R\] for 4 query heads"),
        (((1, 1, 8, 2), (1, 1, 9, 2)), {}, "q_factor must be"),
        (((2, 1, 9, 2), (1, 1, 9, 2)), {}, "q_factor must be"),
        (((1, 1, 9, 505), (1, 1, 9, 505)), {}, "head_dim 8 and 505 columns .* exceed 512: lower the rank"),
        (((1, 1, 9, 2), (1, 1, 9, 2)), {"softcap": 5.0}, "softcap takes no low-rank bias"),
        (((1, 1, 9, 2), (1, 1, 9, 2)), {"scale": 0.0}, "scale must not be 0 with a low-rank bias"),
    ],
)
@pytest.mark.parametrize("call", [attend, explain])
def test_bad_calls(call, shapes, options, message):
    inputs = qkv(heads=4, kv_heads=2, n_q=9, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        call(*inputs, bias=LowRankBias(*_factors(*shapes)), **options)


def test_bad_bias():
    with pytest.raises(TypeError, match="bias must be a floating tensor .* or a LowRankBias"):
        attend(*qkv(), bias="alibi")
