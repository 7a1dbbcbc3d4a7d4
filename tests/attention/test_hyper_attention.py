"""HyperAttention: blocks, recursion and sample against the rules written out, its error and its cost."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.attention.compared import captured
from tests.attention.test_sampling import explicit, log_weights
from tests.conformance.common import qkv
from tests.conformance.weighted import error
from tilewise.attention import Plan, attend, plan
from tilewise.attention.recipes.hyper_attention import AngularHashes, HyperAttention
from tilewise.attention.sampling import Sampled
from tilewise.tiles import Causal, Documents, Padding, TokenMask, Window

N = 150
SMALL = HyperAttention(block=8, samples=10, directions=4, least=16, causal=True)
MASKS = {
    "causal": "causal",
    "window": Causal() & Window(40, None),
    "documents": Causal() & Documents(torch.tensor([0, 30, 30, N])),
    "left padding": Causal() & Padding(torch.arange(N).ge(torch.tensor([[13], [40]]))),
    "right padding": Causal() & Padding(torch.arange(N).lt(torch.tensor([[100], [61]]))),
    "any": Causal() & TokenMask(torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < 0.5),
}


def _quarter(
    method: HyperAttention, q: Tensor, k: Tensor, weight: Tensor, rows: range, columns: range, drawn: set
):
    """Some queries over some keys of one head, no mask: sorted blocks, and drawn keys for the rest."""
    hashes = method.hashes()
    sort_q, sort_k = (
        sorted(part, key=lambda i, x=x: int(hashes.hash(x[i].view(1, 1, 1, -1))))
        for x, part in ((q, rows), (k, columns))
    )
    blocks_q, blocks_k = (
        [part[i : i + method.block] for i in range(0, len(part), method.block)] for part in (sort_q, sort_k)
    )
    for number, block in enumerate(blocks_q):
        own = blocks_k[number * len(blocks_k) // len(blocks_q)]
        for i in block:
            for j in columns:
                if j in own:
                    weight[i, j] = 0
                elif j in drawn:
                    weight[i, j] = math.log(max(1, len(columns) / method.samples))


def _causal(method: HyperAttention, q: Tensor, k: Tensor, weight: Tensor, first: int, size: int, draws: dict):
    """Causal attention of `size` tokens from `first` on: exact when few, else two halves and a quarter."""
    last = min(first + size, len(q))
    if first >= last:
        return
    if size <= method.least:
        for i in range(first, last):
            weight[i, first : i + 1] = 0
        return
    half = size // 2
    _causal(method, q, k, weight, first, half, draws)
    _causal(method, q, k, weight, first + half, half, draws)
    if first + half < last:
        _quarter(method, q, k, weight, range(first + half, last), range(first, first + half), draws[half])


@pytest.mark.evidence
@pytest.mark.parametrize("n", [16, 17, 64, 96, 128, N])
def test_causal_attention_is_done_by_halves(n):
    """Every pair's weight is that of the recursion, written out: which are exact, which drawn, which left out."""
    q, k, _ = qkv(1, 2, 1, n)
    weight = log_weights(plan(SMALL, q, k, mask="causal"), 1, 2, n, n)
    draws = {}
    for size in SMALL.sizes(n):
        index, _, real = Sampled(SMALL.samples, SMALL.seed, size).draw(torch.ones(1, 1, n, dtype=torch.bool))
        draws[size] = set(index[real].tolist())
    for head in range(2):
        want = torch.full((n, n), -torch.inf, dtype=torch.float64)
        size = SMALL.least
        while size < n:
            size *= 2
        _causal(SMALL, q[0, head], k[0, 0], want, 0, size, draws)
        torch.testing.assert_close(weight[0, head], want, rtol=0, atol=1e-6)


@pytest.mark.evidence
@pytest.mark.parametrize("n_q", [70, 90])
def test_attention_without_a_mask_is_one_quarter(n_q):
    method = replace(SMALL, causal=False)
    q, k, _ = qkv(1, 1, 1, n_q, 70)
    weight = log_weights(plan(method, q, k), 1, 1, n_q, 70)[0, 0]
    drawn = set(Sampled(10).draw(torch.ones(1, 1, 70, dtype=torch.bool))[0].flatten().tolist())
    want = torch.full((n_q, 70), -torch.inf, dtype=torch.float64)
    _quarter(method, q[0, 0], k[0, 0], want, range(n_q), range(70), drawn)
    torch.testing.assert_close(weight, want, rtol=0, atol=1e-6)


class _Mixed(AngularHashes):
    """Keys sorted by other hashes than queries: blocks that hold what chance puts there."""

    def order(self, x: Tensor, segment: int, seen: Tensor | None = None) -> Tensor:
        return replace(AngularHashes(self.directions, self.seed), seed=7 if seen is None else 0).order(
            x, segment
        )


