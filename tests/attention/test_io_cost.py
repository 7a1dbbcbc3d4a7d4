"""Words moved by attention: closed forms against runs in a counted cache, growth, crossover, and lower bounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tilewise.attention.io.cache import Cache, CacheError
from tilewise.attention.io.cost import (
    ALGORITHMS,
    curve,
    flash_tile,
    io_cost,
    lower_bound,
    square_side,
    working_set,
)
from tilewise.attention.io.simulator import simulate
from tilewise.attention.io.tiling import Shapes, best_height, tiling_cost, torch_tile
from tilewise.kernels.attend_tiles import Call
from tilewise.kernels.attend_tiles.blocks import SCORES
from tilewise.tiles import Causal, TileMap, Tiling, Visibility, as_mask


def qkv(n: int, n_k: int, d: int, d_v: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + d)
    shapes = (n, d), (n_k, d), (n_k, d_v or d)
    return tuple(torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)  # type: ignore[return-value]


def exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp; rows that see nothing are 0 and -inf."""
    scores = q @ k.T
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v, scores.logsumexp(-1)


def exponent(sizes: list[int], words: list[float]) -> float:
    """Least-squares slope of log words over log size."""
    x, y = (torch.tensor(z, dtype=torch.float64).log() for z in (sizes, words))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


# (queries, keys, head, cache): tiles that divide nothing, caches around d^2, rows that do and do not fit
CASES = [
    (16, 16, 4, 64), (17, 23, 5, 100), (40, 40, 8, 300), (33, 20, 8, 1000), (20, 20, 16, 40), (24, 24, 16, 100),
    (9, 50, 3, 30), (1, 30, 4, 40), (30, 1, 4, 40), (12, 12, 4, 100_000), (7, 7, 1, 8), (13, 11, 6, 4),
]  # fmt: skip


@pytest.mark.evidence
@pytest.mark.parametrize(("n", "n_k", "d", "cache"), CASES)
def test_simulated_counts_equal_the_closed_forms(n, n_k, d, cache):
    """Word by word, the working set too; and what was computed within the cache is attention, to rounding.

    Control: the closed form of a neighbouring cache size or tile is another number.
    """
    q, k, v = qkv(n, n_k, d)
    want, lse = exact(q, k, v)
    for algorithm in ALGORITHMS:
        if algorithm.startswith("flash") and cache < working_set(1, 1, d):
            with pytest.raises(ValueError, match="words of cache"):
                io_cost(n, d, cache, algorithm, n_k=n_k)
            continue
        cost, run = io_cost(n, d, cache, algorithm, n_k=n_k), simulate(q, k, v, cache, algorithm)
        assert (run.reads, run.writes) == (cost.reads, cost.writes), algorithm
        assert run.working_set == cost.working_set <= cache, algorithm
        torch.testing.assert_close(run.out, want, rtol=1e-12, atol=1e-13)
        if run.lse is not None:
            torch.testing.assert_close(run.lse, lse, rtol=1e-12, atol=1e-13)


@pytest.mark.evidence
def test_a_count_knows_its_tile():
    """Control of the above: other tiles move other numbers of words, in the run as in the formula."""
    q, k, v = qkv(40, 40, 8)
    found = set()
    for tile in ((1, 1), (3, 7), (7, 3), (10, 10), (40, 1), (1, 40), (100, 2)):
        for algorithm in ("flash1", "flash2"):
            cost = io_cost(40, 8, 2000, algorithm, tile=tile)
            run = simulate(q, k, v, 2000, algorithm, tile=tile)
            assert (run.reads, run.writes, run.working_set) == (cost.reads, cost.writes, cost.working_set)
            found.add((algorithm, cost.total))
    assert (
        len(found) == 2 * 7 - 3
    )  # only the number of outer tiles matters: two pairs of each coincide, or three


