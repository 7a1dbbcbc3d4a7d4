"""The long convolution: every engine against the definition, cut every way, sparse, prepared, compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from tests.conformance.common import over_budget
from tests.conformance.test_memory import allocations
from tests.kernels.test_triton import compiled_within, in_a_process, interpreter_lacks, needs_triton
from tilewise.kernels import EngineRefused
from tilewise.kernels.gpu import INTERPRETED
from tilewise.kernels.long_conv import ENGINES, Call, explain, long_conv, native, op
from tilewise.kernels.long_conv.plan import Plan

NAMES = ("x", "kernel", "gate_in", "gate_out", "skip", "before")
FAST = ["native", "torch", "monarch"]
LENGTHS = [0, 1, 2, 15, 16, 17, 31, 33, 127, 128, 129]


def make(
    batch=2, channels=None, n=33, taps=33, dtype=torch.float32, gates=True, before=False, **given
) -> Call:
    """Random inputs, exactly representable in `dtype`; kernels that fade, as learned ones do.

    Short ones have more channels: the quotient of two errors of a few numbers is chance.
    """
    channels = (32 if n < 200 else 6) if channels is None else channels
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    fade = torch.exp(-3 * torch.arange(taps) / taps)
    return Call(
        random(batch, channels, n),
        (torch.randn(channels, taps) * fade).to(wide),
        random(batch, channels, n) if gates else None,
        random(batch, channels, n) if gates else None,
        torch.randn(channels).to(wide) if gates else None,
        torch.randn(batch, channels, taps - 1).to(wide) if before else None,
        **given,
    )


def to(call: Call, dtype: torch.dtype) -> Call:
    given = {name: getattr(call, name) for name in NAMES}
    return replace(call, **{name: x if x is None else x.to(dtype) for name, x in given.items()})


def composition(call: Call) -> Tensor:
    """The usual one of torch.fft, in float32 or float64."""
    wide, n, size = call.wide, call.x.shape[2], call.kernel.shape[1]
    u = call.x.to(wide) if call.gate_in is None else call.x.to(wide) * call.gate_in
    if not call.causal:
        kernel = call.folded()
        product = torch.fft.rfft(u, n) * torch.fft.rfft(kernel, n)
        if call.sparse:
            product = product * call.counts()[: n // 2 + 1]
        z = torch.fft.irfft(product, n)
    else:
        whole = u if call.before is None else torch.cat((call.before, u), 2)
        length = 2 * max(whole.shape[2], size)
        z = torch.fft.irfft(torch.fft.rfft(whole, length) * torch.fft.rfft(call.kernel, length), length)
        z = z[..., whole.shape[2] - n : whole.shape[2]]
    if call.skip is not None:
        z = z + call.skip.unsqueeze(1) * u
    return (z if call.gate_out is None else z * call.gate_out).to(call.x.dtype)


def results(call: Call, run) -> dict[str, Tensor]:
    """Outputs and gradients of all inputs for a random one."""
    given = {name: getattr(call, name) for name in NAMES if getattr(call, name) is not None}
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    out = run(replace(call, **leaves))
    made = torch.Generator().manual_seed(1)
    d_out = torch.randn(out.shape, generator=made, dtype=torch.float64).to(torch.bfloat16).to(out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), d_out, allow_unused=True)
    found = {f"d_{name}": g for name, g in zip(leaves, gradients) if g is not None}
    return {"out": out.detach(), **found}


def check(call: Call, engine: str) -> None:
    """Errors of at most twice those of the usual composition in the call's own format, against float64: of
    the definition, or where that would take long of the composition, which agrees with it (see below)."""
    short = call.x.shape[2] * call.kernel.shape[1] <= 300_000
    exact = to(call, torch.float64)
    want = results(exact, (lambda c: long_conv(c, "definition")) if short else composition)
    got = results(call, lambda c: long_conv(c, engine))
    plain = results(call, composition) if call.x.shape[2] else got
    for name, right in want.items():
        assert got[name].shape == right.shape, name
        if not right.numel():
            continue
        assert got[name].dtype == plain[name].dtype, name
        reason = over_budget(got[name], plain[name], right)
        assert reason is None, f"{name}: {reason}"


def cut(monkeypatch, **given) -> None:
    """Let the native engine cut every call this way."""
    monkeypatch.setattr(native, "cut", lambda call: Plan(**given))


@pytest.mark.parametrize(
    "given", [{}, {"causal": False}, {"before": True}, {"causal": False, "rows": 5, "kept": (0, 2, 3)}]
)
def test_the_composition_is_the_definition(given):
    """In float64, gradients too."""
    call = make(n=300, taps=310 if given.get("before") else 290, dtype=torch.float64, **given)
    want = results(call, lambda c: long_conv(c, "definition"))
    for name, x in results(call, composition).items():
        torch.testing.assert_close(x, want[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", LENGTHS)
def test_lengths(engine, causal, n):
    check(make(n=n, taps=max(1, n), causal=causal), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [256, 1000, 1024, 1025, 2048, 4096])
def test_long(engine, causal, n):
    """In one piece: a leaf alone, passes of radix 2 and 4, halves that are zero and not."""
    check(make(n=n, taps=n, causal=causal), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("n", "taps"), [(1, 50), (3, 300), (300, 3), (300, 700), (1000, 1), (1000, 130), (40, 8)]
)
def test_kernels_of_other_lengths(engine, causal, n, taps):
    check(make(n=n, taps=taps, causal=causal), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize(("n", "taps"), [(1, 1), (1, 300), (7, 300), (300, 300), (1000, 130), (130, 2)])
def test_with_inputs_before(engine, n, taps):
    check(make(n=n, taps=taps, before=True), engine)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("length", [0, 256, 512, 1024, 4096])
def test_every_cut_of_the_native_engine(monkeypatch, causal, batch, length):
    """Sums, and overlapping windows of all lengths; odd numbers of windows have a pair that is half empty."""
    n, taps = 900, 150
    lead = taps - 1
    if length == 0:
        cut(monkeypatch, length=0, lead=0 if causal else lead, step=n, taps=taps)
    elif length == 4096:
        cut(monkeypatch, length=length, lead=0 if causal else lead, step=n, taps=taps)
    else:
        cut(monkeypatch, length=length, lead=lead, step=length - lead, taps=taps)
    check(make(batch=batch, n=n, taps=taps, causal=causal), "native")


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("left", ["gate_in", "gate_out", "skip"])
@pytest.mark.parametrize("n", [20, 600])
def test_without_optional_inputs(engine, left, n):
    check(replace(make(n=n, taps=n), **{left: None}), engine)
    check(make(n=n, taps=n, gates=False), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [2, 50, 700])
def test_low_precision(engine, dtype, n):
    check(make(n=n, taps=n, dtype=dtype), engine)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("n", [3, 600])
def test_strides(engine, n):
    """Time in the middle, slices of one projection, an expanded batch, kernels by column."""
    call = make(n=n, taps=n)
    both = torch.cat((call.gate_in, call.gate_out), 1)
    odd = replace(
        call,
        x=call.x.mT.contiguous().mT,
        gate_in=both[:, : call.x.shape[1]],
        gate_out=both[:1, call.x.shape[1] :].expand(2, -1, -1),
        kernel=call.kernel.T.contiguous().T,
        skip=torch.stack((call.skip, call.skip), 1)[:, 0],
    )
    check(odd, engine)


SPARSE = [
    (4, (0,), 1.0),
    (4, (1, 3), 1.0),
    (16, (0, 1, 8, 15), 1.0),
    (2, (1,), 0.5),
    (1, (0,), 0.25),
    (64, (0, 5, 59), 0.7),
]


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize(("rows", "kept", "band"), SPARSE)
@pytest.mark.parametrize("n", [256, 512, 1024])
def test_frequencies_left_out(engine, rows, kept, band, n):
    check(make(n=n, taps=n, causal=False, rows=rows, kept=kept, band=band), engine)


@pytest.mark.parametrize("engine", ["torch", "monarch"])
@pytest.mark.parametrize(("n", "taps"), [(60, 60), (60, 200), (300, 20)])
def test_frequencies_left_out_of_other_lengths(engine, n, taps):
    call = make(n=n, taps=taps, causal=False, rows=6, kept=(0, 2, 4), band=0.8)
    check(call, engine)
    assert "powers of 2" in explain(call).refused["native"]


def test_a_small_mistake_is_seen(monkeypatch):
    """A kernel that is 1e-5 too large, moved by a tap, or circular where it should not be."""
    right = ENGINES["torch"].run
    changes = {
        "scaled": lambda call: replace(call, kernel=call.kernel * (1 + 1e-5)),
        "moved": lambda call: replace(call, kernel=F.pad(call.kernel, (1, 0))[:, :-1]),
        "circular": lambda call: replace(call, causal=False),
    }
    for change in changes.values():

        class Wrong:
            refuse = staticmethod(lambda call: None)
            run = staticmethod(lambda call, change=change: right(change(call)))

        monkeypatch.setattr("tilewise.kernels.long_conv.ENGINES", {**ENGINES, "wrong": Wrong})
        with pytest.raises(AssertionError, match="out: error"):
            check(make(n=300, taps=300), "wrong")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n", "taps"), [(700, 700), (1024, 1024), (3000, 100), (20, 20)])
def test_prepared_kernels_give_the_same_bits(causal, n, taps):
    call = make(n=n, taps=taps, causal=causal)
    prepared = replace(call, transform=native.prepare(call))
    again = long_conv(prepared, "native")
    want = long_conv(to(call, torch.float64), "definition")
    assert over_budget(again, composition(call), want) is None
    for longer in (n - 1, 2 * n + 5) if causal and taps < n else ():
        other = replace(make(n=longer, taps=taps), kernel=call.kernel, transform=prepared.transform)
        want = long_conv(to(replace(other, transform=None), torch.float64), "definition")
        assert over_budget(long_conv(other, "native"), composition(other), want) is None


@pytest.mark.parametrize("n", [900, 4000])
def test_threads_give_the_same_bits(n):
    call = make(batch=5, channels=1, n=n, taps=300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(call, lambda c: long_conv(c, "native"))
        torch.set_num_threads(3)
        together = results(call, lambda c: long_conv(c, "native"))
    finally:
        torch.set_num_threads(threads)
    for name, x in alone.items():
        assert torch.equal(x, together[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", "torch"])
def test_very_long(engine):
    """Against the composition in float64, as the definition would take minutes."""
    call = make(batch=2, channels=16, n=65_536, taps=65_536)
    want = results(to(call, torch.float64), composition)
    plain, got = results(call, composition), results(call, lambda c: long_conv(c, engine))
    for name, right in want.items():
        assert over_budget(got[name], plain[name], right) is None, name


@pytest.mark.parametrize("engine", ["torch", "monarch"])
@pytest.mark.parametrize("given", [{}, {"before": True}, {"causal": False}])
def test_gradcheck(engine, given):
    call = make(batch=2, channels=2, n=5, taps=3, dtype=torch.float64, **given)
    names = [name for name in NAMES if getattr(call, name) is not None]
    leaves = [getattr(call, name).requires_grad_() for name in names]

    def run(*x):
        return long_conv(replace(call, **dict(zip(names, x))), engine)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("engine", FAST)
def test_operator_registrations(engine, monkeypatch):
    monkeypatch.undo()  # the poisoned `torch.empty` is Python, which the checks would trace
    for call in (
        make(n=9, taps=4),
        make(n=9, taps=4, gates=False, before=True),
        make(n=300, taps=300, causal=False),
    ):
        leaves = [x if x is None else x.requires_grad_() for x in (getattr(call, name) for name in NAMES)]
        rest = (None, call.causal, call.rows, list(call.kept), call.band, engine)
        torch.library.opcheck(torch.ops.tilewise.long_conv.default, (*leaves, *rest))


@pytest.mark.parametrize("engine", ["auto", *FAST])
def test_compiled_whole_with_few_recompilations(engine, monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")

    def run(x, kernel, gate_in, gate_out, skip):
        return long_conv(Call(x, kernel, gate_in, gate_out, skip), engine)

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for n in (64, 80, 97, 100, 130, 160, 200, 257, 300, 512):
        call = make(channels=8, n=n, taps=90)
        given = [getattr(call, name) for name in NAMES[:5]]
        assert torch.equal(compiled(*given), run(*given))
    assert counter.frame_count <= 2


def test_the_kernel_s_gradient_is_left_out_where_it_is_not_wanted():
    call = make(n=300, taps=300)
    for engine in FAST:
        leaf = replace(call, x=call.x.clone().requires_grad_())
        long_conv(leaf, engine).sum().backward()
        assert leaf.x.grad is not None and call.kernel.grad is None
    learned = replace(call, kernel=call.kernel.clone().requires_grad_(), transform=native.prepare(call))
    with pytest.raises(ValueError, match="a prepared kernel learns nothing"):
        long_conv(learned, "native")


def test_memory_of_training_is_less_than_half_of_the_composition_s():
    """What is kept between forward and backward, and the most that is held at once, gradients included."""
    call = make(batch=4, channels=64, n=4096, taps=4096)
    leaves = [getattr(call, name).requires_grad_() for name in NAMES[:5]]
    d_out = torch.randn(call.x.shape)

    def peaks(run) -> tuple[int, int]:
        made = []
        forward = allocations(lambda: made.append(run(call)))[1]
        return forward, allocations(lambda: made.extend(torch.autograd.grad(run(call), leaves, d_out)))[1]

    usual = peaks(composition)
    for engine in ("native", "torch"):
        mine = peaks(lambda c, engine=engine: long_conv(c, engine))
        assert all(a <= b / 2 for a, b in zip(mine, usual)), (engine, mine, usual)


def test_engines_that_cannot_run_say_so():
    call = make(dtype=torch.float64)
    assert "computes in float32" in explain(call).refused["native"] and explain(call).engine == "torch"
    with pytest.raises(EngineRefused, match="engine 'native' cannot run this call: computes in float32"):
        long_conv(call, "native")
    if not INTERPRETED:
        with pytest.raises(EngineRefused, match="runs on GPUs|triton is not installed"):
            long_conv(call, "triton")
    assert set(op.IMPLEMENTATIONS) == set(ENGINES) - {"definition"}


@pytest.mark.parametrize("cut_at", [None, 512])
def test_rows_do_not_see_each_other(monkeypatch, cut_at):
    """Rows of unlike sizes share transforms: each is as exact as alone, and what is no number stays where it
    is."""
    n, taps = 600, 100 if cut_at else 600
    if cut_at:
        cut(monkeypatch, length=cut_at, lead=taps - 1, step=cut_at - taps + 1, taps=taps)
    call = make(batch=4, n=n, taps=taps)
    sizes = torch.tensor([1e6, 1e-3, 1.0, 3e-5]).view(4, 1, 1)
    call = replace(call, x=call.x * sizes)
    want = results(to(call, torch.float64), lambda c: long_conv(c, "definition"))
    plain, got = results(call, composition), results(call, lambda c: long_conv(c, "native"))
    for name in ("out", "d_x", "d_gate_in", "d_gate_out"):
        for row in range(4):
            reason = over_budget(got[name][row], plain[name][row], want[name][row])
            assert reason is None, f"{name} of row {row}: {reason}"
    for name in ("d_kernel", "d_skip"):
        assert over_budget(got[name], plain[name], want[name]) is None, name
    for bad in (torch.nan, torch.inf):
        x = call.x.clone()
        x[1, :, 300] = bad
        found = results(replace(call, x=x), lambda c: long_conv(c, "native"))
        for row in (0, 2, 3):
            assert over_budget(found["out"][row], plain["out"][row], want["out"][row]) is None
            assert over_budget(found["d_x"][row], plain["d_x"][row], want["d_x"][row]) is None
        assert not found["out"][1].isfinite().all()
    x = call.x.clone()
    x[1] = 0
    assert (long_conv(replace(call, x=x), "native")[1] == 0).all()


IN_TRITON = """
from unittest.mock import patch
import torch
from tests.kernels.test_long_conv import check, make, to
from tilewise.kernels.long_conv import long_conv, triton
from tilewise.kernels.long_conv.plan import Plan
for causal in (True, False):
    for n in (16, 17, 129, 255, 256):
        check(make(n=n, taps=n, causal=causal), "triton")
    check(make(n=600, taps=700, causal=causal, channels=3, batch=3), "triton")  # a row without another
    check(make(n=300, taps=40, causal=causal, gates=False), "triton")
    with patch.object(triton, "_plan", lambda call, longest: Plan(256, 39, 217, 40)):  # several windows
        check(make(n=700, taps=40, causal=causal, channels=5, batch=3), "triton")
