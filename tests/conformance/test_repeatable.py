"""The same call twice gives the same bits, with PyTorch's deterministic switch too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.conformance.common import ENGINES, cases, qkv, run_or_refuse, with_grads
from tilewise.attention import plan


@pytest.fixture(params=[False, True], ids=["", "deterministic"])
def switch(request) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", cases())
def test_same_bits_every_time(method, engine, switch):
    q, k, v = qkv(b=2, heads=4, kv_heads=2, n_q=130, dtype=torch.float32)
    d_out, bias = torch.randn_like(q), torch.randn(1, 4, 1, 130)
    for given in (None, bias):
        run = run_or_refuse(engine, q, k, v, method, mask="causal", bias=given)
        if run is None:
            continue
        first, *others = (with_grads(run, q, k, v, d_out, given) for _ in range(3))
        for other in others:
            for name in ("out", "dq", "dk", "dv", "dbias"):
                mine, yours = getattr(first, name), getattr(other, name)
                assert mine is yours is None or torch.equal(mine, yours), name


@pytest.mark.parametrize("method", cases())
def test_same_choice_every_time(method, switch):
    q, k, _ = qkv(heads=4, kv_heads=2, n_q=130, dtype=torch.float32)
    first, second = (plan(method, q, k, mask="causal") for _ in range(2))
    for one, other in zip(first.passes, second.passes):
        for a, b in ((one.q_order, other.q_order), (one.k_order, other.k_order)):
            assert a is b is None or torch.equal(a, b)
        assert one.tiles is other.tiles is None or torch.equal(one.tiles.keep, other.tiles.keep)
