"""LION: linear recurrences over long groups of sparse voxels, with convolutions for what a row cannot
show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tilewise.recurrence.model import MIXERS
from tilewise.recurrence.voxel_conv import SubmanifoldConv3d, on_features
from tilewise.recurrence.voxel_windows import AXES, groups
from tilewise.recurrence.voxels import Voxels, check_sizes, extend, merge

# (z, y, x) of the four cells at which each chosen voxel makes new ones.
DIAGONALS = ((0, 1, -1), (0, 1, 1), (0, -1, -1), (0, -1, 1))


class LinearGroupRNN(nn.Module):
    """A LION layer: a linear recurrence over large groups of voxels sorted along x, then along y.

    Liu et al., 2024, arXiv 2407.18232.

    Voxels are sorted by windows (`tilewise.recurrence.groups`) and cut into groups of equal size that may
    span many windows. Each group is a sequence of its own, all of them packed: `x + mixer(norm(x))`, with any
    mixer.

    Args:
        width: of the features. mixer: a name of `MIXERS`. options: its settings.
        window: (z, y, x) cells. group: voxels of a group. shift: move windows by half their size.
        both_ways: a second mixer of the kind reads each group from its end, as the authors' Mamba does; False
            reads once, as their RetNet does.

    Differs from the authors' code: a sample's last group is as long as it is, where they fill it up with
    voxels of the group before, and the norm stands before the mixer.

    Raises ValueError for unknown mixers and sizes that do not fit.
    """

    def __init__(
        self,
        width: int,
        mixer: str = "gla",
        window: Sequence[int] = (32, 13, 13),
        group: int = 1024,
        *,
        shift: bool = False,
        both_ways: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if mixer not in MIXERS:
            raise ValueError(f"mixer must be one of {', '.join(sorted(MIXERS))}, got {mixer!r}")
        self.window, self.group, self.shift = check_sizes("window", window), group, shift
        ways = 2 if both_ways else 1
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in AXES)
        self.mixers = nn.ModuleList(
            nn.ModuleList(MIXERS[mixer](width, **(options or {})) for _ in range(ways)) for _ in AXES
        )

    def forward(self, voxels: Voxels) -> Voxels:
        for axis, norm, mixers in zip(AXES, self.norms, self.mixers):
            lineup = groups(voxels, self.window, self.group, axis=axis, shift=self.shift)
            x = lineup.line_up(norm(voxels.features)).unsqueeze(0)
            read = mixers[0](x, cu_seqlens=lineup.offsets)[0]  # type: ignore[index]
            for back in mixers[1:]:  # type: ignore[index]
                turned = len(voxels) - lineup.offsets.flip(0)
                read = read + back(x.flip(1), cu_seqlens=turned)[0].flip(1)
            voxels = voxels.with_features(voxels.features + lineup.put_back(read[0]))
        return voxels


class SpatialDescriptor(nn.Module):
    """The 3-D spatial feature descriptor: submanifold convolution, layer norm, GELU.

    Sorting takes voxels that touch far apart; this puts what lies around each back into its features. A
    `kernel` of (1, 1, 1) sees no neighbours: the control.
    """

    def __init__(self, width: int, kernel: Sequence[int] = (3, 3, 3)) -> None:
        super().__init__()
        self.conv = SubmanifoldConv3d(width, width, kernel, bias=False)
        self.after = nn.Sequential(nn.LayerNorm(width), nn.GELU())

    def forward(self, voxels: Voxels) -> Voxels:
        return on_features(self.after, self.conv(voxels))


def foreground(voxels: Voxels, share: float) -> Tensor:
    """The voxels whose features' mean is largest, `floor(share * count)` of each sample; int64, by sample.

    Raises ValueError for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share!r}")
    response = voxels.features.detach().mean(1)
    order = response.argsort(descending=True, stable=True)
    order = order[voxels.coords[order, 0].argsort(stable=True)]
    counts, sample = voxels.counts, voxels.coords[order, 0]
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[sample]
    return order[rank < (share * counts[sample]).floor()]


