"""Sub-word vocabularies: shortest-path encoding with pieces chosen for the likelihood of a text, and BPE beside it.

A text is cut into words, each with the space behind it as its end-of-word sign (other white space stands alone),
and words into pieces. A vocabulary is judged by the likelihood of the text when every piece is drawn by itself with
the probability that its count gives.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from tilewise.data.subword_cuts import Pair, joined, prefixes, shortest, shortest_within, utf8, words
from tilewise.data.subword_merges import Cuts, frequency, gained, join_best, likelihood, rise

TINY = 1e-6  # of the likelihood: a rise that is not worth another pass
UNSEEN = 0.5  # what a piece that no word uses counts as, and all bytes together
SPARE = 0.2  # of the vocabulary, in further pieces that compete with those that are there


@dataclass(frozen=True)
class SubwordModel:
    """Pieces with probabilities, and the encoding they make. Comes from `learn_swe` or `learn_bpe`.

    Ids are places in `pieces`. A character that is in no piece becomes bytes, ids `len(pieces) + byte`, so that
    every text can be encoded and comes back exactly.

    Attributes:
        pieces: the vocabulary; all characters of the text that it was learned from are in it.
        log_probs: natural logs of their probabilities. log_byte: of a byte's; 256 of it and all others sum to 1.
        merges: for BPE, the pairs to join, in order; None encodes by shortest path.
    """

    pieces: tuple[str, ...]
    log_probs: tuple[float, ...]
    log_byte: float
    merges: tuple[Pair, ...] | None = None

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of every piece."""
        return {piece: i for i, piece in enumerate(self.pieces)}

    @cached_property
    def _costs(self) -> dict[str, float]:
        return {piece: -log for piece, log in zip(self.pieces, self.log_probs)}

    @cached_property
    def _begins(self) -> set[str]:
        return prefixes(self.pieces)

    @cached_property
    def _ranks(self) -> dict[Pair, int]:
        return {pair: rank for rank, pair in enumerate(self.merges or ())}

    def cut(self, word: str, steps: int | None = None) -> list[str]:
        """The pieces of one word: of all ways to write it the most probable one, of at most `steps` pieces.

        That is a shortest path through the places between letters, found in one pass or, with a limit, in as many
        rounds as it has steps (Bellman and Ford). With `merges` pairs are joined instead, and `steps` is None.

        Raises ValueError when `steps` is below 1 or allows no path.
        """
        if self.merges is not None:
            if steps is not None:
                raise ValueError(f"steps must be None for a vocabulary of merges, got {steps!r}")
            return joined(word, self._ranks)
        if steps is None:
            return shortest(word, self._costs, self._begins, -self.log_byte)
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be None or an integer >= 1, got {steps!r}")
        return shortest_within(word, self._costs, -self.log_byte, steps)

    def encode(self, text: str, steps: int | None = None) -> list[int]:
        """Ids of a text; `steps` as for `cut`, in every word."""
        found = words(text)
        ids = {
            word: [i for part in self.cut(word, steps) for i in self._numbers(part)] for word in set(found)
        }
        return [i for word in found for i in ids[word]]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Raises ValueError for ids beyond the vocabulary and bytes that make no characters."""
        known, parts = len(self.pieces), []
        for i in ids:
            if not 0 <= i < known + 256:
                raise ValueError(f"ids must lie in 0..{known + 255}, got {i}")
            parts.append(utf8(self.pieces[i]) if i < known else bytes([i - known]))
        return b"".join(parts).decode("utf-8", "surrogatepass")

    def log_likelihood(self, text: str, steps: int | None = None) -> float:
        """Natural log of the probability of a text's pieces, as `encode` cuts it."""
        known = len(self.pieces)
        return math.fsum(self.log_probs[i] if i < known else self.log_byte for i in self.encode(text, steps))

    def _numbers(self, piece: str) -> Iterable[int]:
        if piece in self.ids:
            return (self.ids[piece],)
        return (len(self.pieces) + byte for byte in utf8(piece))


def learn_bpe(text: str, size: int) -> SubwordModel:
    """Byte-pair encoding on characters (Sennrich et al., 2015, arXiv 1508.07909): the most frequent pair is joined.

    Args: as for `learn_swe`.
    """
    times, pieces = _start(text, size)
    cuts = {word: list(word) for word in times}
    merges = join_best(cuts, times, pieces, size, frequency)
    return _model(pieces, tuple(merges))


