"""The native engine beyond the conformance suite: every path it can take, lesser machines, odd numbers, memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import tilewise
from tests.conformance.common import exact, grid, over_budget, qkv, run_or_refuse, with_grads
from tilewise.attention import Pass, Plan, attend_tiles
from tilewise.kernels.attend_tiles import native
from tilewise.tiles import Causal, Padding, TileMap, Tiling, Window

LOW = [torch.float32, torch.bfloat16, torch.float16]


def _check(plan: Plan, inputs, bias=None) -> None:
    q, k, v = inputs
    d_out = torch.randn(*q.shape[:3], v.shape[3], dtype=torch.float64)
    run = run_or_refuse("native", q, k, v, plan, bias=bias)
    assert run is not None
    seen = grid(plan, q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    exact(q, k, v, seen, d_out, bias).check(with_grads(run, q, k, v, d_out, bias))


def _plan(mask, n_q, n_k, tiles=None, q_order=None, k_order=None) -> Plan:
    view = mask.bind(n_q, n_k)
    return Plan((Pass(view, tiles, q_order, k_order),), view)


# Few queries over many keys decode; one query streams; more are products; more than 32 are strips.
@pytest.mark.parametrize("n_q", [1, 2, 3, 8, 16, 17, 40])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (4, 2), (8, 1)])
@pytest.mark.parametrize("n_k", [63, 600, 1029])
def test_decoding(n_q, heads, kv_heads, n_k):
    inputs = qkv(2, heads, kv_heads, n_q, n_k, d=12, d_v=7)
    ragged = Padding(torch.arange(n_k).ge(torch.tensor([[n_k // 2], [0]])))
    _check(_plan(Causal() & ragged, n_q, n_k), inputs)
    _check(_plan(Window(100, 0), n_q, n_k), inputs, bias=torch.randn(1, heads, 1, n_k, dtype=torch.float64))
    keep = torch.rand(2, heads, -(-n_q // 4), -(-n_k // 24)) > 0.5
    order = torch.stack([torch.randperm(n_k) for _ in range(2 * kv_heads)]).view(2, kv_heads, n_k)
    tiles = TileMap.from_mask(keep, (4, 24))
    _check(_plan(Causal(), n_q, n_k, tiles, k_order=order), inputs)


def test_decoding_balances_ragged_batches():
    """Work is cut across heads: one long sequence beside short ones still equals the answer of each alone."""
    lengths = [1, 3000, 17, 260]
    q, k, v = qkv(4, 4, 2, 1, 3000, d=16, dtype=torch.float32)
    keep = torch.arange(3000) >= 3000 - torch.tensor(lengths).view(-1, 1)
    got = tilewise.attend(q, k, v, mask=Causal() & Padding(keep), engine="native", return_lse=True)
    for i, n in enumerate(lengths):
        alone = tilewise.attend(q[i : i + 1], k[i : i + 1, :, -n:], v[i : i + 1, :, -n:], engine="definition")
        seen = keep[i].view(1, -1)
        exact(q[i : i + 1], k[i : i + 1], v[i : i + 1], seen).check({"out": got.out[i : i + 1]})
        assert torch.allclose(got.out[i : i + 1], alone, rtol=1e-4, atol=1e-5)


# Strips, chunks and batches of chunks: lengths around each of their limits.
@pytest.mark.parametrize("n", [127, 128, 129, 511, 513, 700])
@pytest.mark.parametrize("tile", [(128, 128), (64, 200), (300, 48), (16, 130), (1, 64), (5, 3)], ids=str)
def test_every_cut(n, tile):
    inputs = qkv(1, 2, 1, n, d=8)
    keep = torch.rand(1, 2, -(-n // tile[0]), -(-n // tile[1])) > 0.4
    _check(_plan(Causal(), n, n, TileMap.from_mask(keep, tile)), inputs)


def test_many_heads_are_worked_on_in_spans():
    """More than fits the memory that is held at once: 96 heads of 2,100 tokens, D 64."""
    q, k, v = qkv(1, 96, 96, 2100, d=64, dtype=torch.float32)
    got = tilewise.attend(q, k, v, mask="causal", engine="native")
    for head in (0, 40, 95):
        one = [x[:, head : head + 1] for x in (q, k, v)]
        exact(*one, torch.ones(2100, 2100).tril().bool()).check({"out": got[:, head : head + 1]})


@pytest.mark.parametrize(
    "bias_shape", [(1, 1, 1, 70), (2, 1, 70, 70), (1, 4, 70, 1), (1, 1, 1, 1), (2, 4, 70, 70)]
)
@pytest.mark.parametrize("tile", [None, (32, 32), (2, 16)])
def test_bias_gradients_of_every_broadcast(bias_shape, tile):
    """Threads may not add to one place at once: broadcast biases are the places that heads share."""
    inputs = qkv(2, 4, 2, 70)
    tiles = None
    if tile is not None:
        tiles = TileMap.from_mask(torch.rand(2, 4, -(-70 // tile[0]), -(-70 // tile[1])) > 0.3, tile)
    _check(_plan(Causal(), 70, 70, tiles), inputs, bias=torch.randn(bias_shape, dtype=torch.float64))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("n_q", [1, 200])
def test_non_finite_values_are_computed_as_pytorch_does(dtype, n_q):
    q, k, v = qkv(1, 1, 1, n_q, 200, dtype=dtype)
    for where, value in (
        ("k", torch.nan),
        ("q", torch.inf),
        ("v", -torch.inf),
        ("v", torch.nan),
        ("k", torch.inf),
    ):
        inputs = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
        at = min(150, inputs[where].shape[2] - 1)
        inputs[where][0, 0, at, 3] = value
        got = tilewise.attend(**inputs, mask="causal", engine="native")
        want = tilewise.attend(
            **{n: x.double() for n, x in inputs.items()}, mask="causal", engine="definition"
        )
        # Whether a weight of 0 times what is hidden becomes NaN is up to how tiles lie; who sees it gets the same.
        rows = slice(None) if n_q == 1 else slice(at, at + 1) if where == "q" else slice(at, None)
        got, want = got[:, :, rows], want[:, :, rows]
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        assert not want.isfinite().all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("n_q", [1, 5, 200])
def test_nothing_but_nan_is_no_empty_row(n_q, dtype):
    q, k, v = qkv(1, 2, 1, n_q, 700, dtype=dtype)
    out, lse = tilewise.attend(q, k * torch.nan, v, mask="causal", engine="native", return_lse=True)
    assert out.isnan().all() and lse.isnan().all()


def test_large_and_small_scores():
    """Scores of many thousands overflow no exponential; the answer is that of the definition."""
    q, k, v = (100 * x for x in qkv(1, 2, 2, 150, d=16, dtype=torch.float32))
    plan = _plan(Causal(), 150, 150)
    want = exact(q, k, v, grid(plan, 1, 2, 150, 150))
    want.check({"out": tilewise.attend(q, k, v, mask="causal", engine="native")})


@pytest.mark.parametrize("tile", [None, (1, 16), (40, 24)], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("rise", [3, 30, 3000])
def test_scores_that_rise_along_the_keys(rise, dtype, tile):
    """Weights are relative to a base taken early; each later key outweighs all before it, here again and again."""
    q, k, v = qkv(1, 2, 2, 150, 700, d=16, dtype=dtype)
    q[..., 0], k[..., 0] = 4, rise * torch.linspace(-1, 1, 700)
    keep = torch.rand(1, 2, -(-150 // tile[0]), -(-700 // tile[1])) > 0.3 if tile else None
    plan = _plan(Causal(), 150, 700, None if keep is None else TileMap.from_mask(keep, tile))
    got = plan.run(q, k, v, scale=16**-0.5, engine="native")
    want = exact(q, k, v, grid(plan, 1, 2, 150, 700))
    want.check({"out": got.out})
    assert torch.allclose(got.lse.double(), want.lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_query_is_the_same_bits_whatever_others_score(dtype):
    """Queries share a block of scores; when one of them must raise its base, nothing changes for the others."""
    q, k, v = qkv(1, 1, 1, 128, 900, d=16, dtype=dtype)
    before = tilewise.attend(q, k, v, engine="native", return_lse=True)
    q[:, :, 5], k[:, :, 400:, 0] = 300 * q[:, :, 5].sign(), 1
    k[:, :, :400, 0] = 1
    others = torch.arange(128) != 5
    first = tilewise.attend(q, k, v, engine="native", return_lse=True)
    q[:, :, 5] = 0
    second = tilewise.attend(q, k, v, engine="native", return_lse=True)
    for x, y in zip(first, second):
        assert torch.equal(x[:, :, others], y[:, :, others]) and not torch.equal(x[:, :, 5], y[:, :, 5])
    assert not torch.equal(before.out, first.out)


@pytest.mark.parametrize("n_q", [1, 5, 150])
@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -3e38, -1e30], ids=str)
def test_a_bias_that_stands_for_minus_infinity(low, n_q):
    """Keys hidden by a huge finite bias weigh nothing beside others, and all the same where all are."""
    q, k, v = qkv(1, 2, 2, n_q, 300, d=16, dtype=torch.float32)
    bias = torch.zeros(1, 1, n_q, 300)
    bias[..., 100:] = low
    hidden = bias.clone()
    hidden[:, :, : n_q // 2 + 1] = low
    for added in (bias, hidden):
        got = tilewise.attend(q, k, v, bias=added, engine="native")
        scores = (q.double() @ k.double().mT / 4).float() + added
        want = torch.softmax(scores.double(), -1) @ v.double()
        assert (got - want).abs().max() < 1e-5


def test_softcap_near_zero_and_far_out():
    """tanh has two branches; both and their border are right to float32."""
    q = torch.cat([torch.linspace(-40, 40, 4001), torch.linspace(-0.9, 0.9, 4001)]).view(1, 1, -1, 1)
    k, v = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1), torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
    got = tilewise.attend(q, k, v, scale=1.0, softcap=2.0, engine="native", return_lse=True)
    want = tilewise.attend(
        q.double(), k.double(), v.double(), scale=1.0, softcap=2.0, engine="definition", return_lse=True
    )
    naive = tilewise.attend(q, k, v, scale=1.0, softcap=2.0, engine="definition", return_lse=True)
    for mine, plain, right in zip(got, naive, want):
        assert over_budget(mine, plain, right) is None


LESSER = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "no bfloat16 products": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "plain": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
CHECK = """
import torch
from tests.conformance.common import *
from tilewise.attention import plan
from tilewise.kernels.attend_tiles import native
print(torch.backends.cpu.get_cpu_capability(), "bfloat16 products", native.multiplies_bfloat16())
torch.manual_seed(0)
for dtype in LOW:
    for n_q, n_k in ((150, 150), (2, 333)):
        q, k, v = qkv(b=2, heads=4, kv_heads=2, n_q=n_q, n_k=n_k, d=16, dtype=dtype)
        d_out = torch.randn(q.shape).to(dtype)
        for method in ("dense", METHODS["sink-window"], *([METHODS["moba"]] if n_q == n_k else [])):
            made = plan(method, q.double(), k.double(), mask="causal")
            seen = grid(made, 2, 4, n_q, n_k)
            want = exact(q, k, v, seen, d_out)
            base = with_grads(lambda q, k, v, bias: naive(q, k, v, seen, bias), q, k, v, d_out)
            got = with_grads(run_or_refuse("native", q, k, v, made), q, k, v, d_out)
            reason = over_budget(got.out, base.out, want.out)
            assert reason is None, (dtype, n_q, method, reason)
            want.check(got)  # gradients carry the rounding of the log-sum-exp, which a textbook does not go through
