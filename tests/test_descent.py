"""The step that all training shares."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tilewise.descent import Descent, cosine


def made(clip: float | None = None) -> tuple[nn.Linear, Descent]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, Descent(model, torch.optim.SGD(model.parameters(), lr=0.5), clip)


def loss(model: nn.Linear, step: int) -> torch.Tensor:
    return (model(torch.randn(4, 3, generator=torch.Generator().manual_seed(step))) - 1).square().mean()


def test_saved_and_loaded_it_goes_on_bit_for_bit():
    whole, straight = made()
    for step in range(6):
        straight.step(loss(whole, step), cosine(step / 6))
    first, begun = made()
    for step in range(3):
        begun.step(loss(first, step), cosine(step / 6))
    second, resumed = made()
    resumed.load_state_dict(begun.state_dict())
    for step in range(3, 6):
        resumed.step(loss(second, step), cosine(step / 6))
    assert resumed.losses == straight.losses and len(straight.losses) == 6
    assert torch.equal(second.weight, whole.weight) and not torch.equal(first.weight, whole.weight)


def test_a_step_is_a_share_of_the_rate_and_of_a_clipped_gradient():
    model, descent = made(clip=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    assert descent.step(loss(model, 0), 0.25, shown=7.0) == 7.0 == descent.losses[0]
    steps = [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]
    moved = math.sqrt(sum(float(step.square().sum()) for step in steps))
    assert moved == pytest.approx(0.5 * 0.25 * 1e-3, rel=1e-3)
    unclipped, free = made()
    free.step(loss(unclipped, 0))
    assert float((unclipped.weight.detach() - before[0]).norm()) > 100 * moved


def test_a_loss_that_is_not_finite_moves_nothing():
    model, descent = made()
    before = model.weight.detach().clone()
    for bad in (torch.nan, torch.inf):
        with pytest.raises(FloatingPointError, match="the loss of step 0 is (nan|inf)"):
            descent.step(loss(model, 0) * bad)
    assert torch.equal(model.weight, before) and not descent.losses


def test_the_wave_falls_from_one_to_nothing():
    assert cosine(0) == 1 and cosine(0.5) == pytest.approx(0.5) and cosine(1) == pytest.approx(0)
