"""FlashAttention on the torch engine and FlashAttention-2 on the native one: what the two papers claim."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tilewise
from tests.conformance.common import exact, naive, over_budget, qkv, run_or_refuse, with_grads
from tests.conformance.test_memory import allocations
from tilewise.attention import attend_tiles
from tilewise.attention.io.cost import io_cost
from tilewise.attention.io.tiling import Shapes, tiling_cost, torch_tile
from tilewise.kernels.attend_tiles import Call, definition
from tilewise.kernels.attend_tiles import torch as torch_engine
from tilewise.tiles import Causal, Everything, TileMap, Window

LENGTHS = [1, 127, 129, 300]
MASKS = {"none": None, "causal": Causal(), "window": Causal() & Window(70, None)}


def _grid(mask, n: int) -> torch.Tensor:
    return (Everything() if mask is None else mask).bind(n, n).tokens()


def _constant(name: str) -> int:
    """A constant of the native engine's sources."""
    text = "".join(path.read_text() for path in sorted(Path(definition.__file__).parent.glob("native_*.h")))
    (value,) = re.findall(rf"constexpr int64_t {name} = (\d+);", text)
    return int(value)


def _fixed_base(q, k, v, block: int, rescale: bool) -> torch.Tensor:
    """Softmax block by block, sums carried along; without `rescale` each block is on its own largest score."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    out, total = torch.zeros_like(q[..., :1] @ v[..., :1, :]), torch.zeros_like(q[..., :1])
    top = torch.full_like(total, -torch.inf)
    for start in range(0, k.shape[2], block):
        some = scores[..., start : start + block]
        new = torch.maximum(top, some.amax(-1, keepdim=True))
        weights = (some - (new if rescale else some.amax(-1, keepdim=True))).exp()
        keep = (top - new).exp() if rescale else 1
        out = out * keep + weights @ v[:, :, start : start + block]
        total, top = total * keep + weights.sum(-1, keepdim=True), new
    return out / total


@pytest.mark.evidence
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("n", LENGTHS)
def test_exact_forward_and_backward(n, engine, mask):
    """Outputs and gradients are the definition's to derived rounding. Control: one key left out is seen."""
    q, k, v = qkv(1, 4, 2, n, d=12, d_v=9)
    d_out = torch.randn(1, 4, n, 9, dtype=torch.float64)
    run = run_or_refuse(engine, q, k, v, None, mask=mask)
    assert run is not None
    want = exact(q, k, v, _grid(mask, n), d_out)
    want.check(with_grads(run, q, k, v, d_out))
    if n > 1:
        short = Everything() if mask is None else mask
        fewer = tilewise.attend(
            q, k[:, :, 1:], v[:, :, 1:], mask=short.at(torch.arange(n), torch.arange(1, n))
        )
        with pytest.raises(AssertionError, match="wrong"):
            want.check({"out": fewer}, torch.float32)


