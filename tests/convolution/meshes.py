"""Meshes of shapes whose Fourier transforms are known, and these transforms."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def box(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """A box in D dimensions as D! simplices: from corner to corner, one axis after another."""
    dim = len(low)
    corners = torch.tensor(list(itertools.product((0, 1), repeat=dim)), dtype=low.dtype)
    made = []
    for axes in itertools.permutations(range(dim)):
        place, run = 0, [0]
        for axis in axes:
            place += 1 << (dim - 1 - axis)
            run.append(place)
        made.append(run)
    return low + corners * (high - low), torch.tensor(made)


def box_transform(low: Tensor, high: Tensor, k: Tensor) -> Tensor:
    """A product of one sinc and one phase in each dimension."""
    middle, half = (low + high) / 2, (high - low) / 2
    sinc = 2 * half * torch.sinc(k * half / math.pi)
    return sinc.prod(-1) * torch.polar(torch.ones_like(k[..., 0]), -(k * middle).sum(-1))


def ball_transform(radius: float, k: Tensor) -> Tensor:
    """4 pi (sin kr - kr cos kr) / k^3 around the origin."""
    size = k.norm(dim=-1)
    x = size * radius
    return 4 * math.pi * radius**3 * (x.sin() - x * x.cos()) / x**3


def sphere(splits: int, radius: float) -> tuple[Tensor, Tensor]:
    """A sphere's triangles, corners outwards: an octahedron, each triangle cut into four `splits` times."""
    axes = torch.eye(3, dtype=torch.float64)
    points = [*axes.tolist(), *(-axes).tolist()]
    faces = []
    for sx, sy, sz in itertools.product((0, 3), repeat=3):
        face = [0 + sx, 1 + sy, 2 + sz]
        odd = (sx + sy + sz) // 3 % 2
        faces.append(face[::-1] if odd else face)
    for _ in range(splits):
        known: dict[tuple[int, int], int] = {}

        def middle(a: int, b: int, known=known) -> int:
            key = (min(a, b), max(a, b))
            if key not in known:
                half = [(x + y) / 2 for x, y in zip(points[a], points[b])]
                size = math.sqrt(sum(x * x for x in half))
                points.append([x / size for x in half])
                known[key] = len(points) - 1
            return known[key]

        cut = []
        for a, b, c in faces:
            ab, bc, ca = middle(a, b), middle(b, c), middle(c, a)
            cut += [[a, ab, ca], [ab, b, bc], [ca, bc, c], [ab, bc, ca]]
        faces = cut
    return radius * torch.tensor(points, dtype=torch.float64), torch.tensor(faces)


def filled(points: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """A closed surface as the tetrahedra that its triangles make with the origin."""
    origin = torch.full((len(faces), 1), len(points))
    return torch.cat((points, torch.zeros(1, 3, dtype=points.dtype))), torch.cat((origin, faces), 1)


def polygon(sides: int, radius: float, middle: Tensor) -> tuple[Tensor, Tensor]:
    """A regular polygon as triangles around its middle."""
    turn = torch.arange(sides, dtype=torch.float64) * (2 * math.pi / sides)
    rim = middle + radius * torch.stack((turn.cos(), turn.sin()), 1)
    number = torch.arange(sides)
    faces = torch.stack((torch.full_like(number, sides), number, (number + 1) % sides), 1)
    return torch.cat((rim, middle.unsqueeze(0))), faces
