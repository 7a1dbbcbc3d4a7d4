"""Joining pairs of pieces, those first that gain most: in frequency, as BPE, or in the likelihood of a text."""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable

from tilewise.data.subword_cuts import Pair, pair_joined

Cuts = dict[str, list[str]]  # the pieces of every word
Gain = Callable[[Pair, int, "Counter[str]", int], float]


def join_best(cuts: Cuts, times: Counter[str], pieces: Counter[str], size: int, gain: Gain) -> list[Pair]:
    """Join the pair of largest gain in all words until there are `size` pieces or none gains; changes cuts, pieces.

    Gains on the heap may be old, but then too large only: a pair whose count, or whose pieces' counts, change is
    put there again, and fewer pieces in all lower every gain.
    """
    pairs: Counter[Pair] = Counter()
    where: dict[Pair, set[str]] = defaultdict(set)
    with_piece: dict[str, set[Pair]] = defaultdict(set)
    total = sum(pieces.values())

    def put(word: str, sign: int) -> set[Pair]:
        new = set(zip(cuts[word], cuts[word][1:]))
        for pair in zip(cuts[word], cuts[word][1:]):
            pairs[pair] += sign * times[word]
        for pair in new:
            (where[pair].add if sign > 0 else where[pair].discard)(word)
            for piece in pair:
                with_piece[piece].add(pair)
        return new

    touched: set[Pair] = set()
    for word in cuts:
        touched |= put(word, 1)
    heap: list[tuple[float, Pair]] = []
    merges: list[Pair] = []
    while len(pieces) < size:
        for pair in touched:
            if pairs[pair] > 1:
                heapq.heappush(heap, (-gain(pair, pairs[pair], pieces, total), pair))
        touched = set()
        if not heap or heap[0][0] >= 0:
            break
        old, pair = heapq.heappop(heap)
        now = gain(pair, pairs[pair], pieces, total) if pairs[pair] > 1 else 0.0
        if -now > old:
            touched = {pair}
            continue
        for word in sorted(where[pair]):
            touched |= put(word, -1)
            before, cuts[word] = len(cuts[word]), pair_joined(cuts[word], pair)
            joined = (before - len(cuts[word])) * times[word]
            for piece in pair:
                pieces[piece] -= joined
            pieces["".join(pair)] += joined
            total -= joined
            touched |= put(word, 1)
        if gain is not frequency:
            touched |= with_piece[pair[0]] | with_piece[pair[1]] | with_piece["".join(pair)]
        merges.append(pair)
    return merges


def frequency(pair: Pair, count: int, pieces: Counter[str], total: int) -> float:
    """BPE's gain of a pair."""
    return count


def rise(pair: Pair, count: int, pieces: Counter[str], total: int) -> float:
    """How much the log-likelihood rises when `count` occurrences of a pair become one piece each."""
    change = Counter({pair[0]: -count})
    change[pair[1]] -= count
    change["".join(pair)] += count
    return gained(change, pieces, total)


def gained(change: Counter[str], pieces: Counter[str], total: int) -> float:
    """How much the log-likelihood rises when counts of pieces change so."""
    rise = sum(xlogx(pieces[piece] + by) - xlogx(pieces[piece]) for piece, by in change.items())
    return rise + xlogx(total) - xlogx(total + sum(change.values()))


def likelihood(pieces: Counter[str]) -> float:
    """The log-likelihood of a text cut into so many of each piece, with the probabilities that suit it best."""
    return math.fsum(map(xlogx, pieces.values())) - xlogx(sum(pieces.values()))


def xlogx(count: int) -> float:
    """`count * log(count)`, 0 at 0."""
    return count * math.log(count) if count > 0 else 0.0
