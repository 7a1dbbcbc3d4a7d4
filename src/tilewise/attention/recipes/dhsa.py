"""DHSA: keys cut into chunks where their use changes, and a budget filled with the best of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from tilewise.attention.gates.boundary import BoundaryPredictor
from tilewise.attention.gates.sizes import check_sizes, positive
from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.scores import grouped
from tilewise.tiles import NONE, TileMap, Tiling, Visibility
from tilewise.tiles.visibility import FAR, HIDDEN, to_heads

Norm = Literal["sqrt", "mean", "sum"]


@dataclass(frozen=True)
class DHSA(Method):
    """Dynamic hierarchical sparse attention (Xiong et al., 2025, arXiv 2510.24606).

    A trained `BoundaryPredictor` cuts the keys of a prompt into chunks of uneven length. A chunk is known by the
    sum of its keys over the square root of their number: a mean would favour short chunks, whose means stray far by
    chance, a sum long ones. Its product with the mean of a block of queries is the score of every token of the
    chunk, and the block reads the `budget` best tokens; its own, the last `local` before them and the first are
    among them. Scores are averaged over heads, so that all heads read the same tokens.

    Differs from the paper: tokens are read in pieces of chunks of up to `grain` tokens, and a budget is filled to
    the last piece that fits it, early pieces first where scores are alike; a boundary is the best within `gap` of
    itself, in place of suppression one by one; chunks longer than `longest` are cut evenly. Decoding is dense, as
    in the authors' release. Any mask works; padding has no part in a chunk's key.

    Args:
        predictor: of the layer; None cuts all chunks to `length`, the control.
        budget: tokens that a block of queries reads, as far as it sees so many. length: mean length of a chunk: of
            the boundaries the N / length best are taken. gap: least length of a chunk. longest: None is 4 `length`.
        grain: tokens that are read together. block: queries that choose together. local: tokens before a block's
        first query that are always read.
        norm: "sqrt" of the length, "mean" or "sum" for comparison. shared: all heads read alike; False lets each
            query head choose for itself, among the same chunks.

    Raises ValueError for other settings, and when the layer's sizes are not the predictor's.
    """

    predictor: BoundaryPredictor | None
    budget: int = 1024
    length: int = 32
    gap: int = 8
    longest: int | None = None
    grain: int = 8
    block: int = 64
    local: int = 64
    norm: Norm = "sqrt"
    shared: bool = True
    modes = ("train", "prefill", "chunked prefill")
    reads = "q, k, trained weights"
    needs = "trained boundaries"

    def __post_init__(self) -> None:
        longest = 4 * self.length if self.longest is None else self.longest
        sizes = {name: getattr(self, name) for name in ("budget", "length", "gap", "grain", "block")}
        positive(**sizes, longest=longest)
        if not isinstance(self.local, int) or self.local < 0:
            raise ValueError(f"local must be an integer >= 0, got {self.local!r}")
        if self.gap > self.length or longest < self.length:
            raise ValueError(
                f"gap, length and longest must not fall, got {self.gap}, {self.length} and {longest}"
            )
        if self.norm not in ("sqrt", "mean", "sum"):
            raise ValueError(f"norm must be 'sqrt', 'mean' or 'sum', got {self.norm!r}")
        if self.predictor is not None and not isinstance(self.predictor, BoundaryPredictor):
            raise TypeError(
                f"predictor must be a BoundaryPredictor or None, got {type(self.predictor).__name__}"
            )

    @property
    def lookahead(self) -> str:
        return "prompt"

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        n = k.shape[2]
        if not q.shape[2] or not n:
            return Plan((Pass(view),), view)
        bounds = self.chunks(q, k, view)
        finer = pieces(bounds, n, self.grain, equal=False)
        longest = self.length if self.predictor is None else self.longest or 4 * self.length
        rows, chunks, parts = Tiling(self.block), Tiling(longest, bounds), Tiling(self.grain, finer)
        parent = parents(bounds, finer)
        scores = self.scores(q, k, view, rows, chunks)
        scores = scores.mean(1, keepdim=True) if self.shared else scores
        visible = to_heads(view.tiles(rows, parts), q.shape[1]) != NONE
        near = self._near(view, rows, parts)
        if self.shared:
            visible, near = visible.any(1, keepdim=True), near.any(1, keepdim=True)
        index = parent.unsqueeze(2).expand(*scores.shape[:3], -1)
        upsampled = scores.gather(3, index)
        visible, near = (to_heads(x, upsampled.shape[1]) for x in (visible, near))
        keep = fill(upsampled, visible, near & visible, parts.sizes(n, k.device).unsqueeze(2), self.budget)
        return Plan((Pass(view, TileMap(keep, rows, parts)),), view)

    def chunks(self, q: Tensor, k: Tensor, view: Visibility) -> Tensor:
        """Where the keys are cut, alike for all heads: int64 `[B|1, 1, C + 1]`; chunks at the end may be empty."""
        n = k.shape[2]
        if self.predictor is None:
            ends = torch.arange(0, n + self.length, self.length, device=k.device).clamp(max=n)
            return ends.view(1, 1, -1)
        check_sizes(self.predictor, q, k)
        with torch.no_grad():
            logits = self.predictor(self.predictor.features(k, view))
        found = cut(logits, n, self.length, self.gap).unsqueeze(1)
        return pieces(found, n, self.longest or 4 * self.length, equal=True)

    def scores(self, q: Tensor, k: Tensor, view: Visibility, rows: Tiling, columns: Tiling) -> Tensor:
        """Product of a block's mean query and each chunk's key, at least float32 `[B, H_q, T_q, C]`."""
        keys, counts = columns.mean(k, view.keys_seen())
        counts = counts.to(keys.dtype).unsqueeze(-1)
        power = {"sqrt": 0.5, "mean": 0.0, "sum": 1.0}[self.norm]
        return grouped(rows.mean(q)[0].to(keys.dtype), keys * counts**power)

    def _near(self, view: Visibility, rows: Tiling, columns: Tiling) -> Tensor:
        """Pieces with a block's own or last tokens, and the first that it sees: bool `[B|1, H|1, T_q, P]`."""
        first = rows.split(view.q_pos, FAR).amin(3).unsqueeze(3) - self.local
        last = rows.split(view.q_pos, -FAR).amax(3).unsqueeze(3)
        pos = to_heads(view.k_pos, view.q_pos.shape[1])
        starts = columns.split(pos.masked_fill(pos == HIDDEN, FAR), FAR).amin(3).unsqueeze(2)
        ends = columns.split(pos, HIDDEN).amax(3).unsqueeze(2)
        near = (starts <= last) & (ends >= first)
        seen = view.tiles(rows, columns) != NONE
        heads = max(near.shape[1], seen.shape[1])
        near, seen, starts = (to_heads(x, heads) for x in (near, seen, starts))
        reached = torch.where(seen, starts, FAR)
        return near | (seen & (reached == reached.amin(-1, keepdim=True)))


