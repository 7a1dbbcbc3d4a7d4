"""Exact tensor attention, streamed over tiles of key tuples: no more than one tile of scores is ever held.

Scores of one query against tuples of keys are a multilinear form, `<q, k1 * k2 * ...>`. All but the last factor are
multiplied out for a tile, and the last is a matrix product; so are all gradients. Partial results of tiles are
merged as those of ordinary attention are.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tilewise.attention.tensor.call import Call, fold, unfold
from tilewise.tiles import FULL, NONE, Partial, Tiling, Visibility, merge
from tilewise.tiles.visibility import to_heads

NUMBERS = 1 << 22  # scores of one tile, all batch entries and heads together, when the caller names no tile


def attend(call: Call, tile: tuple[int, ...] | None = None) -> Partial:
    """The exact answer: out `[B, H_q, N_q, D_v]` in q's dtype, lse `[B, H_q, N_q]`; differentiable once.

    `tile`: tokens per tile of the queries and of each sequence of keys. Forward and backward hold a few tiles of
    scores, `B H_q prod(tile)` numbers each, besides tensors the size of the arguments.
    """
    sizes = tile_sizes(call) if tile is None else tile
    return Partial(*_Streamed.apply(call, sizes, call.q, *call.keys, *call.values))


def multiply_adds(n_q: int, n_keys: tuple[int, ...], head_dim: int, value_dim: int) -> int:
    """Multiply-adds of the forward pass's matrix products of one head, no mask: D + D_v for each tuple."""
    return n_q * math.prod(n_keys) * (head_dim + value_dim)


def tile_sizes(call: Call) -> tuple[int, ...]:
    """Tokens per tile when the caller names none: 32 of each and 128 of the last, fewer where heads are many."""
    sizes = [32] * (call.order - 1) + [128]
    heads = max(1, call.q.shape[0] * call.q.shape[1])
    while heads * math.prod(sizes) > NUMBERS and max(sizes) > 8:
        sizes[sizes.index(max(sizes))] //= 2
    return tuple(sizes)


