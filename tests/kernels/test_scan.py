"""The scan kernel: every engine and rule against the float64 definition, forward and backward."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conformance.common import relative_error
from tests.kernels.test_triton import compiled_within, in_a_process, interpreter_lacks, needs_triton
from tilewise.kernels import EngineRefused
from tilewise.kernels.scan import ENGINES, Call, explain, native, scan

RULES = ("add", "delta")
DECAYS = (None, "scalar", "channel")
FAST = [name for name in ENGINES if name not in ("definition", "triton")]  # Triton: see the last tests
# The widest format of an engine that stops short of float64.
WIDEST = {"native": torch.float32, "triton": torch.float32}
every_engine = pytest.mark.parametrize("engine", FAST)
every_kind = pytest.mark.parametrize(("rule", "kind"), list(itertools.product(RULES, DECAYS)))


def skip_unless_here(engine: str) -> None:
    if engine == "native" and (reason := native.unavailable()):
        pytest.skip(f"no native engine here: {reason}")


def made(
    n: int,
    kind: str | None,
    *,
    b: int = 2,
    heads: int = 2,
    group: int = 1,
    d_k: int = 16,
    d_v: int = 24,
    beta: bool = True,
    state: bool = True,
    strength: float = 1.0,
    dtype: torch.dtype = torch.float64,
    offsets: Tensor | None = None,
    seed: int = 0,
    **options,
) -> Call:
    """A random call whose numbers are exact in `dtype`; decays, betas and states in float32 or wider."""
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, v = draw(b, heads * group, n, d_k), draw(b, heads, n, d_v)
    k = torch.nn.functional.normalize(draw(b, heads, n, d_k), dim=-1)
    shape = (b, heads, n) if kind == "scalar" else (b, heads, n, d_k)
    decay = None if kind is None else -strength * torch.rand(shape, generator=gen, dtype=torch.float64)
    sequences = b if offsets is None else len(offsets) - 1
    first = draw(sequences, heads, d_k, d_v)
    betas = torch.rand(b, heads, n, generator=gen, dtype=torch.float64)
    low = [x.to(dtype) for x in (q, k, v)]
    high = [
        None if x is None or not wanted else x.to(wide)
        for x, wanted in ((decay, True), (betas, beta), (first, state))
    ]
    return Call(*low, *high, offsets, scale=0.3, **options)  # type: ignore[misc,arg-type]


def tensors(call: Call) -> dict[str, Tensor]:
    found = {name: getattr(call, name) for name in ("q", "k", "v", "decay", "beta", "state")}
    return {name: x for name, x in found.items() if x is not None}


def with_tensors(call: Call, **given: Tensor) -> Call:
    return dataclasses.replace(call, **given)


def in_pieces(call: Call, engine: str, cuts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Outputs and final states of calls one after the other, each from the state that the last one left."""
    outs, state = [], call.state
    for start, end in itertools.pairwise((0, *cuts, call.q.shape[2])):
        piece = {name: x[:, :, start:end] for name, x in tensors(call).items() if name != "state"}
        out, state = scan(with_tensors(call, **piece, state=state), engine)
        outs.append(out)
    return torch.cat(outs, 2), state


