"""Methods that users already know, against their definitions written out: Quest, vertical-slash, FlexPrefill."""

from __future__ import annotations

import math
from importlib import resources

import pytest
import torch
from torch import Tensor

from tests.attention.synthetic import true_mass
from tests.conformance.common import exact, grid, qkv, repeat, with_grads
from tilewise.attention import Mass, MeanPool, Plan, RandomTiles, Share, Tiles, attend, plan
from tilewise.attention.recipes.flexprefill import FlexPrefill, divergence
from tilewise.attention.recipes.quest import Quest
from tilewise.attention.recipes.vertical_slash import VerticalSlash, diagonal_tiles, diagonals
from tilewise.tiles import Causal, Documents, Padding, TokenMask, Window

LINES = VerticalSlash(vertical=5, slash=9, tile=8, probe=12, sinks=2, local=3)
FLEX = FlexPrefill(gamma=0.5, tau=0.1, min_budget=16, tile=16)


def _times(made: Plan, heads: int, n_q: int, n_k: int) -> Tensor:
    """How often each pair of tokens is computed, int64 `[heads, N_q, N_k]`, walked out pass by pass."""
    times = torch.zeros(heads, n_q, n_k, dtype=torch.int64)
    for one in made.passes:
        seen = repeat(one.view.tokens(), heads)[0].clone()
        if one.tiles is not None:
            keep = repeat(one.tiles.keep, heads)[0]
            rows, columns = (torch.arange(n) // cut.size for n, cut in zip(
                seen.shape[1:], (one.tiles.q_tiling, one.tiles.k_tiling)))  # fmt: skip
            seen &= keep[:, rows][:, :, columns]
        if one.reads is None:
            times += seen
            continue
        entries = one.reads.read(torch.arange(n_q))
        entries = entries.repeat_interleave(heads // entries.shape[1], 1)[0].expand(heads, n_q, -1)
        times.scatter_add_(2, entries, seen.long())
    return times


# Quest


def test_quest_reads_the_pages_with_the_largest_bounds():
    """Token by token: the sum over channels of the larger product with a page's minimum or maximum."""
    q, k, _ = qkv(heads=4, kv_heads=2, n_q=70)
    keep = plan(Quest(page=8, top_k=3), q, k, mask="causal").tile_maps[0].keep
    for head in range(4):
        pages = k[0, head // 2].split(8)
        for i in range(70):
            bounds = []
            for page in pages[: i // 8]:
                each = torch.maximum(q[0, head, i] * page.amin(0), q[0, head, i] * page.amax(0))
                assert each.sum() >= (page @ q[0, head, i]).max()
                bounds.append(float(each.sum()))
            best = sorted(range(i // 8), key=lambda j: -bounds[j])[:2]
            assert set(keep[0, head, i].nonzero().flatten().tolist()) == {i // 8, *best}


def test_quest_decodes_what_it_reads_in_a_prompt():
    q, k, v = qkv(heads=4, kv_heads=2, n_q=100)
    method = Quest(page=8, top_k=4)
    whole = attend(q, k, v, method, mask="causal")
    for t in (0, 7, 8, 63, 99):
        step = attend(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], method, mask="causal")
        torch.testing.assert_close(step, whole[:, :, t : t + 1])
    assert method.lookahead == "none"


# Vertical-slash


def _lines(method: VerticalSlash, q, k, seen: Tensor) -> tuple[list, list]:
    """Columns and distances of each head by definition, from float64 attention over the grid `seen [H, N, N]`."""
    heads, n = q.shape[1], q.shape[2]
    logits = (q[0] @ repeat(k, heads)[0].mT) * q.shape[3] ** -0.5
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    columns, distances = [], []
    shown = seen.any(1)
    for head in range(heads):
        last = weights[head, -method.probe :]
        sums = last.sum(0)
        sums[shown[head].nonzero().flatten()[: method.sinks]] = torch.inf
        columns.append(sums.topk(method.vertical).indices.tolist())
        along = torch.zeros(n, dtype=torch.float64)
        for i in range(max(n - method.probe, 0), n):
            for j in range(i + 1):
                along[i - j] += weights[head, i, j]
        along[: method.local] = torch.inf
        distances.append(along.topk(method.slash).indices.tolist())
    return columns, distances


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("padded", [0, 11])
def test_vertical_slash_reads_its_columns_and_diagonals_once(heads, kv_heads, padded):
    """Token by token: a pair is read when its key is a column, or its tile holds a kept diagonal; never twice."""
    n, tile = 75, 8
    q, k, v = qkv(heads=heads, kv_heads=kv_heads, n_q=n)
    mask = Causal() & Padding(torch.arange(n).ge(padded).unsqueeze(0))
    seen = mask.bind(n, n).tokens()[0].expand(heads, n, n)
    columns, distances = _lines(LINES, q, k, seen)
    want = torch.zeros(heads, n, n, dtype=torch.bool)
    for head in range(heads):
        kept = {((j + d) // tile, j // tile) for d in distances[head] for j in range(n - d)}
        for i in range(n):
            for j in range(i + 1):
                want[head, i, j] = j in columns[head] or (i // tile, j // tile) in kept
    want &= seen
    made = plan(LINES, q, k, mask=mask)
    times = _times(made, heads, n, n)
    assert int(times.max()) == 1
    assert torch.equal(times.bool(), want)
    every = torch.arange(n)
    assert torch.equal(made.kept(every, every, heads)[0], want)
    assert 0 < want.sum() < 0.95 * seen.sum()
    exact(q, k, v, want.unsqueeze(0)).check({"out": attend(q, k, v, made, mask=mask)})


def test_diagonals_are_sums_by_distance():
    """Also behind the query, as masks that are not causal show, and for more queries than keys and the reverse."""
    for n_q, n_k, rows in ((9, 9, 4), (5, 12, 5), (12, 5, 3)):
        weights = torch.rand(1, 2, rows, n_k)
        got = diagonals(weights, n_q)
        want = torch.zeros(1, 2, n_k + n_q - 1)
        for r in range(rows):
            for j in range(n_k):
                distance = n_k - rows + r - j
                want[..., distance if distance >= 0 else n_k - 1 - distance] += weights[..., r, j]
        torch.testing.assert_close(got, want)
        for at in range(n_k + n_q - 1):
            distance = at if at < n_k else n_k - 1 - at
            kept = torch.zeros(1, 1, n_k + n_q - 1, dtype=torch.bool)
            kept[..., at] = True
            tiles = torch.zeros(-(-n_q // 4), -(-n_k // 4), dtype=torch.bool)
            for i in range(n_q):
                if 0 <= n_k - n_q + i - distance < n_k:
                    tiles[i // 4, (n_k - n_q + i - distance) // 4] = True
            assert torch.equal(diagonal_tiles(kept, n_q, n_k, 4)[0, 0], tiles)


def test_vertical_slash_finds_planted_lines():
    """A column and a distance that all queries look at, of 512: found, and most of the attention with them.

    Control: as many columns and diagonals found on other queries hold little of it.
    """
    g = torch.Generator().manual_seed(0)
    n, d = 512, 64
    q = torch.nn.functional.normalize(torch.randn(1, 1, n, d, generator=g), dim=-1)
    k = torch.roll(q, -100, 2) * 60  # every query is like the key 100 places before it
    k = torch.where(torch.arange(n).view(1, 1, n, 1) < n - 100, k, torch.randn(1, 1, n, d, generator=g))
    k[:, :, 37] = 60 * q.sum(2) / q.sum(2).norm() * 3
    method = VerticalSlash(vertical=4, slash=8, tile=16, probe=64, sinks=1, local=2)
    mass, _ = true_mass(q, k, (1, 1))

    def held(made: Plan) -> float:
        return float((mass[0] * _times(made, 1, n, n)).sum() / mass.sum())

    mine, other = (plan(method, x, k, mask="causal") for x in (q, torch.randn(1, 1, n, d, generator=g)))
    assert bool(mine.kept(torch.arange(100, n), torch.arange(n - 100), 1)[0, 0].diagonal().all())
    assert bool(mine.kept(torch.arange(38, n), torch.tensor([37]), 1).all())
    assert held(mine) > 0.7 > 2 * held(other)
    assert other.density == pytest.approx(mine.density, rel=0.5) and mine.density < 0.3


# FlexPrefill


def test_divergence_is_the_root_of_jensen_and_shannons():
    p, q = (
        torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]),
        torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]]),
    )
    for one, (a, b) in zip(divergence(p=p, q=q), zip(p.tolist(), q.tolist())):
        middle = [(x + y) / 2 for x, y in zip(a, b)]
        terms = [x * math.log(x / m) for side in (a, b) for x, m in zip(side, middle) if x]
        assert float(one) == pytest.approx(math.sqrt(sum(terms) / 2), abs=1e-6)
    assert float(divergence(p, p).max()) == 0
    assert float(divergence(p, q)[1]) == pytest.approx(math.sqrt(math.log(2)))


def _fewest(scores: list[float], share: float) -> list[int]:
    """Indices of the fewest entries that hold a share of the sum, largest first."""
    order, taken, held = sorted(range(len(scores)), key=lambda j: -scores[j]), [], 0.0
    for j in order:
        if held >= share * sum(scores):
            break
        taken.append(j)
        held += scores[j]
    return taken


def _two_heads(n: int = 128, tile: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """A head whose keys of a tile are alike, so that means are true, and one that looks at single keys."""
    q, k, v = qkv(heads=2, n_q=n, d=16)
    k[:, 0] = k[:, 0].unflatten(1, (-1, tile))[:, :, :1].expand(-1, -1, tile, -1).flatten(1, 2)
    q[:, 0] = q[:, 0, -1:] + 0.1 * q[:, 0]
    k[:, 1, 5::37] += 8 * q[:, 1, -3].unsqueeze(1)
    return q, k, v


def test_flexprefill_chooses_pattern_and_tiles_by_definition():
    n, tile, gamma = 128, 16, 0.6
    q, k, _ = _two_heads()
    method = FlexPrefill(gamma=gamma, tau=0.1, min_budget=16, tile=tile)
    keep = plan(method, q, k, mask="causal").tile_maps[0].keep[0]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    weights = ((q @ k.mT) / 4).masked_fill(~causal, -torch.inf).softmax(-1)[0]
    mean_q, mean_k = (x.unflatten(2, (-1, tile)).mean(3)[0] for x in (q, k))
    pooled = (
        ((mean_q @ mean_k.mT) / 4)
        .masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), -torch.inf)
        .softmax(-1)
    )
    for head, aware in ((0, True), (1, False)):
        last = weights[head, -tile:].mean(0)
        columns = last.view(8, tile).sum(1)
        assert bool(divergence(pooled[head, -1], columns) < 0.1) == aware
        slashes = torch.zeros(8, dtype=torch.float64)
        for i in range(n - tile, n):
            for j in range(i + 1):
                slashes[(i - j) // tile] += weights[head, i, j]
        want = {(i, j) for i in range(8) for j in (0, i)}
        lines = [int(x.argmax()) for x in (columns, slashes)]  # the least budget: one tile of each
        share = [lines[:1], lines[1:]] if aware else [_fewest(x.tolist(), gamma) for x in (columns, slashes)]
        want |= {(i, j) for j in share[0] for i in range(j, 8)} | {
            (j + d, j) for d in share[1] for j in range(8 - d)
        }
        if aware:
            flat = _fewest(pooled[head].flatten().tolist(), gamma)
            want |= {(at // 8, at % 8) for at in flat}
        assert {tuple(x) for x in keep[head].nonzero().tolist()} == want
    assert keep[0].sum() < 36 and keep[1].sum() < 36


def test_flexprefill_without_trust_is_vertical_slash_and_with_it_is_pooled():
    q, k, _ = _two_heads()
    lines = plan(FlexPrefill(gamma=0.6, tau=0, min_budget=16, tile=16), q, k, mask="causal").tile_maps[0].keep
    means = (
        plan(FlexPrefill(gamma=0.6, tau=2.0, min_budget=16, tile=16), q, k, mask="causal").tile_maps[0].keep
    )
    pooled = plan(Tiles(MeanPool(), Mass(0.6, over="head"), (16, 16)), q, k, mask="causal").tile_maps[0].keep
    assert not (pooled & ~means).any() and not torch.equal(lines, means)
    more = plan(FlexPrefill(gamma=0.6, tau=0, min_budget=64, tile=16), q, k, mask="causal").tile_maps[0].keep
    assert not (lines & ~more).any() and more.sum() > lines.sum()


# All of them

FULL = {
    "quest": Quest(page=8, top_k=10**6),
    "diagonals": VerticalSlash(vertical=5, slash=10**6, tile=16, probe=16, sinks=2, local=4),
    "columns": VerticalSlash(vertical=10**6, slash=9, tile=16, probe=16, sinks=2, local=4),
    "flexprefill": FlexPrefill(gamma=1.0, tile=16),
}
SMALL = {"quest": Quest(page=8, top_k=3), "vertical-slash": LINES, "flexprefill": FLEX}
MASKS = {
    "none": None,
    "causal": "causal",
    "window": Causal() & Window(40, None),
    "documents": Causal() & Documents(torch.tensor([0, 30, 30, 130])),
    "padding": Causal() & Padding(torch.arange(130).ge(torch.tensor([[13], [40]]))),
    "boolean": TokenMask(torch.rand(1, 4, 130, 130, generator=torch.Generator().manual_seed(3)) > 0.4),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("method", FULL.values(), ids=FULL)
def test_full_density_is_dense_under_every_mask(method, mask):
    q, k, v = qkv(b=2, heads=4, kv_heads=2, n_q=130)
    d_out, every = torch.randn_like(q), torch.arange(130)
    visible = grid(plan("dense", q, k, mask=mask), 2, 4, 130, 130)
    made = plan(method, q, k, mask=mask)
    assert torch.equal(made.kept(every, every, 4).expand(2, -1, -1, -1), visible)
    run = lambda q, k, v, bias: attend(q, k, v, method, mask=mask)  # noqa: E731
    exact(q, k, v, visible, d_out).check(with_grads(run, q, k, v, d_out))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("method", SMALL.values(), ids=SMALL)
def test_sparse_settings_leave_nobody_out(method, mask):
    """Pairs that are read are visible ones, and every query that sees something reads something."""
    q, k, v = qkv(b=2, heads=4, kv_heads=2, n_q=130)
    every = torch.arange(130)
    visible = grid(plan("dense", q, k, mask=mask), 2, 4, 130, 130)
    made = plan(method, q, k, mask=mask)
    seen = made.kept(every, every, 4).expand(2, -1, -1, -1)
    assert not (seen & ~visible).any() and seen.sum() < visible.sum()
    assert mask is not None and isinstance(mask, TokenMask) or torch.equal(seen.any(-1), visible.any(-1))
    exact(q, k, v, seen).check({"out": attend(q, k, v, made, mask=mask)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n_q", "n_k"), [(0, 0), (1, 1), (17, 17), (129, 129), (40, 100), (33, 5), (0, 7)])
@pytest.mark.parametrize("method", SMALL.values(), ids=SMALL)
def test_edge_lengths_and_low_precision(method, n_q, n_k, dtype):
    q, k, v = qkv(heads=4, kv_heads=2, n_q=n_q, n_k=n_k, dtype=dtype)
    made = plan(method, q, k, mask="causal")
    out = attend(q, k, v, made, mask="causal")
    assert out.dtype == dtype and out.shape == q.shape and out.isfinite().all() and 0 <= made.density <= 1
    large = plan(method, 100 * q, 100 * k, mask="causal")  # products beyond float16's range
    assert attend(100 * q, 100 * k, v, large, mask="causal").isfinite().all()


@pytest.mark.parametrize(
    ("kind", "settings", "match"),
    [
        (Quest, {"page": 0}, "page must be an integer >= 1, got 0"),
        (Quest, {"top_k": 0}, "top-k must be an integer >= 1, got 0"),
        (VerticalSlash, {"vertical": 0}, "vertical must be an integer >= 1, got 0"),
        (VerticalSlash, {"slash": 1.5}, "slash must be an integer >= 1, got 1.5"),
        (VerticalSlash, {"tile": 0}, "tile must be"),
        (VerticalSlash, {"probe": 0}, "probe must be"),
        (VerticalSlash, {"sinks": -1}, "sinks must be an integer >= 0, got -1"),
        (VerticalSlash, {"local": 0}, "local must be an integer >= 1, got 0"),
        (FlexPrefill, {"gamma": 0}, r"gamma must be in \(0, 1\], got 0"),
        (FlexPrefill, {"gamma": 1.1}, "gamma must be"),
        (FlexPrefill, {"tau": -0.1}, "tau must be >= 0, got -0.1"),
        (FlexPrefill, {"min_budget": 0}, "min_budget must be an integer >= 1, got 0"),
        (FlexPrefill, {"tile": "16"}, "tile must be an integer >= 1, got '16'"),
    ],
)
def test_bad_settings(kind, settings, match):
    with pytest.raises(ValueError, match=match):
        kind(**settings)


@pytest.mark.parametrize("method", [LINES, FLEX], ids=["vertical-slash", "flexprefill"])
def test_methods_for_prompts_refuse_to_decode(method):
    q, k, v = qkv(n_q=1, n_k=40)
    with pytest.raises(ValueError, match="does not support decode"):
        attend(q, k, v, method, mask="causal")


def test_on_a_model_each_errs_less_than_random_tiles():
    """The bundled model at 1,024 tokens, its last layer: at no more density, a half of the error at most."""
    from tilewise.models import bundled_model, capture, load_model

    model, tokenizer = load_model(bundled_model())
    text = resources.files("tilewise.data").joinpath("sample.txt").read_text(encoding="utf-8")[:2048]
    q, k, v = capture(model, torch.tensor(tokenizer(text)["input_ids"])[:1024], layers=[5])[5]
    dense = attend(q, k, v, mask="causal")

    def error(made) -> float:
        return float((attend(q, k, v, made, mask="causal") - dense).norm())

    for method in (
        Quest(top_k=16),
        VerticalSlash(vertical=64, slash=110, tile=32, local=50),
        FlexPrefill(gamma=0.6, min_budget=64, tile=32),
    ):
        made = plan(method, q, k, mask="causal")
        tile = (1, 16) if isinstance(method, Quest) else (32, 32)
        for share in (0.2, 0.3, 0.4, 0.6, 0.8):
            random = plan(Tiles(RandomTiles(), Share(share), tile), q, k, mask="causal")
            if random.density >= made.density:
                break
        assert made.density <= random.density < 0.9
        assert 2 * error(made) < error(random), method
