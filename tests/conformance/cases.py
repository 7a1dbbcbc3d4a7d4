"""The methods without a name in small settings, each as a case of the suite in test_weighted.py."""

from __future__ import annotations

import functools
from dataclasses import replace

from torch import Tensor

from tests.conformance.weighted import Case, Make
from tilewise.attention import (
    DHSA,
    LLSA,
    PISA,
    PSA,
    SVG2,
    SVGEAR,
    Antidiagonal,
    Centroid,
    ChunkLLM,
    First,
    FPSAttention,
    HyperAttention,
    Mass,
    MeanPool,
    NeighborhoodAttention,
    Own,
    Pooled,
    Sampled,
    SeerAttention,
    Share,
    SqueezedAttention,
    SqueezedContext,
    TileFP8,
    Tiles,
    TopK,
    VMoBA,
    calibrate_thresholds,
)
from tilewise.attention.gates import BlockGate, BoundaryPredictor, ChunkAdapters

PSA_LEVELS = ((1, 0.3), (2, 0.5), (4, 0.7), (8, 0.9))


def shapes(q: Tensor, k: Tensor) -> dict[str, int]:
    """What a gate of a layer has to know of it."""
    return {"head_dim": q.shape[3], "heads": q.shape[1], "kv_heads": k.shape[1]}


@functools.cache
def gate(kind: type, **sizes: int):
    """A gate with random weights, the same one for the same sizes."""
    return kind(**sizes, seed=4)


def seer(**settings) -> Make:
    return lambda q, k: SeerAttention(gate=gate(BlockGate, **shapes(q, k), width=6), tile=16, **settings)


def dhsa(learnt: bool = True, shared: bool = True, **settings) -> Make:
    small = {"budget": 40, "length": 12, "gap": 4, "longest": 30, "grain": 4, "block": 16, "local": 8}

    def make(q: Tensor, k: Tensor) -> DHSA:
        predictor = gate(BoundaryPredictor, **shapes(q, k)) if learnt else None
        return DHSA(predictor, shared=shared, **{**small, **settings})

    return make


def chunks(**settings) -> Make:
    return lambda q, k: ChunkLLM(
        gate(ChunkAdapters, **shapes(q, k)), **{"top_k": 3, "threshold": 0.6, "longest": 40, **settings}
    )


def squeezed(keep: float, coarse: float | None = None) -> Make:
    """Of a context that ends where the queries begin, the last of which calibrate."""

    def make(q: Tensor, k: Tensor) -> SqueezedAttention:
        length = max(1, k.shape[2] - q.shape[2])
        window = min(4, length - 1)
        context = SqueezedContext.from_keys(k[:, :, :length], 0.15, coarse, window=window, iterations=4)
        return SqueezedAttention(context, calibrate_thresholds([context], [q], keep))

    return make


