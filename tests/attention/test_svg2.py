"""SVG2: tiles of like tokens hold more of the attention than tiles of neighbours, where likeness is what counts."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.attention.video_like import video_qkv
from tests.conformance.common import ENGINES, qkv
from tests.conformance.weighted import (
    MASKS,
    check_full,
    check_plan,
    error,
)
from tilewise.attention import (
    Arrangement,
    Boxes,
    Layout,
    Mass,
    MeanPool,
    Plan,
    RandomTiles,
    Share,
    Tiles,
    TrueMass,
    attend,
    plan,
)
from tilewise.attention.recipes.svg2 import SVG2, Alike, Either, OwnKeys, SVG2Steps, cut
from tilewise.data.shapes import moving_shapes
from tilewise.models.video import capture_video, load_video, sample
from tilewise.tiles import NONE, Causal, Everything, Padding
from tilewise.tiles.clustering import kmeans

GRID = (8, 16, 16)
SMALL = SVG2(5, 7, threshold=0.5, least=0.1, tile=(16, 16), iterations=3, seed=0)
VIDEO = SVG2(16, 64, threshold=0.8, least=0.02, tile=(128, 64))


@functools.lru_cache(maxsize=4)
def semantic(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A head of a made-up video that attends by cluster; clusters lie scattered over the grid."""
    made = video_qkv(GRID, strength=6.0, seed=seed)
    head = made.kinds.index("semantic")
    return tuple(x[:, head : head + 1] for x in made[:3])  # type: ignore[return-value]


