"""The loop nests behind `io_cost`, run for real in a cache of so many words that counts each one moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.attention.io.cache import Cache
from tilewise.attention.io.cost import flash_tile, square_side


class Simulated(NamedTuple):
    """What a run gave: out `[N_q, D_v]`, the log-sum-exps `[N_q]` where the algorithm writes them, and its counts.

    reads, writes: words moved. working_set: the most words held at once.
    """

    out: Tensor
    lse: Tensor | None
    reads: int
    writes: int
    working_set: int


def simulate(
    q: Tensor, k: Tensor, v: Tensor, cache: int, algorithm: str = "flash2", tile: tuple[int, int] | None = None,
    keep: Tensor | None = None,
) -> Simulated:  # fmt: skip
    """softmax(q k^T) v by an algorithm of `io_cost`, with real data in a cache of `cache` words.

    `q [N_q, D]`, `k [N_k, D]`, `v [N_k, D_v]` of one floating dtype. Scores are not scaled, and "square" takes
    their exponentials as they are, as the paper does: they must be small enough for that.

    Args:
        algorithm: one of those of `io_cost`, or "columns": key tile by key tile, partial results written out and
            merged at the end (what the torch engine does with flat query tiles).
        tile: (queries, keys), see `io_cost`.
        keep: bool `[T_q, T_k]` for "flash2" and "columns", the tiles to compute.

    Raises CacheError when more is needed than there is, ValueError for an unknown algorithm or a wrong `keep`.
    """
    if algorithm not in _RUNS:
        raise ValueError(f"algorithm must be one of {', '.join(_RUNS)}, got {algorithm!r}")
    tiled = algorithm in ("flash1", "flash2", "columns")
    if tile is None:
        side = square_side(cache)
        tile = flash_tile(len(q), len(k), q.shape[1], cache, algorithm) if tiled else (side, side)
    cuts = _cuts(len(q), tile[0]), _cuts(len(k), tile[1])
    if keep is None:
        keep = torch.ones(len(cuts[0]), len(cuts[1]), dtype=torch.bool)
    elif algorithm not in ("flash2", "columns") or keep.shape != (len(cuts[0]), len(cuts[1])):
        raise ValueError(
            f"keep must be [{len(cuts[0])}, {len(cuts[1])}] and for flash2 or columns, got {list(keep.shape)} for"
            f" {algorithm}"
        )
    out, lse = q.new_zeros(len(q), v.shape[1]), q.new_full((len(q),), -torch.inf)
    run = _Run(q, k, v, out, lse, Cache(cache), cuts[0], cuts[1], keep.tolist())
    with run.cache:
        _RUNS[algorithm](run)
    counts = run.cache.reads, run.cache.writes, run.cache.most
    return Simulated(out, lse if algorithm in ("flash2", "columns") else None, *counts)


class _Run(NamedTuple):
    """Slow memory, the cache, the cuts of queries and keys, and which tiles are kept."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    cache: Cache
    rows: list[slice]
    columns: list[slice]
    keep: list[list[bool]]

    def state(self, i: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fresh (out, top, total, spare) for the queries `i`: a sum of values, its largest score, its weights."""
        height = i.stop - i.start
        out = self.cache.new(height, self.v.shape[1], like=self.q)
        top = self.cache.new(height, like=self.q, fill=-torch.inf)
        return out, top, self.cache.new(height, like=self.q), self.cache.new(height, like=self.q)

    def absorb(self, queries: Tensor, keys: Tensor, values: Tensor, state: tuple[Tensor, ...]) -> None:
        """Add one tile to a state."""
        out, top, total, spare = state
        scores = self.cache.new(len(queries), len(keys), like=self.q)
        torch.mm(queries, keys.mT, out=scores)
        torch.amax(scores, 1, out=spare)
        _raise_top(out, top, total, spare)
        scores.sub_(top.unsqueeze(1)).exp_()
        torch.sum(scores, 1, out=spare)
        total.add_(spare)
        out.addmm_(scores, values)
        self.cache.drop(scores)

    def finish(self, i: slice, state: tuple[Tensor, ...], out: Tensor, lse: Tensor) -> None:
        """Write a state's mean and log-sum-exp; a state that absorbed nothing is zeros and -inf."""
        mine, top, total, spare = state
        torch.clamp(total, min=torch.finfo(total.dtype).tiny, out=spare)
        mine.div_(spare.unsqueeze(1))
        top.add_(total.log_())
        self.cache.write(mine, out, i)
        self.cache.write(top, lse, i)
        self.cache.drop(*state)


def _raise_top(out: Tensor, top: Tensor, total: Tensor, spare: Tensor) -> None:
    """Rescale a state to the larger of its own largest score and that in `spare`."""
    torch.maximum(spare, top, out=spare)
    top.sub_(spare).exp_()  # what is there already shrinks by this
    out.mul_(top.unsqueeze(1))
    total.mul_(top)
    top.copy_(spare)


def _flash1(run: _Run) -> None:
    q, k, v, out, top, cache, rows, columns, _ = run
    total = cache.outside(*top.shape, like=q)
    for i in rows:  # outputs and statistics start in slow memory
        state = run.state(i)
        for x, slow in zip(state, (out, top, total)):
            cache.write(x, slow, i)
        cache.drop(*state)
    for j in columns:
        keys, values = cache.read(k, j), cache.read(v, j)
        for i in rows:
            queries = cache.read(q, i)
            mine, largest, weight = (cache.read(slow, i) for slow in (out, top, total))
            spare = cache.new(len(queries), like=q)
            mine.mul_(weight.unsqueeze(1))
            run.absorb(queries, keys, values, (mine, largest, weight, spare))
            mine.div_(weight.unsqueeze(1))
            for x, slow in zip((mine, largest, weight), (out, top, total)):
                cache.write(x, slow, i)
            cache.drop(queries, mine, largest, weight, spare)
        cache.drop(keys, values)


def _flash2(run: _Run) -> None:
    q, k, v, out, lse, cache, rows, columns, keep = run
    for i, kept in zip(rows, keep):
        state = run.state(i)
        if any(kept):
            queries = cache.read(q, i)
            for j in (j for j, one in zip(columns, kept) if one):
                keys, values = cache.read(k, j), cache.read(v, j)
                run.absorb(queries, keys, values, state)
                cache.drop(keys, values)
            cache.drop(queries)
        run.finish(i, state, out, lse)


def _columns(run: _Run) -> None:
    q, k, v, out, lse, cache, rows, columns, keep = run
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in rows]
    for number, j in enumerate(columns):
        units = [at for at, kept in enumerate(keep) if kept[number]]
        if not units:
            continue
        keys, values = cache.read(k, j), cache.read(v, j)
        for at in units:
            state, queries = run.state(rows[at]), cache.read(q, rows[at])
            run.absorb(queries, keys, values, state)
            parts[at].append((cache.outside(*out.shape, like=q), cache.outside(*lse.shape, like=q)))
            cache.drop(queries)
            run.finish(rows[at], state, *parts[at][-1])
        cache.drop(keys, values)
    for i, mine in zip(rows, parts):
        state = run.state(i)
        for slow_out, slow_lse in mine:
            part, weight = cache.read(slow_out, i), cache.read(slow_lse, i)
            state[3].copy_(weight)
            _raise_top(*state)
            weight.sub_(state[1]).exp_()
            state[2].add_(weight)
            state[0].add_(part.mul_(weight.unsqueeze(1)))
            cache.drop(part, weight)
        run.finish(i, state, out, lse)


