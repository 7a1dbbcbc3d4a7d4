"""T1 against a Fourier neural operator: variance, transforms, time, and a flow learned on the same data."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.convolution import operators
from tilewise.convolution import FNO, T1, SpectralConv
from training import navier_stokes


@pytest.mark.evidence
def test_the_first_layer_keeps_the_variance_of_a_cut_signal():
    """White noise of 48 x 32 points, cut to the m x m lowest modes, a matrix for each, and back: the field's
    variance is what came, within sampling, for every m. Control: weights that do not know of the cut lose all
    but m^2 of 1,536 parts of it."""
    torch.manual_seed(0)
    for modes in (4, 8, 16):
        for init, want in (("preserving", 1.0), ("plain", modes**2 / (48 * 32))):
            model = T1(size=(48, 32), width=32, modes=modes, layers=2, init=init)
            x = torch.randn(64, 32, 48, 32)
            with torch.no_grad():
                z = torch.einsum("bixy,xyio->boxy", model.to_modes(x), model.layers[0].channels)
            back = torch.zeros(64, 32, 48, 32)
            back[:, :, :modes, :modes] = z
            share = float(back.square().mean())  # an orthonormal transform leaves the mean square as it is
            assert abs(share / want - 1) < 0.15, (modes, init, share)
        second = model.layers[1]
        z = torch.randn(64, 32, modes, modes)
        channels, rows, columns = (p.detach() for p in (second.channels, second.rows, second.columns))
        assert abs(float(torch.einsum("bixy,xyio->boxy", z, channels).var()) - 1) < 0.15
        assert abs(float((rows @ z @ columns).var()) - 1) < 0.3


@pytest.mark.evidence
def test_it_transforms_once(monkeypatch):
    """One cosine transform and one back for any number of layers, and no more than m^2 of the grid's numbers
    in a layer. Control: FNO's Fourier transforms are two in each layer."""
    counts = {"dct": 0, "idct": 0, "rfft2": 0, "irfft2": 0}

    def counted(owner: object, name: str) -> None:
        run = getattr(owner, name)

        def wrapped(*args, **kwargs):
            counts[name] += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    from tilewise.convolution import t1

    for name in ("dct", "idct"):
        counted(t1, name)
    for name in ("rfft2", "irfft2"):
        counted(torch.fft, name)
    x = torch.randn(1, 1, 32, 32)
    T1(layers=7, modes=8)(x)
    assert counts == {"dct": 2, "idct": 2, "rfft2": 0, "irfft2": 0}  # of rows and of columns
    FNO(layers=7)(x)
    assert counts["rfft2"] == counts["irfft2"] == 7


@pytest.mark.evidence
def test_a_batch_takes_less_time_and_the_more_so_the_finer_the_grid():
    """The networks above on 32 and 64 points a side: layers among a fixed number of modes cost as much on both, so
    T1 takes under 0.8 and 0.5 of FNO's time."""
    models = {name: operators.OPERATORS[name]().eval() for name in ("fno", "t1")}
    share = {}
    for n in (32, 64):
        x, spent = torch.randn(16, 1, n, n), {name: [] for name in models}
        with torch.no_grad():
            for _ in range(11):
                for name, model in models.items():
                    begun = time.perf_counter()
                    model(x)
                    spent[name].append(time.perf_counter() - begun)
        middle = {name: sorted(times)[5] for name, times in spent.items()}
        share[n] = middle["t1"] / middle["fno"]
    assert share[32] < 0.8 and share[64] < 0.5, share


