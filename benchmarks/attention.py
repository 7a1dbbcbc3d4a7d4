"""Attention engines side by side: dense, given tiles, backward, decoding, and methods with their choosing.

    python benchmarks/attention.py [--quick] [dense tiles backward decode quantised methods memory]

Contenders of a setting compute the same thing where the setting says so; "given tiles" computes less, which is what
it is for. Its share of the ideal is its rate over that of the same engine's "all tiles". Compilation of
FlexAttention is not timed. Random values: engines do the same work whatever they are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial

import harness
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

import tilewise
from tilewise.attention import MoBA, SageAttention2, SinkWindow, XAttention, attend_tiles, plan
from tilewise.kernels.attend_tiles import native
from tilewise.tiles import TileMap

HEADS, D, TILE = 8, 64, 128
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def qkv(
    n: int, dtype: torch.dtype, n_q: int | None = None, heads: int = HEADS
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries `[1, heads, n_q, D]`, keys and values `[1, HEADS, n, D]`."""
    torch.manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, h, length, D).to(dtype) for h, length in ((heads, n_q or n), (HEADS, n), (HEADS, n))
    )


def products(n: int) -> float:
    """Floating-point operations of both products over all tiles."""
    return 4.0 * HEADS * n * n * D


def random_tiles(n: int, density: float) -> TileMap:
    """So many tiles of every row of tiles, at random."""
    count = n // TILE
    chosen = torch.rand(1, HEADS, count, count).topk(max(1, int(density * count)), -1).indices
    keep = torch.zeros(1, HEADS, count, count, dtype=torch.bool).scatter_(3, chosen, True)
    return TileMap.from_mask(keep, (TILE, TILE))


def block_mask(tile_map: TileMap, n: int) -> BlockMask:
    """FlexAttention's form of a tile map whose tiles are all visible in full."""
    count = tile_map.keep.sum(-1, dtype=torch.int32)
    order = tile_map.keep.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return BlockMask.from_kv_blocks(
        torch.zeros_like(count), torch.zeros_like(order), count, order, BLOCK_SIZE=TILE, seq_lengths=(n, n)
    )


def dense(lengths: list[int]) -> list[harness.Row]:
    rows = []
    for n in lengths:
        for dtype in NAMES:
            q, k, v = qkv(n, dtype)
            for mask, share in ((None, 1.0), ("causal", 0.5)):
                contenders = {"sdpa": partial(sdpa, q, k, v, is_causal=mask is not None)}
                for engine in ("native", "torch") if n <= 8192 else ("native",):
                    contenders[engine] = partial(tilewise.attend, q, k, v, mask=mask, engine=engine)
                name = f"dense{' causal' if mask else ''}, {NAMES[dtype]}, N={n}"
                rows += harness.race(name, contenders, dict.fromkeys(contenders, share * products(n)))
    return rows


def tiles(lengths: list[int]) -> list[harness.Row]:
    rows = []
    for n in lengths:
        for dtype in NAMES:
            q, k, v = qkv(n, dtype)
            for density in (0.125, 0.25):
                given = random_tiles(n, density)
                share = float(given.keep.float().mean())
                contenders = {
                    "native, all tiles": partial(tilewise.attend, q, k, v, engine="native"),
                    "native": partial(attend_tiles, q, k, v, given, engine="native"),
                    "torch": partial(attend_tiles, q, k, v, given, engine="torch"),
                    "flex, compiled": partial(
                        torch.compile(flex_attention, dynamic=False), q, k, v, block_mask=block_mask(given, n)
                    ),
                    "sdpa, all tiles": partial(sdpa, q, k, v),
                }
                work = {name: products(n) * (1 if "all" in name else share) for name in contenders}
                rows += harness.race(f"given tiles {share:.1%}, {NAMES[dtype]}, N={n}", contenders, work)
    return rows


def backward(lengths: list[int]) -> list[harness.Row]:
    rows = []
    for n in lengths:
        for dtype in NAMES:
            inputs = [x.requires_grad_() for x in qkv(n, dtype)]
            d_out = torch.randn_like(inputs[0])

            def gradients(out: Tensor, inputs: list[Tensor] = inputs, d_out: Tensor = d_out):
                return partial(torch.autograd.grad, out, inputs, d_out, retain_graph=True)

            with torch.enable_grad():
                given = random_tiles(n, 0.25)
                contenders = {
                    "sdpa": gradients(sdpa(*inputs)),
                    "native": gradients(tilewise.attend(*inputs, engine="native")),
                    "native, tiles 25%": gradients(attend_tiles(*inputs, given, engine="native")),
                }
                causal = {
                    "sdpa": gradients(sdpa(*inputs, is_causal=True)),
                    "native": gradients(tilewise.attend(*inputs, mask="causal", engine="native")),
                }
            full = 2.5 * products(n)  # five products instead of two
            work = {name: full * (0.25 if "25%" in name else 1) for name in contenders}
            rows += harness.race(f"backward, {NAMES[dtype]}, N={n}", contenders, work)
            rows += harness.race(
                f"backward causal, {NAMES[dtype]}, N={n}", causal, dict.fromkeys(causal, full / 2)
            )
    return rows