def learn_swe(text: str, size: int, rounds: int = 4) -> SubwordModel:
    """Sub-word encoding for the largest likelihood (Li, 2024, arXiv 2410.18441), from where BPE starts.

    Characters are joined in pairs as in BPE, the next pair always that whose piece raises the likelihood of the
    text most; more pieces than wanted are made. Words are then cut anew along their shortest path, and
    probabilities counted anew, until the likelihood no longer rises; and the pieces whose loss costs least are
    dropped until `size` are left. This is repeated from what was found, `rounds` times or until it gains nothing.

    The cuts are optimal for the probabilities (`SubwordModel.cut`), and so are these for the cuts. The vocabulary
    is as good as these moves make it: a best one of its size is not known to be found in reasonable time.

    Differs from the paper, which presents the whole as a shortest path of k steps: here the path is taken for given
    pieces, and between its runs pieces are added and dropped.

    Args:
        text: to learn from. size: pieces in the vocabulary, the text's characters included; fewer are made where no
            more can be. rounds: >= 1.

    Raises ValueError when `size` is below the number of characters in the text.
    """
    if not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be an integer >= 1, got {rounds!r}")
    times, pieces = _start(text, size)
    cuts = {word: list(word) for word in times}
    best, found = -math.inf, pieces
    for _ in range(rounds):
        join_best(cuts, times, pieces, size + math.ceil(SPARE * size), rise)
        pieces = _settle(cuts, times, pieces)
        while len(pieces) > size:
            pieces = _drop(cuts, times, pieces, size)
        pieces = _settle(cuts, times, pieces)
        if not likelihood(pieces) > best:
            break
        best, found = likelihood(pieces), pieces.copy()
    return _model(found)


def refit(model: SubwordModel, text: str) -> SubwordModel:
    """The same pieces with the probabilities that suit a text best, cut along shortest paths.

    What a vocabulary is worth without the encoding that came with it. All characters of `text` must be pieces.
    """
    times = Counter(words(text))
    strange = sorted(set(text) - set(model.pieces))
    if strange:
        raise ValueError(f"text must be made of the model's characters, got {strange[0]!r} as well")
    cuts = {word: model.cut(word) for word in times}
    return _model(_settle(cuts, times, _counted(cuts, times, model.pieces)))


def _start(text: str, size: int) -> tuple[Counter[str], Counter[str]]:
    """How often each word occurs, and each character."""
    times = Counter(words(text))
    pieces: Counter[str] = Counter()
    for word, count in sorted(times.items()):
        for letter in word:
            pieces[letter] += count
    if not isinstance(size, int) or size < len(pieces):
        raise ValueError(
            f"size must be an integer >= {len(pieces)}, the characters of the text, got {size!r}"
        )
    return times, pieces


def _model(pieces: Counter[str], merges: tuple[Pair, ...] | None = None) -> SubwordModel:
    counts = {piece: max(count, UNSEEN) for piece, count in sorted(pieces.items())}
    total = math.fsum(counts.values()) + UNSEEN
    logs = tuple(math.log(count / total) for count in counts.values())
    return SubwordModel(tuple(counts), logs, math.log(UNSEEN / 256 / total), merges)


def _settle(cuts: Cuts, times: Counter[str], pieces: Counter[str]) -> Counter[str]:
    """Cut words along shortest paths and count anew until the likelihood no longer rises; changes cuts."""
    best = -math.inf
    while True:
        costs, begins = _prices(pieces), prefixes(pieces)
        new = {word: shortest(word, costs, begins) for word in cuts}
        counts = _counted(new, times, pieces)
        if not likelihood(counts) > best * (1 - TINY):  # both are below 0
            return pieces
        best, pieces = likelihood(counts), counts
        cuts.update(new)


def _drop(cuts: Cuts, times: Counter[str], pieces: Counter[str], size: int) -> Counter[str]:
    """Do without half of the pieces that are too many, those whose loss costs least; changes cuts."""
    costs, begins, total = _prices(pieces), prefixes(pieces), sum(pieces.values())
    losses = []
    for piece, count in pieces.items():
        if len(piece) > 1:
            own = costs.pop(piece)
            parts = Counter(shortest(piece, costs, begins))
            costs[piece] = own
            change = Counter({part: many * count for part, many in parts.items()})
            change[piece] -= count
            losses.append((-gained(change, pieces, total), piece))
    gone = {piece for _, piece in sorted(losses)[: math.ceil((len(pieces) - size) / 2)]}
    left = {piece: cost for piece, cost in costs.items() if piece not in gone}
    cuts.update({w: shortest(w, left, begins) for w, parts in cuts.items() if not gone.isdisjoint(parts)})
    return _counted(cuts, times, left)


def _counted(cuts: Cuts, times: Counter[str], pieces: Iterable[str]) -> Counter[str]:
    """How often each piece is used."""
    counts = Counter(dict.fromkeys(pieces, 0))
    for word, parts in cuts.items():
        for part in parts:
            counts[part] += times[word]
    return counts


def _prices(pieces: Counter[str]) -> dict[str, float]:
    total = math.log(sum(pieces.values()) or 1)
    return {piece: total - math.log(max(count, UNSEEN)) for piece, count in pieces.items()}
