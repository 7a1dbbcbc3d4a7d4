"""Which rank holds which tokens, and which parts of a sequence see one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tilewise.tiles import NONE, Mask, Padding, Tiling, TokenMask
from tilewise.tiles.masks import Both

LAYOUTS = ("contiguous", "zigzag")


def rank_positions(n: int, rank: int, ranks: int, layout: str = "contiguous") -> Tensor:
    """The tokens of a sequence of `n` that one rank holds, int64 `[n_rank]`, in the order in which it holds them.

    Args:
        n: tokens of the whole sequence, >= 0; it need not be a multiple of anything.
        rank, ranks: which rank, 0..ranks-1, and how many there are.
        layout: "contiguous": one piece each, in order. "zigzag": the sequence is cut in 2 ranks pieces, and rank r
            holds piece r and piece 2 ranks - 1 - r, so that under a causal mask all have as much to do. Pieces
            differ by one token at most; of fewer tokens than pieces, some ranks hold none.
    """
    if not isinstance(n, int) or n < 0:
        raise ValueError(f"n must be an integer >= 0, got {n!r}")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank must be in 0..{ranks - 1}, got {rank!r}")
    spread = Spread.even(n, ranks, layout)
    return spread.positions(spread.owned[rank], "cpu")


@dataclass(frozen=True)
class Spread:
    """A sequence cut in segments, each held by one rank.

    Attributes:
        bounds: where segments start, and the end of the last; they may be empty.
        owned: for each rank its segments, ascending. It holds their tokens one after the other.
    """

    bounds: tuple[int, ...]
    owned: tuple[tuple[int, ...], ...]

    @classmethod
    def even(cls, n: int, ranks: int, layout: str) -> Spread:
        """The layout's own cut of `n` tokens. Raises ValueError for an unknown layout."""
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
        pieces = ranks if layout == "contiguous" else 2 * ranks
        sizes = [n // pieces + (piece < n % pieces) for piece in range(pieces)]
        owned = [(r,) if layout == "contiguous" else (r, pieces - 1 - r) for r in range(ranks)]
        return cls((0, *accumulate(sizes)), tuple(owned))

    @classmethod
    def of(cls, lengths: Sequence[int], layout: str, name: str) -> Spread:
        """The cut in which rank r holds `lengths[r]` tokens.

        A contiguous layout allows any lengths; for zigzag they must be those of `rank_positions`.
        """
        even = cls.even(sum(lengths), len(lengths), layout)
        if layout == "contiguous":
            return cls((0, *accumulate(lengths)), even.owned)
        want = [even.rows(segments) for segments in even.owned]
        if list(lengths) != want:
            raise ValueError(
                f"in a zigzag layout of {sum(lengths)} tokens the ranks hold {want} of {name} (see"
                f" rank_positions), got {list(lengths)}"
            )
        return even

    @property
    def total(self) -> int:
        """Tokens of the whole sequence."""
        return self.bounds[-1]

    def size(self, segment: int) -> int:
        """Tokens of one segment."""
        return self.bounds[segment + 1] - self.bounds[segment]

    def rows(self, segments: Sequence[int]) -> int:
        """Tokens of some segments."""
        return sum(self.size(segment) for segment in segments)

    def positions(self, segments: Sequence[int], device: torch.device | str) -> Tensor:
        """Where the tokens of some segments stand in the whole sequence, int64."""
        pieces = [torch.arange(self.bounds[s], self.bounds[s + 1], device=device) for s in segments]
        return torch.cat([torch.empty(0, dtype=torch.int64, device=device), *pieces])

    def span(self, held: Sequence[int], wanted: Sequence[int]) -> slice:
        """The rows of `wanted` among those of the segments `held`; they must lie side by side."""
        first = held.index(wanted[0]) if wanted else 0
        if tuple(held[first : first + len(wanted)]) != tuple(wanted):
            raise ValueError(f"segments {tuple(wanted)} are no run of {tuple(held)}")
        start = self.rows(held[:first])
        return slice(start, start + self.rows(wanted))


def visible(mask: Mask, q: Spread, k: Spread, like: Tensor) -> tuple[tuple[bool, ...], ...]:
    """Whether any query of a segment may see any key of another: `[q segment][k segment]`.

    From O(N) metadata of the whole sequence, so that every rank finds the same. True may be said of segments that
    hide all from one another (see `Visibility.tiles`), never False of others. Raises ValueError for a mask of
    other batch or heads than those of the queries `like [B, H_q, *, *]`.
    """
    view = mask.bind(q.total, k.total, device=like.device)
    for place, name in enumerate(("batch", "heads")):
        sizes = {x.shape[place] for x in (view.lo, view.pos, view.dense) if x is not None}
        if not sizes <= {1, like.shape[place]}:
            raise ValueError(f"the mask has {name} {max(sizes)}, the call has {like.shape[place]}")
    q_cut, k_cut = (Tiling.from_bounds(torch.tensor(x.bounds, device=like.device)) for x in (q, k))
    kinds = view.tiles(q_cut, k_cut) != NONE
    rows = kinds.flatten(0, 1).any(0).tolist()
    return tuple(
        tuple(bool(seen and q.size(a) and k.size(b)) for b, seen in enumerate(row))
        for a, row in enumerate(rows)
    )


def placed(mask: Mask, q_tokens: Tensor, k_tokens: Tensor, shift: int) -> Mask:
    """The mask of a whole sequence, for some of its queries and keys.

    Args:
        q_tokens, k_tokens: int64 `[n]`, which queries and which keys.
        shift: position of the first query of the sequence (queries and keys end together).
    """
    return _cut(mask, q_tokens, k_tokens).at(q_tokens + shift, k_tokens)


def _cut(mask: Mask, q_tokens: Tensor, k_tokens: Tensor) -> Mask:
    if isinstance(mask, Both):
        return Both(_cut(mask.first, q_tokens, k_tokens), _cut(mask.second, q_tokens, k_tokens))
    if isinstance(mask, Padding):
        return Padding(mask.keep[:, k_tokens.to(mask.keep.device)])
    if isinstance(mask, TokenMask):
        device = mask.seen.device
        return TokenMask(mask.seen[..., q_tokens.to(device), :][..., k_tokens.to(device)])
    return mask


@dataclass(frozen=True)
class Trip:
    """How blocks go round the ranks: every rank's block in the same direction, one rank further at every hop.

    Attributes:
        way: +1 towards the next rank, -1 towards the one before.
        stops: `[owner][hop]`: the segments of the owner's block for which there is work where the block then is.
    """

    way: int
    stops: tuple[tuple[tuple[int, ...], ...], ...]

    @classmethod
    def of(cls, way: int, moving: Spread, waiting: Spread, meets: Callable[[int, int], bool]) -> Trip:
        """The trip of `moving` past `waiting`; `meets(a, b)` says whether their segments have to do together."""
        ranks = len(moving.owned)
        return cls(
            way,
            tuple(
                tuple(
                    tuple(
                        a for a in own if any(meets(a, b) for b in waiting.owned[(rank + way * hop) % ranks])
                    )
                    for hop in range(ranks)
                )
                for rank, own in enumerate(moving.owned)
            ),
        )

    def needed(self, owner: int, hop: int) -> tuple[int, ...]:
        """The segments of `owner` for which there is work at this hop or a later one."""
        left = {segment for stop in self.stops[owner][hop:] for segment in stop}
        return tuple(sorted(left))
