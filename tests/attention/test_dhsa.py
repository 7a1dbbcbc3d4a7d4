"""DHSA: learnt chunk bounds hold more attention than even ones for one budget; sqrt prefers no length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.conformance.common import grid, qkv
from tilewise.attention import attend, plan
from tilewise.attention.gates import BoundaryLoss, BoundaryPredictor, Gates, boundary_lesson, fit
from tilewise.attention.gates import boundary as boundary_module
from tilewise.attention.gates.boundary import attention_ratio
from tilewise.attention.recipes.dhsa import DHSA, cut, fill, pieces
from tilewise.tiles import Causal, Everything, Padding, Tiling, Window

D, HEADS = 32, 2


def _passages(n: int, seed: int, block: int) -> tuple[Tensor, Tensor, set[int]]:
    """Passages of 12 to 48 tokens, in turn of a class that queries ask for and of none; also where they end.

    `block` queries in a row ask for the same class.
    """
    g = torch.Generator().manual_seed(seed)
    fact = normalize(torch.randn(4, D, generator=torch.Generator().manual_seed(99)), dim=-1)
    q = 0.3 * torch.randn(1, HEADS, n, D, generator=g)
    k = torch.randn(1, HEADS, n, D, generator=g)
    at, told, ends = 0, False, set()
    while at < n:
        length = int(12 * 4 ** float(torch.rand((), generator=g)))
        told = not told
        if told:
            k[:, :, at : at + length] += 5 * fact[int(torch.randint(4, (), generator=g))]
        at += length
        ends.add(min(n, at))
    for start in range(0, n, block):
        q[:, :, start : start + block] += D**0.5 * fact[int(torch.randint(4, (), generator=g))]
    return q, k, ends - {n}


def _predictor(seed: int = 0) -> BoundaryPredictor:
    return BoundaryPredictor(
        head_dim=D, heads=HEADS, kv_heads=HEADS, window=4, width=16, hidden=32, rotary=None, seed=seed
    )


@pytest.fixture(scope="module")
def trained() -> BoundaryPredictor:
    """From the attention of 80 sequences of 512 tokens; where passages end is told to nobody."""
    gates = Gates({0: _predictor()})
    lessons = [
        {0: boundary_lesson(gates[0], q, k, mask=Causal(), scale=D**-0.5, share=0.1, sharpness=4.0)}
        for q, k, _ in (_passages(512, 100 + seed, block=1) for seed in range(80))
    ]
    fit(gates, lessons, BoundaryLoss(focus=0.0), steps=800, rate=1e-2)
    return gates[0]


def _held(method: DHSA, q: Tensor, k: Tensor) -> tuple[float, float]:
    """Share of the true attention that is read, and share of all visible scores that are computed."""
    n = q.shape[2]
    kept, seen = (grid(plan(x, q, k, mask="causal"), 1, HEADS, n, n) for x in (method, "dense"))
    weights = (q @ k.mT * D**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    return float((weights * kept).sum() / weights.sum()), float(kept.sum() / seen.sum())


@pytest.mark.evidence
def test_learnt_bounds_hold_more_attention_than_even_ones(trained):
    """80 tokens for each block of 16 queries, chunks of the same mean length: 0.70 of the attention, where even
    ones hold 0.65.

    Controls: bounds of an untrained predictor hold less than even ones; the budget is the same to a hundredth.
    """
    settings = {"budget": 80, "length": 28, "gap": 4, "grain": 1, "block": 16, "local": 0}
    held = torch.zeros(3, 2)
    found, ends = 0, 0
    for seed in range(6):
        q, k, truth = _passages(1024, seed, block=16)
        for i, predictor in enumerate((trained, None, _predictor(seed=5))):
            held[i] += torch.tensor(_held(DHSA(predictor=predictor, **settings), q, k)) / 6
        bounds = DHSA(trained, **settings).chunks(q, k, Causal().bind(1024, 1024)).flatten().tolist()
        found += sum(any(abs(bound - end) <= 1 for bound in bounds) for end in truth)
        ends += len(truth)
    (learnt, cost), (even, even_cost), (untrained, _) = held.tolist()
    assert abs(cost - even_cost) < 0.01 * even_cost
    assert learnt > even + 0.02 and untrained < even - 0.02
    assert found > 0.6 * ends  # by chance, with 37 cuts in 1,024 places: 0.11


@pytest.mark.evidence
def test_the_square_root_prefers_no_length():
    """Chunks of random keys and of 4 to 64 tokens: every length is chosen as often as it occurs, within five
    deviations of a fair draw. Controls: by means the shortest are chosen 20 times as often as the longest, by sums
    the other way round.
    """
    lengths, trials, top = (4, 8, 16, 32, 64), 20, 20
    chosen = {norm: torch.zeros(5) for norm in ("sqrt", "mean", "sum")}
    g = torch.Generator().manual_seed(0)
    for _ in range(trials):
        sizes = torch.tensor(lengths).repeat(40)[torch.randperm(200, generator=g)]
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        n = int(bounds[-1])
        q, k = torch.randn(1, 1, 64, 16, generator=g), torch.randn(1, 1, n, 16, generator=g)
        for norm, counts in chosen.items():
            method, cuts = DHSA(None, block=1, norm=norm), (Tiling(1), Tiling.from_bounds(bounds))
            best = method.scores(q, k, Everything().bind(64, n), *cuts).topk(top, -1).indices
            counts += torch.stack([(sizes[best] == length).sum() for length in lengths])
    shares = {norm: counts / counts.sum() for norm, counts in chosen.items()}
    # Queries of one trial share their keys: no more than 20 trials x 16 channels of draws are independent.
    deviation = (0.2 * 0.8 / (trials * 16)) ** 0.5
    assert (shares["sqrt"] - 0.2).abs().max() < 5 * deviation
    assert (shares["sqrt"] - 0.2).abs().max() < 0.03
    assert shares["mean"][0] > 20 * shares["mean"][4] and shares["sum"][4] > 20 * shares["sum"][0]


@pytest.mark.evidence
def test_all_tokens_of_a_chunk_score_as_their_chunk(trained):
    """Which tokens a block reads is the top of token scores, each that of its chunk, walked out token by token."""
    q, k, _ = _passages(300, 7, block=16)
    method = DHSA(trained, budget=60, length=20, gap=4, longest=50, grain=1, block=16, local=8)
    bounds = method.chunks(q, k, Causal().bind(300, 300))[0, 0].tolist()
    chunk = [sum(b <= t for b in bounds[1:]) for t in range(300)]
    assert max(b - a for a, b in zip(bounds, bounds[1:])) <= 50
    kept = plan(method, q, k, mask="causal").kept(torch.arange(300), torch.arange(300), HEADS)
    for row in range(19):
        first, last = 16 * row, min(300, 16 * row + 16) - 1
        query = q[0, :, first : last + 1].mean(1)
        score = [
            float(sum(query[h] @ k[0, h, bounds[c] : bounds[c + 1]].sum(0) for h in range(HEADS)))
            / max(1, bounds[c + 1] - bounds[c]) ** 0.5
            for c in range(len(bounds) - 1)
        ]
        near = {0, *range(max(0, first - 8), last + 1)}
        others = sorted(set(range(last + 1)) - near, key=lambda t: (-score[chunk[t]], t))
        want = near | set(others[: max(0, 60 - len(near))])
        assert set(kept[0, :, last - first + first].any(0).nonzero().flatten().tolist()) == want


@pytest.mark.evidence
@pytest.mark.parametrize("at_once", [1, 2000, 10**9])
def test_ratio_is_its_definition_whatever_the_pieces(at_once, monkeypatch):
    monkeypatch.setattr(boundary_module, "AT_ONCE", at_once)
    q, k, _ = qkv(b=2, heads=4, kv_heads=2, n_q=40)
    view = (Causal() & Window(30, 0)).bind(40, 40)
    got = attention_ratio(3 * q, k, view, 0.3, 4)
    logits = (3 * q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~view.tokens(), -torch.inf)
    weights = logits.softmax(-1).mean(1)
    for gap in range(39):  # between tokens gap and gap + 1
        if gap < 3 or gap > 35:
            assert (got[:, gap] == 1).all()
            continue
        later = weights[:, gap + 5 :]
        sides = later[..., gap - 3 : gap + 1].sum((1, 2)), later[..., gap + 1 : gap + 5].sum((1, 2))
        want = (torch.maximum(*sides) + 1e-6) / (torch.minimum(*sides) + 1e-6)
        torch.testing.assert_close(got[:, gap].double(), want, rtol=1e-4, atol=1e-4)


def test_predictor_is_its_definition():
    """Windows that reach over an end are shorter; the two sides are pooled alike."""
    gate = BoundaryPredictor(8, 4, 2, window=3, width=4, hidden=5, rotary=None, seed=2).double()
    _, k, _ = qkv(heads=4, kv_heads=2, n_q=9)
    x = gate.features(k, Causal().bind(9, 9))
    got = gate(x)[0]
    inner = x[0] @ gate.enter
    for i in range(8):
        sides = []
        for tokens in (inner[max(0, i - 2) : i + 1], inner[i + 1 : i + 4]):
            sides.append(((tokens @ gate.weigh).softmax(0) * tokens).sum(0))
        left, right = sides
        alike = (left @ right / (left.norm() * right.norm())).view(1)
        fused = torch.cat([left, right, (left - right).abs(), left * right, alike])
        want = (fused @ gate.fuse + gate.fuse_bias).relu() @ gate.decide + gate.decide_bias
        torch.testing.assert_close(got[i], want[0])


def test_cuts():
    logits = torch.full((1, 19), -1.0)
    logits[0, [3, 5, 9, 14, 17]] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    # 3 lies within 3 of 5, which is larger; 17 lies too near the end.
    assert cut(logits=logits, n=20, length=4, gap=3).tolist()[0][:4] == [0, 6, 10, 15]
    assert cut(logits, 20, 10, 3).tolist() == [[0, 15, 20]]
    assert cut(torch.zeros(2, 0), 1, 4, 2).tolist() == [[0, 1]] * 2
    bounds = torch.tensor([[[0, 3, 13, 13]]])
    assert pieces(bounds=bounds, n=13, most=4, equal=True).tolist() == [[[0, 3, 6, 9, 13]]]
    assert pieces(bounds, 13, 4, equal=False).tolist() == [[[0, 3, 7, 11, 13]]]
    scores, sizes = torch.tensor([[[[1.0, 5.0, 3.0, 4.0]]]]), torch.tensor([[[2, 3, 4, 1]]])
    among, forced = (
        torch.tensor([[[[True, True, True, True]]]]),
        torch.tensor([[[[True, False, False, False]]]]),
    )
    for budget, want in ((2, [0]), (5, [0, 1]), (9, [0, 1, 3]), (10, [0, 1, 2, 3]), (1, [0])):
        keep = fill(scores=scores, among=among, forced=forced, sizes=sizes.unsqueeze(0), budget=budget)
        assert keep.flatten().nonzero().flatten().tolist() == want


def test_hidden_keys_move_nothing():
    q, k, v = qkv(heads=4, kv_heads=2, n_q=90, dtype=torch.float32)
    mask = Causal() & Padding(torch.arange(90).ge(21).unsqueeze(0))
    method = DHSA(BoundaryPredictor(8, 4, 2), budget=30, length=8, gap=3, block=8, local=4)
    spoiled = k.clone()
    spoiled[:, :, :21] = torch.nan
    keeps = [plan(method, q, x, mask=mask).tile_maps[0].keep for x in (k, spoiled)]
    assert torch.equal(*keeps)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"budget": 0}, "budget must be an integer >= 1, got 0"),
        ({"grain": 0}, "grain must be an integer >= 1, got 0"),
        ({"local": -1}, "local must be an integer >= 0, got -1"),
        ({"length": 8, "gap": 9}, "gap, length and longest must not fall, got 9, 8 and 32"),
        ({"length": 8, "longest": 7}, "must not fall, got 8, 8 and 7"),
        ({"norm": "max"}, "norm must be 'sqrt', 'mean' or 'sum', got 'max'"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        DHSA(None, **settings)


def test_what_does_not_fit_is_refused():
    q, k, v = qkv(heads=4, kv_heads=4, n_q=40)
    with pytest.raises(ValueError, match="this BoundaryPredictor is for 4 query heads, 2 kv heads"):
        attend(q, k, v, DHSA(BoundaryPredictor(8, 4, 2)), mask="causal")
    with pytest.raises(ValueError, match="does not support decode"):
        attend(q[:, :, :1], k, v, DHSA(None), mask="causal")
    with pytest.raises(TypeError, match="predictor must be a BoundaryPredictor or None, got int"):
        DHSA(3)
    with pytest.raises(ValueError, match="focus must be >= 0, got -1"):
        BoundaryLoss(-1)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\) and sharpness > 0, got 1 and 4.0"):
        boundary_lesson(BoundaryPredictor(8, 4, 4), q, k, share=1)
    with pytest.raises(ValueError, match="window must be an integer >= 1, got 0"):
        BoundaryPredictor(8, 4, 2, window=0)
