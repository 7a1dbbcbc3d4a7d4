"""What passes read in place of keys: means with their first order, weighted samples, lists for each query."""

from __future__ import annotations

import pytest
import torch

import tilewise
from tests.conformance.common import ENGINES, exact, qkv, repeat, run_or_refuse, with_grads
from tilewise.attention import Lists, Means, Pass, Plan, Sample
from tilewise.tiles import Causal, Documents, Everything, Padding, TileMap, Tiling, TokenMask, Visibility

N, HEADS, KV = 60, 4, 2


def _lists(groups: int, n: int, listed: int, b: int = 1) -> torch.Tensor:
    """Random lists without repetition, some of them cut short by -1."""
    index = torch.rand(b, groups, n, n).argsort(-1)[..., :listed]
    return index.masked_fill(torch.rand(index.shape) < 0.2, -1)


def _grid(index: torch.Tensor, n: int) -> torch.Tensor:
    """The pairs that lists name, bool `[b, groups, n, n]`."""
    grid = torch.zeros(*index.shape[:3], n + 1, dtype=torch.bool)
    return grid.scatter_(3, index.masked_fill(index < 0, n), True)[..., :n]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("groups", [1, KV, HEADS])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_lists_are_attention_over_the_keys_they_name(groups, padded, biased, engine):
    """Forward, and backward where keys are gathered; for every number of heads that may share a list."""
    b = 2
    q, k, v = qkv(b, HEADS, KV, N, d_v=5)
    mask = Causal() & Padding(torch.arange(N).ge(torch.tensor([[0], [9]]))) if padded else Causal()
    index = _lists(groups, N, 7, b).to(torch.int32 if padded else torch.int64)
    view = mask.bind(N, N)
    made = Plan((Pass(view, reads=Lists(index=index)),), view)
    seen = repeat(_grid(index.long(), N), HEADS) & view.tokens()
    bias = torch.randn(1, HEADS, N, N, dtype=torch.float64) if biased else None
    run = run_or_refuse(engine, q, k, v, made, bias=bias)
    if run is None:
        return
    d_out = torch.randn(b, HEADS, N, 5, dtype=torch.float64)
    want = exact(q, k, v, seen, d_out, bias)
    want.check(with_grads(run, q, k, v, d_out, bias))
    with torch.no_grad():
        want.check({"out": run(q, k, v, bias)})
        narrow = [x.float() for x in (q, k, v)]
        added = None if bias is None else bias.float()
        partial = tilewise.attend(*narrow, made, bias=added, return_lse=True)
    lse = want.lse.masked_fill(want.lse == -torch.inf, 0)
    assert float((partial.lse.masked_fill(partial.lse == -torch.inf, 0) - lse).abs().max()) < 1e-5
    assert torch.equal(partial.lse == -torch.inf, want.lse == -torch.inf)
    assert made.density_by_head().shape[1] in (1, groups)
    tokens = torch.arange(N)
    assert torch.equal(made.kept(tokens, tokens, HEADS).expand(b, -1, -1, -1), seen)