print("all right")
"""


@pytest.mark.parametrize("name", LESSER)
def test_lesser_machines_are_right_too(name):
    """PyTorch's and oneDNN's switches lower what the engine is compiled for and multiplies with."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env={**os.environ, **LESSER[name]},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "all right" in done.stdout, done.stdout + done.stderr
    if name != "no bfloat16 products":
        assert done.stdout.startswith({"avx2": "AVX2", "plain": "DEFAULT"}[name]), done.stdout


MEMORY = """
import sys, torch, tilewise
from pathlib import Path
def peak(reset=False):
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    return 1024 * int(line.split()[1])
n, grads = int(sys.argv[1]), sys.argv[2] == "grads"
q, k, v = (torch.randn(1, 2, n, 32, requires_grad=grads) for _ in range(3))
def run(x):
    out = tilewise.attend(*x, mask="causal", engine="native")
    if grads:
        torch.autograd.grad(out, x, torch.ones_like(out))
run([x[:, :, :64] for x in (q, k, v)])
before = peak(reset=True)
run((q, k, v))
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("grads", ["", "grads"])
def test_resident_memory_at_16384_is_linear(grads):
    """The engine's own memory does not pass through PyTorch's allocator, so the process's peak is measured."""
    n = 16_384
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(n), grads], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    used, tensor = int(done.stdout), 2 * n * 32 * 4  # bytes; one of q, k, v
    assert tensor / 2 < used < (24 if grads else 8) * tensor + 16 * 2**20 < n * n


def test_one_answer_whatever_the_threads():
    q, k, v = (x.requires_grad_() for x in qkv(1, 4, 2, 300, d=16, dtype=torch.float32))
    tiles = TileMap.from_mask(torch.rand(1, 4, 300, 10) > 0.5, (1, 30))
    answers = []
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            out = attend_tiles(q, k, v, tiles, mask="causal", engine="native")
            answers.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
        finally:
            torch.set_num_threads(threads)
    for other in answers[1:]:
        assert all(torch.equal(x, y) for x, y in zip(answers[0][:1], other[:1]))
        assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(answers[0], other))


def test_failures_of_the_library_are_errors():
    with pytest.raises(RuntimeError, match="the native engine failed: "):
        native.LIBRARY.call("tilewise_fail", native._words(_call()))


def _call():
    from tilewise.kernels.attend_tiles import Call

    q, k, v = qkv(dtype=torch.float32)
    return Call(
        q,
        k,
        v,
        Causal().bind(96, 96),
        TileMap(torch.ones(1, 1, 1, 1, dtype=torch.bool), Tiling(96), Tiling(96)),
    )