def cut(logits: Tensor, n: int, length: int, gap: int) -> Tensor:
    """Bounds int64 `[B, C + 1]` of `n` tokens, rising from 0 to n; equal ones at the end are chunks without tokens.

    A chunk ends after token i where `logits [B, n - 1]` are the largest within `gap` of i, and no nearer than `gap`
    to either end; of these the n / length largest.
    """
    b, device = logits.shape[0], logits.device
    if n < 2:
        return torch.tensor([[0, n]], device=device).expand(b, -1)
    ends = torch.arange(1, n, device=device)
    logits = logits.masked_fill((ends < gap) | (ends > n - gap), -torch.inf)
    best = pad(logits, (gap - 1, gap - 1), value=-torch.inf).unfold(-1, 2 * gap - 1, 1).amax(-1)
    peaks = logits.masked_fill(logits < best, -torch.inf)
    top = peaks.topk(min(n - 1, max(1, n // length - 1)), -1)
    found = (top.indices + 1).masked_fill(top.values == -torch.inf, n).sort(-1).values
    return torch.cat([torch.zeros_like(found[:, :1]), found, torch.full_like(found[:, :1], n)], -1)


def pieces(bounds: Tensor, n: int, most: int, equal: bool) -> Tensor:
    """Chunks of more than `most` tokens cut further: bounds `[b, 1, P + 1]`, a superset of `bounds [b, 1, C + 1]`.

    Into the fewest parts, all of a length (`equal`), or all of `most` tokens but the last. `n` >= 1 tokens.
    """
    at = torch.arange(n, device=bounds.device).expand(*bounds.shape[:2], n).contiguous()
    own = torch.searchsorted(bounds[..., 1:].contiguous(), at, right=True)
    start, end = bounds.gather(-1, own), bounds.gather(-1, own + 1)
    place, size = at - start, end - start
    first = place % most == 0
    if equal:  # part p of P begins at p size / P
        parts = -(-size // most)
        first = -(-place * parts // size) * size // parts == place
    starts = torch.where(first, at, n).sort(-1).values
    if (
        torch.compiler.is_compiling()
    ):  # how many there are is not known inside a graph: as many as there may be
        count = min(n, bounds.shape[-1] - 1 + n // most)
    else:
        count = int(first.sum(-1).max())
    return torch.cat([starts[..., :count], torch.full_like(starts[..., :1], n)], -1)


def parents(bounds: Tensor, finer: Tensor) -> Tensor:
    """The chunk of `bounds [b, 1, C + 1]` that each piece of `finer [b, 1, P + 1]` is of: int64 `[b, 1, P]`.

    Pieces without tokens are of the last.
    """
    found = torch.searchsorted(bounds.contiguous(), finer[..., :-1].contiguous(), right=True) - 1
    return found.clamp(max=bounds.shape[-1] - 2)


def fill(scores: Tensor, among: Tensor, forced: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """The best pieces of each row that `budget` tokens hold, forced ones first and all of them: bool as `scores`.

    `sizes` int64, broadcast to scores `[B, H, T_q, P]`. Filling stops at the first piece that does not fit.
    """
    among, forced = among.expand_as(scores), forced.expand_as(scores)
    ranked = scores.masked_fill(~among, -torch.inf).masked_fill(forced, torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    held = sizes.expand_as(scores).masked_fill(~among, 0).gather(-1, order).cumsum(-1)
    fits = torch.zeros_like(among).scatter(-1, order, held <= budget)
    return fits & among | forced