def generate(voxels: Voxels, share: float = 0.2, steps: Sequence[Sequence[int]] = DIAGONALS) -> Voxels:
    """Voxel generation: empty voxels around those that answer most, for the next recurrence to fill.

    Each voxel of `foreground` makes one at each of `steps` (z, y, x) from it, where there is none yet;
    features are 0. A step that leaves the grid ends at its border, as in the authors' code.
    """
    chosen = voxels.coords[foreground(voxels, share)]
    moves = chosen.new_tensor([(0, *step) for step in steps])
    last = chosen.new_tensor(voxels.shape) - 1
    made = (chosen.unsqueeze(1) + moves).flatten(0, 1)
    return extend(voxels, torch.minimum(made.clamp(min=0), last))


class LIONBlock(nn.Module):
    """Layers at coarser and coarser voxels and back, as a U-Net.

    At each scale a position is added, then come a `LinearGroupRNN`, a `SpatialDescriptor` and voxel merging;
    on the way back a `LinearGroupRNN`, voxel expanding onto the features of the way down, and a layer norm.

    Args:
        width: of the features. scales: (z, y, x) factors of each merging; their number is the depth.
        kernel: of the descriptors. settings: of each `LinearGroupRNN`.

    Every second scale's windows are shifted. Differs from the authors' code: positions pass no batch norm.
    """

    def __init__(
        self,
        width: int,
        scales: Sequence[Sequence[int]] = ((2, 2, 2), (2, 2, 2)),
        kernel: Sequence[int] = (3, 3, 3),
        **settings: Any,
    ) -> None:
        super().__init__()
        self.scales = tuple(check_sizes("scales", scale) for scale in scales)
        depth = range(len(self.scales))
        self.positions = nn.ModuleList(
            nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width)) for _ in depth
        )
        self.down = nn.ModuleList(LinearGroupRNN(width, shift=i % 2 == 1, **settings) for i in depth)
        self.descriptors = nn.ModuleList(SpatialDescriptor(width, kernel) for _ in depth)
        self.merge_norms = nn.ModuleList(nn.LayerNorm(width) for _ in depth)
        self.up = nn.ModuleList(LinearGroupRNN(width, shift=i % 2 == 1, **settings) for i in depth)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in depth)

    def forward(self, voxels: Voxels) -> Voxels:
        kept: list[tuple[Voxels, Tensor]] = []
        for i, scale in enumerate(self.scales):
            voxels = voxels.with_features(voxels.features + self.positions[i](places(voxels)))
            voxels = self.down[i](voxels)
            coarse, owner = merge(self.descriptors[i](voxels), scale)
            kept.append((voxels, owner))
            voxels = on_features(self.merge_norms[i], coarse)
        for layer, norm in zip(self.up, self.norms):
            coarse = layer(voxels)
            voxels, owner = kept.pop()
            voxels = voxels.with_features(norm(voxels.features + coarse.features.index_select(0, owner)))
        return voxels


def places(voxels: Voxels) -> Tensor:
    """Each voxel's z, y and x within its grid, from -pi to pi; `[M, 3]`."""
    size = voxels.features.new_tensor(voxels.shape[1:])
    return (voxels.coords[:, 1:] / size - 0.5) * (2 * math.pi)


class LION(nn.Module):
    """LION's backbone (Liu et al., 2024, arXiv 2407.18232): blocks, each behind it voxel generation and
    merging of two layers into one, and a last `LinearGroupRNN`.

    Args:
        width: of the features. blocks: their number, 4 in the paper. scales, kernel, settings: of each
            `LIONBlock`.
        share: of the voxels that make new ones; 0 generates none.

    `forward` takes `Voxels` of `width` features and gives the voxels of the lowest resolution along z, new
    ones among them.
    """

    def __init__(
        self,
        width: int,
        blocks: int = 4,
        scales: Sequence[Sequence[int]] = ((2, 2, 2), (2, 2, 2)),
        kernel: Sequence[int] = (3, 3, 3),
        share: float = 0.2,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.share = share
        self.blocks = nn.ModuleList(LIONBlock(width, scales, kernel, **settings) for _ in range(blocks))
        self.descriptors = nn.ModuleList(SpatialDescriptor(width, kernel) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.last = LinearGroupRNN(width, **settings)

    def forward(self, voxels: Voxels) -> Voxels:
        for block, descriptor, norm in zip(self.blocks, self.descriptors, self.norms):
            voxels = generate(descriptor(block(voxels)), self.share)
            voxels = on_features(norm, merge(voxels, (2, 1, 1))[0])
        return self.last(voxels)
