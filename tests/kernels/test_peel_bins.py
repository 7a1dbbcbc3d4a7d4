"""The peeling decoder: engines against the definition, on bins that are easy, noisy, overfull and random."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tilewise.kernels import EngineRefused
from tilewise.kernels.peel_bins import ENGINES, Call, Peeled, explain, peel_bins
from tilewise.transforms.sparse.plan import make_plan

FAST = ["torch", "native"]


def make(
    n: int = 9, b: int = 3, sparsity: int = 6, noise: float = 0.0, seed: int = 0, groups: int = 3
) -> Call:
    """Bins of random coefficients between 1 and 2 in size, filled in from their definition, and noise."""
    plan = make_plan(n, b, groups, 3 * n if noise else None, 8, seed)
    g = torch.Generator().manual_seed(seed)
    places = torch.randperm(1 << n, generator=g)[:sparsity].tolist()
    sizes = (1 + torch.rand(sparsity, generator=g).double()).tolist()
    left = noise * torch.randn(groups, plan.offsets.shape[1], 1 << b, generator=g).double()
    for c in range(groups):
        for place, size in zip(places, sizes):
            number = sum(
                bin(row & place).count("1") % 2 << i for i, row in enumerate(plan.hashes[c].tolist())
            )
            for p, d in enumerate(plan.offsets[c].tolist()):
                left[c, p, number] += size * (-1) ** bin(d & place).count("1")
    allowed = max(noise**2, 1e-24) * (1 + 4 * math.sqrt(2 / left.shape[1]))
    return Call(left, plan.hashes, plan.offsets, plan.chosen, plan.decoders, n, allowed, 30)


def same(got: Peeled, want: Peeled) -> None:
    assert torch.equal(got.index, want.index) and got[2:] == want[2:]
    torch.testing.assert_close(got.value, want.value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("sparsity", [0, 1, 6, 12, 40])
def test_engines_are_the_definition(engine, noise, sparsity):
    """Also where nothing is in the bins, and where too much is for any to be found."""
    for seed in range(3):
        call = make(sparsity=sparsity, noise=noise, seed=seed)
        before = call.left.clone()
        same(peel_bins(call, engine), peel_bins(call, "definition"))
        assert torch.equal(call.left, before)


@pytest.mark.parametrize("engine", [*FAST, "definition"])
def test_what_was_put_in_comes_out(engine):
    call = make(n=12, b=4, sparsity=12, seed=1)
    got = peel_bins(call, engine)
    places = torch.randperm(1 << 12, generator=torch.Generator().manual_seed(1))[:12]
    assert got.explained and torch.equal(got.index, places.sort().values)
    # The control: what is asked of the bins in another group's place is not there.
    wrong = replace(call, hashes=call.hashes.roll(1, 0))
    assert not peel_bins(wrong, engine).explained


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize(("n", "b", "groups"), [(1, 0, 1), (1, 1, 2), (4, 4, 1), (5, 0, 3), (40, 3, 2)])
def test_sizes(engine, n, b, groups):
    plan = make_plan(n, b, groups, None, 1, 0)
    left = torch.zeros(groups, plan.offsets.shape[1], 1 << b, dtype=torch.float64)
    left[:, :, 0] = 2.5  # coefficient 0 is seen as it is everywhere
    call = Call(left, plan.hashes, plan.offsets, plan.chosen, plan.decoders, n, 1e-20, 5)
    got = peel_bins(call, engine)
    assert got.explained and got.index.tolist() == [0] and got.value.tolist() == [2.5]
    same(got, peel_bins(call, "definition"))


@pytest.mark.parametrize("engine", FAST)
def test_rounds_end(engine):
    call = replace(make(n=12, b=3, sparsity=9, seed=4), rounds=1)
    got = peel_bins(call, engine)
    same(got, peel_bins(call, "definition"))
    assert got.rounds == 1


@pytest.mark.parametrize("engine", FAST)
def test_strides(engine):
    call = make()
    same(peel_bins(replace(call, left=call.left.mT.contiguous().mT), engine), peel_bins(call, "definition"))


def test_engines_that_cannot_run_say_so():
    call = replace(make(), n=62)
    assert "at most 61 bits" in explain(call).refused["native"] and set(ENGINES) == {
        "native",
        "torch",
        "definition",
    }
    with pytest.raises(EngineRefused, match="engine 'native' cannot run this call"):
        peel_bins(call, "native")
