"""Who sends what to whom in context-parallel attention: ring attention and TokenRing, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tilewise.attention.context_parallel.layout import Spread, Trip
from tilewise.attention.context_parallel.local import Map, Running, attend_block, attend_block_backward, wide
from tilewise.attention.context_parallel.traffic import Ring
from tilewise.attention.context_parallel.travel import Block, Form, Travel
from tilewise.tiles import Mask, Partial

SCHEDULES = ("ring", "token_ring")
UP, DOWN = 1, -1


@dataclass(frozen=True)
class Job:
    """What the forward and the backward pass of one call share."""

    ring: Ring
    where: Map
    schedule: str
    scale: float

    def queries(self, **tensors: Tensor) -> Block:
        """This rank's own queries and what goes with them."""
        return Block(self.where.q.owned[self.ring.rank], tensors)

    def keys(self, **tensors: Tensor) -> Block:
        """This rank's own keys and what goes with them."""
        return Block(self.where.k.owned[self.ring.rank], tensors)

    def travel(
        self,
        phase: str,
        spread: Spread,
        trip: Trip,
        own: Block,
        results: dict[str, Form] | None = None,
        along: bool = False,
    ) -> Travel:
        """The journey of `own`, and of the like from every rank."""
        some = next(iter(own.tensors.values()))
        payload = {
            name: Form(x.shape[1], x.shape[3] if x.ndim == 4 else None, x.dtype)
            for name, x in own.tensors.items()
        }
        batch, device = some.shape[0], some.device
        return Travel(self.ring, phase, spread, trip, batch, device, payload, results or {}, along)


class SpreadAttention(torch.autograd.Function):
    """`(q, k, v, job)` to out and lse, by the job's schedule."""

    @staticmethod
    def forward(ctx, q, k, v, job):
        running = Running(q, v.shape[3])
        (ring_forward if job.schedule == "ring" else token_ring_forward)(job, q, k, v, running)
        out = running.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, running.lse)
        ctx.job = job
        return out, running.lse

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_lse):
        q, k, v, out, lse = ctx.saved_tensors
        job = ctx.job
        delta = (d_out.to(lse.dtype) * out).sum(-1) - d_lse
        grads = [
            torch.zeros_like(x, dtype=wide(x.dtype), memory_format=torch.contiguous_format) for x in (q, k, v)
        ]
        run = ring_backward if job.schedule == "ring" else token_ring_backward
        run(job, (q, k, v), {"d_out": d_out, "lse": lse, "delta": delta}, grads)
        return *(g.to(x.dtype) for g, x in zip(grads, (q, k, v))), None


def ring_forward(job: Job, q: Tensor, k: Tensor, v: Tensor, running: Running) -> None:
    """Keys and values go up; every rank merges what they add to its own queries."""
    where, own, queries = job.where, job.keys(k=k, v=v), job.queries(q=q)

    def visit(keys: Block) -> None:
        asking = where.queries_of(job.ring.rank, keys.segments)
        mask = where.between(asking, keys.segments, q.device)
        some = queries.pick(asking, where.q).tensors["q"]
        part = attend_block(some, keys.tensors["k"], keys.tensors["v"], mask, job.scale, job.ring.traffic)
        running.add(where.q.span(queries.segments, asking), part)

    job.travel("forward", where.k, where.key_trip(UP), own).go(own, visit, _nothing)


def token_ring_forward(job: Job, q: Tensor, k: Tensor, v: Tensor, running: Running) -> None:
    """Queries go down; what each rank's keys add to them goes straight back up to their owner, who merges it."""
    where, own, keys = job.where, job.queries(q=q), job.keys(k=k, v=v)

    def visit(queries: Block) -> Block:
        answering = where.keys_of(job.ring.rank, queries.segments)
        mask = where.between(queries.segments, answering, q.device)
        some = keys.pick(answering, where.k).tensors
        part = attend_block(queries.tensors["q"], some["k"], some["v"], mask, job.scale, job.ring.traffic)
        return Block(queries.segments, {"out": part.out, "lse": part.lse})

    def welcome(block: Block) -> None:
        rows = where.q.span(own.segments, block.segments)
        running.add(rows, Partial(block.tensors["out"], block.tensors["lse"]))

    results = {"out": Form(q.shape[1], v.shape[3], q.dtype), "lse": Form(q.shape[1], None, wide(q.dtype))}
    job.travel("forward", where.q, where.query_trip(DOWN), own, results).go(own, visit, welcome)


def ring_backward(job: Job, qkv: tuple[Tensor, ...], rows: dict[str, Tensor], grads: list[Tensor]) -> None:
    """Keys and values go up as before, and with them, one step behind, the sum of their gradients so far."""
    where, (q, k, v), (d_q, d_k, d_v) = job.where, qkv, grads
    own, queries = job.keys(k=k, v=v), job.queries(q=q, d_q=d_q, **rows)

    def visit(keys: Block) -> Block:
        asking = where.queries_of(job.ring.rank, keys.segments)
        some = queries.pick(asking, where.q).tensors
        mask = where.between(asking, keys.segments, q.device)
        more = _gradients(some, keys.tensors, mask, job.scale)
        some["d_q"] += more[0]
        return Block(keys.segments, {"d_k": more[1].to(d_k.dtype), "d_v": more[2].to(d_v.dtype)})

    def welcome(block: Block) -> None:
        span = where.k.span(own.segments, block.segments)
        d_k[:, :, span] += block.tensors["d_k"]
        d_v[:, :, span] += block.tensors["d_v"]

    results = {"d_k": _form(d_k), "d_v": _form(d_v)}
    travel = job.travel("backward", where.k, where.key_trip(UP), own, results, along=True)
    travel.go(own, visit, welcome)


def token_ring_backward(
    job: Job, qkv: tuple[Tensor, ...], rows: dict[str, Tensor], grads: list[Tensor]
) -> None:
    """Queries and their rows' gradients go down; query gradients go back up; those of keys and values stay."""
    where, (q, k, v), (d_q, d_k, d_v) = job.where, qkv, grads
    own, keys = job.queries(q=q, **rows), job.keys(k=k, v=v, d_k=d_k, d_v=d_v)

    def visit(queries: Block) -> Block:
        answering = where.keys_of(job.ring.rank, queries.segments)
        some = keys.pick(answering, where.k).tensors
        mask = where.between(queries.segments, answering, q.device)
        more = _gradients(queries.tensors, some, mask, job.scale)
        some["d_k"] += more[1]
        some["d_v"] += more[2]
        return Block(queries.segments, {"d_q": more[0]})

    def welcome(block: Block) -> None:
        d_q[:, :, where.q.span(own.segments, block.segments)] += block.tensors["d_q"]

    results = {"d_q": Form(q.shape[1], q.shape[3], q.dtype)}
    travel = job.travel("backward", where.q, where.query_trip(DOWN), own, results)
    travel.go(own, visit, welcome)


def _gradients(
    queries: dict[str, Tensor], keys: dict[str, Tensor], mask: Mask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    d_out, lse, delta = (queries[name] for name in ("d_out", "lse", "delta"))
    return attend_block_backward(queries["q"], keys["k"], keys["v"], d_out, lse, delta, mask, scale)


def _form(x: Tensor) -> Form:
    return Form(x.shape[1], x.shape[3], x.dtype)


def _nothing(block: Block) -> None:
    """Nothing comes home."""
