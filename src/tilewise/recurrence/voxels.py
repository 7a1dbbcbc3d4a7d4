"""Sparse voxels: cells of a grid that hold something, by their coordinates; no grid is ever allocated."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Voxels:
    """Occupied cells of a batch of grids, in any order.

    Memory and time go with the cells that are occupied, M, whatever the grid's size: a cell is found by a
    binary search among the sorted numbers of the others.

    Attributes:
        coords: integers `[M, 4]`, the cells' (sample, z, y, x), each once; kept as int64.
        features: `[M, C]`, floating.
        shape: (samples, depth, height, width) of the grids.

    Raises ValueError and TypeError for coordinates that lie outside the grids or occur twice, for shapes that
    do not fit, and for grids of 2^62 cells and more.
    """

    coords: Tensor
    features: Tensor
    shape: tuple[int, int, int, int]
    _cells: _Cells | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        shape = check_shape(self.shape)
        features, coords = self.features, self.coords
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise TypeError(f"features must be a floating tensor, got {_kind(features)}")
        if not isinstance(coords, Tensor) or coords.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"coords must be an int32 or int64 tensor, got {_kind(coords)}")
        if coords.ndim != 2 or coords.shape[1] != 4 or features.ndim != 2 or len(features) != len(coords):
            raise ValueError(
                "coords [M, 4] and features [M, C] do not fit:"
                f" got {tuple(coords.shape)} and {tuple(features.shape)}"
            )
        if coords.device != features.device:
            raise TypeError(f"coords are on {coords.device}, features on {features.device}")
        object.__setattr__(self, "shape", shape)
        if self._cells is None:
            object.__setattr__(self, "coords", coords.long())
            object.__setattr__(self, "_cells", _Cells.of(self.coords, shape))

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def cells(self) -> _Cells:
        """What finds cells; shared by all voxels made of these by `with_features`."""
        if self._cells is None:  # set by __post_init__
            raise RuntimeError("voxels without an index of their cells")
        return self._cells

    def with_features(self, features: Tensor) -> Voxels:
        """The same cells with other features `[M, C']`; what is known about their places stays known."""
        return replace(self, features=features)

    def find(self, coords: Tensor) -> Tensor:
        """Which voxel lies at each of `coords [..., 4]`: int64 `[...]`, -1 where none does or none could."""
        return self.cells.find(coords)

    def neighbours(self, kernel: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of voxels that are neighbours, for a box of `kernel` (z, y, x) odd numbers of cells.

        Returns int64 `counts [K]`, `here [P]` and `there [P]`: pairs are sorted by offset, of which there are
        K = z * y * x, with x the fastest; `counts` says how many have each.
        """
        return self.cells.neighbours(check_kernel(kernel))

    @property
    def counts(self) -> Tensor:
        """Voxels of each sample, int64 `[B]`."""
        return torch.bincount(self.coords[:, 0], minlength=self.shape[0])


