"""Conformance 10: memory grows with tiles kept, and no engine allocates N x N."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import tilewise
from tests.conformance.common import ENGINES, METHODS, qkv, run_or_refuse
from tilewise.attention import S2O, MoBA, Quest, XAttention, attend_tiles
from tilewise.tiles import Causal, Documents, TileMap, Window

LONG = 16_384
ENGINES_BOUNDED = [engine for engine in ENGINES if engine != "definition"]


def allocations(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the largest single allocation during `run`, and the most held at once, from the CPU allocator.

    The allocator, not a dispatch mode: it also sees inside custom operators and PyTorch's own kernels.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return max(e.nbytes() for e in events), peak


def test_the_meter_sees_an_n_by_n_tensor():
    largest, peak = allocations(lambda: torch.ones(512, 512).add(1))
    assert largest == 4 * 512 * 512 and peak >= 2 * largest
    q, k, v = qkv(heads=1, n_q=512, d=8, dtype=torch.float32)
    assert allocations(lambda: tilewise.attend(q, k, v, engine="definition"))[0] >= 4 * 512 * 512


def _largest_scores(n: int) -> int:
    """An eighth of an N x N float32 tensor, in bytes."""
    return 4 * n * n // 8


@pytest.mark.parametrize("engine", ENGINES_BOUNDED)
@pytest.mark.parametrize("name", METHODS)
def test_no_n_by_n_at_16384(name, engine):
    q, k, v = qkv(heads=1, n_q=LONG, d=8, dtype=torch.float32)
    # The routers score every tile: sizes nearer to the papers' than in the other tests.
    method = {
        "moba": MoBA(block=64, top_k=4),
        "xattention": XAttention(stride=8),
        "quest": Quest(page=64, top_k=4),
        "s2o": S2O(threshold=0.5),
    }.get(name, METHODS[name])
    run = run_or_refuse(engine, q[:, :, :64], k[:, :, :64], v[:, :, :64], method, mask="causal")
    if run is None:
        return
    assert allocations(lambda: run(q, k, v, None))[0] < _largest_scores(LONG)


MASKS = {
    "none": None,
    "causal": "causal",
    "window": Causal() & Window(100, None),
    "documents": Causal() & Documents(torch.arange(0, 4097, 512)),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("engine", ["auto", *ENGINES_BOUNDED])
def test_no_n_by_n_backward(engine, mask):
    n = 4096
    inputs = [x.requires_grad_() for x in qkv(heads=1, n_q=n, d=8, dtype=torch.float32)]
    if engine != "auto" and run_or_refuse(engine, *inputs, "dense", mask=mask) is None:
        return

    def both():
        out = tilewise.attend(*inputs, mask=mask, engine=engine)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    assert allocations(both)[0] < _largest_scores(n)


def _strided(x):
    return x.mT.contiguous().mT


# Calls that PyTorch's own kernel takes only by way of the whole score matrix.
AWKWARD = {
    "grouped": lambda: qkv(heads=2, kv_heads=1, n_q=4096, dtype=torch.float32),
    "narrow values": lambda: qkv(heads=1, n_q=4096, d=8, d_v=4, dtype=torch.float32),
    "wide values": lambda: qkv(heads=1, n_q=4096, d=8, d_v=16, dtype=torch.float32),
    "features first": lambda: tuple(map(_strided, qkv(heads=1, n_q=4096, dtype=torch.float32))),
    "bfloat16": lambda: qkv(heads=1, n_q=4096, dtype=torch.bfloat16),
    "float16": lambda: qkv(heads=1, n_q=4096, dtype=torch.float16),
    "wide heads": lambda: qkv(heads=1, n_q=4096, d=320, dtype=torch.float32),
    "unequal lengths": lambda: qkv(heads=1, n_q=2048, n_k=4096, dtype=torch.float32),
}


@pytest.mark.parametrize("make", AWKWARD.values(), ids=AWKWARD)
def test_auto_never_falls_back_to_n_by_n(make):
    inputs = make()
    largest = allocations(lambda: tilewise.attend(*inputs))[0]
    heads, n_q, n_k = inputs[0].shape[1], inputs[0].shape[2], inputs[1].shape[2]
    assert largest < inputs[0].element_size() * heads * n_q * n_k / 8


def _peak(kept: int, height: int) -> int:
    n, tile = 8192, 128
    q, k, v = (x.requires_grad_() for x in qkv(heads=1, n_q=n, d=8, dtype=torch.float32))
    keep = torch.zeros(1, 1, n // height, n // tile, dtype=torch.bool)
    keep[..., :kept] = True
    tile_map = TileMap.from_mask(keep, (height, tile))

    def both():
        out = attend_tiles(q, k, v, tile_map, engine="torch")
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return allocations(both)[1]


def test_memory_grows_with_tiles_kept():
    """Queries routed alone hold one partial result for every tile kept, and nothing that grows as N x N."""
    few, some, many = _peak(4, height=1), _peak(16, height=1), _peak(64, height=1)
    assert few < some < many
    assert many < 4 * 8192 * 8192 / 2  # even at full density


def test_memory_of_tall_tiles_does_not_grow():
    """Blocks of rows have a fixed size: 64 tiles a row take no more at once than one does."""
    assert _peak(64, height=128) < 2 * _peak(1, height=128)


def test_a_large_tile_is_no_n_by_n_either():
    """Tiles may have any size, clusters above all; a block is cut within a tile that is too large for one."""
    n = 8192
    q, k, v = qkv(heads=1, n_q=n, d=8, dtype=torch.float32)
    one = TileMap.from_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool), (n, n))
    assert allocations(lambda: attend_tiles(q, k, v, one, mask="causal"))[0] < _largest_scores(n)
