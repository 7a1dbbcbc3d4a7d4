"""The stages of a method, one by one: orders, scores, selects, always, rests, and what composes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tilewise
from tests.conformance.common import ENGINES, exact, grid, qkv, repeat, run_or_refuse, with_grads
from tilewise.attention import (
    Antidiagonal,
    Arrangement,
    AsGiven,
    Boxes,
    Centroid,
    Chosen,
    Clusters,
    First,
    KeyConvolution,
    Layout,
    Mass,
    MeanPool,
    Means,
    Method,
    MoBA,
    Own,
    PageBounds,
    Pass,
    PBSAttention,
    Plan,
    Pooled,
    RandomTiles,
    Recipe,
    SegmentSort,
    Share,
    SinkWindow,
    Skip,
    Tiles,
    TopK,
    TrueMass,
    XAttention,
    plan,
    router_recall,
    router_snr,
)
from tilewise.tiles import Causal, Documents, Everything, Mask, Padding, TileMap, Tiling
from tilewise.tiles.visibility import take

# Selects


@st.composite
def rows(draw) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of one row of tiles, which of them take part, and which are forced."""
    n = draw(st.integers(1, 12))
    scores = draw(st.lists(st.sampled_from([0.0, 1e-30, 0.1, 0.3, 1.0, 5.0]), min_size=n, max_size=n))
    among = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    forced = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    both = torch.tensor(among), torch.tensor(forced)
    return tuple(x.view(1, 1, 1, n) for x in (torch.tensor(scores), both[0], both[1] & both[0]))  # type: ignore[return-value]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(row=rows(), k=st.integers(1, 13))
def test_top_k_takes_the_best(row, k):
    scores, among, forced = row
    chosen = TopK(k=k).select(scores=scores, among=among, forced=forced)
    assert not (chosen & ~among).any()
    assert int(chosen.sum()) == min(k, int(among.sum()))
    first = forced if int(forced.sum()) <= k else chosen
    assert not (first & ~chosen).any()  # forced ones come first
    best = scores[chosen & ~forced]
    others = scores[among & ~chosen]
    assert not best.numel() or not others.numel() or best.min() >= others.max()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(row=rows(), threshold=st.sampled_from([1e-6, 0.3, 0.5, 0.9, 0.999, 1.0]))
def test_mass_takes_the_fewest_tiles_that_hold_the_share(row, threshold):
    scores, among, forced = row
    chosen = Mass(threshold=threshold).select(scores=scores, among=among, forced=forced)
    assert not (chosen & ~among).any()
    if threshold == 1:
        assert torch.equal(chosen, among)
        return
    total = float(scores[among].double().sum())
    if total == 0:
        assert not chosen.any()
        return
    # Forced tiles come first and their mass counts; then the others by score, until the share is reached.
    taken = float(scores[forced].double().sum())
    held = []
    for score in scores[among & ~forced].sort(descending=True).values.tolist():
        if taken >= threshold * total * (1 - 1e-6):  # float32 sums of twelve numbers: 12 * 2^-24
            break
        held.append(score)
        taken += score
    assert torch.equal(scores[chosen & ~forced].sort(descending=True).values, torch.tensor(held))
    assert chosen.any()


def test_mass_never_leaves_a_row_empty_when_sums_stay_below_one():
    """The trap: `cumsum <= p` selects nothing when rounded sums never reach the share."""
    scores = torch.full((1, 1, 1, 3), 1 / 3)
    every = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    for threshold in (0.2, 0.34, 0.999999):
        chosen = Mass(threshold).select(scores, every, every & False)
        assert int(chosen.sum()) == math.ceil(threshold * 3 - 1e-6)
    one = torch.tensor([[[[1.0, 0.0, 0.0]]]])
    assert Mass(0.5).select(one, every, every & False).tolist() == [[[[True, False, False]]]]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(row=rows(), share=st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.999, 1.0]))
def test_share_takes_that_part_of_the_tiles(row, share):
    scores, among, forced = row
    chosen = Share(share=share).select(scores=scores, among=among, forced=forced)
    assert not (chosen & ~among).any()
    assert int(chosen.sum()) == math.ceil(share * int(among.sum()) - 1e-6)
    assert not (forced & ~chosen).any() or not (chosen & ~forced).any()  # forced ones come first
    best, others = scores[chosen & ~forced], scores[among & ~chosen & ~forced]
    assert not best.numel() or not others.numel() or best.min() >= others.max()