def test_lists_that_do_not_fit_are_refused():
    q, k, v = qkv(1, 2, 2, 9, dtype=torch.float32)
    view = Causal().bind(9, 9)
    for index, message in (
        (_lists(1, 8, 3), r"lists must be \[1, H, 9, K\] for this call, got \[1, 1, 8, 3\]"),
        (_lists(1, 9, 3, b=2), r"lists must be \[1, H, 9, K\] for this call, got \[2, 1, 9, 3\]"),
        (_lists(3, 9, 3), "lists must be for 1, 2 or 2 heads, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            tilewise.attend(q, k, v, Plan((Pass(view, reads=Lists(index)),), view))
    beyond = Plan((Pass(view, reads=Lists(torch.full((1, 1, 9, 2), 9))),), view)
    with pytest.raises(ValueError, match="lists must name keys 0 to 8, or -1 for none, got 9"):
        tilewise.attend(q, k, v, beyond, engine="native")
    dense = TokenMask(torch.ones(9, 9, dtype=torch.bool)).bind(9, 9)
    with pytest.raises(ValueError, match="masks made of positions, not a boolean grid"):
        tilewise.attend(q, k, v, Plan((Pass(dense, reads=Lists(_lists(1, 9, 3))),), view))
    apart = view.limit(lo=torch.arange(2).view(1, 2, 1).expand(1, 2, 9))
    with pytest.raises(ValueError, match="heads that share a list must share a mask"):
        tilewise.attend(q, k, v, Plan((Pass(apart, reads=Lists(_lists(1, 9, 3))),), view))


@pytest.mark.parametrize("n", [0, 1])
def test_lists_of_next_to_nothing(n):
    q, k, v = qkv(1, 2, 2, n, dtype=torch.float32)
    view = Causal().bind(n, n)
    made = Plan((Pass(view, reads=Lists(torch.zeros(1, 1, n, 1, dtype=torch.int64))),), view)
    torch.testing.assert_close(tilewise.attend(q, k, v, made), v.clone())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sample_is_attention_over_its_columns_with_weights(engine):
    """Against columns gathered by hand, with a tile map over the sample, a mask and a bias."""
    q, k, v = qkv(1, HEADS, KV, N)
    index = torch.stack([torch.randperm(N)[:20] for _ in range(KV)]).view(1, KV, 20)
    weight = torch.rand(1, KV, 20, dtype=torch.float64)
    keep = torch.rand(1, HEADS, 4, 5) < 0.6
    view = Causal().bind(N, N)
    columns = view.permute(None, index)
    tiles = TileMap.from_mask(keep, (16, 4))
    reads = Sample(index=index, log_weight=weight)
    made = Plan((Pass(columns, tiles, reads=reads),), view)
    bias = torch.randn(1, HEADS, N, N, dtype=torch.float64)
    run = run_or_refuse(engine, q, k, v, made, bias=bias)
    if run is None:
        return
    wide = index.repeat_interleave(HEADS // KV, 1)
    gathered = [repeat(x, HEADS).gather(2, wide.unsqueeze(-1).expand(-1, -1, -1, x.shape[3])) for x in (k, v)]
    kept = keep.repeat_interleave(16, 2)[:, :, :N].repeat_interleave(4, 3)
    seen = kept & (wide.unsqueeze(2) <= torch.arange(N).view(1, 1, N, 1))
    added = bias.gather(3, wide.unsqueeze(2).expand(-1, -1, N, -1)) + repeat(weight, HEADS).unsqueeze(2)
    exact(q, *gathered, seen, bias=added).check({"out": run(q, k, v, bias)})
    plain = Plan((Pass(columns, tiles, reads=Sample(index)),), view)
    tokens = torch.arange(N)
    grid = torch.zeros(1, HEADS, N, N, dtype=torch.bool)
    grid.scatter_(3, wide.unsqueeze(2).expand(-1, -1, N, -1), seen)
    assert torch.equal(plain.kept(tokens, tokens, HEADS), grid)


def test_inverse_probability_weights_make_sums_unbiased():
    """Keys drawn with unequal probabilities; the control is the same draw without its weights."""
    torch.manual_seed(0)
    n, drawn, rounds = 200, 20, 4000
    q, k, v = (torch.randn(1, 1, m, 4, dtype=torch.float64) for m in (1, n, n))
    scores = (q @ k.mT * 4**-0.5)[0, 0, 0]
    p = (scores / 2).softmax(-1)  # likelier where attention is: without weights, far too much of it
    sums = {True: [], False: []}
    view = Everything().bind(1, n)
    for _ in range(rounds // 200):
        for weighted in sums:
            index = p.repeat(200, 1).multinomial(drawn, replacement=True).view(200, 1, drawn)
            weight = -(drawn * p[index]).log() if weighted else None
            columns = Visibility.everything(view.q_pos, view.k_pos).permute(None, index)
            made = Plan((Pass(columns, reads=Sample(index, weight)),), view)
            got = tilewise.attend(*(x.expand(200, -1, -1, -1) for x in (q, k, v)), made, return_lse=True)
            factor = 1.0 if weighted else n / drawn
            sums[weighted] += (got.lse.exp() * factor).flatten().tolist()
    true = float(scores.exp().sum())
    means = {weighted: torch.tensor(values) for weighted, values in sums.items()}
    spread = float(means[True].std()) / rounds**0.5
    assert abs(float(means[True].mean()) - true) < 4 * spread
    assert abs(float(means[False].mean()) - true) > 10 * spread


@pytest.mark.parametrize("tile", [(16, 1), (16, 2), (5, 1)], ids=str)
def test_the_first_order_of_means_is_its_formula(tile):
    """Token by token: every tile of queries adds q (mean of centred k v^T over the tokens it reads as means)."""
    q, k, v = qkv(1, HEADS, KV, N, d_v=5)
    order = torch.stack([torch.randperm(N) for _ in range(KV)]).view(1, KV, N)
    bounds = torch.tensor([0, 4, 10, 13, 40, 60])
    seen = torch.rand(1, 1, N) < 0.8
    view = Visibility.everything(Everything().bind(N, N).q_pos, torch.arange(5).view(1, 1, 5))
    keep = torch.rand(1, HEADS, -(-N // tile[0]), -(-5 // tile[1])) < 0.7
    tiles = TileMap.from_mask(keep, tile)
    made = {
        slope: Pass(view, tiles, reads=Means(Tiling.from_bounds(bounds), order=order, seen=seen, slope=slope))
        for slope in (0.0, 1.0)
    }
    plain, first = (
        tilewise.attend(q, k, v, Plan((one,), Everything().bind(N, N)), return_lse=True)
        for one in made.values()
    )
    assert torch.equal(plain.lse, first.lse)
    want = torch.zeros_like(plain.out)
    for h in range(HEADS):
        kv = h // (HEADS // KV)
        for i in range(N):
            total, count = torch.zeros(8, 5, dtype=torch.float64), 0
            for t in range(5):
                if not keep[0, h, i // tile[0], t // tile[1]]:
                    continue
                own = [j for j in order[0, kv, bounds[t] : bounds[t + 1]].tolist() if seen[0, 0, j]]
                if own:
                    part = k[0, kv, own] - k[0, kv, own].mean(0)
                    total, count = total + part.T @ v[0, kv, own], count + len(own)
            if count:
                want[0, h, i] = plain.out[0, h, i] + 8**-0.5 * (q[0, h, i] @ total) / count
    torch.testing.assert_close(first.out, want, rtol=1e-12, atol=1e-12)


def test_the_first_order_flows_back_and_takes_no_softcap():
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 1, 6, d=3))
    view = Visibility.everything(Everything().bind(6, 6).q_pos, torch.arange(3).view(1, 1, 3))
    made = Plan((Pass(view, reads=Means(Tiling(2), slope=1.0)),), Everything().bind(6, 6))
    assert torch.autograd.gradcheck(lambda *x: tilewise.attend(*x, made, engine="torch"), (q, k, v))
    with pytest.raises(ValueError, match="first order of a pooled remainder takes no softcap"):
        tilewise.attend(q, k, v, made, softcap=3.0)


def test_documents_hold_within_lists():
    q, k, v = qkv(1, 2, 2, 30, dtype=torch.float32)
    mask = Causal() & Documents(torch.tensor([0, 11, 30]))
    view = mask.bind(30, 30)
    every = torch.arange(30).expand(1, 1, 30, 30)
    made = Plan((Pass(view, reads=Lists(every)),), view)
    torch.testing.assert_close(tilewise.attend(q, k, v, made), tilewise.attend(q, k, v, mask=mask))
