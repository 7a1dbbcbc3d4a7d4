"""MoBA: its router, the paper's statistical model of it against simulation, small blocks, the key convolution."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from tilewise.attention import KeyConvolution, MoBA, attend, plan, router_recall, router_snr


def _simulate(
    d: int, block: int, blocks: int, top_k: int, gap: float, clustered: int, cluster_gap: float
) -> tuple:
    """Share of trials in which the block holding the sought key is among the `top_k` best block means."""
    g = torch.Generator().manual_seed(d * block + top_k)
    trials, hits = 4000, 0
    for _ in range(0, trials, 500):
        q = normalize(torch.randn(500, d, generator=g), dim=-1)
        k = torch.randn(500, blocks, block, d, generator=g) / math.sqrt(d)
        place = torch.arange(500), torch.randint(blocks, (500,), generator=g)
        k[(*place, 0)] += gap * q
        k[(*place, slice(1, clustered))] += cluster_gap * q.unsqueeze(1)
        scores = torch.einsum("td,tbd->tb", q, k.mean(2))
        hits += int((scores.topk(top_k, -1).indices == place[1].unsqueeze(1)).any(-1).sum())
    return hits / trials, trials


@pytest.mark.evidence
@pytest.mark.parametrize(
    ("d", "block", "blocks", "top_k", "gap", "clustered", "cluster_gap"),
    [
        (64, 32, 32, 4, 1.0, 1, 0.0),
        (64, 128, 8, 2, 1.0, 1, 0.0),
        (128, 64, 16, 2, 1.0, 1, 0.0),
        (64, 64, 16, 3, 0.8, 4, 0.4),
    ],
)
def test_router_snr_matches_simulation(d, block, blocks, top_k, gap, clustered, cluster_gap):
    """The model's recall lies within simulation noise. Control: without factor 2, or the cluster, it does not."""
    measured, trials = _simulate(d, block, blocks, top_k, gap, clustered, cluster_gap)
    noise = 4 * math.sqrt(measured * (1 - measured) / trials)
    snr = router_snr(d, block, gap, clustered, cluster_gap)
    assert abs(router_recall(snr, blocks, top_k) - measured) < noise
    assert abs(router_recall(snr * math.sqrt(2), blocks, top_k) - measured) > noise
    if clustered > 1:
        assert abs(router_recall(router_snr(d, block, gap), blocks, top_k) - measured) > noise


def test_snr_grows_with_the_root_of_smaller_blocks():
    assert router_snr(64, 64, 1.0) == pytest.approx(math.sqrt(2) * router_snr(64, 128, 1.0))
    assert router_recall(0.0, 16, 4) == pytest.approx(0.25, abs=1e-4)  # no signal: chance
    assert router_recall(50.0, 16, 1) == pytest.approx(1.0, abs=1e-4)


