"""Windows of sparse voxels, and voxels in a row: window by window, or in groups of equal size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.recurrence.voxels import Voxels, cell_count, check_sizes

AXES = ("x", "y")


@dataclass(frozen=True, eq=False)
class Lineup:
    """Voxels in a row, cut into pieces.

    Attributes:
        order: int64 `[M]`, the voxel at each place. offsets: int64 `[S + 1]`: piece s is places offsets[s] to
            offsets[s + 1] - 1, as `cu_seqlens` says it.
    """

    order: Tensor
    offsets: Tensor

    @property
    def lengths(self) -> Tensor:
        """Voxels of each piece, int64 `[S]`."""
        return self.offsets[1:] - self.offsets[:-1]

    def line_up(self, x: Tensor) -> Tensor:
        """`[M, ...]` in this order."""
        return x.index_select(0, self.order)

    def put_back(self, x: Tensor) -> Tensor:
        """The reverse."""
        return torch.zeros_like(x).index_copy(0, self.order, x)


def windows(voxels: Voxels, size: Sequence[int], *, axis: str = "x", shift: bool = False) -> Lineup:
    """Voxels sorted by windows of `size` (z, y, x) cells; a piece is a window that is not empty.

    Along `axis` "x", windows come by x, then y, then z, and so do the voxels within each; along "y" by y,
    then x, then z. `shift` moves windows by half their size. Samples come one after the other.
    """
    order, window = _sorted(voxels, size, axis, shift)
    first = torch.ones(len(order) + 1, dtype=torch.bool, device=order.device)
    if len(order):
        first[1:-1] = (window[1:] != window[:-1]).any(1)
        return Lineup(order, first.nonzero()[:, 0])
    return Lineup(order, first.new_zeros(1, dtype=torch.int64))


def groups(
    voxels: Voxels, size: Sequence[int], group: int, *, axis: str = "x", shift: bool = False
) -> Lineup:
    """The same order cut into groups of `group` voxels, whatever windows they are of; a piece is a group.

    Each sample begins a group, and its last one holds what is left.
    """
    if not isinstance(group, int) or isinstance(group, bool) or group < 1:
        raise ValueError(f"group must be an integer >= 1, got {group!r}")
    order, window = _sorted(voxels, size, axis, shift)
    counts = voxels.counts
    start = (counts.cumsum(0) - counts)[window[:, 0]]
    place = torch.arange(len(order), device=order.device)
    firsts = ((place - start) % group == 0).nonzero()[:, 0]
    return Lineup(order, torch.cat((firsts, firsts.new_full((1,), len(order)))))


def _sorted(voxels: Voxels, size: Sequence[int], axis: str, shift: bool) -> tuple[Tensor, Tensor]:
    """The order, and for each place (sample, window along three axes) `[M, 4]`."""
    sizes = check_sizes("size", size)
    if axis not in AXES:
        raise ValueError(f"axis must be one of {', '.join(map(repr, AXES))}, got {axis!r}")
    moved = voxels.coords[:, 1:] + voxels.coords.new_tensor([n // 2 if shift else 0 for n in sizes])
    step = moved.new_tensor(sizes)
    window, within = moved.div(step, rounding_mode="floor"), moved.remainder(step)
    major = (2, 1, 0) if axis == "x" else (1, 2, 0)  # of (z, y, x)
    # One number to sort by; windows that are shifted reach one further.
    spans = [n // step + 2 for n, step in zip(voxels.shape[1:], sizes)]
    if cell_count((voxels.shape[0], *spans, *sizes)) >= 2**63:
        raise ValueError(
            f"size {tuple(sizes)} cuts a grid of {voxels.shape} into more cells than int64 counts"
        )
    code = voxels.coords[:, 0]
    for at in major:
        code = code * spans[at] + window[:, at]
    for at in major:
        code = code * sizes[at] + within[:, at]
    order = code.argsort()
    return order, torch.cat((voxels.coords[:, :1], window), 1)[order]