@dataclass(frozen=True, eq=False)
class _Cells:
    """Finds cells: their numbers in the grid, sorted, and pairs of neighbours already looked up."""

    coords: Tensor
    shape: tuple[int, ...]
    numbers: Tensor  # [m], rising
    order: Tensor  # [m]: which voxel has each
    known: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, coords: Tensor, shape: tuple[int, ...]) -> _Cells:
        if not cell_count(shape) < 2**62:
            raise ValueError(f"shape must have less than 2^62 cells, got {shape}")
        if len(coords):
            low, high = coords.amin(0).tolist(), coords.amax(0).tolist()
            if min(low) < 0 or any(most >= size for most, size in zip(high, shape)):
                raise ValueError(f"coords must lie within {shape}, got values from {low} to {high}")
        numbers, order = number(coords, shape).sort()
        if (numbers[1:] == numbers[:-1]).any():
            twice = coords[order[1:][numbers[1:] == numbers[:-1]][0]].tolist()
            raise ValueError(
                f"coords must be different cells, got {twice} twice (voxelize and merge join such)"
            )
        return cls(coords, shape, numbers, order)

    def find(self, coords: Tensor) -> Tensor:
        size = torch.tensor(self.shape, device=coords.device)
        inside = ((coords >= 0) & (coords < size)).all(-1)
        if not len(self.numbers):
            return torch.full_like(inside, -1, dtype=torch.int64)
        wanted = number(coords, self.shape)
        place = torch.searchsorted(self.numbers, wanted).clamp(max=len(self.numbers) - 1)
        return torch.where(inside & (self.numbers[place] == wanted), self.order[place], -1)

    def neighbours(self, kernel: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        if kernel not in self.known:
            # Half of the offsets: j lies at offset o from i where i lies at -o from j.
            half = offsets_of(kernel, self.coords.device)[: kernel[0] * kernel[1] * kernel[2] // 2]
            counts, here, there = [], [], []
            for offset in half:
                found = self.find(self.coords + offset)
                one = (found >= 0).nonzero()[:, 0]
                counts.append(len(one))
                here.append(one)
                there.append(found[one])
            own = torch.arange(len(self.coords), device=self.coords.device)
            sizes = torch.tensor([*counts, len(own), *counts[::-1]], device=own.device)
            self.known[kernel] = (
                sizes, torch.cat([*here, own, *there[::-1]]), torch.cat([*there, own, *here[::-1]])
            )  # fmt: skip
        return self.known[kernel]


def number(coords: Tensor, shape: Sequence[int]) -> Tensor:
    """A cell's place in the grid read sample by sample, x fastest: int64 of `coords [..., 4]`."""
    made = coords[..., 0].long()
    for axis in (1, 2, 3):
        made = made * shape[axis] + coords[..., axis]
    return made


def cells_at(numbers: Tensor, shape: Sequence[int]) -> Tensor:
    """The reverse of `number`: int64 `[..., 4]`."""
    made = []
    for axis in (3, 2, 1):
        made.append(numbers % shape[axis])
        numbers = numbers.div(shape[axis], rounding_mode="floor")
    return torch.stack([numbers, *made[::-1]], -1)


def offsets_of(kernel: Sequence[int], device: torch.device | None = None) -> Tensor:
    """(0, z, y, x) of every cell of a box of odd sizes, from its middle; int64 `[K, 4]`, x fastest."""
    ranges = [range(-(size // 2), size // 2 + 1) for size in kernel]
    return torch.tensor([(0, *cell) for cell in itertools.product(*ranges)], device=device)


def cell_count(shape: Sequence[int]) -> int:
    """Cells of a grid."""
    made = 1
    for size in shape:
        made *= size
    return made


def check_shape(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """(samples, z, y, x) of grids; ValueError unless four integers above 0."""
    made = tuple(shape)
    if len(made) != 4 or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in made):
        raise ValueError(f"shape must be four integers >= 1 (samples, z, y, x), got {shape!r}")
    return made


def check_kernel(kernel: Sequence[int]) -> tuple[int, int, int]:
    """A box's (z, y, x); ValueError unless three odd numbers."""
    made = check_sizes("kernel", kernel)
    if not all(size % 2 for size in made):
        raise ValueError(f"kernel must be three odd integers (z, y, x), got {kernel!r}")
    return made


def check_sizes(name: str, sizes: Sequence[int]) -> tuple[int, int, int]:
    """Three integers above 0; ValueError otherwise."""
    made = tuple(sizes)
    if len(made) != 3 or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in made):
        raise ValueError(f"{name} must be three integers >= 1 (z, y, x), got {sizes!r}")
    return made


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def voxelize(
    points: Tensor,
    sample: Tensor,
    *,
    low: Sequence[float],
    size: Sequence[float],
    shape: Sequence[int],
) -> tuple[Voxels, Tensor]:
    """Points to voxels.

    Args:
        points: `[P, 3 + F]`, x, y, z and whatever else was measured. sample: int64 `[P]`, which of the batch
            each belongs to.
        low: (x, y, z) of the grid's first corner. size: (x, y, z) of a voxel.
        shape: (samples, z, y, x) of the grids; points outside are left out.

    Returns:
        Voxels whose features are the means of their points' x, y and z within the voxel, from -1 to 1, of the
        F further numbers, and log(1 + points), `[M, 3 + F + 1]`; and the voxel of every point, -1 for those
        outside.
    """
    grid = check_shape(shape)
    if points.ndim != 2 or points.shape[1] < 3 or sample.shape != points.shape[:1]:
        raise ValueError(
            f"points must be [P, 3 + F] and sample [P], got {tuple(points.shape)} and {tuple(sample.shape)}"
        )
    for name, three in (("low", low), ("size", size)):
        if len(three) != 3 or (name == "size" and not min(three) > 0):
            raise ValueError(f"{name} must be three numbers (x, y, z), of a size above 0, got {three!r}")
    scaled = (points[:, :3] - points.new_tensor(low)) / points.new_tensor(size)
    cell = torch.cat((sample.long().unsqueeze(1), scaled.floor().long().flip(1)), 1)
    inside = ((cell >= 0) & (cell < cell.new_tensor(grid))).all(1)
    numbers, owner = number(cell[inside], grid).unique(return_inverse=True)
    within = 2 * (scaled[inside] - scaled[inside].floor()) - 1
    told = torch.cat((within, points[inside, 3:], torch.ones_like(within[:, :1])), 1)
    total = told.new_zeros(len(numbers), told.shape[1]).index_add(0, owner, told)
    features = torch.cat((total[:, :-1] / total[:, -1:], total[:, -1:].log1p()), 1)
    of = torch.full((len(points),), -1, device=points.device).masked_scatter(inside, owner)
    return Voxels(cells_at(numbers, grid), features, grid), of


def merge(voxels: Voxels, factors: Sequence[int]) -> tuple[Voxels, Tensor]:
    """Voxel merging: cells of `factors` (z, y, x) voxels become one with the sum of their features.

    Returns the coarser voxels, in the order of the grid, and each voxel's place among them, int64 `[M]`:
    `coarse.features[owner]` gives every voxel what its coarser one holds (voxel expanding).
    """
    steps = check_sizes("factors", factors)
    depth, height, width = (-(-n // step) for n, step in zip(voxels.shape[1:], steps))
    shape = (voxels.shape[0], depth, height, width)
    coarse = voxels.coords.div(voxels.coords.new_tensor((1, *steps)), rounding_mode="floor")
    numbers, owner = number(coarse, shape).unique(return_inverse=True)
    features = voxels.features
    total = features.new_zeros(len(numbers), features.shape[1]).index_add(0, owner, features)
    return Voxels(cells_at(numbers, shape), total, shape), owner


def extend(voxels: Voxels, coords: Tensor) -> Voxels:
    """These voxels and, behind them, empty ones (features 0) at those of `coords [P, 4]` where none is.

    Cells outside the grids are left out, and what comes twice is added once.
    """
    size = torch.tensor(voxels.shape, device=coords.device)
    coords = coords[((coords >= 0) & (coords < size)).all(1)]
    numbers = number(coords[voxels.find(coords) < 0], voxels.shape).unique()
    fresh = cells_at(numbers, voxels.shape)
    features = torch.cat((voxels.features, voxels.features.new_zeros(len(fresh), voxels.features.shape[1])))
    return Voxels(torch.cat((voxels.coords, fresh)), features, voxels.shape)