def grid_of(n: int) -> tuple[int, int, int]:
    """A grid of `n` tokens, with axes that boxes do not divide where `n` has such factors."""
    frames = next(f for f in (2, 3, 1) if n % f == 0)
    height = next(f for f in (5, 4, 3, 1) if n // frames % f == 0)
    return frames, height, n // frames // height


def vmoba(layer: int, threshold: float) -> Make:
    def make(q: Tensor, k: Tensor) -> VMoBA:
        blocks = {"time": 1, "space": (2, 4), "cube": (1, 3, 4)}
        return VMoBA(grid_of(k.shape[2]), layer, **blocks, select=Mass(threshold, over="head"))

    return make


def fps(*widest: int, precision: TileFP8 | None = None) -> Make:
    """Windows of at most so many boxes along each axis."""

    def make(q: Tensor, k: Tensor) -> FPSAttention:
        grid, box = grid_of(k.shape[2]), (2, 2, 3)
        counts = [-(-n // min(side, n)) if n else 1 for n, side in zip(grid, box)]
        return FPSAttention(grid, box, tuple(map(min, counts, widest)), precision=precision)

    return make


def neighborhood(*widest: int, **settings) -> Make:
    def make(q: Tensor, k: Tensor) -> NeighborhoodAttention:
        grid = grid_of(k.shape[2])
        return NeighborhoodAttention(grid, tuple(max(1, min(x)) for x in zip(grid, widest)), **settings)

    return make


# A grid has tokens, and as many queries as keys, but where fewer queries are the last ones.
NO_GRID = "length must be an integer >= 1, got 0"
OF_A_GRID = {
    **dict.fromkeys(((0, 0), (7, 0)), NO_GRID),
    **{(n, k): f"has {k} tokens, got {n} queries" for n, k in ((33, 5), (40, 1))},
}
OF_LAST_TOKENS = {
    **dict.fromkeys(((0, 0), (7, 0)), NO_GRID),
    **{(n, k): f"there are {k} tokens, so at most as many queries, got {n}" for n, k in ((33, 5), (40, 1))},
}
BY_HALVES = "by halves needs as many queries as keys, got {} and {}"
WHOLE_PROMPTS = "reads whole prompts, or with a state one token: {} queries, {} keys"
MORE_QUERIES = ((33, 5), (40, 1), (7, 0))

CASES = {
    "pooled rest": Case(
        Tiles(MeanPool(), Share(0.3), (16, 16), always=(First(), Own()), rest=Pooled()),
        Tiles(MeanPool(), Share(1.0), (16, 16), rest=Pooled()),
    ),
    "pooled rest over heads": Case(
        Tiles(Antidiagonal(4), Share(0.3, over="head"), (32, 16), always=(Own(),), rest=Pooled(1.0)),
        compiled=(97,),
    ),
    "pisa": Case(PISA(density=0.3, tile=16), PISA(density=1.0, tile=16), compiled=(97,)),
    "pisa, order 0": Case(PISA(density=0.3, tile=16, taylor=0), PISA(density=1.0, tile=16, taylor=0)),
    "psa": Case(
        PSA(levels=PSA_LEVELS, tile=(32, 16), score=Antidiagonal(4)),
        PSA(levels=((1, 1.0),), tile=(32, 16), score=Antidiagonal(4)),
    ),
    "psa, alike": Case(PSA(levels=PSA_LEVELS, alike=(0.1, 0.0, -0.1), tile=(32, 16), score=Antidiagonal(4))),
    "psa, share": Case(PSA(levels=PSA_LEVELS, by="share", tile=(32, 16), score=Antidiagonal(4))),
    "psa, mean pool": Case(PSA(levels=PSA_LEVELS, tile=(32, 16), score=MeanPool(), always=())),
    "llsa": Case(LLSA(4, 2, levels=2), LLSA(4, 10**6, levels=2)),
}
CASES |= {
    "sampled rest": Case(
        Tiles(Centroid(), TopK(2), (16, 16), always=(Own(),), rest=Sampled(24)),
        Tiles(Centroid(), TopK(2), (16, 16), rest=Sampled(10**6)),
    ),
    "hyper": Case(HyperAttention(16, 20, least=32), HyperAttention(16, 10**6, least=32), compiled=(97,)),
    "hyper by halves": Case(
        HyperAttention(16, 20, least=32, causal=True),
        refuses={pair: BY_HALVES.format(*pair) for pair in MORE_QUERIES},
        compiled=(97,),
    ),
    "svg2": Case(
        SVG2(queries=5, keys=7, threshold=0.5, least=0.1, tile=(16, 16), iterations=3),
        SVG2(queries=5, keys=7, threshold=1.0, tile=(16, 16)),
    ),
    "svg-ear": Case(
        SVGEAR(SVG2(queries=5, keys=7, threshold=0.5, least=0.1, tile=(16, 16), iterations=3)),
        SVGEAR(SVG2(queries=5, keys=7, threshold=1.0, tile=(16, 16))),
    ),
    # Left to itself, the number of levels changes with the length, and the graph with it.
    "llsa, levels by length": replace(CASES["llsa"], method=LLSA(4, 2), full=None, compiled=(97,)),
    "llsa, one level": replace(CASES["llsa"], method=LLSA(4, 2, levels=1), full=LLSA(4, 10**6, levels=1)),
    "llsa, overlap": replace(CASES["llsa"], method=LLSA(4, 2, levels=2, overlap=True), full=None),
    "llsa, three levels": replace(CASES["llsa"], method=LLSA(4, 2, levels=3), full=None),
}
# Methods that are made for the tensors of a call.
CASES |= {
    "seer": Case(seer(top_k=3), seer(top_k=10**6)),
    "seer, threshold": Case(seer(threshold=0.2), seer(threshold=0.0)),
    "dhsa": Case(dhsa(), dhsa(budget=10**6)),
    "dhsa, each head": Case(dhsa(shared=False), dhsa(shared=False, budget=10**6)),
    "dhsa, even chunks": Case(dhsa(learnt=False), dhsa(learnt=False, budget=10**6)),
    "chunks": Case(
        chunks(),
        chunks(top_k=10**6),
        # Token by token it goes on from a state: test_chunk_llm.py.
        refuses={pair: WHOLE_PROMPTS.format(*pair) for pair in MORE_QUERIES}
        | {(1, 40): "decodes with the state of the 39 tokens before"},
        # It cuts where its adapters say, so how many tiles there are is not known before it ran.
        compiled=None,
    ),
    # A context is read with queries behind it; one of no tokens is none.
    "squeezed": Case(
        squeezed(0.4),
        squeezed(1.0),
        refuses=dict.fromkeys(((0, 0), (7, 0)), "context must have at least one token"),
        queries=lambda n: n * 2 // 5,
        compiled=(97,),
    ),
    "vmoba, time": Case(vmoba(0, 0.3), vmoba(0, 1.0), refuses=OF_A_GRID, compiled=(97,)),
    "vmoba, space": Case(vmoba(1, 0.3), vmoba(1, 1.0), refuses=OF_A_GRID, compiled=(97,)),
    "vmoba, cube": Case(vmoba(2, 0.3), vmoba(2, 1.0), refuses=OF_A_GRID, compiled=(97,)),
    # With rounding, which looks at later tokens, it stands in test_rounded.py.
    "fps": Case(fps(1, 2, 2), fps(99, 99, 99), refuses=OF_A_GRID, compiled=(97,)),
    "neighborhood": Case(
        neighborhood(2, 3, 3), neighborhood(999, 999, 999), refuses=OF_LAST_TOKENS, compiled=(97,)
    ),
    "neighborhood, causal in time": Case(
        neighborhood(2, 3, 9, causal=(True, False, False), tile=(1, 2, 3)),
        refuses=OF_LAST_TOKENS,
        compiled=(97,),
    ),
}
CASES["squeezed, two levels"] = replace(
    CASES["squeezed"], method=squeezed(0.4, 0.05), full=squeezed(1.0, 0.05)
)