def decode(n: int) -> list[harness.Row]:
    """Bytes of keys and values over time, beside a plain copy of much memory (bytes read and written)."""
    rows = []
    large = torch.randn(64 << 20)
    other = torch.empty_like(large)
    for dtype in NAMES:
        for heads in (HEADS, 4 * HEADS):
            q, k, v = qkv(n, dtype, n_q=1, heads=heads)
            contenders = {
                "copy of 256 MiB": partial(other.copy_, large),
                "sdpa": partial(sdpa, q, k, v, enable_gqa=heads != HEADS),
                "native": partial(tilewise.attend, q, k, v, mask="causal", engine="native"),
                "torch": partial(tilewise.attend, q, k, v, mask="causal", engine="torch"),
            }
            work = dict.fromkeys(contenders, float(k.nbytes + v.nbytes)) | {
                "copy of 256 MiB": 2.0 * large.nbytes
            }
            name = f"decode, {heads} query and {HEADS} kv heads, {NAMES[dtype]}, {n} keys"
            rows += harness.race(name, contenders, work, rounds=15, unit="GB/s")
    return rows


def quantised(n: int) -> list[harness.Row]:
    """int8 queries and keys against the same engine without: products alone, and with the rounding of operands."""
    rows = []
    method = SageAttention2()
    for dtype in NAMES:
        for depth in (64, 128):
            q, k, v = (torch.randn(1, HEADS, n, depth).to(dtype) for _ in range(3))
            made = plan(method, q, k)
            ((call, _),) = made.applied(q, k, v, None, depth**-0.5, None, False)
            contenders = {
                "native": partial(tilewise.attend, q, k, v, engine="native"),
                "int8, rounded before": partial(native.run, call),
                "int8": partial(tilewise.attend, q, k, v, method, engine="native"),
            }
            flops = dict.fromkeys(contenders, 4.0 * HEADS * n * n * depth)
            rows += harness.race(f"int8 products, {NAMES[dtype]}, head_dim {depth}, N={n}", contenders, flops)
    return rows


def methods(lengths: list[int]) -> list[harness.Row]:
    rows = []
    for n in lengths:
        for dtype in NAMES:
            q, k, v = qkv(n, dtype)
            contenders = {
                "dense (sdpa)": partial(sdpa, q, k, v, is_causal=True),
                "dense (auto)": partial(tilewise.attend, q, k, v, mask="causal"),
                "sink and window 1024": partial(tilewise.attend, q, k, v, SinkWindow(4, 1024), mask="causal"),
                "moba, 8 of 128": partial(tilewise.attend, q, k, v, MoBA(), mask="causal"),
                "xattention, mass 0.5": partial(
                    tilewise.attend, q, k, v, XAttention(threshold=0.5), mask="causal"
                ),
            }
            rows += harness.race(f"choosing and attending, causal, {NAMES[dtype]}, N={n}", contenders, {})
    return rows


MEMORY = """
import sys, torch, tilewise
from pathlib import Path
from torch.nn.functional import scaled_dot_product_attention as sdpa
engine, grads, n = sys.argv[1], sys.argv[2] == "backward", int(sys.argv[3])
def peak():
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1])
def run(n):
    x = [torch.randn(1, 8, n, 64, requires_grad=grads) for _ in range(3)]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    held = peak()
    out = sdpa(*x, is_causal=True) if engine == "sdpa" else tilewise.attend(*x, mask="causal", engine=engine)
    if grads:
        torch.autograd.grad(out, x, torch.ones_like(out))
    return peak() - held
run(256)
print(run(n) / 1024)
"""


def memory(n: int) -> dict[str, float]:
    """MiB by which a process grows at its peak beyond its inputs, causal, 8 heads, float32 (Linux)."""
    result = {"out alone": 4 * HEADS * n * D / 2**20, "N x N scores": 4 * HEADS * n * n / 2**20}
    for way in ("forward", "backward"):
        for engine in ("sdpa", "native", "torch"):
            command = [sys.executable, "-c", MEMORY, engine, way, str(n)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result[f"{way}, {engine}"] = float(done.stdout)
    for name, size in result.items():
        print(f"memory, N={n}: {name:<20}{size:>10.0f} MiB")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short length; nothing is kept")
    sections = ["dense", "tiles", "backward", "decode", "quantised", "methods", "memory"]
    parser.add_argument(
        "sections", nargs="*", default=[], help=f"some of: {' '.join(sections)}; nothing is kept"
    )
    options = parser.parse_args()
    if unknown := set(options.sections) - set(sections):
        parser.error(f"unknown sections {sorted(unknown)}, choose from {sections}")
    if not harness.tests_pass("tests/kernels/test_native.py", "tests/kernels/test_uneven_and_ordered.py"):
        print("the engines' tests fail; nothing is timed")
        return 1
    wanted = options.sections or sections
    short = [1024]
    rows: list[harness.Row] = []
    with torch.inference_mode(False), torch.no_grad():
        if "dense" in wanted:
            rows += dense(short if options.quick else [2048, 4096, 8192, 16384])
        if "tiles" in wanted:
            rows += tiles(short if options.quick else [8192])
        if "backward" in wanted:
            rows += backward(short if options.quick else [2048, 8192])
        if "decode" in wanted:
            rows += decode(4096 if options.quick else 32768)
        if "quantised" in wanted:
            rows += quantised(1024 if options.quick else 8192)
        if "methods" in wanted:
            rows += methods(short if options.quick else [8192])
    held = memory(1024 if options.quick else 16384) if "memory" in wanted else {}
    if not options.quick and not options.sections:
        harness.save("attention", rows, {"memory_mib_at_16384": held})
    return 0


if __name__ == "__main__":
    sys.exit(main())
