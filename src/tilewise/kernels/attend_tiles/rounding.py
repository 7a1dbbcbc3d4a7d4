"""Tokens as 8-bit integers with scales: what quantised attention does to queries and keys before anything else."""

from __future__ import annotations

import array
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.kernels.attend_tiles import native
from tilewise.kernels.library import grid


class Fold(NamedTuple):
    """Which tokens share a scale: blocks of `size` tokens (0: all of them), folded into three axes.

    Tokens that differ along the first and the last axis share.
    """

    size: int
    outer: int
    groups: int
    inner: int


class Rounded(NamedTuple):
    """`(x - mean)` as integers times a scale per token.

    Attributes:
        integers: int8 `[B, H, N, D]`. scale: float32 `[B, H, N]`, NaN for tokens that are not finite.
        mean: `[B, H, ceil(N / smooth), D]` in at least float32, None where nothing is smoothed.
    """

    integers: Tensor
    scale: Tensor
    mean: Tensor | None


def round_tokens(
    x: Tensor, most: int, fold: Fold, *, smooth: int = 0, seen: Tensor | None = None, engine: str = "auto"
) -> Rounded:
    """`x [B, H, N, D]` in integers from -most to most, the largest number of each group of tokens becoming `most`.

    Args:
        smooth: how many consecutive tokens have their mean taken out first; 0 for none.
        seen: bool `[B|1, H|1, N]`, the tokens that count in means and groups; None for all. Tokens that are not
            finite never do.
        engine: "native", "torch" or "auto".

    Raises ValueError for another engine, and where "native" cannot run.
    """
    if engine not in ("auto", "native", "torch"):
        raise ValueError(f"engine must be 'auto', 'native' or 'torch', got {engine!r}")
    refused = _refuse(x, fold)
    if engine == "native" and refused:
        raise ValueError(f"engine 'native' cannot round these tokens: {refused}")
    if engine == "torch" or refused:
        return _torch(x, most, fold, smooth, seen)
    return _native(x, most, fold, smooth, seen)


def _refuse(x: Tensor, fold: Fold) -> str | None:
    if torch.compiler.is_compiling():
        return "it is no operator that torch.compile knows"
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32 at most on CPUs, got {x.dtype} on {x.device.type}"
    if not fold.size or not x.numel():
        return "it works block by block"
    return native.unavailable()


def _native(x: Tensor, most: int, fold: Fold, smooth: int, seen: Tensor | None) -> Rounded:
    b, heads, n, d = x.shape
    integers, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:3], dtype=torch.float32)
    mean = x.new_empty(b, heads, -(-n // smooth), d, dtype=torch.float32) if smooth else None
    words = array.array("q")
    for tensor in (x, seen, integers, scale, mean):
        words.extend(grid(tensor))
    words.extend((smooth, *fold, most, torch.get_num_threads()))
    native.LIBRARY.call("tilewise_round_tokens", words)
    return Rounded(integers, scale, mean)


def _torch(x: Tensor, most: int, fold: Fold, smooth: int, seen: Tensor | None) -> Rounded:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    b, heads, n, d = x.shape
    x = x.to(wide)
    counted = x.isfinite().all(-1)
    if seen is not None:
        counted = counted & seen
    mean = None
    if smooth:
        mean = means(x, counted, smooth)
        x = x - mean.repeat_interleave(smooth, 2)[:, :, :n]
    largest = x.abs().amax(-1) if d else x.new_zeros(b, heads, n)
    finite = largest.isfinite()
    scale = (shared(largest.masked_fill(~counted, 0), fold) / most).float()
    inverse = torch.where(scale > 0, 1 / scale, 0).unsqueeze(3)
    integers = (x * inverse).round_().nan_to_num_(0).clamp_(-most, most)
    return Rounded(integers.to(torch.int8), scale.masked_fill(~finite, torch.nan), mean)


def means(x: Tensor, counted: Tensor, smooth: int) -> Tensor:
    """Means of every `smooth` consecutive tokens of `x [B, H, N, D]`, of those that are `counted [B, H, N]`."""
    n = x.shape[2]
    blocks = -(-n // smooth)
    padded = torch.nn.functional.pad(x.masked_fill(~counted.unsqueeze(3), 0), (0, 0, 0, blocks * smooth - n))
    counts = torch.nn.functional.pad(counted, (0, blocks * smooth - n)).unflatten(2, (blocks, smooth)).sum(3)
    return padded.unflatten(2, (blocks, smooth)).sum(3) / counts.clamp(min=1).unsqueeze(3)


def shared(largest: Tensor, fold: Fold) -> Tensor:
    """The largest of each token's group, `[B, H, N]`."""
    n = largest.shape[2]
    if not n:
        return largest
    if not fold.size:
        return largest.amax(2, keepdim=True).expand_as(largest)
    blocks = -(-n // fold.size)
    padded = torch.nn.functional.pad(largest, (0, blocks * fold.size - n)).unflatten(2, (blocks, *fold[1:]))
    return padded.amax((3, 5), keepdim=True).expand_as(padded).flatten(2)[:, :, :n]
