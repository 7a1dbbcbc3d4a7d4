"""Keys and values in two tiers: exact for every split, bounded hot bytes, and what passes between the tiers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise
from tests.conformance.common import exact, over_budget, qkv
from tests.conformance.test_memory import allocations
from tilewise.attention.offload import Moved, OffloadedCache, split_layers
from tilewise.tiles import (
    NONE,
    PARTIAL,
    BlockCausal,
    Causal,
    Documents,
    Padding,
    Partial,
    Prefix,
    Tiling,
    Window,
    as_mask,
    merge,
)

TOKEN = 2 * (8 + 6) * 8  # bytes of one token of `_inputs`: 2 kv heads, keys of 8 and values of 6 in float64


def _inputs(n: int = 150):
    return qkv(1, 4, 2, n, d=8, d_v=6)


def _fed(cache: OffloadedCache, k, v, cuts) -> OffloadedCache:
    """`cache` after the tokens came in pieces that end at `cuts`."""
    for start, end in zip([0, *cuts], cuts):
        cache.append(k[:, :, start:end], v[:, :, start:end])
    return cache


@pytest.mark.evidence
@pytest.mark.parametrize("tier", ["memory", "disk"])
@pytest.mark.parametrize("hot", [0, 1, 7, 64, 149, None])
def test_every_split_equals_one_piece(hot, tier):
    """A prompt, chunks of it and single tokens, however many of them are hot and however the cold ones are cut.

    Controls: without the cold part, and with the parts averaged instead of merged by their log-sum-exp, both fail.
    """
    q, k, v = _inputs()
    for piece in (16, 1000):
        cache = OffloadedCache(None if hot is None else hot * TOKEN, tier=tier, piece=piece)
        at = 0
        for end in (40, 41, 41, 100, 149, 150):
            cache.append(k[:, :, at:end], v[:, :, at:end])
            got = cache.attend(q[:, :, at:end], return_lse=True)
            seen = torch.arange(end) <= torch.arange(at, end).unsqueeze(1)
            want = exact(q[:, :, at:end], k[:, :, :end], v[:, :, :end], seen)
            want.check({"out": got.out})
            torch.testing.assert_close(got.lse, want.lse, rtol=1e-12, atol=1e-12)
            at = end
        assert cache.hot_tokens == (150 if hot is None else hot)
        assert all(torch.equal(x, y) for x, y in zip(cache.fetch(), (k, v)))
    if not hot:
        return
    parts = []
    for tokens in (slice(150 - hot, 150), slice(0, 150 - hot)):
        view = Causal().at(q_pos=torch.tensor([149]), k_pos=torch.arange(150)[tokens])
        one = tilewise.attend(q[:, :, -1:], k[:, :, tokens], v[:, :, tokens], mask=view, return_lse=True)
        parts.append(Partial(*one))
    want.check({"out": merge(parts).out})
    if hot < 149:
        for wrong in (parts[0].out, (parts[0].out + parts[1].out) / 2):
            with pytest.raises(AssertionError, match="wrong"):
                want.check({"out": wrong})


@pytest.mark.evidence
@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_hot_bytes_stay_within_the_budget(tier, monkeypatch):
    """While the sequence grows to 4,096 tokens, the hot tier holds no more; nor does a step need more to work with.

    Controls: without a budget the bytes pass it; with pieces as long as the cold part a step's memory grows.
    """
    _, k, v = _inputs(4096)
    q = torch.randn(1, 4, 1, 8, dtype=torch.float64)
    budget = 100 * TOKEN + 17
    cache, free = OffloadedCache(budget, tier=tier, piece=256), OffloadedCache(None)
    whole = OffloadedCache(budget, tier=tier, piece=1 << 20)
    needs: dict[str, list[int]] = {"pieces": [], "one piece": []}
    for start in range(0, 4096, 64):
        for one in (cache, free, whole):
            one.append(k[:, :, start : start + 64], v[:, :, start : start + 64])
        assert cache.hot_bytes <= budget and cache.tokens == start + 64
        assert cache.cold_tokens == max(0, cache.tokens - 100)
        assert cache.cold_bytes >= cache.cold_tokens * TOKEN
        if start + 64 in (1024, 4096):
            for name, one in (("pieces", cache), ("one piece", whole)):
                needs[name].append(allocations(lambda one=one: one.attend(q, cold_engine="torch"))[1])
    assert free.hot_bytes >= 4096 * TOKEN > 10 * budget
    assert needs["pieces"][1] < 1.1 * needs["pieces"][0], needs
    assert needs["one piece"][1] > 2 * needs["one piece"][0], needs


class _Copies(TorchDispatchMode):
    """Bytes that PyTorch copies outside of the operators that compute attention."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::_to_copy", "aten::clone", "aten::copy_", "aten::cat"):
            self.bytes += result.nbytes
        return result


