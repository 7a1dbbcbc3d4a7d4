"""FlashLLA: local linear attention tile by tile, forward and backward, in memory linear in the tokens.

All statistics are taken about the weighted mean of the keys rather than about the query. With softmax weights s_j
of one query, mean key m = sum_j s_j k_j, C = sum_j s_j (k_j - m)(k_j - m)^T and A = C + ridge I,

    rho = A^-1 (m - q),    t_j = (k_j - m) . rho,    out = sum_j s_j (1 - t_j) v_j.

That is the paper's closed form by the Sherman-Morrison identity: its Sigma is omega (A + (m - q)(m - q)^T). A is
better conditioned, and there is no denominator left that may vanish.

The backward pass differentiates A rho = m - q implicitly. For the gradient g of one output, y_j = g . v_j with mean
y = sum_j s_j y_j, c = sum_j s_j y_j (k_j - m), u = A^-1 c and a_j = (k_j - m) . u:

    score j   s_j (h_j - sum s h),  h_j = y_j - (y_j - y) t_j - a_j (1 - t_j)
    k_j       s_j ((y - y_j + a_j) rho - (1 - t_j) u)        v_j     s_j (1 - t_j) g
    q         u                                             ridge   u . rho

where sum_j s_j h_j = g . out + u . (m - q) - ridge u . rho, and scores pass their gradients on to q and k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.attention.local_linear.solve import cholesky, conjugate_gradients
from tilewise.tiles import FULL, NONE, Tiling, Visibility
from tilewise.tiles.visibility import to_heads


class Solved(NamedTuple):
    """Per query: out `[B, H, N, D_v]`; top, total and residual `[B, H, N, 1]`; mean and rho `[B, H, N, D]`.

    top is the largest score and total the sum of exp(score - top); 0 where a query sees nothing. They stand for the
    log of the sum of exponentials: with that one number, weights of large scores would not add up to 1.
    """

    out: Tensor
    top: Tensor
    total: Tensor
    mean: Tensor
    rho: Tensor
    residual: Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """A call: q `[B, H, N_q, D]`, k and v `[B, H_kv, N_k, *]`, ridge `[B, H, N_q, 1]`, and how it is computed.

    `tile` is (queries, keys). Residuals of solves stop at `tolerance` in the units of `LocalLinear.bound`, or after
    `steps` steps of conjugate gradients; 0 steps solve by Cholesky factors instead.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    ridge: Tensor
    view: Visibility
    scale: float
    tolerance: float
    steps: int
    tile: tuple[int, int]

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def rows(self) -> Iterator[Row]:
        """Query tiles that see anything, each with its visible key tiles."""
        q_tiling, k_tiling = (Tiling(size) for size in self.tile)
        kinds = self.view.tiles(q_tiling, k_tiling)
        some = (kinds != NONE).flatten(0, 1).any(0).tolist()
        whole = (kinds == FULL).flatten(0, 1).all(0).tolist()
        for i, line in enumerate(some):
            keys = [(j, whole[i][j]) for j, visible in enumerate(line) if visible]
            if keys:
                yield Row(self, _span(i, self.tile[0], self.q.shape[2]), keys)


class Tile(NamedTuple):
    """Key tile `at` for the queries of a row: keys `[B, H, w, D]`, softmax weights or scores `[B, H, m, w]`."""

    at: slice
    keys: Tensor
    weights: Tensor


