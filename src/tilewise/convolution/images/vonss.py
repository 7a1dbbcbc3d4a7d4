"""A state space that reads an image along rows, columns and both diagonals, there and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.mixer import check_width
from tilewise.recurrence.selective import selective_scan

DIRECTIONS = ("rows", "columns", "diagonals", "antidiagonals")


def scan_order(direction: str, height: int, width: int, device: Any = None) -> Tensor:
    """In which order a scan visits the places of a grid, int64 `[height * width]` (row * width + column).

    Every line is read against the one before it, so a step always leads to one of the eight neighbours: "rows"
    and "columns" snake, "diagonals" zigzag from the upper left corner (lines of equal row + column), and
    "antidiagonals" from the upper right. Raises ValueError for another direction.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(map(repr, DIRECTIONS))}, got {direction!r}")
    row, column = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    line, along = {
        "rows": (row, column),
        "columns": (column, row),
        "diagonals": (row + column, row),
        "antidiagonals": (row + width - 1 - column, row),
    }[direction]
    along = torch.where(line % 2 == 0, along, max(height, width) - 1 - along)
    return (line * max(height, width) + along).flatten().argsort()


class _Read(torch.autograd.Function):
    """Tokens `[B, N, C]` in each of K orders, `[B, K, N, C]`; a gather both ways, where autograd would scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, orders: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(orders, places)
        return _gathered(x, orders)

    @staticmethod
    def backward(ctx, grad: Tensor):
        orders, places = ctx.saved_tensors
        return _Write.apply(grad, orders, places), None, None


class _Write(torch.autograd.Function):
    """The way back, summed over the orders: `[B, K, N, C]` to `[B, N, C]`."""

    @staticmethod
    def forward(ctx, x: Tensor, orders: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(orders, places)
        made = x[:, 0].index_select(1, places[0])
        for k in range(1, len(places)):
            made += x[:, k].index_select(1, places[k])
        return made

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Read.apply(grad, *ctx.saved_tensors), None, None


def _gathered(x: Tensor, orders: Tensor) -> Tensor:
    return x.index_select(1, orders.flatten()).unflatten(1, orders.shape)


class VONSS(nn.Module):
    """The omni-directional neighbourhood state space of HCFSSNet (Pan et al., 2025, arXiv 2511.20151).

    Tokens are widened, see their eight neighbours by a depthwise convolution, and are read by one selective scan
    for each direction, there and back; what the scans give is added, normalised and gated.

    `forward` takes `[B, H, W, width]` to its shape.

    Args:
        width: of tokens. states: of each channel and scan. expand: channels as a multiple of the width.
        rank: of step sizes. directions: names of `scan_order`, each with parameters of its own; naming one
            repeatedly reads it repeatedly.
        steps: smallest and largest step that channels begin with.

    Raises ValueError for settings that do not fit. Differs from the paper, whose code is not published: that
    lines are read against each other, which keeps neighbours together, is our reading of its name.
    """

    def __init__(
        self,
        width: int,
        states: int = 8,
        expand: int = 2,
        rank: int = 2,
        directions: Sequence[str] = DIRECTIONS,
        steps: tuple[float, float] = (0.01, 0.5),
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("states", states), ("expand", expand), ("rank", rank)):
            check_width(value, 1, name)
        if not directions:
            raise ValueError("directions must name at least one direction, got none")
        for direction in directions:
            scan_order(direction, 1, 1)  # refuses others
        least, most = steps
        if not 0 < least <= most:
            raise ValueError(f"steps must rise from above 0, got {steps!r}")
        self.width, self.directions, self.sizes = width, tuple(directions), (rank, states, states)
        scans, channels = 2 * len(self.directions), width * expand
        self.inner, self.gate = (nn.Linear(width, channels, bias=False) for _ in range(2))
        self.near = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.select = nn.Parameter(
            torch.empty(scans, channels, sum(self.sizes)).uniform_(-1, 1) * channels**-0.5
        )
        self.step = nn.Parameter(torch.empty(scans, rank, channels).uniform_(-1, 1) * rank**-0.5)
        first = torch.empty(scans, 1, channels).uniform_(math.log(least), math.log(most)).exp()
        self.step_bias = nn.Parameter(first + torch.log(-torch.expm1(-first)))  # softplus of it is the step
        self.log_rate = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(scans * channels, 1))
        self.skip = nn.Parameter(torch.ones(scans * channels))
        self.norm = nn.LayerNorm(channels)
        self.out = nn.Linear(channels, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[3] != self.width:
            given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be [B, H, W, {self.width}], got {given}")
        if not x.numel():
            return x
        height, width = x.shape[1:3]
        ways = [scan_order(name, height, width, x.device) for name in self.directions]
        orders = torch.stack([way for order in ways for way in (order, order.flip(0))])  # [k, n]
        places = orders.argsort(1)
        inner = F.silu(self.near(self.inner(x).movedim(3, 1))).flatten(2).mT  # [b, n, c]
        read = _Read.apply(inner, orders, places)  # [b, k, n, c]
        rank, to_state, to_out = (read @ self.select).split(self.sizes, 3)
        delta = F.softplus(rank @ self.step + self.step_bias)
        rates = -self.log_rate.exp()
        found = selective_scan(_together(read), _together(delta), rates, to_state, to_out, D=self.skip)
        made = _Write.apply(cast(Tensor, found).unflatten(2, (len(orders), -1)).movedim(2, 1), orders, places)
        return self.out(self.norm(made).unflatten(1, (height, width)) * F.silu(self.gate(x)))


def _together(x: Tensor) -> Tensor:
    """`[B, K, N, C]` to `[B, N, K * C]`."""
    return x.movedim(1, 2).flatten(2)
