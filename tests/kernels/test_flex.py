"""The FlexAttention engine: exact where it accepts, a reason where it does not, nothing of N x N, no warning."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance.common import exact, grid, naive, over_budget, qkv, repeat
from tests.conformance.test_memory import allocations
from tilewise.attention import Pass, Plan
from tilewise.kernels.attend_tiles import Call, flex
from tilewise.tiles import Causal, Everything, Mask, Padding, TileMap, Tiling, TokenMask, Window

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.undo()  # the poisoned `torch.empty` is Python, which the compiler would trace
    torch._dynamo.reset()
    flex._kernel.cache_clear()
    yield
    torch._dynamo.reset()
    flex._kernel.cache_clear()


def call(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, **options: Any) -> Call:
    view = (mask or Everything()).bind(q.shape[2], k.shape[2])
    return Call(q, k, v, view, scale=q.shape[3] ** -0.5, **{"need_lse": False, **options})


def seen_by(made: Call) -> Tensor:
    plan = Plan((Pass(made.view, made.tiles),), made.view)
    return grid(plan, made.q.shape[0], made.q.shape[1], made.q.shape[2], made.k.shape[2])


def inputs(*sizes: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return qkv(*sizes, **{"dtype": torch.float32, **options})


@functools.cache
def lacks() -> str | None:
    return flex.refuse(call(*inputs(1, 1, 1, 20)))


@pytest.fixture
def works() -> None:
    if reason := lacks():
        pytest.skip(f"FlexAttention {reason}")


class Sevens(Mask):
    """A mask on two axes: causal, and near in the remainder by seven."""

    def narrow(self, view):
        view = Causal().narrow(view)
        return view.with_axis(view.q_pos % 7 - 2, view.q_pos % 7 + 3, view.k_pos % 7)


def _maps() -> dict[str, Call]:
    """Between them: grouped heads, unequal lengths, values of another width, strides, maps, every kind of mask."""
    torch.manual_seed(0)
    whole = call(*inputs(2, 4, 2, 33, 150, d_v=5), Causal() & Window(100, None))
    tall = TileMap.from_mask(torch.rand(1, 4, 3, 9) > 0.5, (32, 16))
    fused = torch.randn(1, 71, 3, 4, 16)[:, 1:]
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    chosen = call(q, k, v, Sevens(), tiles=TileMap.from_mask(torch.rand(1, 1, 3, 3) > 0.3, (32, 32)))
    padded = Causal() & Padding(torch.arange(130).ge(torch.tensor([[0], [75]])))
    bias = torch.randn(1, 1, 70, 130)
    bias[:, :, 3], bias[:, :, 4, :100] = -torch.inf, -torch.inf
    both = call(*inputs(2, 4, 1, 70, 130), padded, tiles=tall, bias=bias)
    return {"whole": whole, "chosen tiles": chosen, "map, padding and bias": both}


@pytest.mark.slow
@pytest.mark.parametrize("made", _maps().values(), ids=_maps())
def test_exact_to_rounding(made, works):
    assert flex.refuse(made) is None
    out, lse = flex.run(made)
    want = exact(made.q, made.k, made.v, seen_by(made), bias=made.bias)
    want.check({"out": out}, torch.float32)
    assert lse is None
    empty = ~(seen_by(made) & (True if made.bias is None else made.bias > -torch.inf)).any(-1)
    assert (out[empty.expand(out.shape[:3])] == 0).all()


@pytest.mark.slow
def test_bfloat16_errs_at_most_twice_as_much_as_naive(works):
    made = call(*inputs(1, 4, 2, 140, d=16, dtype=torch.bfloat16), Causal())
    seen = seen_by(made)
    want = naive(made.q.double(), made.k.double(), made.v.double(), seen)
    assert over_budget(flex.run(made).out, naive(made.q, made.k, made.v, seen), want) is None


@pytest.mark.slow
def test_softcap_is_applied_before_the_bias(works):
    q, k, v = inputs(1, 2, 1, 33)
    bias = torch.randn(1, 2, 33, 33)
    got = flex.run(call(q, k, v, Causal(), bias=bias, softcap=0.5)).out
    scores = 0.5 * torch.tanh(q.double() @ repeat(k, 2).double().mT * 8**-0.5 / 0.5) + bias
    hidden = ~torch.ones(33, 33).tril().bool()
    want = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ repeat(v, 2).double()
    # The cap and its slope are at most 1, so the rounding of the uncapped scores bounds that of the capped.
    rounding = exact(q, k, v, ~hidden, bias=bias).rounding["out"].max()
    assert float((got - want).abs().max()) <= 8 * torch.finfo(torch.float32).eps * rounding


@pytest.mark.slow
def test_compiled_once_for_a_kind_of_call_and_without_n_by_n(works):
    n = 1024
    q, k, v = inputs(1, 1, 1, n)
    options = {"tiles": TileMap.from_mask(torch.rand(1, 1, 8, 8) > 0.5, (128, 128))}
    made = call(q, k, v, Causal(), bias=torch.randn(1, 1, 1, n), **options)
    flex.run(made)
    compiled = dict(torch._dynamo.utils.counters["stats"])
    other = dataclasses.replace(made, q=k, k=q, bias=torch.randn(1, 1, 1, n))
    assert allocations(lambda: flex.run(other))[0] < 4 * n * n // 8
    assert torch._dynamo.utils.counters["stats"] == compiled


def test_any_number_of_lengths(works, monkeypatch):
    """More kinds of call than the compiler gives one function; here it only traces."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for n in range(20, 32):
        made = call(*inputs(1, 1, 1, n), Causal())
        exact(made.q, made.k, made.v, seen_by(made)).check({"out": flex.run(made).out}, torch.float32)


