"""The layers of the video model: patches, rotary positions on a grid, blocks that the flow time modulates."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tilewise.recurrence.vision import turn

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm that the flow time shifts, scales and gates (adaLN).

    As in PixArt-alpha (arXiv 2310.00426), one network reads the time for all blocks and each block adds its own
    table, which saves most of DiT's parameters for it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.zeros(6, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.q_scale = nn.Parameter(torch.ones(heads, 1, width // heads))
        self.k_scale = nn.Parameter(torch.ones(heads, 1, width // heads))
        self.proj = nn.Linear(width, width)
        self.mixer: nn.Module | None = None  # in attention's place, see `video_mixers.with_mixers`
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        turns: tuple[Tensor, Tensor],
        run: Attention,
        grid: tuple[int, int, int],
    ) -> Tensor:
        """`x [B, N, width]`, `modulation [B, 6, width]` to `[B, N, width]`."""
        shift, scale, gate, shift_up, scale_up, gate_up = (modulation + self.table).unsqueeze(2).unbind(1)
        inner = norm(x) * (1 + scale) + shift
        x = x + (1 + gate) * (
            self._attend(inner, turns, run) if self.mixer is None else self.mixer(inner, grid)
        )
        inner = functional.gelu(self.up(norm(x) * (1 + scale_up) + shift_up), approximate="tanh")
        return x + (1 + gate_up) * self.down(inner)

    def _attend(self, x: Tensor, turns: tuple[Tensor, Tensor], run: Attention) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        q = turn(_unit(q) * self.q_scale, turns).to(v.dtype)
        k = turn(_unit(k) * self.k_scale, turns).to(v.dtype)
        return self.proj(run(q, k, v).transpose(1, 2).flatten(2))


def norm(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the last axis; no parameters."""
    return functional.layer_norm(x, x.shape[-1:])


def _unit(x: Tensor) -> Tensor:
    """Mean square 1 over the last axis, so that scores stay bounded while training."""
    return functional.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)


def prior(t: Tensor, power: float) -> Tensor:
    """Times x, the best guess of the velocity that knows the data's mean square only."""
    return (t * power - (1 - t)) / (t.square() * power + (1 - t).square())


def waves(x: Tensor, width: int) -> Tensor:
    """Sines and cosines of `x [B]` at `width / 2` rates from 1 to 1/10,000: `[B, width]` float32."""
    rates = torch.exp(torch.arange(width // 2, device=x.device) * (-math.log(1e4) / (width // 2)))
    angles = x.unsqueeze(-1) * rates
    return torch.cat((angles.cos(), angles.sin()), -1)


def cut(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """`[B, T, H, W, C]` to tokens `[B, N, patch * C]`, time slowest."""
    b, t, h, w, c = x.shape
    x = x.view(b, t // patch[0], patch[0], h // patch[1], patch[1], w // patch[2], patch[2], c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).flatten(1, 3)


def uncut(x: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """Undo `cut`."""
    x = x.unflatten(-1, (*patch, -1)).unflatten(1, grid)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)
