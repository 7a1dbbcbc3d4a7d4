"""Choosing one setting for each layer so that the whole costs no more than it may."""

from __future__ import annotations

from collections.abc import Sequence

import torch

GRID = 2000  # steps of the cost axis: a whole is at most this far from the cheapest way to the same loss


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of (cost, loss) that no other point is at least as good as in both, by rising cost."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] < points[kept[-1]][1]:
            kept.append(i)
    return kept


def allocate(layers: Sequence[Sequence[tuple[float, float]]], budget: float) -> list[int]:
    """For each layer the index of one of its (cost, loss), so that the losses' sum is least within the budget.

    Args:
        layers: the choices of each layer. budget: the mean cost over layers that may be spent.

    Exact up to the grid of costs, which are rounded up, so the budget always holds. Raises ValueError when there is
    a layer without choices or even the cheapest choices cost more than the budget.
    """
    if not layers or any(not choices for choices in layers):
        raise ValueError("layers must each have at least one (cost, loss)")
    limit = budget * len(layers)
    if not limit > 0 or sum(min(cost for cost, _ in choices) for choices in layers) > limit:
        raise ValueError(f"budget {budget:g} is below what the cheapest choices cost")
    best = torch.full((GRID + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0
    taken = []
    for choices in layers:
        options = torch.full((len(choices), GRID + 1), torch.inf, dtype=torch.float64)
        for number, (cost, loss) in enumerate(choices):
            step = -int(-cost / limit * GRID // 1)  # up
            if step <= GRID:
                options[number, step:] = best[: GRID + 1 - step] + loss
        best, picked = options.min(0)
        taken.append((picked, [-int(-cost / limit * GRID // 1) for cost, _ in choices]))
    if not torch.isfinite(best).any():  # rounding up alone can take the cheapest over the limit
        return [min(range(len(choices)), key=lambda i: choices[i]) for choices in layers]
    at = int(best.argmin())
    chosen = []
    for picked, steps in reversed(taken):
        number = int(picked[at])
        chosen.append(number)
        at -= steps[number]
    return chosen[::-1]