def _found(block: int, gap: float, seeds: int = 6, budget: int = 1024, asked: int = 100) -> float:
    """Share of needle queries whose MoBA plan reads the needle, at `budget` keys read per query."""
    n, d = 4096, 64
    hits = 0.0
    for seed in range(seeds):
        g = torch.Generator().manual_seed(seed)
        k = torch.randn(1, 1, n, d, generator=g) / math.sqrt(d)
        q = torch.randn(1, 1, n, d, generator=g)
        places = torch.randperm(n - budget, generator=g)[:asked]
        q[0, 0, -asked:] = normalize(torch.randn(asked, d, generator=g), dim=-1)
        k[0, 0, places] += gap * q[0, 0, -asked:]
        made = plan(MoBA(block=block, top_k=budget // block), q, k, mask="causal")
        read = made.kept(torch.arange(n - asked, n), places, 1)[0, 0]
        hits += float(read.diagonal().float().mean())
    return hits / seeds


@pytest.mark.evidence
def test_small_blocks_route_better():
    """At the same keys read per query, blocks of 64 find more needles than of 256, and those more than of 512.

    Each finds the share that the paper's model foretells. Control: with no needle planted (gap 0) every size reads
    just the share of the earlier blocks it may choose.
    """
    found = {block: _found(block, 1.5) for block in (64, 256, 512)}
    assert found[64] > found[256] + 0.1 > found[512] + 0.2, found
    for block, share in found.items():
        blocks, chosen = 4096 // block - 1, 1024 // block - 1  # its own block is chosen without a contest
        foretold = router_recall(router_snr(64, block, 1.5), blocks, chosen)
        assert abs(share - foretold) < 0.05 + 4 * math.sqrt(foretold * (1 - foretold) / 600), (
            block,
            share,
            foretold,
        )
        chance = chosen / blocks
        assert abs(_found(block, 0.0) - chance) < 4 * math.sqrt(chance * (1 - chance) / 600) + 0.01


@pytest.mark.evidence
def test_router_is_the_product_with_block_means():
    q, k = torch.randn(1, 2, 64, 8), torch.randn(1, 1, 64, 8)
    keep = plan(MoBA(block=16, top_k=2), q, k, mask="causal").tile_maps[0].keep
    means = k[0, 0].view(4, 16, 8).mean(1)
    for head in range(2):
        for i in range(64):
            own = i // 16
            before = [(float(q[0, head, i] @ means[b]), b) for b in range(own)]
            expected = {own} | {b for _, b in sorted(before)[-1:]}
            assert set(keep[0, head, i].nonzero().flatten().tolist()) == expected


def test_own_block_is_always_read_and_the_future_never():
    q, k, v = (torch.randn(1, 2, 200, 16) for _ in range(3))
    made = plan(MoBA(block=32, top_k=1), q, k, mask="causal")
    everyone = torch.arange(200)
    read = made.kept(everyone, everyone, 2)
    own = (everyone.unsqueeze(1) // 32 == everyone // 32) & (everyone.unsqueeze(1) >= everyone)
    assert torch.equal(read, own.expand_as(read))
    assert attend(q, k, v, made, mask="causal").isfinite().all()


def test_key_convolution_is_its_formula_and_causal():
    k = torch.randn(2, 3, 20, 4)
    layer = KeyConvolution(12, width=3)
    assert torch.equal(layer(k), k), "starts as the identity"
    with torch.no_grad():
        layer.taps.normal_()
    taps = layer.taps.view(3, 4, 3)
    for t in range(20):
        mixed = sum(taps[..., 2 - back] * k[:, :, t - back] for back in range(min(3, t + 1)))
        torch.testing.assert_close(layer(k)[:, :, t], k[:, :, t] + torch.nn.functional.silu(mixed))
    changed = k.clone()
    changed[:, :, 10:] += 1
    assert torch.equal(layer(changed)[:, :, :10], layer(k)[:, :, :10])


@pytest.mark.evidence
def test_trained_key_convolution_routes_better():
    """Taps learned on needle search raise routing recall on new needles. Controls: zero taps, random taps."""
    torch.manual_seed(0)
    d, block, blocks = 32, 32, 16

    def batch(count: int):
        k = torch.randn(count, blocks * block, d) * 0.3
        q = torch.rand(count, d) + 0.1  # needles are rare large values in coordinates that the query weighs
        place = torch.randint(blocks * block, (count,))
        k[torch.arange(count), place] += 1.5 * (torch.rand(count, d) < 0.3)
        return q, k, place // block

    def scores(layer, q, k):
        return torch.einsum(
            "td,tbd->tb", q, layer(k.unsqueeze(1))[:, 0].unflatten(1, (blocks, block)).mean(2)
        )

    def recall(layer) -> float:
        torch.manual_seed(1)
        q, k, right = batch(1000)
        with torch.no_grad():
            return float(
                (scores(layer, q, k).topk(2, -1).indices == right.unsqueeze(1)).any(-1).float().mean()
            )

    layer, untouched, random = (KeyConvolution(d, width=3) for _ in range(3))
    with torch.no_grad():
        random.taps.normal_(std=1.0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(60):
        q, k, right = batch(64)
        loss = torch.nn.functional.cross_entropy(10 * scores(layer, q, k), right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned, plain, noise = recall(layer), recall(untouched), recall(random)
    assert learned > plain + 0.05, (learned, plain, noise)
    assert noise < learned - 0.05, (learned, plain, noise)
