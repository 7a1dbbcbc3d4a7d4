"""Products of butterfly factors, one for each level: blocks of two by two diagonal matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def levels_of(n: int) -> int:
    """log2(n). Raises ValueError unless n is a power of two, at least 2."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 2 or n & (n - 1):
        raise ValueError(f"n must be a power of two, at least 2, got {n!r}")
    return n.bit_length() - 1


def twiddle_shape(n: int, tied: bool) -> tuple[int, ...]:
    """Shape of a product's numbers: `[2, 2, n - 1]` tied, `[log2(n), 2, 2, n / 2]` untied.

    The factor of level l mixes numbers h = 2^l apart, in blocks of 2h. Tied, all blocks of a level share
    their 2 x 2 x h numbers, which stand at h - 1 .. 2h - 2: 4(n - 1) in all. Untied, each has its own: 2 n
    log2(n) in all.
    """
    return (2, 2, n - 1) if tied else (levels_of(n), 2, 2, n // 2)


def multiply(twiddle: Tensor, x: Tensor, *, tied: bool) -> Tensor:
    """`x [..., n]` through all factors, from neighbours (level 0) up to halves, as an FFT goes.

    Leading axes of `twiddle` broadcast with those of x, so `[stacks, *twiddle_shape]` gives one product to
    each of `[..., stacks, n]`.
    """
    n = x.shape[-1]
    for level in range(levels_of(n)):
        h = 1 << level
        if tied:
            own = twiddle[..., h - 1 : 2 * h - 1].unsqueeze(-2)  # [.., 2, 2, 1, h]
        else:
            own = twiddle[..., level, :, :, :].unflatten(-1, (n // (2 * h), h))  # [.., 2, 2, blocks, h]
        first, second = x.unflatten(-1, (n // (2 * h), 2, h)).unbind(-2)
        made = [own[..., i, 0, :, :] * first + own[..., i, 1, :, :] * second for i in range(2)]
        x = torch.stack(made, -2).flatten(-3)
    return x


def random_twiddle(n: int, tied: bool, dtype: torch.dtype, *stacks: int) -> Tensor:
    """Numbers of random rotations, unitary ones where `dtype` is complex, `[*stacks, *twiddle_shape]`.

    So the product keeps every length.
    """
    shape = [*stacks, *twiddle_shape(n, tied)]
    places = [*shape[: len(shape) - 3], shape[-1]]
    turn, first, second = 2 * math.pi * torch.rand(3, *places)
    cos, sin = turn.cos(), turn.sin()
    if dtype.is_complex:
        entries = [torch.polar(cos.abs(), first), torch.polar(sin.abs(), second)]
        rows = [[entries[0], -entries[1].conj()], [entries[1], entries[0].conj()]]
    else:
        rows = [[cos, -sin], [sin, cos]]
    return torch.stack([torch.stack(row, -2) for row in rows], -3).to(dtype)
