"""Conformance 5, second half: the future never leaks. Later tokens change, earlier outputs stay bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tilewise
from tests.conformance.common import ENGINES, cases, grid, qkv, run_or_refuse
from tilewise.attention import Centroid, Mass, MeanPool, Own, Plan, Tiles, TopK, TrueMass, plan
from tilewise.tiles import BlockCausal, Causal, Window

TILE = 64  # every tile side of the small settings divides it


def _cuts(method, n: int) -> list[int]:
    """How many leading tokens to hold fixed, as far as the method says that it looks."""
    return [TILE, n - n % TILE] if method.lookahead == "tile" else [1, 17, TILE, n - 1]


def _changed(x: Tensor, first: int) -> Tensor:
    """Another sequence from token `first` on, with values far larger than any seen before."""
    x = x.clone()
    x[:, :, first:] = 50 * torch.randn_like(x[:, :, first:])
    return x


def _leaks(run, q: Tensor, k: Tensor, v: Tensor, first: int) -> bool:
    before = run(q, k, v, None)[:, :, :first]
    after = run(*(_changed(x, first) for x in (q, k, v)), None)[:, :, :first]
    return not torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", cases())
@pytest.mark.parametrize("n", [97, 700])  # 700: more tiles in a row than are padded one by one
def test_future_never_leaks(method, engine, dtype, n):
    q, k, v = qkv(b=1, heads=4, kv_heads=2, n_q=n, dtype=dtype)
    chosen = plan(method, q, k, mask="causal") if method.lookahead == "prompt" else method
    options = {} if isinstance(chosen, Plan) else {"mask": "causal"}
    run = run_or_refuse(engine, q, k, v, chosen, **options)
    if run is None:
        return
    for first in _cuts(method, n):
        assert not _leaks(run, q, k, v, first), f"tokens from {first} on change earlier outputs"


@pytest.mark.parametrize("method", cases())
def test_future_does_not_change_gradients_of_the_past(method):
    """The gradient that later outputs send back aside, earlier inputs get the same gradient bit for bit."""
    n = 97
    q, k, v = qkv(heads=4, kv_heads=2, n_q=n, dtype=torch.float32)
    chosen = plan(method, q, k, mask="causal") if method.lookahead == "prompt" else method
    options = {} if isinstance(chosen, Plan) else {"mask": "causal"}
    first = TILE

    def gradient(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = tilewise.attend(*leaves, chosen, engine="torch", **options)
        return torch.autograd.grad(out[:, :, :first].square().sum(), leaves)

    for before, after in zip(gradient(q, k, v), gradient(*(_changed(x, first) for x in (q, k, v)))):
        assert torch.equal(before[:, :, :first], after[:, :, :first])
        assert (before[:, :, first:] == 0).all() and (after[:, :, first:] == 0).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_leaking_mask_is_caught(engine):
    q, k, v = qkv(n_q=97, dtype=torch.float32)
    run = run_or_refuse(engine, q, k, v, "dense", mask=BlockCausal(8), return_lse=True)
    if run is None:
        run = run_or_refuse(engine, q, k, v, "dense", mask=None)
        assert _leaks(run, q, k, v, 17)
        return
    run = run_or_refuse(engine, q, k, v, "dense", mask=BlockCausal(8))
    assert _leaks(run, q, k, v, 17)
    assert not _leaks(run, q, k, v, 16)  # a border of the blocks


@pytest.mark.parametrize("method", cases(["pbs", "sorted queries"]))
def test_a_method_that_looks_at_the_prompt_says_so_for_a_reason(method):
    """Its choice does change with later tokens; the check above would see it if the plan were not held fixed."""
    assert method.lookahead == "prompt"
    q, k, v = qkv(n_q=256, dtype=torch.float32)
    run = run_or_refuse("torch", q, k, v, method, mask="causal")
    assert any(_leaks(run, q, k, v, first) for first in (200, 224, 240))


def test_a_method_that_looks_at_its_tile_says_so_for_a_reason():
    (method,) = (case.values[0] for case in cases(["xattention"]))
    assert method.lookahead == "tile"
    q, k, v = qkv(n_q=512, d=4, dtype=torch.float32)
    run = run_or_refuse("torch", q, k, v, method, mask="causal")
    assert any(_leaks(run, q, k, v, first) for first in range(500, 512))


ROUTED_ALONE = {
    "centroid": Tiles(score=Centroid(), select=TopK(2), tile=(1, 16)),
    "centroid, own block": Tiles(score=Centroid(), select=TopK(2), tile=(1, 16), always=(Own(),)),
    "pooled mass": Tiles(score=MeanPool(), select=Mass(0.5), tile=(1, 16)),
    "pooled mass, own block": Tiles(score=MeanPool(), select=Mass(0.5), tile=(1, 16), always=(Own(),)),
    "pooled mass, own block apart": Tiles(
        score=MeanPool(), select=Mass(0.5), tile=(1, 16), always=(Own(),), compare_forced=False
    ),
    "true mass": Tiles(score=TrueMass(), select=Mass(0.5), tile=(1, 16)),
}


@pytest.mark.parametrize("method", ROUTED_ALONE.values(), ids=ROUTED_ALONE)
def test_choice_depends_on_later_tokens_no_further_than_declared(method):
    """Tiles one query high: what `lookahead` says must hold for the choice itself."""
    n = 96
    q, k, _ = qkv(n_q=n, dtype=torch.float32)
    before = grid(plan(method, q, k, mask="causal"), 1, 2, n, n)
    if method.lookahead == "none":
        cuts = range(1, n)
    else:
        assert method.lookahead == "tile"
        cuts = range(16, n, 16)
    for first in cuts:
        after = grid(plan(method, _changed(q, first), _changed(k, first), mask="causal"), 1, 2, n, n)
        assert torch.equal(before[:, :, :first], after[:, :, :first]), f"choice before {first} changed"


@pytest.mark.parametrize("tile", [(32, 32), (4, 32), (1, 32)], ids=str)
def test_rows_do_not_depend_on_what_other_rows_chose(tile):
    """The engine behind the checks above: a row's result is bit for bit its own, whatever other rows pay for."""
    from tilewise.attention import attend_tiles
    from tilewise.tiles import TileMap

    n, mask = 32 * 24, Causal() & Window(None, None)
    q, k, v = qkv(heads=1, n_q=n, dtype=torch.float32)
    rows = -(-n // tile[0])
    one = torch.rand(1, 1, rows, 24) > 0.5
    one |= torch.arange(24) == 0
    held = torch.rand(rows) > 0.5
    expected = attend_tiles(q, k, v, TileMap.from_mask(one, tile), mask=mask, engine="torch")
    for share in (0.0, 0.1, 0.9, 1.0):
        other = torch.where(held.view(-1, 1), one, torch.rand(1, 1, rows, 24) < share)
        got = attend_tiles(q, k, v, TileMap.from_mask(other, tile), mask=mask, engine="torch")
        same = held.repeat_interleave(tile[0])[:n]
        assert torch.equal(got[:, :, same], expected[:, :, same]), f"others at density {share}"