def results(
    call: Call, engine: str, weights: tuple[Tensor, Tensor], dtype: torch.dtype, cuts: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """Outputs, final states and all gradients, in float64, of the call with its tensors in `dtype`."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors(call).items()}
    out, after = in_pieces(with_tensors(call, **leaves), engine, cuts)
    found = torch.autograd.grad(
        (out, after), leaves.values(), (weights[0].to(out.dtype), weights[1].to(after.dtype))
    )
    got = {"out": out, "after": after} | {f"d_{name}": x for name, x in zip(leaves, found)}
    return {name: x.detach().double() for name, x in got.items()}


def weights_for(call: Call, seed: int = 1) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shape = (*call.q.shape[:3], call.v.shape[3])
    draws = (torch.randn(s, generator=gen, dtype=torch.float64) for s in (shape, call.state_shape()))
    return tuple(x.float().double() for x in draws)  # type: ignore[return-value]


def check(call: Call, engine: str) -> None:
    """Errors against float64 of at most twice those of the definition in the format that the engine computes in.

    Errors are relative to the size of each result. The definition may happen to be more exact than sums over
    channels and the tokens of a tile can be, which round by the root of their number of half units.
    """
    dtype = WIDEST.get(engine, torch.float64)
    weights = weights_for(call)
    low = with_tensors(call, **{name: x.to(dtype) for name, x in tensors(call).items()})
    exact = results(
        with_tensors(low, **{n: x.double() for n, x in tensors(low).items()}),
        "definition",
        weights,
        torch.float64,
    )
    naive, got = results(low, "definition", weights, dtype), results(low, engine, weights, dtype)
    rounding = torch.finfo(dtype).eps / 2 * (call.k.shape[3] + 64) ** 0.5
    for name, want in exact.items():
        size = want.norm().clamp(min=1e-3)
        allowed = 2 * max((naive[name] - want).norm() / size, rounding)
        error = (got[name] - want).norm() / size
        assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}"


@every_engine
@every_kind
@pytest.mark.parametrize("n", [1, 2, 8, 9, 15, 16, 17, 63, 64, 65, 129])
def test_lengths(engine, rule, kind, n):
    skip_unless_here(engine)
    check(made(n, kind, rule=rule), engine)


@every_engine
@every_kind
@pytest.mark.parametrize(("beta", "state"), [(False, False), (True, False), (False, True)])
def test_what_may_be_left_out(engine, rule, kind, beta, state):
    skip_unless_here(engine)
    check(made(70, kind, rule=rule, beta=beta, state=state), engine)


@every_engine
@every_kind
@pytest.mark.parametrize("group", [2, 4, 7])
def test_grouped_queries(engine, rule, kind, group):
    skip_unless_here(engine)
    check(made(67, kind, rule=rule, b=1, group=group), engine)


@every_engine
@every_kind
@pytest.mark.parametrize(("d_k", "d_v"), [(2, 1), (3, 65), (33, 16), (64, 64), (128, 40)])
def test_sizes_of_heads(engine, rule, kind, d_k, d_v):
    skip_unless_here(engine)
    # Keys of few channels repeat, and what is left of a first state after 80 of them is no number to compare.
    n = {2: 5, 3: 17}.get(d_k, 80)
    check(made(n, kind, rule=rule, b=1, heads=3, d_k=d_k, d_v=d_v), engine)


@every_engine
@every_kind
def test_packed_sequences_with_empty_ones(engine, rule, kind):
    skip_unless_here(engine)
    offsets = torch.tensor([0, 0, 30, 31, 31, 120, 187, 187])
    check(made(187, kind, rule=rule, b=1, offsets=offsets), engine)


@every_engine
@every_kind
@pytest.mark.parametrize("strength", [1e-4, 0.1, 30.0, 300.0])
def test_weak_and_strong_decays(engine, rule, kind, strength):
    """With strong ones most gradients are differences of what cancels; they are as accurate as the step loop's."""
    skip_unless_here(engine)
    check(made(150, kind, rule=rule, strength=strength), engine)


@every_engine
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_a_decay_of_minus_infinity_forgets(engine, rule, kind):
    skip_unless_here(engine)
    dtype = WIDEST.get(engine, torch.float64)
    call = made(100, kind, rule=rule, dtype=dtype)
    decay = call.decay.clone()
    decay[:, :, 40] = -torch.inf
    leaves = {name: x.requires_grad_() for name, x in tensors(with_tensors(call, decay=decay)).items()}
    out, after = scan(with_tensors(call, **leaves), engine)
    rest = {name: x[:, :, 40:].detach() for name, x in leaves.items() if name != "state"}
    alone, _ = scan(with_tensors(call, **rest, state=None), engine)
    torch.testing.assert_close(out[:, :, 40:], alone)
    gradients = torch.autograd.grad(out[:, :, 40:].sum() + after.sum(), leaves.values())
    assert all(x.isfinite().all() for x in gradients)
    by_name = dict(zip(leaves, gradients))
    assert (by_name["v"][:, :, :40] == 0).all() and (by_name["state"] == 0).all()


@every_engine
@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_formats(engine, rule, kind, dtype):
    """Inputs in few bits, everything else in float32: no worse than twice what rounding the exact answer gives."""
    skip_unless_here(engine)
    call = made(140, kind, rule=rule, dtype=dtype)
    exact = scan(with_tensors(call, **{n: x.double() for n, x in tensors(call).items()}), "definition")
    out, after = scan(call, engine)
    assert out.dtype == dtype and after.dtype == torch.float32
    rounding = (exact[0].to(dtype).double() - exact[0]).norm()
    assert (out.double() - exact[0]).norm() <= 2 * rounding
    assert (after.double() - exact[1]).norm() <= 1e-5 * exact[1].norm()
    weights = weights_for(call)
    wide = results(
        with_tensors(call, **{n: x.float() for n, x in tensors(call).items()}), engine, weights, torch.float32
    )
    leaves = {name: x.requires_grad_() for name, x in tensors(call).items()}
    got = torch.autograd.grad(scan(with_tensors(call, **leaves), engine), leaves.values(),
                              (weights[0].to(dtype), weights[1].float()))  # fmt: skip
    for (name, leaf), gradient in zip(leaves.items(), got):
        want = wide[f"d_{name}"]
        assert gradient.dtype == leaf.dtype
        # Weights of outputs were rounded as well, which moves each gradient by as much.
        assert (gradient.double() - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm(), name


@every_engine
@every_kind
def test_nothing_comes_from_the_future(engine, rule, kind):
    """Bit for bit, whatever later tokens are."""
    skip_unless_here(engine)
    dtype = WIDEST.get(engine, torch.float64)
    call = made(130, kind, rule=rule, dtype=dtype)
    other = made(130, kind, rule=rule, dtype=dtype, seed=5, strength=3.0)
    for t in (0, 5, 63, 64, 100):
        mixed = {}
        for name, x in tensors(call).items():
            mixed[name] = (
                x
                if name == "state"
                else torch.cat((x[:, :, : t + 1], tensors(other)[name][:, :, t + 1 :]), 2)
            )
        assert torch.equal(
            scan(with_tensors(call, **mixed), engine)[0][:, :, : t + 1], scan(call, engine)[0][:, :, : t + 1]
        )


@every_engine
@every_kind
def test_split_anywhere(engine, rule, kind):
    skip_unless_here(engine)
    dtype = WIDEST.get(engine, torch.float64)
    call = made(170, kind, rule=rule, dtype=dtype)
    whole, last = scan(call, engine)
    state, outs = call.state, []
    for start, end in itertools.pairwise([0, 1, 3, 64, 70, 71, 135, 170, 170]):
        part = {name: x[:, :, start:end] for name, x in tensors(call).items() if name != "state"}
        out, state = scan(with_tensors(call, **part, state=state), engine)
        outs.append(out)
    exact = scan(with_tensors(call, **{n: x.double() for n, x in tensors(call).items()}), "definition")
    naive = scan(call, "definition")
    for parts, one, want in ((torch.cat(outs, 2), naive[0], exact[0]), (state, naive[1], exact[1])):
        allowed = 2 * max((one.double() - want).norm(), 2 * torch.finfo(dtype).eps * want.norm())
        assert (parts.double() - want).norm() <= allowed
    assert torch.equal(last, scan(call, engine)[1])


@every_engine
@every_kind
def test_strides_make_no_difference(engine, rule, kind):
    skip_unless_here(engine)
    dtype = WIDEST.get(engine, torch.float64)
    call = made(90, kind, rule=rule, dtype=dtype)
    moved = {}
    for name, x in tensors(call).items():
        buffer = torch.full((*x.transpose(1, 2).shape, 2), float("nan"), dtype=x.dtype)
        buffer[..., 0] = x.transpose(1, 2)
        moved[name] = buffer[..., 0].transpose(1, 2)
        assert not moved[name].is_contiguous()
    weights = weights_for(call)
    want = results(call, engine, weights, dtype)
    leaves = {name: x.requires_grad_() for name, x in moved.items()}
    out, after = scan(with_tensors(call, **leaves), engine)
    got = (out, after, *torch.autograd.grad((out, after), leaves.values(), [w.to(dtype) for w in weights]))
    assert all(torch.equal(x.double(), y) for x, y in zip(got, want.values()))


@every_engine
@every_kind
def test_expanded_decays_and_keys(engine, rule, kind):
    """One decay for all tokens, one key for all heads: views without memory of their own."""
    skip_unless_here(engine)
    dtype = WIDEST.get(engine, torch.float64)
    call = made(75, kind, rule=rule, dtype=dtype)
    views = {"k": call.k[:, :1].expand_as(call.k)}
    if call.decay is not None:
        views["decay"] = call.decay[:1, :, :1].expand_as(call.decay)
    got = scan(with_tensors(call, **views), engine)
    want = scan(with_tensors(call, **{name: x.contiguous() for name, x in views.items()}), engine)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@every_engine
@every_kind
@pytest.mark.parametrize("chunk", [1, 64, 100, 128, 1000])
def test_chunks_change_nothing_but_rounding(engine, rule, kind, chunk):
    skip_unless_here(engine)
    check(made(330, kind, rule=rule, b=1, chunk=chunk), engine)


@every_engine
@pytest.mark.parametrize("rule", RULES)
def test_nothing_at_all(engine, rule):
    skip_unless_here(engine)
    dtype = WIDEST.get(engine, torch.float64)
    call = made(0, "channel", rule=rule, dtype=dtype)
    leaves = {name: x.requires_grad_() for name, x in tensors(call).items()}
    out, after = scan(with_tensors(call, **leaves), engine)
    assert out.shape == (2, 2, 0, 24) and torch.equal(after, call.state)
    assert torch.equal(torch.autograd.grad(after.sum(), leaves["state"])[0], torch.ones_like(after))
    none = made(
        0, "scalar", rule=rule, dtype=dtype, b=1, offsets=torch.zeros(1, dtype=torch.int64), state=False
    )
    assert scan(none, engine)[1].shape == (0, 2, 16, 24)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", DECAYS)
def test_gradients_by_differences(rule, kind):
    """Of the torch engine's own backward pass, final states included."""
    call = made(19, kind, rule=rule, b=1, heads=1, d_k=3, d_v=2, strength=0.5)
    names = list(tensors(call))

    def run(*given):
        return scan(with_tensors(call, **dict(zip(names, given))), "torch")

    assert torch.autograd.gradcheck(
        run, [x.requires_grad_() for x in tensors(call).values()], fast_mode=False
    )


def held_at_65536(rule: str, kind: str | None, runs: list[tuple[str, tuple[int, ...]]]) -> None:
    """Engines, whole or in pieces, over 65,536 tokens with decays from vanishing to overwhelming.

    Outputs and last states are held to the definition's, step by step in float64, and gradients, which it would
    take minutes for, to the torch engine's in float64.
    """
    n = 65_536
    call = made(n, kind, rule=rule, b=1, heads=1, d_k=8, d_v=8, dtype=torch.float32, strength=0.02)
    if call.decay is not None:
        decay = call.decay.clone()
        decay[:, :, ::1000] = -200.0
        call = with_tensors(call, decay=decay)
    weights = weights_for(call)
    exact = results(call, "torch", weights, torch.float64)
    wide = with_tensors(call, **{name: x.double() for name, x in tensors(call).items()})
    exact["out"], exact["after"] = scan(wide, "definition")
    for engine, cuts in runs:
        got = results(call, engine, weights, torch.float32, cuts)
        for name, want in exact.items():
            error = relative_error(got[name], want, least=1e-6)
            assert error < 2e-6, f"{engine} cut at {cuts}: {name} off by {error:.1e}"


@pytest.mark.slow
@every_kind
def test_65536_tokens_whole_and_split_anywhere(rule, kind):
    """Chunks, steps and pieces agree; each gradient runs through all of the pieces."""
    engines = [engine for engine in FAST if engine != "native" or not native.unavailable()]
    gen = torch.Generator().manual_seed(7)
    anywhere = tuple(sorted(torch.randint(2, 65_535, (3,), generator=gen).tolist()))
    held_at_65536(rule, kind, [(engine, cuts) for engine in engines for cuts in ((), (1, *anywhere, 65_535))])


MEASURE = """
import pathlib, sys, torch
from tilewise.kernels.scan import Call, scan
torch.set_num_threads(1)
n, d = int(sys.argv[2]), 64
q, k, v = (torch.randn(1, 1, n, d).requires_grad_() for _ in range(3))
decay = torch.full((1, 1, n), -0.01)
chunk = int(sys.argv[3]) or None
def step(n):
    out, _ = scan(Call(q[:, :, :n], k[:, :, :n], v[:, :, :n], decay[:, :, :n], scale=0.1, chunk=chunk), sys.argv[1])
    out.backward(torch.ones_like(out))
def held():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
step(1024)
before = held()
step(n)
print(held() - before)
"""


def peak_mib(engine: str, n: int, chunk: int = 0) -> float:
    """MiB that a training step over n tokens adds to what is held before it."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which this system has not")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, engine, str(n), str(chunk)],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout) / 1024


@every_engine
def test_memory_is_that_of_the_tokens(engine):
    """Twice what outputs and all gradients take, and what is worked on at once."""
    skip_unless_here(engine)
    n = 65_536
    rows = n * 64 * 4 / 2**20
    assert peak_mib(engine, n) < 2 * 6 * rows + 96


def test_longer_chunks_keep_fewer_states():
    skip_unless_here("native")
    n = 65_536
    often, rarely = (peak_mib("native", n, chunk) for chunk in (64, 4096))
    states = n // 64 * 64 * 64 * 4 / 2**20  # MiB of one for every 64 tokens
    assert often - rarely > 0.6 * states, f"{often:.0f} and {rarely:.0f} MiB; {states:.0f} of states"


def test_a_named_engine_runs_or_raises():
    call = made(5, None)
    assert explain(call).engine == "torch" and "float64" in explain(call).refused["native"]
    with pytest.raises(EngineRefused, match="float64"):
        scan(call, "native")
    with pytest.raises(ValueError, match="engine must be"):
        scan(call, "cuda")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", DECAYS)
def test_operator_registration(rule, kind):
    call = made(70, kind, rule=rule, b=1)
    arguments = (call.q, call.k, call.v, call.decay, call.beta, call.state, None, rule, 0.3, None, "torch")
    given = tuple(x.requires_grad_() if isinstance(x, Tensor) else x for x in arguments)
    torch.library.opcheck(torch.ops.tilewise.scan.default, given)


@every_engine
def test_compiles_whole(engine):
    """One graph, and at most two compilations over ten lengths."""
    skip_unless_here(engine)
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    def run(call_tensors):
        out, after = scan(Call(*call_tensors, rule="delta", scale=0.3), engine)
        return out.sum() + after.sum()

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    dtype = WIDEST.get(engine, torch.float64)
    for n in (64, 65, 70, 80, 97, 100, 128, 130, 200, 257):
        call = made(n, "scalar", rule="delta", dtype=dtype, b=1)
        given = [x.clone().requires_grad_() for x in tensors(call).values()]
        got = compiled(given)
        want = run(given)
        torch.testing.assert_close(got, want)
        assert torch.equal(torch.autograd.grad(got, given[0])[0], torch.autograd.grad(want, given[0])[0])
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", DECAYS)
def test_threads_make_no_difference(kind):
    """Splitting values between threads changes no bit."""
    skip_unless_here("native")
    call = made(150, kind, rule="delta", b=1, heads=1, d_k=32, d_v=64, dtype=torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(scan(call, "native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found))


LESSER = """
import torch
from tests.kernels.test_scan import check, made
print(torch.backends.cpu.get_cpu_capability())
for rule in ("add", "delta"):
    for kind in (None, "scalar", "channel"):
        check(made(90, kind, rule=rule, b=1, d_k=20, d_v=12), "native")
print("all right")
"""


@pytest.mark.parametrize("level", ["avx2", "default"])
def test_lesser_machines_are_right_too(level):
    """PyTorch's switch lowers what the engine is compiled for: other widths of vectors, another build."""
    skip_unless_here("native")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", LESSER], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "all right" in done.stdout, done.stdout + done.stderr


IN_TRITON = """
import torch
from tests.kernels.test_scan import check, made, scan, tensors, with_tensors
for rule in ("add", "delta"):
    for kind in (None, "scalar", "channel"):
        check(made(9, kind, rule=rule, b=1, d_k=5, d_v=70), "triton")  # token by token
        check(made(65, kind, rule=rule, b=1, d_k=5, d_v=70), "triton")  # values in two blocks
        lacks = {"beta": False, "state": False}
        check(made(150, kind, rule=rule, heads=1, group=2, strength=30.0, chunk=64, **lacks), "triton")
        for n in (23, 150):
            offsets = torch.tensor([0, 0, 9, 10, n, n])
            check(made(n, kind, rule=rule, b=1, heads=1, strength=30.0, chunk=64, offsets=offsets), "triton")
        for n in (9, 20):
            call = made(n, kind, rule=rule, dtype=torch.bfloat16)
            moved = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in tensors(call).items()}
            wide = with_tensors(call, **{name: x.float() for name, x in tensors(call).items()})
            for got, want in zip(scan(with_tensors(call, **moved), "triton"), scan(wide, "triton")):
                assert torch.equal(got, want.to(got.dtype))
    check(made(70, "channel", rule=rule, b=1, heads=1, d_k=130, d_v=140), "triton")  # both wide
    never = made(40, "channel", rule=rule, b=1, heads=1, dtype=torch.float32)
    never.decay[:, :, 7:9] = -torch.inf
    for got, want in zip(scan(never, "triton"), scan(never, "definition")):
        torch.testing.assert_close(got, want)
    none = made(0, "scalar", rule=rule, dtype=torch.float32)
    leaves = {name: x.requires_grad_() for name, x in tensors(none).items()}
    out, after = scan(with_tensors(none, **leaves), "triton")
    assert out.shape == (2, 2, 0, 24) and torch.equal(after, none.state)
    assert torch.equal(torch.autograd.grad(after.sum(), leaves["state"])[0], torch.ones_like(after))
print("all right")
"""


@pytest.mark.slow
def test_triton_in_the_interpreter():
    """Every rule and decay, forward and backward, held to the same errors as the other engines."""
    if reason := interpreter_lacks():
        pytest.skip(reason)
    assert "all right" in in_a_process("-c", IN_TRITON, TRITON_INTERPRET="1")


IN_FEWER_CHUNKS = """
import sys
from tests.kernels.test_scan import held_at_65536
from tilewise.kernels.scan import triton as engine
engine.TILE = 256  # tokens of a chunk: the interpreter takes as long for 64
held_at_65536(*sys.argv[1:], [("triton", (1, 32_773))])
print("all right")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "kind"), [("add", "channel"), ("delta", "scalar")])
def test_triton_splits_65536_tokens(rule, kind):
    """In the interpreter, which takes minutes for all rules and decays."""
    if reason := interpreter_lacks():
        pytest.skip(reason)
    assert "all right" in in_a_process("-c", IN_FEWER_CHUNKS, rule, kind, TRITON_INTERPRET="1")


FOR_A_GPU = """
import torch
from tests.kernels.test_scan import made
from tests.conformance.common import relative_error
from tests.kernels.test_triton import compiled, target_gpu
from tilewise.kernels.scan import triton as engine

def start(kernel, grid, arguments, warps):
    compiled(kernel, **arguments, num_warps=warps, num_stages=1, enable_fp_fusion=True)

target_gpu(90)
engine.start = start
for rule, kind, options in (
    ("add", None, {"beta": False, "state": False, "d_k": 128, "d_v": 128}),
    ("delta", "scalar", {"group": 2, "offsets": torch.tensor([0, 9, 90])}),
    ("delta", "channel", {"d_k": 64, "d_v": 64}),
):
    engine.forward(made(3, kind, rule=rule, b=1, dtype=torch.bfloat16, d_k=64))
    call = made(90, kind, rule=rule, b=1, dtype=torch.bfloat16, **options)
    out, after = engine.forward(call)
    engine.backward(call, torch.randn_like(out), torch.randn_like(after))
"""


@pytest.mark.slow
@needs_triton
def test_triton_compiles_for_a_gpu(tmp_path):
    """To machine code for an H100, within its 227 KiB of shared memory."""
    names = compiled_within(227, tmp_path, "-c", FOR_A_GPU)
    backwards = ["d_values", "d_states", "d_keys", "d_queries"]
    add, delta = (["states"], ["invert", "states"])
    expected = ["steps", *add, "outputs", *add, *backwards]
    assert names == expected + 2 * ["steps", *delta, "outputs", *delta, *backwards]


def test_triton_says_why_not():
    call = made(5, None, dtype=torch.float32)
    assert explain(call).refused["triton"].startswith(("runs on GPUs", "triton is not installed"))
