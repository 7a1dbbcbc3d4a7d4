"""Block linear attention: frames see each other within a block and all blocks before, by sums of one size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tilewise.recurrence.mixer import from_heads, to_heads
from tilewise.recurrence.state import Carried
from tilewise.recurrence.vision import Grid, VisionMixer, features_of
from tilewise.recurrence.whole import Sums, gather, read

EPS = 1e-15  # the authors'; keeps denominators off 0


@dataclass(frozen=True, eq=False)
class BlocksSeen(Carried):
    """All that is kept of the blocks before: as large after an hour as after a frame.

    Attributes:
        sums: of keys and values, by head. frames: int64 `[B]`, how many there were.
    """

    sums: Sums
    frames: Tensor


class BlockLinearAttention(VisionMixer):
    """SANA-Video's attention with a constant-size cache (Chen et al., 2025, arXiv 2509.24695).

    Linear attention of ReLU features. A block of frames reads the sums of all tokens up to its own end; the
    sums are the cache, so a video is generated block after block at one price for each, whatever its length.
    Positions
    turn features behind the ReLU, in numerators alone: denominators are of the features as they are, which
        cannot
    make them negative.

    `forward(x, grid, state, block=..., mask=...)` takes `x [B, T * H * W, width]`, the state after earlier
    blocks or None, and how many frames make a block (None: all of this call are one). It gives `[B, N,
    width]` and the state after the last block. Blocks are counted from the call's first frame, and the last
    may be shorter. While a block is denoised, keep the state from before it, and take the new one when it is
    done.

    Args:
        width, heads, bias: as of `VisionMixer`.
        qk_norm: RMS norm of queries and keys over all heads together, as the authors have it.
        rope: turn by place in time, height and width. features: map of queries and keys.

    Raises ValueError for settings and states that do not fit. Differs from the paper: any mask; the
    convolution over time in its feed-forward layers is not here.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        features: str | None = "relu",
        qk_norm: bool = True,
        rope: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__(width, heads, bias=bias, rope=rope)
        self.features = features_of(features)
        if qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        grid: Grid,
        state: BlocksSeen | None = None,
        *,
        block: int | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, BlocksSeen]:
        x = self._check(x, grid, state, block, mask)
        frames, area = grid[0], math.prod(grid[1:])
        if state is None:
            state = self._nothing(x)
        q, k = (
            self.features(to_heads(part, self.heads))
            for part in (self.q_norm(self.query(x)), self.k_norm(self.key(x)))
        )
        v = to_heads(self.value(x), self.heads)
        turned_q, turned_k = (self.turned(part, grid, state.frames) for part in (q, k))
        sums, outs, size = state.sums, [], max(1, (block or frames) * area)
        for start in range(0, x.shape[1], size):
            at = slice(start, start + size)
            hidden = None if mask is None else mask[:, at]
            sums = sums + gather(turned_k[:, :, at], v[:, :, at], weigh=k[:, :, at], mask=hidden)
            outs.append(read(turned_q[:, :, at], sums, eps=EPS, weigh=q[:, :, at]))
        out = from_heads(torch.cat(outs, 2) if outs else torch.zeros_like(v))
        return self.finish(out, mask), BlocksSeen(sums, state.frames + frames)

    def _nothing(self, x: Tensor) -> BlocksSeen:
        """The state before any block."""
        kept = x.new_zeros(x.shape[0], self.heads, 0, self.width // self.heads)
        return BlocksSeen(gather(kept, kept), torch.zeros(x.shape[0], dtype=torch.int64, device=x.device))

    def _check(
        self, x: Tensor, grid: Grid, state: BlocksSeen | None, block: int | None, mask: Tensor | None
    ) -> Tensor:
        if not isinstance(grid, (tuple, list)) or len(grid) != 3:
            raise ValueError(f"grid must be (T, H, W), got {grid!r}")
        x = self.check(x, grid, mask, needs_grid=True)
        if block is not None and (not isinstance(block, int) or isinstance(block, bool) or block < 1):
            raise ValueError(f"block must be None or an integer >= 1, got {block!r}")
        if state is None:
            return x
        dim = self.width // self.heads
        if not isinstance(state, BlocksSeen) or state.sums.products.shape != (
            x.shape[0],
            self.heads,
            dim,
            dim,
        ):
            given = list(state.sums.products.shape) if isinstance(state, BlocksSeen) else type(state).__name__
            raise ValueError(f"state must hold sums {[x.shape[0], self.heads, dim, dim]}, got {given}")
        return x
