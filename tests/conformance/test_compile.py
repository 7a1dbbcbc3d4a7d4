"""Conformance 9: whole graphs under torch.compile, equal to eager, few recompilations; operator registrations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import tilewise
from tests.conformance.common import ENGINES, METHODS, cases, qkv
from tilewise.attention import attend_tiles, plan
from tilewise.kernels.attend_tiles import op
from tilewise.tiles import Causal, Documents, Padding, TileMap, Tiling, Visibility, Window

LENGTHS = (64, 80, 97, 100, 130, 160, 200, 257, 300, 512)


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.undo()  # the poisoned `torch.empty` is Python, which the compiler would trace
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _equal_to_eager(function, inputs) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in inputs]
    for want, got in zip(function(*leaves), compiled(*leaves)):
        assert torch.equal(want, got)
        d_out = torch.randn_like(want)
        eager = torch.autograd.grad(want, leaves, d_out, retain_graph=True)
        for expected, gradient in zip(eager, torch.autograd.grad(got, leaves, d_out, retain_graph=True)):
            assert torch.equal(expected, gradient)


@pytest.mark.parametrize("method", cases())
@pytest.mark.parametrize("grouped", [False, True], ids=["", "grouped"])
def test_compiled_equals_eager(method, grouped):
    q, k, v = qkv(heads=4, kv_heads=2 if grouped else 4, n_q=97, dtype=torch.float32)
    _equal_to_eager(lambda *x: (tilewise.attend(*x, method, mask="causal"),), (q, k, v))


@pytest.mark.parametrize("name", [None, *METHODS])
def test_compiled_by_name(name):
    """Names are looked up, and methods made, inside the graph."""
    q, k, v = qkv(heads=2, n_q=257, dtype=torch.float32)
    _equal_to_eager(lambda *x: (tilewise.attend(*x, name, mask="causal"),), (q, k, v))


def test_compiled_with_a_method_made_inside():
    from tilewise.attention import MoBA, PBSAttention, SinkWindow, XAttention

    q, k, v = qkv(heads=2, n_q=97, dtype=torch.float32)

    def function(*inputs):
        made = (MoBA(16, 2), XAttention(4, 0.5, 32), PBSAttention(64, 0.5, 32), SinkWindow(2, 9))
        return tuple(tilewise.attend(*inputs, method, mask="causal") for method in made)

    _equal_to_eager(function, (q, k, v))


def test_compiled_equals_eager_with_everything_else():
    q, k, v = qkv(b=2, heads=2, n_q=97, dtype=torch.float32)
    bias = torch.randn(1, 2, 97, 97)
    keep = torch.arange(97).ge(torch.tensor([[0], [30]]))
    made = plan("moba", q, k, mask="causal")
    tile_map = TileMap.from_mask(torch.rand(2, 2, 4, 4) > 0.3, (32, 32))

    def function(q, k, v, bias):
        mask = Causal() & Padding(keep) & Window(50, None)
        whole = tilewise.attend(q, k, v, mask=mask, bias=bias, softcap=5.0, return_lse=True, layout="bhnd")
        given = tilewise.attend(q, k, v, made, bias=bias)
        tiles = attend_tiles(q, k, v, tile_map, mask=Causal(), bias=bias)
        return whole.out, given, tiles

    _equal_to_eager(function, (q, k, v, bias))


def test_compiled_documents_made_outside():
    q, k, v = qkv(heads=2, n_q=97, dtype=torch.float32)
    documents = Documents(torch.tensor([0, 30, 30, 97]))
    _equal_to_eager(lambda *x: (tilewise.attend(*x, mask=documents),), (q, k, v))


@pytest.mark.parametrize("method", cases(METHODS))
def test_recompilations_over_ten_lengths(method):
    """At most two graphs: the first length, and one for all others."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(
        lambda q, k, v: tilewise.attend(q, k, v, method, mask="causal"), fullgraph=True, backend=counter
    )
    for n in LENGTHS:
        q, k, v = qkv(heads=4, kv_heads=2, n_q=n, dtype=torch.float32)
        assert torch.equal(compiled(q, k, v), tilewise.attend(q, k, v, method, mask="causal"))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("method", cases(METHODS))
def test_recompilations_while_decoding(method):
    if "decode" not in method.modes:
        with pytest.raises(ValueError, match="does not support decode"):
            tilewise.attend(*qkv(n_q=1, n_k=9), method, mask="causal")
        return
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(
        lambda q, k, v: tilewise.attend(q, k, v, method, mask="causal"), fullgraph=True, backend=counter
    )
    for n in LENGTHS:
        q, k, v = qkv(heads=4, kv_heads=2, n_q=1, n_k=n, dtype=torch.float32)
        assert torch.equal(compiled(q, k, v), tilewise.attend(q, k, v, method, mask="causal"))
    assert counter.frame_count <= 2


def _arguments(engine: str, dtype: torch.dtype):
    """Calls of the operator that between them give every optional tensor and leave every one out."""
    q, k, v = (x.requires_grad_() for x in qkv(b=2, heads=4, kv_heads=2, n_q=33, d_v=5, dtype=dtype))
    causal = Causal().bind(33, 33)
    bias = torch.randn(1, 4, 33, 33, dtype=dtype, requires_grad=True)
    column = torch.randn(1, 4, 1, 33, dtype=dtype, requires_grad=True)
    order = torch.stack([torch.randperm(33) for _ in range(8)]).view(2, 4, 33)
    dense = Visibility(causal.lo, causal.hi, causal.pos, causal.q_pos, torch.rand(2, 1, 33, 33) > 0.2)
    uneven = Tiling.from_bounds(torch.tensor([0, 5, 5, 20, 33]))
    even = TileMap.from_mask(torch.rand(2, 4, 3, 5) > 0.3, (16, 8))
    from tilewise.kernels.attend_tiles import Call

    yield Call(q, k, v, causal)
    yield Call(q, k, v, dense, even, order, order[:, :2], bias, 0.3, 2.0)
    yield Call(q, k, v, causal, TileMap(torch.rand(1, 1, 4, 4) > 0.3, uneven, uneven), bias=column)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("engine", [engine for engine in op.IMPLEMENTATIONS if engine in ENGINES])
def test_operator_registrations(engine, dtype):
    for call in _arguments(engine, dtype):
        arguments = (*op.pack(call), engine)
        torch.library.opcheck(torch.ops.tilewise.attend_tiles.default, arguments)
        with torch.no_grad():
            out, lse = torch.ops.tilewise.attend_tiles(*arguments)
            plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
            backward = (torch.randn_like(out), torch.randn_like(lse), out, lse, *plain)
            torch.library.opcheck(torch.ops.tilewise.attend_tiles_backward.default, backward)


def test_every_engine_that_computes_tiles_is_registered():
    assert "torch" in op.IMPLEMENTATIONS
    assert set(op.IMPLEMENTATIONS) <= set(tilewise.kernels.engines())