check(make(n=120, taps=90, before=True), "triton")
check(make(n=1024, taps=1024, channels=4), "triton")
check(make(n=1300, taps=1300, channels=2, batch=1, dtype=torch.bfloat16), "triton")  # float32 would refuse it
call = make(n=90, taps=90, dtype=torch.bfloat16)
assert torch.equal(long_conv(call, "triton"), long_conv(to(call, torch.float32), "triton").bfloat16())
for wrong in (float("nan"), float("inf")):  # nobody else's business, whoever shares its transform
    call = make(n=100, taps=100)
    want = long_conv(call, "triton")
    call.x[1, :, 7] = wrong
    got = long_conv(call, "triton")
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    assert not got[1, :, 7:].isfinite().any()
call = make(n=100, taps=100, gates=False)
call.x[1] *= 1e-20
torch.testing.assert_close(long_conv(call, "triton")[1], long_conv(call, "definition")[1], rtol=0, atol=1e-25)
print("all right")
"""


@pytest.mark.slow
def test_triton_in_the_interpreter():
    """Held to the same errors as the other engines, forward and backward; rows of one transform apart."""
    if reason := interpreter_lacks():
        pytest.skip(reason)
    assert "all right" in in_a_process("-c", IN_TRITON, TRITON_INTERPRET="1")


FOR_A_GPU = """
import torch
from tests.kernels.test_long_conv import make
from tests.kernels.test_triton import compiled, target_gpu
from tilewise.kernels.long_conv import triton as engine, triton_windows

def start(grid, **arguments):
    compiled(triton_windows.convolve, **arguments)

target_gpu(90)
engine.start = start
engine.forward(make(channels=2, n=100, taps=100, before=True))
engine.forward(make(channels=2, n=1024, taps=1024, causal=False))
engine.forward(make(channels=2, n=1024, taps=1024))
engine.forward(make(channels=2, n=2048, taps=2048, dtype=torch.bfloat16))
"""


@pytest.mark.slow
@needs_triton
def test_triton_compiles_for_a_gpu(tmp_path):
    """To machine code for an H100, within its 227 KiB of shared memory."""
    assert compiled_within(227, tmp_path, "-c", FOR_A_GPU) == ["convolve"] * 4
