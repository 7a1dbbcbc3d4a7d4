"""Street scenes as voxels, small networks over them and how they are marked: for training and tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.data.scenes import CLASSES, GOES, WAITS, street_scenes
from tilewise.recurrence import LION, ScatterFormer, SubmanifoldConv3d, Voxels, voxelize
from tilewise.recurrence.lion import places

WEIGHTS = Path(__file__).parent / "weights"
CELL, FAR = 0.5, 10.0  # metres: a voxel's side; how far off a signal is called far
WIDTH = 20


@dataclass(frozen=True)
class Streets:
    """Voxels of scenes, and for each its class, the way to its vehicle's middle (y, x, in metres) and its
    distance from the scene's signal."""

    voxels: Voxels
    label: Tensor
    middle: Tensor
    distance: Tensor

    @property
    def vehicle(self) -> Tensor:
        """Bool `[M]`: voxels of vehicles."""
        return (self.label == WAITS) | (self.label == GOES)


def streets(count: int, seed: int) -> Streets:
    scenes = street_scenes(count, seed)
    cells = round(scenes.extent / CELL)
    voxels, owner = voxelize(
        scenes.points, scenes.sample, low=(0, 0, 0), size=(CELL,) * 3, shape=(count, 8, cells, cells)
    )
    label = torch.zeros(len(voxels), dtype=torch.int64).scatter_reduce(0, owner, scenes.label, "amax")
    vehicle = torch.full((len(voxels),), -1).scatter_reduce(0, owner, scenes.vehicle, "amax")
    at = (voxels.coords[:, 2:] + 0.5) * CELL  # y, x
    middle = scenes.boxes[vehicle.clamp(min=0)][:, [1, 0]] - at
    signal = scenes.signals[voxels.coords[:, 0]][:, [1, 0]]
    return Streets(voxels, label, middle, (signal - at).norm(dim=1))


class Net(nn.Module):
    """A backbone over a projection of each voxel; classes and ways from what it gives.

    `kind`: "lion"; "lion-apart", whose groups are of one voxel, so that recurrences read nothing but it;
    "lion-flat", whose descriptors see no neighbours; "scatter", and "scatter-apart" without what crosses
    windows.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(7, WIDTH), nn.LayerNorm(WIDTH), nn.GELU())
        self.near = SubmanifoldConv3d(WIDTH, WIDTH) if kind.startswith("scatter") else None
        if kind.startswith("scatter"):
            self.body: nn.Module = ScatterFormer(
                WIDTH, layers=4, window=(8, 16, 16), across=kind == "scatter"
            )
        else:
            self.body = LION(
                WIDTH, blocks=1, kernel=(1, 1, 1) if kind == "lion-flat" else (3, 3, 3), window=(8, 16, 16),
                group=1 if kind == "lion-apart" else 1024, options={"heads": 2, "rank": 4, "temper": 32.0},
            )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, len(CLASSES) + 2))

    def first(self, voxels: Voxels) -> Voxels:
        """What the body is given, of each voxel alone: what its points are like, and its place."""
        return voxels.with_features(self.stem(torch.cat((voxels.features, places(voxels)), 1)))

    def forward(self, voxels: Voxels) -> tuple[Tensor, Tensor]:
        """Logits `[M, classes]` and ways in metres `[M, 2]` of the voxels given."""
        first = self.first(voxels)
        made = self.body(first if self.near is None else self.near(first))
        features = made.features
        if made.shape != voxels.shape:  # coarser, with new voxels: each looks up the one it went into
            step = -(-voxels.shape[1] // made.shape[1])
            coarse = voxels.coords.div(voxels.coords.new_tensor([1, step, 1, 1]), rounding_mode="floor")
            features = features[made.find(coarse)]
        told = self.head(torch.cat((first.features, features), 1))
        return told[:, : len(CLASSES)], 4 * told[:, len(CLASSES) :]


def loss(net: Net, scene: Streets) -> Tensor:
    logits, way = net(scene.voxels)
    vehicle = scene.vehicle
    return F.cross_entropy(logits, scene.label) + F.smooth_l1_loss(way[vehicle], scene.middle[vehicle])


@dataclass(frozen=True)
class Marks:
    """Shares of voxels named rightly: all; those of vehicles whose signal is far, of the two kinds of
    vehicle; and the mean error of the way to the vehicle's middle, in metres."""

    all: float
    far: float
    way: float

    @classmethod
    @torch.no_grad()
    def of(cls, net: Net, scene: Streets) -> Marks:
        logits, way = net(scene.voxels)
        far = scene.vehicle & (scene.distance > FAR)
        named = logits[far][:, [WAITS, GOES]].argmax(1) + WAITS
        error = (way - scene.middle)[scene.vehicle].norm(dim=1)
        return cls(
            (logits.argmax(1) == scene.label).float().mean().item(),
            (named == scene.label[far]).float().mean().item(),
            error.mean().item(),
        )


def trained(kind: str) -> Net:
    """The network that training/train_points.py made."""
    net = Net(kind)
    found = load_file(WEIGHTS / f"points-{kind}.safetensors")
    net.load_state_dict({name: value.float() for name, value in found.items()})
    return net.eval()
