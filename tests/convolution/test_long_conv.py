"""The long convolution as a function: states, masks, packs, two sides, prepared and sparse kernels, bad
input."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.clock import least_times
from tests.conformance.test_memory import allocations
from tilewise.convolution import (
    ConvState,
    FrequencySparsity,
    explain_conv,
    long_conv,
    prepare,
    two_sided_conv,
)
from tilewise.kernels.long_conv import Call, native
from tilewise.kernels.long_conv.monarch import Monarch, factor, matrices

N = 75


def drawn(
    b: int = 2, channels: int = 4, n: int = N, taps: int = 40, dtype=torch.float64
) -> dict[str, Tensor]:
    """Arguments of `long_conv`."""
    gen = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    return {
        "x": random(b, channels, n),
        "kernel": random(channels, taps),
        "gate_in": random(b, channels, n),
        "gate_out": random(b, channels, n),
        "skip": random(channels),
    }


def part(given: dict[str, Tensor], at: slice, row: slice = slice(None)) -> dict[str, Tensor]:
    """Some tokens of some sequences."""
    return {name: x[row, :, at] if x.ndim == 3 else x for name, x in given.items()}


@pytest.mark.parametrize("engine", ["definition", "torch", "monarch", "native"])
@pytest.mark.parametrize("taps", [1, 2, 40, 200])
def test_split_anywhere(engine, taps):
    """Also token by token, which is how a model decodes."""
    dtype = torch.float32 if engine == "native" else torch.float64
    given = drawn(taps=taps, dtype=dtype)
    whole, last = long_conv(**given, engine=engine, return_state=True)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for borders in ([0, 1, N], [0, 30, 31, 64, N], list(range(N + 1))):
        state, outs = None, []
        for start, end in itertools.pairwise(borders):
            out, state = long_conv(
                **part(given, slice(start, end)), state=state, engine=engine, return_state=True
            )
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 2), whole, **close)
        torch.testing.assert_close(state.inputs, last.inputs)
    assert last.inputs.shape == (2, 4, taps - 1) and last.bytes == last.inputs.nbytes


@pytest.mark.parametrize("n", [300, 1000])
def test_split_anywhere_through_transforms(n):
    """As long as it takes for the native engine to leave sums behind."""
    given = drawn(n=n, taps=n, dtype=torch.float32)
    exact = {name: x.double() for name, x in given.items()}
    want = long_conv(**exact, engine="definition")
    whole = long_conv(**given)
    state, outs = None, []
    for start, end in ((0, 1), (1, n // 2), (n // 2, n)):
        out, state = long_conv(**part(given, slice(start, end)), state=state, return_state=True)
        outs.append(out)
    split = (torch.cat(outs, 2).double() - want).square().mean()
    assert split <= 4 * (whole.double() - want).square().mean()


def test_gradients_go_through_states():
    given = drawn()
    kernel = given["kernel"].requires_grad_()
    (whole,) = torch.autograd.grad(long_conv(**given).square().sum(), kernel)
    first, state = long_conv(**part(given, slice(0, 30)), return_state=True)
    second = long_conv(**part(given, slice(30, N)), state=state)
    (split,) = torch.autograd.grad(first.square().sum() + second.square().sum(), kernel)
    torch.testing.assert_close(split, whole)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_not_there(causal):
    given = drawn()
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[0, :20] = mask[1, 40:50] = False
    padded = {
        name: x.masked_fill(~mask.unsqueeze(1), torch.inf) if x.ndim == 3 else x for name, x in given.items()
    }
    if causal:
        got, after = long_conv(**padded, mask=mask, return_state=True)
    else:
        got, after = long_conv(**padded, mask=mask, causal=False), None
    assert (got.masked_select(~mask.unsqueeze(1)) == 0).all()
    for row in range(2):
        own = {name: x[row : row + 1, :, mask[row]] if x.ndim == 3 else x for name, x in given.items()}
        want = long_conv(**own, causal=causal)
        torch.testing.assert_close(got[row : row + 1, :, mask[row]], want)
        if after is not None:
            _, last = long_conv(**own, return_state=True)
            torch.testing.assert_close(after.inputs[row : row + 1], last.inputs)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_do_not_see_each_other(causal):
    given = drawn(b=1)
    offsets = torch.tensor([0, 0, 30, 31, N])
    if causal:
        got, after = long_conv(**given, cu_seqlens=offsets, return_state=True)
    else:
        got = long_conv(**given, cu_seqlens=offsets, causal=False)
    for i, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        own = part(given, slice(start, end))
        torch.testing.assert_close(got[..., start:end], long_conv(**own, causal=causal))
        if causal:
            _, last = long_conv(**own, return_state=True)
            torch.testing.assert_close(after.inputs[i : i + 1], last.inputs)
    if causal:
        further = long_conv(**given, cu_seqlens=offsets, state=after)
        for start, end in itertools.pairwise(offsets.tolist()):
            own = part(given, slice(start, end))
            twice = {name: torch.cat((x, x), 2) if x.ndim == 3 else x for name, x in own.items()}
            torch.testing.assert_close(further[..., start:end], long_conv(**twice)[..., end - start :])


def test_gradients_of_packed_sequences():
    given = {name: x.requires_grad_() for name, x in drawn(b=1).items()}
    offsets = torch.tensor([0, 20, N])
    weights = torch.randn(1, 4, N, dtype=torch.float64)
    packed = torch.autograd.grad(
        (long_conv(**given, cu_seqlens=offsets) * weights).sum(), list(given.values())
    )
    outs = [long_conv(**part(given, slice(a, b))) for a, b in ((0, 20), (20, N))]
    alone = torch.autograd.grad((torch.cat(outs, 2) * weights).sum(), list(given.values()))
    for a, b in zip(packed, alone):
        torch.testing.assert_close(a, b)


def test_gates_are_broadcast():
    given = drawn()
    gate = torch.randn(1, 4, 1, dtype=torch.float64).requires_grad_()
    got = long_conv(given["x"], given["kernel"], gate_out=gate)
    want = long_conv(given["x"], given["kernel"]) * gate
    torch.testing.assert_close(got, want)
    (mine,), (right,) = (
        torch.autograd.grad(one.square().sum(), gate, retain_graph=True) for one in (got, want)
    )
    torch.testing.assert_close(mine, right)


@pytest.mark.parametrize(
    ("n", "after", "before"), [(50, 50, 49), (50, 3, 60), (50, 80, 2), (1, 2, 2), (300, 40, 7)]
)
def test_two_sides(n, after, before):
    given = drawn(n=n)
    forth, back = (torch.randn(4, size, dtype=torch.float64) for size in (after, before))
    given.pop("kernel")
    got = two_sided_conv(given.pop("x"), forth, back, **given)
    x, u = drawn(n=n)["x"], drawn(n=n)["x"] * given["gate_in"]
    z = long_conv(u, forth, engine="definition")
    z = z + torch.nn.functional.pad(long_conv(u.flip(2), back, engine="definition").flip(2), (0, 1))[..., 1:]
    want = given["gate_out"] * (z + given["skip"].unsqueeze(1) * u)
    assert got.shape == x.shape
    torch.testing.assert_close(got, want)


def test_prepared_kernels():
    given = drawn(n=700, taps=700, dtype=torch.float32)
    kernel = given.pop("kernel")
    fixed = prepare(kernel, 700)
    want = long_conv(kernel=kernel, **given)
    torch.testing.assert_close(long_conv(kernel=fixed, **given), want, rtol=1e-4, atol=1e-4)
    length = fixed.transform.shape[2]
    assert length >= 1024 and fixed.bytes == kernel.nbytes + 4 * 2 * length * 4
    out, state = long_conv(kernel=fixed, **part(given, slice(0, 300)), return_state=True)
    rest = long_conv(kernel=fixed, **part(given, slice(300, 700)), state=state)
    torch.testing.assert_close(torch.cat((out, rest), 2), want, rtol=1e-4, atol=1e-4)
    mask = torch.ones(2, 700, dtype=torch.bool)
    torch.testing.assert_close(long_conv(kernel=fixed, **given, mask=mask), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="was prepared for causal=True"):
        long_conv(given["x"], fixed, causal=False)


def test_sequences_that_are_sparse_in_frequency_have_lengths_that_rows_divide():
    given = drawn(b=1, n=64)
    sparsity = FrequencySparsity(4, (0, 1, 3))
    got = long_conv(**given, causal=False, sparsity=sparsity, cu_seqlens=torch.tensor([0, 24, 64]))
    for a, b in ((0, 24), (24, 64)):
        want = long_conv(**part(given, slice(a, b)), causal=False, sparsity=sparsity, engine="definition")
        torch.testing.assert_close(got[..., a:b], want)
    with pytest.raises(ValueError, match="rows of sparsity must divide every length, got 4 and 30"):
        long_conv(**given, causal=False, sparsity=sparsity, cu_seqlens=torch.tensor([0, 30, 64]))


def test_density():
    assert FrequencySparsity(4, (0,)).density(64) == 0.25
    assert FrequencySparsity(band=0.5).density(64) == 33 / 64
    assert FrequencySparsity().density(10) == 1


def test_nothing():
    x = torch.zeros(2, 3, 0)
    out, state = long_conv(x, torch.ones(3, 5), return_state=True)
    assert out.shape == x.shape and torch.equal(state.inputs, torch.zeros(2, 3, 4))
    assert long_conv(x, torch.ones(3, 5), causal=False).shape == x.shape
    empty = long_conv(x[:1], torch.ones(3, 5), cu_seqlens=torch.tensor([0, 0]))
    assert empty.shape == (1, 3, 0)
    kernel = torch.ones(3, 5, requires_grad=True)
    long_conv(x, kernel).sum().backward()
    assert torch.equal(kernel.grad, torch.zeros(3, 5))


def test_explain():
    given = drawn(dtype=torch.float32)
    assert explain_conv(**given).engine == "native"
    assert "native" in explain_conv(**drawn()).refused
    with pytest.raises(TypeError, match="takes the arguments of long_conv, got kernels"):
        explain_conv(given["x"], given["kernel"], kernels=1)


def bad(**changed):
    given = drawn() | changed
    return lambda: long_conv(**{name: x for name, x in given.items() if x is not ...})


X = torch.zeros(2, 4, N, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (bad(x=X.long()), TypeError, "x must be a floating tensor, got torch.int64"),
        (bad(x=X[0]), ValueError, r"x must be \[B, C, N\], got shape \(4, 75\)"),
        (bad(kernel=torch.zeros(5, 3)), ValueError, r"kernel must be \[4, K\], got shape \(5, 3\)"),
        (bad(kernel=torch.zeros(4, 0)), ValueError, "K >= 1"),
        (
            bad(kernel="no"),
            TypeError,
            "kernel must be a floating tensor or what prepare made of one, got str",
        ),
        (bad(gate_in=X[:, :3]), ValueError, r"gate_in must be \[2|1, 4|1, 75|1\], got shape \(2, 3, 75\)"),
        (bad(gate_out=X.int()), TypeError, "gate_out must be a floating tensor, got torch.int32"),
        (bad(skip=torch.zeros(3)), ValueError, r"skip must be \[4\], got shape \(3,\)"),
        (bad(causal=1), TypeError, r"causal must be True or False \(circular\), got 1"),
        (bad(causal=False, return_state=True), ValueError, "has no state"),
        (bad(state=X), TypeError, "state must be None or the ConvState of an earlier call, got Tensor"),
        (bad(state=ConvState(torch.zeros(2, 4, 3))), ValueError, r"must be \[2, 4, 39\], got \[2, 4, 3\]"),
        (bad(sparsity=FrequencySparsity(3)), ValueError, "sparsity is of circular convolutions"),
        (bad(sparsity=3, causal=False), TypeError, "sparsity must be None or a FrequencySparsity, got int"),
        (
            bad(sparsity=FrequencySparsity(4), causal=False),
            ValueError,
            "must divide the length, got 4 and 75",
        ),
        (bad(mask=X[:, 0]), TypeError, "mask must be a boolean tensor"),
        (bad(cu_seqlens=torch.tensor([0, 75])), ValueError, "are a batch of one, got 2"),
        (bad(engine="fast"), ValueError, "engine must be 'auto' or one of"),
        (lambda: FrequencySparsity(0), ValueError, "rows must be an integer >= 1, got 0"),
        (lambda: FrequencySparsity(4, (1,)), ValueError, "row 1 is alone"),
        (lambda: FrequencySparsity(4, (4,)), ValueError, "kept must be different rows below 4"),
        (lambda: FrequencySparsity(band=0.0), ValueError, r"band must lie in \(0, 1\], got 0.0"),
        (lambda: prepare(torch.zeros(3, 4), 0), ValueError, "n must be an integer >= 1, got 0"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------- FlashFFTConv (Fu et al.,
# 2023)


@pytest.mark.evidence
@pytest.mark.parametrize("n", [64, 100, 1024])
def test_two_products_of_matrices_are_the_transform(n):
    """The Monarch decomposition: exact with the factors between the two products, not a DFT without them."""
    a = factor(n)
    made = Monarch.of(n, a, list(range(a)), list(range(n // a)), torch.complex128, torch.device("cpu"))
    x = torch.randn(3, n, dtype=torch.float64)
    want = torch.fft.fft(x)
    got = made.forward(x)
    torch.testing.assert_close(got, want[:, made.frequencies])
    torch.testing.assert_close(made.inverse(got, n), x)
    assert made.products < n * n / 3  # a DFT as one matrix takes n * n
    broken = Monarch(made.first, torch.ones_like(made.between), made.second, made.frequencies)
    assert (broken.forward(x) - want[:, made.frequencies]).abs().max() > 1


@pytest.mark.evidence
@pytest.mark.parametrize("engine", ["native", "monarch", "torch"])
@pytest.mark.parametrize("kind", ["causal", "circular", "two-sided"])
@pytest.mark.parametrize("n", [512, 700])
def test_gated_convolutions_are_those_of_torch_fft(engine, kind, n):
    """Outputs and all gradients, within twice the rounding of torch.fft in the same format; not without the
    gates."""
    gen = torch.Generator().manual_seed(1)
    shapes = {"x": (2, 4, n), "kernel": (4, n), "gate_in": (2, 4, n), "gate_out": (2, 4, n), "skip": (4,)}
    given = {name: torch.randn(shape, generator=gen).requires_grad_() for name, shape in shapes.items()}
    weights = torch.randn(2, 4, n, generator=gen)

    def usual(x, kernel, gate_in, gate_out, skip):
        u = gate_in * x
        size = n if kind == "circular" else 2 * n
        forth = kernel
        if kind == "two-sided":  # the same kernel both ways
            forth = torch.cat((kernel, torch.zeros_like(kernel[:, :1]), kernel[:, 1:].flip(1)), 1)
        z = torch.fft.irfft(torch.fft.rfft(u, size) * torch.fft.rfft(forth, size), size)[..., :n]
        return gate_out * (z + skip.unsqueeze(1) * u)

    def mine(x, kernel, **gates):
        if kind == "two-sided":
            return two_sided_conv(x, kernel, kernel[:, 1:], engine=engine, **gates)
        return long_conv(x, kernel, causal=kind == "causal", engine=engine, **gates)

    def results(run, dtype):
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in given.items()}
        out = run(**leaves)
        return [out, *torch.autograd.grad((out * weights.to(dtype)).sum(), list(leaves.values()))]

    want, plain, got = (
        results(usual, torch.float64),
        results(usual, torch.float32),
        results(mine, torch.float32),
    )
    for right, naive, found in zip(want, plain, got):
        assert (found - right).norm() <= 2 * (naive - right).norm()
    ungated = mine(given["x"], given["kernel"])
    assert (ungated - want[0]).norm() > 0.5 * want[0].norm()


@pytest.mark.evidence
@pytest.mark.timed
@pytest.mark.parametrize("engine", ["native", "torch"])
def test_partial_kernels_cost_what_their_length_asks_for(engine):
    """A kernel of an eighth: what the same taps give with zeros behind them, in less time, and in shorter
    windows."""
    given = drawn(n=16384, taps=2048, channels=8, dtype=torch.float32)
    short, kernel = given.pop("kernel") / 2048**0.5, torch.zeros(8, 16384)
    kernel[:, :2048] = short
    partial, full = (functools.partial(long_conv, kernel=k, engine=engine, **given) for k in (short, kernel))
    exact = long_conv(
        kernel=short.double(), **{name: x.double() for name, x in given.items()}, engine="torch"
    )
    assert (partial() - exact).norm() <= 2 * (full() - exact).norm()
    if engine == "native":
        spent = least_times({"full": full, "partial": partial}, rounds=7)
        assert spent["full"] > 1.2 * spent["partial"], spent
        lengths = [
            native.cut(Call(given["x"], k, given["gate_in"], given["gate_out"], given["skip"])).length
            for k in (short, kernel)
        ]
        assert lengths[0] <= lengths[1] / 2


@pytest.mark.evidence
@pytest.mark.timed
def test_frequencies_that_do_not_count_are_not_computed():
    """A quarter of the rows: the definition's outputs, in a quarter of the products, and in less time where
    kernels are prepared. The same kernel given whole, with zeros at those frequencies, saves nothing."""
    n, quarter = 65536, FrequencySparsity(16, (0, 1, 8, 15))
    given = drawn(b=4, n=n, taps=n, channels=8, dtype=torch.float32)
    given["kernel"] = given["kernel"] / n**0.5
    exact = {name: x.double() for name, x in given.items()}
    want = long_conv(**exact, causal=False, sparsity=quarter, engine="torch")
    counts = torch.isin(torch.arange(n) % 16, torch.tensor(quarter.kept))
    zeroed = torch.fft.ifft(torch.fft.fft(exact["kernel"]) * counts).real
    torch.testing.assert_close(long_conv(**exact | {"kernel": zeroed}, causal=False, engine="torch"), want)
    rows = {"sparse": given["kernel"], "zeroed": zeroed.float()}
    options = {"sparse": {"causal": False, "sparsity": quarter}, "zeroed": {"causal": False}}
    others = {name: x for name, x in given.items() if name != "kernel"}
    fixed = {}
    for name, kernel in rows.items():
        for engine in ("native", "monarch"):
            got = long_conv(kernel=kernel, **others, **options[name], engine=engine)
            assert (got - want).norm() <= 1e-5 * want.norm(), (name, engine)
        prepared = prepare(kernel, n, **options[name])
        fixed[name] = functools.partial(long_conv, given["x"], prepared, **options[name], engine="native")
    spent = least_times(fixed, rounds=20)
    assert spent["zeroed"] > 1.2 * spent["sparse"], spent
    call = Call(given["x"], given["kernel"], causal=False)
    whole = matrices(call, n).products
    left = matrices(replace(call, rows=16, kept=quarter.kept), n).products
    assert left == whole / 4
    assert matrices(replace(call, rows=16, kept=quarter.kept, band=0.25), n).products < 0.65 * left


@pytest.mark.evidence
def test_smooth_kernels_need_few_frequencies():
    """A quarter of the frequencies, the lowest, of kernels that fade slowly: a small error; an arbitrary
    quarter is not enough, nor is the lowest of a kernel of noise."""
    n = 1024
    t = torch.arange(n, dtype=torch.float64)
    rates = torch.tensor([[4.0], [8.0], [16.0]], dtype=torch.float64)
    slow = torch.exp(-rates * t / n) * torch.cos(torch.pi * rates * t / n) * torch.sin(torch.pi * t / n)
    x = torch.randn(2, 3, n, dtype=torch.float64)

    def error(kernel: Tensor, sparsity: FrequencySparsity) -> float:
        want = long_conv(x, kernel, causal=False)
        return float((long_conv(x, kernel, causal=False, sparsity=sparsity) - want).norm() / want.norm())

    lowest, some = FrequencySparsity(band=0.25), FrequencySparsity(16, (0, 1, 8, 15))
    assert lowest.density(n) < 0.26 and some.density(n) == 0.25
    assert error(slow, lowest) < 0.01
    assert error(slow, some) > 0.3 and error(torch.randn(3, n, dtype=torch.float64), lowest) > 0.3


@pytest.mark.evidence
@pytest.mark.timed
@pytest.mark.parametrize("n", [4096, 16384])
def test_training_holds_half_of_what_the_usual_composition_does(n):
    """The most that is held at once, forward and backward, in one step; and the step takes less time."""
    gen = torch.Generator().manual_seed(0)
    shapes = [(4, 16, n), (16, n), (4, 16, n), (4, 16, n), (16,)]
    leaves = [torch.randn(shape, generator=gen).requires_grad_() for shape in shapes]
    d_out = torch.randn(4, 16, n, generator=gen)

    def usual(x, kernel, gate_in, gate_out, skip):
        u = gate_in * x
        z = torch.fft.irfft(torch.fft.rfft(u, n=2 * n) * torch.fft.rfft(kernel, n=2 * n), n=2 * n)[..., :n]
        return gate_out * (z + skip.unsqueeze(1) * u)

    def mine(x, kernel, gate_in, gate_out, skip):
        return long_conv(x, kernel, gate_in=gate_in, gate_out=gate_out, skip=skip, engine="native")

    def train(run):
        return torch.autograd.grad(run(*leaves), leaves, d_out)

    steps = {run.__name__: functools.partial(train, run) for run in (usual, mine)}
    peaks = {name: allocations(step)[1] for name, step in steps.items()}
    assert peaks["mine"] <= peaks["usual"] / 2
    spent = least_times(steps)
    assert spent["mine"] < spent["usual"], spent


def test_compiled_whole(monkeypatch):
    """With a state in and out, in one graph."""
    monkeypatch.undo()  # the poisoned `torch.empty` is Python, which would be traced
    torch._dynamo.reset()
    given = drawn(dtype=torch.float32)
    _, state = long_conv(**given, return_state=True)
    run = functools.partial(long_conv, return_state=True)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for n in (20, 50, N):
        own = part(given, slice(0, n))
        (got, after), (want, last) = compiled(**own, state=state), run(**own, state=state)
        assert torch.equal(got, want) and torch.equal(after.inputs, last.inputs)
