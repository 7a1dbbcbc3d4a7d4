"""Conformance 4: all strides are honoured, for K and V separately, and inputs stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tilewise
from tests.conformance.common import ENGINES, cases, exact, grid, qkv, run_or_refuse, widest
from tilewise.attention import plan

B, H, N, D = 2, 2, 97, 8


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _features_first(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def _fused(x: Tensor) -> Tensor:
    """A slice of a fused projection `[B, N, 3, H, D]`."""
    fused = torch.full((B, x.shape[2], 3, x.shape[1], D), torch.nan, dtype=x.dtype)
    fused[:, :, 1] = x.transpose(1, 2)
    return fused[:, :, 1].transpose(1, 2)


def _every_other(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:3], 2 * D), torch.nan, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def _offset(x: Tensor) -> Tensor:
    return torch.cat([torch.full((5,), torch.nan, dtype=x.dtype), x.flatten()])[5:].view(x.shape)


LAYOUTS = {f.__name__.strip("_"): f for f in (_transposed, _features_first, _fused, _every_other, _offset)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", cases())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, method, engine):
    q, k, v = qkv(b=B, heads=H, n_q=N, d=D)
    d_out = torch.randn_like(q)
    want = exact(q, k, v, grid(plan(method, q, k, mask="causal"), B, H, N, N), d_out)
    lay = LAYOUTS[layout]
    # V laid out otherwise than K.
    for x, y, z, g in (
        (lay(q), lay(k), v, d_out),
        (q, k, lay(v), lay(d_out)),
        (q, lay(k), _offset(v), d_out),
    ):
        made = plan(method, x, y, mask="causal")
        run = run_or_refuse(engine, x, y, z, made)
        if run is None:
            return
        inputs = [t.detach().requires_grad_() for t in (x, y, z)]
        out = run(*inputs, None)
        dq, dk, dv = torch.autograd.grad(out, inputs, g)
        want.check({"out": out.detach(), "dq": dq, "dk": dk, "dv": dv})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", cases())
def test_expanded_batch_and_heads(method, engine):
    q, k, v = qkv(b=1, heads=1, n_q=N, d=D, dtype=widest(engine))
    small = [x.clone().requires_grad_() for x in (q, k, v)]
    wide = [x.expand(B, H, N, D) for x in small]
    assert all(x.stride()[:2] == (0, 0) for x in wide)
    made = plan(method, *wide[:2], mask="causal")
    if run_or_refuse(engine, *wide, made) is None:
        return
    out = tilewise.attend(*wide, made, engine=engine)
    d_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, small, d_out)
    want = exact(*(x.expand(B, H, N, D) for x in (q, k, v)), grid(made, B, H, N, N), d_out)
    want.check({"out": out.detach()})
    for name, got in zip(("dq", "dk", "dv"), grads):
        for table in (want.__dict__, want.rounding):
            table[name] = table[name].sum((0, 1), keepdim=True)
        want.check({name: got}, q.dtype)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", cases())
def test_layout_bnhd_is_the_same_call(method, engine):
    q, k, v = qkv(b=B, heads=4, kv_heads=2, n_q=N, d=D, dtype=widest(engine))
    made = plan(method, q, k, mask="causal")
    if run_or_refuse(engine, q, k, v, made) is None:
        return
    want = tilewise.attend(q, k, v, made, engine=engine)
    rows_first = [x.transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(tilewise.attend(*rows_first, made, engine=engine, layout="bnhd"), want.transpose(1, 2))
    contiguous = [x.contiguous() for x in rows_first]
    out = tilewise.attend(*contiguous, made, engine=engine, layout="bnhd")
    assert out.shape == (B, N, 4, D)
    exact(q, k, v, grid(made, B, 4, N, N)).check({"out": out.transpose(1, 2)})


def test_layout_bnhd_lse_stays_per_head():
    q, k, v = qkv(b=B, heads=4, kv_heads=2, n_q=N, d=D)
    want = tilewise.attend(q, k, v, mask="causal", return_lse=True)
    got = tilewise.attend(
        *(x.transpose(1, 2) for x in (q, k, v)), mask="causal", return_lse=True, layout="bnhd"
    )
    assert got.out.shape == (B, N, 4, D) and torch.equal(got.lse, want.lse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", cases())
def test_inputs_are_unchanged(method, engine, dtype):
    """float32 and float64 are not widened, so the engine works on the caller's own memory."""
    if dtype == torch.float64:
        dtype = widest(engine)
    inputs = [x.requires_grad_() for x in qkv(n_q=64, d=D, dtype=dtype)]
    bias = torch.randn(1, 2, 64, 64, dtype=dtype, requires_grad=True)
    mask = torch.rand(64, 64) > 0.3
    for options in ({"mask": "causal"}, {"mask": mask, "bias": bias}, {"mask": mask, "softcap": 2.0}):
        tensors = [*inputs, bias, mask]
        before = [x.detach().clone() for x in tensors]
        if run_or_refuse(engine, *inputs, method, **options) is None:
            continue
        out = tilewise.attend(*inputs, method, engine=engine, **options)
        d_out = torch.ones_like(out)
        torch.autograd.grad(out, inputs, d_out)
        assert all(torch.equal(x, y) for x, y in zip(tensors, before)) and (d_out == 1).all()