@pytest.mark.evidence
def test_sorted_hashes_bring_heavy_pairs_into_blocks(monkeypatch):
    """Queries that seek one key each: more than eight times as many pairs meet in a block as chance would have it.

    Control: in blocks of queries and keys sorted by different hashes, chance has it, one pair in 32; and attention
    that reads as many scores errs more.
    """
    g = torch.Generator().manual_seed(0)
    n, d = 2048, 32
    k = normalize(torch.randn(n, d, generator=g), dim=-1)
    sought = torch.randperm(n, generator=g)
    q = normalize(k[sought] + 0.1 * torch.randn(n, d, generator=g), dim=-1) * 12 * d**0.5
    q, k, v = (x.view(1, 1, n, d) for x in (q, k, torch.randn(n, d, generator=g)))
    method = HyperAttention(block=64, samples=64, directions=8, least=64)
    dense, met, errors, densities = attend(q, k, v), [], [], []
    for kind in (AngularHashes, _Mixed):
        monkeypatch.setattr(
            HyperAttention, "hashes", lambda self, kind=kind: kind(self.directions, self.seed)
        )
        made = plan(method, q, k)
        own = torch.stack([x[0, 0].argsort() for x in (made.passes[0].q_order, made.passes[0].k_order)]) // 64
        met.append(float((own[0] == own[1][sought]).float().mean()))
        errors.append(error(attend(q, k, v, made), dense))
        densities.append(made.density)
    assert met[0] > 8 / 32 and abs(met[1] - 1 / 32) < 6 * (1 / 32 * 31 / 32 / n) ** 0.5, met
    assert errors[0] < 0.9 * errors[1] and densities[0] == pytest.approx(densities[1], rel=0.01), errors


def test_neighbours_in_the_sorted_order_differ_in_one_sign():
    hashes = AngularHashes(directions=3, seed=0)
    x = torch.randn(1, 1, 500, 3)
    number = hashes.hash(x)[0, 0]
    directions = torch.linalg.lstsq(
        x[0, 0], x[0, 0]
    ).solution  # the identity: signs are read off by basis vectors
    assert directions.shape == (3, 3) and set(number.tolist()) == set(range(8))
    drawn = torch.special.ndtri((Sampled(1).noise(3, 3, x.device)[0].double() + 0.5) / 2**32).mT.float()
    signs = x[0, 0] @ drawn > 0
    by_number = torch.stack([signs[number == i][0] for i in range(8)])
    assert all((signs[number == i] == by_number[i]).all() for i in range(8))
    assert ((by_number[1:] != by_number[:-1]).sum(-1) == 1).all()


def _variants(made: Plan) -> tuple[Plan, Plan]:
    """The plan without what was drawn, and with drawn keys that stand for themselves alone."""
    bare = replace(made, passes=tuple(p for p in made.passes if p.reads is None))
    alone = tuple(
        p if p.reads is None else replace(p, reads=replace(p.reads, log_weight=None)) for p in made.passes
    )
    return bare, replace(made, passes=alone)


@pytest.mark.evidence
@pytest.mark.parametrize("layer", [2, 3, 4, 5])
def test_error_against_exact_on_a_model(layer):
    """q, k and v of a trained model, 2,048 tokens: more keys drawn, less error, over three seeds.

    Controls: without the sample, which costs less, and without its weights, which costs the same, it errs more.
    """
    q, k, v = captured(2048, (2, 3, 4, 5))[layer]
    dense = attend(q, k, v, mask="causal")
    errors = {}
    for samples in (32, 128, 512):
        mine, bare, alone = [], [], []
        for seed in range(3):
            method = HyperAttention(block=64, samples=samples, least=256, causal=True, seed=seed)
            made = plan(method, q, k, mask="causal")
            for into, one in zip((mine, bare, alone), (made, *_variants(made)), strict=True):
                into.append(error(attend(q, k, v, one, mask="causal"), dense))
        errors[samples] = [sum(x) / 3 for x in (mine, bare, alone)]
    assert errors[512][0] < 0.75 * errors[128][0] < 0.75 * 0.8 * errors[32][0], errors
    assert errors[128][0] < 0.8 * errors[128][1] and errors[128][0] < errors[128][2], errors
    assert errors[512][0] < 0.6 * errors[512][1] and errors[512][0] < errors[512][2], errors


def _cost(method: HyperAttention, n: int, mask) -> float:
    """Scores of one head, and hashes: products of a token with a direction."""
    q, k, _ = qkv(1, 1, 1, n, d=4, dtype=torch.float32)
    made = plan(method, q, k, mask=mask)
    levels = len(method.sizes(n)) if method.causal else 1
    return sum(float(p.cost().sum()) for p in made.passes) + 2 * n * method.directions * levels


def _misfit(costs: list[float], lengths: list[int], growth) -> float:
    """How far costs lie from a constant times `growth(N)`, at most, the best constant taken."""
    ratios = [math.log(cost / growth(n)) for cost, n in zip(costs, lengths, strict=True)]
    return math.expm1((max(ratios) - min(ratios)) / 2)


