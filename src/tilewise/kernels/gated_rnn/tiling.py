"""How the native engine cuts a call: the cheapest by a model of costs of all cuts that fit the caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from tilewise.kernels.gated_rnn.integers import Problem
from tilewise.machine import cache_sizes

MOST_ROWS = 64  # of a block; more share R no better
LINE = 64  # bytes that come from memory together


@dataclass(frozen=True)
class Tiles:
    """A cut of a call.

    Attributes:
        rows: sequences that go through time together, one block.
        team: threads that share a block, each with units of its own and their rows of R.
        parts: of the blocks of a head, that are worked on at the same time.
        depth: tokens whose gradients are gathered before they go into that of R.
    """

    rows: int
    team: int
    parts: int
    depth: int


@dataclass(frozen=True)
class Processor:
    """What costs are counted with: bytes of the caches of a core and of all, and cycles.

    A packed R came from the second cache at 28 bytes a cycle (one AVX-512 machine); the other rates and the
    cycles that a vector of units takes of a token are rough. A meeting of threads counts as on a machine that
    others use too: there a team took 1.2 to 3 times as long as threads with blocks of their own.
    """

    first: int
    second: int
    third: int
    lanes: int = 16
    high: int = 6
    rates: tuple[float, ...] = (64.0, 28.0, 12.0, 6.0)
    unit: float = 150.0
    start: float = 60.0  # of a product of a few rows with some columns
    meeting: float = 30_000.0

    def rate(self, bytes_: int) -> float:
        """Bytes a cycle at which a core reads so many again and again."""
        for size, rate in zip((self.first // 2, self.second * 3 // 4, self.third * 3 // 4), self.rates):
            if bytes_ <= size:
                return rate
        return self.rates[-1]


def problem(
    sequences: int, heads: int, gates: int, width: int, threads: int, processor: Processor
) -> Problem:
    """All cuts of a call that fit, as integers with constraints."""
    p = Problem()
    sequences, vectors = max(1, sequences), -(-width // processor.lanes)
    units = vectors * processor.lanes
    evenly = {-(-sequences // blocks) for blocks in range(1, sequences + 1)}  # no rows more than blocks need
    rows = p.variable("rows", [rows for rows in evenly if rows <= MOST_ROWS])
    team = p.variable("team", range(1, threads + 1))
    groups = p.variable("groups", range(1, threads + 1))
    parts = p.variable("parts", range(1, min(sequences, threads) + 1))
    share = p.variable("share", range(1, vectors + 1))  # vectors of units of the busiest of a team
    tokens = p.variable("tokens", [2**i for i in range(10)])  # that are gathered, of each sequence of a block
    p.divides(team, threads)
    p.at_most(team * groups, threads)
    p.at_most(threads, team * groups)
    p.at_most(vectors, team * share)
    p.at_most(team * share + 1, team + vectors)  # nobody has nothing to do
    p.at_most(parts * rows + 1, rows + sequences)  # every part has a block
    p.at_most(LINE * rows * tokens, processor.first // 2)  # a column of what is gathered stays near
    p.at_most(groups * rows * tokens * (gates + 1) * units * 8, processor.third // 2)
    p.at_most(
        heads * parts * gates * units * units * 4, max(processor.third, heads * gates * units * units * 4)
    )
    return p


def cost(
    cut: Mapping[str, int],
    sequences: int,
    heads: int,
    gates: int,
    width: int,
    size: int,
    processor: Processor,
) -> float:
    """Cycles that a token of all sequences takes, both ways; `size` is that of a number of R, in bytes."""
    rows, team, share = cut["rows"], cut["team"], cut["share"]
    units, mine = -(-width // processor.lanes) * processor.lanes, share * processor.lanes
    blocks, depth = -(-sequences // rows), rows * cut["tokens"]
    matrix = gates * mine * units
    own = matrix * size
    passes = -(-rows // processor.high)
    arithmetic = rows * matrix / processor.lanes
    columns = (
        4 * processor.lanes * units * size
    )  # of R, that are worked on together; the backward pass has all gates'

    def through(near: int) -> float:
        """A product of all rows: R comes from where it lies, and again for every further pass from nearer."""
        again = (passes - 1) * own / processor.rate(min(near, own))
        return max(arithmetic, own / processor.rate(own) + again)

    ring = depth * (gates * mine + units) * 4
    gathering = arithmetic + rows * 8 * matrix / depth / processor.rate(4 * matrix)
    gathering += 2 * rows * (gates * mine + units) * 4 / processor.rate(ring)
    block = (
        through(columns)
        + through(gates * columns)
        + gathering
        + 2 * rows * share * processor.unit
        + 2 * passes * share * processor.start
        + (2 * processor.meeting if team > 1 else 0)
    )
    rounds = -(-heads * cut["parts"] // cut["groups"])
    return rounds * -(-blocks // cut["parts"]) * block


@lru_cache(maxsize=256)
def tile_sizes(
    sequences: int,
    heads: int,
    gates: int,
    width: int,
    threads: int,
    size: int = 4,
    processor: Processor | None = None,
) -> Tiles:
    """The cut that costs least, for `sequences` of `heads` with `gates` of `width` units, on `threads`
    threads.

    `size` is that of a number of R in bytes; `processor` None is this machine's.
    """
    if processor is None:
        processor = this_processor()
    cut = problem(sequences, heads, gates, width, threads, processor).best(
        lambda cut: cost(cut, max(1, sequences), heads, gates, width, size, processor)
    )
    return Tiles(cut["rows"], cut["team"], cut["parts"], cut["rows"] * cut["tokens"])


@lru_cache
def this_processor() -> Processor:
    """Of this machine, with usual sizes where the system does not tell."""
    return Processor(*cache_sizes())