class Row:
    """One tile of queries. It holds what is known of them: top, total and mean, set by `softmax`."""

    def __init__(self, problem: Problem, at: slice, keys: list[tuple[int, bool]]) -> None:
        self.problem, self.at, self.keys = problem, at, keys
        self.q = problem.q[:, :, at].to(problem.wide)
        self.ridge = problem.ridge[:, :, at]
        self.top, self.total, self.mean = torch.zeros_like(self.ridge), torch.zeros_like(self.ridge), self.q

    def scored(self) -> Iterator[Tile]:
        """Key tiles with their scores, -inf where hidden."""
        p = self.problem
        for j, whole in self.keys:
            at = _span(j, p.tile[1], p.k.shape[2])
            keys = to_heads(p.k[:, :, at].to(p.wide), p.q.shape[1])
            scores = (p.scale * self.q) @ keys.mT
            yield Tile(at, keys, scores if whole else scores.masked_fill_(~self._seen(at), -torch.inf))

    def tiles(self) -> Iterator[Tile]:
        """Key tiles with their softmax weights, 0 for queries that see nothing."""
        share = 1 / self.total.masked_fill(self.total == 0, 1)
        for at, keys, scores in self.scored():
            yield Tile(at, keys, scores.sub_(self.top).exp_().mul_(share))

    def values(self, at: slice) -> Tensor:
        """Values `[B, H, w, D_v]`."""
        return to_heads(self.problem.v[:, :, at].to(self.problem.wide), self.q.shape[1])

    def _seen(self, at: slice) -> Tensor:
        view, heads = self.problem.view, self.q.shape[1]
        lo, hi = (x[:, :, self.at].unsqueeze(3) for x in (view.lo, view.hi))
        pos = view.pos[:, :, at].unsqueeze(2)
        lo, hi, pos = (to_heads(x, heads) for x in (lo, hi, pos))
        seen = ((lo <= pos) & (pos <= hi)).all(-1)
        return seen if view.dense is None else seen & to_heads(view.dense[:, :, self.at, at], heads)

    def softmax(self) -> None:
        """Set top, total and the weighted mean of the keys, in one pass."""
        top = torch.full_like(self.ridge, -torch.inf)
        total, mean = torch.zeros_like(self.ridge), torch.zeros_like(self.q)
        for _, keys, scores in self.scored():
            above = torch.maximum(top, scores.amax(-1, keepdim=True))
            base = above.masked_fill(above == -torch.inf, 0)
            weights, fade = scores.sub_(base).exp_(), (top - base).exp()
            total = fade * total + weights.sum(-1, keepdim=True)
            mean = fade * mean + weights @ keys
            top = above
        self.mean = mean / total.masked_fill(total == 0, 1)
        self.top, self.total = top.masked_fill(top == -torch.inf, 0), total

    def gap(self) -> Tensor:
        """Mean key minus query; 0 for queries that see nothing."""
        return (self.mean - self.q).masked_fill(self.total == 0, 0)

    def solve(self, rhs: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """A^-1 rhs and its residual, to `tolerance * spread * sqrt(ridge)`."""
        p = self.problem
        if p.steps == 0:
            return cholesky(self._covariance(), rhs, self.ridge), torch.zeros_like(self.ridge)
        limit = p.tolerance * spread * self.ridge.sqrt()
        return conjugate_gradients(self._times, rhs, self.ridge, limit, p.steps)

    def _times(self, x: Tensor) -> Tensor:
        """C x, one pass over the keys; no matrix is made."""
        along = (self.mean * x).sum(-1, keepdim=True)
        out, total = torch.zeros_like(x), torch.zeros_like(along)
        for _, keys, weights in self.tiles():
            flow = (x @ keys.mT).sub_(along).mul_(weights)
            out += flow @ keys
            total += flow.sum(-1, keepdim=True)
        return out - total * self.mean

    def _covariance(self) -> Tensor:
        """C itself, `[B, H, m, D, D]`, from outer products of one key tile at a time.

        They are taken about the first query's mean: about zero, keys far from it would leave only rounding. No
        query but that one changes them, so a causal answer does not depend on later tokens.
        """
        d = self.q.shape[3]
        centre = self.mean[:, :, :1]
        moments = torch.zeros(*self.q.shape[:3], d * d, dtype=self.q.dtype, device=self.q.device)
        for _, keys, weights in self.tiles():
            keys = keys - centre
            moments += weights @ (keys.unsqueeze(-1) * keys.unsqueeze(-2)).flatten(3)
        off = self.mean - centre
        return moments.unflatten(3, (d, d)).sub_(off.unsqueeze(-1) * off.unsqueeze(-2))


def forward(p: Problem) -> Solved:
    """Three passes over the keys for each tile of queries: the mean, the solve, the output."""
    b, heads, n, d = p.q.shape
    sizes = (p.v.shape[3], 1, 1, d, d, 1)
    found = Solved(*(torch.zeros(b, heads, n, size, dtype=p.wide, device=p.q.device) for size in sizes))
    for row in p.rows():
        row.softmax()
        rho, residual = row.solve(row.gap(), torch.ones_like(row.ridge))
        along = (row.mean * rho).sum(-1, keepdim=True)
        out = found.out[:, :, row.at]
        for at, keys, weights in row.tiles():
            out += (weights * (1 + along - rho @ keys.mT)) @ row.values(at)
        for whole, part in zip(found[1:], (row.top, row.total, row.mean, rho, residual)):
            whole[:, :, row.at] = part
    return found


def backward(p: Problem, found: Solved, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and ridge, in the wide dtype; k and v those of their own heads."""
    d_q, d_k, d_v = (torch.zeros(x.shape, dtype=p.wide, device=x.device) for x in (p.q, p.k, p.v))
    d_ridge = torch.zeros_like(p.ridge)
    for row in p.rows():
        row.top, row.total, row.mean = (x[:, :, row.at] for x in (found.top, found.total, found.mean))
        rho, out = found.rho[:, :, row.at], found.out[:, :, row.at]
        g = d_out[:, :, row.at].to(p.wide)
        y, u = _adjoint(row, g)
        share = (u * rho).sum(-1, keepdim=True)
        h = (g * out).sum(-1, keepdim=True) + (u * row.gap()).sum(-1, keepdim=True) - row.ridge * share
        along_rho, along_u = ((row.mean * x).sum(-1, keepdim=True) for x in (rho, u))
        d_q[:, :, row.at] += u
        d_ridge[:, :, row.at] = share
        for at, keys, weights in row.tiles():
            products = g @ row.values(at).mT - y
            t, a = rho @ keys.mT - along_rho, u @ keys.mT - along_u
            kept = weights * (1 - t)
            flow = (y + products - products * t - a * (1 - t) - h).mul_(weights).mul_(p.scale)
            d_q[:, :, row.at] += flow @ keys
            to_keys = flow.mT @ row.q + (weights * (a - products)).mT @ rho - kept.mT @ u
            d_k[:, :, at] += _by_group(to_keys, p.k.shape[1])
            d_v[:, :, at] += _by_group(kept.mT @ g, p.v.shape[1])
    return d_q, d_k, d_v, d_ridge


def _adjoint(row: Row, g: Tensor) -> tuple[Tensor, Tensor]:
    """y, the mean of g . v_j `[B, H, m, 1]`, and u `[B, H, m, D]`."""
    y, square, c = torch.zeros_like(row.ridge), torch.zeros_like(row.ridge), torch.zeros_like(row.q)
    for at, keys, weights in row.tiles():
        products = g @ row.values(at).mT
        flow = weights * products
        y += flow.sum(-1, keepdim=True)
        square += (flow * products).sum(-1, keepdim=True)
        c += flow @ keys
    spread = (square - y.square()).clamp(min=0).sqrt()
    return y, row.solve(c - y * row.mean, spread)[0]


def _by_group(x: Tensor, kv_heads: int) -> Tensor:
    """Sum `[B, H, w, D]` over the query heads of each kv head."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).sum(2)


def _span(tile: int, size: int, n: int) -> slice:
    return slice(tile * size, min((tile + 1) * size, n))