@pytest.mark.evidence
def test_cost_grows_nearly_linearly():
    """Scores over four doublings: linear without a mask, N log N when causal; N^2 is far from either."""
    lengths = [1024, 2048, 4096, 8192, 16384]
    method = HyperAttention(block=64, samples=64, least=128)
    costs = [_cost(method, n, None) for n in lengths]
    assert _misfit(costs, lengths, lambda n: n) < 0.05, costs
    assert _misfit(costs, lengths, lambda n: n**2) > 2, costs
    costs = [_cost(replace(method, causal=True), n, "causal") for n in lengths]
    each = torch.tensor([cost / n for n, cost in zip(lengths, costs, strict=True)]).diff()
    # For every token a doubling adds half a quarter: a block and a sample for every second one, and two hashes.
    assert ((each - (64 + 14)).abs() < 0.05 * 78).all(), each
    assert _misfit(costs, lengths, lambda n: n**2) > 1.5, costs


@pytest.mark.evidence
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_forward_and_backward_equal_the_formula(mask):
    """Control: without the weights of what was drawn, another answer."""
    q, k, v = (x.requires_grad_() for x in qkv(2, 4, 2, N))
    made = plan(SMALL, q, k, mask=mask)
    out, want = attend(q, k, v, made), explicit(made, q, k, v)
    d_out = torch.randn_like(out)
    got = [out, *torch.autograd.grad(out, (q, k, v), d_out)]
    for mine, yours in zip(got, [want, *torch.autograd.grad(want, (q, k, v), d_out)], strict=True):
        # Log weights are float32, whose rounding moves a weight by 1e-7 of itself.
        torch.testing.assert_close(mine, yours, rtol=1e-6, atol=1e-6)
    alone = attend(q, k, v, _variants(made)[1])
    assert float((alone - out).detach().norm() / out.detach().norm()) > 1e-3


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_drawing_every_key_it_is_dense(mask):
    q, k, v = qkv(2, 4, 2, N)
    for causal in (True, False):
        method = replace(SMALL, samples=10**6, causal=causal)
        torch.testing.assert_close(attend(q, k, v, method, mask=mask), attend(q, k, v, mask=mask))


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 33, 129])
def test_lengths(n):
    q, k, v = qkv(1, 2, 1, n)
    for causal, mask in ((True, "causal"), (False, None), (False, "causal")):
        method = replace(SMALL, causal=causal)
        made = plan(method, q, k, mask=mask)
        out = attend(q, k, v, made)
        assert out.shape == q.shape
        if n > 16:
            torch.testing.assert_close(out, explicit(made, q, k, v), rtol=1e-6, atol=1e-6)
        else:
            torch.testing.assert_close(out, attend(q, k, v, mask=mask))


def test_the_future_changes_nothing():
    """Bit for bit, with one plan; and with plans of their own, where whole segments of queries are the same."""
    q, k, v = qkv(1, 4, 2, 128, dtype=torch.float32)
    later = [x.clone() for x in (q, k, v)]
    for x in later:
        x[:, :, 64:] = 50 * torch.randn_like(x[:, :, 64:])
    made = plan(SMALL, q, k, mask="causal")
    for method in (made, SMALL):
        before, after = (
            attend(*x, method, mask="causal", engine="torch")[:, :, :64] for x in ((q, k, v), later)
        )
        assert torch.equal(before, after)
    assert SMALL.lookahead == "prompt"


def test_rows_that_see_nothing():
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 2, 40))
    for causal in (True, False):
        mask = Padding(torch.zeros(1, 40, dtype=torch.bool))
        got = attend(q, k, v, replace(SMALL, causal=causal), mask=mask, return_lse=True)
        assert (got.out == 0).all() and (got.lse == -torch.inf).all()
        assert all((x == 0).all() for x in torch.autograd.grad(got.out.sum(), (q, k, v)))


def test_compiles_whole():
    torch._dynamo.reset()
    run = torch.compile(
        lambda q, k, v: attend(q, k, v, SMALL, mask="causal"), fullgraph=True, backend="eager"
    )
    inputs = qkv(1, 4, 2, 97, dtype=torch.float32)
    assert torch.equal(run(*inputs), attend(*inputs, SMALL, mask="causal"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block must be an integer >= 1, got 0"),
        ({"block": 8, "least": 20}, "least must be a multiple of block 8, got 20"),
        ({"samples": 0}, "samples must be an integer >= 1, got 0"),
        ({"directions": 31}, "directions must be an integer in 1..30, got 31"),
        ({"causal": 1}, "causal must be True or False, got 1"),
        ({"seed": -1}, "seed must be an integer in 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        HyperAttention(**options)


def test_what_it_cannot_do_is_refused():
    q, k, v = qkv(1, 1, 1, 64)
    with pytest.raises(ValueError, match="does not support chunked prefill"):
        attend(q[:, :, :9], k, v, SMALL)
    with pytest.raises(ValueError, match="needs as many queries as keys, got 64 and 40"):
        attend(q, k[:, :, :40], v[:, :, :40], SMALL)
