"""Allocation against all combinations tried one by one, and the front against its definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise.tune import allocate, front

POINTS = st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(0.0, 2.0)), min_size=1, max_size=5)


@given(POINTS)
def test_front_is_what_nothing_beats(points):
    kept = front(points)
    for i, (cost, loss) in enumerate(points):
        beaten = any(c <= cost and x <= loss and (c, x) != (cost, loss) for c, x in points)
        assert (points[i] in [points[j] for j in kept]) == (not beaten)
    assert [points[j][0] for j in kept] == sorted(points[j][0] for j in kept)


@settings(deadline=None)
@given(st.lists(POINTS, min_size=1, max_size=4), st.floats(0.02, 1.0))
def test_allocation_is_the_best_of_all(layers, budget):
    """Within the budget, and as good as the best combination of a budget smaller by the grid's steps."""
    every = [
        (sum(cost for cost, _ in combination), sum(loss for _, loss in combination))
        for combination in itertools.product(*layers)
    ]
    limit = budget * len(layers)
    if min(cost for cost, _ in every) > limit:
        with pytest.raises(ValueError, match="below what the cheapest choices cost"):
            allocate(layers, budget)
        return
    chosen = [choices[i] for choices, i in zip(layers, allocate(layers, budget), strict=True)]
    assert sum(cost for cost, _ in chosen) <= limit * (1 + 1e-9)
    within = [loss for cost, loss in every if cost <= limit * (1 - len(layers) / 2000)]
    if within:
        assert sum(loss for _, loss in chosen) <= min(within) + 1e-9


def test_layers_share_the_budget_by_need():
    """A layer that loses much gets the budget of one that loses little; equal shares (control) lose more."""
    easy, hard = [(0.1, 0.1), (0.5, 0.05), (0.9, 0.0)], [(0.1, 2.0), (0.5, 1.0), (0.9, 0.0)]
    assert allocate([easy, hard], 0.5) == [0, 2]
    assert allocate([hard, easy], 0.5) == [2, 0]
    assert easy[1][1] + hard[1][1] > easy[0][1] + hard[2][1]


def test_bad_input():
    for layers in ([], [[(0.1, 0.1)], []]):
        with pytest.raises(ValueError, match="layers must each have at least one"):
            allocate(layers, 0.5)
    for budget in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="budget"):
            allocate([[(0.1, 0.1)]], budget)
    assert torch.tensor(allocate([[(1.0, 0.5)]], 1.0)).tolist() == [0], "all of the budget may be spent"
