"""Methods without a name under the same conventions: any mask, length, grouping, format and engine.

They read means or weighted samples, or need a grid of tokens, so a boolean grid of pairs (common.py) cannot say
what they compute; weighted.py does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from tests.conformance.common import ENGINES, cases, qkv
from tests.conformance.weighted import (
    MASKS,
    check_compiles,
    check_dtypes,
    check_full,
    check_future,
    check_lengths,
    check_plan,
)
from tilewise import attention
from tilewise.attention import (
    LLSA,
    PISA,
    PSA,
    SVG2,
    SVGEAR,
    Antidiagonal,
    Centroid,
    First,
    HyperAttention,
    MeanPool,
    Method,
    Own,
    Pooled,
    Sampled,
    Share,
    Tiles,
    TopK,
    attend,
    named,
)
from tilewise.tiles import Padding

PSA_LEVELS = ((1, 0.3), (2, 0.5), (4, 0.7), (8, 0.9))


@dataclass(frozen=True)
class Case:
    """A method with small settings, the same set to compute everything, and what it is excused from.

    Args:
        unequal: lengths (queries, keys) that differ and that it takes.
        compiled: lengths at which it is compiled; one only where further ones would each need a graph of their own.
    """

    method: Method
    full: Method | None
    unequal: tuple[tuple[int, int], ...] = ((33, 5), (40, 1), (7, 0), (0, 7))
    compiled: tuple[int, ...] = (64, 97, 257)


CASES = {
    "pooled rest": Case(
        Tiles(MeanPool(), Share(0.3), (16, 16), always=(First(), Own()), rest=Pooled()),
        Tiles(MeanPool(), Share(1.0), (16, 16), rest=Pooled()),
    ),
    "pooled rest over heads": Case(
        Tiles(Antidiagonal(4), Share(0.3, over="head"), (32, 16), always=(Own(),), rest=Pooled(1.0)),
        None,
        compiled=(97,),
    ),
    "pisa": Case(PISA(density=0.3, tile=16), PISA(density=1.0, tile=16), compiled=(97,)),
    "pisa, order 0": Case(PISA(density=0.3, tile=16, taylor=0), PISA(density=1.0, tile=16, taylor=0)),
    "psa": Case(
        PSA(levels=PSA_LEVELS, tile=(32, 16), score=Antidiagonal(4)),
        PSA(levels=((1, 1.0),), tile=(32, 16), score=Antidiagonal(4)),
    ),
    "psa, alike": Case(
        PSA(levels=PSA_LEVELS, alike=(0.1, 0.0, -0.1), tile=(32, 16), score=Antidiagonal(4)), None
    ),
    "psa, share": Case(PSA(levels=PSA_LEVELS, by="share", tile=(32, 16), score=Antidiagonal(4)), None),
    "psa, mean pool": Case(PSA(levels=PSA_LEVELS, tile=(32, 16), score=MeanPool(), always=()), None),
    "llsa": Case(LLSA(4, 2, levels=2), LLSA(4, 10**6, levels=2), unequal=((33, 5), (40, 1), (7, 0))),
}
CASES |= {
    "sampled rest": Case(
        Tiles(Centroid(), TopK(2), (16, 16), always=(Own(),), rest=Sampled(24)),
        Tiles(Centroid(), TopK(2), (16, 16), rest=Sampled(10**6)),
    ),
    "hyper": Case(
        HyperAttention(16, 20, least=32),
        HyperAttention(16, 10**6, least=32),
        unequal=((33, 5), (7, 0)),
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
    "hyper by halves": Case(HyperAttention(16, 20, least=32, causal=True), None, unequal=(), compiled=(97,)),
    # Left to itself, the number of levels changes with the length, and the graph with it.
    "llsa, levels by length": replace(CASES["llsa"], method=LLSA(4, 2), full=None, compiled=(97,)),
    "llsa, one level": replace(CASES["llsa"], method=LLSA(4, 2, levels=1), full=LLSA(4, 10**6, levels=1)),
    "llsa, overlap": replace(CASES["llsa"], method=LLSA(4, 2, levels=2, overlap=True), full=None),
    "llsa, three levels": replace(CASES["llsa"], method=LLSA(4, 2, levels=3), full=None),
}
# Methods that neither have a name nor stand above, and where they are held to the conventions instead.
ELSEWHERE = {
    "FPSAttention": "it rounds, and its boxes are bound to a grid: test_fps_attention.py",
    "SeerAttention": "it needs a gate for these very heads: test_seer_attention.py",
    "DHSA": "its chunks come from a trained predictor: test_dhsa.py",
    "ChunkLLM": "it needs trained adapters: test_chunk_llm.py",
    "SqueezedAttention": "it needs a context of these very keys: test_squeezed.py",
    "VMoBA": "its blocks are bound to a grid: test_vmoba.py against the rule written out",
    "NeighborhoodAttention": "its window is bound to a grid: test_neighborhood.py against the definition",
}
each = pytest.mark.parametrize("case", CASES.values(), ids=[name.replace(" ", "-") for name in CASES])


def test_every_method_is_held_to_the_conventions():
    """Named ones by the suite, the others here or where it is said; a new method fails until it is one of them."""
    kinds = {
        name: kind
        for name in attention.__all__
        if isinstance(kind := getattr(attention, name), type) and issubclass(kind, Method)
    }
    frames = {"Method", "Recipe", "Tiles"}
    held = {type(case.method).__name__ for case in CASES.values()} | set(ELSEWHERE)
    held |= {kind.__name__ for kind in named().values()}
    assert set(kinds) - frames - held == set()
    assert set(ELSEWHERE) <= set(kinds), "no longer there"


def test_what_looks_ahead():
    """Choices by means look at their tile; with one budget for a head, or levels above tiles, at the prompt."""
    prompt = {name for name, case in CASES.items() if case.method.lookahead == "prompt"}
    assert prompt == {
        name for name in CASES if any(word in name for word in ("llsa", "over heads", "hyper", "svg"))
    }
    assert {case.method.lookahead for name, case in CASES.items() if name not in prompt} == {"tile"}


@each
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_any_mask(case, mask):
    """Forward and gradients."""
    check_plan(case.method, mask)


@each
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine(case, engine):
    check_plan(case.method, "causal", engine=engine, seed=1)


@each
@pytest.mark.parametrize("heads", [(2, 2), (7, 1), (8, 2)], ids=str)
def test_groups(case, heads):
    check_plan(case.method, "causal", *heads)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.full is not None])
def test_set_to_compute_everything_it_is_dense(name):
    check_full(CASES[name].full)


@each
def test_lengths(case):
    check_lengths(case.method, unequal=case.unequal)


@each
def test_nothing_comes_from_the_future(case):
    check_future(case.method)


@each
def test_formats(case):
    check_dtypes(case.method)


@each
def test_compiles_whole(case):
    check_compiles(case.method, case.compiled)


@each
def test_rows_that_see_nothing(case):
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 2, 40))
    mask = Padding(torch.zeros(1, 40, dtype=torch.bool))
    got = attend(q, k, v, case.method, mask=mask, return_lse=True)
    assert (got.out == 0).all() and (got.lse == -torch.inf).all()
    assert all((x == 0).all() for x in torch.autograd.grad(got.out.sum(), (q, k, v)))


@each
def test_padding_may_hold_anything(case):
    q, k, v = qkv(1, 2, 2, 64, dtype=torch.float32)
    mask = Padding(torch.arange(64).lt(41).unsqueeze(0))
    outs = []
    for value in (0.0, 1e30):
        filled = [x.clone() for x in (k, v)]
        for x in filled:
            x[:, :, 41:] = value
        outs.append(attend(q, *filled, case.method, mask=mask))
    assert torch.equal(*outs) and outs[0].isfinite().all()


@each
def test_strides_make_no_difference(case):
    q, k, v = qkv(2, 4, 2, 70, dtype=torch.float32)
    want = attend(q, k, v, case.method, mask="causal")
    other = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(attend(*other, case.method, mask="causal"), want)
    same = attend(*(x.transpose(1, 2) for x in (q, k, v)), case.method, mask="causal", layout="bnhd")
    assert torch.equal(same.transpose(1, 2), want)


@each
def test_calls_repeat(case):
    q, k, v = qkv(1, 4, 2, 100, dtype=torch.float32)
    assert torch.equal(*(attend(q, k, v, case.method, mask="causal") for _ in range(2)))


@pytest.mark.parametrize("method", cases(["moba", "sorted queries"]))
def test_the_explicit_formula_agrees_on_pairs(method):
    """Methods that the boolean grid can say as well."""
    check_plan(method, "causal")
