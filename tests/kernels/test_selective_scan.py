"""The selective scan: every engine against the definition, splits, packed sequences, long and strong, compiled."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.conformance.common import error, over_budget, relative_error
from tests.conformance.test_memory import allocations
from tilewise.kernels import EngineRefused
from tilewise.kernels.selective_scan import ENGINES, Call, explain, op, selective_scan

NAMES = ("x", "delta", "A", "B", "C", "D", "state")
FAST = ["torch", "native"]
LENGTHS = [0, 1, 2, 15, 16, 17, 31, 33, 127, 128, 129]


def make(batch=2, n=33, channels=40, states=5, groups=2, dtype=torch.float32, step=1.0, offsets=None) -> Call:
    """Random inputs, exactly representable in `dtype`; the larger `step`, the stronger the decay."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    count = batch if offsets is None else len(offsets) - 1
    return Call(
        torch.randn(batch, n, channels).to(dtype),
        (step * torch.rand(batch, n, channels)).to(dtype),
        -3 * torch.rand(channels, states).to(wide),
        torch.randn(batch, groups, n, states).to(dtype),
        torch.randn(batch, groups, n, states).to(dtype),
        torch.randn(channels).to(wide),
        torch.randn(count, channels, states).to(wide),
        None if offsets is None else torch.tensor(offsets),
    )


def to(call: Call, dtype: torch.dtype) -> Call:
    given = {name: getattr(call, name) for name in NAMES}
    return replace(call, **{name: x if x is None else x.to(dtype) for name, x in given.items()})


def results(call: Call, engine: str) -> dict[str, torch.Tensor]:
    """Outputs, final states, and the gradients of all inputs for random ones of both."""
    given = {name: getattr(call, name) for name in NAMES if getattr(call, name) is not None}
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    out, after = selective_scan(replace(call, **leaves), engine)
    made = torch.Generator().manual_seed(1)
    d_out, d_after = (
        torch.randn(x.shape, generator=made, dtype=torch.float64).to(call.x.dtype).to(x.dtype)
        for x in (out, after)
    )
    # Without tokens the definition's outputs have no graph.
    outs, d_outs = zip(*((x, d_x) for x, d_x in ((out, d_out), (after, d_after)) if x.requires_grad))
    gradients = torch.autograd.grad(outs, list(leaves.values()), d_outs, allow_unused=True)
    found = {f"d_{name}": g for name, g in zip(leaves, gradients) if g is not None}
    return {"out": out.detach(), "after": after.detach(), **found}


def check(call: Call, engine: str) -> None:
    """Errors of at most twice those of the definition in the call's own format, against float64."""
    want = results(to(call, torch.float64), "definition")
    plain, got = results(call, "definition"), results(call, engine)
    for name, right in want.items():
        assert got[name].shape == right.shape and got[name].dtype == plain[name].dtype, name
        reason = over_budget(got[name], plain[name], right) if right.numel() else None
        assert reason is None, f"{name}: {reason}"


