"""Windows on token grids against a definition in loops; boxes of a grid as an order and a tiling."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewise.tiles import NONE, Causal, Everything, Padding
from tilewise.tiles.grid import Axis, Blocks, Neighborhood, grid_axes


def along(i: int, j: int, axis: Axis) -> bool:
    """Whether token i of an axis sees token j, from the published rules, one pair at a time."""
    if i % axis.dilation != j % axis.dilation:
        return False
    a, b = i // axis.dilation, j // axis.dilation
    n = len(range(i % axis.dilation, axis.length, axis.dilation))
    run = a // axis.stride * axis.stride
    if axis.causal:
        return b <= a and min(run + axis.stride - 1, n - 1) - b < axis.window
    left, right = axis.window // 2, axis.window // 2 + axis.window % 2 - 1
    centre = max(left, min(run + axis.stride // 2, n - 1, n - 1 - right))
    return -left <= b - centre <= right


def by_loops(axes: tuple[Axis, ...]) -> torch.Tensor:
    """The whole grid of pairs, bool `[N, N]`, in a double loop."""
    tokens = list(itertools.product(*(range(axis.length) for axis in axes)))
    return torch.tensor([[all(map(along, q, k, axes)) for k in tokens] for q in tokens])


SETTINGS = {
    "line": ((13,), 5),
    "line, even window": ((12,), 4),
    "line, dilated": ((17,), 3, 4),
    "line, causal": ((11,), 4, 2, True),
    "line, strided": ((14,), 5, 1, False, 3),
    "line, causal and strided": ((14,), 4, 1, True, 3),
    "line, whole": ((6,), 6),
    "image": ((6, 7), (3, 5)),
    "image, dilated": ((7, 9), 3, (2, 3)),
    "image, causal rows": ((5, 6), (3, 3), 1, (True, False)),
    "image, blocks": ((6, 8), (3, 4), 1, False, (3, 4)),
    "image, one whole axis": ((4, 6), (4, 3)),
    "video": ((3, 4, 5), (3, 3, 2)),
    "video, everything": ((5, 4, 6), (2, 2, 3), (2, 1, 2), (True, False, False), (2, 1, 2)),
    "window of one": ((3, 4), (1, 3)),
    "four axes": ((2, 3, 2, 3), (2, 3, 1, 2)),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_mask_is_the_definition(setting):
    mask, n = Neighborhood(*setting), math.prod(setting[0])
    want = by_loops(mask.axes())
    assert torch.equal(mask.bind(n, n).tokens()[0, 0], want)
    assert torch.equal(mask.bind(3, n).tokens()[0, 0], want[-3:]), "fewer queries are the last tokens"


@given(st.data())
def test_axis_is_the_definition(data):
    window, dilation = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 4))
    length = data.draw(st.integers(window * dilation, 30))
    axis = Axis(
        length=length,
        window=window,
        dilation=dilation,
        causal=data.draw(st.booleans()),
        stride=data.draw(st.integers(1, window)),
    )
    tokens = torch.arange(length)
    place = axis.place(tokens)
    first, last = axis.limits(tokens)
    seen = (first.unsqueeze(1) <= place) & (place <= last.unsqueeze(1))
    assert seen.tolist() == [[along(i, j, axis) for j in range(length)] for i in range(length)]
    assert seen.diagonal().all(), "a token sees itself"
    if not axis.causal:
        assert (seen.sum(1) == window).all(), "a window is shifted at a border, never cut"


@given(st.integers(1, 3), st.integers(2, 9))
def test_odd_windows_hold_the_nearest(half, extra):
    window = 2 * half + 1
    axis = Axis(window + extra, window)
    first, last = axis.limits(torch.arange(axis.length))
    for i in range(axis.length):
        nearest = sorted(range(axis.length), key=lambda j, i=i: abs(i - j))[:window]
        assert list(range(int(first[i]), int(last[i]) + 1)) == sorted(nearest)


def test_a_stride_as_long_as_the_window_is_blocked_attention():
    seen = Neighborhood(grid=(12,), window=4, dilation=1, causal=False, stride=4).bind(12, 12).tokens()[0, 0]
    assert torch.equal(seen, torch.arange(12).unsqueeze(1) // 4 == torch.arange(12) // 4)


def test_joined_with_other_masks():
    mask, n = Neighborhood((4, 5), 3), 20
    alone = mask.bind(n, n).tokens()
    keep = torch.rand(2, n) > 0.3
    seen = (mask & Padding(keep)).bind(n, n).tokens()
    assert torch.equal(seen, alone & keep[:, None, None])
    assert torch.equal((Padding(keep) & mask).bind(n, n).tokens(), seen)
    assert torch.equal((mask & Causal()).bind(n, n).tokens(), alone & torch.ones(n, n).tril().bool())


def test_positions_say_where_a_token_stands():
    """Tokens may be missing or out of order."""
    mask = Neighborhood((4, 5), (3, 2))
    whole = by_loops(mask.axes())
    left = torch.randperm(20)[:11]
    assert torch.equal(mask.at(left, left).bind(11, 11).tokens()[0, 0], whole[left][:, left])


def test_a_mask_of_nothing_changes_nothing():
    view = Everything().bind(12, 12)
    assert Neighborhood((3, 4), (3, 4)).narrow(view) is view


@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (3, 2), (100, 100)])
@pytest.mark.parametrize("setting", [((6, 7), 2), ((7, 9), 3, (2, 3)), ((8, 6), 2, 2)])
def test_boxes_are_boxes_of_one_class(setting, tile):
    axes = grid_axes(*setting)
    blocks, n = Blocks(axes=axes, tile=tile), math.prod(setting[0])
    order, tiling = blocks.order(), blocks.tiling()
    assert sorted(order.tolist()) == list(range(n))
    ids = tiling.ids(n, "cpu").flatten()
    assert int(tiling.sizes(n, "cpu").max()) <= tiling.size == blocks.volume
    for box in ids.unique():
        tokens = order[ids == box]
        sides = []
        for axis, c in zip(axes, (tokens // axes[1].length, tokens % axes[1].length)):
            assert len((c % axis.dilation).unique()) == 1, "one class"
            step = (c // axis.dilation).unique()
            assert int(step[-1] - step[0]) == len(step) - 1, "consecutive steps"
            sides.append(len(step))
        assert len(tokens) == math.prod(sides) and all(s <= t for s, t in zip(sides, tile))


@given(st.data())
def test_live_tiles_are_counted_without_looking(data):
    """The tiles that `Blocks.best` counts with are those that the classification finds."""
    window, dilation = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    length = data.draw(st.integers(window * dilation, 30))
    axis = Axis(length, window, dilation, data.draw(st.booleans()), data.draw(st.integers(1, window)))
    blocks = Blocks((axis,), (data.draw(st.integers(1, axis.steps)),))
    order, tiling = blocks.order().view(1, 1, -1), blocks.tiling()
    mask = Neighborhood((length,), window, dilation, axis.causal, axis.stride)
    some = by_loops(mask.axes())[order[0, 0]][:, order[0, 0]].view(1, 1, length, length)
    live = tiling.split(tiling.split(some, False).any(3).transpose(2, 3), False).any(3)
    assert axis.reached(blocks.tile[0]) == int(live.sum())


def test_tokens_before_the_grid_are_cut_to_the_same_size():
    tiling = Blocks(grid_axes((4, 6), 3), (2, 3)).tiling(before=8)
    assert tiling.sizes(32, "cpu").flatten().tolist() == [6, 2, 6, 6, 6, 6]
    assert Blocks(grid_axes((4, 6), 3), (2, 3)).tiling().bounds is None, "even boxes need no bounds"


@pytest.mark.parametrize(
    "setting",
    [((128, 128), 33), ((96, 100), (9, 25)), ((64, 128), (7, 15)), ((60, 60), 9, 2), ((8, 32, 32), 5)],
)
def test_best_boxes_need_the_fewest_scores(setting):
    """As the classification of tiles counts them, over all boxes at least as large with sides of powers of two."""
    mask, n = Neighborhood(*setting), math.prod(setting[0])
    view = mask.bind(n, n)

    def scores(blocks: Blocks) -> int:
        order, tiling = blocks.order().view(1, 1, -1), blocks.tiling()
        return int((view.permute(order, order).tiles(tiling, tiling) != NONE).sum()) * tiling.size**2

    best = Blocks.best(axes=mask.axes(), tokens=128)
    assert 64 < best.volume <= 128
    sides = itertools.product([2**e for e in range(8)], repeat=len(setting[0]))
    others = [Blocks(mask.axes(), tile) for tile in sides if math.prod(tile) <= 128]
    counts = [scores(other) for other in others if other.volume >= best.volume]
    assert scores(best) <= min(counts) < max(counts), (best.tile, scores(best), counts)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (((4, 4), 5), r"axis 0 of grid \(4, 4\): window \* dilation must not exceed the axis, got 5 \* 1"),
        (((8, 4), 3, (1, 2)), r"axis 1 .*got 3 \* 2 on an axis of 4"),
        (((8,), 3, 1, False, 4), "stride must not exceed the window 3, got 4"),
        (((8,), 0), "window must be an integer >= 1, got 0"),
        (((8,), 2.0), "window must be an integer >= 1, got 2.0"),
        (((8,), 2, 0), "dilation must be an integer >= 1"),
        (((8,), 2, 1, 1), "causal must be True or False for each axis, got 1"),
        (((8,), True), "window must be an integer"),
        (((0,), 1), "length must be an integer >= 1, got 0"),
        (((8, 8), (3, 3, 3)), r"window must have one entry for each of the 2 axes, got \(3, 3, 3\)"),
        (((8, 8), 3, (1,)), "dilation must have one entry"),
        (((8, 8), 3, 1, (True,)), "causal must have one entry"),
        ((8, 3), "grid must be a tuple of integers, one per axis, got 8"),
        (((), 3), "grid must be a tuple"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        Neighborhood(*setting)


@pytest.mark.parametrize("tile", [(2,), (2, 0), (2, 1.5), 4])
def test_bad_boxes(tile):
    with pytest.raises(ValueError, match="tile must be 2 integers >= 1"):
        Blocks(grid_axes(grid=(4, 4), window=3, dilation=1, causal=False, stride=1), tile)


def test_positions_outside_the_grid():
    with pytest.raises(ValueError, match=r"grid \(2, 3\) ends at position 5, but there are queries up to 6"):
        Neighborhood((2, 3), 2).bind(7, 7)
    with pytest.raises(ValueError, match="keys up to 9"):
        Neighborhood((2, 3), 2).bind(1, 10, q_pos=torch.tensor([3]))


def test_tiles_never_hide_what_is_seen():
    """The classification of tiles may call a hidden tile visible, never the other way."""
    for setting in SETTINGS.values():
        mask, n = Neighborhood(*setting), math.prod(setting[0])
        blocks = Blocks.best(mask.axes(), 6)
        order, tiling = blocks.order().view(1, 1, -1), blocks.tiling()
        view = mask.bind(n, n).permute(order, order)
        some = tiling.split(tiling.split(view.tokens(), False).any(3).transpose(2, 3), False).any(3).mT
        assert not (some & (view.tiles(tiling, tiling) == NONE)).any()
        assert some.sum() == (view.tiles(tiling, tiling) != NONE).sum(), "boxes are told apart exactly"
