"""Sampled: that sums over drawn keys are right on average, what the weights do, and the formula written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.conformance.common import exact, grid, qkv, repeat, tile_of
from tests.conformance.weighted import MASKS, N, explicit
from tilewise.attention import Centroid, Own, Plan, Tiles, TopK, attend, plan
from tilewise.attention.sampling import Sampled

BASE = Tiles(score=Centroid(), select=TopK(2), tile=(16, 16), always=(Own(),), rest=Sampled(budget=24))


def log_weights(made: Plan, b: int, heads: int, n_q: int, n_k: int) -> Tensor:
    """The log weight of every pair of tokens, -inf for pairs that are not read: `[b, heads, n_q, n_k]` float64."""
    weight = torch.full((b, heads, n_q, n_k), -torch.inf, dtype=torch.float64)
    for one in made.passes:
        seen = repeat(one.view.tokens(), heads).expand(b, heads, n_q, -1)
        if one.tiles is not None:
            rows = tile_of(one.tiles.q_tiling, one.q_order, b, heads, n_q)
            columns = tile_of(one.tiles.k_tiling, one.k_order, b, heads, seen.shape[3])
            at = torch.arange(b).view(b, 1, 1, 1), torch.arange(heads).view(1, heads, 1, 1)
            keep = repeat(one.tiles.keep, heads).expand(b, heads, -1, -1)
            seen = seen & keep[(*at, rows.unsqueeze(3), columns.unsqueeze(2))]
        if one.reads is None:
            weight = weight.masked_fill(seen, 0)
            continue
        index, own = (
            repeat(x, heads).expand(b, heads, -1).unsqueeze(2)
            for x in (one.reads.index, one.reads.log_weight)
        )
        for m in range(index.shape[3]):
            column = index[..., m].unsqueeze(3).expand(b, heads, n_q, 1)
            value = own[..., m].unsqueeze(3).double().expand(b, heads, n_q, 1)
            kept = weight.gather(3, column)
            weight.scatter_(3, column, torch.where(seen[..., m : m + 1], value, kept))
    return weight


def _sums(method: Tiles, q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    """Denominator and numerator of each query's softmax, `[B, H, N, 1 + D_v]` float64."""
    out, lse = attend(q, k, v, method, mask=mask, return_lse=True)
    return torch.cat([torch.ones_like(out[..., :1]), out], -1).double() * lse.double().exp().unsqueeze(-1)


@pytest.mark.evidence
@pytest.mark.parametrize("mask", [None, "causal"])
def test_sums_are_right_on_average_over_seeds(mask):
    """Numerators and denominators over 100 seeds lie about the exact ones as chance says; so does their quotient.

    Control: drawn keys that stand for themselves alone are wrong on average, however many seeds there are.
    """
    q, k, v = qkv(1, 2, 1, 64, d=8)
    want, seeds = _sums(Tiles(score=Centroid(), select=TopK(10**6)), q, k, v, mask), 100
    for weighted in (True, False):
        made = torch.stack([
            _sums(replace(BASE, rest=Sampled(10, seed=s, weighted=weighted)), q, k, v, mask) for s in range(seeds)
        ])  # fmt: skip
        varies = made.std(0) > 1e-9 * want.abs()  # rows that read every tile do not
        z = ((made.mean(0) - want) / made.std(0) * seeds**0.5)[varies]
        torch.testing.assert_close(made[0][~varies], want[~varies])
        # Squares of about normal numbers have mean 1; 8 numbers a head are shared by rows, so it varies by 0.3.
        assert (float(z.square().mean()) < 2) == weighted, float(z.square().mean())
        assert varies.float().mean() > 0.3
        off, one = (x[..., 1:] / x[..., :1] - want[..., 1:] / want[..., :1] for x in (made.mean(0), made[0]))
        assert (float(off.norm() / one.norm()) < 0.25) == weighted, float(off.norm() / one.norm())


