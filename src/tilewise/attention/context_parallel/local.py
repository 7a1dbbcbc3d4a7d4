"""One rank's share of the work: attention between two blocks, its gradients, and sums of partial results."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.attention.api import attend
from tilewise.attention.context_parallel.layout import Spread, Trip, placed, visible
from tilewise.attention.context_parallel.traffic import Traffic
from tilewise.kernels.attend_tiles import Call, explain
from tilewise.kernels.attend_tiles.op import IMPLEMENTATIONS
from tilewise.tiles import Mask, Partial, TileMap, merge


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Map:
    """Who sees whom: the cut of queries and of keys, and which segments of the one see segments of the other."""

    mask: Mask
    q: Spread
    k: Spread
    seen: tuple[tuple[bool, ...], ...]

    @classmethod
    def of(cls, mask: Mask, q: Spread, k: Spread, like: Tensor) -> Map:
        return cls(mask, q, k, visible(mask, q, k, like))

    def key_trip(self, way: int) -> Trip:
        """The trip of keys past the queries."""
        return Trip.of(way, self.k, self.q, lambda k, q: self.seen[q][k])

    def query_trip(self, way: int) -> Trip:
        """The trip of queries past the keys."""
        return Trip.of(way, self.q, self.k, lambda q, k: self.seen[q][k])

    def queries_of(self, rank: int, keys: tuple[int, ...]) -> tuple[int, ...]:
        """Segments of a rank's queries that see some of these keys."""
        return tuple(q for q in self.q.owned[rank] if any(self.seen[q][k] for k in keys))

    def keys_of(self, rank: int, queries: tuple[int, ...]) -> tuple[int, ...]:
        """Segments of a rank's keys that some of these queries see."""
        return tuple(k for k in self.k.owned[rank] if any(self.seen[q][k] for q in queries))

    def between(self, queries: tuple[int, ...], keys: tuple[int, ...], device: torch.device) -> Mask:
        """The mask for the tokens of these segments, at their true positions."""
        q_tokens, k_tokens = self.q.positions(queries, device), self.k.positions(keys, device)
        return placed(self.mask, q_tokens, k_tokens, self.k.total - self.q.total)


def attend_block(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, traffic: Traffic | None
) -> Partial:
    """Attention of some queries over some keys."""
    part = attend(q, k, v, mask=mask, scale=scale, return_lse=True)
    if traffic is not None:
        view = mask.bind(q.shape[2], k.shape[2], device=q.device)
        tiles = TileMap.everything(q.shape[2], k.shape[2], q.device)
        computed = tiles.cost(view)[0].expand(q.shape[0], q.shape[1])
        traffic.scores += int(computed.sum())
    return Partial(*part)


def attend_block_backward(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, mask: Mask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What some keys contribute to the gradients of q, k and v, each in its tensor's dtype.

    Args:
        lse: of the whole rows, over all keys. delta: sum of d_out * out over features less the gradient of lse.
    """
    call = Call(q, k, v, mask.bind(q.shape[2], k.shape[2], device=q.device), scale=scale)
    engine = explain(call).engine
    engine = engine if engine in IMPLEMENTATIONS else "torch"
    # The operator finds delta from out and d_lse; here it is known, so out is nought and d_lse is its negative.
    backward = IMPLEMENTATIONS[engine].backward
    d_q, d_k, d_v, _ = backward(call, Partial(torch.zeros_like(d_out), lse), d_out, -delta)
    return d_q, d_k, d_v


class Running:
    """Attention over the keys met so far, for this rank's queries; held in float32 (float64 for float64)."""

    def __init__(self, q: Tensor, width: int) -> None:
        kind = wide(q.dtype)
        self.out = torch.zeros(*q.shape[:3], width, dtype=kind, device=q.device)
        self.lse = torch.full(q.shape[:3], -torch.inf, dtype=kind, device=q.device)

    def add(self, rows: slice, part: Partial) -> None:
        """Merge attention over further keys into some rows."""
        before = Partial(self.out[:, :, rows], self.lse[:, :, rows])
        after = merge([before, part])
        self.out[:, :, rows], self.lse[:, :, rows] = after.out, after.lse
