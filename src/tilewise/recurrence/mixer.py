"""Token mixers: modules with one signature, and what those of linear recurrences share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tilewise.recurrence.state import Carried, State


class Mixer(nn.Module):
    """A module that lets tokens see earlier ones.

    `forward` takes `x [B, N, width]`, the state of an earlier call or None, and the keywords `mask` (bool `[B, N]`,
    False for padding on either side, which changes no state and gives 0) and `cu_seqlens` (packed sequences), and
    gives `[B, N, width]` and the state after the last token. A sequence may be split anywhere: the parts, handed
    their states on, give what the whole would.
    """

    def forward(
        self,
        x: Tensor,
        state: Carried | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Carried]:
        raise NotImplementedError(f"{type(self).__name__} does not say how it mixes")


@dataclass(frozen=True, eq=False)
class MixerState(Carried):
    """What a mixer over `scan` carries: the recurrence's state, and the last inputs of its short convolutions."""

    scan: State
    tails: tuple[Tensor, ...] = ()


def wide(x: Tensor) -> Tensor:
    """At least float32: what gates are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def to_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, N, H * D]` as `[B, H, N, D]`, a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def from_heads(x: Tensor) -> Tensor:
    """`[B, H, N, D]` as `[B, N, H * D]`."""
    return x.transpose(1, 2).flatten(2)


def check_width(width: int, heads: int, name: str = "width") -> int:
    """The size of a head; ValueError unless both are at least 1 and heads divide the width."""
    for label, value in ((name, width), ("heads", heads)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{label} must be an integer >= 1, got {value!r}")
    if width % heads:
        raise ValueError(f"{name} must be a multiple of heads, got {width} and {heads}")
    return width // heads


class HeadNorm(nn.Module):
    """RMS norm of each head's own channels, `[B, H, N, D]`, with a scale for each channel of each head or none."""

    def __init__(self, heads: int, dim: int, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads, 1, dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        high = wide(x)
        made = (high * torch.rsqrt(high.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return made if self.weight is None else made * self.weight
