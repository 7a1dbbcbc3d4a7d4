"""Conformance 5, first half: at full density every method is dense attention, to rounding."""

from __future__ import annotations

import pytest
import torch

from tests.conformance.common import ENGINES, FULL, exact, grid, qkv, run_or_refuse, with_grads
from tilewise.attention import plan
from tilewise.tiles import Causal, Documents, Padding, Prefix, Window

MASKS = {
    "none": None,
    "causal": "causal",
    "window": Causal() & Window(40, None),
    "documents": Causal() & Documents(torch.tensor([0, 30, 30, 130])),
    "padding": Causal() & Padding(torch.arange(130).ge(torch.tensor([[13], [40]]))),
    "prefix": Prefix(20),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", FULL.values(), ids=FULL)
def test_full_density_is_dense(method, engine, mask):
    q, k, v = qkv(b=2, heads=4, kv_heads=2, n_q=130)
    d_out = torch.randn_like(q)
    dense, made = plan("dense", q, k, mask=mask), plan(method, q, k, mask=mask)
    visible = grid(dense, 2, 4, 130, 130)
    assert torch.equal(grid(made, 2, 4, 130, 130), visible)
    run = run_or_refuse(engine, q, k, v, method, mask=mask)
    if run is None:
        return
    exact(q, k, v, visible, d_out).check(with_grads(run, q, k, v, d_out))


def test_density_counts_tiles():
    """Scores in computed tiles over scores in visible tiles of 128 x 128."""
    from tilewise.attention import MoBA, XAttention

    q, k, _ = qkv(n_q=512)
    assert plan("dense", q, k, mask="causal").density == 1
    own_tile_only = plan(MoBA(block=128, top_k=1), q, k, mask="causal")
    assert own_tile_only.density == pytest.approx(4 / 10)  # 4 of the 10 visible tiles
    assert plan(XAttention(threshold=1.0), q, k, mask="causal").density == 1
    by_head = plan(XAttention(threshold=1e-6), q, k, mask="causal").density_by_head()
    # First and diagonal tiles: 1 + 2 + 2 + 2 of 10, in every head.
    assert torch.allclose(by_head, torch.full_like(by_head, 0.7))