@pytest.mark.parametrize("kind", ["top-k", "share", "mass"])
def test_rows_of_a_head_may_share_a_budget(kind):
    """Over the head, the same rule as over one long row; rows with nothing of worth get nothing."""
    scores = torch.rand(2, 3, 4, 6) * torch.tensor([1.0, 1e-3, 1.0, 1e-3]).view(1, 1, 4, 1)
    among = torch.rand(2, 1, 4, 6) < 0.8
    forced = among & (torch.rand(2, 1, 4, 6) < 0.1)
    made = {
        "top-k": lambda over: TopK(k=2, over=over),
        "share": lambda over: Share(share=0.3, over=over),
        "mass": lambda over: Mass(threshold=0.6, over=over),
    }[kind]
    assert (made("head").looks, made("row").looks) == ("prompt", "none")
    chosen = made("head").select(scores, among, forced)
    wide = [x.expand(2, 3, 4, 6).reshape(2, 3, 1, 24) for x in (scores, among, forced)]
    row = TopK(k=8) if kind == "top-k" else made("row")
    assert torch.equal(chosen.view(2, 3, 1, 24), row.select(*wide))
    assert chosen[:, :, [0, 2]].sum() > 2 * chosen[:, :, [1, 3]].sum()
    assert Tiles(score=MeanPool(), select=made("head")).lookahead == "prompt"
    with pytest.raises(ValueError, match="over must be 'row' or 'head', got 'layer'"):
        made("layer")
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        Share(share=0)


# Always


def _layout(q, k, mask: Mask, tile=(16, 16), q_order=None, k_order=None) -> Layout:
    view = mask.bind(q.shape[2], k.shape[2]).permute(q_order, k_order)
    return Layout(
        q=q, k=k, view=view, q_tiling=Tiling(tile[0]), k_tiling=Tiling(tile[1]), scale=q.shape[3] ** -0.5
    )


