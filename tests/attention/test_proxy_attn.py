"""ProxyAttn: a few heads score for all at equal recall and a fraction of the products; budgets follow sparsity."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from tests.attention.synthetic import true_mass
from tests.conformance.common import exact, grid, qkv, with_grads
from tilewise.attention import (
    Antidiagonal,
    First,
    Layout,
    MeanPool,
    Own,
    RandomTiles,
    Tiles,
    TopK,
    attend,
    plan,
)
from tilewise.attention.recipes.proxy_attn import ProxyAttn, ProxyHeads, best, budgets
from tilewise.attention.scores import grouped
from tilewise.tiles import NONE, Causal, Documents, Padding, Tiling, Window

N, TILE = 2048, 64


def _layout(q, k, tile: int = TILE, mask=None) -> Layout:
    view = (mask or Causal()).bind(q.shape[2], k.shape[2])
    return Layout(q, k, view, Tiling(tile), Tiling(tile), q.shape[3] ** -0.5)


class _PooledWindows:
    """What is usual: windows of `width` tokens pooled to their means, for every head; then their largest weight."""

    looks = "tile"

    def __init__(self, width: int) -> None:
        self.width = width

    def score(self, layout: Layout, among: Tensor) -> Tensor:
        every, per = Tiling(self.width), TILE // self.width
        q, k = (every.mean(x)[0] for x in (layout.q, layout.k))
        hidden = layout.view.tiles(every, every) == NONE
        weights = (grouped(q, k) * layout.scale).masked_fill(hidden, -torch.inf).softmax(-1)
        return weights.unflatten(3, (-1, per)).amax(4).unflatten(2, (-1, per)).amax(3)


def _recall(score, q, k, per_row: int, mass: Tensor) -> tuple[float, int]:
    """Share of the true mass in each row's `per_row` tiles, first and diagonal among them; products in scoring."""
    layout = _layout(q, k)
    visible = layout.kinds() != NONE
    with FlopCounterMode(display=False) as counter:
        scores = score.score(layout, visible)
    forced = visible & (First().tiles(layout, visible) | Own().tiles(layout, visible))
    chosen = TopK(per_row).select(scores, visible, forced)
    return float((mass * chosen).sum() / mass.sum()), counter.get_total_flops() // (2 * q.shape[3])


