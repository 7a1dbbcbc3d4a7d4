"""Neighborhood attention: tokens of a line, an image or a video attend to their nearest neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.tiles import TileMap, Tiling, Visibility
from tilewise.tiles.grid import Blocks, Neighborhood


@dataclass(frozen=True)
class NeighborhoodAttention(Method):
    """Fused neighborhood attention, 1-D, 2-D and 3-D (Hassani et al., 2024, arXiv 2403.04690).

    Tokens of a grid, flattened row-major, attend to a window around themselves; `tilewise.tiles.grid.Axis` says
    exactly which tokens that are: windows shift at borders, dilated classes have borders of their own. As in the
    paper, attention is computed in tiles that are boxes of the grid, keys beyond all windows of a tile are never
    read, and the rest is masked by a few integers per token. Reads nothing, so it costs nothing to choose.

    Has no name, as it has no defaults: the grid and the window belong to the tokens.

    Differs from the paper: the boxes are an order of tokens and a tiling given to the one tile kernel (what the
    authors' later kernels call token permutation), not index arithmetic within a kernel; a window of 1 is allowed;
    even windows, `stride` (Hassani et al., 2025, arXiv 2504.16922) and further tokens are from NATTEN's later
    releases; the paper's relative positional bias is given to `attend` as `bias`.

    Args:
        grid: tokens along each axis, slowest first: (T, H, W), (H, W) or (N,).
        window, dilation, causal, stride: per axis, or one for all; `window * dilation` at most the axis.
        extra: tokens before the grid (text, registers): all see them, and as queries they see everything. With
            queries of the grid alone they are NATTEN's additional keys.
        tile: tokens of a box along each axis, counted in steps of the dilation; None takes the boxes of at most
            128 tokens that need the fewest scores.
        key_tile: the same for keys; None takes the boxes of the queries. Smaller ones fit a window more closely.

    Supports all modes: fewer queries than keys are the last tokens of the grid. Another mask holds as well.
    Raises ValueError for settings that do not fit each other, and for a number of keys that is not
    `extra` + the grid.
    """

    grid: tuple[int, ...]
    window: int | tuple[int, ...]
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    stride: int | tuple[int, ...] = 1
    extra: int = 0
    tile: tuple[int, ...] | None = None
    key_tile: tuple[int, ...] | None = None
    needs = "a grid of tokens"

    def __post_init__(self) -> None:
        if not isinstance(self.extra, int) or self.extra < 0:
            raise ValueError(f"extra must be an integer >= 0, got {self.extra!r}")
        self.blocks()
        self.key_blocks()

    @property
    def mask(self) -> Neighborhood:
        """The windows as a mask of the grid's tokens, usable with any method."""
        return Neighborhood(self.grid, self.window, self.dilation, self.causal, self.stride)

    def blocks(self) -> Blocks:
        """The boxes of the grid that are tiles of queries."""
        axes = self.mask.axes()
        return Blocks.best(axes) if self.tile is None else Blocks(axes, self.tile)

    def key_blocks(self) -> Blocks:
        """The boxes of the grid that are tiles of keys."""
        return self.blocks() if self.key_tile is None else Blocks(self.mask.axes(), self.key_tile)

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        n_q, n_k = q.shape[2], k.shape[2]
        size = math.prod(self.grid)
        if n_k != self.extra + size:
            raise ValueError(
                f"grid {self.grid} with {self.extra} extra tokens needs {self.extra + size} keys, got {n_k}"
            )
        if n_q > n_k:
            raise ValueError(f"there are {n_k} tokens, so at most as many queries, got {n_q}")
        if not any(axis.hides for axis in self.mask.axes()):
            return Plan((Pass(view),), view)
        order, k_tiling = self._layout(self.key_blocks(), n_k, n_k, q.device)
        q_order, q_tiling = self._layout(self.blocks(), n_q, n_k, q.device)
        passes = [
            Pass(
                self.mask.behind(view, self.extra),
                _every(q_tiling, k_tiling, n_q, n_k, q.device),
                q_order,
                order,
            )
        ]
        if self.extra:
            width = min(128, max(16, 1 << (self.extra - 1).bit_length()))
            tiles = _every(q_tiling, Tiling(width), n_q, n_k, q.device)
            passes.append(Pass(view.limit(hi=self.extra - 1), tiles, q_order))
        return Plan(tuple(passes), view)

    def _layout(self, blocks: Blocks, n: int, total: int, device: torch.device) -> tuple[Tensor, Tiling]:
        """Order `[1, 1, n]` and tiling of the last `n` of all tokens."""
        order = blocks.order(device) + self.extra
        order = torch.cat([torch.arange(self.extra, device=device), order])
        skipped = total - n
        if skipped == 0:
            return order.view(1, 1, n), blocks.tiling(device, self.extra)
        if skipped == self.extra:
            return (order[self.extra :] - self.extra).view(1, 1, n), blocks.tiling(device)
        # Some boxes are cut short at places that no tiling knows beforehand: tiles of one size then, in box order.
        return order.argsort()[skipped:].argsort().view(1, 1, n), Tiling(min(blocks.volume, max(n, 1)))


def _every(q_tiling: Tiling, k_tiling: Tiling, n_q: int, n_k: int, device: torch.device) -> TileMap:
    keep = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    return TileMap(keep.expand(1, 1, q_tiling.count(n_q), k_tiling.count(n_k)), q_tiling, k_tiling)
