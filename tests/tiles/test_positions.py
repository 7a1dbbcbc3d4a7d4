"""Masks at given positions."""

from __future__ import annotations

import pytest
import torch

import tilewise
from tilewise.tiles import Causal, Padding, Window


def test_positions_given_equal_the_tokens_they_name() -> None:
    """Queries 3, 9 and 4 of a sequence, asked for by position, get what they get within the whole sequence."""
    q, k, v = (torch.randn(2, 2, 12, 8, dtype=torch.float64) for _ in range(3))
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[0, :2] = False
    mask = Causal() & Window(5, None) & Padding(keep)
    whole = tilewise.attend(q, k, v, mask=mask)
    some = torch.tensor([3, 9, 4])
    placed = tilewise.attend(q[:, :, some], k, v, mask=mask.at(q_pos=some))
    torch.testing.assert_close(placed, whole[:, :, some])
    assert not torch.allclose(tilewise.attend(q[:, :, some], k, v, mask=mask), whole[:, :, some])


def test_keys_in_any_slots() -> None:
    """A cache whose slots are out of order: positions say what is where."""
    q, k, v = (torch.randn(1, 2, 10, 8, dtype=torch.float64) for _ in range(3))
    order = torch.randperm(10)
    shuffled = tilewise.attend(q, k[:, :, order], v[:, :, order], mask=Causal().at(k_pos=order))
    torch.testing.assert_close(shuffled, tilewise.attend(q, k, v, mask="causal"))


def test_positions_inside_a_conjunction_are_refused() -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"write \(a & b\)\.at"):
        tilewise.attend(q, q, q, mask=Window(1, 0) & Causal().at(q_pos=torch.arange(4)))
    with pytest.raises(ValueError, match="q_pos must be integers"):
        tilewise.attend(q, q, q, mask=Causal().at(q_pos=torch.arange(3)))
