"""Words that exact attention moves between a cache and slow memory: closed forms, and what none can go below.

The model is the red-blue pebble game of Hong and Kung (1981): arithmetic happens in a cache of M words, every word
read into it or written out of it costs one, nothing else costs anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt, sqrt

ALGORITHMS = ("standard", "flash1", "flash2", "square")


@dataclass(frozen=True)
class IOCost:
    """Words that an algorithm moves for one head of attention.

    Attributes:
        algorithm: one of ALGORITHMS. reads, writes: words from and to slow memory.
        tile: (queries, keys) of a tile. working_set: the most words in the cache at any time.
        lower_bound: words that no algorithm with this cache avoids, see `lower_bound`.
    """

    algorithm: str
    reads: int
    writes: int
    tile: tuple[int, int]
    working_set: int
    lower_bound: float

    @property
    def total(self) -> int:
        """Words moved."""
        return self.reads + self.writes

    @property
    def ratio(self) -> float:
        """Words moved over the lower bound, at least 1."""
        return self.total / self.lower_bound


def io_cost(
    n: int, d: int, cache: int, algorithm: str = "flash2", n_k: int | None = None,
    tile: tuple[int, int] | None = None,
) -> IOCost:  # fmt: skip
    """Exact counts for softmax(q k^T) v with `n` queries, `n_k` keys (n if not given) and heads of `d`.

    Args:
        cache: M, its size in words (numbers, not bytes).
        algorithm:
            "standard": scores and weights written out, products in square tiles, softmax row by row.
            "flash1": FlashAttention (Dao et al., 2022): outer loop over keys, outputs and row statistics read and
                written for each tile; its initial outputs are written too.
            "flash2": FlashAttention-2 (Dao, 2023): outer loop over queries, outputs and log-sum-exps written once.
            "square": SquareTilingAttention (Saha and Ye, 2024, arXiv 2402.07443, algorithm 1): products in
                square tiles of side sqrt(M / 4), exponentials written once; for caches below d^2.
        tile: (queries, keys) per tile of the flash algorithms; by default `flash_tile`.

    The paper's theorem 3.1: the best is Theta(min(N^2 d / sqrt(M), N^2 d^2 / M)); FlashAttention reaches it for
    M >= d^2 and square tiles below. Raises ValueError for sizes below 1, an unknown algorithm, or a cache too small
    for one tile.
    """
    n_k = n if n_k is None else n_k
    _check(n, n_k, d, cache)
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if algorithm in ("standard", "square"):
        if tile is not None:
            raise ValueError(f"tile is for flash1 and flash2; {algorithm} takes the largest square ones")
        side = square_side(cache)
        tile = min(side, n), min(side, n_k)
    elif tile is None:
        tile = flash_tile(n, n_k, d, cache, algorithm)
    elif len(tile) != 2 or min(tile) < 1:
        raise ValueError(f"tile must be (queries, keys), each >= 1, got {tile!r}")
    height, width = min(tile[0], n), min(tile[1], n_k)
    if algorithm.startswith("flash"):
        needs = working_set(height, width, d)
    else:
        needs = (
            height * width + (height + width) * min(square_side(cache), d) + height * (algorithm == "square")
        )
        needs = max(needs, min(n_k + 1, cache) * (algorithm == "standard"))
    if needs > cache:
        raise ValueError(f"tile {tile} of {algorithm} needs {needs} words of cache, there are {cache}")
    reads, writes = _COUNTS[algorithm](n, n_k, d, cache, (height, width))
    return IOCost(algorithm, reads, writes, tile, needs, lower_bound(n, n_k, d, cache))


def working_set(height: int, width: int, d: int) -> int:
    """Words that a tile of a flash algorithm holds: q and out, k and v, scores, three numbers for each query."""
    return 2 * d * (height + width) + height * width + 3 * height


def flash_tile(n: int, n_k: int, d: int, cache: int, algorithm: str = "flash2") -> tuple[int, int]:
    """The largest tile that fits, in the shape of FlashAttention's rule: (queries, keys).

    The side of the outer loop as long as possible, the other as long but at most d (Dao et al., 2022: key tiles
    of ceil(M / 4d), query tiles no higher than d). Their formula is meant up to a constant: taken literally it
    needs up to 1.25 M words. Raises ValueError when not even one query and one key fit.
    """
    outer, inner = (n_k, n) if algorithm == "flash1" else (n, n_k)

    def shape(size: int) -> tuple[int, int]:
        pair = size, min(size, d, inner)
        return pair[::-1] if algorithm == "flash1" else pair

    if working_set(1, 1, d) > cache:
        raise ValueError(
            f"{algorithm} needs {working_set(1, 1, d)} words of cache for heads of {d}, there are {cache};"
            " 'square' runs in 4"
        )
    low, high = 1, outer
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if working_set(*shape(middle), d) <= cache else (low, middle - 1)
    return shape(low)


def square_side(cache: int) -> int:
    """Side of the square tiles of the paper's algorithm 1, floor(sqrt(M / 4))."""
    return isqrt(cache // 4)


def curve(n: int, n_k: int, d: int, cache: int) -> float:
    """Theorem 3.1 of the paper without its constant: min(N^2 d / sqrt(M), N^2 d^2 / M)."""
    _check(n, n_k, d, cache)
    return n * n_k * d * min(1 / sqrt(cache), d / cache)


def lower_bound(n: int, n_k: int, d: int, cache: int) -> float:
    """Words that every algorithm moves which forms q k^T by ordinary multiplication: the largest of three bounds.

    - 2 d (N_q + N_k): each input is read and each output written.
    - N_q N_k / (M / d^2 + 4) - M, from the proof of the paper's lemma 3.3 with its constants kept: a part of a
      2M-partition meets at most 4M score sums that it does not hold whole, and holds whole at most (M / d)^2
      others, whose inputs, d for each row and column, must lie in its dominator of 2M (the paper has
      4 (M / d)^2; here I J <= ((I + J) / 2)^2). Hong and Kung: I/O >= M (parts - 1).
    - 2 N_q N_k d / sqrt(M) - 2 M - N_q N_k, the paper's theorem 3.7: attention that writes each score once more
      is a matrix product; Smith, Lowery, Langou and van de Geijn (2019, arXiv 1702.02017) have its constant.
    """
    _check(n, n_k, d, cache)
    scores = n * n_k
    whole = scores / (cache / d**2 + 4) - cache
    product = 2 * scores * d / sqrt(cache) - 2 * cache - scores
    return max(2.0 * d * (n + n_k), whole, product)


def tiles(n: int, size: int) -> int:
    """How many tiles of `size` cover `n`."""
    return -(-n // size)


def _square(n: int, n_k: int, d: int, cache: int, tile: tuple[int, int]) -> tuple[int, int]:
    side = square_side(cache)
    scores = d * (
        n * tiles(n_k, side) + n_k * tiles(n, side)
    )  # a tile of scores reads d words per row and column
    outputs = n + tiles(d, side) * n * n_k + tiles(n, side) * n_k * d
    return scores + outputs, n * n_k + n + n * d


def _standard(n: int, n_k: int, d: int, cache: int, tile: tuple[int, int]) -> tuple[int, int]:
    reads, writes = _square(n, n_k, d, cache, tile)  # the same products, without the row sums
    passes = 1 if n_k + 1 <= cache else 2  # a row that does not fit is read for its sum, and again
    return reads - n + passes * n * n_k, writes - n + n * n_k


def _flash1(n: int, n_k: int, d: int, cache: int, tile: tuple[int, int]) -> tuple[int, int]:
    rounds = tiles(n_k, tile[1])
    return 2 * n_k * d + rounds * n * (2 * d + 2), (rounds + 1) * n * (d + 2)


def _flash2(n: int, n_k: int, d: int, cache: int, tile: tuple[int, int]) -> tuple[int, int]:
    return n * d + tiles(n, tile[0]) * 2 * n_k * d, n * d + n


_COUNTS: dict[str, Callable[[int, int, int, int, tuple[int, int]], tuple[int, int]]] = {
    "standard": _standard,
    "flash1": _flash1,
    "flash2": _flash2,
    "square": _square,
}


def _check(n: int, n_k: int, d: int, cache: int) -> None:
    for name, value, least in (("n", n, 1), ("n_k", n_k, 1), ("d", d, 1), ("cache", cache, 4)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
