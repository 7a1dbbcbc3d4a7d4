"""Sparse voxels: found, convolved, merged and sorted as a dense grid or a loop has it, and never dense."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.conformance.test_memory import allocations
from tilewise.recurrence import (
    LION,
    ScatterFormer,
    SubmanifoldConv3d,
    Voxels,
    extend,
    groups,
    merge,
    voxelize,
    windows,
)

SHAPE = (2, 5, 7, 9)
VAST = (2, 2**13, 2**20, 2**20)  # 2^54 cells


def some(
    count: int = 150, channels: int = 4, seed: int = 0, shape: tuple[int, int, int, int] = SHAPE
) -> Voxels:
    """Random cells, in random order."""
    g = torch.Generator().manual_seed(seed)
    cells = torch.randperm(shape[0] * shape[1] * shape[2] * shape[3], generator=g)[:count]
    coords = torch.stack(torch.unravel_index(cells, shape), 1)
    return Voxels(coords, torch.randn(count, channels, generator=g, dtype=torch.float64), shape)


def dense(voxels: Voxels) -> Tensor:
    """`[B, C, Z, Y, X]`, zeros where no voxel is."""
    made = voxels.features.new_zeros(*voxels.shape, voxels.features.shape[1])
    return made.index_put(tuple(voxels.coords.T), voxels.features).movedim(-1, 1)


def at(grid: Tensor, voxels: Voxels) -> Tensor:
    return grid.movedim(1, -1)[tuple(voxels.coords.T)]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_cells_are_found():
    voxels = some()
    known = {tuple(cell): i for i, cell in enumerate(voxels.coords.tolist())}
    for cell in itertools.product(range(-1, 3), range(-1, 6), range(-1, 8), range(-1, 10)):
        assert int(voxels.find(torch.tensor(cell))) == known.get(cell, -1)


@pytest.mark.parametrize("kernel", [(1, 1, 1), (3, 3, 3), (1, 1, 5), (1, 5, 1), (3, 1, 1)])
@pytest.mark.parametrize("depthwise", [False, True])
def test_convolution_is_the_dense_one_where_voxels_are(kernel, depthwise):
    """Values and gradients, float64."""
    torch.manual_seed(1)
    voxels = some()
    conv = SubmanifoldConv3d(4, 4 if depthwise else 6, kernel, depthwise=depthwise).double()
    features = voxels.features.requires_grad_()
    got = conv(voxels.with_features(features)).features
    weight = conv.weight.unflatten(0, kernel)
    weight = weight.permute(3, 0, 1, 2).unsqueeze(1) if depthwise else weight.permute(4, 3, 0, 1, 2)
    want = at(
        F.conv3d(
            dense(voxels.with_features(features)), weight, conv.bias,
            padding=tuple(n // 2 for n in kernel), groups=4 if depthwise else 1,
        ),
        voxels,
    )  # fmt: skip
    close(got, want)
    back = torch.randn_like(got)
    leaves = (features, conv.weight, conv.bias)
    for a, b in zip(torch.autograd.grad(got, leaves, back), torch.autograd.grad(want, leaves, back)):
        close(a, b)


def test_merging_sums_cells_and_expanding_gives_them_back():
    voxels = some()
    coarse, owner = merge(voxels, (2, 3, 1))
    assert coarse.shape == (2, 3, 3, 9)
    padded = F.pad(dense(voxels), (0, 0, 0, 2, 0, 1))
    summed = padded.unflatten(2, (3, 2)).unflatten(4, (3, 3)).sum((3, 5))
    close(coarse.features, at(summed, coarse))
    assert torch.equal(coarse.coords[owner], voxels.coords // torch.tensor([1, 2, 3, 1]))
    assert len(coarse) == len(set(map(tuple, coarse.coords.tolist())))


def test_voxels_of_points():
    points = 12 * torch.rand(500, 4, dtype=torch.float64) - 1
    sample = torch.randint(2, (500,))
    voxels, owner = voxelize(points, sample, low=(0, 0, 0), size=(2.0, 1.0, 0.5), shape=(2, 20, 10, 5))
    told: dict[tuple[int, ...], list[int]] = {}
    for i, (x, y, z, _) in enumerate(points.tolist()):
        cell = (int(sample[i]), int(z // 0.5), int(y // 1), int(x // 2))
        inside = all(0 <= c < n for c, n in zip(cell, (2, 20, 10, 5)))
        assert (owner[i] >= 0) == inside
        if inside:
            told.setdefault(cell, []).append(i)
    assert sorted(told) == sorted(map(tuple, voxels.coords.tolist())) and len(told) > 50
    for cell, features in zip(voxels.coords.tolist(), voxels.features):
        mine = points[told[tuple(cell)]]
        assert (owner[told[tuple(cell)]] == voxels.find(torch.tensor(cell))).all()
        within = 2 * (mine[:, :3] / torch.tensor([2.0, 1.0, 0.5]) - torch.tensor(cell[:0:-1])) - 1
        close(features[:3], within.mean(0))
        close(features[3:], torch.tensor([mine[:, 3].mean(), (1.0 + torch.tensor(len(mine))).double().log()]))


def keyed(cell: list[int], size: tuple[int, int, int], axis: str, shift: bool) -> tuple[int, ...]:
    """What voxels are sorted by, after the authors' code: sample, window, place within it."""
    b, *rest = cell
    z, y, x = (c + (n // 2 if shift else 0) for c, n in zip(rest, size))
    parts = (
        [(x, size[2]), (y, size[1]), (z, size[0])]
        if axis == "x"
        else [(y, size[1]), (x, size[2]), (z, size[0])]
    )
    return (b, *(c // n for c, n in parts), *(c % n for c, n in parts))


@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("size", [(2, 3, 4), (5, 7, 9), (1, 1, 1), (32, 13, 13)])
def test_windows_and_groups_are_those_of_a_sorted_list(axis, shift, size):
    voxels = some()
    cells = voxels.coords.tolist()
    keys = [keyed(cell, size, axis, shift) for cell in cells]
    want = sorted(range(len(cells)), key=keys.__getitem__)
    lineup = windows(voxels, size, axis=axis, shift=shift)
    assert lineup.order.tolist() == want
    pieces = [len(list(run)) for _, run in itertools.groupby(want, key=lambda i: keys[i][:4])]
    assert lineup.lengths.tolist() == pieces
    grouped = groups(voxels, size, 16, axis=axis, shift=shift)
    assert grouped.order.tolist() == want
    lengths = []
    for count in voxels.counts.tolist():
        lengths += [16] * (count // 16) + [count % 16] * (count % 16 > 0)
    assert grouped.lengths.tolist() == lengths
    x = torch.randn(len(voxels), 3)
    assert torch.equal(lineup.put_back(lineup.line_up(x)), x)


def test_new_voxels_are_empty_and_only_where_none_was():
    voxels = some()
    wanted = torch.cat((voxels.coords[:9], torch.randint(-2, 9, (60, 4))))
    more = extend(voxels, torch.cat((wanted, wanted)))
    assert (
        torch.equal(more.features[: len(voxels)], voxels.features) and not more.features[len(voxels) :].any()
    )
    size = torch.tensor(SHAPE)
    inside = {tuple(c) for c in wanted.tolist() if all(0 <= n < s for n, s in zip(c, size.tolist()))}
    old = set(map(tuple, voxels.coords.tolist()))
    assert set(map(tuple, more.coords.tolist())) == old | inside and len(more) == len(old | inside) > len(old)


def test_no_grid_is_allocated():
    """2^54 cells: everything runs, in memory for the voxels that there are, and gives what a small grid
    gives."""
    torch.manual_seed(0)
    near = some(400, 16, shape=(2, 16, 32, 32))
    near = near.with_features(near.features.float())
    # Multiples of every window and factor; the far corner is the cell numbered last.
    move = torch.tensor([0, 2**12, 2**19, 2**19])
    far = Voxels(near.coords + move, near.features, VAST)
    corner = Voxels(torch.tensor(VAST).unsqueeze(0) - 1, torch.ones(1, 1), VAST)
    assert corner.find(corner.coords).tolist() == [0]
    conv, scatter = SubmanifoldConv3d(16, 16), ScatterFormer(16, layers=2, window=(16, 8, 8))
    options = {"heads": 2, "rank": 4}
    lion = LION(16, blocks=1, window=(16, 8, 8), group=64, options=options)

    def run(voxels: Voxels) -> list[Voxels]:
        with torch.no_grad():
            return [conv(voxels), scatter(voxels), lion(voxels)]

    for a, b in zip(run(far)[:2], run(near)[:2]):
        assert torch.equal(a.features, b.features)
    # LION's positions are relative to the grid, so of it only the voxels are compared.
    assert len(run(far)[2]) > 100
    small, large = allocations(lambda: run(near))[1], allocations(lambda: run(far))[1]
    assert large < 1.3 * small < 100e6


@pytest.mark.parametrize("count", [0, 1])
def test_hardly_any_voxels(count):
    voxels = some(count, 8)
    voxels = voxels.with_features(voxels.features.float())
    assert len(ScatterFormer(8, layers=1, heads=2, window=(2, 4, 4))(voxels)) == count
    assert len(LION(8, blocks=1, group=4, options={"heads": 2, "rank": 2})(voxels)) == count
    assert windows(voxels, (2, 2, 2)).offsets.tolist() == list(range(count + 1))
    assert groups(voxels, (2, 2, 2), 3).offsets.tolist() == list(range(count + 1))


def test_bad_arguments():
    cells, features = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"different cells, got \[0, 0, 0, 0\] twice"):
        Voxels(cells, features, SHAPE)
    with pytest.raises(
        ValueError, match=r"within \(2, 5, 7, 9\), got values from \[0, 0, 0, 0\] to \[0, 0, 0, 9\]"
    ):
        Voxels(torch.tensor([[0, 0, 0, 0], [0, 0, 0, 9]]), features, SHAPE)
    with pytest.raises(ValueError, match="four integers >= 1"):
        Voxels(cells[:1], features[:1], (2, 5, 7))
    with pytest.raises(TypeError, match="coords must be an int32 or int64 tensor, got torch.float32"):
        Voxels(cells.float(), features, SHAPE)
    with pytest.raises(TypeError, match="features must be a floating tensor, got torch.int64"):
        Voxels(cells, features.long(), SHAPE)
    with pytest.raises(ValueError, match=r"do not fit: got \(1, 4\) and \(2, 3\)"):
        Voxels(cells[:1], features, SHAPE)
    with pytest.raises(ValueError, match="less than 2"):
        Voxels(cells[:1], features[:1], (2**20, 2**20, 2**20, 2**20))
    with pytest.raises(ValueError, match=r"kernel must be three odd integers \(z, y, x\), got \(2, 3, 3\)"):
        SubmanifoldConv3d(3, 3, (2, 3, 3))
    with pytest.raises(ValueError, match="keeps its channels, got channels 3 and out_channels 4"):
        SubmanifoldConv3d(3, 4, depthwise=True)
    with pytest.raises(ValueError, match="channels must be an integer >= 1, got 0"):
        SubmanifoldConv3d(0, 4)
    voxels = some()
    with pytest.raises(ValueError, match="axis must be one of 'x', 'y', got 'z'"):
        windows(voxels, (1, 1, 1), axis="z")
    with pytest.raises(ValueError, match=r"size must be three integers >= 1 \(z, y, x\), got \(0, 1, 1\)"):
        windows(voxels, (0, 1, 1))
    with pytest.raises(ValueError, match="group must be an integer >= 1, got 0"):
        groups(voxels, (1, 1, 1), 0)
    with pytest.raises(ValueError, match="factors must be three integers"):
        merge(voxels, (2, 2))
    with pytest.raises(ValueError, match="more cells than int64 counts"):
        windows(Voxels(cells[:1], features[:1], (1, 1, 1, 2**61)), (64, 64, 64))
    points = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="size must be three numbers .* got \\(1, 0, 1\\)"):
        voxelize(points, cells[:, 0], low=(0, 0, 0), size=(1, 0, 1), shape=SHAPE)
    with pytest.raises(ValueError, match="low must be three numbers"):
        voxelize(points, cells[:, 0], low=(0, 0), size=(1, 1, 1), shape=SHAPE)
    with pytest.raises(ValueError, match=r"points must be \[P, 3 \+ F\] and sample \[P\]"):
        voxelize(torch.zeros(2, 2), cells[:, 0], low=(0, 0, 0), size=(1, 1, 1), shape=SHAPE)
