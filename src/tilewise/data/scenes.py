"""Point clouds of small street scenes, generated to a seed, with what every point is.

A scene is a flat ground with vehicles, bushes, crates and posts, seen from above as a laser would: points lie
on surfaces, thin and unevenly. One signal stands somewhere: a post whose arm is raised or lowered. With a
raised arm all vehicles of the scene go, with a lowered one they wait. So where a vehicle's middle is can be
told from its own points, those of its far end included; whether it goes takes the signal, which may be far
away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GROUND, CLUTTER, LOWERED, RAISED, WAITS, GOES = range(6)
CLASSES = ("ground", "clutter", "lowered", "raised", "waits", "goes")
HEIGHT = 4.0  # metres
ECHO = (0.3, 0.4, 0.0, 1.0, 0.6, 0.6)  # of each class, how strongly its points reflect
ARMS = (1.6, 3.4)  # metres above ground of a lowered and a raised arm


@dataclass(frozen=True, eq=False)
class Scenes:
    """Points of several scenes.

    Attributes:
        points: float32 `[P, 4]`, x, y and z in metres, from 0 to `extent` (z to HEIGHT), and how strongly
            each reflects, around its class's ECHO; a raised arm shines, a lowered one is dark.
        sample: int64 `[P]`, of which scene. label: int64 `[P]`, a place in CLASSES.
        vehicle: int64 `[P]`, a row of `boxes`, or -1.
        boxes: float32 `[V, 5]`, the middle's x and y, length, width, and 0 for a length along x, 1 along y.
        signals: float32 `[S, 2]`, x and y of each scene's signal.
        extent: metres along x and y.
    """

    points: Tensor
    sample: Tensor
    label: Tensor
    vehicle: Tensor
    boxes: Tensor
    signals: Tensor
    extent: float


def street_scenes(
    count: int = 1,
    seed: int = 0,
    *,
    extent: float = 32.0,
    vehicles: int = 6,
    clutter: int = 8,
    ground: float = 0.7,
) -> Scenes:
    """`count` scenes; scene i is that of seed `seed + i`, whatever `count` is.

    Args:
        count: scenes, at least 0. seed: of the first, 0 to 2**62. extent: metres along x and y, at least 12.
        vehicles, clutter: of a scene, at least 0; fewer where no room is left.
        ground: points of the ground for each square metre.

    Raises ValueError or TypeError for a setting outside these bounds.
    """
    for name, value, least in (
        ("count", count, 0), ("seed", seed, 0), ("vehicles", vehicles, 0), ("clutter", clutter, 0)
    ):  # fmt: skip
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < least or value > 2**62:
            raise ValueError(f"{name} must be at least {least} and at most 2**62, got {value}")
    if not 12 <= extent < math.inf or not 0 <= ground < math.inf:
        raise ValueError(f"extent must be >= 12 and ground >= 0, got {extent!r} and {ground!r}")
    made = [_Scene(number, extent, vehicles, clutter, ground) for number in range(seed, seed + count)]
    starts = [0]
    for scene in made:
        starts.append(starts[-1] + len(scene.boxes))
    return Scenes(
        torch.cat([torch.empty(0, 4), *(scene.points for scene in made)]),
        torch.cat([torch.empty(0).long(), *(torch.full_like(s.label, i) for i, s in enumerate(made))]),
        torch.cat([torch.empty(0).long(), *(scene.label for scene in made)]),
        torch.cat([torch.empty(0).long(), *(_from(s.vehicle, start) for s, start in zip(made, starts))]),
        torch.tensor([box for scene in made for box in scene.boxes]).view(-1, 5),
        torch.tensor([scene.signal for scene in made]).view(-1, 2),
        extent,
    )


def _from(vehicle: Tensor, start: int) -> Tensor:
    return torch.where(vehicle >= 0, vehicle + start, -1)


class _Scene:
    """One scene: things are placed one after the other, none over another."""

    def __init__(self, seed: int, extent: float, vehicles: int, clutter: int, ground: float) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.extent = extent
        self.taken: list[tuple[float, float, float, float]] = []
        self.parts: list[tuple[Tensor, int, int]] = []
        self.boxes: list[tuple[float, float, float, float, float]] = []
        self.raised = self._draw() < 0.5
        self.signal = self._place(3.0, 3.0) or (extent / 2, extent / 2)
        self._add_signal()
        for _ in range(vehicles):
            self._add_vehicle()
        for _ in range(clutter):
            self._add_clutter()
        count = round(ground * extent * extent)
        floor = self._rand(count, 3) * torch.tensor([extent, extent, 0.1])
        self.parts.append((floor, GROUND, -1))
        self.points = torch.cat([points for points, _, _ in self.parts])
        self.label = torch.cat([torch.full((len(p),), label) for p, label, _ in self.parts])
        self.vehicle = torch.cat([torch.full((len(p),), which) for p, _, which in self.parts])
        limit = torch.tensor([extent, extent, HEIGHT])
        at = torch.minimum(self.points.clamp(min=0), limit - 1e-3)
        echo = torch.tensor(ECHO)[self.label] + 0.05 * torch.randn(len(at), generator=self.generator)
        self.points = torch.cat((at, echo.unsqueeze(1)), 1)

    def _rand(self, *size: int) -> Tensor:
        return torch.rand(*size, generator=self.generator)

    def _draw(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(self._rand(1))

    def _place(self, long: float, wide: float) -> tuple[float, float] | None:
        """The middle of a free rectangle, or None where twenty tries find no room."""
        for _ in range(20):
            x, y = (self._draw(size / 2, self.extent - size / 2) for size in (long, wide))
            gap = 0.6
            box = (x - long / 2 - gap, y - wide / 2 - gap, x + long / 2 + gap, y + wide / 2 + gap)
            if all(box[0] > b[2] or b[0] > box[2] or box[1] > b[3] or b[1] > box[3] for b in self.taken):
                self.taken.append(box)
                return x, y
        return None

    def _add_signal(self) -> None:
        x, y = self.signal
        along_y = self._draw() < 0.5
        post = torch.cat((0.1 * self._rand(24, 2), HEIGHT * self._rand(24, 1)), 1)
        arm = self._rand(30, 3) * torch.tensor([3.0, 0.1, 0.3]) + torch.tensor([-1.5, 0.0, ARMS[self.raised]])
        arm = arm[:, [1, 0, 2]] if along_y else arm
        self.parts.append(
            (torch.cat((post, arm)) + torch.tensor([x, y, 0.0]), RAISED if self.raised else LOWERED, -1)
        )

    def _add_vehicle(self) -> None:
        along_y = self._draw() < 0.5
        long, wide, high = self._draw(3.5, 10.0), self._draw(1.8, 2.4), self._draw(1.4, 2.0)
        middle = self._place(wide, long) if along_y else self._place(long, wide)
        if middle is None:
            return
        # Points on the sides and the roof; those of one side are few, as of a side that is turned away.
        count = round(9 * long)
        at = self._rand(count, 3) - 0.5
        face = (self._rand(count) * 6).long()  # 0, 1: ends; 2: a dim side; 3: a bright side; 4, 5: roof
        at[:, 0] = torch.where(face < 2, face - 0.5, at[:, 0])
        at[:, 1] = torch.where((face == 2) | (face == 3), face - 2.5, at[:, 1])
        at[:, 2] = torch.where(face > 3, torch.full((count,), 0.5), at[:, 2])
        at = at[(face != 2) | (self._rand(count) < 0.3)]
        at = at * torch.tensor([long, wide, high]) + torch.tensor([0.0, 0.0, high / 2 + 0.2])
        if self._draw() < 0.5:
            at[:, 1] = -at[:, 1]
        at = at[:, [1, 0, 2]] if along_y else at
        which = len(self.boxes)
        self.boxes.append((*middle, long, wide, float(along_y)))
        label = GOES if self.raised else WAITS
        self.parts.append((at + torch.tensor([*middle, 0.0]), label, which))

    def _add_clutter(self) -> None:
        kind = int(self._draw() * 3)
        middle = self._place(1.2, 1.2)
        if middle is None:
            return
        if kind == 0:  # a bush
            at = 0.35 * torch.randn(30, 3, generator=self.generator) + torch.tensor([0.0, 0.0, 0.7])
        elif kind == 1:  # a crate
            at = self._rand(30, 3) * torch.tensor([1.0, 1.0, 1.2]) - torch.tensor([0.5, 0.5, 0.0])
        else:  # a post without an arm
            at = torch.cat((0.1 * self._rand(24, 2), HEIGHT * self._rand(24, 1)), 1)
        self.parts.append((at + torch.tensor([*middle, 0.0]), CLUTTER, -1))
