"""Sparse voxels: windows at once against padded and looped ones, groups packed against looped ones.

`python benchmarks/points.py` prints times of forward and backward on one thread; under a minute on a quiet
machine.
Windows are those of generated street scenes: most hold few voxels, some hundreds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from harness import race
from torch import Tensor

from tilewise.data.scenes import street_scenes
from tilewise.recurrence import LinearGroupRNN, Voxels, groups, scattered_attention, voxelize, windows

HEADS, DIM = 4, 16
WINDOW = (16, 24, 24)


def scene(samples: int) -> Voxels:
    """Voxels of a quarter of a metre; the ground is hit less often the farther it is from the middle, where
    the laser stands."""
    drawn = street_scenes(samples, 0, extent=48.0, ground=8.0, vehicles=12)
    away = (drawn.points[:, :2] - 24.0).norm(dim=1)
    hit = torch.rand(len(away)) < (5 / away).square()
    voxels, _ = voxelize(
        drawn.points[hit], drawn.sample[hit], low=(0, 0, 0), size=(0.25,) * 3, shape=(samples, 16, 192, 192)
    )
    return voxels


def padded(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Every window padded to the longest."""
    lengths = offsets[1:] - offsets[:-1]
    real = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    places = (offsets[:-1].unsqueeze(1) + torch.arange(real.shape[1])).clamp(max=len(q) - 1)
    q, k, v = (x[places].masked_fill(~real[..., None, None], 0).transpose(1, 2) for x in (q, k, v))
    below = q @ k.sum(2, keepdim=True).mT
    return (q @ (k.mT @ v) / below.masked_fill(below == 0, 1)).transpose(1, 2)[real]


def looped(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """One window after the other."""
    parts = []
    for start, end in itertools.pairwise(offsets.tolist()):
        a, b, c = (x[start:end].transpose(0, 1) for x in (q, k, v))
        below = a @ b.sum(1, keepdim=True).mT
        parts.append((a @ (b.mT @ c) / below.masked_fill(below == 0, 1)).transpose(0, 1))
    return torch.cat(parts)


def trained(
    run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, offsets: Tensor
) -> Callable[[], None]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    return lambda: run(*leaves, offsets).sum().backward()


def attention(setting: str, offsets: Tensor) -> None:
    lengths = offsets[1:] - offsets[:-1]
    total = int(offsets[-1])
    q, k, v = torch.randn(3, total, HEADS, DIM)
    q, k = q.relu(), k.relu()
    said = f"{setting}: {total:,} in {len(lengths)}, up to {int(lengths.max())}"
    for name, run in (("padded", padded), ("looped", looped)):
        torch.testing.assert_close(run(q, k, v, offsets), scattered_attention(q, k, v, offsets), msg=name)
    contenders = {
        "scattered": trained(scattered_attention, q, k, v, offsets),
        "padded": trained(padded, q, k, v, offsets),
        "looped": trained(looped, q, k, v, offsets),
    }
    race(said, contenders, {}, rounds=5)


def recurrence(voxels: Voxels, mixer: str, group: int) -> None:
    net = LinearGroupRNN(64, mixer, WINDOW, group, options={"heads": 4})
    own = voxels.with_features(torch.randn(len(voxels), 64))

    def alone() -> None:
        x = own.features
        for axis, norm, (there, back) in zip(("x", "y"), net.norms, net.mixers):
            lineup, lined = groups(own, WINDOW, group, axis=axis), []
            for piece in lineup.line_up(norm(x)).split(lineup.lengths.tolist()):
                part = piece.unsqueeze(0)
                lined.append(there(part)[0] + back(part.flip(1))[0].flip(1))
            x = x + lineup.put_back(torch.cat(lined, 1)[0])
        x.sum().backward()

    said = f"{mixer}, {len(voxels):,} voxels in groups of {group}"
    race(said, {"packed": lambda: net(own).features.sum().backward(), "looped": alone}, {}, rounds=3)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for samples in (1, 2, 4):
        attention("scenes", windows(scene(samples), WINDOW).offsets)
    attention("even windows", torch.arange(0, 64 * 300 + 1, 64))
    for mixer in ("gla", "gated-delta-net"):
        for group in (64, 1024):
            recurrence(scene(2), mixer, group)


if __name__ == "__main__":
    main()
