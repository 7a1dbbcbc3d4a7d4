"""NSTR: its field and derivatives, and its transport equation. What it does not do is on docs/spectral.md."""

from __future__ import annotations

import pytest
import torch

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


def test_the_representation_is_its_formula_and_learns_in_every_parameter():
    torch.manual_seed(0)
    model = NSTR(frequencies=3, cells=2, features=2, hidden=5, outputs=2).double()
    places = torch.rand(7, 2, dtype=torch.float64)
    spectrum = model.spectrum(places)
    sums = torch.zeros(7, 2, dtype=torch.float64)
    for i in range(3):
        wave = torch.sin(places @ model.frequencies[i] + model.phases[i])
        sums += torch.stack((spectrum[:, i], spectrum[:, 3 + i]), 1) * wave.unsqueeze(1)
    torch.testing.assert_close(model(places), model.skip(sums) + model.decoder(sums))
    (model(places).square().mean() + model.transport(places)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_transport_ties_the_field_to_one_law():
    """A field that obeys one, rotating amplitudes (S1' = a S2, S2' = -a S1), is learned by the law; noise of
    the same size is not: what the regulariser measures. Control: a law that may not look at the spectrum."""
    torch.manual_seed(0)
    found = {}
    for kind in ("waves", "noise", "blind"):
        model = NSTR(dim=1, frequencies=2, cells=40, hidden=32)
        line = (torch.arange(model.spectrum.knots) - 1.0) / model.spectrum.cells
        with torch.no_grad():
            turn = 15 * line
            waves = torch.stack((turn.sin(), turn.cos()), 1)
            model.spectrum.values.copy_(torch.randn(len(line), 2) / 2**0.5 if kind == "noise" else waves)
        model.spectrum.requires_grad_(False)
        optimizer = torch.optim.Adam(model.law.parameters(), 1e-2)
        for _ in range(400):
            places = torch.rand(256, 1)
            if kind == "blind":
                with torch.no_grad():
                    model.law[0].weight[:] = 0
            loss = model.transport(places)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if kind == "blind":
            with torch.no_grad():
                model.law[0].weight[:] = 0
        places = torch.rand(2000, 1)
        size = (model.spectrum.slopes(places) / model.spectrum.cells).square().mean()
        found[kind] = float(model.transport(places).detach() / size)
    assert found["waves"] < 0.01 and found["noise"] > 0.3 and found["blind"] > 0.9, found


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="dim must be 1, 2 or 3, got 4"):
        NSTR(4)
    with pytest.raises(ValueError, match="cells must be an integer >= 1, got 0"):
        NSTR(cells=0)
    with pytest.raises(ValueError, match=r"places must be \[N, 2\], got \[3, 3\]"):
        NSTR()(torch.ones(3, 3))
