"""Conformance 3: grouped heads against explicit repetition, choices and gradients included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.conformance.common import ENGINES, cases, exact, grid, qkv, repeat, run_or_refuse, with_grads
from tilewise.attention import Pass, Plan, plan

HEADS = ((2, 2), (4, 2), (8, 2), (7, 1), (8, 1), (1, 1))
# Methods that choose per query head: repeating K must not change what they choose. The others sort keys once per
# kv head, from the mean over its query heads, which repetition changes; they are compared with the order given.
PER_QUERY_HEAD = (
    "dense", "moba", "pr-flash", "sink-window", "xattention", "quest", "spark", "vertical-slash", "flexprefill"
)  # fmt: skip


def _repeated(made: Plan, heads: int) -> Plan:
    """The plan for K and V repeated in memory: kv heads' key orders are repeated with them."""

    def one(p: Pass) -> Pass:
        if p.reads is not None:
            index = p.reads.index
            index = repeat(index, heads) if index.shape[1] > 1 else index.expand(-1, heads, *index.shape[2:])
            view = p.view if p.reads.by_query else replace(p.view, pos=repeat(p.view.pos, heads))
            return Pass(view, p.tiles, p.q_order, reads=replace(p.reads, index=index))
        return Pass(p.view, p.tiles, p.q_order, None if p.k_order is None else repeat(p.k_order, heads))

    return Plan(tuple(map(one, made.passes)), made.view)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", cases())
def test_equals_explicit_repetition(method, engine, heads, kv_heads):
    q, k, v = qkv(b=2, heads=heads, kv_heads=kv_heads, n_q=97)
    d_out = torch.randn_like(q)
    made = plan(method, q, k, mask="causal")
    run = run_or_refuse(engine, q, k, v, made)
    if run is None:
        return
    long = run_or_refuse(engine, q, repeat(k, heads), repeat(v, heads), _repeated(made, heads))
    assert long is not None
    got = with_grads(run, q, k, v, d_out)
    repeated = with_grads(long, q, repeat(k, heads).contiguous(), repeat(v, heads).contiguous(), d_out)
    want = exact(q, k, v, grid(made, 2, heads, 97, 97), d_out)
    want.check(got)
    summed = {
        name: getattr(repeated, name).unflatten(1, (kv_heads, heads // kv_heads)).sum(2)
        for name in ("dk", "dv")
    }
    want.check({"out": repeated.out, "dq": repeated.dq, **summed})


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("method", cases(PER_QUERY_HEAD))
def test_choice_equals_that_over_repeated_keys(method, heads, kv_heads):
    q, k, _ = qkv(b=2, heads=heads, kv_heads=kv_heads, n_q=161)
    grouped = grid(plan(method, q, k, mask="causal"), 2, heads, 161, 161)
    repeated = grid(plan(method, q, repeat(k, heads), mask="causal"), 2, heads, 161, 161)
    assert torch.equal(grouped, repeated)


@pytest.mark.parametrize("method", cases(["pbs", "sorted queries", "flat tiles, sorted"]))
def test_sorted_keys_have_one_order_per_kv_head(method):
    q, k, _ = qkv(b=2, heads=8, kv_heads=2, n_q=161)
    (one,) = plan(method, q, k, mask="causal").passes
    assert one.k_order.shape == (2, 2, 161)
    assert one.tiles.keep.shape[1] == 8
    # With equal query heads in a group the mean is each of them, and repetition changes nothing.
    q = q[:, ::4].repeat_interleave(4, 1)
    (one,) = plan(method, q, k, mask="causal").passes
    (alone,) = plan(method, q[:, ::4], k, mask="causal").passes
    assert torch.equal(one.k_order, alone.k_order)


def test_every_method_says_how_it_pools_a_group():
    from tests.conformance.common import METHODS

    assert set(METHODS) == {*PER_QUERY_HEAD, "pbs", "proxy-attn", "s2o", "hisa"}, (
        "say above what equality holds for the new method"
    )
