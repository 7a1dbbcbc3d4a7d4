"""Token grids: the windows of tokens that stand on a line, an image or a video, and orders that keep them close."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewise.tiles.masks import Mask
from tilewise.tiles.tiling import Tiling
from tilewise.tiles.visibility import FAR, Visibility


@dataclass(frozen=True)
class Axis:
    """One axis of a grid and the window that slides along it, as the authors of NATTEN define it.

    Tokens whose coordinates are equal modulo `dilation` form a class; a token sees tokens of its own class only.
    Counted in steps of its class, a token sees `window` consecutive ones: `window // 2` before itself, itself and
    the rest behind it (so an even window looks one farther back). At a border the window is shifted inwards, never
    cut: every token sees exactly `window`. With `stride` s, runs of s tokens share the window of their leader,
    the run's token s // 2. A causal axis ends the window at the token itself and lets it grow at the start.

    Args:
        length: tokens along the axis. window: tokens seen along it. dilation: distance between them.
        causal: whether later tokens are hidden. stride: tokens that share a window.

    Raises ValueError where NATTEN does: when `window * dilation` exceeds `length`, or `stride` exceeds `window`.
    Unlike NATTEN, a window of 1 is allowed.
    """

    length: int
    window: int
    dilation: int = 1
    causal: bool = False
    stride: int = 1

    def __post_init__(self) -> None:
        for name in ("length", "window", "dilation", "stride"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not isinstance(self.causal, bool):
            raise ValueError(f"causal must be True or False for each axis, got {self.causal!r}")
        if self.window * self.dilation > self.length:
            raise ValueError(
                f"window * dilation must not exceed the axis, got {self.window} * {self.dilation} on an axis of"
                f" {self.length}"
            )
        if self.stride > self.window:
            raise ValueError(f"stride must not exceed the window {self.window}, got {self.stride}")

    @property
    def steps(self) -> int:
        """Tokens in the longest class; others have one fewer."""
        return -(-self.length // self.dilation)

    @property
    def hides(self) -> bool:
        """Whether some token does not see some other."""
        return self.causal or self.window < self.length

    def place(self, coordinate: Tensor) -> Tensor:
        """Place of a coordinate once tokens are sorted by class: class * steps + step, int64."""
        return coordinate % self.dilation * self.steps + coordinate // self.dilation

    def limits(self, coordinate: Tensor) -> tuple[Tensor, Tensor]:
        """First and last place that the tokens at these coordinates see, inclusive, int64."""
        own, step = coordinate % self.dilation, coordinate // self.dilation
        first, end = self._window(step, (self.length - 1 - own) // self.dilation)
        return own * self.steps + first, own * self.steps + end

    def _window(self, step: Any, last: Any) -> tuple[Any, Any]:
        """First and last step that a token at `step` sees in a class that ends at `last`; integers or tensors."""
        leader = step // self.stride * self.stride + (self.stride - 1 if self.causal else self.stride // 2)
        leader = _least(leader, last)
        if self.causal:
            return _most(leader - self.window + 1, 0), step
        before = self.window // 2
        centre = _least(_most(leader, before), last - (self.window - 1 - before))
        return centre - before, centre - before + self.window - 1

    def cuts(self, tile: int) -> int:
        """Tiles of length `tile` in the whole axis, each class cut by itself."""
        return self.dilation * -(-self.steps // tile)

    def reached(self, tile: int) -> int:
        """Pairs of a query tile and a key tile of length `tile` in which something is seen."""
        longer = self.length % self.dilation or self.dilation  # classes that have all the steps
        pairs = 0
        for classes, steps in ((longer, self.steps), (self.dilation - longer, self.steps - 1)):
            for start in range(0, steps if classes else 0, tile):
                first = self._window(start, steps - 1)[0]
                end = self._window(min(start + tile, steps) - 1, steps - 1)[1]
                pairs += classes * (end // tile - first // tile + 1)
        return pairs


def grid_axes(
    grid: tuple[int, ...],
    window: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    stride: int | tuple[int, ...] = 1,
) -> tuple[Axis, ...]:
    """The axes of a grid; a number that is not a tuple holds for every axis.

    Raises ValueError for settings of another number of axes, and as `Axis` does, naming the axis.
    """
    if not isinstance(grid, tuple) or not grid:
        raise ValueError(f"grid must be a tuple of integers, one per axis, got {grid!r}")
    given = {"window": window, "dilation": dilation, "causal": causal, "stride": stride}
    for name, value in given.items():
        if isinstance(value, tuple) and len(value) != len(grid):
            raise ValueError(f"{name} must have one entry for each of the {len(grid)} axes, got {value!r}")
    axes = []
    for number, length in enumerate(grid):
        own = {name: value[number] if isinstance(value, tuple) else value for name, value in given.items()}
        try:
            axes.append(Axis(length, **own))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"axis {number} of grid {grid}: {error}") from None
    return tuple(axes)


@dataclass(frozen=True)
class Neighborhood(Mask):
    """A token of a grid sees its nearest neighbours along every axis: see `Axis` for what that means exactly.

    Token (t, h, w) of a grid (T, H, W) stands at position (t * H + h) * W + w. Each axis is one more axis of the
    box that a query sees, so nothing larger than the grid is made.

    Args:
        grid: tokens along each axis, slowest first; any number of axes.
        window, dilation, causal, stride: per axis, or one for all.

    Raises ValueError as `grid_axes` does, and when bound to positions outside the grid.
    """

    grid: tuple[int, ...]
    window: int | tuple[int, ...]
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    stride: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        self.axes()

    def axes(self) -> tuple[Axis, ...]:
        """The axes with their windows."""
        return grid_axes(self.grid, self.window, self.dilation, self.causal, self.stride)

    def narrow(self, view: Visibility) -> Visibility:
        return self.behind(view, 0)

    def behind(self, view: Visibility, first: int) -> Visibility:
        """This mask for a grid that starts at position `first`.

        Tokens before it see all of the grid and are hidden themselves: seen by everyone and by their neighbours
        only is no box, so whoever wants them seen adds a second part (see `NeighborhoodAttention`).
        """
        self._check(view, first)
        if first:
            view = view.limit(lo=first)
        outside = view.q_pos < first
        q, k = (view.q_pos - first).clamp(min=0), (view.k_pos - first).clamp(min=0)
        inner = 1
        for axis in reversed(self.axes()):
            if axis.hides:
                lo, hi = axis.limits(q // inner % axis.length)
                if first:
                    lo, hi = lo.masked_fill(outside, -FAR), hi.masked_fill(outside, FAR)
                view = view.with_axis(lo, hi, axis.place(k // inner % axis.length))
            inner *= axis.length
        return view

    def _check(self, view: Visibility, first: int) -> None:
        size = first + math.prod(self.grid)
        if torch.compiler.is_compiling():
            return
        for name, pos in (("queries", view.q_pos), ("keys", view.k_pos)):
            if pos.numel() and int(pos.max()) >= size:
                raise ValueError(
                    f"grid {self.grid} ends at position {size - 1}, but there are {name} up to {int(pos.max())}"
                )


@dataclass(frozen=True)
class Blocks:
    """A cut of a grid into boxes of `tile` steps per axis, each class of a dilated axis by itself.

    Args:
        axes: of the grid. tile: steps along each axis; longer than an axis means all of it.
    """

    axes: tuple[Axis, ...]
    tile: tuple[int, ...]

    def __post_init__(self) -> None:
        whole = isinstance(self.tile, tuple) and all(isinstance(t, int) and t >= 1 for t in self.tile)
        if not whole or len(self.tile) != len(self.axes):
            raise ValueError(
                f"tile must be {len(self.axes)} integers >= 1, steps along each axis, got {self.tile!r}"
            )

    @classmethod
    def best(cls, axes: tuple[Axis, ...], tokens: int = 128) -> Blocks:
        """The boxes of at most `tokens` tokens whose query tiles reach the fewest scores, by count.

        Among boxes that no longer side fits into; sides are powers of two, or an axis whole.
        """
        sides = [_sides(axis.steps) for axis in axes]
        fitting = [tile for tile in itertools.product(*sides) if math.prod(tile) <= tokens]
        largest = [
            tile
            for tile in fitting
            if not any(
                side < s[-1] and math.prod(tile) // side * s[s.index(side) + 1] <= tokens
                for side, s in zip(tile, sides)
            )
        ]

        def scores(tile: tuple[int, ...]) -> int:
            return math.prod([axis.reached(t) * t * t for axis, t in zip(axes, tile)])

        return cls(axes, sorted((scores(tile), tile) for tile in largest)[0][1])  # min(key=) does not compile

    @property
    def volume(self) -> int:
        """Tokens in the largest box."""
        return math.prod([side for _, side in self._sides()])

    @property
    def even(self) -> bool:
        """Whether all boxes have the same number of tokens."""
        return all(a.length % a.dilation == 0 and a.steps % min(t, a.steps) == 0 for a, t in self._sides())

    def _sides(self) -> list[tuple[Axis, int]]:
        return [(axis, min(t, axis.steps)) for axis, t in zip(self.axes, self.tile)]

    def order(self, device: torch.device | str | None = None) -> Tensor:
        """The tokens, box by box, row-major within and between boxes: int64 `[N]`."""
        box = inside = torch.zeros((), dtype=torch.int64, device=device)
        for axis, side in self._sides():
            place = axis.place(torch.arange(axis.length, device=device))
            box = box.unsqueeze(-1) * axis.cuts(side) + self._cut(axis, side, place)
            inside = inside.unsqueeze(-1) * (axis.steps * axis.dilation) + place
        most = math.prod([axis.steps * axis.dilation for axis in self.axes])
        return (box * most + inside).flatten().argsort()

    def tiling(self, device: torch.device | str | None = None, before: int = 0) -> Tiling:
        """The tiling of `order` into boxes; `before` tokens that come first are cut to the same size."""
        size = self.volume
        if self.even and not before:
            return Tiling(size)
        sizes = torch.ones((), dtype=torch.int64, device=device)
        for axis, side in self._sides():
            cut = self._cut(axis, side, axis.place(torch.arange(axis.length, device=device)))
            counts = cut.new_zeros(axis.cuts(side)).scatter_add_(0, cut, torch.ones_like(cut))
            sizes = sizes.unsqueeze(-1) * counts
        heads = [min(size, before - start) for start in range(0, before, size)]
        sizes = torch.cat([torch.tensor([0, *heads], dtype=torch.int64, device=device), sizes.flatten()])
        return Tiling(size, sizes.cumsum(0).view(1, 1, -1))

    @staticmethod
    def _cut(axis: Axis, side: int, place: Tensor) -> Tensor:
        """The cut that each place of an axis lies in."""
        return place // axis.steps * (axis.cuts(side) // axis.dilation) + place % axis.steps // side


def _sides(steps: int) -> list[int]:
    """Lengths to try: powers of two below `steps`, and all of it."""
    return [*(1 << e for e in range((steps - 1).bit_length())), steps]


def _least(a: Any, b: Any) -> Any:
    """The smaller of two integers, or element by element of tensors."""
    return a - (a - b) * (a > b)


def _most(a: Any, b: Any) -> Any:
    return a + (b - a) * (b > a)