@pytest.mark.evidence
@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_any_cut_of_the_keys_gives_one_answer(order, engine, monkeypatch):
    """Scores of thousands whose largest comes last, first or anywhere, in blocks of 4 keys to all at once.

    Controls: blocks summed without rescaling are wrong in every order; with it, this plain loop is right too.
    """
    n = 600
    g = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(
        torch.randn(1, 1, 1, 8, generator=g, dtype=torch.float64), dim=-1
    )
    heights = torch.linspace(-3000, 3000, n, dtype=torch.float64)
    heights = {"ascending": heights, "descending": heights.flip(0)}.get(
        order, heights[torch.randperm(n, generator=g)]
    )
    q = (8**0.5 * direction).expand(1, 1, 96, 8) * torch.linspace(0.001, 1, 96, dtype=torch.float64).view(
        -1, 1
    )
    k, v = direction * heights.view(1, 1, n, 1), torch.randn(1, 1, n, 5, generator=g, dtype=torch.float64)
    if engine == "native":
        q, k, v = q.float(), k.float(), v.float()
    want = exact(q, k, v, torch.ones(96, n).bool())
    for width in (4, 30, 128, 600):
        tiles = TileMap.from_mask(torch.ones(1, 1, 1, -(-n // width), dtype=torch.bool), (96, width))
        for at_once in (96 * width, 1 << 19):
            monkeypatch.setattr("tilewise.kernels.attend_tiles.blocks.SCORES", at_once)
            got = attend_tiles(q, k, v, tiles, engine=engine, return_lse=True)
            want.check({"out": got.out})
            lse = torch.finfo(got.lse.dtype).eps * (2 * 10 * 3000 + n)  # the score's error is the sum's
            torch.testing.assert_close(got.lse.double(), want.lse, rtol=0, atol=lse)
        want.check({"out": _fixed_base(q, k, v, width, rescale=True)})
        if width < n:
            with pytest.raises(AssertionError, match="wrong"):
                want.check({"out": _fixed_base(q, k, v, width, rescale=False)})


def _peak(engine: str, n: int) -> int:
    """Bytes held at once by one forward and backward over `n` tokens."""
    inputs = [x.requires_grad_() for x in qkv(heads=1, n_q=n, d=8, dtype=torch.float32)]

    def both():
        out = tilewise.attend(*inputs, mask="causal", engine=engine)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    return allocations(both)[1]


@pytest.mark.evidence
def test_memory_is_linear_forward_and_backward(monkeypatch):
    """With blocks of a fixed size, twice the tokens add twice the memory. Control: the definition's fourfold."""
    monkeypatch.setattr("tilewise.kernels.attend_tiles.blocks.SCORES", 1 << 14)
    flash = [_peak("torch", n) for n in (1024, 2048, 4096)]
    plain = [_peak("definition", n) for n in (512, 1024, 2048)]

    def growth(peaks: list[int]) -> float:
        return (peaks[2] - peaks[1]) / (peaks[1] - peaks[0])

    assert 1.8 < growth(flash) < 2.2, flash
    assert 3.8 < growth(plain) < 4.2, plain
    assert flash[2] < 4096 * 4096 and plain[2] > 4 * 2048 * 2048


def _flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.evidence
def test_block_sparse_work_is_proportional_to_tiles_kept():
    """Multiply-adds counted by PyTorch are those of the kept tiles to the last one, forward and backward.

    The result is that of the kept tiles. Control: the definition, which masks what it has computed, does all of it.
    """
    n, tile, d = 1024, 64, 8
    side = n // tile
    q, k, v = qkv(1, 1, 1, n, d=d)
    counted, masked = {}, set()
    for kept in (16, 8, 4, 2):
        g = torch.Generator().manual_seed(kept)
        uneven = torch.tensor([[-1], [1]]).repeat(side // 2, 1) * (
            kept < side
        )  # rows keep one tile more or less
        chosen = torch.rand(1, 1, side, side, generator=g).argsort(-1) < kept + uneven
        call = Call(q, k, v, Everything().bind(n, n), TileMap.from_mask(chosen, (tile, tile)), scale=d**-0.5)
        result = torch_engine.forward(call)
        seen = chosen.repeat_interleave(tile, 2).repeat_interleave(tile, 3)
        want = exact(q, k, v, seen)
        want.check({"out": result.out})
        ones, zeros = torch.ones_like(result.out), torch.zeros_like(result.lse)
        grads = torch_engine.backward(call, result, ones, zeros)
        want.check(dict(zip(("dq", "dk", "dv"), grads)), q.dtype)
        forward = _flops(lambda call=call: torch_engine.forward(call))
        backward = _flops(lambda x=(call, result, ones, zeros): torch_engine.backward(*x))
        assert forward == 2 * side * kept * tile**2 * 2 * d
        assert backward == 2 * side * kept * tile**2 * 5 * d  # scores again, then four products
        counted[kept] = forward + backward
        masked.add(_flops(lambda call=call: definition.run(call)))
    assert [counted[16] // counted[kept] for kept in (16, 8, 4, 2)] == [1, 2, 4, 8]
    assert len(masked) == 1


@pytest.mark.evidence
@pytest.mark.parametrize("n", [4096, 16_384])
def test_the_engines_tiles_move_fewer_bytes_than_standard_attention(n):
    """Counted in numbers, by `io_cost`: N^2 and a few N d in each engine's tiles; standard attention has 4 N^2.

    Its scores and weights are written and read; tiles of 128 queries read keys and values N / 128 times instead,
    which is 2 N^2 d / 128. Control: below d^2 numbers of cache FlashAttention moves more.
    """
    d, cache = 64, 32 << 20
    standard = io_cost(n, d, cache // 4, "standard").total
    work = Shapes(1, 1, 1, n, n, d, d)
    tile, together = torch_tile(n, n)
    plain = tiling_cost(work, tile, cache_bytes=cache, at_once=together)
    native = tiling_cost(work, (_constant("ROWS"), _constant("BATCH")), cache_bytes=cache, packed=True)
    once = n * (2 * d + 1)  # queries read, outputs and log-sum-exps written
    assert plain.fits and plain.bytes == 4 * (n * n + once)
    assert plain.bytes == 4 * io_cost(n, d, cache // 4, "flash2", tile=tile).total
    assert native.fits and native.bytes == plain.bytes + 4 * 4 * n * d  # keys and values copied once
    assert standard > 4 * n * n
    assert 3 * native.bytes < 4 * standard
    assert io_cost(n, d, d * d // 4, "flash1").total > io_cost(n, d, d * d // 4, "standard").total


# FlashAttention-2


@pytest.mark.evidence
@pytest.mark.parametrize("n", [128, 300])
@pytest.mark.parametrize("mask", ["causal", None], ids=str)
def test_the_log_sum_exp_is_returned_and_differentiable(n, mask):
    """Gradients through it too are within twice plain float32's error. Control: without its part they are not."""
    inputs = qkv(1, 4, 2, n, d=16, dtype=torch.float32)
    g = torch.Generator().manual_seed(1)
    w_out, w_lse = torch.randn(1, 4, n, 16, generator=g), torch.randn(1, 4, n, generator=g)

    def run(engine, dtype, share=1.0):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out, lse = tilewise.attend(*leaves, mask=mask, engine=engine, return_lse=True)
        loss = (out * w_out.to(dtype)).sum() + share * (lse * w_lse.to(dtype)).sum()
        return lse.detach(), *torch.autograd.grad(loss, leaves)

    want, plain = run("definition", torch.float64), run("definition", torch.float32)
    for mine, base, right in zip(run("native", torch.float32), plain, want):
        assert over_budget(mine, base, right) is None
    without = run("native", torch.float32, share=0.0)
    for i in (1, 2):  # of q and k; values do not enter it
        assert over_budget(without[i], plain[i], want[i])


def _flash_loop(q, k, v, tile: tuple[int, int], deferred: bool):
    """One head's output by the loops of FlashAttention-2 (deferred) or FlashAttention.

    Returns also how many numbers of the output were scaled, and how many divided.
    """
    scaled = divided = 0
    height, width = tile
    out = torch.zeros(len(q), v.shape[1], dtype=q.dtype)
    for i in range(0, len(q), height):
        queries = q[i : i + height] * q.shape[1] ** -0.5
        top = torch.full((len(queries), 1), -torch.inf, dtype=q.dtype)
        total, mine = torch.zeros_like(top), out[i : i + height]
        for j in range(0, len(k), width):
            scores = queries @ k[j : j + width].T
            largest = scores.amax(1, keepdim=True)
            new = torch.maximum(top, largest)
            keep = (top - new).exp()
            if deferred:
                weights = (scores - new).exp()
                total = keep * total + weights.sum(1, keepdim=True)
                mine.mul_(keep).add_(weights @ v[j : j + width])
                scaled += mine.numel()
            else:
                weights, join = (scores - largest).exp(), (largest - new).exp()
                before, total = total, keep * total + join * weights.sum(1, keepdim=True)
                mine.mul_(before * keep).add_(join * (weights @ v[j : j + width])).div_(total)
                scaled, divided = scaled + 2 * mine.numel(), divided + mine.numel()
            top = new
        if deferred:
            mine.div_(total)
            divided += mine.numel()
    return out, scaled, divided


@pytest.mark.evidence
def test_fewer_operations_that_are_no_products():
    """The paper's loop divides every output once, where its predecessor does so in every block; both are exact.

    Two levels save more: softmax over a batch of chunks scales half as often as chunk by chunk, with the sizes that
    the native engine has (which scales only when a base is raised, so less often still).
    """
    n, d = 1024, 8
    q, k, v = (x[0, 0] for x in qkv(1, 1, 1, n, d=d))
    want = exact(*(x[None, None] for x in (q, k, v)), torch.ones(n, n).bool())
    rows, chunk, batch = _constant("ROWS"), _constant("KEYS"), _constant("BATCH")
    blocks = n // chunk
    counts = {}
    for name, width, deferred in (
        ("first", chunk, False),
        ("second", chunk, True),
        ("two levels", batch, True),
    ):
        out, *counts[name] = _flash_loop(q, k, v, (rows, width), deferred)
        want.check({"out": out[None, None]})
    assert counts["first"] == [2 * n * d * blocks, n * d * blocks]
    assert counts["second"] == [n * d * blocks, n * d]
    assert counts["two levels"] == [n * d * blocks * chunk // batch, n * d]
    assert sum(counts["first"]) > 2.6 * sum(counts["second"])
    assert sum(counts["second"]) > 1.7 * sum(counts["two levels"])


@pytest.mark.evidence
def test_the_native_engine_divides_once():
    """Equal scores and whole values: every sum is a whole number that float32 holds, until the one division.

    So each output is within two roundings (a reciprocal, a product) of the quotient. Control: the loop that divides
    in every block is off by more than a thousand times that where large values cancel.
    """
    n, d = 4096, 16
    g = torch.Generator().manual_seed(0)
    v = torch.randint(-1000, 1001, (n // 2, d), generator=g).float()
    v = torch.cat([v, 1 - v.flip(0)])  # every column adds up to half the number of keys
    v[-1] += torch.arange(d)
    q, k = torch.zeros(256, d), torch.randn(n, d, generator=g)
    got = tilewise.attend(q[None, None], k[None, None], v[None, None], engine="native")[0, 0]
    right = (v.double().sum(0) / n).expand(256, d)
    allowed = 2 * torch.finfo(torch.float32).eps / 2 * right.abs()
    assert bool(((got.double() - right).abs() <= allowed).all())
    tile = _constant("ROWS"), _constant("BATCH")
    deferred, every_block = (_flash_loop(q, k, v, tile, deferred)[0] for deferred in (True, False))
    assert bool(((deferred.double() - right).abs() <= allowed).all())
    assert bool(((every_block.double() - right).abs() > allowed).any())


TEAM = """
import os, sys, torch, tilewise
torch.set_num_threads(8)
def threads(n_q, n_k, backward):
    q, k, v = (torch.zeros(1, 1, n, 8, requires_grad=backward) for n in (n_q, n_k, n_k))
    out = tilewise.attend(q, k, v, engine="native")
    if backward:
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    return len(os.listdir("/proc/self/task"))
backward, *sizes = map(int, sys.argv[1:])
alone = threads(40, 40, backward=bool(backward))
print(*(threads(n_q, n_k, bool(backward)) - alone for n_q, n_k in zip(sizes[::2], sizes[1::2])))
"""


def _joined(*sizes: int, backward: bool = False) -> list[int]:
    """For calls of one head in a row, (queries, keys) each: threads that have joined the first one of the process.

    The engine starts no more of them than it has work for, and the system counts them.
    """
    command = [sys.executable, "-c", TEAM, str(int(backward)), *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [int(x) for x in done.stdout.split()]


@pytest.mark.evidence
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_one_head_is_split_over_its_tokens():
    """One head occupies as many threads as it has strips of queries, up to the 8 there are; backward, key chunks.

    Control: a single strip starts none, however many keys it sees; nor does a single chunk of keys, backward.
    """
    rows, keys = _constant("ROWS"), _constant("KEYS")
    calls = [x for strips in (1, 2, 5, 20) for x in (strips * rows, keys)]
    assert _joined(rows, 4 * keys, *calls) == [0, 0, 1, 4, 7]
    assert _joined(rows, keys, rows, 4 * keys, backward=True) == [0, 3]


@pytest.mark.evidence
def test_threads_and_strips_do_not_change_a_bit():
    """One head: outputs and log-sum-exps are the same bits on 1, 2 and 5 threads, and strip by strip alone.

    Control: the keys cut elsewhere round differently, so equal bits are no matter of course.
    """
    n, rows = 700, _constant("ROWS")
    q, k, v = qkv(1, 1, 1, n, d=16, dtype=torch.float32)
    answers, threads = [], torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            answers.append(tilewise.attend(q, k, v, mask="causal", engine="native", return_lse=True))
        finally:
            torch.set_num_threads(threads)
    for other in answers[1:]:
        assert all(torch.equal(x, y) for x, y in zip(answers[0], other))
    for start in range(0, n, rows):
        strip = slice(start, min(start + rows, n))
        mask = Causal().at(torch.arange(n)[strip], torch.arange(n))
        alone = tilewise.attend(q[:, :, strip], k, v, mask=mask, engine="native", return_lse=True)
        assert all(torch.equal(x[:, :, strip], y) for x, y in zip(answers[0], alone))
    cut = TileMap.everything(n, n, tile=(rows, 48))
    other = attend_tiles(q, k, v, cut, mask="causal", engine="native")
    assert not torch.equal(other, answers[0].out)
    exact(q, k, v, _grid(Causal(), n)).check({"out": other})
    assert (
        over_budget(other, naive(q, k, v, _grid(Causal(), n)), exact(q, k, v, _grid(Causal(), n)).out) is None
    )
