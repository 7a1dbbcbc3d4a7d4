"""Masks against grids written out pair by pair, and the classification of tiles against those grids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilewise.tiles import (
    FULL,
    NONE,
    BlockCausal,
    Causal,
    Documents,
    Everything,
    Mask,
    Padding,
    Prefix,
    TileMap,
    Tiling,
    TokenMask,
    Visibility,
    Window,
    as_mask,
    sliding_window,
)

BATCH = 2


def brute(rule, n_q: int, n_k: int) -> Tensor:
    """`[BATCH, n_q, n_k]`: `rule(batch, query position, key position)` for every pair, aligned bottom-right."""
    cells = [
        [[bool(rule(b, i + n_k - n_q, j)) for j in range(n_k)] for i in range(n_q)] for b in range(BATCH)
    ]
    return torch.tensor(cells, dtype=torch.bool).view(BATCH, n_q, n_k)


def _document(cu: list[int], position: int) -> int:
    """The document a position lies in, none of them empty ones; queries before position 0 count to the first."""
    inside = [i for i, (start, end) in enumerate(zip(cu, cu[1:])) if start <= position < end]
    return inside[0] if inside else 0


@st.composite
def masks(draw, n_q: int, n_k: int):
    """One simple mask with its rule."""
    kind = draw(
        st.sampled_from(["everything", "causal", "window", "documents", "block", "prefix", "padding", "grid"])
    )
    if kind == "causal":
        return Causal(), lambda b, i, j: j <= i
    if kind == "window":
        side = st.one_of(st.none(), st.sampled_from([0, 1, max(n_k - 1, 0), n_k]), st.integers(0, n_k + 2))
        left, right = draw(side), draw(side)
        return Window(
            left, right
        ), lambda b, i, j: (left is None or j >= i - left) and (right is None or j <= i + right)
    if kind == "documents" and n_k:
        inner = sorted(draw(st.lists(st.integers(0, n_k), max_size=5)))
        cu = [0, *inner, n_k]
        index = draw(st.sampled_from([torch.int32, torch.int64]))
        return Documents(
            cu_seqlens=torch.tensor(cu, dtype=index)
        ), lambda b, i, j: _document(cu, i) == _document(cu, j)
    if kind == "block":
        block = draw(st.integers(1, n_k + 2))
        return BlockCausal(block), lambda b, i, j: j // block <= i // block
    if kind == "prefix":
        length = draw(st.integers(0, n_k + 2))
        return Prefix(length), lambda b, i, j: j < length or j <= i
    if kind == "padding":
        holes = draw(st.booleans())
        if holes:
            keep = [draw(st.lists(st.booleans(), min_size=n_k, max_size=n_k)) for _ in range(BATCH)]
        else:
            left = draw(st.booleans())
            real = [draw(st.integers(0, n_k)) for _ in range(BATCH)]
            keep = [[(j >= n_k - r) if left else (j < r) for j in range(n_k)] for r in real]
        dtype = draw(st.sampled_from([torch.bool, torch.int64]))
        tensor = torch.tensor(keep, dtype=dtype).view(BATCH, n_k)
        return Padding(keep=tensor), lambda b, i, j: keep[b][j]
    if kind == "grid":
        seed = draw(st.integers(0, 99))
        cells = torch.rand(n_q, n_k, generator=torch.Generator().manual_seed(seed)) > 0.4
        return TokenMask(cells), lambda b, i, j: cells[i - (n_k - n_q), j]
    return Everything(), lambda b, i, j: True


@st.composite
def cases(draw) -> tuple[Mask, Tensor, int, int]:
    """A conjunction of one to three masks, its grid, and the lengths."""
    n_q, n_k = draw(st.integers(0, 14)), draw(st.integers(0, 14))
    parts = draw(st.lists(masks(n_q, n_k), min_size=1, max_size=3))
    mask, rules = parts[0][0], [rule for _, rule in parts]
    for other, _ in parts[1:]:
        mask = mask & other
    return mask, brute(lambda b, i, j: all(rule(b, i, j) for rule in rules), n_q, n_k), n_q, n_k


def _grid(view: Visibility) -> Tensor:
    n_q, n_k = view.q_pos.shape[2], view.k_pos.shape[2]
    return view.tokens().expand(BATCH, 1, n_q, n_k)[:, 0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases())
def test_every_conjunction_equals_its_rule(case):
    mask, want, n_q, n_k = case
    assert torch.equal(_grid(mask.bind(n_q, n_k)), want)


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("left", ["0", "None", "1", "N-1", "N"])
@pytest.mark.parametrize("right", ["0", "None", "1", "N-1", "N"])
def test_window_edges(n, left, right):
    values = {"0": 0, "None": None, "1": 1, "N-1": n - 1, "N": n}
    l, r = values[left], values[right]  # noqa: E741
    want = brute(lambda b, i, j: (l is None or i - j <= l) and (r is None or j - i <= r), n, n)
    assert torch.equal(_grid(Window(l, r).bind(n, n)), want)
    assert torch.equal(_grid(Window(left=l, right=r).bind(n, n)), want)
    if l == r == 0:
        assert torch.equal(want[0], torch.eye(n, dtype=torch.bool))


@pytest.mark.parametrize("size", [1, 2, 5, 9, 12])
def test_sliding_window_is_that_of_hugging_face(size):
    """`sliding_window=W` there: a token sees itself and the W - 1 before it, W keys in all."""
    pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    from transformers.masking_utils import sliding_window_causal_mask_function

    theirs = sliding_window_causal_mask_function(size)
    q, k = torch.arange(9).view(-1, 1), torch.arange(9).view(1, -1)
    want = theirs(torch.tensor(0), torch.tensor(0), q, k)
    got = (Causal() & sliding_window(size)).bind(9, 9).tokens()[0, 0]
    assert torch.equal(got, want)
    assert got.sum(1).tolist() == [min(i + 1, size) for i in range(9)]
    assert torch.equal(sliding_window(size=size).bind(9, 9).tokens()[0, 0], got)  # causal on its own


def test_positions_may_be_given():
    """Slots need not be positions: a cache after eviction, or a ring."""
    q_pos, k_pos = torch.tensor([7, 20]), torch.tensor([20, 3, 7, 8])
    view = Causal().bind(2, 4, q_pos=q_pos, k_pos=k_pos, device="cpu")
    want = torch.tensor([[False, True, True, False], [True, True, True, True]])
    assert torch.equal(view.tokens()[0, 0], want)
    assert view.simple is None
    by_batch = torch.stack([k_pos, k_pos.flip(0)]).unsqueeze(1)
    view = (Causal() & Window(4, None)).bind(2, 4, q_pos=q_pos.int(), k_pos=by_batch)
    assert torch.equal(
        view.tokens()[:, 0],
        torch.tensor([[[0, 1, 1, 0], [1, 0, 0, 0]], [[0, 1, 1, 0], [0, 0, 0, 1]]]).bool(),
    )
    for wrong in (torch.arange(3), torch.arange(2.0), torch.zeros(1, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"q_pos must be integers \[2\] or \[B, H, 2\], got"):
            Causal().bind(2, 4, q_pos=wrong)
        with pytest.raises(ValueError, match=r"k_pos must be integers \[5\] or \[B, H, 5\], got"):
            Causal().bind(2, 5, k_pos=wrong)


def test_short_cuts_are_offered_only_where_they_hold():
    assert Everything().bind(5, 9).simple == "everything"
    assert Causal().bind(9, 9).simple == "causal"
    assert Causal().bind(1, 9).simple == "everything"  # one query at the end sees all
    for mask, n_q in (
        (Causal(), 5),
        (Causal() & Window(3, 0), 9),
        (Causal() & Everything(), 9),
        (Window(), 9),
    ):
        assert mask.bind(n_q, 9).simple is None
    view = Causal().bind(9, 9)
    for narrower in (
        view.limit(lo=2),
        view.hide(torch.zeros(1, 1, 9, dtype=torch.bool)),
        view.permute(None, None),
    ):
        assert narrower.simple is None


# Tiles


def _tile_extent(tiling: Tiling, n: int, h: int) -> list[range]:
    if tiling.bounds is None:
        return [range(s, min(s + tiling.size, n)) for s in range(0, n, tiling.size)]
    bounds = tiling.bounds[0, h % tiling.bounds.shape[1]].tolist()
    return [range(a, b) for a, b in zip(bounds, bounds[1:])]


def check_tiles(view: Visibility, grid: Tensor, q_tiling: Tiling, k_tiling: Tiling) -> None:
    """NONE and FULL are certain; `grid [B, H, N_q, N_k]` is in the order in which the tiles are cut."""
    kinds = view.tiles(q_tiling, k_tiling)
    b, heads, n_q, n_k = grid.shape
    assert kinds.dtype == torch.int8
    kinds = kinds.expand(b, -1, -1, -1)
    kinds = kinds.repeat_interleave(heads // kinds.shape[1], 1)
    assert kinds.shape[2:] == (q_tiling.count(n_q), k_tiling.count(n_k))
    for h in range(heads):
        for t, rows in enumerate(_tile_extent(q_tiling, n_q, h)):
            for u, columns in enumerate(_tile_extent(k_tiling, n_k, h)):
                tile = grid[:, h, rows.start : rows.stop, columns.start : columns.stop]
                for i in range(b):
                    if int(kinds[i, h, t, u]) == NONE:
                        assert not tile[i].any()
                    elif int(kinds[i, h, t, u]) == FULL:
                        assert tile[i].all()


def _bounds(draw, n: int) -> Tensor:
    return torch.tensor([0, *sorted(draw(st.lists(st.integers(0, n), max_size=4))), n])


@st.composite
def tilings(draw, n: int, heads: int) -> Tiling:
    kind = draw(st.sampled_from(["uniform", "uneven", "by head"]))
    if kind == "uniform":
        return Tiling(size=draw(st.integers(1, n + 2)), bounds=None)
    if kind == "uneven":
        return Tiling.from_bounds(_bounds(draw, n))
    inner = [sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=2))) for _ in range(heads)]
    return Tiling.from_bounds(torch.tensor([[[0, *i, n] for i in inner]]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), case=cases())
def test_tile_classes_are_sound(data, case):
    mask, want, n_q, n_k = case
    heads = data.draw(st.sampled_from([1, 2]))
    q_tiling, k_tiling = data.draw(tilings(n_q, heads)), data.draw(tilings(n_k, heads))
    check_tiles(mask.bind(n_q, n_k), want.unsqueeze(1).expand(-1, heads, -1, -1), q_tiling, k_tiling)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data(), case=cases(), seed=st.integers(0, 99))
def test_permuted_order_is_the_permuted_grid_and_its_tiles_are_sound(data, case, seed):
    mask, want, n_q, n_k = case
    generator = torch.Generator().manual_seed(seed)
    q_heads, k_heads = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (4, 1)]))
    q_order, k_order = (
        torch.stack([torch.randperm(n, generator=generator) for _ in range(BATCH * h)]).view(BATCH, h, n)
        for n, h in ((n_q, q_heads), (n_k, k_heads))
    )
    given_orders = data.draw(st.sampled_from([(q_order, k_order), (None, k_order), (q_order, None)]))
    view = mask.bind(n_q, n_k).permute(*given_orders)
    heads = max(q_heads if given_orders[0] is not None else 1, k_heads if given_orders[1] is not None else 1)
    grid = want.unsqueeze(1).expand(-1, heads, -1, -1)
    if given_orders[0] is not None:
        rows = q_order.repeat_interleave(heads // q_heads, 1).unsqueeze(3).expand(-1, -1, -1, n_k)
        grid = grid.gather(2, rows)
    if given_orders[1] is not None:
        columns = k_order.repeat_interleave(heads // k_heads, 1).unsqueeze(2).expand(-1, -1, n_q, -1)
        grid = grid.gather(3, columns)
    tokens = view.tokens()
    assert torch.equal(
        tokens.expand(BATCH, tokens.shape[1], n_q, n_k).repeat_interleave(heads // tokens.shape[1], 1), grid
    )
    check_tiles(view, grid, Tiling(data.draw(st.integers(1, 6))), Tiling(data.draw(st.integers(1, 6))))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("k_heads", [1, 2])
def test_boolean_masks_by_head_with_orders_by_kv_head(shape, k_heads):
    """A grid per query head, keys sorted per kv head: the two meet in `tokens` and `tiles`."""
    seen = torch.rand(*shape, 12, 12) > 0.5
    k_order = torch.stack([torch.randperm(12) for _ in range(2 * k_heads)]).view(2, k_heads, 12)
    view = TokenMask(seen).bind(12, 12).permute(None, k_order)
    columns = k_order.repeat_interleave(4 // k_heads, 1).unsqueeze(2).expand(-1, -1, 12, -1)
    want = seen.expand(2, 4, 12, 12).gather(3, columns)
    tokens = view.tokens()
    assert torch.equal(tokens.repeat_interleave(4 // tokens.shape[1], 1).expand(2, 4, 12, 12), want)
    check_tiles(view, want, Tiling(5), Tiling(4))


def test_tiles_are_classified_exactly_for_plain_masks():
    """Soundness alone would allow PARTIAL everywhere; whole and empty tiles of plain masks are recognised."""
    causal = Causal().bind(12, 12).tiles(Tiling(4), Tiling(4))[0, 0]
    assert causal.tolist() == [[1, 0, 0], [2, 1, 0], [2, 2, 1]]
    window = (Causal() & Window(3, None)).bind(12, 12).tiles(Tiling(4), Tiling(4))[0, 0]
    assert window.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    documents = Documents(torch.tensor([0, 4, 12])).bind(12, 12).tiles(Tiling(4), Tiling(4))[0, 0]
    assert documents.tolist() == [[2, 0, 0], [0, 2, 2], [0, 2, 2]]
    padding = Padding(torch.arange(12).ge(6).unsqueeze(0)).bind(12, 12).tiles(Tiling(4), Tiling(4))[0, 0]
    assert padding.tolist() == [[0, 1, 2]] * 3
    short = Everything().bind(10, 10).tiles(Tiling(4), Tiling(4))[0, 0]
    assert (short == FULL).all()
    prefix = Prefix(4).bind(12, 12).tiles(Tiling(4), Tiling(4))[0, 0]
    assert prefix.tolist() == [[2, 0, 0], [2, 1, 0], [2, 2, 1]]
    block = BlockCausal(4).bind(12, 12).tiles(Tiling(4), Tiling(4))[0, 0]
    assert block.tolist() == [[2, 0, 0], [2, 2, 0], [2, 2, 2]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), n_q=st.integers(1, 10), n_k=st.integers(1, 10))
def test_a_second_axis_is_a_conjunction(seed, n_q, n_k):
    """Boxes of more than one axis (space and time, say), narrowed and hidden on top."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape):
        return torch.randint(0, 6, shape, generator=generator)

    lo, pos = integers(2, 1, n_q), integers(2, 1, n_k)
    hi = lo + integers(2, 1, n_q)
    hidden = torch.rand(2, 1, n_k, generator=generator) > 0.8
    view = Causal().bind(n_q, n_k).hide(hidden).with_axis(lo, hi, pos).limit(lo=1)
    i, j = torch.arange(n_q).view(-1, 1) + n_k - n_q, torch.arange(n_k).view(1, -1)
    second = (lo.unsqueeze(3) <= pos.unsqueeze(2)) & (pos.unsqueeze(2) <= hi.unsqueeze(3))
    want = (j <= i) & (j >= 1) & second & ~hidden.unsqueeze(2)
    assert torch.equal(view.tokens().expand_as(want), want)
    check_tiles(view, want, Tiling(3), Tiling(2))
    assert torch.equal(view.keys_seen().expand(2, 1, n_k), ~hidden)


def test_as_mask():
    boolean = torch.ones(3, 3, dtype=torch.bool)
    assert isinstance(as_mask(None), Everything) and isinstance(as_mask("causal"), Causal)
    window = Window(1, 2)
    assert as_mask(window) is window
    assert as_mask(mask=boolean).seen is boolean


def test_cost_of_a_tile_map():
    """Scores of kept visible tiles, and of all visible tiles, in tokens times tokens."""
    keep = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1]], dtype=torch.bool).view(1, 1, 3, 3)
    tile_map = TileMap.from_mask(mask=keep, tile=(4, 4))
    computed, visible = tile_map.cost(Causal().bind(10, 10))
    # Tiles of 4, 4 and 2 tokens; causal hides those right of the diagonal.
    assert visible.tolist() == [[16 + 16 + 16 + 8 + 8 + 4]]
    assert computed.tolist() == [[16 + 16 + 8 + 4]]
    uneven = Tiling.from_bounds(torch.tensor([0, 1, 1, 10]))
    computed, visible = TileMap(keep, uneven, uneven).cost(Everything().bind(10, 10))
    assert visible.tolist() == [[100]] and computed.tolist() == [[1 + 9 + 9 + 81]]