@pytest.mark.slow
def test_no_warning_from_first_import_to_result(works):
    script = """
import torch
from tilewise.kernels.attend_tiles import Call, flex
from tilewise.tiles import Causal
q = torch.randn(1, 1, 20, 8)
flex.run(Call(q, q, q, Causal().bind(20, 20), need_lse=False))
"""
    path = os.pathsep.join(dict.fromkeys([*filter(None, sys.path), str(ROOT / "src")]))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""


def _refused() -> dict[str, tuple[Call, str]]:
    q, k, v = inputs(1, 2, 1, 20)
    order = torch.randperm(20).view(1, 1, 20)
    everything = TileMap.everything(20, 20, tile=(16, 16))
    flat = TileMap.everything(20, 20, tile=(4, 16))
    uneven = dataclasses.replace(everything, q_tiling=Tiling.from_bounds(torch.tensor([0, 4, 20])))
    positions = Causal().at(torch.arange(20), torch.arange(20).expand(1, 2, 20))
    return {
        "float64": (call(q.double(), k.double(), v.double()), "has no float64"),
        "nothing": (call(q[:, :, :0], k, v), "an empty sequence"),
        "pages": (call(q, k, v, pages=torch.zeros(1, 2, dtype=torch.int64)), "reads no pages"),
        "order of queries": (call(q, k, v, q_order=order), "tokens in another order"),
        "order of keys": (call(q, k, v, k_order=order), "tokens in another order"),
        "clusters": (call(q, k, v, tiles=uneven), "tiles differ in size"),
        "flat tiles": (call(q, k, v, tiles=flat), "lower than 16"),
        "grid": (call(q, k, v, TokenMask(torch.ones(20, 20, dtype=torch.bool))), "grid of N_q x N_k"),
        "positions": (call(q, k, v, positions), "positions of keys differ"),
        "bias": (
            call(q, k, v, bias=torch.randn(1, 1, 1, 20, requires_grad=True)),
            "gives the bias no gradient",
        ),
        "backward": (call(q, k.clone().requires_grad_(), v), "no backward pass on CPUs"),
        "lse": (call(q, k, v, need_lse=True), "no log-sum-exp on CPUs"),
    }


@pytest.mark.parametrize("made", _refused().values(), ids=_refused())
def test_refusals(made):
    refused, reason = made
    assert reason in flex.refuse(refused)


def test_gradients_are_no_matter_where_none_are_recorded():
    q, k, v = inputs(1, 2, 1, 20)
    with torch.no_grad():
        assert flex.refuse(call(q, k.requires_grad_(), v)) == lacks()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_forward_backward_and_lse_on_a_gpu(heads):
    q, k, v = (x.cuda().requires_grad_() for x in inputs(1, *heads, 300, d=64))
    tile_map = TileMap.from_mask(torch.rand(1, heads[0], 3, 3).cuda() > 0.3, (128, 128))
    view = Causal().bind(300, 300, device="cuda")
    made = Call(q, k, v, view, tile_map, scale=0.125)
    assert flex.refuse(made) is None
    out, lse = flex.run(made)
    d_out = torch.randn_like(out)
    got = dict(zip(("dq", "dk", "dv"), (x.cpu() for x in torch.autograd.grad(out, (q, k, v), d_out))))
    keep = dataclasses.replace(tile_map, keep=tile_map.keep.cpu())
    seen = seen_by(call(*(x.detach().cpu() for x in (q, k, v)), Causal(), tiles=keep))
    want = exact(*(x.detach().cpu() for x in (q, k, v)), seen, d_out.cpu())
    want.check({"out": out.detach().cpu(), **got}, torch.float32)
    assert torch.equal(lse.cpu() == -torch.inf, ~seen.any(-1))
