"""Blocks that go round the ranks, and results that come home."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.attention.context_parallel.layout import Spread, Trip
from tilewise.attention.context_parallel.traffic import Exchange, Ring


class Form(NamedTuple):
    """What a tensor looks like for n tokens: `[B, heads, n, width]`, or `[B, heads, n]` without width."""

    heads: int
    width: int | None
    dtype: torch.dtype


class Block(NamedTuple):
    """Tensors `[B, heads, n, ...]` for the tokens of some segments of one rank, one segment after the other."""

    segments: tuple[int, ...]
    tensors: dict[str, Tensor]

    def pick(self, wanted: tuple[int, ...], spread: Spread) -> Block:
        """The part of this block for some of its segments (a view)."""
        if wanted == self.segments:
            return self
        rows = spread.span(self.segments, wanted)
        return Block(wanted, {name: x[:, :, rows] for name, x in self.tensors.items()})


class Travel(NamedTuple):
    """One journey of every rank's block past all ranks.

    Attributes:
        ring: the ranks. phase: for the count of bytes.
        spread, trip: how the tokens that travel are cut, and where their segments have work.
        batch: B. device: where tensors live.
        payload, results: the tensors that go round, and those that are brought home; empty for none.
        along: results are added up on the way, going on with their block, instead of each coming home at once.
    """

    ring: Ring
    phase: str
    spread: Spread
    trip: Trip
    batch: int
    device: torch.device
    payload: Mapping[str, Form]
    results: Mapping[str, Form]
    along: bool = False

    def brings(self, owner: int, hop: int) -> tuple[int, ...]:
        """The segments that a visit gives results for."""
        if not self.results:
            return ()
        return self.trip.needed(owner, hop) if self.along else self.trip.stops[owner][hop]

    def carries(self, owner: int, hop: int) -> tuple[int, ...]:
        """Those of them whose results go on to the next rank."""
        return self.trip.needed(owner, hop + 1) if self.along and hop else ()

    def homes(self, owner: int, hop: int) -> tuple[int, ...]:
        """Those of them whose results go home."""
        carried = self.carries(owner, hop)
        return tuple(s for s in self.brings(owner, hop) if s not in carried)

    def fresh(self, segments: tuple[int, ...], forms: Mapping[str, Form], zero: bool = False) -> Block:
        """A block of new tensors."""
        make = torch.zeros if zero else torch.empty
        rows = self.spread.rows(segments)
        made = {}
        for name, form in forms.items():
            shape = (self.batch, form.heads, rows, *(() if form.width is None else (form.width,)))
            made[name] = make(shape, dtype=form.dtype, device=self.device)
        return Block(segments, made)

    def go(
        self, own: Block, visit: Callable[[Block], Block | None], welcome: Callable[[Block], None]
    ) -> None:
        """Send `own` round; `visit(block)` what passes by, `welcome(block)` what comes home.

        At each hop the block of this hop is computed on while the next one, and results of the hop before, are
        under way. `visit` is called with the segments for which there is work here, and returns a block of
        results for them, or None where the journey brings none. What this rank's own block finds at home is
        welcomed at once.

        Whether something is sent follows from the trip alone, which all ranks know, so both ends agree.
        """
        ring, way, ranks = self.ring, self.trip.way, self.ring.ranks
        block, done = own, None
        for hop in range(ranks + 1):
            owner = ring.at(-way * hop)
            exchange = ring.exchange(self.phase, hop)
            arriving = self._pass_on(exchange, block, owner, hop)
            passing, returning = self._deliver(exchange, done, hop)
            exchange.post()
            done = None
            if hop < ranks and self.trip.needed(owner, hop):
                done = self._visit(visit, owner, hop, block)
            exchange.wait()
            if passing is not None and done is not None:
                for name, x in done.tensors.items():
                    x += passing.tensors[name]
            if returning is not None:
                welcome(returning)
            if hop == 0 and done is not None:
                welcome(done)
                done = None
            block = arriving

    def _visit(self, visit, owner: int, hop: int, block: Block) -> Block | None:
        """Results for all segments that `brings` names; zeros for those without work here."""
        stop = self.trip.stops[owner][hop]
        made = visit(block.pick(stop, self.spread)) if stop else None
        wanted = self.brings(owner, hop)
        if not wanted or (made is not None and made.segments == wanted):
            return made
        whole = self.fresh(wanted, self.results, zero=True)
        if made is not None:
            for name, x in whole.pick(stop, self.spread).tensors.items():
                x.copy_(made.tensors[name])
        return whole

    def _pass_on(self, exchange: Exchange, block: Block, owner: int, hop: int) -> Block:
        """Send on the segments that are needed further on; the block that will take their place."""
        ring, way = self.ring, self.trip.way
        if hop + 1 >= ring.ranks:
            return Block((), {})
        onward = self.trip.needed(owner, hop + 1)
        exchange.send(block.pick(onward, self.spread).tensors, ring.at(way), way)
        arriving = self.fresh(self.trip.needed(ring.at(-way * (hop + 1)), hop + 1), self.payload)
        exchange.receive(arriving.tensors, ring.at(-way))
        return arriving

    def _deliver(self, exchange: Exchange, done: Block | None, hop: int) -> tuple[Block | None, Block | None]:
        """Send on what the last visit brought; room for what others brought for the block now here, and for us."""
        ring, way, last = self.ring, self.trip.way, hop - 1
        if last < 1 or not self.results:
            return None, None
        owner, back = ring.at(-way * last), way if self.along else -way
        if done is not None:
            exchange.send(done.pick(self.carries(owner, last), self.spread).tensors, ring.at(way), way)
            exchange.send(done.pick(self.homes(owner, last), self.spread).tensors, owner, back)
        passing = self.fresh(self.carries(ring.at(-way * hop), last), self.results)
        exchange.receive(passing.tensors, ring.at(-way))
        returning = self.fresh(self.homes(ring.rank, last), self.results)
        exchange.receive(returning.tensors, ring.at(way * last))
        return (passing if passing.segments else None), (returning if returning.segments else None)
