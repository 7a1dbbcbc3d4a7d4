"""LINA: division or subtraction, a convolution for what is near, and a gate for each place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.recurrence import pictures
from tests.recurrence.vision_models import denoiser
from tilewise.recurrence import LINA
from tilewise.recurrence.lina import EPS

PLACES = 16


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("normalize", ["divide", "subtract"])
def test_the_layer_is_its_formula(normalize):
    torch.manual_seed(0)
    layer, x = LINA(8, 2, 12, conv=3, normalize=normalize).double(), draw(2, 12, 8)
    with torch.no_grad():
        layer.key_gate.copy_(draw(2, 12, 1, seed=1).abs())
        layer.value_gate.copy_(draw(2, 12, 1, seed=2))
    q, k, v = (made(x).unflatten(2, (2, 4)).transpose(1, 2) for made in (layer.query, layer.key, layer.value))
    q, k, v = F.relu(q) + EPS, (F.relu(k) + EPS) * layer.key_gate, v * layer.value_gate
    scores = q @ k.mT
    if normalize == "divide":
        weights = scores / 12 / (scores.mean(3, keepdim=True) + EPS)
    else:
        weights = (scores - scores.mean(3, keepdim=True)) / 2 / 12 + 1 / 12
    near = layer.conv.conv(x.mT.unflatten(2, (3, 4))).flatten(2).mT
    want = layer.out((weights @ v).transpose(1, 2).flatten(2) + near)
    torch.testing.assert_close(layer(x, (3, 4)), want)


@pytest.mark.evidence
@torch.no_grad()
def test_a_gate_says_what_each_place_writes():
    """At 1 it is not there; a place with gates of 0 is as good as padding, for all others, and its neighbours
    keep theirs. Control: the value's gate alone leaves the place in the denominator, the key's alone removes
    it."""
    torch.manual_seed(0)
    layer, x = LINA(64, 2, 12, conv=0).double(), draw(2, 12, 64)
    plain = LINA(64, 2, gate=False, conv=0).double()
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if "gate" not in n})
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    shut, kept = torch.tensor([3, 7]), torch.ones(12, dtype=torch.bool)
    kept[shut] = False
    without = plain(x, mask=kept.expand(2, -1))

    def off(*names: str) -> float:
        other = LINA(64, 2, 12, conv=0).double()
        other.load_state_dict(layer.state_dict())
        with torch.no_grad():
            for name in names:
                getattr(other, name)[:, shut] = 0
        return float((other(x) - without)[:, kept].norm() / without[:, kept].norm())

    assert off("key_gate", "value_gate") < 1e-5 and off("key_gate") < 1e-5
    assert off("value_gate") > 0.02 and off() > 0.02


@pytest.mark.evidence
def test_a_learned_gate_forgets_places_that_hold_noise():
    """Half of the places, always the same, hold numbers like all others that do not count; what is asked for
    is the mean of the rest. Trained for a few seconds, the gate shuts the idle places. Control: the same
    layer without a gate cannot tell places apart, and is left with an error as large as an even mean's."""
    counts = torch.arange(PLACES) % 4 < 2

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, PLACES, 8, generator=torch.Generator().manual_seed(seed))
        return x, x[:, counts].mean(1, keepdim=True).expand_as(x)

    errors, layers = {}, {}
    for gate in (True, False):
        torch.manual_seed(0)
        layer = layers[gate] = LINA(8, 2, PLACES, gate=gate, conv=0)
        optimizer = torch.optim.AdamW(layer.parameters(), 2e-2, weight_decay=0.0)
        for step in range(400):
            x, want = batch(1000 + step)
            loss = (layer(x) - want).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        x, want = batch(1)
        with torch.no_grad():
            errors[gate] = float((layer(x) - want).square().mean() / want.square().mean())
    even = float((x.mean(1, keepdim=True) - want).square().mean() / want.square().mean())
    written = (layers[True].key_gate * layers[True].value_gate).detach().abs().squeeze(2)
    assert written[:, ~counts].max() < 0.2 * written[:, counts].min()
    assert errors[True] < 0.15 and errors[False] > 0.8 * even > 0.35, (errors, even)


@pytest.mark.evidence
@torch.no_grad()
def test_division_stays_within_the_values_and_subtraction_does_not():
    """However long queries grow, what a divided layer reads is a mean of its values. Subtraction's weights
    sum to 1 as
    well but grow with the query, below 0 too: the same layer then reads what no value is near."""
    x, reach = draw(2, 64, 8), {}
    for normalize in ("divide", "subtract"):
        torch.manual_seed(0)
        layer = LINA(8, 2, gate=False, conv=0, normalize=normalize).double()
        with torch.no_grad():
            layer.out.weight.copy_(torch.eye(8))
            layer.out.bias.zero_()
            values = layer.value(x)
            for size in (1.0, 100.0):
                layer.query.weight.mul_(size)
                layer.query.bias.mul_(size)
                out = layer(x)
                beyond = torch.maximum(out - values.amax(1, keepdim=True), values.amin(1, keepdim=True) - out)
                reach[normalize, size] = float(beyond.max())
    assert reach["divide", 1.0] <= 0 and reach["divide", 100.0] <= 0
    assert reach["subtract", 100.0] > 1, reach


@pytest.mark.evidence
def test_trained_to_generate_it_needs_its_convolution():
    """Denoisers of pictures trained alike (`training/train_vision.py`), error of the noise in fresh pictures:
    with the convolution and without it."""
    found = {name: error(name) for name in ("lina", "lina-no-conv")}
    assert found["lina-no-conv"] > 1.05 * found["lina"], found


def test_division_is_not_ahead_of_subtraction_here():
    """What the paper finds of large models is not seen in these small ones: both are as good, with a gate and
    without."""
    found = {name: error(name) for name in ("lina", "lina-subtract", "lina-no-gate")}
    assert max(found.values()) < 1.02 * min(found.values()), found


def error(name: str) -> float:
    return pictures.held_out(pictures.loaded(denoiser(name), name))
