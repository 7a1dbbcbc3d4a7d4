"""Selective copying and induction: what is asked was told, where it stands varies, seeds and bad sizes."""

import pytest
import torch

from tilewise.data.recall_tasks import IGNORE
from tilewise.data.selection_tasks import induction, selective_copying


def test_selective_copying_asks_for_what_stands_among_the_noise_in_order():
    tokens, targets = selective_copying(50, 20, 6, vocabulary=9, seed=3)
    assert tokens.shape == targets.shape == (50, 26)
    assert (targets[:, :20] == IGNORE).all() and (tokens[:, 20:] == 1).all()
    for row, asked in zip(tokens, targets):
        told = row[:20][row[:20] != 0]
        assert told.tolist() == asked[20:].tolist() and 2 <= int(told.min()) <= int(told.max()) < 9
    places = (tokens[:, :20] != 0).double().mean(0)
    assert (places > 0).all() and (places < 1).all()  # every place sometimes, none always


def test_selective_copying_without_noise():
    tokens, targets = selective_copying(3, 4, 4)
    assert torch.equal(tokens[:, :4], targets[:, 4:])


def test_induction_asks_for_what_followed_the_special_token():
    tokens, targets = induction(200, 12, vocabulary=7, seed=1)
    assert tokens.shape == targets.shape == (200, 12) and (targets[:, :-1] == IGNORE).all()
    first = (tokens == 0).long().argmax(1)
    assert ((tokens == 0).sum(1) == 2).all() and (tokens[:, -1] == 0).all()
    assert torch.equal(tokens.gather(1, first.unsqueeze(1) + 1)[:, 0], targets[:, -1])
    assert set(first.tolist()) == set(range(10))  # never so late that the answer would be the question
    assert set(targets[:, -1].tolist()) == set(range(1, 7))


@pytest.mark.parametrize(
    "make", [lambda s: selective_copying(4, 9, 3, seed=s), lambda s: induction(4, 9, seed=s)]
)
def test_seeds(make):
    for same, other, again in zip(make(0), make(1), make(0)):
        assert torch.equal(same, again) and not torch.equal(same, other)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="length must be at least kept, 5, got 4"):
        selective_copying(1, 4, 5)
    with pytest.raises(ValueError, match="kept must be at least 1, got 0"):
        selective_copying(1, 4, 0)
    with pytest.raises(ValueError, match="vocabulary must hold .* 4, got 3"):
        selective_copying(1, 4, 2, vocabulary=3)
    with pytest.raises(ValueError, match="length must be at least 3, got 2"):
        induction(1, 2)
    with pytest.raises(ValueError, match="vocabulary must hold .* 3, got 2"):
        induction(1, 5, vocabulary=2)
    with pytest.raises(ValueError, match="examples must be at least 1, got 0"):
        induction(0, 5)