@pytest.mark.evidence
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_forward_and_backward_equal_the_formula(mask):
    """Output and gradients; no pair is read twice. Control: the formula without the weights is another answer."""
    q, k, v = (x.requires_grad_() for x in qkv(2, 4, 2, N))
    made = plan(BASE, q, k, mask=mask)
    grid(made, 2, 4, N, N)  # raises where passes overlap
    out, want = attend(q, k, v, made), explicit(made, q, k, v)
    d_out = torch.randn_like(out)
    got = [out, *torch.autograd.grad(out, (q, k, v), d_out)]
    for mine, yours in zip(got, [want, *torch.autograd.grad(want, (q, k, v), d_out)], strict=True):
        # Log weights are float32, whose rounding moves a weight by 1e-7 of itself.
        torch.testing.assert_close(mine, yours, rtol=1e-6, atol=1e-6)
    bare = attend(q, k, v, plan(replace(BASE, rest=Sampled(24, weighted=False)), q, k, mask=mask))
    assert float((bare - out).detach().norm() / out.detach().norm()) > 1e-3


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_with_a_budget_of_all_keys_it_is_dense(mask):
    q, k, v = qkv(2, 4, 2, N)
    for budget, segment in ((10**6, None), (16, 16), (200, 32)):
        method = replace(BASE, rest=Sampled(budget, segment=segment))
        torch.testing.assert_close(attend(q, k, v, method, mask=mask), attend(q, k, v, mask=mask))


def test_every_key_is_drawn_as_often():
    """Over 600 seeds every key's count lies within chance of budget / N; other heads draw other keys."""
    seen = torch.ones(1, 2, 50, dtype=torch.bool)
    counts = torch.zeros(2, 50)
    for seed in range(600):
        index, log_weight, real = Sampled(10, seed=seed).draw(seen)
        assert index.shape == (1, 2, 10) and real.all()
        assert all(len(set(row)) == 10 for row in index[0].tolist())
        torch.testing.assert_close(log_weight, torch.full((1, 2, 10), 5.0).log())
        counts.scatter_add_(1, index[0], torch.ones(2, 10))
    deviation = (600 * 0.2 * 0.8) ** 0.5
    assert float((counts - 120).abs().max()) < 4.5 * deviation
    assert 0.7 < float((counts - 120).square().mean()) / deviation**2 < 1.3
    assert set(Sampled(10).draw(seen)[0][0, 0].tolist()) != set(Sampled(10).draw(seen)[0][0, 1].tolist())


def test_segments_draw_apart():
    index, log_weight, real = Sampled(3, segment=16).draw(torch.ones(1, 1, 37, dtype=torch.bool))
    assert (index[0, 0, real[0, 0]] // 16).tolist() == [0] * 3 + [1] * 3 + [2] * 3
    want = torch.tensor([16 / 3] * 6 + [5 / 3] * 3).log()
    torch.testing.assert_close(log_weight[0, 0], want)


def test_padding_is_not_drawn():
    seen = torch.arange(40).ge(torch.tensor([[25], [38]])).view(2, 1, 40)
    index, log_weight, real = Sampled(5).draw(seen)
    assert seen.gather(2, index)[real].all() and real.sum(-1).tolist() == [[5], [2]]
    torch.testing.assert_close(log_weight[:, 0, 0], torch.tensor([15 / 5, 1.0]).log())


def test_no_key_and_no_query():
    for n_q, n_k in ((0, 0), (0, 7), (7, 0), (1, 1), (5, 40), (40, 5)):
        q, k, v = qkv(1, 2, 1, n_q, n_k)
        out = attend(q, k, v, BASE, mask="causal")
        assert out.shape == q.shape and out.isfinite().all()


def test_compiles_whole():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: attend(q, k, v, BASE, mask="causal"), fullgraph=True, backend="eager"
    )
    for n in (64, 97):
        inputs = qkv(1, 4, 2, n, dtype=torch.float32)
        assert torch.equal(compiled(*inputs), attend(*inputs, BASE, mask="causal"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget must be an integer >= 1, got 0"),
        ({"budget": 4, "segment": 0}, "segment must be an integer >= 1, got 0"),
        ({"budget": 4, "seed": -1}, r"seed must be an integer in 0..2\^32 - 1, got -1"),
        ({"budget": 4, "weighted": 1}, "weighted must be True or False, got 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Sampled(**options)


def test_exact_rows_stay_exact():
    """Queries whose tiles are all chosen are not changed by what is drawn."""
    q, k, v = qkv(1, 2, 2, 96)
    want = exact(q, k, v, torch.ones(96, 96, dtype=torch.bool).tril().expand(1, 2, 96, 96))
    out = attend(q, k, v, BASE, mask="causal")
    torch.testing.assert_close(out[:, :, :32], want.out[:, :, :32])
