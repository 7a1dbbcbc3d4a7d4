"""TNT: a memory that learns in large chunks, and memories that learn in small ones and are reset."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.api import scan
from tilewise.recurrence.fast_weights import FastWeights, Lessons
from tilewise.recurrence.learner import Learner, Places, bounded, walk
from tilewise.recurrence.mixer import HeadNorm, Mixer, check_width, from_heads, to_heads, wide
from tilewise.recurrence.model import mixer
from tilewise.recurrence.rows import Rows
from tilewise.recurrence.short_conv import ShortConv, convolved
from tilewise.recurrence.state import Carried, State


@dataclass(frozen=True, eq=False)
class TNTState(Carried):
    """All of a constant size, float32 or wider.

    Attributes:
        far: the global memory, or None. near: the local memories. keys: `[S, M, D, D]`, the sum of `k k^T`
            since the shard began. tails: of the short convolutions. count: int64 `[S]`, tokens read.
    """

    far: Learner | None
    near: tuple[Learner, ...]
    keys: Tensor
    tails: tuple[Tensor, ...]
    count: Tensor


@mixer("tnt")
class TNT(Mixer):
    """Memories of two time scales, trained in parallel (Li et al., 2025, arXiv 2511.07343).

    A memory is a small network f whose weights take a step of gradient descent on `|f(k) - v|^2 / 2` for each
    token, the gradients of a chunk all taken at the weights with which it began. The global memory learns in
    large chunks
    and is read as the chunk began: few steps, one after the other. A local memory learns in small chunks, is
    read as its last token left it, and every `shard` tokens goes back to its first weights, which are
    learned: so all shards of a sequence are computed side by side, and that is what makes training fast.
    Local memories are asked by the query brought into the span of the shard's keys, `sum of k (k . q)` over
    them. A token's output is the sum of what all memories say.

    The second stage of training is `refine`, and some more steps with smaller chunks.

    Differs from the paper in that f is SwiGLU, its second layer 0 at first; in that at each chunk's end rows of
    the first layer that are longer than they began, and rows of the second longer than 1, are brought back to
    that (without, a memory that is not reset diverged in training); in that the projected query is brought to
    length 1, as keys are (its length otherwise grows with the shard); and in what is around the memories, which
    it does not tell: short convolutions and `silu` before them, a norm by head and a gate after them. Rates are
    a softplus of the token, one for each memory.

    Args:
        width: of the inputs. memories: heads of each memory. far: tokens of a global chunk, 2,048 in the
            paper; None leaves the global memory out. near: tokens of a chunk of each local memory. shard:
            tokens from one reset to the next, 2,048 or 4,096 in the paper, a multiple of each of `near`; None
            never resets, and with `far=None` and one of `near` that is the plain memory TNT is measured
            against. project: whether local memories are asked by the projected query.
        expand: hidden size of a memory as a share of its head's. rate: sets what rates begin at. conv: width
            of the short convolutions; 0 leaves them and their `silu` out.

    Raises ValueError for sizes below 1 and those that do not divide, and where no memory is left.
    """

    def __init__(
        self,
        width: int,
        memories: int = 4,
        far: int | None = 2048,
        near: tuple[int, ...] = (8,),
        shard: int | None = 2048,
        *,
        project: bool = True,
        expand: float = 1.0,
        rate: float = 1.0,
        conv: int = 4,
    ) -> None:
        super().__init__()
        part = check_width(width, memories)
        hidden = int(part * expand)
        check_width(hidden, 1, "width / memories * expand")
        if not rate > 0:
            raise ValueError(f"rate must be above 0, got {rate!r}")
        for name, value in (("far", far), ("shard", shard)):
            check_width(1 if value is None else value, 1, name)
        self.memories, self.far, self.shard, self.project = memories, far, shard, project
        self.near = self._checked(near)
        if far is None and not near:
            raise ValueError("far and near must leave a memory, got None and ()")
        count = len(near) + (far is not None)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.convs = nn.ModuleList(ShortConv(width, conv) for _ in range(3 if conv else 0))
        self._begin()
        # Keys have length 1, so that these make hidden features of about 1.
        self.gate, self.up = (nn.Parameter(torch.randn(count, memories, hidden, part)) for _ in range(2))
        # What was never taught says nothing. Drawn, it spoke louder than what one token had taught, and of a far
        # and a near memory neither was learned.
        self.down = nn.Parameter(torch.zeros(count, memories, part, hidden))
        self.rate = nn.Linear(width, count * memories)
        chunks = ([] if far is None else [far]) + list(near)
        first = torch.tensor([rate / (hidden * math.sqrt(chunk)) for chunk in chunks])
        with torch.no_grad():
            self.rate.bias.copy_(first.expm1().log().repeat_interleave(memories))
        self.norm, self.share = HeadNorm(memories, part), nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    @torch.no_grad()
    def _begin(self) -> None:
        """Keys begin as the token with the one before it, queries as the same map of the token alone: a value is
        found by the key told before it from the first step. Where both are drawn, a memory's answer hardly
        depends on the match (its features are nearly quadratic), and 16 pairs told once were not learned in 300
        steps; so they are in 100."""
        self.query.weight.copy_(self.key.weight)
        for taps, least in zip(self.convs.parameters(), (-1, -2, -1)):
            taps.zero_()[least:] = 1

    def _checked(self, near: tuple[int, ...]) -> tuple[int, ...]:
        for chunk in near:
            check_width(chunk, 1, "near")
            if self._period(near) % chunk:
                raise ValueError(
                    f"near must divide shard or else its largest, got {near!r} and {self.shard!r}"
                )
        return tuple(near)

    def _period(self, near: tuple[int, ...]) -> int:
        return max(near, default=1) if self.shard is None else self.shard

    def refine(self, near: tuple[int, ...]) -> None:
        """The second stage, before some more training: local memories learn in chunks of these sizes from now
        on.

        Raises ValueError for sizes that do not divide the shard, and where they are not one for each memory.
        """
        if len(near) != len(self.near):
            raise ValueError(f"near must be {len(self.near)} sizes, one for each local memory, got {near!r}")
        self.near = self._checked(near)

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        packing = {"mask": mask, "cu_seqlens": cu_seqlens}
        parts = [part(x) for part in (self.query, self.key, self.value)]
        parts, tails = convolved(self.convs, parts, None if state is None else state.tails, **packing)
        q, k, v = (wide(F.silu(part) if tails else part) for part in parts)
        q, k = (F.normalize(part.unflatten(2, (self.memories, -1)), dim=-1).flatten(2) for part in (q, k))
        told = (q, k, v, F.softplus(wide(self.rate(x))))
        count = None if state is None else state.count
        near = Rows.of(x, count, self._period(self.near), mask, cu_seqlens)
        if state is None:
            state = self._empty(len(near.lengths), x)
        out, locals_, keys = self._near(near, told, state)
        after = state.far
        if self.far is not None and state.far is not None:
            rows = Rows.of(x, count, self.far, mask, cu_seqlens)
            found, after = self._far(rows, told, state.far)
            out = out + found
        out = from_heads(self.norm(to_heads(out, self.memories))).to(x.dtype)
        made = TNTState(after, locals_, keys, tails, state.count + near.lengths)
        return self.out(out * F.silu(self.share(x))), made

    def _first(self, which: int) -> FastWeights:
        return FastWeights(*(wide(w[which]).unsqueeze(0) for w in (self.gate, self.up, self.down)))

    def _empty(self, sequences: int, x: Tensor) -> TNTState:
        made = [
            Learner.fresh(self._first(i).map(lambda w: w.expand(sequences, -1, -1, -1)))
            for i in range(len(self.gate))
        ]
        far = None if self.far is None else made.pop(0)
        keys = wide(x).new_zeros(sequences, self.memories, self.gate.shape[3], self.gate.shape[3])
        count = torch.zeros(sequences, dtype=torch.int64, device=x.device)
        return TNTState(far, tuple(made), keys, (), count)

    def _taken(self, rows: Rows, told: tuple[Tensor, ...], shards: int) -> tuple[Tensor, ...]:
        """Queries, keys and values `[S * shards, M, T, D]` and rates `[memory, S * shards, M, T, 3]`; 0 where
        no new token stands."""
        length = rows.tokens.shape[1] // shards
        parts = [rows.take(part).unflatten(1, (shards, length)).flatten(0, 1) for part in told]
        q, k, v = (to_heads(part, self.memories) for part in parts[:3])
        rates = parts[3].unflatten(2, (-1, self.memories)).permute(2, 0, 3, 1)
        return q, k, v, rates.unsqueeze(4).expand(-1, -1, -1, -1, 3)

    def _far(self, rows: Rows, told: tuple[Tensor, ...], learner: Learner) -> tuple[Tensor, Learner]:
        """What the global memory says, `[B, N, width]`, and how it is left."""
        q, k, v, rates = self._taken(rows, told, 1)

        def read(learner: Learner, part: slice, lessons: Lessons) -> Tensor:
            return learner.weights(q[:, :, part])

        told, places = (k, v, rates[0]), Places.of(rows)
        out, learner = walk(learner, told, rows.chunk, places, read, update=bounded(self._first(0)))
        return rows.put(from_heads(out)), learner

    def _near(
        self, rows: Rows, told: tuple[Tensor, ...], state: TNTState
    ) -> tuple[Tensor, tuple[Learner, ...], Tensor]:
        """What the local memories say, `[B, N, width]`, how they are left, and their shard's sum of keys."""
        if not self.near or not rows.chunks:
            return torch.zeros_like(told[0]), state.near, state.keys
        shards = 1 if self.shard is None else rows.chunks
        q, k, v, rates = self._taken(rows, told, shards)
        ask, keys = self._projected(q, k, state.keys, shards)
        places = Places.of(rows).sharded(shards, rows.tokens.shape[1] // shards)
        last, anew = self._behind(rows, shards)

        def read(learner: Learner, part: slice, lessons: Lessons) -> Tensor:
            return learner.weights.moved(learner.step, None).read_along(ask[:, :, part], lessons)

        out, after = torch.zeros_like(q), []
        firsts = [self._first(i) for i in range(len(self.gate) - len(self.near), len(self.gate))]
        for chunk, rate, learner, weights in zip(self.near, rates[-len(self.near) :], state.near, firsts):
            first = Learner.fresh(weights.map(lambda w: w.expand(len(last), -1, -1, -1)))
            begun = learner.then(first, shards)
            found, made = walk(begun, (k, v, rate), chunk, places, read, update=bounded(weights))
            out = out + found
            after.append(first.where(anew, made.select(last)))
        keys = keys[last].masked_fill(anew.view(-1, 1, 1, 1), 0)
        return rows.put(from_heads(out).unflatten(0, (-1, shards)).flatten(1, 2)), tuple(after), keys

    def _behind(self, rows: Rows, shards: int) -> tuple[Tensor, Tensor]:
        """Which of all rows' shards is open behind each row, and whether none of its tokens is read yet."""
        own = shards * torch.arange(len(rows.lengths), device=rows.ends.device)
        if self.shard is None:
            return own, torch.zeros_like(own, dtype=torch.bool)
        return own + (rows.ends // self.shard).clamp(max=shards - 1), rows.ends % self.shard == 0

    def _projected(self, q: Tensor, k: Tensor, keys: Tensor, shards: int) -> tuple[Tensor, Tensor]:
        """Queries in the span of the keys up to their own, of length 1, and each shard's sum of `k k^T`."""
        if not self.project:
            return q, keys.repeat_interleave(shards, 0)
        first = torch.cat((keys.unsqueeze(1), keys.new_zeros(len(keys), shards - 1, *keys.shape[1:])), 1)
        ask, state = scan(q, k, k, scale=1.0, state=State(first.flatten(0, 1)), return_state=True)
        return F.normalize(ask, dim=-1), state.matrix