@functools.lru_cache(maxsize=4)
def captured(layer: int, t: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a layer of the trained video model, halfway from noise to a clip."""
    clip = moving_shapes(1, seed=0).pixels
    noisy = t * clip + (1 - t) * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    return capture_video(load_video(), noisy, t, [layer])[layer]


class Held:
    """An order and a score that are made once, for plans of many budgets."""

    looks = "prompt"

    def __init__(self, tiles: Tiles) -> None:
        self.tiles, self.made = tiles, {}

    def arrange(self, *given):
        self.made.setdefault("order", self.tiles.order.arrange(*given))
        return self.made["order"]

    def score(self, layout, among):
        if "score" not in self.made:
            self.made["score"] = self.tiles.score.score(layout, among)
        return self.made["score"]


def least(made: Tiles, select: type, density: float, q: Tensor, k: Tensor) -> Plan:
    """The plan of these stages at the least setting of `select`, to a 128th, that is at least as dense."""
    held = Held(made)
    made, low, high = replace(made, order=held, score=held), 0, 128
    while high - low > 1:
        middle = (low + high) // 2
        enough = plan(replace(made, select=select(middle / 128)), q, k).density >= density
        low, high = (low, middle) if enough else (middle, high)
    return plan(replace(made, select=select(high / 128)), q, k)


def by_place(**options) -> dict[str, Tiles]:
    """The same number of tiles as `VIDEO`, of neighbours: in a line, and in boxes of the grid."""
    score = options.pop("score", MeanPool(counted=True))
    return {
        "line": Tiles(score=score, select=Share(1.0), tile=(128, 32)),
        "boxes": Tiles(score=score, select=Share(1.0), order=Boxes(GRID, (2, 4, 4))),
    }


@pytest.mark.evidence
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_the_permutation_errs_less_than_tiles_of_neighbours_at_equal_density(seed, threshold):
    """Where tokens attend by likeness, by centroids and by the true mass of neighbours' tiles alike.

    Controls at no less density: the same score and budgets over tiles in order of position (fixed share and share
    of mass), what the best choice of those tiles could do, and the permuted tiles chosen at random.
    """
    q, k, v = semantic(seed)
    dense = attend(q, k, v)
    method = replace(VIDEO, threshold=threshold)
    made = plan(method, q, k)
    mine = error(attend(q, k, v, made), dense)
    for name, tiles in by_place().items():
        best = replace(tiles, score=TrueMass())
        for other in (
            least(tiles, Share, made.density, q, k),
            least(tiles, Mass, made.density, q, k),
            least(best, Share, made.density, q, k),
        ):
            assert other.density >= made.density
            assert mine < 0.5 * error(attend(q, k, v, other), dense), name
    chance = least(replace(method.over(method.order()), score=RandomTiles()), Share, made.density, q, k)
    assert mine < 0.2 * error(attend(q, k, v, chance), dense)


class Anyhow:
    """Tiles of the sizes that an order makes, of tokens drawn at random."""

    looks = "prompt"

    def __init__(self, order) -> None:
        self.order = order

    def arrange(self, *given) -> Arrangement:
        at, g = self.order.arrange(*given), torch.Generator().manual_seed(3)
        mixed = [x[..., torch.randperm(x.shape[-1], generator=g)] for x in (at.q_order, at.k_order)]
        return Arrangement(at.q_tiling, at.k_tiling, *mixed)


def at_its_density(method: SVG2, *qkv: Tensor) -> tuple[float, float, float]:
    """Errors of a method, and at no less density of tiles of neighbours and of tokens drawn at random."""
    q, k, v = qkv
    dense, made, tiles = attend(q, k, v), plan(method, q, k), method.over(method.order())
    line = Tiles(score=MeanPool(counted=True), select=Share(1.0), tile=(32, 16))
    errors = [error(attend(q, k, v, made), dense)]
    for control in (line, replace(tiles, order=Anyhow(tiles.order))):
        others = [least(control, select, made.density, q, k) for select in (Share, Mass)]
        assert min(other.density for other in others) >= made.density
        errors.append(min(error(attend(q, k, v, other), dense) for other in others))
    return tuple(errors)


@pytest.mark.evidence
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_on_a_trained_model_likeness_survives_shuffling_and_place_does_not(layer):
    """q, k and v of a video model. Tokens in another order lie in the same clusters; neighbours no longer do.

    In that order clusters err less than three quarters as much as tiles of neighbours, and as clusters of tokens
    drawn at random. As the tokens stand, most heads of this small model attend to neighbours, and over all heads
    tiles of neighbours err less.
    """
    method = replace(VIDEO, queries=64, keys=128)
    shuffled = torch.randperm(2048, generator=torch.Generator().manual_seed(1))
    whole = captured(layer)
    mine, line, _ = at_its_density(method, *whole)
    again, mixed, anyhow = at_its_density(method, *(x[:, :, shuffled] for x in whole))
    assert again < 1.25 * mine and mixed > 1.6 * line, (mine, line, again, mixed)
    assert again < 0.75 * min(mixed, anyhow), (again, mixed, anyhow)
    assert line < mine


@pytest.mark.evidence
def test_on_a_trained_model_some_heads_attend_by_likeness():
    """A head whose clusters err less than tiles of neighbours where they stand, and half as much as chance."""
    errors = [
        at_its_density(
            replace(VIDEO, queries=64, keys=128), *(x[:, head : head + 1] for x in captured(layer))
        )
        for layer, head in ((1, 3), (1, 1))
    ]
    gains = [(line / mine, anyhow / mine) for mine, line, anyhow in errors]
    assert gains[0][0] > 1.1 and gains[0][1] > 2, gains
    assert gains[1][0] < 1 and gains[1][1] > 2, gains


@pytest.mark.evidence
def test_counting_keys_makes_the_estimate_true():
    """The method's score, a softmax over centroids each as often as it has keys, is near the true mass of tiles.

    Half the mean distance of the two distributions over tiles of keys. Control: centroids that are not counted.
    """
    method = replace(VIDEO, iterations=4)
    tiles = method.over(method.order())
    for number, (q, k, _) in enumerate((semantic(0), semantic(1), *map(captured, (1, 2, 3)))):
        view = Everything().bind(2048, 2048)
        at = tiles.order.arrange(q, k, view, q.shape[3] ** -0.5, tiles.tile)
        layout = Layout.arranged(at, q, k, view, q.shape[3] ** -0.5)
        visible = layout.kinds() != NONE
        true, *both = (x.score(layout, visible) for x in (TrueMass(), tiles.score, MeanPool(counted=False)))
        true, some = true / true.sum(-1, keepdim=True), true.sum(-1) > 0
        off = [float((x - true).abs().sum(-1)[some].mean() / 2) for x in both]
        assert off[0] < 0.9 * off[1], (number, off)


@pytest.mark.evidence
def test_budgets_follow_the_heads():
    """One threshold, unlike budgets, about that share of attention in each. Control: a fixed share of tiles.

    The fixed number, at no less density over all heads, leaves some head with far more of its attention missing.
    """
    made = video_qkv(GRID, strength=6.0)
    q, k = made.q, made.k
    method = replace(VIDEO, queries=32, threshold=0.8)
    chosen = plan(method, q, k)
    fixed = least(method.over(method.order()), Share, chosen.density, q, k)
    kept = []
    for one in (chosen, fixed):
        tokens = torch.arange(2048)
        weights = (q @ k.mT * q.shape[3] ** -0.5).softmax(-1)
        kept.append((weights * one.kept(tokens, tokens, 3)).sum(-1).mean((0, 2)))
    assert fixed.density >= chosen.density
    densities = chosen.density_by_head()
    assert densities.max() > 3 * densities.min()
    assert kept[0].min() > 0.7 and kept[1].min() < kept[0].min() - 0.1, kept


@pytest.mark.evidence
def test_kept_centres_spare_rounds_of_kmeans():
    """Over the steps of a sampler two rounds from the last step's centres come as near as many from anywhere.

    Control: two rounds from scattered tokens stay at least twice as far from what 50 rounds reach.
    """
    events = []
    rule = SVG2Steps(method=replace(VIDEO, queries=32), refine=2, dense=0.2)
    layers = {1: rule, 3: rule}
    sample(load_video(), 6, attention=layers, observer=events.append)
    assert rule.rounds == 2 * (10 + 3 * 2)  # two layers, steps 2 to 5
    counted = torch.ones(1, 1, 2048, dtype=torch.bool)
    for layer in (1, 3):
        calls = [event for event in events if event.moment.layer == layer]
        assert [event.plan.density < 0.9 for event in calls] == [False, False, True, True, True, True]
        q, k = calls[-1].q, calls[-1].k
        kept = rule.centres(layer)[1]
        best, cold = (
            spread(k, replace(rule.method.order(), iterations=rounds).clusterings(q, k, counted)[1].labels)
            for rounds in (50, 2)
        )
        warm = spread(k, kmeans(k, 64, 0, start=kept).labels)
        assert warm - best < 0.5 * (cold - best), (layer, warm, cold, best)


def spread(k: Tensor, labels: Tensor) -> float:
    """What k-means makes small: squared distances from the means of clusters."""
    clusters = torch.nn.functional.one_hot(labels).float()
    means = clusters.mT @ k / clusters.sum(2).clamp(min=1).unsqueeze(-1)
    return float((k - clusters @ means).square().sum())


def test_a_rule_begins_anew_and_forgets_what_does_not_fit():
    rule = SVG2Steps(method=SMALL, refine=1, dense=0.5)
    q, k, v = qkv(1, 2, 2, 64, dtype=torch.float32)

    def call(step, steps=4, layer=0, x=(q, k, v)):
        before = rule.rounds
        made = rule(*x, SimpleNamespace(layer=layer, step=step, steps=steps))
        assert made == "dense" or attend(*x, made).isfinite().all()
        return made if made == "dense" else rule.rounds - before

    assert [call(step) for step in range(4)] == ["dense", "dense", 3, 1]
    assert call(3, layer=1) == 3, "a layer's centres are its own"
    assert call(2) == 3, "an earlier step is another run"
    assert call(3, x=qkv(1, 4, 4, 64, dtype=torch.float32)) == 3, "other heads"
    assert call(None, None) == 3 and call(None, None) == 3, "outside a sampler nothing is kept"
    assert rule.centres(9) is None
    for options in ({"refine": -1}, {"dense": 1.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SVG2Steps(**options)


def test_the_tiles_are_clusters_cut_to_size():
    labels = torch.tensor([[[2, 0, 2, 2, 0, 2, 4, 2]]])
    order, tiling = cut(labels, 5, 2)
    assert order.tolist() == [[[1, 4, 0, 2, 3, 5, 7, 6]]]
    assert tiling.bounds.tolist() == [[[0, 2, 4, 6, 7, 8, 8, 8, 8, 8]]] and tiling.size == 2
    order, tiling = cut(labels[..., :0], 5, 2)
    assert order.shape == (1, 1, 0) and tiling.bounds.tolist() == [[[0] * 6]]
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (2, 3, 50), generator=g)
    order, tiling = cut(labels, 6, 7)
    sizes, sorted_labels = tiling.sizes(50, "cpu"), labels.gather(2, order)
    assert sizes.max() <= 7 and (sizes.sum(-1) == 50).all()
    for b in range(2):
        for h in range(3):
            parts = sorted_labels[b, h].split(sizes[b, h].tolist())
            assert all(len(part.unique()) <= 1 for part in parts)
            assert sum(len(part) > 0 for part in parts) == sum(
                -(-int((labels[b, h] == c).sum()) // 7) for c in range(6)
            )


def test_a_cluster_of_queries_takes_what_holds_its_share():
    q, k, v = qkv(1, 2, 2, 96)
    made = plan(SMALL, q, k)
    one = made.passes[0]
    order, k_order = one.q_order, one.k_order
    q, k = q.gather(2, order.unsqueeze(-1).expand_as(q)), k.gather(2, k_order.unsqueeze(-1).expand_as(k))
    for head in range(2):
        rows = q[0, head].split(one.tiles.q_tiling.sizes(96, "cpu")[0, head].tolist())
        columns = k[0, head].split(one.tiles.k_tiling.sizes(96, "cpu")[0, head].tolist())
        live = [j for j, keys in enumerate(columns) if len(keys)]
        for i, queries in enumerate(rows):
            kept = one.tiles.keep[0, head, i]
            if not len(queries):
                assert not kept.any()
                continue
            logits = torch.stack([queries.mean(0) @ columns[j].mean(0) / 8**0.5 for j in live])
            mass = (logits + torch.tensor([len(columns[j]) for j in live]).log()).softmax(0)
            best = mass.argsort(descending=True)
            need = max(int(((mass[best].cumsum(0) - mass[best]) < 0.5).sum()), -(-len(live) // 10))
            assert sorted(live[j] for j in best[:need]) == kept.nonzero().flatten().tolist()


def test_under_a_mask_every_query_reads_its_own_key():
    q, k, v = qkv(2, 4, 2, 130)
    method = replace(SMALL, threshold=1e-9, least=0.01)
    for mask in (*MASKS.values(), Causal() & Padding(torch.arange(130).lt(100).expand(2, -1))):
        if isinstance(mask, type(MASKS["any"])):
            continue  # a grid may hide a query's own key
        made = plan(method, q, k, mask=mask)
        tokens = torch.arange(130)
        kept = made.kept(tokens, tokens, 4).expand(2, -1, -1, -1)
        seen = made.view.tokens().expand(2, 4, -1, -1)
        own = seen.diagonal(dim1=2, dim2=3)
        assert mask is None or (kept.diagonal(dim1=2, dim2=3) == own).all()
        assert (kept.any(3) >= own).all()
    chunk = plan(method, q[:, :, -30:], k, mask="causal")
    assert chunk.kept(torch.arange(30), tokens, 4).any(3).all()
    layout = Layout(q, k, chunk.view, chunk.passes[0].tiles.q_tiling, chunk.passes[0].tiles.k_tiling, 1.0)
    assert (
        layout.given is None
        and not OwnKeys()
        .tiles(
            Layout(q, k, plan("dense", q, k).view, layout.q_tiling, layout.k_tiling, 1.0),
            torch.ones(1, dtype=torch.bool),
        )
        .any()
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine(engine):
    check_plan(SMALL, None, engine=engine)


def test_full_density_is_dense():
    check_full(replace(SMALL, threshold=1.0))
    check_full(SVG2(5, 7, least=1.0, tile=(16, 16)))


def test_given_centres_are_where_kmeans_starts():
    q, k, _ = qkv(1, 2, 2, 64)
    seen = torch.ones(1, 1, 64, dtype=torch.bool)
    order = Alike(queries=4, keys=6, iterations=50, seed=3)
    of_q, of_k = order.clusterings(q, k, seen)
    again = Alike(4, 6, iterations=0, q_start=of_q.centres, k_start=of_k.centres).clusterings(q, k, seen)
    assert torch.equal(again[0].labels, of_q.labels) and torch.equal(again[1].labels, of_k.labels)
    other = replace(order, seed=4).clusterings(q, k, seen)[1]
    assert not torch.equal(other.labels, of_k.labels)


def test_either_takes_what_one_of_two_takes():
    scores = torch.rand(1, 1, 4, 20)
    among = torch.ones_like(scores, dtype=torch.bool)
    parts = Mass(0.3), Share(0.5)
    both = Either(one=parts[0], other=parts[1])
    want = [part.select(scores, among, ~among) for part in parts]
    assert torch.equal(both.select(scores, among, ~among), want[0] | want[1])
    assert both.looks == "none" and Either(Share(0.5), Mass(0.5, over="head")).looks == "prompt"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries must be an integer >= 1, got 0"),
        ({"keys": 2.5}, "keys must be an integer >= 1"),
        ({"iterations": -1}, "iterations must be an integer >= 0"),
        ({"threshold": 0}, "mass threshold must be in"),
        ({"least": 2}, "share must be in"),
        ({"tile": (0, 4)}, "tile must be two integers"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        SVG2(**options)