def beyond(cost_total: int, n: int, d: int) -> int:
    """Words above reading the inputs and writing the outputs once."""
    return cost_total - 4 * n * d


@pytest.mark.evidence
def test_growth_with_the_cache():
    """Simulated: FlashAttention moves words as 1/M above d^2, square tiles as 1/sqrt(M) below. Theorem 3.1.

    Controls: square tiles write and read all N^2 weights in whatever cache; and below d^2 FlashAttention falls as
    1/M from higher up, so it is not the cache alone that gives the root.
    """
    n, d = 768, 8
    q, k, v = qkv(n, n, d)
    large = [8 * d * d, 16 * d * d, 32 * d * d]
    flash = [simulate(q, k, v, cache, "flash2") for cache in large]
    slope = exponent(large, [beyond(run.reads + run.writes, n, d) for run in flash])
    assert -1.25 < slope < -0.9, slope
    assert flash[-1].reads + flash[-1].writes < n * n / 3
    square = simulate(q / 4, k / 4, v, large[-1], "square")
    assert square.reads + square.writes > 2 * n * n

    n, d = 64, 64
    q, k, v = (x / 8 for x in qkv(n, n, d))
    small = [d * d // 64, d * d // 16, d * d // 4, d * d]
    runs = [simulate(q, k, v, cache, "square") for cache in small]
    slope = exponent(small, [run.reads + run.writes for run in runs])
    assert -0.55 < slope < -0.4, slope
    d = 512  # closed form: tiles of a few queries would round to whole ones
    small = [d * d // 8, d * d // 4, d * d // 2]
    slope = exponent(small, [float(io_cost(1 << 16, d, cache, "flash2").total) for cache in small])
    assert -1.1 < slope < -0.9, slope


@pytest.mark.evidence
def test_exponents_at_full_size():
    """The closed forms, which the runs confirm, at N = 2^20: exponents in M, N and d on both sides of d^2."""
    n, d = 1 << 20, 128

    def words(algorithm: str, n: int, d: int, cache: int) -> float:
        return float(io_cost(n, d, cache, algorithm).total)

    caches = [d * d * 4**i for i in range(2, 5)]
    assert abs(exponent(caches, [words("flash2", n, d, m) for m in caches]) + 1) < 0.1
    assert abs(exponent(caches, [words("flash1", n, d, m) for m in caches]) + 1) < 0.1
    small = [d * d // 4**i for i in range(1, 4)]
    assert abs(exponent(small, [words("square", n, d, m) for m in small]) + 0.5) < 0.05
    heads = [64, 128, 256]
    assert abs(exponent(heads, [words("flash2", n, h, 1 << 20) for h in heads]) - 2) < 0.2
    assert abs(exponent(heads, [words("square", n, h, 1 << 10) for h in heads]) - 1) < 0.1
    lengths = [1 << 14, 1 << 15, 1 << 16]
    for algorithm, cache in (("flash2", 4 * d * d), ("flash1", 4 * d * d), ("square", d * d // 16)):
        assert abs(exponent(lengths, [words(algorithm, m, d, cache) for m in lengths]) - 2) < 0.05


def crossover(d: int) -> int:
    """The smallest cache in which FlashAttention-2 moves no more words than square tiles, N = 256 d."""
    caches = range(working_set(1, 1, d), 16 * d * d, max(1, d * d // 64))
    return next(
        m for m in caches if io_cost(256 * d, d, m, "flash2").total <= io_cost(256 * d, d, m, "square").total
    )


@pytest.mark.evidence
def test_crossover_at_the_square_of_the_head():
    """Below M ~ d^2 square tiles move fewer words than FlashAttention in the same cache, above it more.

    Control on both sides, simulated; the place where they meet grows as d^2.
    """
    heads = [16, 32, 64, 128]
    places = [crossover(d) for d in heads]
    assert 1.8 < exponent(heads, [float(m) for m in places]) < 2.2, places
    assert all(d * d / 4 < m < 2 * d * d for d, m in zip(heads, places)), places
    n, d = 96, 32
    q, k, v = (x / 4 for x in qkv(n, n, d))
    moved = {
        (algorithm, cache): run.reads + run.writes
        for algorithm in ("flash2", "square")
        for cache in (d * d // 4, 4 * d * d)
        for run in [simulate(q, k, v, cache, algorithm)]
    }
    assert moved["square", d * d // 4] < 0.75 * moved["flash2", d * d // 4]
    assert moved["flash2", 4 * d * d] < 0.75 * moved["square", 4 * d * d]


@pytest.mark.evidence
def test_no_count_is_below_the_lower_bound(monkeypatch):
    """Over lengths, heads and caches; within a constant of it on each side of d^2.

    Control: a cache that lets itself be filled beyond its size runs FlashAttention with tiles 64 times too large,
    still computes attention, and moves fewer words than the bound of the size it claims. The cache that counts
    refuses those tiles.
    """
    for n in (64, 1000, 1 << 14, 1 << 17):
        for d in (4, 16, 64, 128):
            for cache in (4, 30, d * d // 4, d * d, 4 * d * d, 64 * d * d, 1 << 22):
                for algorithm in ALGORITHMS:
                    if algorithm.startswith("flash") and cache < working_set(1, 1, d) or cache < 4:
                        continue
                    cost = io_cost(n, d, cache, algorithm)
                    assert cost.total >= cost.lower_bound, cost
    n, d = 1 << 20, 64
    for cache in (d * d * 2**i // 64 for i in range(13)):  # d^2 / 64 to 64 d^2
        costs = [io_cost(n, d, cache, "square")]
        if cache >= working_set(1, 1, d):
            costs.append(io_cost(n, d, cache, "flash2"))
        best = min(costs, key=lambda cost: cost.total)
        assert best.ratio < 25 and best.total < 11 * curve(n, n, d, cache), best

    n, d, cache = 512, 8, 100
    q, k, v = qkv(n, n, d)
    tile = flash_tile(n, n, d, 64 * cache)
    with pytest.raises(CacheError, match=r"needs \d+ words, but \d+ of 100 are taken"):
        simulate(q, k, v, cache, "flash2", tile=tile)
    with monkeypatch.context() as patch:
        patch.setattr(Cache, "room", lambda self: math.inf)
        lies = simulate(q, k, v, cache, "flash2", tile=tile)
    torch.testing.assert_close(lies.out, exact(q, k, v)[0], rtol=1e-12, atol=1e-13)
    assert lies.working_set > cache
    assert lies.reads + lies.writes < lower_bound(n, n, d, cache)
    honest = simulate(q[:128], k, v, cache, "flash2")
    assert honest.reads + honest.writes >= lower_bound(128, n, d, cache)


def test_the_paper_rule_for_tiles_overcommits_by_a_constant():
    """ceil(M / 4d) keys and at most d queries need up to 1.25 M words; the same shape a little smaller fits."""
    n, d, cache = 256, 16, 4 * 16 * 16
    width = -(-cache // (4 * d))
    literal = min(width, d), width
    assert cache < working_set(*literal, d) < 1.4 * cache
    with pytest.raises(ValueError, match="needs 1328 words of cache, there are 1024"):
        io_cost(n, d, cache, "flash1", tile=literal)
    with pytest.raises(CacheError):
        simulate(*qkv(32, 32, d), cache, "flash1", tile=literal)
    for algorithm in ("flash1", "flash2"):
        for m in (working_set(1, 1, d), 500, 1024, 5000, 10**6):
            height, width = flash_tile(n, n, d, m, algorithm)
            assert working_set(height, width, d) <= m
            longer = (
                (height + 1, min(height + 1, d)) if algorithm == "flash2" else (min(width + 1, d), width + 1)
            )
            assert max(height, width) == n or working_set(*longer, d) > m


def test_bound_and_curve():
    assert curve(100, 200, 8, 64) == pytest.approx(100 * 200)  # they meet at d^2
    assert curve(100, 100, 8, 16) == pytest.approx(100 * 100 * 8 / 4)
    assert curve(100, 100, 8, 256) == pytest.approx(100 * 100 * 64 / 256)
    assert lower_bound(100, 50, 8, 10**6) == 2 * 8 * 150
    assert lower_bound(10**6, 10**6, 64, 16 * 64**2) == pytest.approx(10**12 / 20 - 16 * 64**2)
    assert lower_bound(10**4, 10**4, 1024, 16) == pytest.approx(10**8 * (2 * 1024 / 4 - 1) - 2 * 16)
    assert square_side(100) == 5 and square_side(4) == 1


# The cache


def test_nothing_is_computed_outside_the_cache():
    slow, cache = torch.ones(4, 4), Cache(20)
    with cache:
        x = cache.read(slow, slice(0, 2))
        assert cache.reads == cache.used == cache.most == 8
        x.mul_(2)
        with pytest.raises(CacheError, match="not in the cache"):
            x + 1  # a result that has no room
        with pytest.raises(CacheError, match="not in the cache"):
            x.add_(slow[:2])
        with pytest.raises(CacheError, match="not in the cache"):
            torch.mm(x, x.mT)
        y = cache.new(2, 2, like=slow)
        torch.mm(x, x.mT, out=y)
        with pytest.raises(CacheError, match=r"\[3, 3\] needs 9 words, but 12 of 20 are taken"):
            cache.new(3, 3, like=slow)
        cache.write(y, slow, slice(0, 2), slice(0, 2))
        cache.drop(x)
        with pytest.raises(CacheError, match="not in the cache"):
            x.add_(1)
        assert (cache.used, cache.most, cache.writes) == (4, 12, 4)
    assert slow[:2, :2].eq(16).all() and slow[2:].eq(1).all()


# Tilings


def call(n: int, n_k: int, d: int, d_v: int, keep: Tensor, tile: tuple[int, int], mask=None) -> Call:
    q, k, v = (x[None, None] for x in qkv(n, n_k, d, d_v))
    q_pos, k_pos = torch.arange(n).view(1, 1, -1) + n_k - n, torch.arange(n_k).view(1, 1, -1)
    view = as_mask(mask).narrow(Visibility.everything(q_pos, k_pos))
    return Call(q, k, v, view, TileMap.from_mask(keep, tile))


@pytest.mark.evidence
@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("tile", [(1, 8), (5, 3), (16, 16)])
def test_block_sparse_counts_equal_runs(order, tile):
    """The kept tiles of a map, by rows and by columns; one row of tiles and one column keep nothing.

    Control: with one tile more or less kept the formula gives another number.
    """
    n, n_k, d, d_v, cache = 37, 50, 4, 6, 2000
    g = torch.Generator().manual_seed(1)
    shape = -(-n // tile[0]), -(-n_k // tile[1])
    keep = torch.rand(shape, generator=g) < 0.4
    keep[0], keep[:, 1], keep[1, 0] = False, False, True
    work = call(n, n_k, d, d_v, keep[None, None], tile)
    run = simulate(
        work.q[0, 0],
        work.k[0, 0],
        work.v[0, 0],
        cache,
        "flash2" if order == "rows" else order,
        tile=tile,
        keep=keep,
    )
    cost = tiling_cost(work, cache_bytes=4 * cache, element_size=4, order=order)
    assert (cost.read_bytes, cost.written_bytes) == (4 * run.reads, 4 * run.writes)
    assert cost.working_bytes == 4 * run.working_set and cost.fits
    seen = keep.repeat_interleave(tile[0], 0)[:n].repeat_interleave(tile[1], 1)[:, :n_k]
    out, lse = exact(work.q[0, 0], work.k[0, 0], work.v[0, 0], seen)
    torch.testing.assert_close(run.out, out, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(run.lse, lse, rtol=1e-12, atol=1e-13)
    for at in ((1, 0), (0, 0)):
        other = keep.clone()
        other[at] = ~other[at]
        changed = tiling_cost(
            call(n, n_k, d, d_v, other[None, None], tile), cache_bytes=1, element_size=4, order=order
        )
        assert changed.bytes != cost.bytes


def test_tiling_of_heads_groups_masks_and_packing():
    one = Shapes(batch=1, heads=1, kv_heads=1, n_q=300, n_k=300, d=16, d_v=16)
    dense = tiling_cost(one, (64, 32), cache_bytes=1 << 20, element_size=2)
    flash = io_cost(300, 16, 1 << 18, "flash2", tile=(64, 32))
    assert dense.read_bytes == 2 * flash.reads and dense.written_bytes == 2 * 300 * 16 + 4 * 300
    assert dense.tile == (64, 32) and dense.order == "rows"
    many = tiling_cost(one._replace(batch=2, heads=6, kv_heads=3), (64, 32), cache_bytes=1, element_size=2)
    assert many.bytes == 12 * dense.bytes and not many.fits
    packed = tiling_cost(one._replace(heads=2), (64, 32), cache_bytes=1, element_size=2, packed=True)
    assert packed.bytes == 2 * dense.bytes + 2 * 300 * 32 * 2
    threads = tiling_cost(one, (64, 32), cache_bytes=1 << 20, element_size=2, at_once=3)
    assert threads.working_bytes == 3 * dense.working_bytes and threads.bytes == dense.bytes
    by_columns = tiling_cost(one._replace(heads=6, kv_heads=3), (16, 32), cache_bytes=1)
    assert by_columns.order == "columns"
    alone = tiling_cost(one, (16, 32), cache_bytes=1, order="columns")
    shared_keys = 3 * 300 * 32 * 4
    assert by_columns.bytes == 6 * alone.bytes - shared_keys  # two query heads read a key tile once
    keep = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    causal = tiling_cost(call(300, 300, 16, 16, keep, (128, 128), Causal()), cache_bytes=1 << 20)
    whole = tiling_cost(call(300, 300, 16, 16, keep, (128, 128)), cache_bytes=1 << 20)
    hidden_keys = (300 - 128) + (300 - 256)  # in the tiles above the diagonal
    assert whole.read_bytes - causal.read_bytes == hidden_keys * 32 * 8
    none = call(300, 300, 16, 16, keep, (128, 128))
    no_map = Call(none.q, none.k, none.v, none.view)
    assert tiling_cost(no_map, cache_bytes=1 << 20) == whole
    uneven = TileMap(keep, Tiling.from_bounds(torch.tensor([0, 10, 10, 300])), Tiling(100))
    cost = tiling_cost(Call(none.q, none.k, none.v, none.view, uneven), cache_bytes=1, order="rows")
    assert cost.read_bytes == 8 * (300 * 16 + 2 * 300 * 32)  # the empty tile reads nothing


def test_best_height_is_the_highest_that_fits():
    work = Shapes(1, 8, 8, 4096, 4096, 64, 64)
    for cache_bytes, height in ((1 << 20, 256), (200_000, 128), (130_000, 64), (50_000, 16)):
        best = best_height(work, 128, cache_bytes=cache_bytes, element_size=2)
        costs = [
            tiling_cost(work, (h, 128), cache_bytes=cache_bytes, element_size=2) for h in (32, 64, 128, 256)
        ]
        fitting = [cost for cost in costs if cost.fits]
        assert best.fits and (not fitting or best.bytes == min(cost.bytes for cost in fitting))
        assert best.tile[0] == height, best
    assert best_height(work._replace(n_q=1), 128, cache_bytes=1 << 20).tile == (1, 128)
    assert best_height(work, 64, cache_bytes=1 << 20, heights=(8,), packed=True, at_once=2).tile == (8, 64)
    with pytest.raises(ValueError, match="no height fits in 100 bytes"):
        best_height(work, 128, cache_bytes=100)


def test_torch_tile_is_what_the_engine_does():
    for n_q, n_k in ((4096, 4096), (8192, 65_536), (1, 1000), (300, 200), (128, 1)):
        (height, width), together = torch_tile(n_q, n_k)
        assert height == min(n_q, 128) and width % 128 == 0
        assert together * height * width <= SCORES < 2 * (together + 1) * height * (width + 128)


def test_every_option_by_name():
    q, k, v = qkv(8, 6, 4)
    run = simulate(
        q=q, k=k, v=v, cache=500, algorithm="flash2", tile=(4, 3), keep=torch.ones(2, 2, dtype=torch.bool)
    )
    cost = io_cost(n=8, d=4, cache=500, algorithm="flash2", n_k=6, tile=(4, 3))
    assert run.reads == cost.reads and cost.total == cost.reads + cost.writes
    assert cost.lower_bound == lower_bound(n=8, n_k=6, d=4, cache=500) and cost.ratio >= 1
    assert curve(n=8, n_k=6, d=4, cache=500) < cost.total
    work = Shapes(batch=1, heads=1, kv_heads=1, n_q=8, n_k=6, d=4, d_v=4)
    named = tiling_cost(
        work=work, tile=(4, 3), cache_bytes=2000, element_size=4, order="rows", packed=False, at_once=1
    )
    assert named.bytes == 4 * cost.total
    best = best_height(
        work=work, width=3, cache_bytes=2000, heights=(4,), element_size=4, packed=False, at_once=1
    )
    assert best == named and torch_tile(n_q=8, n_k=6) == ((8, 128), SCORES // (8 * 128))


def test_bad_arguments():
    for arguments, message in (
        ((0, 4, 100), "n must be an integer >= 1, got 0"),
        ((8, 0, 100), "d must be"),
        ((8, 4, 3), "cache must be an integer >= 4, got 3"),
        ((8, 4, 100, "flash3"), "algorithm must be one of standard, flash1, flash2, square, got 'flash3'"),
        ((8, 4, 100, "flash2", 0), "n_k must be"),
        ((8, 4, 100, "square", None, (2, 2)), "tile is for flash1 and flash2"),
        ((8, 4, 100, "flash2", None, (0, 2)), "each >= 1"),
        ((8, 4, 10, "flash2"), "needs 20 words of cache for heads of 4, there are 10"),
    ):
        with pytest.raises(ValueError, match=message):
            io_cost(*arguments)
    q, k, v = qkv(8, 8, 4)
    with pytest.raises(ValueError, match="algorithm must be one of"):
        simulate(q=q, k=k, v=v, cache=100, algorithm="flash3")
    with pytest.raises(ValueError, match=r"keep must be \[2, 2\]"):
        simulate(q, k, v, 1000, "flash2", tile=(4, 4), keep=torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="keep must be"):
        simulate(q, k, v, 1000, "flash1", tile=(4, 4), keep=torch.ones(2, 2, dtype=torch.bool))
    work = Shapes(1, 1, 1, 8, 8, 4, 4)
    with pytest.raises(ValueError, match="order must be"):
        tiling_cost(work, cache_bytes=100, order="diagonal")
    with pytest.raises(ValueError, match="at_once and cache_bytes >= 1"):
        tiling_cost(work, cache_bytes=0)
    with pytest.raises(ValueError, match=r"tile must be \(queries, keys\)"):
        tiling_cost(work, (0, 4), cache_bytes=100)
    with pytest.raises(ValueError, match="brings its own tiles"):
        tiling_cost(
            call(8, 8, 4, 4, torch.ones(1, 1, 2, 2, dtype=torch.bool), (4, 4)), (4, 4), cache_bytes=100
        )
