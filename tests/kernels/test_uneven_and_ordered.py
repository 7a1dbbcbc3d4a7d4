"""Tile maps of any shape through the kernel: uneven tilings, orders, flat tiles, every way work is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise
from tests.conformance.common import (
    ENGINES,
    exact,
    grid,
    qkv,
    repeat,
    run_or_refuse,
    widest,
    with_grads,
)
from tilewise.attention import Pass, Plan, attend_tiles
from tilewise.kernels.attend_tiles import blocks
from tilewise.tiles import Causal, Documents, Everything, Padding, TileMap, Tiling, TokenMask, Window

B, HEADS, KV, N = 2, 4, 2, 61


def _random_bounds(n: int, tiles: int, *shape: int) -> torch.Tensor:
    """Bounds of so many tiles, some of them empty."""
    inner = torch.randint(0, n + 1, (*shape, tiles - 1)).sort(-1).values
    inner[..., 1] = inner[..., 0]  # at least one empty tile
    ends = torch.zeros(*shape, 1, dtype=torch.int64)
    return torch.cat([ends, inner, ends + n], -1)


def _check(plan: Plan, inputs, engine, bias=None, n_q=None, n_k=None) -> None:
    q, k, v = inputs
    d_out = torch.randn(*q.shape[:3], v.shape[3], dtype=torch.float64)
    seen = grid(plan, q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    run = run_or_refuse(engine, q, k, v, plan, bias=bias)
    if run is None:
        return
    exact(q, k, v, seen, d_out, bias).check(with_grads(run, q, k, v, d_out, bias))


def _plan(tile_map: TileMap, mask, q_order=None, k_order=None, n_q=N, n_k=N) -> Plan:
    view = mask.bind(n_q, n_k)
    return Plan((Pass(view, tile_map, q_order, k_order),), view)


UNEVEN = {
    "shared": ((1, 1), (1, 1)),
    "by batch": ((B, 1), (B, 1)),
    "queries by head": ((1, HEADS), (1, 1)),
    "keys by kv head": ((1, 1), (1, KV)),
    "both by head": ((B, HEADS), (B, KV)),
}
MASKS = {
    "everything": Everything(),
    "causal": Causal(),
    "padding": Causal() & Padding(torch.arange(N).ge(torch.tensor([[0], [23]]))),
    "boolean": TokenMask(torch.rand(B, HEADS, N, N, generator=torch.Generator().manual_seed(3)) > 0.3),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shapes", UNEVEN.values(), ids=UNEVEN)
def test_uneven_tilings(shapes, biased, mask, engine):
    """Tiles given by bounds, also per batch entry and head, empty ones among them."""
    inputs = qkv(B, HEADS, KV, N)
    q_tiling, k_tiling = (Tiling.from_bounds(bounds=_random_bounds(N, 6, *shape)) for shape in shapes)
    tile_map = TileMap(keep=torch.rand(B, HEADS, 6, 6) > 0.4, q_tiling=q_tiling, k_tiling=k_tiling)
    bias = torch.randn(1, HEADS, N, N, dtype=torch.float64) if biased else None
    _check(_plan(tile_map, mask), inputs, engine, bias)
    if biased:
        assert torch.equal(
            attend_tiles(*inputs, tile_map, mask=mask, bias=bias, engine="torch"),
            tilewise.attend(*inputs, _plan(tile_map, mask), bias=bias, engine="torch"),
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_bounds_of_one_axis_and_empty_sequences(engine):
    inputs = qkv(1, 2, 2, N)
    bounds = _random_bounds(N, 5)
    tile_map = TileMap(torch.rand(1, 1, 5, 4) > 0.3, Tiling.from_bounds(bounds), Tiling(16))
    _check(_plan(tile_map, Causal()), inputs, engine)
    none = Tiling.from_bounds(torch.tensor([0, 0, 0]))
    for n_q, n_k in ((0, 0), (0, 5), (5, 0)):
        q_tiling, k_tiling = none if not n_q else Tiling(2), none if not n_k else Tiling(2)
        keep = torch.ones(1, 1, q_tiling.count(n_q), k_tiling.count(n_k), dtype=torch.bool)
        plan = _plan(TileMap(keep, q_tiling, k_tiling), Everything(), n_q=n_q, n_k=n_k)
        _check(plan, qkv(1, 2, 2, n_q, n_k), engine)


def _orders(n: int, *shape: int) -> torch.Tensor:
    return torch.stack([torch.randperm(n) for _ in range(shape[0] * shape[1])]).view(*shape, n)


ORDERS = {
    "queries": (lambda: _orders(N, B, HEADS), lambda: None),
    "keys by kv head": (lambda: None, lambda: _orders(N, B, KV)),
    "shared keys": (lambda: None, lambda: _orders(N, 1, 1)),
    "both": (lambda: _orders(N, 1, HEADS), lambda: _orders(N, B, KV)),
    "shared both": (lambda: _orders(N, B, 1), lambda: _orders(N, 1, KV)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tile", [(32, 16), (4, 16), (1, 8)], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("orders", ORDERS.values(), ids=ORDERS)
def test_orders(orders, mask, tile, engine):
    """Tiles cut in permuted order; grouped heads, every mask, forward and backward."""
    inputs = qkv(B, HEADS, KV, N, d_v=5)
    q_order, k_order = (make() for make in orders)
    keep = torch.rand(B, HEADS, -(-N // tile[0]), -(-N // tile[1])) > 0.4
    plan = _plan(TileMap.from_mask(keep, tile), mask, q_order, k_order)
    _check(plan, inputs, engine)
    _check(plan, inputs, engine, bias=torch.randn(B, 1, N, 1, dtype=torch.float64))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_uneven_tiles_over_orders(engine, biased):
    """Clusters: tiles of different sizes over sorted tokens, different in every head."""
    inputs = qkv(B, HEADS, KV, N)
    q_tiling = Tiling.from_bounds(_random_bounds(N, 5, B, HEADS))
    k_tiling = Tiling.from_bounds(_random_bounds(N, 4, B, KV))
    tile_map = TileMap(torch.rand(B, HEADS, 5, 4) > 0.3, q_tiling, k_tiling)
    bias = torch.randn(B, HEADS, 1, N, dtype=torch.float64) if biased else None
    _check(_plan(tile_map, Causal(), _orders(N, B, HEADS), _orders(N, B, KV)), inputs, engine, bias)


# How the torch engine cuts its work: tiny limits force every streaming and splitting path.
LIMITS = {
    "one score at a time": {"SCORES": 1},
    "few scores": {"SCORES": 700},
    "few parts": {"PARTS": 1},
    "some parts": {"PARTS": 600},
    "small groups": {"GROUP": 3},
    "always by rows": {"TALL": 1},
    "always by columns": {"TALL": 10**6},
    "by rows, streamed": {"TALL": 1, "SCORES": 50},
    "by columns, split": {"TALL": 10**6, "SCORES": 50, "PARTS": 1, "GROUP": 5},
}


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("tile", [(32, 16), (1, 8)], ids=str)
@pytest.mark.parametrize(
    "mask", [Causal(), MASKS["boolean"], Causal() & Window(9, None)], ids=["causal", "boolean", "window"]
)
def test_every_way_of_cutting_the_work(limits, tile, mask, monkeypatch):
    inputs = qkv(B, HEADS, KV, N)
    keep = torch.rand(B, HEADS, -(-N // tile[0]), -(-N // tile[1])) > 0.2
    plan = _plan(TileMap.from_mask(keep, tile), mask, None, _orders(N, B, KV))
    bias = torch.randn(1, HEADS, N, N, dtype=torch.float64)
    for name, value in limits.items():
        monkeypatch.setattr(blocks, name, value)
    _check(plan, inputs, "torch")
    _check(plan, inputs, "torch", bias)


@pytest.mark.parametrize("low", [-100.0, -1e4, 1e4])
@pytest.mark.parametrize("limits", [{}, {"SCORES": 1}, {"TALL": 10**6}, {"TALL": 10**6, "PARTS": 1}], ids=str)
def test_rows_whose_scores_are_all_far_from_zero(low, limits, monkeypatch):
    """A tile in which a row sees nothing must not drown the others, however small their scores are."""
    q, k, v = qkv(1, 1, 1, 64, dtype=torch.float32)
    seen = torch.ones(64, 64, dtype=torch.bool)
    seen[:, :32] = False
    seen[0, 0] = True  # the left tile is not empty, but all of its other rows are
    bias = torch.full((1, 1, 64, 64), low)
    for name, value in limits.items():
        monkeypatch.setattr(blocks, name, value)
    keep = TileMap.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), (32, 32))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    result = attend_tiles(*inputs, keep, mask=seen, bias=bias, engine="torch", return_lse=True)
    gradients = torch.autograd.grad(result.out, inputs, torch.ones_like(result.out))
    assert result.lse.isfinite().all()
    want = exact(q, k, v, seen, bias=bias.double())
    want.check(dict(zip(("out", "dq", "dk", "dv"), (result.out.detach(), *gradients))), torch.float32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    n=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    tile=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    share=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    limits=st.sampled_from(list(LIMITS.values()) + [{}]),
    causal=st.booleans(),
)
def test_any_tile_map(seed, n, tile, share, groups, limits, causal):
    torch.manual_seed(seed)
    (n_q, n_k), (heads, kv_heads) = n, groups
    inputs = qkv(1, heads, kv_heads, n_q, n_k, d=4, seed=seed)
    keep = torch.rand(1, heads, -(-n_q // tile[0]), -(-n_k // tile[1])) < share
    plan = _plan(TileMap.from_mask(keep, tile), Causal() if causal else Everything(), n_q=n_q, n_k=n_k)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(blocks, name, value)
        _check(plan, inputs, "torch")


@pytest.mark.parametrize("engine", ENGINES)
def test_tiles_hidden_by_the_mask_are_never_computed_whatever_the_map_says(engine):
    inputs = qkv(1, 2, 2, 64)
    everything = TileMap.from_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool), (16, 16))
    mask = Causal() & Documents(torch.tensor([0, 20, 64]))
    _check(_plan(everything, mask, n_q=64, n_k=64), inputs, engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("n", [0, 1, 40])
def test_an_empty_map_gives_nothing(engine, n):
    inputs = [x.requires_grad_() for x in qkv(1, 2, 1, n, dtype=widest(engine))]
    tiles = -(-n // 16)
    tile_map = TileMap.from_mask(torch.zeros(1, 1, tiles, tiles, dtype=torch.bool), (16, 16))
    if run_or_refuse(engine, *inputs, _plan(tile_map, Causal(), n_q=n, n_k=n)) is None:
        return
    out, lse = attend_tiles(*inputs, tile_map, mask="causal", engine=engine, return_lse=True)
    assert out.shape == (1, 2, n, 8) and (out == 0).all() and (lse == -torch.inf).all()
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert (gradient == 0).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_maps_and_masks_broadcast_over_batch_and_heads(engine):
    inputs = qkv(B, HEADS, KV, N)
    for keep_shape in ((1, 1), (B, 1), (1, HEADS), (B, HEADS)):
        for mask_shape in ((1, 1), (B, 1), (1, HEADS), (B, HEADS)):
            keep = torch.rand(*keep_shape, 4, 4) > 0.4
            mask = TokenMask(torch.rand(*mask_shape, N, N) > 0.2)
            _check(_plan(TileMap.from_mask(keep, (16, 16)), mask), inputs, engine)


@pytest.mark.parametrize("head_dim", [1, 3, 80, 256, 512])
@pytest.mark.parametrize("engine", ENGINES)
def test_head_dims(engine, head_dim):
    inputs = qkv(1, 2, 1, 33, d=head_dim, d_v=max(1, head_dim // 2))
    tile_map = TileMap.from_mask(torch.rand(1, 2, 3, 3) > 0.3, (16, 16))
    _check(_plan(tile_map, Causal(), n_q=33, n_k=33), inputs, engine)
    view = Causal().bind(33, 33)
    _check(Plan((Pass(view),), view), inputs, engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap_is_applied_before_the_bias(engine, softcap):
    q, k, v = qkv(1, 2, 1, 33)
    bias = torch.randn(1, 1, 33, 33, dtype=torch.float64)
    run = run_or_refuse(engine, q, k, v, None, bias=bias, softcap=softcap, mask="causal")
    if run is None:
        return
    inputs = [x.requires_grad_() for x in (q, k, v, bias)]

    def formula(q, k, v, bias):
        scores = softcap * torch.tanh(q @ repeat(k, 2).mT * 8**-0.5 / softcap) + bias
        return scores.masked_fill(~torch.ones(33, 33).tril().bool(), -torch.inf).softmax(-1) @ repeat(v, 2)

    want = formula(*inputs)
    got = run(*inputs)
    d_out = torch.randn_like(want)
    # The cap and its slope are at most 1 times what goes in, so the rounding of the uncapped scores bounds it.
    uncapped = exact(q, k, v, torch.ones(33, 33).tril().bool(), d_out, bias)
    for name, one, other in zip(
        ("out", "dq", "dk", "dv", "dbias"),
        (want, *torch.autograd.grad(want, inputs, d_out)),
        (got, *torch.autograd.grad(got, inputs, d_out)),
    ):
        allowed = 8 * torch.finfo(got.dtype).eps * uncapped.rounding[name].max()
        assert float((one - other).detach().abs().max()) <= float(allowed), name
