"""The gated networks: every engine against the definition and torch.nn, splits, packed, long, compiled."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.conformance.common import error, over_budget, relative_error
from tests.conformance.test_memory import allocations
from tilewise.kernels import EngineRefused
from tilewise.kernels.gated_rnn import ENGINES, KINDS, Call, explain, gated_rnn, native, op, tiling

NAMES = ("wx", "R", "bias", "state")
FAST = ["torch", "native"]
LENGTHS = [0, 1, 2, 15, 16, 17, 31, 33, 127, 128, 129]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_engine = pytest.mark.parametrize("engine", FAST)


def make(
    kind="lstm", batch=3, heads=2, n=33, d=24, dtype=torch.float32, size=1.0, offsets=None, seed=None
) -> Call:
    """Random inputs, exactly representable in `dtype`; the larger `size`, the harder gates open and close."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gates, parts, _ = KINDS[kind]
    count = batch if offsets is None else len(offsets) - 1
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, ())) if seed is None else seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    state = drawn(count, heads, len(parts), d).to(wide)
    if kind == "slstm":  # a sum of weights is at least 1, that of the largest
        state[:, :, 2] = 1 + state[:, :, 2].abs()
    return Call(
        (size * drawn(batch, heads, n, gates, d)).to(dtype),
        (d**-0.5 * drawn(heads, gates, d, d)).to(dtype),
        drawn(heads, gates, d).to(dtype),
        state,
        offsets=None if offsets is None else torch.tensor(offsets),
        kind=kind,
    )


def to(call: Call, dtype: torch.dtype) -> Call:
    given = {name: getattr(call, name) for name in NAMES}
    return replace(call, **{name: x if x is None else x.to(dtype) for name, x in given.items()})


def results(call: Call, engine: str) -> dict[str, torch.Tensor]:
    """Outputs, final states, and the gradients of all inputs for random ones of both."""
    given = {name: getattr(call, name) for name in NAMES if getattr(call, name) is not None}
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    out, after = gated_rnn(replace(call, **leaves), engine)
    made = torch.Generator().manual_seed(1)
    d_out, d_after = (
        torch.randn(x.shape, generator=made, dtype=torch.float64).to(call.wx.dtype).to(x.dtype)
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


@every_engine
@every_kind
@pytest.mark.parametrize("n", LENGTHS)
def test_lengths(engine, kind, n):
    check(make(kind, n=n), engine)


@pytest.mark.slow
@every_engine
@every_kind
def test_a_thousand_tokens(engine, kind):
    check(make(kind, n=1000), engine)


@every_engine
@every_kind
@pytest.mark.parametrize(
    ("batch", "heads", "d"), [(5, 16, 1), (7, 1, 96), (2, 3, 17), (13, 4, 16), (1, 2, 130)]
)
def test_sizes(engine, kind, batch, heads, d):
    check(make(kind, batch, heads, 20, d), engine)


@every_engine
@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [2, 50])
def test_low_precision(engine, kind, dtype, n):
    check(make(kind, n=n, dtype=dtype), engine)


@every_engine
@every_kind
@pytest.mark.parametrize("size", [0.0, 1e-4, 10.0, 1e3])
def test_shut_and_open_gates(engine, kind, size):
    """Where gates are shut or open to the last bit, a few units between make up the error of a draw, and its
    quotient with another engine's is chance; the median of several draws is not."""
    calls = [make(kind, n=20, size=size) for _ in range(9)]
    worst = {name: ratio for name, ratio in typical_errors(calls, engine).items() if not ratio <= 2}
    assert worst == {}


def test_a_small_mistake_is_seen_by_both_checks(monkeypatch):
    """An engine whose inputs are 1e-5 too large is over both budgets."""
    right = ENGINES["torch"].run

    class Wrong:
        refuse = staticmethod(lambda call: None)
        run = staticmethod(lambda call: right(replace(call, wx=call.wx * (1 + 1e-5))))

    monkeypatch.setattr("tilewise.kernels.gated_rnn.ENGINES", {**ENGINES, "wrong": Wrong})
    for kind in KINDS:
        with pytest.raises(AssertionError, match="out: error"):
            check(make(kind), "wrong")
        assert typical_errors([make(kind, size=10.0) for _ in range(3)], "wrong")["out"] > 2


