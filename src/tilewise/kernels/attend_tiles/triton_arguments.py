"""What the kernels of the Triton engine receive: named tuples of pointers and strides.

A stride is 0 where batch entries or heads share.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """A tensor `[B, H, N, D]` and its strides."""

    ptr: Tensor
    b: int
    h: int
    n: int
    d: int


class Numbers(NamedTuple):
    """A number per query, `[B, H, N]`, those of one head side by side."""

    ptr: Tensor
    b: int
    h: int


class Pages(NamedTuple):
    """Which page `[B, P]` of a pool holds every `size` tokens of keys and values; None where there is no pool."""

    ptr: Tensor | None
    b: int
    size: int


class Axis(NamedTuple):
    """How the `n` tokens of one axis lie in `tiles` tiles of at most `size`.

    `order [*, N]` is the token at each place, None for the tokens' own order; `bounds [*, tiles + 1]` are where
    tiles begin, None when all are `size` long.
    """

    order: Tensor | None
    order_b: int
    order_h: int
    bounds: Tensor | None
    bounds_b: int
    bounds_h: int
    size: int
    tiles: int
    n: int


class View(NamedTuple):
    """What is visible: `limits [*, N_q, 2 A]` (lower, then upper), `pos [*, N_k, A]`, and perhaps a grid."""

    limits: Tensor
    limits_b: int
    limits_h: int
    pos: Tensor
    pos_b: int
    pos_h: int
    dense: Tensor | None
    dense_b: int
    dense_h: int
    dense_q: int
    dense_k: int


class Bias(NamedTuple):
    """The bias `[B, H, N_q, N_k]`, and where its gradient goes (see `add_d_bias`)."""

    ptr: Tensor | None
    b: int
    h: int
    q: int
    k: int
    grad: Tensor | None
    grad_b: int
    grad_h: int
    grad_q: int
    grad_k: int


class Lists(NamedTuple):
    """For every row of a map the tiles it meets, those that need a mask first.

    Row number `b * self.b + h * self.h + tile` has its `counts [row] = (masked, all)` tiles in `entries` from
    `starts[row]`.
    """

    entries: Tensor
    starts: Tensor
    counts: Tensor
    b: int
    h: int


class Pieces(NamedTuple):
    """Flat units gathered by key tile.

    A piece's key tile is `columns`, as `2 * (kv head and key tile) + full`; its units are `sizes` many `entries`
    from `first` on, and their results go to the `slots` beside them.
    """

    entries: Tensor
    slots: Tensor
    columns: Tensor
    first: Tensor
    sizes: Tensor


def rows(x: Tensor) -> Rows:
    """`x [B, H, N, D]` as kernels take it."""
    b, h, n, d = x.stride()
    return Rows(x, b, h, n, d)


def numbers(x: Tensor) -> Numbers:
    """`x [B, H, N]`, contiguous, as kernels take it."""
    return Numbers(x, x.stride(0), x.stride(1))


def pages(x: Tensor | None, pool: Tensor) -> Pages:
    """Pages `x [B, P]` of a `pool [pages, H, S, D]`."""
    return Pages(None, 0, 1) if x is None else Pages(x.contiguous(), x.shape[1], pool.shape[2])


def two_strides(x: Tensor | None) -> tuple[int, int]:
    """Strides of the batch and head axes of `[B, H, ...]`."""
    if x is None:
        return 0, 0
    b, h = (stride if size > 1 else 0 for size, stride in zip(x.shape[:2], x.stride()))
    return b, h


def four_strides(x: Tensor | None) -> tuple[int, int, int, int]:
    """Strides of a `[B, H, N_q, N_k]` grid."""
    if x is None:
        return 0, 0, 0, 0
    b, h, q, k = (stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride()))
    return b, h, q, k
