"""VMoBA: its blocks, its choice against the rule written out, what each part of it is worth at equal density."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from tests.attention.video_like import places, video_qkv
from tests.conformance.common import naive, qkv, repeat
from tests.conformance.weighted import MASKS, check_full
from tilewise.attention import Clusters, Mass, Share, Tiles, TopK, attend, plan
from tilewise.attention.recipes.vmoba import EachQuery, OwnTile, Similarity, VMoBA
from tilewise.data.shapes import moving_shapes
from tilewise.models.video import capture_video, load_video

GRID, N = (3, 5, 6), 90
SMALL = VMoBA(grid=GRID, layer=0, time=1, space=(2, 3), cube=(2, 2, 3))
VIDEO = (8, 16, 16)


def _boxes(method: VMoBA) -> Tensor:
    """The block of every token, by its coordinates, `[N]`; blocks are numbered row-major."""
    t, h, w = places(method.grid)
    frames, height, width = method.grid
    sides = ((method.time, height, width), (frames, *method.space), method.cube)[method.layer % 3]
    counts = [-(-length // side) for length, side in zip(method.grid, sides)]
    return ((t // sides[0]) * counts[1] + h // sides[1]) * counts[2] + w // sides[2]


def _read(made, q: Tensor) -> Tensor:
    """Which keys each query reads, bool `[B, H, N, N]`."""
    every = torch.arange(q.shape[2])
    return made.kept(every, every, q.shape[1])


def _chosen(method: VMoBA, q: Tensor, k: Tensor) -> Tensor:
    """The rule, pair by pair, for one head `[N, D]` and no mask: the tokens that each query reads."""
    own = _boxes(method)
    means = torch.stack([k[own == j].mean(0) for j in range(int(own.max()) + 1)])
    scores = q @ means.T
    scores = (scores - scores.min()) / (scores.max() - scores.min())
    taken = torch.nn.functional.one_hot(own, len(means)).bool()
    ranked = [
        (float(scores[i, j]), i, j) for i in range(len(q)) for j in range(len(means)) if not taken[i, j]
    ]
    ranked.sort(reverse=True)
    if isinstance(method.select, TopK):
        for _, i, j in ranked[: method.select.k * len(q) - len(q)]:
            taken[i, j] = True
    else:
        held, total = float(scores[taken].sum()), float(scores.sum())
        for score, i, j in ranked:
            if held >= method.select.threshold * total:
                break
            taken[i, j], held = True, held + score
    return taken[:, own]


@pytest.mark.evidence
@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize(
    "select", [Mass(0.3, over="head"), Mass(0.6, over="head"), TopK(3, over="head")], ids=str
)
def test_choice_follows_the_rule(layer, select):
    """Blocks of frames, of places, of both, and of frames again; best pairs of the whole head, own blocks first."""
    q, k, _ = qkv(1, 4, 2, N)
    method = replace(SMALL, layer=layer, select=select)
    read = _read(plan(method, q, k), q)
    for head in range(4):
        want = _chosen(method, q[0, head], k[0, head // 2])
        assert torch.equal(read[0, head], want)
        apart = _chosen(replace(method, layer=layer + 1), q[0, head], k[0, head // 2])
        assert not torch.equal(read[0, head], apart)


@pytest.mark.evidence
def test_blocks_change_with_the_layer_in_a_cycle_of_three():
    for layer in range(7):
        method = replace(SMALL, layer=layer, select=TopK(1, over="head"))
        q, k, _ = qkv(1, 1, 1, N)
        own = _boxes(method)
        assert torch.equal(_read(plan(method, q, k), q)[0, 0], own.unsqueeze(1) == own)
        assert method.boxes() == replace(method, layer=layer + 3).boxes()


def _weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[3] ** 0.5).softmax(-1)


@pytest.mark.evidence
def test_three_layers_in_turn_reach_more_than_one_partition_kept():
    """Attention of spatial, temporal and semantic heads, an eighth of the pairs read in each of three layers.

    Each partition suits some heads and fails others; read in turn they hold more, over all heads, than the best of
    them. Control: one partition in all layers, which reads the same pairs three times.
    """
    q, k, _ = video_qkv(VIDEO, strength=6.0)[:3]
    weights = _weights(q, k)
    kept, union = [], torch.zeros_like(weights, dtype=torch.bool)
    for layer in range(3):
        method = VMoBA(VIDEO, layer, time=1, space=(2, 4), cube=(2, 8, 8), select=Share(0.125, over="head"))
        made = plan(method, q, k)
        assert made.density == pytest.approx(0.125, abs=1e-3)
        read = _read(made, q)
        union |= read
        kept.append((weights * read).sum(-1).mean((0, 2)))  # by head
    spatial, temporal, _ = torch.stack(kept).unbind(1)
    assert spatial[0] > 0.95 > spatial[2] > spatial[1], spatial  # frames hold what is in one frame
    assert temporal[1] > 1.5 * temporal[2] > 3 * temporal[0], temporal  # places hold what is in all
    cycle, best = float((weights * union).sum(-1).mean()), max(float(x.mean()) for x in kept)
    assert cycle > 1.25 * best, (cycle, best)


@pytest.mark.evidence
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_and_on_a_model(layer):
    """The same on q and k of a trained video model. Control: the best of the partitions, kept."""
    clip = moving_shapes(1, seed=2**40 + 5).pixels
    noisy = 0.6 * clip + 0.4 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    q, k, _ = capture_video(load_video(), noisy, 0.6, layers=[layer])[layer]
    weights, kept, union = _weights(q, k), [], torch.zeros((), dtype=torch.bool)
    for number in range(3):
        method = VMoBA(VIDEO, number, time=1, space=(2, 4), cube=(2, 8, 8), select=Share(0.125, over="head"))
        read = _read(plan(method, q, k), q)
        union = union | read
        kept.append(float((weights * read).sum(-1).mean()))
    assert float((weights * union).sum(-1).mean()) > 1.08 * max(kept), kept


class _Video(nn.Module):
    """Layers of attention with residuals, tokens of 26 numbers in and 2 out; `layers` says which layer each is."""

    def __init__(self, layers: tuple[int, ...], grid: tuple[int, int, int], over: str) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(26, 32), nn.Linear(32, 2)
        self.qkv, self.project = (nn.ModuleList(nn.Linear(32, n) for _ in layers) for n in (96, 32))
        base = VMoBA(grid, time=1, space=(2, 4), cube=(2, 4, 8), select=TopK(2, over=over))
        self.methods = [replace(base, layer=layer) for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for mixed, project, method in zip(self.qkv, self.project, self.methods, strict=True):
            q, k, v = mixed(x).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            x = x + project(attend(q, k, v, method).transpose(1, 2).flatten(2))
        return self.out(x)


@functools.cache
def _trained(
    layers: tuple[int, ...], over: str = "head", seed: int = 0, steps: int = 400
) -> tuple[float, ...]:
    """Squared error over variance, on new clips, of means over each token's frame and over its place in time."""
    grid = (8, 8, 8)
    where = torch.cat([nn.functional.one_hot(x, 8) for x in places(grid)], -1).float()

    def batch(size: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        seen = torch.randn(size, *grid, 2, generator=g)
        frame, place = (
            8 * seen[..., 0].mean((2, 3), keepdim=True),
            8**0.5 * seen[..., 1].mean(1, keepdim=True),
        )
        wanted = torch.stack([x.expand(size, *grid) for x in (frame, place)], -1)
        return torch.cat([seen.flatten(1, 3), where.expand(size, -1, -1)], -1), wanted.flatten(1, 3)

    torch.manual_seed(seed)
    net, g = _Video(layers, grid, over), torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(steps):
        x, y = batch(2, g)
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = batch(8, torch.Generator().manual_seed(9))
    with torch.no_grad():
        return tuple(((net(x) - y).square().mean((0, 1)) / y.square().mean((0, 1))).tolist())


@pytest.mark.evidence
@pytest.mark.parametrize(("kept", "fails"), [(0, 1), (1, 0), (2, 0), (2, 1)])
def test_trained_layers_in_turn_learn_what_one_partition_cannot(kept, fails):
    """Two things to say of a token: what its frame holds, and what its place holds over time. A quarter is read.

    Three layers whose partitions take turns learn both. Control: with one partition in all layers, trained alike,
    one of the two is not learned.
    """
    turn, one = _trained((0, 1, 2)), _trained((kept,) * 3)
    assert max(turn) < 0.2, turn
    assert one[fails] > 0.4, one


@pytest.mark.evidence
@pytest.mark.parametrize("seed", range(2))
def test_trained_with_pairs_of_a_whole_head_errs_less(seed):
    """The same task, as many blocks read. Control: MoBA's choice, as many blocks for each query.

    The task is kind to it: every query's own block, turn by turn, is all that is needed, and pairs that compete let
    most queries read little else.
    """
    whole, each = _trained((0, 1, 2), seed=seed), _trained((0, 1, 2), over="row", seed=seed)
    assert max(whole) < 0.4 * max(each), (whole, each)


def _scene(
    sizes: tuple[int, ...], seed: int = 0, d: int = 32, strength: float = 8.0
) -> tuple[Tensor, Tensor, Tensor]:
    """One head for each size: a square of so many places that moves over a background, and attends to itself.

    Queries of the background look for nothing, as the paper finds them: attention of theirs is even. Returns q, k
    `[1, heads, N, d]` and what is part of the square `[heads, N]`.
    """
    g = torch.Generator().manual_seed(seed)
    t, h, w = places(VIDEO)
    q, k = (0.02 * torch.randn(1, len(sizes), len(t), d, generator=g) for _ in range(2))
    square = torch.stack([((h + t) % VIDEO[1] < size) & (w < size) for size in sizes])
    for head, on in enumerate(square):
        look = normalize(torch.randn(d, generator=g), dim=0) * (strength * d**0.5) ** 0.5
        q[0, head, on] += look
        k[0, head, on] += look
    return q, k, square


@pytest.mark.evidence
@pytest.mark.parametrize("seed", range(2))
def test_pairs_of_a_whole_head_serve_queries_that_differ(seed):
    """At equal density, queries that look for much get blocks from those that look for nothing.

    Control: MoBA's choice of as many blocks for each query keeps little more than half as much attention. Where all
    queries look for as much, as in `video_like`, it keeps more: the gain is in the difference, and nowhere else.
    """
    base = VMoBA(VIDEO, layer=2, cube=(2, 4, 4))
    q, k, _ = _scene((8, 8), seed)
    weights = _weights(q, k)

    def keeps(q: Tensor, k: Tensor, weights: Tensor) -> tuple[float, float]:
        both = [plan(replace(base, select=TopK(4, over=over)), q, k) for over in ("head", "row")]
        assert both[0].density == pytest.approx(both[1].density, rel=1e-3)
        return tuple(float((weights * _read(made, q)).sum(-1).mean()) for made in both)

    head, row = keeps(q, k, weights)
    assert head > 1.6 * row, (head, row)
    q, k = video_qkv(VIDEO, strength=6.0, seed=seed)[:2]
    head, row = keeps(q, k, _weights(q, k))
    assert head < row, (head, row)


@pytest.mark.evidence
def test_the_threshold_gives_more_to_heads_that_spread():
    """One threshold for all: the larger what a head looks for, the more pairs it gets.

    Control: the same number of pairs for all heads, as dense over all, keeps less than half as much attention of
    the head that spreads most. (Its smallest head then has all it needs: what is gained there is lost here.)
    """
    q, k, square = _scene((4, 8, 12))
    base = VMoBA(VIDEO, layer=2, cube=(2, 4, 4))
    made = plan(base, q, k)
    small, middle, large = made.density_by_head()[0].tolist()
    assert 1.5 * small < middle and 2.5 * middle < large, (small, middle, large)
    even = plan(replace(base, select=Share(made.density, over="head")), q, k)
    assert even.density >= made.density
    assert len(set(even.density_by_head()[0].tolist())) == 1
    weights = _weights(q, k)[0]
    kept = [
        [float((weights[h] * _read(x, q)[0, h])[square[h]].sum(-1).mean()) for h in range(3)]
        for x in (made, even)
    ]
    assert min(kept[0]) > 2 * min(kept[1]), kept


@pytest.mark.evidence
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_forward_and_backward_equal_the_formula(mask):
    """Output and gradients are those of a softmax over the tokens read. Control: another layer's are not."""
    method = replace(SMALL, grid=(2, 5, 13), layer=2)
    q, k, v = (x.requires_grad_() for x in qkv(2, 4, 2, 130))
    made, other = (plan(x, q, k, mask=mask) for x in (method, replace(method, layer=0)))
    seen = repeat(made.view.tokens(), 4)
    answers = [naive(q, k, v, _read(x, q) & seen) for x in (made, other)]
    out = attend(q, k, v, made)
    d_out = torch.randn_like(out)
    got, want, wrong = (
        [x, *torch.autograd.grad(x, (q, k, v), d_out, retain_graph=True)] for x in (out, *answers)
    )
    for a, b, c in zip(got, want, wrong, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert float((a - c).detach().norm() / a.detach().norm()) > 1e-3


def test_set_to_take_every_block_it_is_dense():
    grid = (2, 5, 13)  # 130 tokens, as in the shared check
    for layer in range(3):
        check_full(VMoBA(grid, layer, space=(2, 4), cube=(1, 3, 4), select=Mass(1.0, over="head")))
        check_full(VMoBA(grid, layer, space=(2, 4), cube=(1, 3, 4), select=TopK(10**6, over="head")))


def test_text_before_the_grid_is_a_block():
    q, k, _ = qkv(1, 1, 1, N + 7)
    read = _read(plan(VMoBA(GRID, before=7, select=TopK(1, over="head")), q, k), q)[0, 0]
    assert read[:7, :7].all() and not read[:7, 7:].any() and not read[7:, :7].any()


def test_its_stages_suit_other_orders():
    """Queries routed one by one to clusters of keys: each reads the cluster that it would lie in, and the best."""
    q, k, v = qkv(1, 2, 2, 64)
    order = EachQuery(order=Clusters(4, 4))
    made = plan(
        Tiles(score=Similarity(), select=TopK(2), order=order, always=(OwnTile(),), compare_forced=True), q, k
    )
    read = _read(made, q)
    assert read[0, 0].diagonal().all() and read[0, 1].diagonal().all() and not read.all()
    torch.testing.assert_close(attend(q, k, v, made), naive(q, k, v, read))
    assert order.looks == "prompt"
    with pytest.raises(ValueError, match="as many queries as keys, got 3 and 64"):
        plan(Tiles(score=Similarity(), select=TopK(2), order=order, always=(OwnTile(),)), q[:, :, :3], k)


def test_equal_queries_and_keys_choose_without_nan():
    q, k = (torch.zeros(1, 1, N, 8) for _ in range(2))
    made = plan(SMALL, q, k)
    assert 0 < made.density <= 1 and made.tile_maps[0].keep.any(-1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (4, 4)}, r"grid must be three integers, \(time, height, width\), got \(4, 4\)"),
        ({"layer": -1}, "layer must be an integer >= 0, got -1"),
        ({"space": (2,)}, r"space must be 2 integers, got \(2,\)"),
        ({"cube": (2, 2)}, r"cube must be 3 integers, got \(2, 2\)"),
        ({"time": 0}, "tile must be 3 integers >= 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        VMoBA(**{"grid": GRID, **options})


def test_other_lengths_are_refused():
    q, k, v = qkv(1, 1, 1, N + 1)
    with pytest.raises(ValueError, match="has 90 tokens, got 91 queries"):
        attend(q, k, v, SMALL)
    q, k, v = qkv(1, 1, 1, N)
    with pytest.raises(ValueError, match="does not support chunked prefill"):
        attend(q[:, :, :5], k, v, SMALL)
    assert SMALL.lookahead == "prompt"
