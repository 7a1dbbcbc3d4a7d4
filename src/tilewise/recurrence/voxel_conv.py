"""Submanifold convolution: sparse voxels look at their neighbours, and no new voxel comes to be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tilewise.recurrence.voxels import Voxels, cell_count, check_kernel


class SubmanifoldConv3d(nn.Module):
    """A 3-D convolution whose outputs are at the voxels that there are (Graham and van der Maaten, 2017,
    arXiv 1706.01307).

    Only pairs of voxels that are neighbours are multiplied, so the cost goes with those, not with the
    kernel's volume.

    Args:
        channels, out_channels: of features. kernel: (z, y, x), odd.
        depthwise: each channel by itself; out_channels equals channels. bias: whether to add one.

    `forward` takes `Voxels` with features `[M, channels]` and gives them with `[M, out_channels]`.

    Raises ValueError for sizes below 1, even kernels and depthwise convolutions that change the channels.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: Sequence[int] = (3, 3, 3),
        *,
        depthwise: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("out_channels", out_channels)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if depthwise and channels != out_channels:
            raise ValueError(
                "a depthwise convolution keeps its channels,"
                f" got channels {channels} and out_channels {out_channels}"
            )
        self.kernel, self.depthwise = check_kernel(kernel), depthwise
        count = cell_count(self.kernel)
        shape = (count, channels) if depthwise else (count, channels, out_channels)
        scale = (count * (1 if depthwise else channels)) ** -0.5
        self.weight = nn.Parameter(torch.randn(shape) * scale)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, voxels: Voxels) -> Voxels:
        counts, here, there = voxels.neighbours(self.kernel)
        seen, weight = voxels.features.index_select(0, there), self.weight.to(voxels.features.dtype)
        if self.depthwise:
            told = seen * weight.repeat_interleave(counts, 0)
        else:
            told = torch.cat([part @ w for part, w in zip(seen.split(counts.tolist()), weight)])
        out = told.new_zeros(len(voxels), told.shape[1]).index_add(0, here, told)
        return voxels.with_features(out if self.bias is None else out + self.bias.to(out.dtype))


def on_features(module: nn.Module, voxels: Voxels) -> Voxels:
    """What a module makes of each voxel's features."""
    made: Tensor = module(voxels.features)
    return voxels.with_features(made)