@every_engine
@pytest.mark.parametrize("kind", ["elman", "lstm", "gru"])
def test_one_head_is_the_network_of_torch(engine, kind):
    """The same weights in torch.nn, which has a bias of the inputs and one of the recurrent sums."""
    d, width = 20, 12
    kinds = {"elman": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
    other = kinds[kind](width, d, batch_first=True)
    x, gates = torch.randn(3, 9, width), KINDS[kind].gates
    wx = nn.functional.linear(x, other.weight_ih_l0, other.bias_ih_l0).view(3, 9, 1, gates, d).transpose(1, 2)
    R, bias = other.weight_hh_l0.view(1, gates, d, d), other.bias_hh_l0.view(1, gates, d)
    out, after = gated_rnn(Call(wx, R, bias, kind=kind), engine)
    want, last = other(x)
    torch.testing.assert_close(out[:, 0], want)
    torch.testing.assert_close(after[:, 0].transpose(0, 1), torch.cat(last if kind == "lstm" else (last,)))


@every_engine
@every_kind
@pytest.mark.parametrize("left", ["bias", "state"])
def test_without_optional_inputs(engine, kind, left):
    check(replace(make(kind), **{left: None}), engine)


@every_engine
@every_kind
def test_strides(engine, kind):
    """Gates last, an expanded batch, matrices and states by column, storage with an offset."""
    call = make(kind, n=20, d=20)
    odd = replace(
        call,
        wx=call.wx.mT.contiguous().mT[:1].expand(3, -1, -1, -1, -1),
        R=call.R.mT.contiguous().mT,
        bias=torch.cat((call.bias, call.bias), 2)[..., 20:],
        state=call.state.mT.contiguous().mT,
    )
    check(odd, engine)
    check(replace(call, wx=call.wx.transpose(0, 2).contiguous().transpose(0, 2)), engine)


@every_engine
@every_kind
def test_passed_over_tokens_are_not_there(engine, kind):
    """Whatever they hold; wherever they stand; their gradients are 0."""
    call = make(kind, n=30)
    mask = torch.rand(3, 30, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[1] = False
    check(replace(call, mask=mask), engine)
    wild = call.wx.masked_fill(~mask.view(3, 1, 30, 1, 1), torch.nan)
    got = results(replace(call, wx=wild, mask=mask), engine)
    hidden = ~mask.view(3, 1, 30, 1)
    assert not got["out"].masked_select(hidden).any()
    assert not got["d_wx"].masked_select(hidden.unsqueeze(4)).any()
    assert torch.equal(got["after"][1], call.state[1])
    for row in (0, 2):
        own = replace(call, wx=call.wx[row : row + 1, :, mask[row]], state=call.state[row : row + 1])
        out, after = gated_rnn(own, engine)
        torch.testing.assert_close(got["out"][row : row + 1, :, mask[row]], out)
        torch.testing.assert_close(got["after"][row : row + 1], after)


@every_engine
@every_kind
def test_packed_sequences_are_those_alone(engine, kind):
    call = make(kind, batch=1, n=80, offsets=[0, 0, 3, 40, 41, 80, 80])
    check(call, engine)
    out, after = gated_rnn(call, engine)
    for i, (_, start, end) in enumerate(call.spans()):
        own = replace(call, wx=call.wx[:, :, start:end], state=call.state[i : i + 1], offsets=None)
        alone, last = gated_rnn(own, engine)
        torch.testing.assert_close(out[:, :, start:end], alone)
        torch.testing.assert_close(after[i : i + 1], last)


@every_engine
@every_kind
def test_split_anywhere(engine, kind):
    call = make(kind, n=75)
    for first in (call.state, None):
        whole, last = gated_rnn(replace(call, state=first), engine)
        state, outs = first, []
        for start, end in ((0, 0), (0, 1), (1, 5), (5, 38), (38, 75)):
            out, state = gated_rnn(replace(call, wx=call.wx[:, :, start:end], state=state), engine)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 2), whole)
        torch.testing.assert_close(state, last)


