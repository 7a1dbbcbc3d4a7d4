"""Clips of moving, occluding, textured shapes over a moving background, generated to a seed.

A clip has a few materials: a pattern of two colours. One, dark, covers the background, which drifts; the shapes
share the others, which are vivid, so the same material is found at several places that move apart. A nearer shape
covers a farther one, and every pattern moves and turns with its shape. Three relations between pixels are therefore
worth attending to: neighbours within a frame, the same surface in other frames, and other shapes of one material.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PATTERNS = ("plain", "stripes", "checks")
HUES = ((1, -1, -1), (-1, 1, -1), (-1, -1, 1), (1, 1, -1), (1, -1, 1), (-1, 1, 1))  # red to cyan
OUTLINES = ("disc", "square", "diamond", "ring")
RADII = (3.5, 8.0)  # pixels
WAVELENGTHS = (6.0, 12.0)  # pixels of one period of a pattern
SPEED = 1.6  # pixels per frame along an axis, at most
SPIN = 0.25  # radians per frame, at most


@dataclass(frozen=True, eq=False)
class Clips:
    """Clips and what is seen in them.

    Attributes:
        pixels: float32 `[B, T, H, W, 3]`, red, green and blue in [-1, 1].
        owner: int64 `[B, T, H, W]`, whose surface a pixel shows: 0 the background, i the i-th shape. At an edge,
            where colours are mixed, the one that covers more than half.
        material: int64 `[B, T, H, W]`, of which material it is: 0 the background's, 1 and up those of shapes.
    """

    pixels: Tensor
    owner: Tensor
    material: Tensor


def moving_shapes(
    count: int = 1,
    seed: int = 0,
    *,
    frames: int = 8,
    height: int = 32,
    width: int = 32,
    shapes: int = 5,
    materials: int = 2,
    speed: float = SPEED,
) -> Clips:
    """`count` clips; clip i is the one of seed `seed + i`, whatever `count` is.

    Sizes are in pixels, so a larger picture shows more room, not larger shapes. Centres travel in a straight line
    and turn back at the border; radii lie in 3.5 to 8 pixels, periods of patterns in 6 to 12.
    A later shape lies nearer, and the first shapes of a clip are the same however many follow.

    Args:
        count: clips, at least 0. seed: of the first clip, 0 to 2**62.
        frames, height, width: size of a clip, each at least 1.
        shapes: shapes in a clip, at least 0. materials: how many the shapes share, at least 1.
        speed: pixels per frame that a shape moves at most along each axis, and the background at half of it;
            0 keeps everything in place (shapes still turn).

    Raises ValueError or TypeError for a setting outside these bounds.
    """
    for name, value, least in (
        ("count", count, 0), ("seed", seed, 0), ("frames", frames, 1), ("height", height, 1),
        ("width", width, 1), ("shapes", shapes, 0), ("materials", materials, 1),
    ):  # fmt: skip
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < least or value > 2**62:
            raise ValueError(f"{name} must be at least {least} and at most 2**62, got {value}")
    if not 0 <= speed < math.inf:
        raise ValueError(f"speed must be a number >= 0, pixels per frame, got {speed!r}")
    surfaces, things = _draw(count, seed, shapes, materials)
    time = torch.arange(frames).view(1, -1, 1, 1).float()
    y = torch.arange(height).view(1, 1, -1, 1) + 0.5
    x = torch.arange(width).view(1, 1, 1, -1) + 0.5
    size = (count, frames, height, width)
    pixels = torch.zeros(*size, 3)
    owner, material = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    for number in range(shapes + 1):
        thing = _Thing(things[:, number])
        u, v = thing.local(time, y, x, height, width, speed, still=number == 0)
        which = torch.zeros_like(thing.material(materials)) if number == 0 else thing.material(materials)
        look = surfaces[torch.arange(count), which]
        if number == 0:
            pixels = _paint(look, u, v, dark=True).expand(*size, 3).clone()
            continue
        cover = thing.cover(u, v).expand(size)
        pixels = torch.lerp(pixels, _paint(look, u, v, dark=False), cover.unsqueeze(-1))
        owner = owner.masked_fill(cover > 0.5, number)
        material = torch.where(cover > 0.5, which.view(-1, 1, 1, 1), material)
    return Clips(pixels, owner, material)


def _draw(count: int, seed: int, shapes: int, materials: int) -> tuple[Tensor, Tensor]:
    """All that is random, in [0, 1): looks `[B, 1 + materials, 11]`, things `[B, 1 + shapes, 9]`."""
    surfaces, things = [torch.empty(0, 1 + materials, 11)], [torch.empty(0, 1 + shapes, 9)]
    for number in range(seed, seed + count):
        g = torch.Generator().manual_seed(number)
        surfaces.append(torch.rand(1, 1 + materials, 11, generator=g))
        things.append(torch.rand(1, 1 + shapes, 9, generator=g))
    return torch.cat(surfaces), torch.cat(things)


def _between(share: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * share


class _Thing:
    """One shape (or the background) of every clip, made of its nine numbers in [0, 1): `[B, 9]`."""

    def __init__(self, given: Tensor) -> None:
        self.given = given
        self.column = given.t().view(9, -1, 1, 1, 1)

    def material(self, materials: int) -> Tensor:
        """Its material, int64 `[B]`, 1 to `materials`."""
        return 1 + (self.given[:, 8] * materials).long().clamp(max=materials - 1)

    def local(self, time, y, x, height, width, speed, still) -> tuple[Tensor, Tensor]:
        """Coordinates of every pixel on the thing's own surface, in pixels from its centre: `[B, T, H, W]` each.

        The background (`still`) neither turns nor turns back at a border.
        """
        cx, cy, vx, vy, angle, spin = self.column[:6]
        vx, vy = (_between(share, -1, 1) * (speed / 2 if still else speed) for share in (vx, vy))
        angle = angle * (2 * math.pi)
        if still:
            dx, dy = x - vx * time, y - vy * time
        else:
            angle = angle + _between(spin, -SPIN, SPIN) * time
            dx = x - _bounce(cx * width + vx * time, width)
            dy = y - _bounce(cy * height + vy * time, height)
        return angle.cos() * dx + angle.sin() * dy, angle.cos() * dy - angle.sin() * dx

    def cover(self, u: Tensor, v: Tensor) -> Tensor:
        """How much of a pixel the shape covers, in [0, 1]; edges are one pixel soft."""
        radius = _between(self.column[6], *RADII)
        kind = (self.column[7] * len(OUTLINES)).long()
        disc = (u.square() + v.square()).sqrt() - radius
        square = torch.maximum(u.abs(), v.abs()) - 0.85 * radius
        diamond = (u.abs() + v.abs() - 1.2 * radius) / math.sqrt(2)
        ring = (disc + 0.3 * radius).abs() - 0.3 * radius
        outside = torch.where(kind == 0, disc, torch.where(kind == 1, square, diamond))
        outside = torch.where(kind == 3, ring, outside)
        return (0.5 - outside).clamp(0, 1)


def _bounce(place: Tensor, length: int) -> Tensor:
    """A place on an endless line, folded back and forth into 0..length."""
    return length - (place.remainder(2 * length) - length).abs()


def _colour(hue: Tensor, change: Tensor, dark: bool) -> Tensor:
    """Colours `[B, 3]` within [-1, 1]: one of HUES for every `hue [B]`, changed a little by `change [B, 3]`."""
    vivid = 0.8 * torch.tensor(HUES)[(hue * len(HUES)).long()] + 0.4 * (change - 0.5)
    return 0.3 * vivid - 0.65 if dark else vivid


def _paint(look: Tensor, u: Tensor, v: Tensor, dark: bool) -> Tensor:
    """The colours of a material at surface coordinates `u, v [B, T, H, W]`: `look [B, 11]` to `[B, T, H, W, 3]`."""
    first, second = (
        _colour(look[:, at], look[:, 2 + 3 * at : 5 + 3 * at], dark).view(-1, 1, 1, 1, 3) for at in (0, 1)
    )
    kind, wavelength, angle = look[:, 8:].t().view(3, -1, 1, 1, 1)
    kind = (kind * len(PATTERNS)).long()
    turn, wave = angle * math.pi, 2 * math.pi / _between(wavelength, *WAVELENGTHS)
    a = (wave * (turn.cos() * u + turn.sin() * v)).sin()
    b = (wave * (turn.cos() * v - turn.sin() * u)).sin()
    mix = torch.tanh(2.5 * torch.where(kind == 1, a, 2 * a * b)) * 0.5 + 0.5
    return torch.lerp(first, second, mix.masked_fill(kind == 0, 0).unsqueeze(-1))
