"""Clips for models that go from an image to a video: moving shapes, and photographs panned over."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.convolution.photographs import crops
from tilewise.data.shapes import moving_shapes

FRAMES, SIDE, SPEED = 5, 16, 1.6


def clips(count: int, seed: int) -> Tensor:
    """`[count, FRAMES, SIDE, SIDE, 3]` within [-1, 1], of moving shapes; no two seeds below 2**40 share one."""
    made = moving_shapes(
        count, seed * 1024, frames=FRAMES, height=SIDE, width=SIDE, shapes=2, materials=2, speed=SPEED
    )
    return made.pixels


def panned(count: int, seed: int) -> Tensor:
    """The same of photographs, seen through a window that travels as fast as shapes do."""
    speed = 2 * SPEED
    room = int(speed * (FRAMES - 1)) + 1
    wide = 2 * crops(count, SIDE + room, seed)
    gen = torch.Generator().manual_seed(seed)
    made = []
    for image, (y, x) in zip(wide, torch.rand(count, 2, generator=gen).tolist()):
        frames = []
        for k in range(FRAMES):
            top, left = (
                round((1 if share < 0.5 else 0) * (room - 1) + (2 * share - 1) * SPEED * k)
                for share in (y, x)
            )
            frames.append(image[:, top : top + SIDE, left : left + SIDE])
        made.append(torch.stack(frames))
    return torch.stack(made).movedim(2, 4)
