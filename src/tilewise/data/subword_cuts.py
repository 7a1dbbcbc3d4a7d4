"""Ways to cut a text into words and a word into pieces: the cheapest, of no more than so many, and as BPE does."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping

Pair = tuple[str, str]
WORDS = re.compile(r"\S+ ?|\s")


def words(text: str) -> list[str]:
    """A text's words, each with the space behind it as its end-of-word sign; other white space stands alone."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    return WORDS.findall(text)


def prefixes(pieces: Iterable[str]) -> set[str]:
    """All beginnings of all pieces, themselves included."""
    return {piece[:end] for piece in pieces for end in range(1, len(piece) + 1)}


def shortest(
    word: str, costs: Mapping[str, float], begins: Collection[str], byte: float = math.inf
) -> list[str]:
    """The cheapest way to write a word in pieces; a character that is none costs `byte` times its UTF-8 bytes.

    A shortest path through the places between letters; as steps only lead forward, one pass suffices.

    Args:
        begins: at least the `prefixes` of the pieces, so that no longer pieces are looked for in vain.
    """
    best, back = [0.0] + [math.inf] * len(word), [0] * (len(word) + 1)
    for start, letter in enumerate(word):
        for end in range(start + 1, len(word) + 1):
            piece = word[start:end]
            if piece not in begins:
                break
            cost = best[start] + costs.get(piece, math.inf)
            if cost < best[end]:
                best[end], back[end] = cost, start
        if letter not in costs:
            best[start + 1], back[start + 1] = best[start] + byte * len(utf8(letter)), start
    parts, end = [], len(word)
    while end:
        parts.append(word[back[end] : end])
        end = back[end]
    return parts[::-1]


def shortest_within(word: str, costs: Mapping[str, float], byte: float, steps: int) -> list[str]:
    """The cheapest way in at most `steps` pieces (Bellman and Ford): each round allows one piece more.

    Raises ValueError when there is none.
    """
    known = {letter: byte * len(utf8(letter)) for letter in word if letter not in costs}
    edges = [
        (start, end, cost)
        for end in range(1, len(word) + 1)
        for start in range(end)
        if (cost := costs.get(word[start:end], known.get(word[start:end]))) is not None
    ]
    best = [0.0] + [math.inf] * len(word)
    ways: list[list[int]] = [[] for _ in best]  # where the pieces end
    for _ in range(min(steps, len(word))):
        before, old = best.copy(), ways.copy()
        for start, end, cost in edges:
            if before[start] + cost < best[end]:
                best[end], ways[end] = before[start] + cost, [*old[start], end]
    if best[-1] == math.inf:
        raise ValueError(f"steps must allow a path: {word!r} cannot be cut into {steps} pieces or fewer")
    return [word[start:end] for start, end in zip([0, *ways[-1]], ways[-1])]


def joined(word: str, ranks: Mapping[Pair, int]) -> list[str]:
    """A word's letters with pairs joined, those of lowest rank first."""
    parts = list(word)
    while True:
        pair = min(zip(parts, parts[1:]), key=lambda x: ranks.get(x, math.inf), default=("", ""))
        if pair not in ranks:
            return parts
        parts = pair_joined(parts, pair)


def pair_joined(parts: list[str], pair: Pair) -> list[str]:
    """Every occurrence of a pair as one piece, from the left."""
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] = "".join(pair)
        else:
            out.append(part)
    return out


def utf8(text: str) -> bytes:
    """The bytes of a text, lone surrogates included."""
    return text.encode("utf-8", "surrogatepass")
