"""Rotary positions, taken off tokens and put on tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.tiles.visibility import HIDDEN, to_heads


def frequencies(base: float, size: int) -> tuple[float, ...]:
    """Angles per position of the `size / 2` pairs that a plain rotary embedding turns: `base ** (-2 i / size)`."""
    return tuple(base ** (-2 * i / size) for i in range(size // 2))


def resampled(angles: tuple[float, ...], size: int, width: int) -> tuple[float, ...]:
    """The same range of angles for vectors of `width` in place of `size` numbers, evenly drawn from it."""
    count = min(width // 2, len(angles) * width // max(1, size))
    return tuple(angles[i * len(angles) // count] for i in range(count))


def turn(x: Tensor, positions: Tensor, angles: tuple[float, ...], back: bool = False) -> Tensor:
    """Turn pairs of `x [B, H, N, D]` by their position times the pair's angle.

    Pairs are (i, i + r/2) among the first r = 2 len(angles) numbers, the order of Llama and its kin; what is beyond
    r stays. `positions` int64 `[B|1, h, N]`, h 1, the kv heads or the query heads; hidden ones count as 0.
    `back` turns the other way, which takes an embedding off again, to rounding.
    """
    if not angles:
        return x
    half = len(angles)
    wide = torch.promote_types(x.dtype, torch.float32)
    at = to_heads(positions.masked_fill(positions == HIDDEN, 0), x.shape[1]).unsqueeze(-1).to(wide)
    by = at * torch.tensor(angles, dtype=wide, device=x.device)  # [b|1, h|1, n, half]
    cos, sin = by.cos(), (-by.sin() if back else by.sin())
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
