"""Partial results: the merge of any split is the whole; gradients flow through out and lse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise
from tests.conformance.common import ENGINES, exact, qkv, repeat, run_or_refuse, widest
from tilewise.attention import Pass, Plan, plan
from tilewise.tiles import Causal, Partial, TokenMask, merge

N = 24


def _part(q, k, v, columns, engine="torch", mask=None) -> Partial:
    """Attention over some of the keys, causal by true position."""
    seen = torch.arange(N).view(1, -1) <= torch.arange(N).view(-1, 1) if mask is None else mask
    return tilewise.attend(
        q, k[:, :, columns], v[:, :, columns], mask=seen[:, columns], engine=engine, return_lse=True
    )


def _same(one: Partial, other: Partial, *inputs) -> None:
    """Equal to rounding, where a merge weighs and adds once more for every part."""
    seen = torch.arange(N).view(1, -1) <= torch.arange(N).view(-1, 1)
    want = exact(*inputs, seen)
    for partial in (one, other):
        want.check({"out": partial.out}, slack=8)
    empty = one.lse == -torch.inf
    assert torch.equal(empty, other.lse == -torch.inf)
    # lse is a log of a sum of n exponentials: its error is that of a weight.
    d, size = inputs[0].shape[3], float(inputs[0].abs().max() * inputs[1].abs().max())
    allowed = torch.finfo(torch.float64).eps * 8 * (2 * d * size * d**0.5 + N + one.lse[~empty].abs().max())
    assert float((one.lse - other.lse)[~empty].abs().max()) <= float(allowed)


@st.composite
def splits(draw) -> list[list[int]]:
    """The keys shared out among one to six parts, some of which may be empty."""
    owner = draw(st.lists(st.integers(0, draw(st.integers(0, 5))), min_size=N, max_size=N))
    return [[i for i, o in enumerate(owner) if o == part] for part in range(max(owner) + 2)]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(split=splits(), heads=st.sampled_from([(2, 2), (4, 1)]))
@pytest.mark.parametrize("engine", ["torch", "definition"])
def test_merge_of_any_split_is_the_whole(engine, split, heads):
    q, k, v = qkv(heads=heads[0], kv_heads=heads[1], n_q=N)
    merged = merge([_part(q, k, v, columns, engine) for columns in split])
    _same(merged, _part(q, k, v, list(range(N)), engine), q, k, v)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(split=splits(), cut=st.integers(0, 6))
def test_merge_is_associative_and_commutative(split, cut):
    q, k, v = qkv(n_q=N)
    parts = [_part(q, k, v, columns) for columns in split]
    cut = min(cut, len(parts) - 1)
    whole = merge(parts)
    nested = merge([merge(parts[:cut]), merge(parts[cut:])]) if cut else merge([merge(parts[:1]), *parts[1:]])
    _same(nested, whole, q, k, v)
    _same(merge(parts[::-1]), whole, q, k, v)


def test_merge_with_empty_parts_changes_nothing():
    q, k, v = qkv(n_q=N)
    part = _part(q, k, v, list(range(N)))
    nothing = _part(q, k, v, [])
    assert (nothing.out == 0).all() and (nothing.lse == -torch.inf).all()
    for merged in (merge([part, nothing]), merge([nothing, part]), merge([nothing, part, nothing])):
        assert torch.equal(merged.out, part.out) and torch.equal(merged.lse, part.lse)
    both = merge([nothing, nothing])
    assert (both.out == 0).all() and (both.lse == -torch.inf).all()


def test_merge_of_one_is_itself_and_of_none_raises():
    part = Partial(out=torch.ones(1, 1, 2, 3), lse=torch.zeros(1, 1, 2))
    assert merge(partials=[part]) is part
    with pytest.raises(ValueError, match="at least one partial result, got none"):
        merge([])


@pytest.mark.parametrize("low", [-1e4, -200.0, 0.0, 200.0, 1e4])
def test_merge_of_very_large_and_very_small_scores(low):
    """Weights far apart neither overflow nor lose the larger one."""
    parts = [
        Partial(torch.full((1, 1, 2, 3), value), torch.full((1, 1, 2), low + lse))
        for value, lse in ((1.0, 0.0), (2.0, 0.0), (5.0, -300.0))
    ]
    merged = merge(parts)
    assert torch.equal(merged.out, torch.full((1, 1, 2, 3), 1.5))
    want = low + math.log(2)
    assert float((merged.lse - want).abs().max()) <= torch.finfo(torch.float32).eps * (abs(want) + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_merge_keeps_the_dtype_and_float32_lse(dtype):
    q, k, v = (x.to(dtype) for x in qkv(n_q=N))
    merged = merge([_part(q, k, v, [0, 1, 2]), _part(q, k, v, list(range(3, N)))])
    assert merged.out.dtype == dtype and merged.lse.dtype == torch.float32


def _leaves(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("bias_shape", [None, (1, 1, 1, 7), (2, 7, 7), (1, 2, 7, 1), (2, 1, 7, 7)], ids=str)
def test_gradients_through_out_lse_bias_and_softcap(engine, softcap, bias_shape):
    inputs = qkv(b=2, heads=2, kv_heads=1, n_q=7, d=3, d_v=2)
    bias = [] if bias_shape is None else [torch.randn(bias_shape, dtype=torch.float64)]
    options = {"mask": "causal", "softcap": softcap, "return_lse": True}
    run = run_or_refuse(engine, *inputs, None, bias=bias[0] if bias else None, scale=0.7, **options)
    if run is None:
        return

    def function(q, k, v, *bias):
        return tuple(run(q, k, v, bias[0] if bias else None))

    if widest(engine) == torch.float64:
        assert torch.autograd.gradcheck(function, _leaves(*inputs, *bias), fast_mode=True)
        return
    # Finite differences need float64: elsewhere the gradients are compared with those of the definition, which
    # passes the check above. Scores here are below 4 in size, so rounding stays within a few dozen units.
    results = []
    for name in (engine, "definition"):
        leaves = _leaves(*inputs, *bias)
        out, lse = run_or_refuse(name, *inputs, None, scale=0.7, **options)(*leaves[:3], (*leaves, None)[3])
        weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
        results.append(torch.autograd.grad((out * weights).sum() + (lse * weights[..., 0]).sum(), leaves))
    for got, want in zip(*results):
        allowed = 64 * torch.finfo(widest(engine)).eps * float(want.abs().max())
        assert float((got - want).abs().max()) <= allowed


@pytest.mark.parametrize(
    "mask", ["causal", None, TokenMask(torch.rand(7, 7, generator=torch.manual_seed(0)) > 0.5)]
)
def test_gradients_through_merge(mask):
    inputs = qkv(heads=2, kv_heads=1, n_q=7, d=3)

    def function(q, k, v):
        return tuple(merge([tilewise.attend(q, k, v, mask=mask, return_lse=True) for _ in range(2)]))

    if mask in ("causal", None):
        assert torch.autograd.gradcheck(function, _leaves(*inputs))
        return
    # Rows that no part covers: lse is -inf, which has no numerical derivative, and must send back zeros.
    q, k, v = _leaves(*inputs)
    result = merge([tilewise.attend(q, k, v, mask=mask, return_lse=True) for _ in range(2)])
    empty = ~mask.seen.any(1)
    gradients = torch.autograd.grad(result.out.sum() + result.lse[:, :, ~empty].sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients) and (gradients[0][:, :, empty] == 0).all()


def test_gradients_through_a_plan_of_two_passes():
    q, k, v = qkv(heads=4, kv_heads=2, n_q=9, d=3)
    made = plan(tilewise.attention.SinkWindow(sink=2, window=3), q, k, mask="causal")
    assert len(made.passes) == 2

    def function(q, k, v, bias):
        return tuple(tilewise.attend(q, k, v, made, bias=bias, return_lse=True))

    bias = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    assert torch.autograd.gradcheck(function, _leaves(q, k, v, bias), fast_mode=True)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(borders=st.lists(st.integers(0, N), max_size=4))
def test_passes_over_ranges_of_positions_are_the_whole(borders):
    """A plan's passes cut by key position, grouped heads, are one call."""
    q, k, v = qkv(heads=4, kv_heads=2, n_q=N)
    view = Causal().bind(N, N)
    edges = [0, *sorted(borders), N]
    passes = tuple(Pass(view.limit(lo=a, hi=b - 1)) for a, b in zip(edges, edges[1:]))
    merged = tilewise.attend(q, k, v, Plan(passes, view), return_lse=True)
    whole = tilewise.attend(q, k, v, mask="causal", return_lse=True)
    _same(merged, whole, q, k, v)
    assert repeat(k, 4).shape == q.shape
