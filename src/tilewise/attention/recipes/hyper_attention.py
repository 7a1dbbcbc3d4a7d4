"""HyperAttention: heavy entries found by sorted hashes, the rest by a sample; causal attention by halves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.sampling import WORD, Sampled
from tilewise.attention.stages import Arrangement, Chosen, Layout
from tilewise.tiles import NONE, TileMap, Tiling, Visibility
from tilewise.tiles.visibility import to_heads


@dataclass(frozen=True)
class AngularHashes:
    """Signs of products with random directions, as one number: tokens that point alike get numbers close by.

    Bits are read as a Gray code, so that neighbouring numbers differ in one sign: sorted by it, buckets that differ
    little stand side by side (the paper's Hamming sorted hashes).

    Args:
        directions: signs taken, 1..30. seed: which directions.
    """

    directions: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.directions, int) or not 1 <= self.directions <= 30:
            raise ValueError(f"directions must be an integer in 1..30, got {self.directions!r}")
        Sampled(1, self.seed)

    def hash(self, x: Tensor) -> Tensor:
        """`[B, H, N, D]` to int64 `[B, H, N]` in 0..2^directions - 1; the directions are the same for all heads."""
        wide = torch.promote_types(x.dtype, torch.float32)
        drawn = Sampled(1, self.seed).noise(self.directions, x.shape[3], x.device)[0]
        drawn = torch.special.ndtri((drawn.double() + 0.5) / (WORD + 1)).mT.to(
            wide
        )  # normal, [D, directions]
        bits = (x.to(wide) @ drawn > 0).long() << torch.arange(self.directions, device=x.device)
        number = bits.sum(-1)
        for shift in (1, 2, 4, 8, 16):  # from a Gray code to its place
            number = number ^ (number >> shift)
        return number

    def order(self, x: Tensor, segment: int, seen: Tensor | None = None) -> Tensor:
        """Tokens sorted by their hash within every `segment` of them, int64 `[B, H, N]`; unseen ones come last."""
        number = self.hash(x)
        if seen is not None:
            number = number.masked_fill(~to_heads(seen, x.shape[1]), 1 << self.directions)
        place = torch.arange(x.shape[2], device=x.device) // segment
        return (place * (2 << self.directions) + number).argsort(dim=-1, stable=True)


@dataclass(frozen=True)
class HyperAttention(Method):
    """HyperAttention (Han et al., 2023, arXiv 2310.05869): near-linear attention from heavy entries and a sample.

    Queries and keys are sorted by angular hashes, and the blocks on the diagonal of the sorted matrix are computed
    exactly: that is where large entries lie. The rest of a row is estimated from `samples` keys, the same for all
    queries of a head, weighed by what they stand for; keys in a row's own block are not counted twice. Causal
    attention is done by halves: the second half of the queries sees all of the first half of the keys, which is
    attention without a mask, and both halves are causal attention again, down to segments of `least` tokens, which
    are computed exactly. Segments are counted from the start, so `least` tokens are the smallest, and all quarters
    of one size are two passes. Trains: hashes and draws have no gradient.

    Differs from the paper: keys are drawn without replacement, evenly, as in the authors' code and not by the norms
    of their values; blocks of a last, shorter half are matched by their place in it; hashes of keys are taken once
    per kv head. Which tiles are read is held as a map of (N / block)^2 entries a level: memory is not linear.

    Has no name: what is drawn carries weights. Any mask holds, but the halves suit causal ones: with `causal`, keys
    behind the last of a query's own segment are not read, whatever the mask shows.

    Args:
        block: tokens of a block. samples: keys drawn, for each quarter of causal attention anew.
        directions, seed: of the hashes; the seed is also that of the draws.
        least: sequences up to this length, and segments of it, are computed exactly; a multiple of `block`.
        causal: do it by halves. Raises ValueError then unless there are as many queries as keys.
    """

    block: int = 256
    samples: int = 256
    directions: int = 7
    least: int = 4096
    causal: bool = False
    seed: int = 0
    modes = ("train", "prefill")
    reads = "q, k"

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"block must be an integer >= 1, got {self.block!r}")
        if not isinstance(self.least, int) or self.least < 1 or self.least % self.block:
            raise ValueError(f"least must be a multiple of block {self.block}, got {self.least!r}")
        if not isinstance(self.causal, bool):
            raise ValueError(f"causal must be True or False, got {self.causal!r}")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"samples must be an integer >= 1, got {self.samples!r}")
        self.hashes()
        Sampled(self.samples, self.seed)

    @property
    def lookahead(self) -> str:
        """Which block a query gets depends on the hashes of those it is sorted with."""
        return "prompt"

    def hashes(self) -> AngularHashes:
        return AngularHashes(self.directions, self.seed)

    def sizes(self, n: int) -> list[int]:
        """The halves of each level, smallest first, for so many keys."""
        sizes, size = [], self.least
        while size < n:
            sizes.append(size)
            size *= 2
        return sizes

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        n_q, n_k = q.shape[2], k.shape[2]
        if self.causal and n_q != n_k:
            raise ValueError(f"causal attention by halves needs as many queries as keys, got {n_q} and {n_k}")
        if n_k <= self.least or not n_q:
            return Plan((Pass(view),), view)
        if not self.causal:
            return Plan(self._level(q, k, view, scale, None), view)
        tiles = Tiling(self.block)
        own = torch.arange(tiles.count(n_k), device=q.device) * self.block // self.least
        exact = Pass(view, TileMap((own.unsqueeze(1) == own)[None, None], tiles, tiles))
        passes = [part for size in self.sizes(n_k) for part in self._level(q, k, view, scale, size)]
        return Plan((exact, *passes), view)

    def _level(
        self, q: Tensor, k: Tensor, view: Visibility, scale: float, size: int | None
    ) -> tuple[Pass, ...]:
        """Queries of every second segment of `size` tokens over the keys of the one before; None: all over all."""
        n_q, n_k, hashes, tiles = q.shape[2], k.shape[2], self.hashes(), Tiling(self.block)
        every = max(n_q, n_k) if size is None else size
        q_order, k_order = hashes.order(q, every), hashes.order(k, every, view.keys_seen())
        layout = Layout.arranged(Arrangement(tiles, tiles, q_order, k_order), q, k, view, scale)
        rows, columns = (torch.arange(tiles.count(n), device=q.device) for n in (n_q, n_k))
        if size is None:
            met = torch.ones(len(rows), len(columns), dtype=torch.bool, device=q.device)
            match = rows * len(columns) // max(1, len(rows))
        else:
            each = size // self.block  # tiles of a segment
            segment = rows // each
            met = (segment % 2 == 1).unsqueeze(1) & (columns // each == segment.unsqueeze(1) - 1)
            there = (len(rows) - segment * each).clamp(max=each)  # the last may be shorter
            match = (segment - 1) * each + rows % each * each // there
        visible = (layout.kinds() != NONE) & met
        keep = visible & (columns == match.unsqueeze(1))
        chosen = Chosen(layout.q.new_zeros(()), keep, visible & ~keep)
        rest = Sampled(self.samples, self.seed, size)
        return (Pass(view, TileMap(keep, tiles, tiles), q_order, k_order), *rest.passes(layout, chosen))
