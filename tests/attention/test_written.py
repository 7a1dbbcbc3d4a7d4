"""Methods as plain data: what is written is read back as the same method, and nothing else is ever made."""

from __future__ import annotations

import json

import pytest
import torch

from tests.conformance.common import METHODS, ROUNDED
from tilewise.attention import (
    SLA,
    Antidiagonal,
    Boxes,
    Clusters,
    Dense,
    Mass,
    MeanPool,
    MoBA,
    NeighborhoodAttention,
    Own,
    Pooled,
    Quantised,
    SegmentSort,
    Share,
    Tiles,
    TopK,
    as_data,
    attend,
    from_data,
    named,
)
from tilewise.attention.written import check_plans

COMPOSED = [
    Tiles(MeanPool(counted=True), Share(0.3, over="head"), (16, 32), always=(Own(2),), rest=Pooled(1.0)),
    Tiles(Antidiagonal(4), Mass(0.5), (16, 16), order=SegmentSort(32), precision=Quantised()),
    Tiles(MeanPool(), TopK(2), (8, 8), order=Clusters(4, 4), compare_forced=False),
    Tiles(MeanPool(), TopK(2), (8, 8), order=Boxes((4, 8), (2, 4))),
    NeighborhoodAttention((4, 8), (3, 3)),
]


def through_text(method):
    return from_data(data=json.loads(json.dumps(as_data(method=method), allow_nan=False)))


@pytest.mark.parametrize(
    "method", [*(kind() for kind in named().values()), *METHODS.values(), *ROUNDED.values()], ids=str
)
def test_every_named_method_comes_back(method):
    assert through_text(method) == method


@pytest.mark.parametrize("method", COMPOSED, ids=lambda m: type(m).__name__)
def test_compositions_come_back_and_compute_the_same(method):
    again = through_text(method)
    assert repr(again) == repr(method)
    q, k, v = torch.randn(3, 1, 2, 32, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(attend(q, k, v, again), attend(q, k, v, method))


@pytest.mark.parametrize(
    ("method", "place"),
    [
        (SLA(8), "method is a SLA, which cannot be written"),
        (Tiles(MeanPool(), TopK(2), rest=Pooled(float("inf"))), "method.rest.slope is inf"),
    ],
)
def test_what_cannot_be_written_is_named(method, place):
    with pytest.raises(TypeError, match=place):
        as_data(method)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "method: kind must name a method or stage, got None"),
        ({"kind": "Nothing"}, "got 'Nothing'"),
        ({"kind": "Plan", "passes": [], "view": None}, "method must be|must name|Plan"),
        ({"kind": "__import__"}, "got '__import__'"),
        ({"kind": "MeanPool"}, "method must be a method, got MeanPool"),
        ({"kind": "MoBA", "blocks": 3}, "MoBA does not take these settings: .*blocks"),
        ({"kind": "MoBA", "block": "many"}, "block must be an integer >= 1, got 'many'"),
        ({"kind": "Tiles", "score": {"kind": "TopK"}, "select": 3}, "method.score: TopK does not take"),
        ([1, 2], "method must be a method, got tuple"),
        (None, "method must be a method, got NoneType"),
    ],
)
def test_bad_data_is_named(data, said):
    with pytest.raises(ValueError, match=said):
        from_data(data)


def test_stages_in_the_wrong_place_are_found():
    with pytest.raises(ValueError, match="Tiles cannot plan"):
        check_plans(Tiles(MeanPool(), MeanPool(), (8, 8)))
    check_plans(Dense())
    check_plans(MoBA())
