"""Memories that learn while a sequence is read: a chunk at a time, and none of its tokens is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.recurrence.fast_weights import FastWeights, Lessons
from tilewise.recurrence.state import Carried


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

    def ended(self, rows: Tensor) -> Learner:
        """The sequences in `rows` (bool `[S]`) begin their next chunk."""
        after = Learner.fresh(self.weights.moved(self.step, None))
        return after if bool(rows.all()) else after.where(rows, self)

    def where(self, rows: Tensor, other: Learner) -> Learner:
        """This for the sequences in `rows` (bool `[S]`), another's for the rest."""
        return Learner(self.weights.where(rows, other.weights), self.step.where(rows, other.step))

    def then(self, first: Learner, shards: int) -> Learner:
        """`[S * shards]` learners: the first shard of each sequence goes on from this, the others begin as
        `first`."""
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


def walk(
    learner: Learner,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    read: Callable[[Learner, slice, Lessons], Tensor],
    chunk: int,
    start: int,
    filled: Tensor,
    ends: Tensor,
) -> tuple[Tensor, Learner]:
    """A memory through T places, a chunk at a time: what `read` finds, `[S, M, T, D]`, and how it is left.

    Places are counted from a chunk's border; the first is `start`. Row s has tokens of earlier calls before
    `filled[s]` and its last before `ends[s]`; keys, values and rates are 0 where it has none.
    """
    found = []
    for begin, end in pieces(start, start + k.shape[2], chunk):
        part = slice(begin - start, end - start)
        rate = rates[:, :, part].unsqueeze(3).expand(-1, -1, -1, 3)
        lessons = learner.weights.lessons(k[:, :, part], v[:, :, part], rate, "square")
        found.append(read(learner, part, lessons))
        learner = learner.told(lessons)
        if end % chunk == 0:
            learner = learner.ended((ends >= end) & (filled < end))
    return (torch.cat(found, 2) if found else v), learner
