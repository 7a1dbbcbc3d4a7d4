"""Memories that learn while a sequence is read: a chunk at a time, and none of its tokens is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.recurrence.fast_weights import FastWeights, Lessons
from tilewise.recurrence.rows import Rows
from tilewise.recurrence.state import Carried

Update = Callable[[FastWeights, FastWeights], FastWeights]


def plain(weights: FastWeights, step: FastWeights) -> FastWeights:
    """Plain gradient descent."""
    return weights.moved(step, None)


def bounded(first: FastWeights) -> Update:
    """Plain gradient descent, then rows of the first layer brought back to the length they have in `first`, and
    those of the second, which may begin at 0, to 1, if they are longer."""
    lengths = first.lengths
    bounds = FastWeights(lengths.gate, lengths.up, torch.ones_like(lengths.down))

    def update(weights: FastWeights, step: FastWeights) -> FastWeights:
        made = weights.moved(step, None)
        pairs = ((made.gate, bounds.gate), (made.up, bounds.up), (made.down, bounds.down))
        return FastWeights(*(w * (b / (w.norm(dim=-1, keepdim=True) + 1e-5)).clamp(max=1) for w, b in pairs))

    return update


@dataclass(frozen=True, eq=False)
class Learner(Carried):
    """A memory in the middle of a chunk: no token is kept.

    Attributes:
        weights: as the chunk began, where its gradients are taken. step: what its tokens so far add to them.
    """

    weights: FastWeights
    step: FastWeights

    @classmethod
    def fresh(cls, weights: FastWeights) -> Learner:
        """At the start of a chunk."""
        return cls(weights, weights.map(torch.zeros_like))

    def told(self, lessons: Lessons) -> Learner:
        """After more tokens of the chunk."""
        return Learner(self.weights, self.step.moved(lessons.step, None))

    def ended(self, rows: Tensor, update: Update) -> Learner:
        """The sequences in `rows` (bool `[S]`) begin their next chunk."""
        after = Learner.fresh(update(self.weights, self.step))
        return after if bool(rows.all()) else after.where(rows, self)

    def where(self, rows: Tensor, other: Learner) -> Learner:
        """This for the sequences in `rows` (bool `[S]`), another's for the rest."""
        return Learner(self.weights.where(rows, other.weights), self.step.where(rows, other.step))

    def then(self, first: Learner, shards: int) -> Learner:
        """`[S * shards]` learners: each sequence's first shard goes on from this, others begin as `first`."""
        if shards == 1:
            return self
        parts: list[FastWeights] = []
        for a, b in ((self.weights, first.weights), (self.step, first.step)):
            pairs = ((a.gate, b.gate), (a.up, b.up), (a.down, b.down))
            others = [y.unsqueeze(1).expand(-1, shards - 1, -1, -1, -1) for _, y in pairs]
            joined = [torch.cat((x.unsqueeze(1), y), 1).flatten(0, 1) for (x, _), y in zip(pairs, others)]
            parts.append(FastWeights(*joined))
        return Learner(*parts)


def pieces(start: int, stop: int, chunk: int) -> Iterator[tuple[int, int]]:
    """[start, stop) cut at multiples of the chunk."""
    while start < stop:
        end = min(stop, (start // chunk + 1) * chunk)
        yield start, end
        start = end


Read = Callable[[Learner, slice, Lessons], Tensor]


@dataclass(frozen=True, eq=False)
class Places:
    """Rows of T places, counted from a chunk's border.

    Attributes:
        start: the first place. filled, ends: int64 `[S]`; row s has tokens of earlier calls before
            `filled[s]`, and its last one before `ends[s]`.
    """

    start: int
    filled: Tensor
    ends: Tensor

    @classmethod
    def of(cls, rows: Rows) -> Places:
        """Of whole rows."""
        return cls(rows.start, rows.filled, rows.ends)

    def sharded(self, shards: int, length: int) -> Places:
        """Of each row cut into shards of so many places, `[S * shards]`."""
        before = torch.arange(shards, device=self.ends.device) * length
        filled, ends = ((x.unsqueeze(1) - before).clamp(min=0).flatten() for x in (self.filled, self.ends))
        return Places(self.start, filled, ends)


def walk(
    learner: Learner,
    told: tuple[Tensor, Tensor, Tensor],
    chunk: int,
    places: Places,
    read: Read,
    *,
    loss: str = "square",
    update: Update = plain,
) -> tuple[Tensor, Learner]:
    """A memory through T places, a chunk at a time: what `read` finds, `[S, M, T, D]`, and how it is left.

    Args:
        learner: of each row. told: keys and values `[S, M, T, D]`, rates `[S, M, T, 3]`, which are 0 where a
            row has no token. chunk: tokens of an update. places: of the rows. read: given the memory as it
            was before a chunk's part, which places that part is, and what its tokens will add, says what they
            read. loss: as in `FastWeights.descent`. update: makes the next chunk's weights of a chunk's
            weights and their step.
    """
    found, (k, v, rates) = [], told
    for begin, end in pieces(places.start, places.start + k.shape[2], chunk):
        part = slice(begin - places.start, end - places.start)
        lessons = learner.weights.lessons(k[:, :, part], v[:, :, part], rates[:, :, part], loss)
        found.append(read(learner, part, lessons))
        learner = learner.told(lessons)
        if end % chunk == 0:
            learner = learner.ended((places.ends >= end) & (places.filled < end), update)
    return (torch.cat(found, 2) if found else v), learner
