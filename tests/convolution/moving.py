"""Clips for models that go from an image to a video: moving grain and shapes, and photographs panned over."""

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


def grain(count: int, seed: int) -> Tensor:
    """The same of two discs before a plain ground, whose mean is the ground's: they differ by their grain alone, of
    a contrast and tint of their own, and travel as fast as shapes do."""
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=gen)

    ground = 1.2 * draw(1, 1, 1, 3) - 0.6
    clip, batch = ground.expand(count, FRAMES, SIDE, SIDE, 3), torch.arange(count).view(-1, 1, 1, 1)
    along = torch.arange(SIDE).view(1, 1, -1)
    for _ in range(2):
        at, speed = 3 + (SIDE - 6) * draw(2, 1, 1), SPEED * (2 * draw(2, 1, 1) - 1)
        radius, contrast = 3 + 3 * draw(1, 1, 1), draw(1, 1, 1, 1) * (0.4 + 0.6 * draw(1, 1, 1, 3))
        moved = (speed * torch.arange(FRAMES).view(1, 1, -1, 1)).round().long()
        y, x = (along - moved).unbind(1)  # on the disc's own surface, [b, t, side]
        y, x = y.unsqueeze(3), x.unsqueeze(2)
        cover = (y - at[:, :1]).square() + (x - at[:, 1:]).square() < radius.square()
        signs = (2 * (draw(40, 40) < 0.5).float() - 1)[batch, y % 40, x % 40]
        clip = torch.where(cover.unsqueeze(4), ground + contrast * signs.unsqueeze(4), clip)
    return clip


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
