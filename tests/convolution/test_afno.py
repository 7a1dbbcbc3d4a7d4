"""AFNO: its formula, its sparsity, and what does not depend on the resolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tilewise.convolution import AFNO


def mixer(width: int = 6, blocks: int = 3, **options) -> AFNO:
    torch.manual_seed(0)
    layer = AFNO(width, blocks, **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.5)
    return layer


@pytest.mark.parametrize("grid", [None, (12,), (3, 4), (4, 3)])
@pytest.mark.parametrize("modes", [None, 2])
def test_it_is_its_formula_mode_by_mode(grid, modes):
    """Float64, one complex vector at a time; modes that are not kept are 0."""
    layer = mixer(modes=modes, threshold=0.3)
    x = torch.randn(2, 12, 6, dtype=torch.float64)
    sides = (12,) if grid is None else grid
    dims = tuple(range(1, 1 + len(sides)))
    z = torch.fft.rfftn(x.reshape(2, *sides, 6), dim=dims, norm="ortho")
    want, net = torch.zeros_like(z), layer.network
    for place in (
        torch.cartesian_prod(*(torch.arange(n) for n in z.shape[1:-1])).reshape(-1, len(sides)).tolist()
    ):
        waves = [min(u, n - u) for u, n in zip(place, sides)]
        if modes is not None and max(waves) >= modes:
            continue
        at = (slice(None), *place)
        for g in range(3):
            part = z[at][:, 2 * g : 2 * g + 2]
            inner = part @ torch.complex(*net.up[:, g]) + torch.complex(*net.up_bias[:, g])
            inner = torch.complex(inner.real.relu(), inner.imag.relu())
            outer = inner @ torch.complex(*net.down[:, g]) + torch.complex(*net.down_bias[:, g])
            shrunk = [p.sign() * (p.abs() - 0.3).clamp(min=0) for p in (outer.real, outer.imag)]
            want[at][:, 2 * g : 2 * g + 2] = torch.complex(*shrunk)
    want = torch.fft.irfftn(want, s=sides, dim=dims, norm="ortho").reshape(x.shape)
    torch.testing.assert_close(layer(x, grid), want)


@pytest.mark.evidence
def test_weights_are_shared_by_all_modes_and_fall_with_blocks():
    """However many tokens come, the weights are these; k blocks have a k-th of the matrices' entries, and a
    change in one block's channels moves no other's output. Control: with one block it does."""
    sizes = {
        blocks: sum(p.numel() for n, p in AFNO(24, blocks).named_parameters() if "bias" not in n)
        for blocks in (1, 2, 8)
    }
    assert sizes[1] == 2 * sizes[2] == 8 * sizes[8] == 2 * 2 * 24 * 24
    for blocks, others in ((3, False), (1, True)):
        layer = mixer(6, blocks)
        x = torch.randn(1, 30, 6, dtype=torch.float64)
        other = x.clone()
        other[..., :2] += 1 + torch.rand(1, 30, 2)
        moved = (layer(x, (5, 6)) - layer(other, (5, 6))).abs().amax((0, 1)) > 1e-9
        assert moved[:2].all() and bool(moved[2:].any()) == others


@pytest.mark.evidence
def test_the_same_function_on_a_finer_grid_is_mixed_alike():
    """A trigonometric polynomial on 16 to 48 points a side, `resolution_free`: one output at the shared
    points, to rounding. Control: orthonormal modes, whose biases and thresholds mean something else on every
    grid, miss; and so does `resolution_free` without a limit to the modes, as biases reach those that the
    coarse grid lacks."""
    torch.manual_seed(0)

    def sampled(n: int) -> Tensor:
        gen = torch.Generator().manual_seed(1)
        z = torch.zeros(2, n, n // 2 + 1, 6, dtype=torch.complex128)
        drawn = 0.1 * torch.randn(2, 7, 4, 6, 2, generator=gen, dtype=torch.float64)
        z[:, torch.arange(-3, 4) % n, :4] = torch.view_as_complex(drawn)
        return torch.fft.irfft2(z, s=(n, n), dim=(1, 2), norm="forward")

    @torch.no_grad()
    def answers(layer: AFNO, n: int) -> Tensor:
        return layer(sampled(n).flatten(1, 2), (n, n)).unflatten(1, (n, n))[:, :: n // 16, :: n // 16]

    def apart(**options) -> float:
        layer = mixer(**options)
        coarse = answers(layer, 16)
        return max(float((answers(layer, n) - coarse).norm() / coarse.norm()) for n in (32, 48))

    assert apart(resolution_free=True, modes=4, threshold=0.1) < 1e-12
    assert apart(modes=4, threshold=0.1) > 0.1
    assert apart(resolution_free=True, threshold=0.1) > 0.1


@pytest.mark.evidence
def test_a_threshold_makes_modes_sparse():
    """The share of exact zeros grows from none to nearly all with the threshold, and what stays is what was
    large."""
    x = torch.randn(2, 64, 6, dtype=torch.float64)
    shares = []
    for threshold in (0.0, 0.2, 1.0, 3.0):
        layer = mixer(threshold=threshold)
        z = torch.fft.rfftn(x.unflatten(1, (8, 8)), dim=(1, 2), norm="ortho")
        mixed = torch.view_as_real(layer.network(z))
        shares.append(float((mixed == 0).double().mean()))
        if threshold == 0:
            whole = mixed
        assert torch.equal(mixed != 0, whole.abs() > threshold)
    assert shares[0] == 0 and all(b > a for a, b in zip(shares, shares[1:])) and shares[-1] > 0.5, shares


def test_shapes_dtypes_and_what_does_not_fit():
    layer = AFNO(8, 2)
    assert layer(torch.ones(2, 0, 8)).shape == (2, 0, 8)
    assert layer(torch.randn(2, 1, 8)).shape == (2, 1, 8)
    assert layer(torch.randn(2, 6, 8).bfloat16(), (2, 3)).dtype == torch.bfloat16
    x = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mixer(4, 2, modes=2), (x, (2, 3)))
    with pytest.raises(ValueError, match="groups must divide width, got 3 and 8"):
        AFNO(8, 3)
    with pytest.raises(ValueError, match="modes must be an integer >= 1, got 0"):
        AFNO(8, 2, modes=0)
    with pytest.raises(ValueError, match=r"grid must be \(N,\) or \(H, W\), got \(1, 2, 3\)"):
        layer(torch.ones(2, 6, 8), (1, 2, 3))