def _square(run: _Run) -> None:
    cache, (n, n_k) = run.cache, (len(run.q), len(run.k))
    weights, sums = cache.outside(n, n_k, like=run.q), cache.outside(n, like=run.q)
    _product(run, weights, sums)
    _mean(run, weights, sums)


def _standard(run: _Run) -> None:
    cache, (n, n_k) = run.cache, (len(run.q), len(run.k))
    scores, weights = (cache.outside(n, n_k, like=run.q) for _ in range(2))
    _product(run, scores, None)
    for row in _cuts(n, 1):
        _softmax(cache, scores, weights, row, n_k)
    _mean(run, weights, None)


def _product(run: _Run, slow: Tensor, sums: Tensor | None) -> None:
    """q k^T in square tiles; with `sums` their exponentials, and the sums of their rows."""
    q, k, cache = run.q, run.k, run.cache
    for i in run.rows:
        height = i.stop - i.start
        total = None if sums is None else cache.new(height, like=q)
        for j in run.columns:
            tile = cache.new(height, j.stop - j.start, like=q)
            for c in _cuts(q.shape[1], square_side(cache.words)):
                left, right = cache.read(q, i, c), cache.read(k, j, c)
                tile.addmm_(left, right.mT)
                cache.drop(left, right)
            if total is not None:
                spare = cache.new(height, like=q)
                total.add_(torch.sum(tile.exp_(), 1, out=spare))
                cache.drop(spare)
            cache.write(tile, slow, i, j)
            cache.drop(tile)
        if sums is not None and total is not None:
            cache.write(total, sums, i)
            cache.drop(total)


def _mean(run: _Run, weights: Tensor, sums: Tensor | None) -> None:
    """The weights times v in square tiles, divided by `sums`."""
    cache = run.cache
    for i in run.rows:
        total = None if sums is None else cache.read(sums, i)
        for c in _cuts(run.v.shape[1], square_side(cache.words)):
            tile = cache.new(i.stop - i.start, c.stop - c.start, like=run.q)
            for j in run.columns:
                left, right = cache.read(weights, i, j), cache.read(run.v, j, c)
                tile.addmm_(left, right)
                cache.drop(left, right)
            if total is not None:
                tile.div_(total.unsqueeze(1))
            cache.write(tile, run.out, i, c)
            cache.drop(tile)
        if total is not None:
            cache.drop(total)


def _softmax(cache: Cache, scores: Tensor, weights: Tensor, row: slice, n_k: int) -> None:
    """One row of scores to weights: at once where it fits, otherwise in pieces that are read twice."""
    if n_k + 1 <= cache.words:
        x, spare = cache.read(scores, row), cache.new(1, 1, like=scores)
        x.sub_(torch.amax(x, 1, keepdim=True, out=spare)).exp_()
        x.div_(torch.sum(x, 1, keepdim=True, out=spare))
        cache.write(x, weights, row)
        return cache.drop(x, spare)
    pieces = _cuts(n_k, cache.words - 3)
    total, spare = cache.new(1, like=scores), cache.new(1, like=scores)
    top = cache.new(1, like=scores, fill=-torch.inf)
    for j in pieces:
        x = cache.read(scores, row, j)
        torch.amax(x, 1, out=spare)
        _raise_top(x.narrow(1, 0, 0), top, total, spare)
        x.sub_(top.unsqueeze(1)).exp_()
        total.add_(torch.sum(x, 1, out=spare))
        cache.drop(x)
    for j in pieces:
        x = cache.read(scores, row, j)
        x.sub_(top.unsqueeze(1)).exp_().div_(total.unsqueeze(1))
        cache.write(x, weights, row, j)
        cache.drop(x)
    cache.drop(total, spare, top)


def _cuts(n: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]


_RUNS: dict[str, Callable[[_Run], None]] = {
    "standard": _standard,
    "flash1": _flash1,
    "flash2": _flash2,
    "square": _square,
    "columns": _columns,
}
