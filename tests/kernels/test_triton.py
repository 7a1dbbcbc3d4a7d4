"""The Triton engine: its numbers in Triton's interpreter or on a GPU, its code compiled for GPUs, its refusals.

The interpreter must be asked for before Triton is imported, so on a machine without a GPU `TestNumbers` runs in a
process of its own, started by `test_numbers_in_the_interpreter`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from tests.conformance.common import exact, grid, naive, over_budget, qkv, repeat, with_grads
from tilewise.attention import MoBA, Pass, Plan, plan
from tilewise.kernels.gpu import INSTALLED, INTERPRETED
from tilewise.tiles import (
    Causal,
    Documents,
    Everything,
    Mask,
    Padding,
    Partial,
    TileMap,
    Tiling,
    TokenMask,
    Window,
    merge,
)

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
B, HEADS, KV, N = 2, 2, 1, 45  # one batch entry where batches are not the matter


def moved(x: Any) -> Any:
    """A plan with all its tensors on the device."""
    if isinstance(x, Tensor):
        return x.to(DEVICE)
    if isinstance(x, tuple):
        return tuple(moved(one) for one in x)
    if dataclasses.is_dataclass(x) and not isinstance(x, Mask):
        return dataclasses.replace(x, **{f.name: moved(getattr(x, f.name)) for f in dataclasses.fields(x)})
    return x


def run(made: Plan, q, k, v, bias=None, scale=None, softcap=None) -> Partial:
    """The plan on the Triton engine; inputs, results and gradients on the CPU."""
    from tilewise.kernels.attend_tiles import triton as engine

    q, k, v = (x.to(DEVICE) for x in (q, k, v))
    bias = None if bias is None else bias.to(DEVICE)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    calls = moved(made).calls(q, k, v, bias, scale, softcap, True)
    assert [engine.refuse(call) for call in calls] == [None] * len(calls)
    return Partial(*(x.cpu() for x in merge([engine.run(call) for call in calls])))


def one_pass(mask: Mask, tiles: TileMap | None = None, q_order=None, k_order=None, n_q=N, n_k=None) -> Plan:
    view = mask.bind(n_q, n_q if n_k is None else n_k)
    return Plan((Pass(view, tiles, q_order, k_order),), view)


def check(made: Plan, inputs, bias: Tensor | None = None) -> None:
    """Output and gradients to rounding in float32."""
    q, k, v = inputs
    d_out = torch.randn(*q.shape[:3], v.shape[3])
    seen = grid(made, q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    got = with_grads(lambda q, k, v, bias: run(made, q, k, v, bias).out, q, k, v, d_out, bias)
    exact(q, k, v, seen, d_out, bias).check(got, torch.float32)


def inputs(*sizes: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return qkv(*sizes, **options, dtype=torch.float32)


def orders(n: int, *shape: int) -> Tensor:
    return torch.stack([torch.randperm(n) for _ in range(shape[0] * shape[1])]).view(*shape, n)


def uneven(n: int, tiles: int, *shape: int) -> Tiling:
    """Tiles given by bounds, one of them empty."""
    inner = torch.randint(0, n + 1, (*shape, tiles - 1)).sort(-1).values
    inner[..., 1] = inner[..., 0]
    ends = torch.zeros(*shape, 1, dtype=torch.int64)
    return Tiling.from_bounds(torch.cat([ends, inner, ends + n], -1))


class BlockDocuments(Mask):
    """A mask on two axes: documents, and an order of their own within them."""

    def narrow(self, view):
        view = Causal().narrow(view)
        return view.with_axis(view.q_pos % 7 - 2, view.q_pos % 7 + 3, view.k_pos % 7)


MASKS = {
    "everything": Everything(),
    "causal": Causal(),
    "window and documents": Window(9, 4) & Documents(torch.tensor([0, 20, 20, N])),
    "padding": Causal() & Padding(torch.arange(N).ge(torch.tensor([[17]]))),
    "two axes": BlockDocuments(),
    "boolean": TokenMask(torch.rand(1, HEADS, N, N, generator=torch.Generator().manual_seed(3)) > 0.3),
    "nothing": Documents(torch.tensor([0, N])) & TokenMask(torch.zeros(N, N, dtype=torch.bool)),
}
# Tall tiles, several to a block, uneven ones, and flat ones whose queries are gathered.
TILES = [(64, 64), (32, 16), (16, 24), (1, 16), (3, 20)]
BIASES = {"grid": (1, HEADS, N, N), "shared": (1, 1, N, N), "keys": (1, HEADS, 1, N), "queries": (1, 1, N, 1)}


class TestNumbers:
    """Everything that needs kernels to run."""

    __test__ = INSTALLED and (INTERPRETED or DEVICE == "cuda")

    @pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 31, 33, 127, 128, 129])
    def test_lengths(self, n):
        made = one_pass(Causal(), n_q=n)
        check(made, inputs(1, 2, 1, n))

    @pytest.mark.parametrize(("n_q", "n_k"), [(1, 129), (5, 40), (33, 129), (40, 5), (20, 0), (0, 20)])
    def test_unequal_lengths(self, n_q, n_k):
        check(one_pass(Causal(), n_q=n_q, n_k=n_k), inputs(1, 2, 1, n_q, n_k))

    @pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (4, 1), (7, 1)])
    @pytest.mark.parametrize("tile", [(32, 16), (1, 16)], ids=str)
    def test_groups(self, heads, kv_heads, tile):
        keep = torch.rand(1, heads, -(-40 // tile[0]), -(-40 // tile[1])) > 0.4
        check(one_pass(Causal(), TileMap.from_mask(keep, tile), n_q=40), inputs(1, heads, kv_heads, 40))

    @pytest.mark.parametrize("tile", TILES, ids=str)
    def test_maps_and_masks(self, tile):
        for mask in MASKS.values():
            keep = torch.rand(1, HEADS, -(-N // tile[0]), -(-N // tile[1])) > 0.4
            check(one_pass(mask, TileMap.from_mask(keep, tile)), inputs(1, HEADS, KV, N, d_v=5))

    @pytest.mark.parametrize("tile", TILES, ids=str)
    def test_biases(self, tile):
        for shape in BIASES.values():
            bias = torch.randn(shape)
            bias[..., 0, :1] = -torch.inf
            keep = torch.rand(1, HEADS, -(-N // tile[0]), -(-N // tile[1])) > 0.4
            check(one_pass(Causal(), TileMap.from_mask(keep, tile)), inputs(1, HEADS, KV, N), bias)

    @pytest.mark.parametrize("shape", [(1, 1), (B, 1), (1, HEADS), (B, HEADS)])
    def test_maps_broadcast_over_batch_and_heads(self, shape):
        for tile in ((16, 32), (2, 16)):
            keep = torch.rand(*shape, -(-N // tile[0]), -(-N // tile[1])) > 0.4
            check(one_pass(Causal(), TileMap.from_mask(keep, tile)), inputs(B, HEADS, KV, N))

    @pytest.mark.parametrize(
        ("q_order", "k_order"),
        [((B, HEADS), None), (None, (B, KV)), ((1, HEADS), (1, 1)), ((B, 1), (B, KV))],
        ids=str,
    )
    def test_orders(self, q_order, k_order):
        q_order, k_order = (None if shape is None else orders(N, *shape) for shape in (q_order, k_order))
        for tile, mask in (((32, 16), MASKS["padding"]), ((1, 16), MASKS["boolean"])):
            keep = torch.rand(B, HEADS, -(-N // tile[0]), -(-N // tile[1])) > 0.4
            made = one_pass(mask, TileMap.from_mask(keep, tile), q_order, k_order)
            check(made, inputs(B, HEADS, KV, N), torch.randn(B, 1, N, N))

    @pytest.mark.parametrize(
        "shapes", [((1, 1), (1, 1)), ((B, HEADS), (B, KV)), ((1, HEADS), (B, 1))], ids=str
    )
    def test_uneven_tiles(self, shapes):
        """Clusters: tiles of different sizes, empty ones among them, over sorted tokens; few queries, and many."""
        for tiles in (4, 20):
            tilings = uneven(N, tiles, *shapes[0]), uneven(N, 4, *shapes[1])
            tile_map = TileMap(torch.rand(B, HEADS, tiles, 4) > 0.3, *tilings)
            made = one_pass(Causal(), tile_map, orders(N, *shapes[0]), orders(N, *shapes[1]))
            check(made, inputs(B, HEADS, KV, N))

    @pytest.mark.parametrize("tile", [(16, 16), (2, 16)], ids=str)
    def test_strides(self, tile):
        """Fused and transposed projections, heads shared by expansion, features first, a sliced bias."""
        tile_map = TileMap.from_mask(torch.rand(1, 4, -(-40 // tile[0]), 3) > 0.3, tile)
        fused = torch.randn(1, 41, 3, 4, 16)[:, 1:]
        q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
        first = torch.randn(1, 4, 16, 40).mT
        shared = torch.randn(1, 1, 40, 16).expand(1, 4, -1, -1)
        bias = torch.randn(1, 4, 80, 80)[:, :, ::2, 1::2]
        made = one_pass(Causal(), tile_map, n_q=40)
        for queries, keys, values in ((q, k, v), (first, k, shared), (q, shared, first)):
            check(made, (queries, keys, values), bias)

    @pytest.mark.parametrize(("d", "d_v"), [(1, 1), (3, 8), (8, 3), (64, 64), (80, 48), (128, 16)])
    def test_head_dims(self, d, d_v):
        keep = torch.rand(1, 2, 2, 2) > 0.3
        check(
            one_pass(Causal(), TileMap.from_mask(keep, (16, 16)), n_q=20), inputs(1, 2, 1, 20, d=d, d_v=d_v)
        )

    def test_the_largest_head_dim(self):
        check(one_pass(Causal(), n_q=17), inputs(1, 1, 1, 17, d=512, d_v=300))

    @pytest.mark.parametrize("softcap", [0.5, 30.0])
    def test_softcap_is_applied_before_the_bias(self, softcap):
        bias = torch.randn(1, 1, 33, 33)
        seen = torch.ones(33, 33).tril().bool()

        def formula(q, k, v, bias):
            scores = softcap * torch.tanh(q @ repeat(k, 2).mT * 8**-0.5 / softcap) + bias
            return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ repeat(v, 2)

        for tile in ((16, 16), (1, 16)):
            keep = TileMap.from_mask(torch.ones(1, 1, -(-33 // tile[0]), 3, dtype=torch.bool), tile)
            made = one_pass(Causal(), keep, n_q=33)
            q, k, v = inputs(1, 2, 1, 33)
            d_out = torch.randn_like(q)
            want = with_grads(formula, q.double(), k.double(), v.double(), d_out.double(), bias.double())
            attend = functools.partial(run, made, softcap=softcap)
            got = with_grads(lambda *x, attend=attend: attend(*x).out, q, k, v, d_out, bias)
            # The cap and its slope are at most 1, so the rounding of the uncapped scores bounds that of the capped.
            rounding = exact(q, k, v, seen, d_out, bias).rounding
            for name in ("out", "dq", "dk", "dv", "dbias"):
                allowed = 8 * torch.finfo(torch.float32).eps * rounding[name].max()
                assert float((getattr(got, name) - getattr(want, name)).abs().max()) <= allowed, name

    @pytest.mark.parametrize("softcap", [None, 50.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_error_is_within_twice_naive(self, dtype, softcap):
        """Against naive PyTorch in the same precision. The interpreter multiplies bfloat16 in float32."""
        q, k, v = qkv(1, 4, 2, 70, d=16, dtype=dtype)
        d_out = torch.randn(q.shape).to(dtype)
        made = plan(MoBA(block=16, top_k=2), q.double(), k.double(), mask="causal")
        seen = grid(made, 1, 4, 70, 70)

        def capped(q, k, v, bias):
            if softcap is None:
                return naive(q, k, v, seen, bias)
            scores = softcap * torch.tanh((q @ repeat(k, 4).mT) * 0.25 / softcap)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)
            return weights @ repeat(v, 4)

        want = with_grads(capped, q.double(), k.double(), v.double(), d_out.double())
        baseline = with_grads(capped, q, k, v, d_out)
        got = with_grads(lambda q, k, v, bias: run(made, q, k, v, softcap=softcap).out, q, k, v, d_out)
        for name in ("out", "dq", "dk", "dv"):
            assert getattr(got, name).dtype == dtype
            reason = over_budget(getattr(got, name), getattr(baseline, name), getattr(want, name))
            assert reason is None, f"{name}: {reason}"

    @pytest.mark.parametrize("tile", [(16, 16), (1, 16)], ids=str)
    def test_lse_and_its_gradient(self, tile):
        """Natural log, float32, differentiable, within twice the error of naive float32; -inf for empty rows."""
        keep = torch.rand(1, 2, -(-40 // tile[0]), 3) > 0.4
        made = one_pass(Causal(), TileMap.from_mask(keep, tile), n_q=40)
        q, k, v = inputs(1, 2, 2, 40)
        seen = grid(made, 1, 2, 40, 40)
        empty = ~seen.any(-1)
        assert empty.any()
        bias, d_lse = torch.randn(1, 1, 40, 1), torch.randn(1, 2, 40)

        def baseline(q, k, v, bias):
            scores = (q @ k.mT * 8**-0.5 + bias).masked_fill(~seen, -torch.inf)
            return scores.masked_fill(empty.unsqueeze(-1), 0).logsumexp(-1).masked_fill(empty, 0)

        def lse(q, k, v, bias):
            found = run(made, q, k, v, bias).lse
            assert found.dtype == torch.float32 and torch.equal(found == -torch.inf, empty)
            return found.masked_fill(empty, 0)

        def grads(function, dtype):
            leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, bias)]
            found = function(*leaves[:2], v.to(dtype), leaves[2])
            return (found.detach(), *torch.autograd.grad(found, leaves, d_lse.to(dtype)))

        for got, simple, want in zip(
            grads(lse, torch.float32), grads(baseline, torch.float32), grads(baseline, torch.float64)
        ):
            assert over_budget(got, simple, want) is None

    @pytest.mark.parametrize("low", [-1e4, 1e4])
    def test_rows_whose_scores_are_all_far_from_zero(self, low):
        seen = torch.ones(64, 64, dtype=torch.bool)
        seen[:, :32] = False
        seen[0, 0] = True
        bias = torch.full((1, 1, 64, 64), low)
        for tile in ((32, 32), (1, 32)):
            keep = TileMap.from_mask(torch.ones(1, 1, 64 // tile[0], 2, dtype=torch.bool), tile)
            check(one_pass(TokenMask(seen), keep, n_q=64), inputs(1, 1, 1, 64), bias)

    @pytest.mark.parametrize("tile", [(16, 16), (1, 16)], ids=str)
    def test_an_empty_map_gives_nothing(self, tile):
        tile_map = TileMap.from_mask(torch.zeros(1, 1, -(-40 // tile[0]), 3, dtype=torch.bool), tile)
        leaves = [x.requires_grad_() for x in inputs(1, 2, 1, 40)]
        out, lse = run(one_pass(Causal(), tile_map, n_q=40), *leaves)
        assert (out == 0).all() and (lse == -torch.inf).all()
        assert all((x == 0).all() for x in torch.autograd.grad(out.sum(), leaves))

    def test_flat_queries_in_several_ranges(self, monkeypatch):
        """Partial results are held for so many queries at a time as fit."""
        from tilewise.kernels.attend_tiles import triton_layout

        tile_map = TileMap.from_mask(torch.rand(B, HEADS, N, 3) > 0.4, (1, 16))
        monkeypatch.setattr(triton_layout, "PARTS", 4 * 8 * 50)
        check(one_pass(Causal(), tile_map), inputs(B, HEADS, KV, N))

    @pytest.mark.parametrize("tile", [(16, 16), (1, 16)], ids=str)
    def test_same_bits_every_time_and_none_from_the_future(self, tile):
        tile_map = TileMap.from_mask(torch.rand(1, 2, -(-40 // tile[0]), 3) > 0.3, tile)
        made = one_pass(Causal(), tile_map, n_q=40)
        q, k, v = inputs(1, 2, 1, 40)
        first = run(made, q, k, v)
        assert all(torch.equal(a, b) for a, b in zip(first, run(made, q, k, v)))
        k, v = (torch.cat([x[:, :, :25], torch.randn(1, 1, 15, 8)], 2) for x in (k, v))
        assert all(torch.equal(a[:, :, :25], b[:, :, :25]) for a, b in zip(first, run(made, q, k, v)))

    def test_a_bias_that_heads_share_is_refused_where_bits_must_repeat(self):
        from tilewise.kernels.attend_tiles import triton as engine

        q, k, v = (x.to(DEVICE) for x in inputs(1, 2, 2, 20))
        made = moved(one_pass(Causal(), n_q=20))
        torch.use_deterministic_algorithms(True)
        try:
            for shape, reason in (
                ((1, 1, 20, 20), "no fixed order"),
                ((1, 2, 20, 20), None),
                ((1, 1, 1, 20), None),
            ):
                bias = torch.randn(shape, device=DEVICE, requires_grad=True)
                (call,) = made.calls(q, k, v, bias, 1.0, None, True)
                found = engine.refuse(call)
                assert found is None if reason is None else reason in found
        finally:
            torch.use_deterministic_algorithms(False)

    def test_the_operator_is_registered_right(self):
        from tilewise.kernels.attend_tiles import op

        q, k, v = (x.to(DEVICE).requires_grad_() for x in inputs(1, 2, 1, 20, d_v=5))
        bias = torch.randn(1, 2, 1, 20, device=DEVICE, requires_grad=True)
        (call,) = moved(one_pass(Causal(), n_q=20)).calls(q, k, v, bias, 0.3, 2.0, True)
        torch.library.opcheck(torch.ops.tilewise.attend_tiles.default, (*op.pack(call), "triton"))

    @pytest.mark.parametrize("n_q", [1, 20])
    def test_paged_keys_and_values(self, n_q):
        """Read where they lie in their pools; the same bits as from sequences."""
        from tilewise.kernels.attend_tiles import triton as engine

        q, k, v = (x.to(DEVICE) for x in inputs(2, 4, 2, n_q, 70))
        (call,) = moved(one_pass(Causal(), n_q=n_q, n_k=70)).calls(q, k, v, None, 0.3, None, True)
        table = torch.randperm(20, device=DEVICE)[:10].view(2, 5)
        pools = []
        for x in (k, v):
            paged = torch.nn.functional.pad(x, (0, 0, 0, 10)).unflatten(2, (5, 16)).transpose(1, 2)
            pool = torch.full((20, 2, 16, 8), torch.nan, device=DEVICE)
            pools.append(pool.index_copy(0, table.flatten(), paged.flatten(0, 1)))
        paged = dataclasses.replace(call, k=pools[0], v=pools[1], pages=table)
        assert engine.refuse(paged) is None
        assert all(torch.equal(a, b) for a, b in zip(engine.run(call), engine.run(paged)))
        with pytest.raises(ValueError, match="a paged cache takes no gradients"):
            engine.run(dataclasses.replace(paged, q=q.requires_grad_())).out.sum().backward()

    @pytest.mark.gpu
    @pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU with 16 GB free")
    def test_more_numbers_than_32_bits_count(self):
        n, d = 2**25 + 300, 64
        q = torch.randn(1, 1, n, d, device=DEVICE, dtype=torch.bfloat16)
        k, v = (torch.randn(1, 1, 128, d, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        made = moved(one_pass(Everything(), n_q=n, n_k=128))
        from tilewise.kernels.attend_tiles import triton as engine

        (call,) = made.calls(q, k, v, None, 0.125, None, True)
        out = engine.run(call).out[:, :, -300:]
        seen = torch.ones(300, 128, dtype=torch.bool, device=DEVICE)
        want = naive(q[:, :, -300:].double(), k.double(), v.double(), seen, scale=0.125)
        assert over_budget(out, naive(q[:, :, -300:], k, v, seen, scale=0.125), want) is None


def in_a_process(*command: str, **environment: str) -> str:
    """Run Python on its own; its output."""
    path = os.pathsep.join(dict.fromkeys([*filter(None, sys.path), str(ROOT / "src"), str(ROOT)]))
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": path, **environment},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def interpreter_lacks() -> str | None:
    """Why the interpreter cannot run here, or None."""
    if not INSTALLED:
        return "triton is not installed"
    version = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    if version < (3, 7) and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        return "the interpreter of triton before 3.7 needs numpy before 2.4"
    return None


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process it starts")
def test_numbers_in_the_interpreter():
    if reason := interpreter_lacks():
        pytest.skip(reason)
    output = in_a_process(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(Path(__file__)), "-k", "TestNumbers",
        TRITON_INTERPRET="1",
    )  # fmt: skip
    print(output.splitlines()[-1])
    assert " passed" in output and " failed" not in output


# Without a GPU, kernels can still be compiled for one, down to its machine code.


def target_gpu(arch: int) -> None:
    """From here on this process compiles for GPUs of a compute capability, and can start nothing."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Target:
        """A driver that knows what to compile for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

    triton.runtime.driver.set_active(Target())


def compiled(kernel: Any, **arguments: Any) -> None:
    """Compile a kernel as a call would start it; print name, bytes of shared memory, whether it is whole."""
    made = kernel.warmup(grid=(1,), **arguments)
    print("compiled", kernel.__name__, made.metadata.shared, "cubin" in made.asm)


def compiled_within(kib: int, cache: Path, *command: str) -> list[str]:
    """Run Python, which calls `compiled`; the kernels it named, all whole and within so much shared memory."""
    output = in_a_process("-W", "error", *command, TRITON_CACHE_DIR=str(cache))
    made = [line.split()[1:] for line in output.splitlines() if line.startswith("compiled")]
    assert all(complete == "True" and int(taken) <= kib * 1024 for _, taken, complete in made), made
    return [name for name, _, _ in made]


def compile_for(arch: int, roomy: bool) -> None:
    """Compile every kernel for a GPU of this compute capability, as calls would start it."""
    from tilewise.kernels.attend_tiles import Call, triton_launch
    from tilewise.kernels.attend_tiles import triton as engine

    def start(kernel, programs, arguments) -> None:
        compiled(kernel, **arguments, enable_fp_fusion=True)

    target_gpu(arch)
    triton_launch.start = engine.start = start
    triton_launch.roomy = lambda device: roomy
    pick = triton_launch.candidates
    engine.candidates = lambda *arguments: pick(*arguments)[:1]  # tuning would need a GPU

    def both(
        tile_map: TileMap | None, dtype: torch.dtype, bias: Tensor | None = None, **options: Any
    ) -> None:
        q, k, v = qkv(1, 4, 2, 200, d=128, d_v=80, dtype=dtype)
        call = Call(q, k, v, Causal().bind(200, 200), tile_map, bias=bias, scale=0.1, **options)
        result = engine.forward(call)
        engine.backward(call, result, torch.randn_like(result.out), torch.randn_like(result.lse))

    flat = TileMap.from_mask(torch.rand(1, 4, 200, 4) > 0.4, (1, 64))
    clusters = TileMap(torch.rand(1, 4, 5, 6) > 0.4, uneven(200, 5, 1, 4), uneven(200, 6, 1, 2))
    if not roomy:
        both(
            clusters,
            torch.bfloat16,
            torch.randn(1, 1, 200, 200),
            q_order=orders(200, 1, 4),
            k_order=orders(200, 1, 1),
        )
        return
    both(None, torch.bfloat16)
    both(flat, torch.float16, torch.randn(1, 4, 1, 200), softcap=5.0)


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize(("arch", "roomy", "shared"), [("90", "roomy", 227), ("89", "", 99)])
def test_kernels_compile_for_gpus(arch, roomy, shared, tmp_path):
    """To machine code for an H100 and a consumer GPU, within their KiB of shared memory."""
    made = compiled_within(shared, tmp_path, "-m", "tests.kernels.test_triton", arch, roomy)
    assert {"attend", "row_deltas", "d_queries", "d_keys"} <= set(made)


# Without any of it.


def test_refusals_on_a_cpu():
    """Why not, in words; and nothing of Triton is imported for it."""
    script = """