@pytest.mark.evidence
def test_a_step_moves_queries_and_partials_never_keys():
    """Bytes that a decode step moves do not depend on the tokens that are cold; PyTorch's copies are the count.

    The CPU stands for both devices: what passes between the tiers is copied all the same. Control: keys and values
    fetched back move 64 times as much after 64 times as many tokens.
    """
    _, k, v = (x.float() for x in _inputs(6400 + 50))
    q = torch.randn(1, 4, 1, 8)
    moved, fetched = [], []
    for cold in (100, 6400):
        cache = OffloadedCache(50 * TOKEN // 2, tier="memory", piece=512)
        cache.append(k[:, :, : cold + 50], v[:, :, : cold + 50])
        assert cache.cold_tokens == cold and cache.moved == Moved(spilled=cold * TOKEN // 2)
        with _Copies() as copies:
            out = cache.attend(q)
        moved.append(cache.moved.queries + cache.moved.partials)
        lse_bytes = 4 * 4
        assert copies.bytes == moved[-1] == q.nbytes + out.nbytes + lse_bytes
        assert cache.moved.spilled == cold * TOKEN // 2 and cache.moved.fetched == 0
        cache.fetch()
        fetched.append(cache.moved.fetched)
    assert moved[0] == moved[1] and fetched == [100 * TOKEN // 2, 6400 * TOKEN // 2]
    assert moved[1] < fetched[1] / 1000


MASKS = {
    "causal": Causal(),
    "window": Causal() & Window(100, None),
    "documents": Causal() & Documents(torch.tensor([0, 100, 100, 5000, 20_000])),
    "block causal": BlockCausal(96),
    "prefix": Prefix(300),
}


def _bytes(view) -> int:
    """Bytes that a bound mask holds, memory that several of its tensors share counted once."""
    held = {x.data_ptr(): x.untyped_storage().nbytes() for x in (view.lo, view.hi, view.pos, view.q_pos)}
    return sum(held.values()) + (0 if view.dense is None else view.dense.nbytes)


@pytest.mark.evidence
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_are_made_tile_by_tile(mask):
    """A mask is a few integers per token, and only the tiles at its edges need a mask at all.

    The tiles made from those integers are those of the N x N mask. Control: given as a grid it holds N^2 bytes.
    """
    small, large = _bytes(mask.bind(4096, 4096)), _bytes(mask.bind(16_384, 16_384))
    assert large <= 4 * small and large <= 48 * 16_384 < 16_384**2 / 300
    largest, _ = allocations(lambda: mask.bind(16_384, 16_384).tiles(Tiling(128), Tiling(128)))
    assert largest < 16_384**2 / 100
    view = mask.bind(1024, 1024)
    grid = view.tokens()
    tiles = grid.unflatten(3, (8, 128)).unflatten(2, (8, 128)).transpose(3, 4)
    kinds = view.tiles(Tiling(128), Tiling(128))
    partial = tiles.any((4, 5)) & ~tiles.all((4, 5))
    assert torch.equal(kinds == PARTIAL, partial) and torch.equal(kinds == NONE, ~tiles.any((4, 5)))
    assert int(partial.sum()) <= 2 * 8 + 1  # of 64
    assert _bytes(as_mask(grid[0, 0]).bind(1024, 1024)) >= 1024**2


@pytest.mark.evidence
@pytest.mark.parametrize("memory", [0, 999, 2500, 4096, 10**6])
def test_layers_split_as_the_paper_does(memory):
    """As many layers as fit stay hot, whole; the others keep nothing hot. One more hot layer would not fit."""
    layer = 16 * TOKEN
    budgets = split_layers(layers=6, device_bytes=memory * 4, layer_bytes=layer, other_bytes=1000)
    q, k, v = _inputs(16)
    caches = [OffloadedCache(budget, tier="memory") for budget in budgets]
    for cache in caches:
        cache.append(k, v)
        exact(q, k, v, torch.ones(16, 16).tril().bool()).check({"out": cache.attend(q)})
    hot = [cache for cache in caches if not cache.cold_tokens]
    assert all(cache.hot_bytes == layer * (cache in hot) for cache in caches)
    held = sum(cache.hot_bytes for cache in caches)
    room = max(0, memory * 4 - 1000)
    assert held <= room and (len(hot) == 6 or held + layer > room)


@pytest.mark.parametrize("mask", [None, "causal", *MASKS.values()], ids=["none", "word", *MASKS])
def test_masks_hold_across_tiers(mask):
    q, k, v = _inputs()
    cache = _fed(OffloadedCache(20 * TOKEN, tier="memory", piece=33), k, v, (50, 150))
    want = tilewise.attend(q[:, :, -60:], k, v, mask=mask, scale=0.3, softcap=2.0, return_lse=True)
    got = cache.attend(
        q=q[:, :, -60:], mask=mask, scale=0.3, softcap=2.0, engine="torch", cold_engine="definition",
        return_lse=True,
    )  # fmt: skip
    for mine, right in zip(got, want):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    q, k, v = qkv(2, 4, 2, 300, d=16, dtype=dtype)
    cache = _fed(OffloadedCache(4000, piece=64), k, v, (100, 300))
    assert cache.tier == "disk" and cache.cold_tokens > 200
    got = cache.attend(q[:, :, -40:])
    seen = torch.arange(300) <= torch.arange(260, 300).unsqueeze(1)
    want = exact(q[:, :, -40:], k, v, seen).out
    naive = tilewise.attend(q[:, :, -40:], k, v, mask="causal", engine="definition")
    assert got.dtype == dtype and over_budget(got, naive, want) is None


def test_a_disk_tier_leaves_nothing_behind(tmp_path: Path):
    _, k, v = _inputs()
    cache = _fed(OffloadedCache(0, tier="disk", folder=tmp_path), k, v, (1, 100, 150))
    assert all(torch.equal(x, y) for x, y in zip(cache.fetch(), (k, v)))
    (own,) = tmp_path.iterdir()
    assert sum(file.stat().st_size for file in own.iterdir()) == cache.cold_bytes >= 150 * TOKEN
    del cache
    assert not list(tmp_path.iterdir())


def test_no_tokens():
    q, k, v = _inputs(0)
    cache = OffloadedCache(1000)
    cache.append(k, v)
    got = cache.attend(torch.randn(1, 4, 2, 8, dtype=torch.float64), return_lse=True)
    assert got.out.abs().sum() == 0 and (got.lse == -torch.inf).all()
    assert cache.attend(q).shape == (1, 4, 0, 6)


@pytest.mark.parametrize(
    "options", [{"budget": -1}, {"budget": 1.5}, {"tier": "gpu"}, {"piece": 0}, {"piece": 2.0}]
)
def test_wrong_settings_are_refused(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        OffloadedCache(**options)


def test_wrong_calls_are_refused_and_change_nothing():
    q, k, v = _inputs()
    cache = OffloadedCache(10 * TOKEN)
    with pytest.raises(ValueError, match="nothing to attend to"):
        cache.attend(q)
    with pytest.raises(ValueError, match="nothing to fetch"):
        cache.fetch()
    cache.append(k, v)
    for error, match, wrong in (
        (TypeError, "k must be a floating tensor", (k[0], v)),
        (TypeError, "v must be a floating tensor", (k, v.long())),
        (ValueError, "must share batch, heads", (k, v[:, :, 1:])),
        (ValueError, "must be as those before", (k[..., 1:], v)),
        (ValueError, "must be as those before", (k.float(), v.float())),
        (ValueError, "must not require gradients", (k.clone().requires_grad_(), v)),
    ):
        with pytest.raises(error, match=match):
            cache.append(*wrong)
    for mask in (torch.ones(150, 150).bool(), Padding(torch.ones(1, 150).bool()), Causal().at()):
        with pytest.raises(ValueError, match="mask must be None, 'causal' or made of"):
            cache.attend(q, mask=mask)
    with pytest.raises(ValueError, match="q must not require a gradient"):
        cache.attend(q.clone().requires_grad_())
    with pytest.raises(ValueError, match="head_dim"):
        cache.attend(q[..., 1:])
    assert cache.tokens == 150 and cache.moved == Moved(spilled=140 * TOKEN)
    for wrong in ({"layers": -1}, {"device_bytes": -1}, {"other_bytes": -1}, {"layer_bytes": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            split_layers(**{"layers": 2, "device_bytes": 10, "layer_bytes": 1, **wrong})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_keeps_only_the_hot_part():
    q, k, v = (x.float().cuda() for x in _inputs(1000))
    cache = OffloadedCache(100 * TOKEN // 2, piece=128)
    cache.append(k, v)
    assert cache.tier == "memory" and cache.hot_tokens == 100
    got = cache.attend(q[:, :, -3:])
    seen = torch.arange(1000) <= torch.arange(997, 1000).unsqueeze(1)
    exact(*(x.cpu() for x in (q[:, :, -3:], k, v)), seen).check({"out": got.cpu()})
    assert cache.moved.queries == q[:, :, -3:].nbytes
