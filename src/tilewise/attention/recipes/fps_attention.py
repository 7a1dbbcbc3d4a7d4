"""FPSAttention: boxes of a video share an FP8 scale and are the tiles that are computed or left out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from tilewise.attention.method import Method
from tilewise.attention.orders import Boxes
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.precisions import FP8, Applied
from tilewise.kernels.attend_tiles import Call
from tilewise.tiles import TileMap, Tiling, Visibility
from tilewise.tiles.grid import Axis
from tilewise.tiles.visibility import take, to_heads

Group = Literal["tile", "token", "head", "tensor"]
GROUPS = ("tile", "token", "head", "tensor")
MOST = torch.finfo(FP8).max  # 448


@dataclass(frozen=True)
class TileFP8:
    """Precision: everything rounded to FP8 (E4M3), queries and keys with a scale for each of the pass's own tiles.

    The largest number of a tile of queries or of keys becomes 448, the largest of E4M3, so a kernel that computes
    a tile needs one scale for each side. Values have one scale per channel, weights the static scale 1/448
    relative to their row's largest. Numbers are rounded exactly and multiplied with the arithmetic there is, for
    their error.

    Gradients go straight through the rounding: they are those of the rounded queries, keys and values, handed on
    as if nothing had been rounded, so a model can be tuned under it. Weights are not rounded while gradients are
    needed.

    Args:
        group: what shares a scale: "tile", "token", "head" (all tokens of a head), or "tensor" (all heads too).
        values: whether values and weights are rounded as well.

    Raises ValueError for another group.
    """

    group: Group = "tile"
    values: bool = True

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {self.group!r}")

    def apply(self, call: Call) -> Applied:
        """`call` with rounded operands, in their own dtype."""
        call = call.gathered()
        tiles = call.tiles
        seen = call.view.keys_seen()
        q = self._round(call.q, None if tiles is None else tiles.q_tiling, call.q_order, None)
        k = self._round(call.k, None if tiles is None else tiles.k_tiling, call.k_order, seen)
        changes: dict = {"q": q, "k": k}
        if self.values and call.v.shape[2]:
            changes["v"] = straight_through(call.v, _largest(call.v, seen).amax(2, keepdim=True))
            graded = torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))
            changes |= {} if graded else {"weights": FP8}
        return Applied(replace(call, **changes), lambda partial: partial)

    def _round(self, x: Tensor, tiling: Tiling | None, order: Tensor | None, seen: Tensor | None) -> Tensor:
        n = x.shape[2]
        if not n:
            return x
        largest = _largest(x, seen).amax(3, keepdim=True)  # [b, h, n, 1]
        if self.group == "head" or (self.group == "tile" and tiling is None):
            largest = largest.amax(2, keepdim=True)
        elif self.group == "tensor":
            largest = largest.amax((1, 2), keepdim=True)
        elif self.group == "tile" and tiling is not None:
            placed = take(largest, order)
            own = to_heads(tiling.ids(n, x.device), x.shape[1]).expand(*x.shape[:2], n)
            top = take(tiling.split(placed, 0).amax(3), own)
            largest = top if order is None else take(top, order.expand(*x.shape[:2], n).argsort(-1))
        return straight_through(x, largest)


def _largest(x: Tensor, seen: Tensor | None) -> Tensor:
    """Sizes of the numbers that count, in at least float32; those of hidden and infinite tokens are 0."""
    x = x.detach()
    sizes = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).abs()
    counted = sizes.isfinite()
    if seen is not None:
        seen = seen if seen.shape[1] in (1, x.shape[1]) else seen.unflatten(1, (x.shape[1], -1)).any(2)
        counted = counted & seen.unsqueeze(3)
    return sizes.masked_fill(~counted, 0)


def straight_through(x: Tensor, largest: Tensor) -> Tensor:
    """`x` rounded to E4M3 with the scale `largest / 448`, in its own dtype; its gradient is that of the result."""
    with torch.no_grad():
        scale = (largest / MOST).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        steps = torch.where(scale > 0, x.to(scale.dtype) / scale, 0).clamp(-MOST, MOST)
        rounded = (steps.to(FP8).to(scale.dtype) * scale).to(x.dtype)
        change = torch.where(x.isfinite(), rounded - x, 0)
    return x + change


@dataclass(frozen=True)
class FPSAttention(Method):
    """FP8 and sparsity at one granularity, boxes of a video (Liu et al., 2025, arXiv 2506.04648).

    Tokens of a grid are cut into boxes. A box of queries computes the boxes of keys in a window of boxes around
    it, shifted inwards at borders as in sliding tile attention, and nothing else; and each box of queries or keys
    is rounded to FP8 with a scale of its own (see `TileFP8`). Training goes straight through the rounding. Over
    the steps of a sampler box and window change: `FPSSteps`.

    Has no name, as it has no defaults: grid, box and window belong to the tokens. Masks hold within the boxes.
    Differs from the paper: FP8 is E4M3 throughout, which the paper leaves open, computed for its error, not its
    speed; weights are not rounded in training; tokens before the grid are seen by all and see all.

    Args:
        grid: tokens along time, height and width, or along other axes. box: tokens of a box along each axis.
        window: boxes seen along each axis, at most as many as there are.
        before: tokens before the grid (text). precision: of queries, keys and values; None keeps theirs.

    Raises ValueError for settings that do not fit, and for queries or keys that are not `before` + the grid.
    """

    grid: tuple[int, ...]
    box: tuple[int, ...]
    window: tuple[int, ...]
    before: int = 0
    precision: TileFP8 | None = TileFP8()
    modes = ("train", "prefill")
    reads = "nothing"
    needs = "a grid of tokens"
    exact = False

    def __post_init__(self) -> None:
        Boxes(self.grid, self.box, self.before)
        counts = self._counts()
        fits = isinstance(self.window, tuple) and len(self.window) == len(counts)
        if not fits or any(not isinstance(w, int) or not 1 <= w <= n for w, n in zip(self.window, counts)):
            raise ValueError(f"window must be boxes along each axis, 1 to {counts}, got {self.window!r}")
        if self.precision is not None and not isinstance(self.precision, TileFP8):
            raise TypeError(f"precision must be a TileFP8 or None, got {type(self.precision).__name__}")

    def _counts(self) -> tuple[int, ...]:
        """Boxes along each axis."""
        return tuple(-(-n // min(side, n)) for n, side in zip(self.grid, self.box))

    @property
    def lookahead(self) -> str:
        """Which keys share a scale is fixed; scales are of whole boxes, and those of values of all tokens."""
        return "none" if self.precision is None else "prompt"

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        at = Boxes(self.grid, self.box, self.before).arrange(q, k, view, scale, (1, 1))
        keep = self.kept(q.device)
        texts = at.q_tiling.count(q.shape[2]) - keep.shape[0]
        keep = torch.nn.functional.pad(keep, (texts, 0, texts, 0), value=True)
        tiles = TileMap(keep.view(1, 1, *keep.shape), at.q_tiling, at.k_tiling)
        return Plan((Pass(view, tiles, at.q_order, at.k_order, precision=self.precision),), view)

    def kept(self, device: torch.device | str | None = None) -> Tensor:
        """Which boxes of keys each box of queries computes, bool `[boxes, boxes]`, in row-major order."""
        keep = torch.ones(1, 1, dtype=torch.bool, device=device)
        for count, window in zip(self._counts(), self.window):
            place = torch.arange(count, device=device)
            first, last = Axis(count, window).limits(place)
            near = (first.unsqueeze(1) <= place) & (place <= last.unsqueeze(1))
            keep = torch.kron(keep.to(torch.uint8), near.to(torch.uint8)).bool()
        return keep


class Moment(Protocol):
    """Where in a sampler a call is, such as `tilewise.models.video.Moment`."""

    step: int | None
    steps: int | None
    grid: tuple[int, int, int]


Phase = tuple[tuple[int, int, int], tuple[int, int, int]]


@dataclass(frozen=True)
class FPSSteps:
    """FPSAttention over the steps of a sampler, to be given as its `attention=`.

    The steps fall into an early, a middle and a late part. In the paper the middle is the one that bears errors
    worst: it gets small boxes (fine scales) and wide windows, the early part large boxes and narrow windows, the
    late part something between.

    Args:
        early, middle, late: (box, window) of each part. bounds: shares of the steps at which the middle and the
            late part begin. precision: as in `FPSAttention`.

    Raises ValueError for bounds that are not rising within [0, 1]; phases that do not fit the grid raise when
    called.
    """

    early: Phase
    middle: Phase
    late: Phase
    bounds: tuple[float, float] = (0.2, 0.8)
    precision: TileFP8 | None = TileFP8()

    def __post_init__(self) -> None:
        first, second = self.bounds
        if not 0 <= first <= second <= 1:
            raise ValueError(f"bounds must be two rising shares in [0, 1], got {self.bounds!r}")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, moment: Moment) -> FPSAttention:
        """The method of a step. Raises ValueError outside a sampler, where there are no steps."""
        if moment.step is None or not moment.steps:
            raise ValueError("FPSSteps needs to know the step; give it to a sampler")
        done = moment.step / moment.steps
        box, window = (
            self.early if done < self.bounds[0] else self.middle if done < self.bounds[1] else self.late
        )
        before = q.shape[2] - math.prod(moment.grid)
        return FPSAttention(moment.grid, box, window, before, self.precision)