import sys, torch
from tilewise.kernels import gpu
from tilewise.kernels.attend_tiles import Call, triton
from tilewise.tiles import Causal
import tests.kernels.test_triton as test
q, k, v = test.inputs(1, 2, 1, 20)
print(triton.refuse(Call(q, k, v, Causal().bind(20, 20))))
gpu.INTERPRETED = True
print(triton.refuse(Call(q.double(), k.double(), v.double(), Causal().bind(20, 20))))
print(triton.refuse(Call(q, k, torch.randn(1, 1, 20, 600), Causal().bind(20, 20))))
by_query_head = Causal().bind(20, 20, k_pos=torch.arange(20).expand(1, 2, 20), q_pos=torch.arange(20))
print(triton.refuse(Call(q, k, v, by_query_head)))
print(triton.refuse(Call(q, k, v, Causal().bind(20, 20))))
gpu.INSTALLED = False
print(triton.refuse(Call(q, k, v, Causal().bind(20, 20))))
print("triton" in sys.modules)
"""
    *reasons, imported = in_a_process("-W", "error", "-c", script).splitlines()
    assert reasons == [
        "runs on GPUs, the tensors are on cpu",
        "accumulates in float32, the tensors are float64" if INSTALLED else "triton is not installed",
        "a head_dim beyond 512 does not fit in a block" if INSTALLED else "triton is not installed",
        "positions of keys differ between query heads that share a kv head"
        if INSTALLED
        else "triton is not installed",
        "None" if INSTALLED else "triton is not installed",
        "triton is not installed",
    ]
    assert imported == "False"


if __name__ == "__main__":
    compile_for(int(sys.argv[1]), bool(sys.argv[2]))
