"""NSTR: its field and derivatives, and its transport equation, and pictures fitted beside SIREN."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.convolution import fields
from tilewise.convolution import NSTR, SpectrumGrid


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_the_field_is_a_spline_and_its_slopes_are_its_derivatives(dim):
    """Constants and slopes of a linear field come out exact; derivatives are autograd's; cells meet
    smoothly."""
    torch.manual_seed(0)
    field = SpectrumGrid(4, dim, cells=5).double()
    places = torch.rand(50, dim, dtype=torch.float64, requires_grad=True)
    made = field(places)
    assert made.shape == (50, 4)
    slopes = field.slopes(places)
    for channel in range(4):
        (want,) = torch.autograd.grad(made[:, channel].sum(), places, retain_graph=True)
        torch.testing.assert_close(slopes[:, :, channel], want)
    with torch.no_grad():
        line = (torch.arange(field.knots, dtype=torch.float64) - 1) / field.cells
        grid = torch.stack(torch.meshgrid(*[line] * dim, indexing="ij")).sum(0).flatten()
        field.values[:] = (2 + 3 * grid).unsqueeze(1)
        torch.testing.assert_close(field(places), (2 + 3 * places.sum(1, keepdim=True)).expand(-1, 4))
        torch.testing.assert_close(field.slopes(places), torch.full((50, dim, 4), 3.0, dtype=torch.float64))
        field.values.normal_()
        edge = torch.full((1, dim), 0.4, dtype=torch.float64)
        near = [f(edge + step) for f in (field, field.slopes) for step in (-1e-9, 1e-9)]
        assert (near[0] - near[1]).abs().max() < 1e-6 and (near[2] - near[3]).abs().max() < 1e-6
    leaf = torch.rand(3, dim, dtype=torch.float64)

    def read(values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(field, {"values": values}, leaf)

    assert torch.autograd.gradcheck(read, field.values, fast_mode=True)


@pytest.mark.parametrize("layers", [0, 2])
def test_the_representation_is_its_formula_and_learns_in_every_parameter(layers):
    torch.manual_seed(0)
    model = NSTR(frequencies=3, layers=layers, rank=2, cells=2, hidden=5, outputs=2).double()
    places = torch.rand(7, 2, dtype=torch.float64)
    spectrum, turns = model.spectrum(places), (2 * places - 1) @ (model.frequencies / 2).mT
    scaled = torch.stack(
        [spectrum[:, i] * torch.sin(turns[:, i] + 30 * model.waves.bias[i]) for i in range(3)], 1
    )
    for part in model.decoder:
        scaled = scaled @ part.weight.mT + part.bias
        if part is not model.decoder[-1]:
            scaled = torch.sin(30 * scaled)
    torch.testing.assert_close(model(places), scaled)
    (model(places).square().mean() + model.transport(places)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    groups = model.groups(1e-3)
    assert {p for group in groups for p in group["params"]} == set(model.parameters())
    assert [group["lr"] for group in groups] == [1e-3, pytest.approx(3e-2)]


@pytest.mark.evidence
@pytest.mark.parametrize("image", fields.DRAWN)
def test_waves_scaled_over_space_fit_what_drifts_better_than_sines_of_sines(image):
    """Decibels of the pixels seen and of those held out, at most 3,800 parameters, depth and rate as serve each
    kind best: every one of three seeds is better than every one of SIREN.

    Controls: the same field, trained to shift the waves in place of scaling them, is not better either. A
    spectrum that is the same everywhere, the field's mean, is no picture any more.
    """
    gone = fields.held_out()
    found = {
        kind: torch.tensor(
            [
                [fields.decibels(fields.load(kind, image, seed), image, which) for which in (~gone, gone)]
                for seed in fields.SEEDS
            ]
        )
        for kind in ("nstr", "siren", "shifted")
    }
    assert fields.size(fields.load("nstr", image, 0)) <= fields.size(fields.load("siren", image, 0))
    for other in ("siren", "shifted"):
        assert (found["nstr"].amin(0) > found[other].amax(0) + 1).all(), found
        assert (found["nstr"].mean(0) > found[other].mean(0) + 2.5).all(), found
    for seed in fields.SEEDS:
        same = copy.deepcopy(fields.load("nstr", image, seed))
        same.field.values[:] = same.field(fields.places()).mean(0)
        assert fields.decibels(same, image, ~gone) < found["nstr"][seed, 0] - 15


@pytest.mark.evidence
@pytest.mark.parametrize("image", fields.DRAWN)
def test_the_spectrum_tells_where_frequencies_are_high(image):
    """Mean frequency of the waves, weighed by the squares of their local amplitudes, follows the picture's local
    frequency. Controls: it does not before the fit, and the field of the same network that shifts waves does
    not."""
    true = fields.local_frequency(image)

    @torch.no_grad()
    def agreement(model: NSTR) -> float:
        power = model.spectrum(fields.places()).square()
        mean = power @ model.frequencies.norm(dim=1) / power.sum(1)
        return float(torch.corrcoef(torch.stack((true, mean)))[0, 1])

    for seed in fields.SEEDS:
        assert agreement(fields.load("nstr", image, seed)) > 0.8
        assert agreement(fields.load("shifted", image, seed)) < 0.4
    untrained = torch.tensor([agreement(fields.made("nstr", 2)) for _ in range(20)])
    assert untrained.mean() < 0.4


@pytest.mark.evidence
def test_transport_ties_the_field_to_one_law():
    """A field that obeys one, rotating amplitudes (S1' = a S2, S2' = -a S1), is learned by the law; noise of
    the same size is not: what the regulariser measures. Control: a law that may not look at the spectrum."""
    torch.manual_seed(0)
    found = {}
    for kind in ("waves", "noise", "blind"):
        model = NSTR(dim=1, rank=2, cells=40, hidden=32)
        line = (torch.arange(model.field.knots) - 1.0) / model.field.cells
        with torch.no_grad():
            turn = 15 * line
            waves = torch.stack((turn.sin(), turn.cos()), 1)
            model.field.values.copy_(torch.randn(len(line), 2) / 2**0.5 if kind == "noise" else waves)
        model.field.requires_grad_(False)
        optimizer = torch.optim.Adam(model.law.parameters(), 1e-2)
        for _ in range(400):
            if kind == "blind":
                with torch.no_grad():
                    model.law[0].weight[:] = 0
            loss = model.transport(torch.rand(256, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if kind == "blind":
            with torch.no_grad():
                model.law[0].weight[:] = 0
        places = torch.rand(2000, 1)
        changes = (model.field.slopes(places) / model.field.cells).square().mean()
        found[kind] = float(model.transport(places).detach() / changes)
    assert found["waves"] < 0.01 and found["noise"] > 0.3 and found["blind"] > 0.9, found


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="dim must be 1, 2 or 3, got 4"):
        NSTR(4)
    with pytest.raises(ValueError, match="cells must be an integer >= 1, got 0"):
        NSTR(cells=0)
    with pytest.raises(ValueError, match=r"places must be \[N, 2\], got \[3, 3\]"):
        NSTR()(torch.ones(3, 3))
    with pytest.raises(ValueError, match="layers must be an integer >= 0, got -1"):
        NSTR(layers=-1)
    with pytest.raises(ValueError, match="rank must be an integer >= 1, got 0"):
        NSTR(rank=0)
