"""Initial-state tuning: a learned first state of a frozen GLA stack in place of a prompt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.recurrence import decays
from tilewise.recurrence import (
    InitialState,
    ModelConfig,
    SequenceModel,
    tune_initial_state,
)


def model_of(*layers: str) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(ModelConfig(20, 16, layers, {name: {"heads": 2} for name in layers}))


def test_before_tuning_it_is_the_empty_state():
    model, tokens = model_of("gla", "delta-net"), torch.randint(20, (3, 12))
    state = InitialState(model, rank=2)
    assert state.numbers == 2 * 2 * (4 + 8) + 2 * 2 * (8 + 8)
    assert torch.equal(model(tokens, state(3))[0], model(tokens)[0])


def test_the_model_is_left_as_it_is():
    model = model_of("gla", "gla")
    before = {key: x.clone() for key, x in model.state_dict().items()}
    batches = [(torch.randint(20, (2, 8)), torch.randint(20, (2, 8))) for _ in range(5)]
    made = tune_initial_state(model, batches)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    again = tune_initial_state(model, iter(batches[:1]))  # without a length the step size stays
    assert any(x.any() for x in again.right) and all(x.any() for x in made.right)


def test_bad_arguments():
    model = model_of("gla")
    with pytest.raises(ValueError, match="rank must be an integer >= 1, got 0"):
        InitialState(model, rank=0)
    with pytest.raises(ValueError, match="rate must be above 0, got 0"):
        tune_initial_state(model, [], rate=0)
    with pytest.raises(ValueError, match="model must have a layer over scan"):
        InitialState(
            SequenceModel(ModelConfig(20, 16, ("diagonal-attention",), {"diagonal-attention": {"block": 1}}))
        )


@pytest.mark.evidence
def test_a_tuned_state_replaces_the_prompt():
    """Voices are ciphers that the model knows from examples in the prompt only. A state of 384 numbers, tuned with
    every weight frozen, reaches what a prompt of 24 examples does, with no prompt at all. Controls: with the empty
    state, and with the state of another voice, the model is little better than a guess of one in eight."""
    model, gen = decays.load("gla-cipher"), torch.Generator().manual_seed(5)
    ciphers = decays.voices(3, gen)
    states = [
        tune_initial_state(
            model, [decays.spoken(c.expand(8, -1), 64, gen) for _ in range(120)], rank=4, rate=0.3
        )
        for c in ciphers
    ]
    assert states[0].numbers == 384 < sum(p.numel() for p in model.parameters()) / 60

    @torch.no_grad()
    def heard(cipher: Tensor, state: InitialState | None, shown: int = 0) -> float:
        tokens, targets = decays.spoken(cipher.expand(64, -1), 64, gen, shown)
        return decays.accuracy(model(tokens, None if state is None else state(64))[0], targets)

    count = len(states)
    found = {
        "tuned": sum(heard(c, s) for c, s in zip(ciphers, states)) / count,
        "prompted": sum(heard(c, None, 24) for c in ciphers) / count,
        "empty": sum(heard(c, None) for c in ciphers) / count,
        "another": sum(heard(c, s) for c, s in zip(ciphers, states[1:] + states[:1])) / count,
    }
    assert found["tuned"] > found["prompted"] - 0.02 and found["tuned"] > 0.9, found
    assert max(found["empty"], found["another"]) < 0.35, found