def test_own_is_the_diagonal_and_first_is_the_first_visible():
    q, k, _ = qkv(1, 2, 1, 64)
    layout = _layout(q, k, Causal())
    visible = layout.kinds() != 0
    own = Own(segment=1).tiles(layout=layout, visible=visible)
    assert torch.equal((own & visible)[0, 0], torch.eye(4, dtype=torch.bool))
    own = Own(segment=32).tiles(layout, visible) & visible
    assert own[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    first = First().tiles(layout=layout, visible=visible)
    assert first[0, 0].int().tolist() == [[1, 0, 0, 0]] * 4
    layout = _layout(q, k, Causal() & Documents(torch.tensor([0, 32, 64])))
    first = First().tiles(layout, layout.kinds() != 0)
    assert first[0, 0].int().tolist() == [[1, 0, 0, 0]] * 2 + [[0, 0, 1, 0]] * 2


def test_own_is_the_diagonal_when_positions_are_padded_and_unequal():
    q, k, _ = qkv(1, 1, 1, 16, 64)
    own = Own().tiles(_layout(q, k, Causal()), torch.ones(1, 1, 1, 4, dtype=torch.bool))
    assert own.tolist() == [[[[False, False, False, True]]]]
    keep = (
        torch.arange(64).lt(50).unsqueeze(0)
    )  # right padding, without causality: the last tile is not everybody's own
    q, k, _ = qkv(1, 1, 1, 64)
    own = Own().tiles(_layout(q, k, Padding(keep)), torch.ones(1, 1, 4, 4, dtype=torch.bool))
    assert torch.equal(own[0, 0], torch.eye(4, dtype=torch.bool))


# Scores


def _tile_sums(weights: Tensor, tile: tuple[int, int]) -> Tensor:
    n_q, n_k = weights.shape[2:]
    return torch.stack(
        [
            torch.stack(
                [weights[:, :, i : i + tile[0], j : j + tile[1]].sum((2, 3)) for j in range(0, n_k, tile[1])],
                -1,
            )
            for i in range(0, n_q, tile[0])
        ],
        2,
    )


MASKS = {
    "causal": Causal(),
    "everything": Everything(),
    "padding": Causal() & Padding(torch.arange(50).ge(torch.tensor([[0], [19]]))),
    "documents": Causal() & Documents(torch.tensor([0, 21, 50])),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("at_once", [1, 10**9])
def test_true_mass_is_the_attention_of_every_tile(mask, at_once, monkeypatch):
    from tilewise.attention import scores

    monkeypatch.setattr(scores, "IN_CACHE", at_once)
    q, k, _ = qkv(2, 4, 2, 50)
    layout = _layout(q, k, mask)
    visible = layout.kinds() != 0
    got = TrueMass().score(layout=layout, among=visible)
    seen = mask.bind(50, 50).tokens().expand(2, 4, 50, 50)
    logits = (q @ repeat(k, 4).mT * 8**-0.5).masked_fill(~seen, -torch.inf)
    want = _tile_sums(logits.softmax(-1).nan_to_num(0), (16, 16))
    assert got.shape == (2, 4, 4, 4)
    # A sum of 16 x 16 float32 weights, each good to (2 * 8 + 50) eps.
    assert float((got - want).abs().max()) <= 16 * 66 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("at_once", [1, 10**9])
def test_antidiagonal_sums_written_out(mask, at_once, monkeypatch):
    """Token by token: the sum along the antidiagonal of every square, a softmax over visible groups, tile sums."""
    from tilewise.attention import scores

    monkeypatch.setattr(scores, "AT_ONCE", at_once)
    n, stride = 50, 4
    q, k, _ = qkv(2, 2, 1, n)
    layout = _layout(q, k, mask)
    got = Antidiagonal(stride=stride).score(layout=layout, among=layout.kinds() != 0)
    groups = -(-n // stride)
    keys_seen = layout.view.keys_seen().expand(2, 1, n)
    wide_q, wide_k = (torch.zeros(2, 2, groups * stride, 8, dtype=torch.float64) for _ in range(2))
    wide_q[:, :, :n], wide_k[:, :, :n] = q, (k * keys_seen.unsqueeze(-1)).expand(2, 2, n, 8)
    logits = torch.zeros(2, 2, groups, groups, dtype=torch.float64)
    for r in range(stride):
        logits += wide_q[:, :, stride - 1 - r :: stride] @ wide_k[:, :, r::stride].mT
    seen = torch.zeros(2, 1, groups * stride, groups * stride, dtype=torch.bool)
    seen[:, :, :n, :n] = mask.bind(n, n).tokens()
    # Groups of which the metadata says that nobody sees anything; it may keep one that is in fact unseen.
    visible = layout.view.tiles(Tiling(stride), Tiling(stride)) != 0
    assert not (_tile_sums(seen.double(), (stride, stride)).bool() & ~visible).any()
    weights = (logits * 8**-0.5 / stride).masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0)
    want = _tile_sums(weights, (4, 4))
    assert float((got - want).abs().max()) <= 16 * (2 * 8 * stride + groups) * torch.finfo(torch.float32).eps


def test_means_leave_padding_out():
    q, k, _ = qkv(1, 2, 1, 48)
    keep = torch.arange(48).ge(21).unsqueeze(0)
    noisy = torch.where(keep.view(1, 1, -1, 1), k, 1e6 * torch.ones_like(k))
    for score in (MeanPool(), Centroid(), Antidiagonal(4), TrueMass()):
        layouts = [_layout(q, x, Causal() & Padding(keep)) for x in (k, noisy)]
        one, other = (score.score(layout, layout.kinds() != 0) for layout in layouts)
        assert torch.equal(one, other), score
    centroid = Centroid().score(
        _layout(q, noisy, Padding(keep), tile=(1, 16)), torch.ones(1, 2, 48, 3).bool()
    )
    want = torch.einsum("bhnd,bxd->bhn", q, k[:, :, 21:32].mean(2)) * 8**-0.5
    assert float((centroid[..., 1] - want).abs().max()) <= (8 + 11) * 8 * torch.finfo(
        torch.float64
    ).eps * float(q.abs().max() * k.abs().max())
    assert (centroid[..., 0] == 0).all()  # a tile of nothing but padding


def test_counted_means_weigh_as_their_keys():
    """Uneven tiles: with equal scores, a tile's share is its share of the keys."""
    q, k, _ = qkv(1, 2, 1, 64)
    view = Everything().bind(64, 64)
    tiling = Tiling.from_bounds(torch.tensor([0, 8, 40, 64]))
    layout = Layout(q, torch.zeros_like(k), view, Tiling(16), tiling, 1.0)
    among = layout.kinds() != 0
    want = torch.tensor([8, 32, 24]) / 64
    torch.testing.assert_close(
        MeanPool(counted=True).score(layout, among), want.expand(1, 2, 4, 3), check_dtype=False
    )
    plain = MeanPool(counted=False).score(layout, among)
    torch.testing.assert_close(plain, torch.full((1, 2, 4, 3), 1 / 3), check_dtype=False)


@pytest.mark.parametrize("tile", [(1, 8), (5, 16)], ids=str)
def test_page_bounds_are_never_below_the_largest_product(tile):
    q, k, _ = qkv(1, 4, 2, 50)
    keep = torch.arange(50).ge(11).unsqueeze(0)
    layout = _layout(q, torch.where(keep.view(1, 1, -1, 1), k, 1e6), Causal() & Padding(keep), tile)
    got = PageBounds().score(layout, layout.kinds() != 0)
    products = q @ repeat(k, 4).mT * 8**-0.5
    rows, columns = got.shape[2:]
    for t in range(rows):
        for c in range(columns):
            real = [j for j in range(c * tile[1], min((c + 1) * tile[1], 50)) if j >= 11]
            block = products[:, :, t * tile[0] : (t + 1) * tile[0]]
            if real:
                assert (got[:, :, t, c] >= block[..., real].amax(-1).sum(-1) - 1e-5).all()
            else:
                assert (got[:, :, t, c] == 0).all()
    one = _layout(q[:, :, :1], k[:, :, :1], Causal(), (1, 1))  # a page of one key: the product itself
    want = products[:, :, :1, :1]
    torch.testing.assert_close(PageBounds().score(one, one.kinds() != 0), want)


def test_random_tiles_look_at_nothing():
    q, k, _ = qkv(2, 4, 2, 50)
    layouts = [_layout(x, y, Causal()) for x, y in ((q, k), (-q, 3 * k))]
    one, other = (RandomTiles(seed=3).score(x, x.kinds() != 0) for x in layouts)
    assert torch.equal(one, other) and one.shape == (2, 4, 4, 4) and float(one.std()) > 0.2
    assert not torch.equal(one, RandomTiles(seed=4).score(layouts[0], layouts[0].kinds() != 0))


def test_mean_pool_is_a_softmax_over_tiles():
    q, k, _ = qkv(1, 2, 1, 64)
    layout = _layout(q, k, Causal())
    among = layout.kinds() != 0
    got = MeanPool().score(layout=layout, among=among)
    pooled = q.unflatten(2, (4, 16)).mean(3) @ repeat(k, 2).unflatten(2, (4, 16)).mean(3).mT * 8**-0.5
    want = pooled.masked_fill(~among, -torch.inf).softmax(-1)
    assert float((got - want).abs().max()) <= (2 * 8 + 16) * torch.finfo(torch.float32).eps
    assert (got[~among.expand_as(got)] == 0).all()


@pytest.mark.parametrize(
    "score", [MeanPool(), Antidiagonal(stride=8), TrueMass()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_of_large_activations_stay_finite(score, dtype):
    """Models have channels in the hundreds: products beyond 65,504 (float16), which the scale brings into range."""
    q, k, _ = (x.to(dtype) for x in qkv(1, 2, 1, 64, d=64))
    q[..., 0] += 300
    k[..., 0] += 300
    layout = _layout(q, k, Causal())
    among = layout.kinds() != 0
    got = score.score(layout, among)
    assert got.isfinite().all()
    # Shares of mass: a row of tiles holds 1 for every row that was compared.
    compared = {MeanPool: 1, Antidiagonal: 16 // 8, TrueMass: 16}[type(score)]
    assert float((got.sum(-1) - compared).abs().max()) <= compared * 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sorting_by_large_activations_is_by_their_weights(dtype):
    """The one key that stands out comes first in its segment, whatever the channel that all keys share adds."""
    q, k, _ = (x.to(dtype) for x in qkv(1, 1, 1, 64, d=64))
    q[..., 0], k[..., 0] = 300, 300
    q[..., 1], k[..., 1], k[0, 0, 23, 1] = 30, 0, 30
    _, order = SegmentSort(segment=32, probe=8).permutations(q, k, Causal().bind(64, 64), 64**-0.5)
    assert int(order[0, 0, 0]) == 23


# Orders


@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("n", [64, 100, 31])
def test_segment_sort_permutes_within_segments_by_attention_from_the_last_queries(queries, n):
    q, k, _ = qkv(2, 4, 2, n)
    order = SegmentSort(segment=32, probe=8, queries=queries)
    view = Causal().bind(n, n)
    q_order, k_order = order.permutations(q=q, k=k, view=view, scale=8**-0.5)
    if n <= 32:
        assert q_order is k_order is None
        return
    seen = view.tokens()[:, :, -8:]
    weights = (q[:, :, -8:] @ repeat(k, 4).mT * 8**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    importance = weights.mean(2).unflatten(1, (2, 2)).mean(2)
    for segment in range(0, n, 32):
        part = k_order[..., segment : segment + 32]
        size = part.shape[-1]
        assert torch.equal(part.sort(-1).values, torch.arange(segment, segment + size).expand_as(part))
        if size == 32:
            sorted_by = importance.gather(2, part)
            assert float(sorted_by.diff(dim=-1).max()) <= 66 * torch.finfo(torch.float32).eps
        else:
            assert torch.equal(part, part.sort(-1).values)  # a short last segment stays as it is
    assert (q_order is not None) == queries
    if queries:
        assert q_order.shape == (2, 4, n)
        assert torch.equal(q_order.sort(-1).values, torch.arange(n).expand(2, 4, n))
        assert torch.equal(q_order // 32, torch.arange(n).expand(2, 4, n) // 32)


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("box", [(2, 2, 3), (3, 4, 4), (9, 9, 9)], ids=str)
def test_boxes_put_blocks_of_a_grid_into_tiles(box, before):
    """Token by token: two tokens share a tile when their coordinates, divided by the box, are equal."""
    grid_, n = (3, 4, 6), 72 + before
    q, k, v = qkv(1, 4, 2, n)
    order = Boxes(grid=grid_, box=box, before=before)
    at = order.arrange(q, k, Everything().bind(n, n), 1.0, (128, 128))
    assert torch.equal(at.q_order, at.k_order)
    own = torch.empty(n, dtype=torch.int64)
    own[at.k_order[0, 0]] = at.k_tiling.ids(n, "cpu")[0, 0]
    place = torch.stack(torch.meshgrid(*(torch.arange(x) for x in grid_), indexing="ij"), -1).flatten(0, 2)
    cell = place // torch.tensor(box)
    same = (cell.unsqueeze(0) == cell.unsqueeze(1)).all(-1)
    assert torch.equal(own[before:].unsqueeze(0) == own[before:].unsqueeze(1), same)
    assert not torch.isin(own[:before], own[before:]).any()
    dense = Tiles(score=RandomTiles(), select=Share(1.0), order=order)
    exact(q, k, v, torch.ones(n, n, dtype=torch.bool)).check({"out": tilewise.attend(q, k, v, dense)})
    with pytest.raises(ValueError, match=f"has {n} tokens, got {n - 1} queries"):
        order.arrange(q[:, :, 1:], k, Everything().bind(n - 1, n), 1.0, (1, 1))
    with pytest.raises(ValueError, match="before must be an integer >= 0, got -1"):
        Boxes(grid_, box, before=-1)
    with pytest.raises(ValueError, match="tile must be 3 integers"):
        Boxes(grid_, (2, 2))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_clusters_share_tiles_and_full_density_is_dense(mask):
    q, k, v = qkv(2, 4, 2, 50)
    order = Clusters(queries=5, keys=7, iterations=2, seed=1)
    at = order.arrange(q, k, mask.bind(50, 50), 1.0, (128, 128))
    assert at.q_order.shape == (2, 4, 50) and at.k_order.shape == (2, 2, 50)
    assert at.q_tiling.bounds.shape == (2, 4, 6) and at.k_tiling.bounds.shape == (2, 2, 8)
    method = Tiles(score=MeanPool(counted=True), select=Mass(1.0), order=order, rest=Pooled())
    assert method.lookahead == "prompt"
    seen = mask.bind(50, 50).tokens()
    exact(q, k, v, seen).check({"out": tilewise.attend(q, k, v, method, mask=mask)})
    for name in ("queries", "keys", "iterations"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
            Clusters(**{"queries": 2, "keys": 2, name: 0})


@pytest.mark.parametrize("at_once", [1, 500, 10**9])
def test_true_mass_of_clusters_is_summed_over_their_tokens(at_once, monkeypatch):
    """Tiles of uneven size, however many queries are weighed at a time."""
    from tilewise.attention import scores

    monkeypatch.setattr(scores, "IN_CACHE", at_once)
    q, k, _ = qkv(1, 4, 2, 50)
    view = Causal().bind(50, 50)
    at = Clusters(queries=4, keys=6).arrange(q, k, view, 1.0, (1, 1))
    ordered = [take(q, at.q_order), take(k, at.k_order)]
    layout = Layout(*ordered, view.permute(at.q_order, at.k_order), at.q_tiling, at.k_tiling, 8**-0.5)
    got = TrueMass().score(layout, layout.kinds() != 0)
    weights = (q @ repeat(k, 4).mT * 8**-0.5).masked_fill(~view.tokens(), -torch.inf).softmax(-1)
    rows = torch.empty(1, 4, 50, dtype=torch.int64).scatter_(2, at.q_order, at.q_tiling.ids(50, "cpu"))
    columns = torch.empty(1, 2, 50, dtype=torch.int64).scatter_(2, at.k_order, at.k_tiling.ids(50, "cpu"))
    one_hot = torch.nn.functional.one_hot
    want = one_hot(rows, 4).double().mT @ weights @ one_hot(repeat(columns, 4), 6).double()
    assert float((got - want).abs().max()) <= 50 * 66 * torch.finfo(torch.float32).eps


# Rests


def _pooled_formula(q, k, v, keep: Tensor, left: Tensor, visible: Tensor, tile: tuple[int, int]) -> Tensor:
    """Exact keys of the tiles `keep`; the means of the tiles `left`, each counted as often as it has tokens.

    All masks by token and tile: `keep [.., N, N]`, `left [.., N, T]`.
    """
    heads, n = q.shape[1], k.shape[2]
    k, v, scale = repeat(k, heads), repeat(v, heads), q.shape[3] ** -0.5
    starts = range(0, n, tile[1])
    k_mean, v_mean = (torch.stack([x[:, :, s : s + tile[1]].mean(2) for s in starts], 2) for x in (k, v))
    counts = torch.tensor([min(tile[1], n - s) for s in starts], dtype=torch.float64)
    exact_part = (q @ k.mT * scale).masked_fill(~(keep & visible), -torch.inf)
    mean_part = (q @ k_mean.mT * scale + counts.log()).masked_fill(~left, -torch.inf)
    weights = torch.cat([exact_part, mean_part], -1).softmax(-1)
    return weights @ torch.cat([v, v_mean], 2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tile", [(32, 16), (4, 16), (1, 8)], ids=str)
@pytest.mark.parametrize("n", [96, 91])
def test_pooled_rest_equals_its_formula(n, tile, engine):
    """Tiles that were not chosen and may be seen whole stand for their tokens by mean key and mean value."""
    q, k, v = qkv(1, 4, 2, n, d_v=5)
    method = Tiles(
        score=MeanPool(),
        select=TopK(1),
        tile=tile,
        order=AsGiven(),
        always=(Own(),),
        rest=Pooled(),
        compare_forced=False,
    )
    made = plan(method, q, k, mask="causal")
    assert len(made.passes) == 2 and isinstance(made.passes[1].reads, Means)
    run = run_or_refuse(engine, q, k, v, made)
    if run is None:
        return
    chosen = grid(Plan(made.passes[:1], made.view), 1, 4, n, n)
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    kept = made.passes[0].tiles.keep.repeat_interleave(tile[0], 2)[:, :, :n]
    last = torch.arange(n).div(tile[0], rounding_mode="floor") * tile[0]  # first query of each one's tile
    ends = torch.tensor([min(s + tile[1], n) for s in range(0, n, tile[1])])
    left = ~kept & (ends.view(1, -1) <= last.view(-1, 1) + 1)
    assert left.any()

    def formula(q, k, v, bias):
        return _pooled_formula(q, k, v, chosen, left, visible, tile)

    d_out = torch.randn(1, 4, n, 5, dtype=torch.float64)
    want = with_grads(formula, q, k, v, d_out)
    got = with_grads(run, q, k, v, d_out)
    # The rounding of dense attention over the same keys bounds that of attention over fewer, exact or mean.
    bound = exact(q, k, v, visible, d_out)
    for name in ("out", "dq", "dk", "dv"):
        allowed = 8 * torch.finfo(got.out.dtype).eps * float(bound.rounding[name].max())
        off = float((getattr(got, name) - getattr(want, name)).abs().max())
        assert off <= allowed, f"{name}: off by {off:.1e}, rounding allows {allowed:.1e}"


@pytest.mark.parametrize(
    "order", [AsGiven(), SegmentSort(segment=32, probe=8, queries=True)], ids=["given", "sorted"]
)
def test_pooled_rest_reduces_the_error_and_counts_its_cost(order):
    """Its control: the same tiles without the rest. Density counts the means, far fewer than the tokens."""
    q, k, v = qkv(1, 4, 2, 256)
    k, v = (
        x.repeat_interleave(8, 2)[:, :, :256] + 0.1 * torch.randn_like(x) for x in (k, v)
    )  # alike within tiles
    settings = {"score": MeanPool(), "select": TopK(2), "tile": (32, 16), "order": order, "always": (Own(),)}
    dense = tilewise.attend(q, k, v, mask="causal")
    errors, densities = [], []
    for rest in (Skip(), Pooled()):
        made = plan(Tiles(**settings, rest=rest), q, k, mask="causal")
        errors.append(float((tilewise.attend(q, k, v, made) - dense).norm()))
        densities.append(made.density)
    assert errors[1] < 0.7 * errors[0]
    assert densities[0] < densities[1] < densities[0] + 1 / 8


def test_pooled_rest_leaves_padding_out_and_takes_no_bias():
    q, k, v = qkv(1, 2, 1, 96)
    keep = torch.arange(96).ge(40).unsqueeze(0)
    method = Tiles(score=MeanPool(), select=TopK(1), tile=(16, 16), always=(Own(),), rest=Pooled())
    mask = Causal() & Padding(keep)
    noisy = [torch.where(keep.view(1, 1, -1, 1), x, 1e3 * torch.ones_like(x)) for x in (k, v)]
    assert torch.equal(
        tilewise.attend(q, *noisy, method, mask=mask), tilewise.attend(q, k, v, method, mask=mask)
    )
    with pytest.raises(ValueError, match="pooled remainder takes no bias"):
        tilewise.attend(q, k, v, method, mask=mask, bias=torch.zeros(96, dtype=torch.float64))


def test_pooled_rest_of_empty_sequences():
    method = Tiles(score=MeanPool(), select=TopK(1), tile=(16, 16), rest=Pooled())
    for n_q, n_k in ((0, 0), (0, 9), (9, 0), (1, 1)):
        q, k, v = qkv(1, 2, 1, n_q, n_k)
        assert tilewise.attend(q, k, v, method, mask=None).shape == (1, 2, n_q, 8)


def test_a_pass_over_means_alone():
    """`Pass(reads=Means(...))` by hand: every query reads the means of three uneven tiles."""
    q, k, v = qkv(1, 2, 1, 30)
    bounds = Tiling.from_bounds(torch.tensor([0, 4, 10, 30]))
    view = Everything().bind(30, 3)
    keep = torch.ones(1, 1, 30, dtype=torch.bool)
    one = Pass(view=view, tiles=None, q_order=None, k_order=None, reads=Means(bounds, order=None, seen=keep))
    out = tilewise.attend(q, k, v, Plan(passes=(one,), view=Everything().bind(30, 30), seconds=0.0))
    means = [torch.stack([x[:, :, a:b].mean(2) for a, b in ((0, 4), (4, 10), (10, 30))], 2) for x in (k, v)]
    counts = torch.tensor([4.0, 6.0, 20.0], dtype=torch.float64).log().view(1, 1, 1, 3)
    want = exact(q, *means, torch.ones(30, 3, dtype=torch.bool), bias=counts.expand(1, 2, 30, 3))
    want.check({"out": out})
    everyone = Plan((Pass(view, reads=Means(tiling=bounds)),), Everything().bind(30, 30))
    assert torch.equal(tilewise.attend(q, k, v, everyone), out)


@dataclass(frozen=True)
class _Halves:
    """An order of one's own: keys backwards, queries as given, each cut in two."""

    looks = "none"

    def arrange(self, q, k, view, scale, tile):
        half = Tiling(max(1, -(-k.shape[2] // 2)))
        backwards = torch.arange(k.shape[2]).flip(0).view(1, 1, -1)
        return Arrangement(q_tiling=half, k_tiling=half, q_order=None, k_order=backwards)


@dataclass(frozen=True)
class _Count:
    """Part of a rest of one's own: adds the number of tiles that were left to every output of a row of tiles."""

    left: Tensor
    tiling: Tiling

    def run(self, q, k, v, scale):
        counts = self.left.sum(-1).double().repeat_interleave(self.tiling.size, 2)[:, :, : q.shape[2]]
        return counts.unsqueeze(-1).expand(-1, -1, -1, v.shape[3])

    def cost(self):
        return self.left.sum((2, 3)).double()


class _Counted(Skip):
    def added(self, layout, chosen):
        assert layout.q_order is None and layout.given.k_pos[0, 0, 0] == 0 and layout.view.k_pos[0, 0, 0] == 9
        again = Chosen(scores=chosen.scores, keep=chosen.keep, left=chosen.left)
        assert torch.equal(again.keep | again.left, (layout.kinds() != 0).expand_as(again.keep))
        return (_Count(again.left, layout.q_tiling),)


def test_stages_of_ones_own_and_parts_outside_the_softmax():
    """What a rest adds joins the merged output and the cost; so do parts given by hand."""
    q, k, v = qkv(1, 2, 1, 10)
    method = Tiles(score=RandomTiles(), select=TopK(1), order=_Halves(), rest=_Counted())
    made = plan(method, q, k)
    seen = grid(made, 1, 2, 10, 10)
    assert seen.sum(-1).eq(5).all()
    want = exact(q, k, v, seen)
    got = tilewise.attend(q, k, v, method)
    want.check({"out": got - 1})
    bare = Plan(passes=made.passes, view=made.view, added=())
    want.check({"out": tilewise.attend(q, k, v, bare)})
    torch.testing.assert_close(
        made.density_by_head() - bare.density_by_head(), torch.full((1, 2), 2 / 100).double()
    )
    twice = Plan(made.passes, made.view, added=(*made.added, *made.added))
    torch.testing.assert_close(tilewise.attend(q, k, v, twice), got + 1)
    layout = Layout(q, k, made.view, Tiling(5), Tiling(5), 1.0, q_order=None, k_order=None, given=made.view)
    assert Pooled(slope=1.0).passes(
        layout, Chosen(seen[:, :, :2, :2].float(), *torch.ones(2, 1, 2, 2, 2).bool())
    )


# Compositions and recipes


SCORES = (MeanPool(), Centroid(), Antidiagonal(4), PageBounds(), TrueMass())
SELECTS = (TopK(2), Mass(0.6), Share(0.4, over="head"))
ORDERS = (
    AsGiven(),
    SegmentSort(segment=32, probe=8),
    SegmentSort(segment=32, probe=8, queries=True),
    Clusters(queries=4, keys=5),
)


@pytest.mark.parametrize("compare_forced", [True, False])
@pytest.mark.parametrize("order", ORDERS, ids=["given", "keys", "both", "clusters"])
@pytest.mark.parametrize("select", SELECTS, ids=["top-k", "mass", "share of a head"])
@pytest.mark.parametrize("score", SCORES, ids=lambda s: type(s).__name__)
def test_any_composition_computes_what_it_plans(score, select, order, compare_forced):
    """Order x score x select x always: forced tiles are there, hidden ones are not, arithmetic is exact."""
    for tile in ((32, 16), (4, 16)):
        method = Tiles(
            score=score,
            select=select,
            tile=tile,
            order=order,
            always=(Own(), First()),
            rest=Skip(),
            compare_forced=compare_forced,
        )
        q, k, v = qkv(2, 4, 2, 97)
        mask = Causal() & Padding(torch.arange(97).ge(torch.tensor([[0], [20]])))
        if isinstance(score, Antidiagonal) and isinstance(order, Clusters):
            with pytest.raises(ValueError, match="antidiagonal scores need tiles in multiples of stride 4"):
                plan(method, q, k, mask=mask)
            continue
        made = plan(method, q, k, mask=mask)
        seen = grid(made, 2, 4, 97, 97)
        assert not (seen & ~mask.bind(97, 97).tokens()).any()
        real = torch.arange(20, 97)
        assert seen[:, :, real, real].all()  # every query reads itself
        exact(q, k, v, seen).check({"out": tilewise.attend(q, k, v, method, mask=mask)})


def test_recipes_are_compositions():
    """A recipe's plan is that of the stages it names."""
    q, k, _ = qkv(1, 4, 2, 130)
    for recipe in (
        MoBA(block=16, top_k=2),
        XAttention(stride=4, threshold=0.5, tile=32),
        PBSAttention(64, 0.5, 32),
    ):
        assert isinstance(recipe, Recipe) and isinstance(recipe.tiles(), Tiles)
        assert recipe.lookahead == recipe.tiles().lookahead
        one, other = (grid(plan(m, q, k, mask="causal"), 1, 4, 130, 130) for m in (recipe, recipe.tiles()))
        assert torch.equal(one, other)
    with pytest.raises(TypeError, match="Recipe does not name its stages"):
        Recipe().tiles()
    with pytest.raises(TypeError, match="Method does not say how it plans"):
        Method().plan(None, None, None, 1.0)
    with pytest.raises(TypeError, match="Mask does not say what it hides"):
        Mask().bind(1, 1)


def test_moba_routes_every_query_to_its_own_and_its_best_blocks():
    """Written out query by query."""
    n, block, top_k = 100, 16, 3
    q, k, _ = qkv(1, 2, 1, n)
    got = grid(plan(MoBA(block=block, top_k=top_k), q, k, mask="causal"), 1, 2, n, n)
    for h in range(2):
        for i in range(n):
            own = i // block
            scores = [float(q[0, h, i] @ k[0, 0, b * block : (b + 1) * block].mean(0)) for b in range(own)]
            best = sorted(range(own), key=lambda b: -scores[b])[: top_k - 1]
            want = [j for j in range(i + 1) if j // block in (own, *best)]
            assert got[0, h, i].nonzero().flatten().tolist() == want


def test_sink_window_keeps_its_tokens():
    q, k, _ = qkv(1, 1, 1, 30)
    for sink, window in ((0, 1), (0, 7), (3, 1), (3, 7), (30, 1), (1, 100)):
        got = grid(plan(SinkWindow(sink=sink, window=window), q, k, mask="causal"), 1, 1, 30, 30)[0, 0]
        i, j = torch.arange(30).view(-1, 1), torch.arange(30).view(1, -1)
        assert torch.equal(got, (j <= i) & ((j < sink) | (j > i - window)))


def test_pbs_always_keeps_the_own_segment_and_the_tile_of_the_first_token():
    q, k, _ = qkv(1, 2, 1, 256)
    made = plan(PBSAttention(segment=64, threshold=1e-6, tile=16, queries=False), q, k, mask="causal")
    seen = grid(made, 1, 2, 256, 256)
    i, j = torch.arange(256).view(-1, 1), torch.arange(256).view(1, -1)
    own = (i // 64 == j // 64) & (j <= i)
    assert (seen | ~own).all()
    assert seen[..., 0].all(), "the first token, where attention sinks lie"


# What goes with MoBA


def test_key_convolution_starts_as_the_identity_and_looks_back_only():
    k = torch.randn(2, 3, 20, 4)
    convolution = KeyConvolution(channels=12, width=5)
    assert torch.equal(convolution(k), k)
    with torch.no_grad():
        convolution.taps.normal_()
    out = convolution(k)
    changed = k.clone()
    changed[:, :, 11:] += 1
    assert torch.equal(convolution(changed)[:, :, :11], out[:, :, :11])
    assert not torch.equal(convolution(changed)[:, :, 11], out[:, :, 11])
    late = torch.zeros_like(k)
    late[:, 1, 7, 2] = 1.0  # one spike reaches `width` tokens of its own channel
    reached = (convolution(late) != 0).nonzero()
    assert set(reached[:, 1].tolist()) == {1} and set(reached[:, 3].tolist()) == {2}
    assert reached[:, 2].unique().tolist() == [7, 8, 9, 10, 11]


def test_router_model_agrees_with_a_simulation():
    """The closed form of recall against draws from the model it describes."""
    snr, blocks, top_k, draws = 1.2, 20, 3, 200_000
    generator = torch.Generator().manual_seed(0)
    right = math.sqrt(2) * snr + torch.randn(draws, 1, generator=generator)
    others = torch.randn(draws, blocks - 1, generator=generator)
    share = float(((others > right).sum(1) < top_k).double().mean())
    predicted = router_recall(snr=snr, blocks=blocks, top_k=top_k)
    assert abs(share - predicted) <= 5 * math.sqrt(
        predicted * (1 - predicted) / draws
    )  # five standard errors
    assert router_recall(snr, 3, 3) == 1.0
    assert router_snr(head_dim=64, block=64, gap=1.0, clustered=1, cluster_gap=0.0) == pytest.approx(
        router_snr(64, 128, 1.0) * math.sqrt(2)
    )


def test_tile_map_of_a_pass_is_public():
    keep = torch.rand(1, 1, 2, 2) > 0.5
    view = Causal().bind(32, 32)
    one = Pass(view, TileMap.from_mask(keep, (16, 16)))
    assert Plan((one,), view).tile_maps[0].keep is keep