def test_fno_is_its_formula_on_the_modes_it_keeps():
    layer = SpectralConv(3, 2).double()
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    z, want = torch.fft.rfft2(x), torch.zeros(2, 3, 6, 3, dtype=torch.complex128)
    weight = torch.complex(*layer.weight)
    for i, row in enumerate((-1, 0, 1)):
        for column in (0, 1):
            want[:, :, row, column] = z[:, :, row, column] @ weight[i, column]
    torch.testing.assert_close(layer(x), torch.fft.irfft2(want, s=(6, 5)))
    with pytest.raises(ValueError, match="at least 3 points a side, got 2 x 5"):
        layer(x[:, :, :2])
    model = FNO(2, 3, width=4, modes=2, layers=2)
    assert model(torch.randn(2, 2, 6, 5)).shape == (2, 3, 6, 5)
    model(torch.randn(2, 2, 6, 5)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_t1_is_its_formula_and_keeps_to_its_modes():
    torch.manual_seed(0)
    model = T1(2, 1, size=(6, 8), width=3, modes=4, layers=2, hidden=5).double()
    x = torch.randn(2, 2, 6, 8, dtype=torch.float64)

    def cosines(n: int) -> Tensor:
        u = torch.arange(n, dtype=torch.float64)
        made = (2 / n) ** 0.5 * torch.cos(math.pi * u.unsqueeze(1) * (u + 0.5) / n)
        made[0] /= math.sqrt(2)
        return made

    lines = torch.meshgrid(torch.arange(6) / 6, torch.arange(8) / 8, indexing="ij")
    z = model.lift(torch.cat((x, torch.stack(lines).double().expand(2, -1, -1, -1)), 1))
    z = (cosines(6) @ z @ cosines(8).mT)[:, :, :4, :4]
    for layer in model.layers:
        mixed = torch.stack(
            [torch.stack([z[:, :, i, j] @ layer.channels[i, j] for j in range(4)], 2) for i in range(4)], 2
        )
        z = z + layer.rows @ F.gelu(mixed) @ layer.columns
    z = model.down(F.gelu(model.up(z)))
    torch.testing.assert_close(model.modes_of(x), z)
    whole = torch.zeros(2, 1, 6, 8, dtype=torch.float64)
    whole[:, :, :4, :4] = z
    torch.testing.assert_close(model(x), cosines(6).mT @ whole @ cosines(8))
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert model(x[:0]).shape == (0, 1, 6, 8)


def test_another_grid_of_the_same_field_gets_nearly_the_same_answer():
    """A smooth field on twice the points; without the scale for points it would be twice as large."""
    model = operators.load("t1")
    coarse, fine = operators.held_out(count=10)[0], operators.held_out(64, count=10)[0]
    torch.testing.assert_close(fine[:, :, ::2, ::2], coarse, rtol=0, atol=1e-5)
    with torch.no_grad():
        apart = operators.relative(model(fine)[:, :, ::2, ::2], model(coarse))
    assert apart < 0.3, apart


def test_the_solver_solves():
    """A single shear wave decays as viscosity says, a smaller step changes little, the mean stays, and a
    flow's solution on another grid is the same."""
    n = 32
    x = torch.arange(n, dtype=torch.float64) / n
    wave = torch.sin(2 * math.pi * x).expand(1, n, n)
    later = navier_stokes.solve(wave, 1.0)
    want = math.exp(-1e-3 * 4 * math.pi**2) * wave
    torch.testing.assert_close(later, want, rtol=0, atol=1e-6)
    w = navier_stokes.random_fields(3, n, 5)
    force = navier_stokes.forcing(n)
    rough, fine = (navier_stokes.solve(w, 2.0, step=step, force=force) for step in (0.04, 0.01))
    assert (rough - fine).norm() < 1e-3 * (fine - w).norm()
    assert (fine - w).norm() > 0.1 * w.norm() and fine.mean((1, 2)).abs().max() < 1e-12
    doubled = navier_stokes.solve(navier_stokes.random_fields(3, 64, 5), 2.0, force=navier_stokes.forcing(64))
    assert (doubled[:, ::2, ::2] - rough).norm() < 0.01 * (fine - w).norm()


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="init must be one of 'preserving', 'plain', got 'other'"):
        T1(init="other")
    with pytest.raises(ValueError, match=r"size must be \(H, W\) of at least 12 modes, got \(8, 32\)"):
        T1(size=(8, 32))
    with pytest.raises(ValueError, match=r"x must be \[B, 1, H, W\], got \[2, 2, 32, 32\]"):
        T1()(torch.ones(2, 2, 32, 32))
    with pytest.raises(ValueError, match="at least 12 points a side, got 8 x 32"):
        T1()(torch.ones(2, 1, 8, 32))
