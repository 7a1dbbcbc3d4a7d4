"""What the mixers over grids share: their arguments, and transforms in at least float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """At least float32: what transforms and weights of frequencies are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def check_count(name: str, value: int, least: int = 1) -> int:
    """ValueError unless a setting is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return value


def check_divides(name: str, value: int, whole: str, of: int) -> int:
    """ValueError unless `value` is a positive divisor."""
    check_count(name, value)
    if of % value:
        raise ValueError(f"{name} must divide {whole}, got {value} and {of}")
    return value


def check_grid(x: Tensor, grid: Sequence[int] | None, width: int) -> tuple[int, ...]:
    """The sides of the grid whose places are the tokens of `x [B, N, width]`, row-major; None is one line of
    N.

    ValueError for another shape or sides that do not hold N tokens.
    """
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != width:
        given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be [B, N, {width}], got {given}")
    if grid is None:
        return (x.shape[1],)
    sides = tuple(grid) if isinstance(grid, (tuple, list, torch.Size)) else ()
    if len(sides) not in (1, 2) or any(not isinstance(side, int) or side < 0 for side in sides):
        raise ValueError(f"grid must be (N,) or (H, W), got {grid!r}")
    if math.prod(sides) != x.shape[1]:
        raise ValueError(f"grid {sides} has {math.prod(sides)} places, got {x.shape[1]} tokens")
    return sides


def laid_out(x: Tensor, sides: Sequence[int]) -> Tensor:
    """`[B, N, C]` as `[B, *sides, C]`, at least float32."""
    return wide(x).reshape(x.shape[0], *sides, x.shape[2])


def to_modes(x: Tensor, norm: str = "ortho") -> Tensor:
    """The half spectrum of `[B, *sides, C]` over its sides."""
    return torch.fft.rfftn(x, dim=tuple(range(1, x.ndim - 1)), norm=norm)


def from_modes(z: Tensor, sides: Sequence[int], norm: str = "ortho") -> Tensor:
    """The inverse of `to_modes`: `[B, *sides, C]`."""
    return torch.fft.irfftn(z, s=tuple(sides), dim=tuple(range(1, z.ndim - 1)), norm=norm)


def kept_modes(sides: Sequence[int], modes: int | None) -> list[Tensor]:
    """For each side, which of the half spectrum's entries have fewer than `modes` waves (all for None)."""
    kept = []
    for i, side in enumerate(sides):
        last = i == len(sides) - 1
        waves = torch.arange(side // 2 + 1) if last else torch.fft.fftfreq(side, 1 / side).abs()
        kept.append(torch.nonzero(waves < (side + 1 if modes is None else modes)).flatten())
    return kept
