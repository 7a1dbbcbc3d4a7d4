"""Neighborhood attention: its definition query by query, boxes against rows, further tokens, modes, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tilewise
from tests.conformance.common import ENGINES, exact, qkv, run_or_refuse, with_grads
from tests.conformance.test_memory import allocations
from tests.tiles.test_grid import SETTINGS, by_loops
from tilewise.attention import XAttention, attend, plan
from tilewise.attention.recipes.neighborhood import NeighborhoodAttention
from tilewise.tiles import NONE, Causal, Padding, Tiling
from tilewise.tiles.grid import Neighborhood, grid_axes


def seen_by(method: NeighborhoodAttention) -> Tensor:
    """Bool `[N, N]` by loops; extra tokens see and are seen by all."""
    n = method.extra + math.prod(method.grid)
    seen = torch.ones(n, n, dtype=torch.bool)
    seen[method.extra :, method.extra :] = by_loops(method.mask.axes())
    return seen


def one_by_one(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of every query to the keys it sees, one query at a time: out and log-sum-exp."""
    b, heads, n, d = q.shape
    group = heads // k.shape[1]
    out, lse = [], []
    for i in range(b):
        for h in range(heads):
            for token in range(n):
                keys = seen[token].nonzero().flatten()
                scores = k[i, h // group, keys] @ q[i, h, token] / math.sqrt(d)
                out.append(scores.softmax(0) @ v[i, h // group, keys])
                lse.append(scores.logsumexp(0))
    return torch.stack(out).view(b, heads, n, -1), torch.stack(lse).view(b, heads, n)


@pytest.mark.evidence
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_definition(name, extra):
    """Output, log-sum-exp and gradients are those of a loop over queries, grouped heads, to float64 rounding.

    Control: windows cut at the borders rather than shifted give another answer wherever a border is shifted.
    """
    method = NeighborhoodAttention(*SETTINGS[name], extra=extra, tile=None)
    n = extra + math.prod(method.grid)
    inputs = [x.requires_grad_() for x in qkv(heads=4, kv_heads=2, n_q=n)]
    d_out, d_lse = torch.randn(1, 4, n, 8, dtype=torch.float64), torch.randn(1, 4, n, dtype=torch.float64)
    got, want = attend(*inputs, method, return_lse=True), one_by_one(*inputs, seen_by(method))
    torch.testing.assert_close(tuple(got), want, rtol=1e-10, atol=1e-12)
    grads = (torch.autograd.grad(x, inputs, (d_out, d_lse)) for x in (got, want))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-11)
    shifting = [a for a in method.mask.axes() if a.hides and not a.causal and a.stride < a.window]
    if shifting and not extra:
        clipped = one_by_one(*inputs, cut_at_borders(method))[0]
        assert (got.out - clipped).abs().max() > 0.01


def cut_at_borders(method: NeighborhoodAttention) -> Tensor:
    """The windows as they would be without shifting: smaller at the borders."""
    far = 5 * max(method.grid)
    wide = [(far + axis.length, axis) for axis in method.mask.axes()]
    rows = torch.ones(1, 1, dtype=torch.bool)
    for length, axis in wide:
        start = far // 2 // (axis.dilation * axis.stride) * axis.dilation * axis.stride
        big = by_loops((type(axis)(length, axis.window, axis.dilation, axis.causal, axis.stride),))
        one = big[start : start + axis.length, start : start + axis.length]
        rows = (rows[:, None, :, None] & one[None, :, None, :]).flatten(2).flatten(0, 1)
    return rows


def live(mask: Neighborhood, order: Tensor | None, tiling: Tiling) -> int:
    n = math.prod(mask.grid)
    view = mask.bind(n, n).permute(order, order)
    return int((view.tiles(tiling, tiling) != NONE).sum())


@pytest.mark.evidence
@pytest.mark.parametrize(
    ("setting", "most"),
    [(((96, 96), 25), 2 / 3), (((16, 32, 32), 9), 2 / 3), (((64, 64), 9, 4), 1 / 4)],
    ids=["image", "video", "dilated image"],
)
def test_boxes_need_fewer_tiles_than_rows(setting, most):
    """Of tiles of 128 tokens, boxes reach less than the share `most` of what row-major tiles reach; same answer.

    Control: not any order will do, tiles of random tokens reach more than rows.
    """
    method = NeighborhoodAttention(*setting)
    blocks, n = method.blocks(), math.prod(method.grid)
    assert blocks.volume == 128 and blocks.even
    order = blocks.order().view(1, 1, -1)
    boxes, rows = live(method.mask, order, blocks.tiling()), live(method.mask, None, Tiling(128))
    assert boxes < most * rows, (blocks.tile, boxes, rows)
    anyhow = torch.randperm(n, generator=torch.Generator().manual_seed(0)).view(1, 1, -1)
    assert live(method.mask, anyhow, Tiling(128)) > rows
    q, k, v = qkv(heads=1, n_q=n, d=8, dtype=torch.float32)
    made = plan(method, q, k)
    assert float(made.passes[0].cost()) == boxes * 128 * 128, "the tiles counted are those computed"
    torch.testing.assert_close(attend(q, k, v, made), attend(q, k, v, mask=method.mask))


@pytest.mark.evidence
def test_memory_does_not_grow_with_the_square():
    """The largest tensor, forward and backward, at twice the tokens is twice as large; nothing is N x N.

    Control: the definition, which makes the scores, does take four times as much, and more than N x N bytes.
    """

    def largest(side: int, engine: str) -> int:
        method = NeighborhoodAttention((side, 64), (9, 13))
        inputs = [x.requires_grad_() for x in qkv(heads=1, n_q=64 * side, d=8, dtype=torch.float32)]

        def both():
            torch.autograd.grad(attend(*inputs, method, engine=engine).sum(), inputs)

        return allocations(both)[0]

    n = 128 * 64
    assert largest(128, "torch") <= 2.2 * largest(64, "torch") and largest(128, "torch") < 4 * n * n / 16
    assert largest(32, "definition") > 3.8 * largest(16, "definition") > (16 * 64) ** 2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["image, dilated", "video", "line, strided"])
def test_every_engine(engine, name):
    method = NeighborhoodAttention(*SETTINGS[name], extra=2)
    n = 2 + math.prod(method.grid)
    q, k, v = qkv(b=2, heads=4, kv_heads=2, n_q=n)
    run = run_or_refuse(engine, q, k, v, method)
    if run is not None:
        d_out = torch.randn_like(q)
        exact(q, k, v, seen_by(method), d_out).check(with_grads(run, q, k, v, d_out))


def test_additional_keys():
    """Queries of the grid alone: NATTEN's additional keys, one softmax over neighbours and them."""
    method = NeighborhoodAttention((4, 5), 3, extra=6)
    q, k, v = qkv(heads=2, n_q=20, n_k=26)
    exact(q, k, v, seen_by(method)[6:]).check({"out": attend(q, k, v, method)})
    neighbours = attend(q, k[:, :, 6:], v[:, :, 6:], NeighborhoodAttention((4, 5), 3), return_lse=True)
    others = attend(q, k[:, :, :6], v[:, :, :6], return_lse=True)
    torch.testing.assert_close(tilewise.tiles.merge([neighbours, others]).out, attend(q, k, v, method))


@pytest.mark.parametrize("n_q", [1, 7, 24, 25, 37, 49])
@pytest.mark.parametrize("tile", [None, (2, 2), (1, 100)])
def test_fewer_queries_are_the_last_tokens(n_q, tile):
    method = NeighborhoodAttention((6, 8), (3, 5), causal=(True, False), extra=1, tile=tile)
    q, k, v = qkv(heads=2, n_q=n_q, n_k=49)
    exact(q, k, v, seen_by(method)[-n_q:]).check({"out": attend(q, k, v, method)})


def test_smaller_boxes_of_keys_fit_more_closely():
    """Another box for keys changes the scores computed, not the answer."""
    same = NeighborhoodAttention((24, 24), 7, extra=2, tile=(8, 8))
    closer = NeighborhoodAttention((24, 24), 7, extra=2, tile=(8, 8), key_tile=(4, 5))
    q, k, v = qkv(n_q=578)
    torch.testing.assert_close(attend(q, k, v, closer), attend(q, k, v, same), rtol=1e-10, atol=1e-12)
    costs = [float(plan(method, q, k).passes[0].cost()) for method in (closer, same)]
    assert costs[0] < costs[1]


def test_no_queries():
    q, k, v = qkv(n_q=0, n_k=12)
    assert attend(q, k, v, NeighborhoodAttention((3, 4), 2)).shape == (1, 2, 0, 8)


def test_causal_axes_never_look_ahead():
    """With a causal first axis, later frames change nothing in earlier ones, bit for bit."""
    method = NeighborhoodAttention((5, 4, 4), 3, causal=(True, False, False))
    q, k, v = qkv(n_q=80, dtype=torch.float32)
    before = attend(q, k, v, method)
    for x in (q, k, v):
        x[:, :, 48:] = 1e3
    assert torch.equal(attend(q, k, v, method)[:, :, :48], before[:, :, :48])
    assert method.lookahead == "none"


def test_other_masks_hold_as_well():
    method = NeighborhoodAttention((5, 6), 3, extra=2)
    q, k, v = qkv(b=2, n_q=32)
    keep = torch.arange(32) >= torch.tensor([[0], [9]])
    seen = seen_by(method) & keep[:, None, None] & torch.ones(32, 32).tril().bool()
    got = attend(q, k, v, method, mask=Causal() & Padding(keep), return_lse=True)
    exact(q, k, v, seen).check({"out": got.out})
    assert (got.out[1, :, :9] == 0).all() and (got.lse[1, :, :9] == -torch.inf).all()


def test_a_bias_keeps_its_tokens():
    method = NeighborhoodAttention((5, 6), 3, extra=2)
    q, k, v = qkv(n_q=32)
    bias = torch.randn(1, 2, 32, 32, dtype=torch.float64)
    exact(q, k, v, seen_by(method), bias=bias).check({"out": attend(q, k, v, method, bias=bias)})


def test_a_window_over_everything_is_dense():
    q, k, v = qkv(n_q=30)
    method = NeighborhoodAttention((5, 6), (5, 6))
    assert torch.equal(attend(q, k, v, method), attend(q, k, v))
    assert plan(method, q, k).passes[0].tiles is None, "no order, no masks: the dense call"
    torch.testing.assert_close(
        attend(q, k, v, NeighborhoodAttention(grid=(30,), window=30, dilation=1, causal=True, stride=1)),
        attend(q, k, v, mask="causal"),
    )


def test_the_windows_are_a_mask_for_other_methods():
    q, k, v = qkv(n_q=64)
    mask = NeighborhoodAttention((8, 8), 3).mask
    full = XAttention(stride=4, threshold=1.0, tile=16)
    torch.testing.assert_close(attend(q, k, v, full, mask=mask), attend(q, k, v, mask=mask))


def test_density_is_that_of_the_tiles():
    q, k, _ = qkv(heads=1, n_q=4096)
    made = plan(NeighborhoodAttention((64, 64), 9, 4), q, k)
    assert made.density == 64 / 1024


def test_compiled_equals_eager(monkeypatch):
    monkeypatch.undo()  # the poisoned `torch.empty` is Python, which the compiler would trace
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in qkv(n_q=37, dtype=torch.float32)]

    def function(q, k, v):
        return attend(q, k, v, NeighborhoodAttention((5, 7), 3, extra=2, causal=(True, False)))

    want, got = function(*inputs), torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(want, got)
    grads = [torch.autograd.grad(x.sum(), inputs) for x in (want, got)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 9}, r"axis 0 of grid \(8, 8\): window \* dilation must not exceed the axis"),
        ({"window": 3, "dilation": (1, 3)}, r"axis 1 .*got 3 \* 3 on an axis of 8"),
        ({"window": 3, "stride": 4}, "stride must not exceed the window 3, got 4"),
        ({"window": 3, "extra": -1}, "extra must be an integer >= 0, got -1"),
        ({"window": 3, "tile": (8,)}, r"tile must be 2 integers >= 1, .*got \(8,\)"),
        ({"window": 3, "tile": (8, 0)}, "tile must be 2 integers >= 1"),
        ({"window": 3, "key_tile": (8,)}, "tile must be 2 integers >= 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention((8, 8), **options)


def test_bad_lengths():
    method = NeighborhoodAttention((8, 8), 3, extra=2)
    with pytest.raises(ValueError, match=r"grid \(8, 8\) with 2 extra tokens needs 66 keys, got 64"):
        attend(*qkv(n_q=64), method)
    with pytest.raises(ValueError, match="at most as many queries, got 70"):
        attend(*qkv(n_q=70, n_k=66), method)


def test_settings_are_reported():
    method = NeighborhoodAttention((8, 8), 3)
    assert method.parameters() == {
        "grid": (8, 8), "window": 3, "dilation": 1, "causal": False, "stride": 1, "extra": 0, "tile": None,
        "key_tile": None,
    }  # fmt: skip
    assert method.name == "" and grid_axes((8, 8), 3) == method.mask.axes()