def rows(x: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """x, x * f1, x * f1 * f2, ...: every row of x `[..., R, D]` times every row of f1 `[..., c, D]`, and so on."""
    made = [x]
    for factor in factors:
        made.append((made[-1].unsqueeze(-2) * factor.unsqueeze(-3)).flatten(-3, -2))
    return made


def products(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """<x_i, f1_j * f2_k * ...> for every i, j, k: `[..., R c1 c2 ..., c_last]`."""
    return rows(x, factors[:-1])[-1] @ factors[-1].mT


def read(weights: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Sum over all tuples of weights `[..., R c1 c2 ..., c_last]` times the products of factors: `[..., R, D]`."""
    total = weights @ factors[-1]
    for factor in reversed(factors[:-1]):
        total = (_by_last(total, factor) * factor.unsqueeze(-3)).sum(-2)
    return total


def adjoint(weights: Tensor, x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Gradients of `(weights * products(x, factors)).sum()` by x and by each factor."""
    levels = rows(x, factors[:-1])
    d_factors = [weights.mT @ levels[-1]]
    total = weights @ factors[-1]
    for factor, level in zip(reversed(factors[:-1]), reversed(levels[:-1])):
        total = _by_last(total, factor)
        d_factors.append((total * level.unsqueeze(-2)).sum(-3))
        total = (total * factor.unsqueeze(-3)).sum(-2)
    return total, d_factors[::-1]


def _by_last(x: Tensor, factor: Tensor) -> Tensor:
    """x `[..., R c, D]` as `[..., R, c, D]`, c the rows of factor."""
    c = factor.shape[-2]
    return x.unflatten(-2, (x.shape[-2] // c, c))  # no -1, which an empty batch leaves open


class _Streamed(torch.autograd.Function):
    """Forward and backward over tiles; kept for the backward pass are the arguments, the result and its lse."""

    @staticmethod
    def forward(ctx, call: Call, sizes: tuple[int, ...], q: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        walk = _Walk(call, sizes)
        outs, lses = [], []
        for number, cut in enumerate(walk.queries):
            x = walk.query(q, cut) * call.scale
            running: Partial | None = None
            for keys, values, seen, _ in walk.tiles(number):
                part = _softmax(products(x, keys), values, seen, x.shape[2])
                running = part if running is None else merge([running, part])
            if running is None:
                running = Partial(
                    x.new_zeros(*x.shape[:3], call.values[0].shape[3]),
                    x.new_full(x.shape[:3], -torch.inf),
                )
            outs.append(unfold(running.out, q.shape[1]))
            lses.append(unfold(running.lse, q.shape[1]))
        shape = q.shape[:3]
        out = torch.cat(outs, 2) if outs else q.new_zeros(*shape, rest[-1].shape[3], dtype=call.wide)
        lse = torch.cat(lses, 2) if lses else q.new_zeros(shape, dtype=call.wide)
        ctx.call, ctx.sizes = dataclasses.replace(call, q=q[:0], keys=(), values=()), sizes
        ctx.save_for_backward(out, lse, q, *rest)
        return out.to(q.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        out, lse, q, *rest = ctx.saved_tensors
        half = len(rest) // 2
        call = dataclasses.replace(ctx.call, q=q, keys=tuple(rest[:half]), values=tuple(rest[half:]))
        walk = _Walk(call, ctx.sizes)
        d_out = d_out.to(call.wide)
        delta = (d_out * out).sum(-1, keepdim=True) - d_lse.unsqueeze(-1)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1)  # empty rows weigh nothing
        d_q, *d_rest = (torch.zeros_like(x, dtype=call.wide) for x in (q, *rest))
        for number, cut in enumerate(walk.queries):
            x, g, shift, top = (walk.query(y, cut) for y in (q, d_out, delta, lse))
            x = x * call.scale
            d_x = torch.zeros_like(x)
            for keys, values, seen, cuts in walk.tiles(number):
                grads = _gradients(x, g, shift, top, keys, values, seen)
                d_x += grads[0]
                for total, place, grad in zip(d_rest, (*cuts, *cuts), grads[1]):
                    total[:, :, place] += grad
            d_q[:, :, cut] = unfold(d_x * call.scale, q.shape[1])
        return None, None, *(d.to(q.dtype) for d in (d_q, *d_rest))


def _softmax(scores: Tensor, values: Sequence[Tensor], seen: Tensor | None, height: int) -> Partial:
    """Softmax over one tile's tuples; scores `[b, h, R c1 ..., c_last]`, R = `height`."""
    shape = scores.shape
    flat = _hidden(scores, values, seen, height)
    top = flat.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (flat - top).exp_()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    safe = total.masked_fill(empty, 1)
    out = read(weights.view(shape), values) / safe
    return Partial(out, (safe.log() + top).masked_fill(empty, -torch.inf).squeeze(-1))


def _hidden(scores: Tensor, values: Sequence[Tensor], seen: Tensor | None, height: int) -> Tensor:
    """Scores `[b, h, R, tuples]`, -inf where a tuple is hidden."""
    b, h = scores.shape[:2]
    lengths = [v.shape[2] for v in values]
    if seen is not None:
        scores = scores.view(b, h, height, *lengths).masked_fill(~seen, -torch.inf)
    return scores.reshape(b, h, height, math.prod(lengths))


def _gradients(
    x: Tensor, g: Tensor, shift: Tensor, top: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], seen
) -> tuple[Tensor, list[Tensor]]:
    """One tile's share of the gradients: of x (scaled queries), and of the keys and then the values of the tile.

    g: gradient of the output; shift: its product with the output, less the gradient of lse; top: lse.
    """
    scores = products(x, keys)
    weights = (_hidden(scores, values, seen, x.shape[2]) - top).exp_()
    d_scores = (products(g, values).view(weights.shape) - shift).mul_(weights)
    d_x, d_keys = adjoint(d_scores.view(scores.shape), x, keys)
    _, d_values = adjoint(weights.view(scores.shape), g, values)
    return d_x, [*d_keys, *d_values]


class _Walk:
    """The tiles of a call that hold something visible, in order."""

    def __init__(self, call: Call, sizes: tuple[int, ...]) -> None:
        self.call = call
        self.queries = _cuts(call.q.shape[2], sizes[0])
        self.keys = [_cuts(k.shape[2], size) for k, size in zip(call.keys, sizes[1:])]
        self.kinds = [_kinds(view, sizes[0], size) for view, size in zip(call.views, sizes[1:])]

    def query(self, x: Tensor, cut: slice) -> Tensor:
        """A tile of something that queries have, `[B, H_kv, G c, ...]`, widened."""
        return fold(x[:, :, cut].to(self.call.wide), self.call.kv_heads)

    def tiles(
        self, number: int
    ) -> Iterator[tuple[list[Tensor], list[Tensor], Tensor | None, tuple[slice, ...]]]:
        """For query tile `number`: keys and values of each tile of tuples, what is seen of it, and its place."""
        call = self.call
        live = [
            [place for place, kind in enumerate(kinds[number]) if kind != NONE] if kinds else []
            for kinds in self.kinds
        ]
        for places in itertools.product(*live):
            cuts = tuple(self.keys[t][place] for t, place in enumerate(places))
            partial = [kinds[number][place] != FULL for kinds, place in zip(self.kinds, places)]
            seen = self._seen(self.queries[number], cuts, partial) if any(partial) else None
            keys = [k[:, :, cut].to(call.wide) for k, cut in zip(call.keys, cuts)]
            values = [v[:, :, cut].to(call.wide) for v, cut in zip(call.values, cuts)]
            yield keys, values, seen, cuts

    def _seen(self, cut: slice, cuts: Sequence[slice], partial: Sequence[bool]) -> Tensor:
        """Which tuples of a tile each of its queries sees: bool, broadcastable to `[B, H_kv, G c, c1, c2, ...]`."""
        call = self.call
        heads, seen = call.q.shape[1], None
        for t, view in enumerate(call.views):
            if not partial[t]:
                continue
            here = view.permute(*(_range(x, call.q.device) for x in (cut, cuts[t]))).tokens()
            here = to_heads(here, heads)  # [b, 1 or H_q, c, c_t]
            if here.shape[1] == 1:
                group = heads // call.kv_heads
                here = here.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(2, 3)
            else:
                here = fold(here, call.kv_heads)
            shape = (*here.shape[:3], *[1] * t, here.shape[3], *[1] * (len(cuts) - 1 - t))
            here = here.reshape(shape)
            seen = here if seen is None else seen & here
        if seen is None:
            raise RuntimeError("no key sequence of this tile is partly hidden")
        return seen


def _cuts(n: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]


def _range(cut: slice, device: torch.device) -> Tensor:
    return torch.arange(cut.start, cut.stop, device=device).view(1, 1, -1)


def _kinds(view: Visibility, q_size: int, k_size: int) -> list[list[int]]:
    """NONE where no batch entry or head sees anything of a tile, FULL where all see all of it; queries x keys."""
    if not view.q_pos.shape[2] or not view.k_pos.shape[2]:
        return []
    kinds = view.tiles(Tiling(q_size), Tiling(k_size)).to(torch.int64)
    low, high = kinds.amin((0, 1)), kinds.amax((0, 1))
    return torch.where(high == NONE, NONE, torch.where(low == FULL, FULL, 1)).tolist()
