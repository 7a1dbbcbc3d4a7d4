"""Conformance 1: a low-precision result errs at most twice as much as naive PyTorch at that precision.

Tiles are chosen once, in float64, and the plan is given to every engine: the budget is for arithmetic, not for
choices that rounding may tip.
"""

from __future__ import annotations

import pytest
import torch

from tests.conformance.common import (
    ENGINES,
    LOW,
    cases,
    exact,
    grid,
    naive,
    over_budget,
    qkv,
    run_or_refuse,
    with_grads,
)
from tilewise.attention import plan

FIELDS = ("out", "dq", "dk", "dv")


def _setting(dtype, method, n=150, bias=False):
    q, k, v = qkv(b=2, heads=4, kv_heads=2, n_q=n, d=16, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    d_out = torch.randn(q.shape, generator=generator).to(dtype)
    bias = torch.randn(1, 4, n, n, generator=generator).to(dtype) if bias else None
    made = plan(method, q.double(), k.double(), mask="causal")
    seen = grid(made, 2, 4, n, n)
    want = exact(q, k, v, seen, d_out, bias)
    baseline = with_grads(lambda q, k, v, bias: naive(q, k, v, seen, bias), q, k, v, d_out, bias)
    return (q, k, v), d_out, bias, made, seen, want, baseline


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("method", cases())
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_error_is_within_twice_naive(method, engine, dtype, biased):
    inputs, d_out, bias, made, _, want, baseline = _setting(dtype, method, bias=biased)
    run = run_or_refuse(engine, *inputs, made, bias=bias)
    if run is None:
        return
    got = with_grads(run, *inputs, d_out, bias)
    assert got.out.dtype == got.dq.dtype == got.dk.dtype == got.dv.dtype == dtype
    for name in (*FIELDS, *(["dbias"] if biased else [])):
        reason = over_budget(getattr(got, name), getattr(baseline, name), getattr(want, name))
        assert reason is None, f"{name}: {reason}"


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", FIELDS)
def test_the_budget_notices_zeros_shifts_and_wrong_masks(dtype, name):
    (q, k, v), d_out, _, made, seen, want, baseline = _setting(dtype, cases(["moba"])[0].values[0])
    wrong_mask = seen | seen.roll(1, -1)  # every query also sees the key after each of its own
    leaking = with_grads(
        lambda q, k, v, bias: naive(q, k, v, wrong_mask), q.double(), k.double(), v.double(), d_out
    )
    good = getattr(baseline, name)
    assert over_budget(good, good, getattr(want, name)) is None
    for bad in (torch.zeros_like(good), good.roll(1, 2), getattr(leaking, name), good * torch.nan):
        assert over_budget(bad, good, getattr(want, name)) is not None


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_lse_is_natural_log_in_float32(engine, dtype):
    """The log-sum-exp is float32 whatever the inputs: its error is that of naive float32 over the same inputs."""
    q, k, v = qkv(heads=4, kv_heads=2, n_q=150, d=16, dtype=dtype)
    made = plan(cases(["sink-window"])[0].values[0], q.double(), k.double(), mask="causal")
    want = exact(q, k, v, grid(made, 1, 4, 150, 150))
    run = run_or_refuse(engine, q, k, v, made, return_lse=True)
    if run is None:
        return
    lse = run(q, k, v, None).lse
    scores = (q.float() @ k.float().repeat_interleave(2, 1).mT) * 16**-0.5
    baseline = scores.masked_fill(~grid(made, 1, 4, 150, 150), -torch.inf).logsumexp(-1)
    assert lse.dtype == torch.float32
    assert over_budget(lse, baseline, want.lse) is None


@pytest.mark.parametrize("name", FIELDS)
def test_the_rounding_bound_notices_zeros_shifts_wrong_masks_and_one_wrong_element(name):
    """The bound that all other conformance tests use, in float64."""
    q, k, v = qkv(b=2, heads=4, kv_heads=2, n_q=150, d=16)
    seen = torch.ones(150, 150, dtype=torch.bool).tril()
    want = exact(q, k, v, seen)
    good = getattr(want, name)
    want.check({name: good}, torch.float64)
    leaking = getattr(exact(q, k, v, seen | seen.roll(1, -1)), name)
    one_wrong = good.clone()
    one_wrong[1, 1, 77, 3] += 1e-9 * good.abs().max()
    for bad in (torch.zeros_like(good), good.roll(1, 2), leaking, good * torch.nan, one_wrong, good.float()):
        with pytest.raises(AssertionError, match=f"{name}: .* wrong"):
            want.check({name: bad}, torch.float64)
    with pytest.raises(AssertionError, match=f"{name}: shape"):
        want.check({name: good[:, :, 1:]}, torch.float64)
