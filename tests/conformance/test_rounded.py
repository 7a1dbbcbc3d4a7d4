"""Methods that round what they compute: engines agree on the rounded numbers, and rounding is all that differs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tilewise
from tests.conformance.cases import OF_A_GRID, fps
from tests.conformance.common import ENGINES, LOW, ROUNDED, error, naive, qkv, repeat
from tests.conformance.weighted import MASKS, Case, N
from tilewise.attention import TileFP8, Tiles, plan
from tilewise.attention.method import mode_of
from tilewise.kernels import EngineRefused
from tilewise.kernels.attend_tiles import definition
from tilewise.tiles import Causal, Padding

CASES = {
    **{name: Case(method) for name, method in ROUNDED.items()},
    "boxes of a grid": Case(fps(1, 2, 2, precision=TileFP8()), refuses=OF_A_GRID),
    "boxes of a grid, one scale": Case(
        fps(1, 2, 2, precision=TileFP8("tensor", values=False)), refuses=OF_A_GRID
    ),
}
METHODS = [pytest.param(case, id=name.replace(" ", "-")) for name, case in CASES.items()]
LENGTHS = [(0, 0), (1, 1), (2, 2), (3, 40), (17, 17), (33, 129), (128, 128), (300, 300)]


def reference(method, q, k, v, mask="causal", bias=None) -> tuple[Tensor, float]:
    """The exact answer over the rounded operands, and how far a textbook computation in v's dtype lies from it.

    Rounded weights are part of the textbook computation, not of the answer: relative to what they are rounded is up
    to the engine.
    """
    made = plan(method, q, k, mask=mask)
    ((call, restore),) = made.applied(q, k, v, bias, q.shape[3] ** -0.5, None, True)
    exact = definition.run(replace(call, v=call.v.double(), weights=None))
    own = call.dequantised()
    low = [x.to(v.dtype) for x in (own.q, own.k)]
    scores = (
        own.bias.repeat_interleave(own.bias_rows, 2)[:, :, : q.shape[2]] if own.bias is not None else None
    )
    seen = repeat(call.view.tokens(), q.shape[1]).expand(*q.shape[:3], k.shape[2])
    if call.tiles is not None:
        seen = seen & definition.kept_tokens(call, call.tiles)
    if call.weights is None:
        rough = naive(*low, v, seen, None if scores is None else scores.to(v.dtype), own.scale)
    else:
        rough = definition.run(call).out
    want = restore(exact._replace(out=exact.out)).out
    budget = error(restore(exact._replace(out=rough)).out, restore(exact).out)
    return want, max(budget, torch.finfo(v.dtype).eps * float(want.abs().max() if want.numel() else 0))


def run_or_skip(engine: str, q, k, v, method, **options) -> Tensor | None:
    try:
        return tilewise.attend(q, k, v, method, engine=engine, **options)
    except EngineRefused as refusal:
        assert engine == "sdpa" or (engine == "native" and "does not round weights" in str(refusal))
        return None


each = pytest.mark.parametrize("case", METHODS)
integers = pytest.mark.parametrize("method", ROUNDED.values(), ids=[x.replace(" ", "-") for x in ROUNDED])


def causal(case: Case, q, k, v, **options) -> Tensor:
    return tilewise.attend(q, k, v, case.on(q, k), mask="causal", **options)


@each
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_engines_agree_on_the_rounded_numbers(case, dtype, engine):
    ran = False
    for (n_q, n_k), (heads, kv_heads) in itertools.product(LENGTHS, ((2, 2), (4, 2), (7, 1))):
        q, k, v = qkv(2, heads, kv_heads, n_q, n_k, d=24, d_v=16, dtype=dtype, seed=n_q)
        bias = torch.randn(1, heads, 1, n_k, dtype=dtype)
        if (n_q, n_k) in case.refuses or mode_of(n_q, n_k) not in case.on(q, k).modes:
            with pytest.raises(ValueError, match=case.refuses.get((n_q, n_k), "does not support")):
                causal(case, q, k, v)
            continue
        for added in (None, bias):
            out = run_or_skip(engine, q, k, v, case.on(q, k), mask="causal", bias=added)
            if out is None:
                continue
            ran = True
            want, budget = reference(case.on(q, k), q, k, v, bias=added)
            assert out.dtype == dtype and out.shape == want.shape
            if out.numel():
                assert error(out, want) <= 2 * budget, (n_q, n_k, heads)
    assert ran or engine in ("sdpa", "native")


@each
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_any_mask(case, mask):
    q, k, v = qkv(2, 4, 2, N, d=24, dtype=torch.float32)
    want, budget = reference(case.on(q, k), q, k, v, mask=mask)
    assert error(tilewise.attend(q, k, v, case.on(q, k), mask=mask), want) <= 2 * budget


@each
def test_rows_that_see_nothing(case):
    q, k, v = qkv(1, 2, 2, 40, dtype=torch.float32)
    mask = Padding(torch.zeros(1, 40, dtype=torch.bool))
    got = tilewise.attend(q, k, v, case.on(q, k), mask=mask, return_lse=True)
    assert (got.out == 0).all() and (got.lse == -torch.inf).all()


@each
def test_zeros_a_shift_and_a_wrong_mask_are_over_budget(case):
    q, k, v = qkv(1, 2, 2, 300, d=24, dtype=torch.float32)
    want, budget = reference(case.on(q, k), q, k, v)
    out = causal(case, q, k, v, engine="torch")
    wrong = [torch.zeros_like(out), out.roll(1, 2), tilewise.attend(q, k, v, case.on(q, k), engine="torch")]
    assert error(out, want) <= 2 * budget
    assert all(error(x, want) > 2 * budget for x in wrong)


@integers
def test_lse_is_that_of_the_unrounded_scores(method):
    """Smoothing shifts all scores of a query; the log-sum-exp that comes back is shifted back."""
    q, k, v = qkv(1, 4, 2, 200, d=64, dtype=torch.float32)
    k = k + 4
    made = plan(method, q, k, mask="causal")
    got, want = (tilewise.attend(q, k, v, x, return_lse=True).lse for x in (made, made.unrounded()))
    assert (got - want).abs().max() < 1 and (got - want).abs().mean() < 0.2
    assert (got - want).abs().mean() < 0.02 * want.abs().mean()


@each
@pytest.mark.parametrize("garbage", [torch.nan, 1e30])
def test_hidden_tokens_have_no_say(case, garbage):
    """Padding holds anything; means and scales leave it out, so outputs are the same bits."""
    q, k, v = qkv(2, 2, 2, N, d=16, dtype=torch.float32)
    keep = torch.arange(N) >= torch.tensor([[40], [0]])
    outs = []
    for value in (0.0, garbage):
        filled = [x.clone() for x in (q, k, v)]
        filled[1][0, :, :40], filled[2][0, :, :40] = value, 0.0
        outs.append(tilewise.attend(*filled, case.on(q, k), mask=Causal() & Padding(keep)))
    assert torch.equal(*(x[0, :, 40:] for x in outs)) and torch.equal(outs[0][1], outs[1][1])
    assert outs[0].isfinite().all()


@each
def test_non_finite_tokens_reach_who_sees_them_and_nobody_else(case):
    q, k, v = qkv(1, 1, 1, 200, d=16, dtype=torch.float32)
    method = case.on(q, k)
    if not isinstance(method, Tiles):  # whose score reads keys
        k[0, 0, 150, 3] = torch.inf
        made = plan(method, q, k, mask="causal")
        reached = made.kept(torch.arange(200), torch.tensor([150]), 1).flatten()
        got, exact = (tilewise.attend(q, k, v, x)[0, 0] for x in (made, made.unrounded()))
        assert exact.isnan().any() and got[exact.isnan()].isnan().all() and got[~reached].isfinite().all()
    q, k, v = qkv(1, 1, 1, 200, d=16, dtype=torch.float32)
    q[0, 0, 77, 3] = torch.nan
    if isinstance(method, Tiles):  # with tiles one query high, so that a NaN changes no other query's choice
        method = replace(method, tile=(1, 16))
    got = tilewise.attend(q, k, v, method, mask="causal")
    assert got[:, :, 77].isnan().all() and got[:, :, torch.arange(200) != 77].isfinite().all()


@each
def test_later_tokens_change_rounding_and_nothing_else(case):
    q, k, v = qkv(1, 2, 2, 256, d=32, dtype=torch.float32)
    later = [x.clone() for x in (q, k, v)]
    for x in later:
        x[:, :, 200:] = torch.randn(1, 2, 56, 32) * 2
    method = case.on(q, k)
    made = plan(method, q, k, mask="causal")
    first, second = (tilewise.attend(*x, made, mask="causal")[:, :, :192] for x in ((q, k, v), later))
    exact = tilewise.attend(q, k, v, made.unrounded(), mask="causal")[:, :, :192]
    same = tilewise.attend(*later, made.unrounded(), mask="causal")[:, :, :192]
    assert torch.equal(exact, same)
    assert error(first, second.double()) <= 4 * error(first, exact.double())
    assert method.lookahead == "prompt" or isinstance(method, Tiles)


@each
def test_strides_and_repeats(case):
    q, k, v = (x.transpose(1, 2) for x in qkv(2, 100, 100, 3, d=16, dtype=torch.float32))
    fused = torch.cat([x.flatten(2) for x in (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))], -1)
    sliced = [x.unflatten(2, (3, 16)).transpose(1, 2) for x in fused.split(48, -1)]
    sliced = [x.transpose(1, 2)[:, :3] if x.shape[1] != q.shape[1] else x for x in sliced]
    want = causal(case, *(x.contiguous() for x in sliced))
    first, second = (causal(case, *sliced) for _ in range(2))
    assert torch.equal(first, second)
    answer, _ = reference(case.on(*sliced[:2]), *sliced)
    assert error(first, answer) <= 1.1 * error(want, answer)  # sums in another order may tip a rounding


@each
def test_compiles_whole(case):
    q, k, v = qkv(1, 2, 2, 100, d=16, dtype=torch.float32)
    method = case.on(q, k)
    compiled = torch.compile(
        lambda q, k, v: tilewise.attend(q, k, v, method, mask="causal"), fullgraph=True, backend="eager"
    )
    with torch.no_grad():
        want = tilewise.attend(q, k, v, method, mask="causal")
        assert torch.allclose(compiled(q, k, v), want, atol=0.02)


@integers
def test_what_integers_cannot_do_is_refused(method):
    q, k, v = qkv(1, 2, 2, 40, d=16, dtype=torch.float32)
    with pytest.raises(ValueError, match="takes no gradients|does not support train"):
        tilewise.attend(q.requires_grad_(), k, v, method, mask="causal")
    with pytest.raises(ValueError, match="softcap does not go with smoothing"):
        tilewise.attend(q.detach(), k, v, method, mask="causal", softcap=5.0)


@pytest.mark.parametrize("name", sorted(set(CASES) - set(ROUNDED)))
def test_what_floats_do_is_the_unrounded_method_at_rounded_tensors(name):
    """Output, log-sum-exp and gradients, which pass the rounding as if it were not there; weights stay."""
    case = CASES[name]
    q, k, v = (x.requires_grad_() for x in qkv(2, 4, 2, N, d_v=6))
    made = plan(case.on(q, k), q, k, mask="causal")
    with torch.no_grad():
        call = made.calls(q, k, v, None, 1.0, None, False)[0]
    rounded = [x.detach().clone().requires_grad_() for x in (call.q, call.k, call.v)]
    got = tilewise.attend(q, k, v, made, return_lse=True)
    want = tilewise.attend(*rounded, made.unrounded(), return_lse=True)
    torch.testing.assert_close(tuple(got), tuple(want))
    d_out = torch.randn_like(want.out)
    grads = [torch.autograd.grad(x.out, y, d_out) for x, y in ((got, (q, k, v)), (want, rounded))]
    torch.testing.assert_close(*grads)
    assert not any(torch.equal(x, y) for x, y in zip((q, k), rounded))