@pytest.mark.slow
@every_kind
def test_65536_tokens_whole_and_split_anywhere(kind):
    """Outputs and states are the definition's in float64; the native gradients of pieces are those of the whole."""
    n = 65_536
    call = make(kind, batch=1, heads=1, n=n, d=8, seed=3)
    want = gated_rnn(to(call, torch.float64), "definition")
    leaves = {name: getattr(call, name).requires_grad_() for name in NAMES}
    d_out = torch.randn(1, 1, n, 8, generator=torch.Generator().manual_seed(1))

    def pieces(engine: str, cuts: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        outs, state = [], call.state
        for start, end in itertools.pairwise((0, *cuts, n)):
            out, state = gated_rnn(replace(call, wx=call.wx[:, :, start:end], state=state), engine)
            outs.append(out)
        return torch.cat(outs, 2), state

    anywhere, gradients = (1, 777, 32_773, 65_535), []
    for cuts in ((), anywhere):
        got = pieces("native", cuts)
        for mine, right in zip(got, want):
            assert relative_error(mine.detach(), right) < 1e-6
        gradients.append(torch.autograd.grad(got[0], leaves.values(), d_out))
    for name, whole, split in zip(leaves, *gradients):
        assert relative_error(split, whole) < 1e-5, name
    with torch.no_grad():
        for mine, right in zip(pieces("torch", anywhere), want):
            assert relative_error(mine, right) < 1e-6


@every_engine
@every_kind
def test_nothing_from_the_future(engine, kind):
    call = make(kind, n=70)
    before, _ = gated_rnn(call, engine)
    for t in (1, 31, 64):
        wx = call.wx.clone()
        wx[:, :, t:] *= 3
        after, _ = gated_rnn(replace(call, wx=wx), engine)
        assert torch.equal(before[:, :, :t], after[:, :, :t])
        assert not torch.equal(before[:, :, t:], after[:, :, t:])


@every_engine
@every_kind
def test_heads_do_not_see_one_another(engine, kind):
    """They are blocks of one recurrent matrix on its diagonal, and nothing else of it."""
    call, gates = make(kind, heads=3, n=12, d=8), KINDS[kind].gates
    out, after = gated_rnn(call, engine)
    merged = call.R.new_zeros(1, gates, 24, 24)
    for head, gate in itertools.product(range(3), range(gates)):
        merged[0, gate, 8 * head : 8 * head + 8, 8 * head : 8 * head + 8] = call.R[head, gate]
    one = replace(
        call,
        wx=call.wx.permute(0, 2, 3, 1, 4).flatten(3).unsqueeze(1),
        R=merged,
        bias=call.bias.transpose(0, 1).flatten(1).unsqueeze(0),
        state=call.state.transpose(1, 2).flatten(2).unsqueeze(1),
    )
    got, last = gated_rnn(one, engine)
    torch.testing.assert_close(got[:, 0].unflatten(2, (3, 8)).transpose(1, 2), out)
    torch.testing.assert_close(last[:, 0].unflatten(2, (3, 8)).transpose(1, 2), after)


@pytest.mark.slow
@every_engine
@every_kind
@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_long_sequences_stay_finite(engine, kind, size):
    """50,000 tokens on the native engine; the torch engine's loop takes 5,000."""
    call = make(kind, batch=1, heads=1, n=50_000 if engine == "native" else 5_000, d=8, size=size)
    for name, x in results(call, engine).items():
        assert bool(x.isfinite().all()), name


@pytest.mark.parametrize("team", [1, 2])
@pytest.mark.parametrize(
    ("rows", "parts", "depth"), [(1, 1, 1), (2, 2, 2), (5, 1, 10), (5, 1, 1000), (3, 2, 7)]
)
def test_any_cut_gives_the_same(team, rows, parts, depth, monkeypatch):
    """The tiling decides about time alone; threads that share a block wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        call = make("gru", batch=5, n=6, d=50)
        want = results(call, "native")
        monkeypatch.setattr(tiling, "tile_sizes", lambda *_: tiling.Tiles(rows, team, parts, depth))
        check(call, "native")
        check(make("lstm", batch=1, n=8, d=50, offsets=[0, 3, 3, 4, 7, 8]), "native")
        for name, x in results(call, "native").items():
            torch.testing.assert_close(x, want[name])
    finally:
        torch.set_num_threads(before)


def test_gradcheck():
    for kind in KINDS:
        call = make(kind, batch=2, heads=1, n=4, d=3, dtype=torch.float64)
        given = [getattr(call, name).requires_grad_() for name in NAMES]
        assert torch.autograd.gradcheck(lambda *x, kind=kind: gated_rnn(Call(*x, kind=kind), "torch"), given)


@every_engine
def test_operator_registrations(engine, monkeypatch):
    monkeypatch.undo()  # the poisoned `torch.empty` is Python, which the checks would trace
    plain = make("gru", n=9)
    mask = torch.rand(3, 9) > 0.3
    for call in (
        make("slstm", n=9),
        make("lstm", batch=1, n=9, offsets=[0, 4, 9]),
        replace(plain, bias=None, state=None),
        replace(plain, mask=mask),
    ):
        given = [getattr(call, name) for name in NAMES]
        leaves = [None if x is None else x.requires_grad_() for x in given]
        torch.library.opcheck(
            torch.ops.tilewise.gated_rnn.default,
            (*leaves, call.mask, call.offsets, call.kind, True, engine),
        )


@pytest.mark.parametrize("engine", ["auto", *FAST])
def test_compiled_whole_with_few_recompilations(engine, monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda *x: gated_rnn(Call(*x), engine), fullgraph=True, backend=counter)
    for n in (64, 80, 97, 100, 130, 160, 200, 257, 300, 512):
        call = make(n=n)
        given = [getattr(call, name) for name in NAMES]
        for got, want in zip(compiled(*given), gated_rnn(call, engine)):
            assert torch.equal(got, want)
    assert counter.frame_count <= 2


@every_engine
def test_nothing_is_kept_where_no_gradient_is_wanted(engine):
    """What the backward pass needs is six numbers for each unit and token; without it, outputs and steps
    alone."""
    call = make(batch=2, n=400, d=64)
    largest, _ = allocations(lambda: gated_rnn(call, engine))
    assert largest <= 2 * call.new_out().numel() * 4
    leaf = replace(call, wx=call.wx.requires_grad_())
    kept, _ = allocations(lambda: gated_rnn(leaf, engine))
    assert kept >= 6 * call.new_out().numel() * 4


def test_engines_that_cannot_run_say_so():
    call = make(dtype=torch.float64)
    assert "computes in float32" in explain(call).refused["native"] and explain(call).engine == "torch"
    with pytest.raises(EngineRefused, match="engine 'native' cannot run this call: computes in float32"):
        gated_rnn(call, "native")
    assert set(op.IMPLEMENTATIONS) == set(ENGINES) - {"definition"}
    assert native.LIBRARY.sources == native.SOURCES