def _needles(heads: int, d: int = 16, seed: int = 0, alike: bool = True) -> tuple[Tensor, Tensor]:
    """Runs of four keys that queries look for, each in a tile of its own, and tiles of keys that suit them less.

    Such runs hold most of the attention, and pooling dilutes them. Heads alike look in one direction at the same
    places, with noise of their own; others each for themselves.
    """
    g = torch.Generator().manual_seed(seed)
    kinds = 1 if alike else heads
    direction = normalize(torch.randn(kinds, 1, d, generator=g), dim=-1)
    weight = torch.zeros(kinds, N, 1)
    for kind in range(kinds):
        tiles = (torch.randperm(N // TILE, generator=g) * TILE).tolist()
        for start in tiles[10:20]:
            weight[kind, start : start + TILE] = 0.7
        for start in tiles[:10]:
            start += int(torch.randint(TILE - 4, (1,), generator=g))
            weight[kind, start : start + 4] = 1.5
    q, k = (0.6 * torch.randn(1, heads, N, d, generator=g) for _ in range(2))
    return q + 5 * direction, k + 5 * weight * direction


@pytest.mark.evidence
@pytest.mark.parametrize("seed", range(2))
def test_one_proxy_finds_for_sixteen_heads_what_each_would_find(seed):
    """One sixteenth of the products, recall within a twentieth of that of scores for each head.

    Controls: pooling of windows, which spends the same products on sequence length instead (16 heads, windows of 16
    tokens), and four times as many, both fall far behind; for heads that differ the proxy is no better than chance.
    """
    q, k = _needles(16, seed=seed)
    mass, _ = true_mass(q, k, (TILE, TILE))
    own, all_products = _recall(ProxyHeads(proxies=16, stride=4), q, k, 7, mass)
    proxy, products = _recall(ProxyHeads(proxies=1, stride=4), q, k, 7, mass)
    assert products * 16 == all_products == 16 * (N // 4) ** 2
    assert own > 0.75 and proxy > 0.95 * own
    for width, times in ((16, 1), (8, 4)):
        pooled, spent = _recall(_PooledWindows(width), q, k, 7, mass)
        assert spent == times * products and pooled < 0.85 * proxy, width
    assert _recall(MeanPool(), q, k, 7, mass)[0] < 0.7 * proxy

    q, k = _needles(16, seed=seed, alike=False)
    mass, _ = true_mass(q, k, (TILE, TILE))
    own, proxy, chance = (
        _recall(score, q, k, 7, mass)[0] for score in (ProxyHeads(16, 4), ProxyHeads(1, 4), RandomTiles())
    )
    assert own > 0.75 and proxy < chance + 0.05 < 0.75 * own


@pytest.fixture(scope="module")
def captured() -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    from tilewise.models import bundled_model, capture, load_model

    model, tokenizer = load_model(bundled_model())
    text = resources.files("tilewise.data").joinpath("sample.txt").read_text(encoding="utf-8")[: 2 * N]
    return capture(model, torch.tensor(tokenizer(text)["input_ids"])[:N], layers=range(1, 6))


def _far_gain(q, k, scores) -> Tensor:
    """Recall beyond that of random tiles, of attention farther back than the tile before the diagonal."""
    layout, tiles = _layout(q, k), torch.arange(N // TILE)
    far = (layout.kinds() != NONE) & (tiles.unsqueeze(1) - tiles >= 2) & (tiles > 0)
    mass = true_mass(q, k, (TILE, TILE))[0] * far
    chosen = [TopK(4).select(x.score(layout, far), far, far & False) for x in (*scores, RandomTiles())]
    recall = torch.stack([(mass * x).sum() / mass.sum() for x in chosen])
    return recall[:-1] - recall[-1]


@pytest.mark.evidence
def test_on_a_model_two_proxies_find_what_its_four_heads_find(captured):
    """Half of the products, and of the attention that lies far back as much as heads find for themselves: counted
    beyond what random tiles hold, 0.98 of it at least.

    Control: proxies that stand for heads of two different layers, which are less alike, keep less than 0.85 of it.
    (Attention of this byte-level model is smooth within tiles, so that here pooled means do better than either.)
    """
    own, proxy = sum(_far_gain(q, k, (ProxyHeads(4, 4), ProxyHeads(2, 4))) for q, k, _ in captured.values())
    assert own > 5 * 0.05 and proxy > 0.98 * own

    own = proxy = torch.zeros(())
    for layers in ((1, 2), (1, 4), (2, 5), (3, 5)):
        for head in (0, 1):
            q = torch.stack([captured[layer][0][:, 2 * head] for layer in layers], 1)
            k = torch.stack([captured[layer][1][:, head] for layer in layers], 1)
            gained = _far_gain(q, k, (ProxyHeads(2, 4), ProxyHeads(1, 4)))
            own, proxy = own + gained[0], proxy + gained[1]
    assert own > 8 * 0.05 and proxy < 0.85 * own


def _foci(sharpness: list[float], d: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Heads that look at the same 24 runs of six keys, weighed alike but more or less sharply."""
    g = torch.Generator().manual_seed(seed)
    direction = normalize(torch.randn(d, generator=g), dim=-1)
    weight = torch.zeros(N, 1)
    for place, w in zip(
        (torch.randperm(N // 6 - 1, generator=g)[:24] * 6).tolist(), torch.linspace(1, 0.5, 24)
    ):
        weight[place : place + 6] = w
    q, k = (0.7 * torch.randn(1, len(sharpness), N, d, generator=g) for _ in range(2))
    return (q + 6 * direction) * torch.tensor(sharpness).view(1, -1, 1, 1), k + 6 * weight * direction


def _missed(sharpness: list[float], seed: int) -> tuple[float, float]:
    """Share of the true mass that is not read: with budgets by head, and with one for all that costs no less."""
    q, k = _foci(sharpness, seed=seed)
    mass, _ = true_mass(q, k, (TILE, TILE))
    made = plan(ProxyAttn(threshold=0.95, min_budget=TILE, tile=TILE), q, k, mask="causal")
    rows = made.tile_maps[0].keep.sum(-1).amax(-1).float()  # the longest row of each head
    for count in range(int(rows.mean()) - 3, N // TILE):
        same = Tiles(ProxyHeads(), TopK(count), (TILE, TILE), always=(First(), Own()))
        other = plan(same, q, k, mask="causal")
        if other.density >= made.density:
            break
    mine, theirs = (1 - float((mass * x.tile_maps[0].keep).sum() / mass.sum()) for x in (made, other))
    return mine, theirs


@pytest.mark.evidence
def test_budgets_by_head_beat_one_for_all_where_heads_differ_in_sparsity():
    """At no more tiles in all, less than a third of the attention is missed. Control: heads equally sparse gain
    nothing."""
    for seed in range(2):
        mine, theirs = _missed([1.5, 1.5, 1.0, 1.0, 0.4, 0.4, 0.3, 0.3], seed)
        assert mine < theirs / 3
        mine, theirs = _missed([1.0] * 4, seed)
        assert mine > 0.8 * theirs


@pytest.mark.evidence
@pytest.mark.parametrize(
    ("heads", "kv_heads", "proxies"), [(4, 2, 1), (4, 2, 2), (4, 2, 4), (4, 4, 2), (4, 1, 4)]
)
def test_score_is_its_definition(heads, kv_heads, proxies):
    """The mean heads' attention over every third token, its largest weight in each tile, in loops."""
    n, stride, tile = 50, 3, 12
    q, k, _ = qkv(heads=heads, kv_heads=kv_heads, n_q=n)
    got = ProxyHeads(proxies, stride).score(_layout(q, k, tile), torch.ones(1, heads, 5, 5, dtype=torch.bool))
    share, kept = heads // proxies, range(0, n, stride)
    for head in range(heads):
        group = head // share
        mine = [group * share + i for i in range(share)]
        theirs = {h * kv_heads // heads for h in mine}
        mean_q = q[0, mine].mean(0)
        mean_k = k[0, sorted(theirs)].mean(0)
        want = torch.zeros(5, 5, dtype=torch.float64)
        for i in kept:
            seen = [j for j in kept if j <= i]
            weights = (mean_q[i] @ mean_k[seen].mT * 8**-0.5).softmax(-1)
            for j, weight in zip(seen, weights):
                want[i // tile, j // tile] = max(want[i // tile, j // tile], weight)
        torch.testing.assert_close(got[0, head].double(), want)


@pytest.mark.evidence
def test_budget_is_its_definition():
    """The fewest tiles that hold the share of the last tile's queries' attention; then the best of every row."""
    q, k, _ = qkv(heads=2, n_q=90, d=16)
    q = 2 * q
    layout = _layout(q, k, 16)
    counts = budgets(layout, 0.7)
    logits = (q @ k.mT / 4).masked_fill(~torch.ones(90, 90, dtype=torch.bool).tril(), -torch.inf)
    tiles = logits.softmax(-1)[:, :, -16:].mean(2).split(16, -1)
    shares = torch.stack([x.sum(-1) for x in tiles], -1)
    for head in range(2):
        held = shares[0, head].sort(descending=True).values.cumsum(-1)
        assert int(counts[0, head]) == int((held < 0.7).sum()) + 1
    keep = plan(ProxyAttn(2, 2, 0.7, 1, 16), q, k, mask="causal").tile_maps[0].keep
    scores = ProxyHeads(2, 2).score(layout, keep)
    for head in range(2):
        for row in range(6):
            order = sorted(range(1, row), key=lambda j: -float(scores[0, head, row, j]))
            want = {0, row} | set(order[: max(0, int(counts[0, head]) - len({0, row}))])
            assert set(keep[0, head, row].nonzero().flatten().tolist()) == want


def test_least_budget_counts_tokens():
    q, k, _ = qkv(heads=2, n_q=256)
    keep = (
        plan(ProxyAttn(stride=1, threshold=1e-6, min_budget=50, tile=16), q, k, mask="causal")
        .tile_maps[0]
        .keep
    )
    assert keep.sum(-1).unique().tolist() == [1, 2, 3, 4]  # 50 tokens are 4 tiles


MASKS = {
    "none": None,
    "causal": "causal",
    "window": Causal() & Window(40, None),
    "documents": Causal() & Documents(torch.tensor([0, 30, 30, 130])),
    "padding": Causal() & Padding(torch.arange(130).ge(torch.tensor([[13], [40]]))),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_computes_what_it_says_and_all_at_full_density(mask, threshold):
    q, k, v = qkv(b=2, heads=4, kv_heads=2, n_q=130)
    method = ProxyAttn(proxies=2, stride=2, threshold=threshold, min_budget=16, tile=16)
    seen, visible = (grid(plan(x, q, k, mask=mask), 2, 4, 130, 130) for x in (method, "dense"))
    assert torch.equal(seen, visible) if threshold == 1 else not (seen & ~visible).any()
    assert torch.equal(seen.any(-1), visible.any(-1))  # no query that sees something is left with nothing
    d_out = torch.randn_like(q)
    run = lambda q, k, v, bias: attend(q, k, v, method, mask=mask)  # noqa: E731
    exact(q, k, v, seen, d_out).check(with_grads(run, q, k, v, d_out))


@pytest.mark.parametrize("at_once", [1, 10**9])
def test_pieces_change_nothing(at_once, monkeypatch):
    from tilewise.attention.recipes import proxy_attn

    q, k, _ = qkv(heads=4, kv_heads=2, n_q=100)
    layout, among = _layout(q, k, 16), torch.ones(1, 4, 7, 7, dtype=torch.bool)
    want = ProxyHeads(2, 4).score(layout, among)
    monkeypatch.setattr(proxy_attn, "AT_ONCE", at_once)
    torch.testing.assert_close(ProxyHeads(2, 4).score(layout, among), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n_q", "n_k"), [(0, 0), (1, 1), (17, 17), (129, 129), (40, 100), (33, 5), (0, 7)])
def test_edge_lengths_and_low_precision(n_q, n_k, dtype):
    q, k, v = qkv(heads=4, kv_heads=2, n_q=n_q, n_k=n_k, dtype=dtype)
    method = ProxyAttn(proxies=4, stride=4, threshold=0.5, min_budget=16, tile=16)
    made = plan(method, q, k, mask="causal")
    out = attend(q, k, v, made, mask="causal")
    assert out.dtype == dtype and out.shape == q.shape and out.isfinite().all() and 0 <= made.density <= 1
    large = plan(method, 100 * q, 100 * k, mask="causal")  # products beyond float16's range
    assert attend(100 * q, 100 * k, v, large, mask="causal").isfinite().all()


def test_is_a_score_for_other_methods():
    q, k, _ = qkv(heads=4, n_q=128)
    kept = plan(Tiles(ProxyHeads(1, 4), TopK(2), (16, 16)), q, k, mask="causal").tile_maps[0].keep
    assert (kept == kept[:, :1]).all()  # all heads choose alike
    scores, among = torch.rand(1, 2, 3, 4), torch.ones(1, 2, 3, 4, dtype=torch.bool)
    chosen = best(scores=scores, among=among, forced=among & False, count=torch.tensor([[1, 3]]))
    assert chosen.sum(-1).tolist() == [[[1] * 3, [3] * 3]]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"proxies": 0}, "proxies must be an integer >= 1, got 0"),
        ({"stride": 3}, "stride must divide the tile size 128, got 3"),
        ({"stride": 0}, "stride must be an integer >= 1"),
        ({"threshold": 0}, r"threshold must be in \(0, 1\], got 0"),
        ({"threshold": 1.5}, "threshold must be"),
        ({"min_budget": 0}, "min_budget must be an integer >= 1, got 0"),
        ({"tile": 2.0}, "tile must be an integer >= 1, got 2.0"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        ProxyAttn(**settings)


def test_heads_that_do_not_group_are_refused():
    q, k, v = qkv(heads=6, kv_heads=2, n_q=40)
    for proxies in (3, 4, 12):
        with pytest.raises(
            ValueError, match=f"proxies must divide the kv heads.* got {proxies} for 2 kv heads and 6"
        ):
            attend(q, k, v, ProxyAttn(proxies=proxies), mask="causal")
    with pytest.raises(ValueError, match="multiples of stride 3"):
        ProxyHeads(1, 3).score(_layout(q, k, 16), torch.ones(()))
    with pytest.raises(ValueError, match="does not support decode"):
        attend(q[:, :, :1], k, v, ProxyAttn(), mask="causal")


def test_antidiagonal_sums_cost_more_products():
    """What the products of a proxy are worth: XAttention's, at its usual stride, for each of 16 heads."""
    q, k = _needles(16)
    mass = torch.ones(1, 16, N // TILE, N // TILE)
    spent = [_recall(score, q, k, 7, mass)[1] for score in (Antidiagonal(8), ProxyHeads(1, 4))]
    assert spent[0] == 32 * spent[1]
