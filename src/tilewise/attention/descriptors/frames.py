"""Frames as the layer needs them: rotations by place, and frames that stand for the others."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, places: Tensor, base: float = 100.0) -> Tensor:
    """Rotary position in two dimensions: `x [B, H, N, D]` by `places [B|1, N, 2]` (row, column).

    The first half of the features turns by the row, the second by the column. Within a half feature i pairs with
    feature i + D/4 and turns by `place / base^(4 i / D)`, as in the code of VGGT. Place 0 leaves a token as it is.
    D must be a multiple of 4. Computed in at least float32.
    """
    quarter = x.shape[-1] // 4
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    speed = base ** (-torch.arange(quarter, device=x.device, dtype=dtype) / quarter)
    angles = (places.to(dtype).unsqueeze(-1) * speed).unsqueeze(1)  # [B|1, 1, N, 2, D/4]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(dtype).unflatten(-1, (2, 2, quarter)).unbind(-2)  # [B, H, N, 2, D/4]
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -2)
    return turned.flatten(-3).to(x.dtype)


@torch.no_grad()
def cluster_frames(frames: Tensor, count: int, rounds: int = 20) -> Tensor:
    """`count` frames that stand for all: `frames [B, S, C]`, one vector each, to int64 `[B, count]`, ascending.

    k-means from the farthest-first choice that starts at frame 0; then, cluster by cluster, the frame nearest to
    the centre that is not yet taken. Frame 0 is never taken: it is kept in any case. Nothing is drawn at random.
    Raises ValueError unless 0 <= count < S (or both are 0).
    """
    b, s, c = frames.shape
    if not 0 <= count <= max(s - 1, 0):
        raise ValueError(f"count must be in 0..{max(s - 1, 0)} for {s} frames, got {count!r}")
    frames = frames.float()
    centres = frames[:, :1]
    for _ in range(1, count):
        farthest = torch.cdist(frames, centres).amin(2).argmax(1)
        centres = torch.cat([centres, frames[torch.arange(b), farthest].unsqueeze(1)], 1)
    centres = centres[:, :count]
    for _ in range(rounds if count else 0):
        own = torch.cdist(frames, centres).argmin(2).unsqueeze(-1)  # [B, S, 1]
        member = torch.zeros(b, s, count, device=frames.device).scatter_(2, own, 1.0).mT
        size = member.sum(2, keepdim=True)
        centres = torch.where(size > 0, member @ frames / size.clamp(min=1), centres)
    away = torch.cdist(frames, centres)  # [B, S, count]
    away[:, :1] = torch.inf
    chosen = []
    for cluster in range(count):
        chosen.append(away[..., cluster].argmin(1, keepdim=True))
        away.scatter_(1, chosen[-1].unsqueeze(-1).expand(-1, -1, count), torch.inf)
    if not chosen:
        return torch.zeros(b, 0, dtype=torch.int64, device=frames.device)
    return torch.cat(chosen, 1).sort(1).values
