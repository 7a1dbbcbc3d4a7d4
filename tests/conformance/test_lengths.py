"""Conformance 2: any lengths, forward and backward, mask and bias together; rows that see nothing."""

from __future__ import annotations

import pytest
import torch

import tilewise
from tests.conformance.common import (
    ENGINES,
    cases,
    exact,
    grid,
    methods,
    qkv,
    run_or_refuse,
    widest,
    with_grads,
)
from tilewise.attention import plan
from tilewise.attention.method import mode_of
from tilewise.tiles import Causal, Padding, TokenMask, Window

SHORT = (0, 1, 2, 15, 16, 17, 31, 33, 127, 128, 129)
LONG = (1000, 1025)
UNEQUAL = ((1, 40), (5, 33), (33, 5), (40, 1), (64, 129), (7, 0), (0, 7))


def _check(engine, method, n_q, n_k, mask, bias_shape=None, heads=2):
    q, k, v = qkv(heads=heads, kv_heads=1, n_q=n_q, n_k=n_k, d=8)
    generator = torch.Generator().manual_seed(n_q + n_k)
    d_out = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    bias = None if bias_shape is None else torch.randn(bias_shape, generator=generator, dtype=torch.float64)
    made = plan(method, q, k, mask=mask)
    run = run_or_refuse(engine, q, k, v, made, bias=bias, mask=None)
    if run is None:
        return False
    want = exact(q, k, v, grid(made, 1, heads, n_q, n_k), d_out, bias)
    want.check(with_grads(run, q, k, v, d_out, bias))
    return True


@pytest.mark.parametrize("n", SHORT)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", cases())
def test_every_length_with_mask_and_bias(method, engine, n):
    ran = _check(engine, method, n, n, "causal", bias_shape=(1, 2, n, n))
    assert ran or engine == "sdpa"


@pytest.mark.parametrize("n", LONG)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", cases(["moba", "xattention"]))
def test_long_lengths_with_mask_and_bias(method, engine, n):
    ran = _check(engine, method, n, n, Causal() & Window(900, None), bias_shape=(1, 1, n, n), heads=1)
    assert ran or engine == "sdpa"


@pytest.mark.parametrize("n", SHORT + LONG)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mask", [None, "causal"])
def test_every_length_dense(engine, n, mask):
    ran = _check(engine, "dense", n, n, mask)
    assert ran or n == 0


@pytest.mark.parametrize(("n_q", "n_k"), UNEQUAL)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", cases())
def test_unequal_lengths(method, engine, n_q, n_k):
    """Bottom-right aligned; a method whose modes leave this call out says which it supports."""
    if mode_of(n_q, n_k) not in method.modes:
        q, k, v = qkv(n_q=n_q, n_k=n_k)
        with pytest.raises(ValueError, match=f"does not support {mode_of(n_q, n_k)}.*supports .*prefill"):
            tilewise.attend(q, k, v, method, mask="causal", engine=engine)
        return
    ran = _check(engine, method, n_q, n_k, "causal", bias_shape=(n_k,))
    assert ran or engine == "sdpa"


def test_unequal_lengths_without_mask_on_every_engine():
    ran = {engine: _check(engine, "dense", 5, 33, None) for engine in ENGINES}
    assert all(ran.values())


EMPTY = {
    "left padding": Causal() & Padding(torch.arange(40).ge(17).unsqueeze(0)),
    "everything padded": Padding(torch.zeros(1, 40, dtype=torch.bool)),
    "boolean": TokenMask(torch.arange(40).remainder(3).gt(0).view(1, 1, 40, 1).expand(1, 2, 40, 40)),
}


@pytest.mark.parametrize("mask", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", cases())
def test_rows_that_see_nothing_through_two_layers(method, engine, mask):
    """Out 0, lse -inf, gradients 0 and never NaN, also where a layer's input is such a row."""
    dtype = widest(engine)
    x = torch.randn(1, 2, 40, 8, dtype=dtype, requires_grad=True)
    made = plan(method, x, x, mask=mask)
    if run_or_refuse(engine, x, x, x, made, return_lse=True) is None:
        return
    first = tilewise.attend(x, x, x, made, engine=engine, return_lse=True)
    second = tilewise.attend(first.out, first.out, first.out, made, engine=engine, return_lse=True)
    empty = ~grid(made, 1, 2, 40, 40).any(-1)
    assert empty.any()
    for layer in (first, second):
        assert (layer.out[empty] == 0).all() and (layer.lse[empty] == -torch.inf).all()
        assert layer.out.isfinite().all() and layer.lse[~empty].isfinite().all()
    (gradient,) = torch.autograd.grad(second.out.square().sum() + second.lse[~empty].sum(), x)
    assert gradient.isfinite().all()

    # A query that sees nothing has gradient exactly 0, and so have the keys that nobody sees.
    q, k, v = (torch.randn(1, 2, 40, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    made = plan(method, q, k, mask=mask)
    seen = grid(made, 1, 2, 40, 40)
    dq, dk, dv = torch.autograd.grad(tilewise.attend(q, k, v, made, engine=engine).sum(), (q, k, v))
    assert (dq[~seen.any(-1)] == 0).all()
    assert (dk[~seen.any(-2)] == 0).all() and (dv[~seen.any(-2)] == 0).all()
    assert (dv[seen.any(-2)] != 0).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_emptied_by_a_float_mask(engine):
    """-inf in an additive mask hides as False does, and the gradient of the bias is 0 there."""
    q, k, v = qkv(n_q=40)
    mask = torch.zeros(40, 40, dtype=torch.float64).masked_fill(
        torch.arange(40).remainder(3).eq(0), -torch.inf
    )
    mask[5:9] = -torch.inf
    bias = mask.clone().requires_grad_()
    run = run_or_refuse(engine, q, k, v, "dense", mask=bias, return_lse=True)
    if run is None:
        return
    result = run(q, k, v, None)
    assert (result.out[:, :, 5:9] == 0).all() and (result.lse[:, :, 5:9] == -torch.inf).all()
    exact(q, k, v, mask > -torch.inf).check({"out": result.out})
    (gradient,) = torch.autograd.grad(result.out.sum(), bias)
    assert gradient.isfinite().all() and (gradient[mask == -torch.inf] == 0).all()


def test_every_unnamed_method_is_tested_in_some_unequal_mode():
    assert {mode_of(*pair) for pair in UNEQUAL} == {"decode", "chunked prefill", "prefill"}
    assert all(set(m.modes) & {"prefill"} for m in methods().values())
