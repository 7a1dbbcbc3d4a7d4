"""Methods without a name under the same conventions: any mask, length, grouping, format and engine.

They read means or weighted samples, or need a grid of tokens, so a boolean grid of pairs (common.py) cannot say
what they compute; weighted.py does.
"""

from __future__ import annotations

import pytest
import torch

from tests.conformance.cases import CASES
from tests.conformance.common import ENGINES, cases
from tests.conformance.weighted import (
    LENGTHS,
    MASKS,
    N,
    check_compiles,
    check_dtypes,
    check_full,
    check_future,
    check_lengths,
    check_plan,
    check_refuses_to_compile,
)
from tilewise import attention
from tilewise.attention import Method, attend, named, plan
from tilewise.attention.method import mode_of
from tilewise.tiles import Padding

each = pytest.mark.parametrize("case", CASES.values(), ids=[name.replace(" ", "-") for name in CASES])


@pytest.fixture(scope="module")
def made() -> dict[str, Method]:
    """The method of every case, for some call that it takes."""
    return {name: case.on(*case.qkv(1, 2, 2, 96)[:2]) for name, case in CASES.items()}


def test_every_method_is_held_to_the_conventions(made):
    """Named ones by the rest of the suite, the others here; a new method fails until it is one of them."""
    kinds = {
        name: kind
        for name in attention.__all__
        if isinstance(kind := getattr(attention, name), type) and issubclass(kind, Method)
    }
    frames = {"Method", "Recipe", "Tiles"}
    held = {type(method).__name__ for method in (*made.values(), *(kind() for kind in named().values()))}
    assert set(kinds) - frames - held == set()


def test_what_looks_ahead(made):
    """Choices by means look at their tile; with one budget for a head, or levels above tiles, at the prompt.

    Those that are made of positions, of earlier keys or of complete chunks look at nothing that is to come.
    """
    looks = {name: method.lookahead for name, method in made.items()}
    prompt = ("llsa", "over heads", "hyper", "svg", "dhsa", "vmoba")
    none = ("chunks", "squeezed", "fps", "neighborhood")
    for name, found in looks.items():
        want = [look for look, words in (("prompt", prompt), ("none", none)) if any(w in name for w in words)]
        assert found == (want or ["tile"])[0], name


@each
def test_settings_are_small(case):
    """Every case leaves something out or takes it as means: none is dense attention by another name."""
    q, k, v = case.qkv(1, 4, 2, N)
    every = torch.arange(q.shape[2]), torch.arange(N)
    mine, dense = (plan(x, q, k, mask="causal", v=v).kept(*every, 4).sum() for x in (case.on(q, k), "dense"))
    assert 0 < mine < 0.9 * dense


def test_lengths_of_every_mode_are_tried():
    assert {mode_of(*pair) for pair in LENGTHS} == {"prefill", "chunked prefill", "decode"}


@each
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_any_mask(case, mask):
    """Forward and gradients."""
    check_plan(case, mask)


@each
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine(case, engine):
    check_plan(case, "causal", engine=engine, seed=1)


@each
@pytest.mark.parametrize("heads", [(2, 2), (7, 1), (8, 2)], ids=str)
def test_groups(case, heads):
    check_plan(case, "causal", *heads)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.full is not None])
def test_set_to_compute_everything_it_is_dense(name):
    check_full(CASES[name])


@each
def test_lengths(case):
    check_lengths(case)


@each
def test_nothing_comes_from_the_future(case):
    check_future(case)


@each
def test_formats(case):
    check_dtypes(case)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.compiled is not None])
def test_compiles_whole(name):
    check_compiles(CASES[name])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.compiled is None])
def test_what_cannot_be_part_of_a_graph_says_so_and_its_plan_can(name):
    check_refuses_to_compile(CASES[name])


@each
def test_rows_that_see_nothing(case):
    q, k, v = (x.requires_grad_() for x in case.qkv(1, 2, 2, 40))
    mask = Padding(torch.zeros(1, 40, dtype=torch.bool))
    got = attend(q, k, v, case.on(q, k), mask=mask, return_lse=True)
    assert (got.out == 0).all() and (got.lse == -torch.inf).all()
    assert all((x == 0).all() for x in torch.autograd.grad(got.out.sum(), (q, k, v)))


@each
def test_padding_may_hold_anything(case):
    q, k, v = case.qkv(1, 2, 2, 64, dtype=torch.float32)
    mask = Padding(torch.arange(64).lt(41).unsqueeze(0))
    method, outs = case.on(q, k), []
    for value in (0.0, 1e30):
        filled = [x.clone() for x in (k, v)]
        for x in filled:
            x[:, :, 41:] = value
        outs.append(attend(q, *filled, method, mask=mask))
    assert torch.equal(*outs) and outs[0].isfinite().all()


@each
def test_strides_make_no_difference(case):
    q, k, v = case.qkv(2, 4, 2, 70, dtype=torch.float32)
    want = attend(q, k, v, case.on(q, k), mask="causal")
    other = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    method = case.on(*other[:2])
    assert torch.equal(attend(*other, method, mask="causal"), want)
    same = attend(*(x.transpose(1, 2) for x in (q, k, v)), method, mask="causal", layout="bnhd")
    assert torch.equal(same.transpose(1, 2), want)


@each
def test_calls_repeat(case):
    q, k, v = case.qkv(1, 4, 2, 100, dtype=torch.float32)
    assert torch.equal(*(attend(q, k, v, case.on(q, k), mask="causal") for _ in range(2)))


@pytest.mark.parametrize("method", cases(["moba", "sorted queries"]))
def test_the_explicit_formula_agrees_on_pairs(method):
    """Methods that the boolean grid can say as well."""
    check_plan(method, "causal")
