"""Street scenes as voxels, small networks over them and how they are marked: for training and tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.data.scenes import CLASSES, GOES, RAISED, WAITS, street_scenes
from tilewise.recurrence import LION, LinearGroupRNN, ScatterFormer, SubmanifoldConv3d, Voxels, voxelize
from tilewise.recurrence.lion import places

WEIGHTS = Path(__file__).parent / "weights"
CELL, FAR = 0.5, 6.0  # metres: a voxel's side; how far off a signal is called far
WIDTH = 20
WEIGHT = [0.5, 1.0, 8.0, 8.0, 2.0, 2.0]  # of each class in training: signals are few


@dataclass(frozen=True)
class Streets:
    """Voxels of scenes, and for each its class, whether its scene's signal is raised, the way to its
    vehicle's middle (y, x, in metres) and its distance from the signal."""

    voxels: Voxels
    label: Tensor
    raised: Tensor
    middle: Tensor
    distance: Tensor

    @property
    def vehicle(self) -> Tensor:
        """Bool `[M]`: voxels of vehicles."""
        return (self.label == WAITS) | (self.label == GOES)


def streets(count: int, seed: int) -> Streets:
    scenes = street_scenes(count, seed, extent=16.0, vehicles=2, clutter=3, ground=1.5)
    cells = round(scenes.extent / CELL)
    voxels, owner = voxelize(
        scenes.points, scenes.sample, low=(0, 0, 0), size=(CELL,) * 3, shape=(count, 8, cells, cells)
    )
    label = torch.zeros(len(voxels), dtype=torch.int64).scatter_reduce(0, owner, scenes.label, "amax")
    vehicle = torch.full((len(voxels),), -1).scatter_reduce(0, owner, scenes.vehicle, "amax")
    at = (voxels.coords[:, 2:] + 0.5) * CELL  # y, x
    middle = scenes.boxes[vehicle.clamp(min=0)][:, [1, 0]] - at
    signal = scenes.signals[voxels.coords[:, 0]][:, [1, 0]]
    raised = torch.zeros(count, dtype=torch.bool)
    raised[scenes.sample[scenes.label == RAISED]] = True
    return Streets(voxels, label, raised[voxels.coords[:, 0]], middle, (signal - at).norm(dim=1))


class Alone(nn.Module):
    """What stands in for a `LinearGroupRNN`: for each of its two axes a network of every voxel alone."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
            )
            for _ in range(2)
        )

    def forward(self, voxels: Voxels) -> Voxels:
        x = voxels.features
        for part in self.parts:
            x = x + part(x)
        return voxels.with_features(x)


class Net(nn.Module):
    """A backbone over a projection of each voxel; classes and ways from what it gives.

    `kind`: "lion"; "lion-apart", with a network of each voxel alone, of as many weights, in the place of
    every recurrence; "lion-flat", whose descriptors see no neighbours; "scatter", and "scatter-apart" without
    what crosses windows.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, WIDTH), nn.LayerNorm(WIDTH), nn.GELU())
        self.near = SubmanifoldConv3d(WIDTH, WIDTH) if kind.startswith("scatter") else None
        if kind.startswith("scatter"):
            self.body: nn.Module = ScatterFormer(WIDTH, layers=4, window=(8, 8, 8), across=kind == "scatter")
        else:
            self.body = LION(
                WIDTH, blocks=1, kernel=(1, 1, 1) if kind == "lion-flat" else (3, 3, 3), window=(8, 8, 8),
                group=1024, options={"heads": 2, "rank": 4, "temper": 64.0},
            )  # fmt: skip
        if kind == "lion-apart":
            layers = [name for name, part in self.body.named_modules() if isinstance(part, LinearGroupRNN)]
            for name in layers:
                self.body.set_submodule(name, Alone())
        self.head = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, len(CLASSES) + 3))

    def first(self, voxels: Voxels) -> Voxels:
        """What the body is given, of each voxel alone: what its points are like, and its place."""
        return voxels.with_features(self.stem(torch.cat((voxels.features, places(voxels)), 1)))

    def forward(self, voxels: Voxels) -> tuple[Tensor, Tensor, Tensor]:
        """Of each voxel given: logits of its class `[M, classes]`, the logit that its scene's signal is
        raised `[M]`, the way to its vehicle's middle in metres `[M, 2]`."""
        first = self.first(voxels)
        made = self.body(first if self.near is None else self.near(first))
        features = made.features
        if made.shape != voxels.shape:  # coarser, with new voxels: each looks up the one it went into
            step = -(-voxels.shape[1] // made.shape[1])
            coarse = voxels.coords.div(voxels.coords.new_tensor([1, step, 1, 1]), rounding_mode="floor")
            features = features[made.find(coarse)]
        told = self.head(torch.cat((first.features, features), 1))
        count = len(CLASSES)
        return told[:, :count], told[:, count], 4 * told[:, count + 1 :]


def loss(net: Net, scene: Streets) -> Tensor:
    logits, raised, way = net(scene.voxels)
    named = F.cross_entropy(logits, scene.label, weight=torch.tensor(WEIGHT))
    known = F.binary_cross_entropy_with_logits(raised, scene.raised.float())
    return named + known + F.smooth_l1_loss(way[scene.vehicle], scene.middle[scene.vehicle])


@dataclass(frozen=True)
class Marks:
    """Shares of voxels told rightly: their class; whether the signal is raised, near it and far from it; and
    the mean error of the way to a vehicle's middle, in metres."""

    named: float
    near: float
    far: float
    way: float

    @classmethod
    @torch.no_grad()
    def of(cls, net: Net, scene: Streets) -> Marks:
        logits, raised, way = net(scene.voxels)
        known = ((raised > 0) == scene.raised).float()
        # Vehicles that wait and that go look alike; whether they do is the signal's affair.
        same = logits.argmax(1).clamp(max=WAITS) == scene.label.clamp(max=WAITS)
        error = (way - scene.middle)[scene.vehicle].norm(dim=1)
        far = scene.distance > FAR
        return cls(
            same.float().mean().item(),
            known[~far].mean().item(),
            known[far].mean().item(),
            error.mean().item(),
        )


def trained(kind: str) -> Net:
    """The network that training/train_points.py made."""
    net = Net(kind)
    found = load_file(WEIGHTS / f"points-{kind}.safetensors")
    net.load_state_dict({name: value.float() for name, value in found.items()})
    return net.eval()
