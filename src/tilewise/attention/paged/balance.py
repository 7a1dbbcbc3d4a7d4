"""Decoding cut evenly: which worker reads which keys of a ragged batch, and attention by such a plan."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.attention.paged.attend import Keys
from tilewise.attention.paged.pages import Pages
from tilewise.kernels.attend_tiles import Call, attend
from tilewise.tiles import Everything, Partial, merge

CHUNK = 256  # keys that are never cut: as in the native engine, and the paper's tile for head_dim 64


class Item(NamedTuple):
    """Keys `first` to `last - 1` of one kv head of one sequence."""

    sequence: int
    head: int
    first: int
    last: int


@dataclass(frozen=True)
class Balance:
    """The items of each worker; each key of each head of each sequence lies in exactly one.

    Attributes:
        items: one tuple per worker. chunk: keys in a chunk; the last of a sequence may have fewer.
    """

    items: tuple[tuple[Item, ...], ...]
    chunk: int

    @property
    def chunks(self) -> list[int]:
        """Chunks of each worker."""
        return [sum(-(-(i.last - i.first) // self.chunk) for i in own) for own in self.items]

    @property
    def keys(self) -> list[int]:
        """Keys of each worker."""
        return [sum(i.last - i.first for i in own) for own in self.items]

    @property
    def largest(self) -> int:
        """Chunks of the worker with most, which all others wait for."""
        return max(self.chunks)

    @property
    def smallest(self) -> int:
        """Chunks of the worker with fewest."""
        return min(self.chunks)

    @property
    def skew(self) -> float:
        """Largest load over the mean one, in chunks; 1 is perfect, and also where there is no work."""
        total = sum(self.chunks)
        return self.largest * len(self.items) / total if total else 1.0


def balance(lengths: Sequence[int] | Tensor, heads: int, workers: int, chunk: int = CHUNK) -> Balance:
    """Equal spans of all chunks laid end to end (LeanAttention: Sanovar et al., 2024, arXiv 2405.10480).

    The paper's "stream-K". Sequences and heads are walked in order and cut where a worker has its share, so loads
    differ by one chunk at most, whatever the lengths; only the first and the last part of a worker are shared with
    others. So the native engine cuts decoding, with 4 workers per thread, but no more than half the chunks.

    Args:
        lengths: keys of each sequence, >= 0. heads: kv heads. workers, chunk: >= 1.
    """
    sizes = _check(lengths, heads, workers, chunk)
    counts = [-(-n // chunk) for n in sizes for _ in range(heads)]
    total = sum(counts)
    items: list[list[Item]] = [[] for _ in range(workers)]
    worker = done = 0
    for place, count in enumerate(counts):
        sequence, head = divmod(place, heads)
        at = 0
        while at < count:
            end = (worker + 1) * total // workers
            if done == end:
                worker += 1
                continue
            last = min(count, at + end - done)
            items[worker].append(Item(sequence, head, at * chunk, min(last * chunk, sizes[sequence])))
            done, at = done + last - at, last
    return Balance(tuple(map(tuple, items)), chunk)


def balance_longest_first(
    lengths: Sequence[int] | Tensor, heads: int, workers: int, chunk: int = CHUNK, queries: int = 1
) -> Balance:
    """FlashInfer's plan: parts of at most the mean load, longest first, each to the worker with least to do.

    A part costs its keys plus twice its queries, as in the authors' code (the paper leaves both weights open).
    Parts are of whole chunks: the mean load is rounded up to them.

    Args: as in `balance`; queries: of each sequence, >= 1.
    """
    sizes = _check(lengths, heads, workers, chunk)
    if not isinstance(queries, int) or queries < 1:
        raise ValueError(f"queries must be an integer >= 1, got {queries!r}")
    longest = max(1, -(-sum(sizes) * heads // (workers * chunk))) * chunk
    parts = [
        Item(sequence, head, at, min(at + longest, n))
        for sequence, n in enumerate(sizes)
        for head in range(heads)
        for at in range(0, n, longest)
    ]
    items: list[list[Item]] = [[] for _ in range(workers)]
    load = [(0, worker) for worker in range(workers)]
    for part in sorted(parts, key=lambda i: i.first - i.last):
        cost, worker = heapq.heappop(load)
        items[worker].append(part)
        heapq.heappush(load, (cost + part.last - part.first + 2 * queries, worker))
    return Balance(tuple(map(tuple, items)), chunk)


def decode_partials(
    q: Tensor,
    keys: Pages | tuple[Tensor, Tensor],
    workers: int | Balance,
    *,
    lengths: Tensor | None = None,
    chunk: int = CHUNK,
    scale: float | None = None,
    softcap: float | None = None,
    engine: str = "auto",
) -> list[list[tuple[Item, Partial]]]:
    """What each worker of a plan computes of one query per sequence: every item with its partial result.

    The meaning of balanced decoding, one call per item; the native engine does the same inside one call.

    Args:
        q: `[B, H_q, 1, D]`, the last token of each sequence.
        keys: `Pages`, or `(k [B, H_kv, N, D], v [B, H_kv, N, D_v])` with `lengths` int64 `[B]` (None: all N).
        workers: how many, cut by `balance`; or a plan made before, with any cut. chunk: as in `balance`.
        scale, softcap, engine: as in `attend_paged`.

    Returns:
        For each worker its items, each with `Partial(out [1, group, 1, D_v], lse [1, group, 1])`, of the query
        heads that read the item's kv head.
    """
    held = _check_call(q, keys, lengths)
    plan = workers
    if not isinstance(plan, Balance):
        plan = balance(held.lengths, held.k.shape[1], plan, chunk)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    group = q.shape[1] // held.k.shape[1]

    def part(item: Item) -> Partial:
        b, head = item.sequence, item.head
        k, v, pages, first = _span(held, item)
        places = torch.arange(first, first + _tokens(k, pages), device=q.device)
        last = torch.full((1,), item.last - 1, device=q.device)
        view = (
            Everything().bind(1, len(places), q_pos=last, k_pos=places).limit(lo=item.first, hi=item.last - 1)
        )
        own = q[b : b + 1, head * group : (head + 1) * group]
        return attend(Call(own, k, v, view, scale=scale, softcap=softcap, pages=pages), engine)

    return [[(item, part(item)) for item in items] for items in plan.items]


def lean_decode(
    q: Tensor,
    keys: Pages | tuple[Tensor, Tensor],
    workers: int | Balance,
    *,
    lengths: Tensor | None = None,
    chunk: int = CHUNK,
    scale: float | None = None,
    softcap: float | None = None,
    engine: str = "auto",
    return_lse: bool = False,
) -> Tensor | Partial:
    """Attention of one query per sequence, its keys cut evenly over workers (LeanAttention).

    `decode_partials`, merged, which by associativity may be done in any order. Differs from the paper: parts of a
    head are merged at the end, not by the worker that has its first part; a tile is `chunk` keys whatever the
    head_dim (the paper takes 256 for 64 and 128 for 128 on its GPU). For speed call `attend_paged` with the native
    engine, which does this within one call; this is its meaning, on any engine and for any plan.

    Args: as in `decode_partials`. Returns `[B, H_q, 1, D_v]`, or with `return_lse` a `Partial(out, lse)`.
    """
    held = _check_call(q, keys, lengths)
    done = decode_partials(
        q, keys, workers, lengths=lengths, chunk=chunk, scale=scale, softcap=softcap, engine=engine
    )
    parts = defaultdict(list)
    for own in done:
        for item, partial in own:
            parts[item.sequence, item.head].append(partial)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(*q.shape[:3], held.v.shape[3])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    group = q.shape[1] // held.k.shape[1]
    for (b, head), some in parts.items():
        merged = merge(some)
        out[b, head * group : (head + 1) * group] = merged.out[0]
        lse[b, head * group : (head + 1) * group] = merged.lse[0]
    return Partial(out, lse) if return_lse else out


def _span(keys: Keys, item: Item) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """The least of one head's keys and values that can be handed on and holds the item, and its first position."""
    b, head = item.sequence, slice(item.head, item.head + 1)
    if keys.table is None:
        rows = slice(item.first, item.last)
        return keys.k[b : b + 1, head, rows], keys.v[b : b + 1, head, rows], None, item.first
    size = keys.k.shape[2]
    first = item.first // size
    pages = keys.table[b : b + 1, first : -(-item.last // size)]
    return keys.k[:, head], keys.v[:, head], pages, first * size


def _tokens(k: Tensor, pages: Tensor | None) -> int:
    return k.shape[2] * (1 if pages is None else pages.shape[1])


def _check(lengths, heads: int, workers: int, chunk: int) -> list[int]:
    for name, value in (("heads", heads), ("workers", workers), ("chunk", chunk)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    sizes = [int(n) for n in lengths]
    if any(n < 0 for n in sizes):
        raise ValueError(f"lengths must be >= 0, got {sizes}")
    return sizes


def _check_call(q: Tensor, keys, lengths: Tensor | None) -> Keys:
    held = Keys.of(keys)
    if lengths is not None:
        if held.table is not None:
            raise ValueError("lengths must be None with Pages, which know theirs")
        fits = (
            isinstance(lengths, Tensor) and lengths.dtype == torch.int64 and lengths.shape == (len(held.k),)
        )
        if not fits or bool(((lengths < 0) | (lengths > held.k.shape[2])).any()):
            raise ValueError(f"lengths must be int64 [{len(held.k)}] in 0..{held.k.shape[2]}")
        held = held._replace(lengths=lengths)
    kv_heads, d = held.k.shape[1], held.k.shape[3]
    fits = isinstance(q, Tensor) and q.ndim == 4 and q.shape[0] == len(held.lengths) and q.shape[2:] == (1, d)
    if not fits or not q.shape[1] or q.shape[1] % kv_heads:
        raise ValueError(
            f"q must be [{len(held.lengths)}, a multiple of {kv_heads}, 1, {d}]: one query per sequence, got"
            f" {list(q.shape) if isinstance(q, Tensor) else type(q).__name__}"
        )
    if q.dtype != held.k.dtype or q.device != held.k.device:
        raise TypeError(
            f"q must be {held.k.dtype} on {held.k.device} like the keys, got {q.dtype} on {q.device}"
        )
    return held