def typical_errors(calls: list[Call], engine: str) -> dict[str, float]:
    """The median over calls of an engine's error, in errors of the definition in the same format."""
    ratios: dict[str, list[float]] = {}
    for call in calls:
        want = results(to(call, torch.float64), "definition")
        plain, got = results(call, "definition"), results(call, engine)
        for name, right in want.items():
            mine, naive = error(got[name], right), error(plain[name], right)
            ratios.setdefault(name, []).append(mine / naive if naive else 0.0 if mine == 0 else torch.inf)
    return {name: statistics.median(found) for name, found in ratios.items()}


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("n", LENGTHS)
def test_lengths(engine, n):
    check(make(n=n, channels=96), engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", FAST)
def test_a_thousand_tokens(engine):
    check(make(n=1000, channels=96), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize(
    ("channels", "states", "groups"), [(160, 1, 1), (96, 4, 3), (150, 16, 1), (300, 17, 2), (64, 33, 64)]
)
def test_sizes(engine, channels, states, groups):
    check(make(n=40, channels=channels, states=states, groups=groups), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [2, 50])
def test_low_precision(engine, dtype, n):
    """Also with step sizes in float32 beside inputs in fewer bits."""
    call = make(n=n, channels=96, dtype=dtype)
    check(call, engine)
    check(replace(call, delta=call.delta.float()), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("step", [0.0, 1e-4, 30.0, 1e5])
def test_vanishing_and_strong_decay(engine, step):
    """Where almost all decays at once, a few weak spots make up the whole error of a draw, and its quotient with
    another engine's is chance (0.2 to 19 between right results); the median of several draws is not."""
    calls = [make(n=40, channels=96, step=step) for _ in range(9)]
    worst = {name: ratio for name, ratio in typical_errors(calls, engine).items() if not ratio <= 2}
    assert worst == {}


def test_a_small_mistake_is_seen_by_both_checks(monkeypatch):
    """An engine whose steps are 1e-5 too long is over both budgets."""
    right = ENGINES["torch"].run

    class Wrong:
        refuse = staticmethod(lambda call: None)
        run = staticmethod(lambda call: right(replace(call, delta=call.delta * (1 + 1e-5))))

    monkeypatch.setattr("tilewise.kernels.selective_scan.ENGINES", {**ENGINES, "wrong": Wrong})
    with pytest.raises(AssertionError, match="out: error"):
        check(make(), "wrong")
    assert typical_errors([make(step=30.0) for _ in range(3)], "wrong")["out"] > 2


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("left", ["D", "state"])
def test_without_optional_inputs(engine, left):
    check(replace(make(channels=96), **{left: None}), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("n", [3, 40])
def test_strides(engine, n):
    """Time last, slices of one projection, an expanded batch, states by column, storage with an offset."""
    call = make(n=n, channels=96, states=6)
    both = torch.cat((call.B, call.C), 3)
    odd = replace(
        call,
        x=call.x.mT.contiguous().mT,
        delta=call.delta[:1].expand(2, -1, -1),
        A=call.A.T.contiguous().T,
        B=both[..., :6],
        C=both[..., 6:],
        state=call.state.mT.contiguous().mT,
    )
    check(odd, engine)


@pytest.mark.parametrize("engine", FAST)
def test_packed_sequences_are_those_alone(engine):
    call = make(batch=1, n=80, channels=96, offsets=[0, 0, 3, 40, 41, 80, 80])
    check(call, engine)
    out, after = selective_scan(call, engine)
    for i, (_, start, end) in enumerate(call.spans()):
        own = replace(
            call,
            x=call.x[:, start:end],
            delta=call.delta[:, start:end],
            B=call.B[:, :, start:end],
            C=call.C[:, :, start:end],
            state=call.state[i : i + 1],
            offsets=None,
        )
        alone, last = selective_scan(own, engine)
        torch.testing.assert_close(out[:, start:end], alone)
        torch.testing.assert_close(after[i : i + 1], last)


def pieces(call: Call, engine: str, cuts: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Calls one after the other, each from the state that the last one left."""
    state, outs = call.state, []
    for start, end in itertools.pairwise((0, *cuts, call.x.shape[1])):
        part = replace(
            call,
            x=call.x[:, start:end],
            delta=call.delta[:, start:end],
            B=call.B[:, :, start:end],
            C=call.C[:, :, start:end],
            state=state,
        )
        out, state = selective_scan(part, engine)
        outs.append(out)
    return torch.cat(outs, 1), state


@pytest.mark.parametrize("engine", FAST)
def test_split_anywhere(engine):
    call = make(n=75, channels=96)
    for got, want in zip(pieces(call, engine, (0, 1, 5, 38)), selective_scan(call, engine)):
        torch.testing.assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("step", [0.01, 1.0])
def test_65536_tokens_whole_and_split_anywhere(step):
    """Outputs and states are the definition's in float64; the gradients of pieces are those of the whole."""
    call = make(batch=1, n=65_536, channels=8, states=4, groups=1, step=step)
    want = selective_scan(to(call, torch.float64), "definition")
    leaves = {name: getattr(call, name).requires_grad_() for name in NAMES}
    d_out = torch.randn(call.x.shape)
    for engine in FAST:
        gradients = []
        for cuts in ((), (1, 777, 32_773, 65_535)):
            got = pieces(call, engine, cuts)
            for mine, right in zip(got, want):
                assert relative_error(mine.detach(), right) < 5e-6, engine
            gradients.append(torch.autograd.grad(got[0], leaves.values(), d_out))
        for name, whole, split in zip(leaves, *gradients):
            assert relative_error(split, whole) < 1e-5, (engine, name)


@pytest.mark.parametrize("engine", FAST)
def test_nothing_from_the_future(engine):
    call = make(n=70)
    before, _ = selective_scan(call, engine)
    for t in (1, 31, 32, 64):
        changed = {name: getattr(call, name).clone() for name in ("x", "delta", "B", "C")}
        for name, x in changed.items():
            x[(slice(None),) * (1 if name in ("x", "delta") else 2) + (slice(t, None),)] *= 3
        after, _ = selective_scan(replace(call, **changed), engine)
        assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t:], after[:, t:])


@pytest.mark.slow
@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("step", [1e-5, 1.0, 1e4])
def test_long_sequences_stay_finite(engine, step):
    call = make(batch=1, n=65_536, channels=16, states=4, groups=1, step=step)
    for name, x in results(call, engine).items():
        assert bool(x.isfinite().all()), name


def test_gradcheck():
    call = make(batch=1, n=5, channels=4, states=2, dtype=torch.float64)
    given = [getattr(call, name).requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(Call(*x), "torch"), given)


@pytest.mark.parametrize("engine", FAST)
def test_operator_registrations(engine, monkeypatch):
    monkeypatch.undo()  # the poisoned `torch.empty` is Python, which the checks would trace
    for call in (make(n=9), make(batch=1, n=9, offsets=[0, 4, 9]), replace(make(n=9), D=None, state=None)):
        given = [getattr(call, name) for name in NAMES]
        leaves = [None if x is None else x.requires_grad_() for x in given]
        torch.library.opcheck(torch.ops.tilewise.selective_scan.default, (*leaves, call.offsets, engine))


@pytest.mark.parametrize("engine", ["auto", *FAST])
def test_compiled_whole_with_few_recompilations(engine, monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda *x: selective_scan(Call(*x), engine), fullgraph=True, backend=counter)
    for n in (64, 80, 97, 100, 130, 160, 200, 257, 300, 512):
        call = make(n=n)
        given = [getattr(call, name) for name in NAMES]
        for got, want in zip(compiled(*given), selective_scan(call, engine)):
            assert torch.equal(got, want)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("length", [2048, 4096])
def test_no_tensor_of_all_states(length):
    """The largest of the torch engine's temporaries is the same for any length; N x C x S would be 8 MB or more."""
    call = make(batch=1, n=length, channels=64, states=16, groups=1)
    largest, _ = allocations(lambda: selective_scan(call, "torch"))
    assert largest <= max(4 << 20, call.x.numel() * 4)


def test_engines_that_cannot_run_say_so():
    call = make(dtype=torch.float64)
    assert "computes in float32" in explain(call).refused["native"] and explain(call).engine == "torch"
    with pytest.raises(EngineRefused, match="engine 'native' cannot run this call: computes in float32"):
        selective_scan(call, "native")
    assert set(op.IMPLEMENTATIONS) == set(ENGINES) - {"definition"}
