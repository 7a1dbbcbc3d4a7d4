"""What the layers for images and video share: heads, grids of tokens, positions, depthwise convolutions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.linear_attention import FEATURES
from tilewise.recurrence.mixer import HeadNorm, check_width, to_heads, wide

SLOWEST = 0.02  # radians per step of the grid that the slowest rotary pair turns; the fastest turns 1
Grid = tuple[int, ...]
Turns = tuple[Tensor, Tensor]


class VisionMixer(nn.Module):
    """A module by which all tokens of an image or a video see each other.

    `forward` takes `x [B, N, width]`, the `grid` of its last tokens, row-major and slowest first, (H, W) or
    (T, H, W), and `mask` (bool `[B, N]`, False for padding, which is seen by none and gets 0), and gives
    `[B, N, width]`.

    Args:
        width: of tokens. heads: their number. bias: of the four projections.
        qk_norm: RMS norm with a scale for queries and keys of each head.
        rope: turn queries and keys of the grid by their places (`rotations`).
        extra: tokens before the grid (classes, text), neither turned nor convolved.

    Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        bias: bool = True,
        qk_norm: bool = False,
        rope: bool = False,
        extra: int = 0,
    ) -> None:
        super().__init__()
        dim = check_width(width, heads)
        if rope and dim % 2:
            raise ValueError(f"rope turns pairs and needs an even size of heads, got {dim}")
        if not isinstance(extra, int) or isinstance(extra, bool) or extra < 0:
            raise ValueError(f"extra must be an integer >= 0, got {extra!r}")
        self.width, self.heads, self.rope, self.extra = width, heads, rope, extra
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias) for _ in range(4))
        self.q_norm: nn.Module = HeadNorm(heads, dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = HeadNorm(heads, dim, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, grid: Grid | None = None, *, mask: Tensor | None = None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not say how it mixes")

    def inherit(self, query: nn.Linear, key: nn.Linear, value: nn.Linear, out: nn.Linear) -> None:
        """Copy the four projections of a trained attention; ValueError where shapes differ."""
        given = {"query": query, "key": key, "value": value, "out": out}
        for name, theirs in given.items():
            mine = getattr(self, name)
            if theirs.weight.shape != mine.weight.shape or (theirs.bias is None) != (mine.bias is None):
                raise ValueError(f"{name} must be {_described(mine)}, got {_described(theirs)}")
        for name, theirs in given.items():
            getattr(self, name).load_state_dict(theirs.state_dict())

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, `[B, H, N, D]` each."""
        q, k, v = (to_heads(made(x), self.heads) for made in (self.query, self.key, self.value))
        return self.q_norm(q), self.k_norm(k), v

    def turned(self, x: Tensor, grid: Grid | None, first: Tensor | None = None) -> Tensor:
        """`x [B, H, N, D]` turned by its places on the grid, if this module does so."""
        if not self.rope or grid is None:
            return x
        tokens = turn(x[:, :, self.extra :], rotations(grid, x.shape[3], x.device, first))
        return torch.cat((x[:, :, : self.extra], tokens), 2) if self.extra else tokens

    def check(self, x: Tensor, grid: Grid | None, mask: Tensor | None, needs_grid: bool) -> Tensor:
        """Check the arguments of `forward`; x, with padding at 0, as it may hold anything."""
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != self.width:
            given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be [B, N, {self.width}], got {given}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ValueError(f"mask must be bool {list(x.shape[:2])}, got {mask.dtype} {list(mask.shape)}")
        x = x if mask is None else x.masked_fill(~mask.unsqueeze(2), 0)
        if grid is None:
            if needs_grid or self.rope:
                raise ValueError("grid must be (H, W) or (T, H, W): what is local or turns needs places")
            return x
        sides = grid if isinstance(grid, (tuple, list, torch.Size)) else ()
        if len(sides) not in (2, 3) or any(not isinstance(side, int) or side < 0 for side in sides):
            raise ValueError(f"grid must be (H, W) or (T, H, W), got {grid!r}")
        if math.prod(sides) + self.extra != x.shape[1]:
            raise ValueError(
                f"grid {tuple(sides)} and {self.extra} extra tokens are"
                f" {math.prod(sides) + self.extra} tokens, got {x.shape[1]}"
            )
        return x

    def finish(self, out: Tensor, mask: Tensor | None) -> Tensor:
        """The output layer; padding gets 0."""
        made = self.out(out)
        return made if mask is None else made.masked_fill(~mask.unsqueeze(2), 0)


def _described(layer: nn.Linear) -> str:
    return f"{list(layer.weight.shape)} {'without' if layer.bias is None else 'with'} bias"


def features_of(name: str | None):
    """A feature map by its name; ValueError for others."""
    if name not in FEATURES:
        raise ValueError(f"features must be one of {', '.join(map(repr, FEATURES))}, got {name!r}")
    return FEATURES[name]


class LocalConv(nn.Module):
    """A depthwise convolution over height and width of every frame, `x [B, extra + N, width]` to its shape.

    Tokens before the grid get 0. Raises ValueError for a size that is not odd.
    """

    def __init__(self, width: int, size: int, extra: int = 0) -> None:
        super().__init__()
        check_odd("conv", size)
        self.extra = extra
        self.conv = nn.Conv2d(width, width, size, padding=size // 2, groups=width)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        if not x.numel():
            return x
        frames = x[:, self.extra :].unflatten(1, (-1, *grid[-2:])).flatten(0, 1)  # [b * t, h, w, c]
        made = self.conv(frames.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return F.pad(made.reshape(x.shape[0], -1, x.shape[2]), (0, 0, self.extra, 0))


def check_odd(name: str, size: int) -> None:
    """ValueError unless a width of a convolution is odd and at least 1."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1 or size % 2 == 0:
        raise ValueError(f"{name} must be an odd integer >= 1, got {size!r}")


def rotations(grid: Grid, dim: int, device: Any = None, first: Tensor | None = None) -> Turns:
    """Cosines and sines, `[B|1, N, dim / 2]` float32, by which the pairs of every token of a grid are turned.

    Of the pairs, height and width get three eighths each and time the rest, of images each a half (to whole
    pairs, the first axis gets the rest), at rates from 1 to 1/50 radians per step in a geometric row.
    `first`, int `[B]`, is the place of the first frame.
    """
    half = dim // 2
    share = half * 3 // 8 if len(grid) == 3 else half // 2
    pairs = [half - share * (len(grid) - 1), *[share] * (len(grid) - 1)]
    places = list(torch.meshgrid(*(torch.arange(n, device=device).float() for n in grid), indexing="ij"))
    places = [place.reshape(1, -1, 1) for place in places]
    if first is not None:
        places[0] = places[0] + first.view(-1, 1, 1)
    angles = [
        place * SLOWEST ** (torch.arange(count, device=device) / max(1, count - 1))
        for place, count in zip(places, pairs)
    ]
    every = torch.cat([x.expand(angles[0].shape[0], -1, -1) for x in angles], 2)
    return every.cos(), every.sin()


def turn(x: Tensor, turns: Turns) -> Tensor:
    """Rotate `x [B, H, N, dim]`: entry i and entry i + dim / 2 are a pair."""
    cos, sin = (part.unsqueeze(1) for part in turns)
    a, b = wide(x).chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)
