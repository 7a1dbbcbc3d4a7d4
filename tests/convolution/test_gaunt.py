"""Gaunt tensor products: against exact coupling coefficients, under rotations, and what they cost."""

from __future__ import annotations

import math
from math import factorial

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.clock import least_times
from tilewise.convolution import (
    GauntTensorProduct,
    from_fourier,
    gaunt_product,
    gaunt_table,
    real_3j,
    real_harmonics,
    to_fourier,
    wigner_3j,
)
from tilewise.convolution.gaunt import wigner

EPS = torch.finfo(torch.float64).eps


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def by_table(x: Tensor, y: Tensor, degree: int | None = None) -> Tensor:
    """The product by exact integrals, without any Fourier transform."""
    table = gaunt_table(math.isqrt(x.shape[-1]) - 1, math.isqrt(y.shape[-1]) - 1, degree)
    return torch.einsum("...i,...j,ijk->...k", x, y, table.to(x))


def rotation() -> tuple[Tensor, tuple[float, float, float]]:
    """Turns by gamma around z, by beta around y and by alpha around z, in this order."""
    alpha, beta, gamma = (torch.rand(3) * torch.tensor([6.28, 3.14, 6.28])).double().tolist()

    def around_z(angle: float) -> Tensor:
        c, s = math.cos(angle), math.sin(angle)
        return torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)

    c, s = math.cos(beta), math.sin(beta)
    around_y = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]], dtype=torch.float64)
    return around_z(alpha) @ around_y @ around_z(gamma), (alpha, beta, gamma)


def wigner_d(degree: int, angles: tuple[float, float, float]) -> Tensor:
    """What rotating a function does to its real harmonics of one degree: Wigner's sum, then real
    combinations."""
    alpha, beta, gamma = angles
    size = 2 * degree + 1
    made = torch.zeros(size, size, dtype=torch.complex128)
    for a in range(-degree, degree + 1):
        for b in range(-degree, degree + 1):
            root = math.sqrt(
                factorial(degree + a) * factorial(degree - a) * factorial(degree + b) * factorial(degree - b)
            )
            total = 0.0
            for s in range(max(0, b - a), min(degree + b, degree - a) + 1):
                below = (
                    factorial(degree + b - s)
                    * factorial(s)
                    * factorial(a - b + s)
                    * factorial(degree - a - s)
                )
                power = 2 * degree + b - a - 2 * s
                total += (
                    (-1) ** (a - b + s)
                    * math.cos(beta / 2) ** power
                    * math.sin(beta / 2) ** (a - b + 2 * s)
                    / below
                )
            turn = complex(math.cos(a * alpha + b * gamma), -math.sin(a * alpha + b * gamma))
            made[a + degree, b + degree] = root * total * turn
    to_real = wigner._to_real(degree)
    return (to_real.conj() @ made @ to_real.mT).real  # rotates coefficients of functions


def rotated(x: Tensor, angles: tuple[float, float, float]) -> Tensor:
    degree = math.isqrt(x.shape[-1]) - 1
    parts = [x[..., n * n : (n + 1) ** 2] @ wigner_d(n, angles).mT for n in range(degree + 1)]
    return torch.cat(parts, -1)


def test_harmonics_are_orthonormal_and_named_right():
    """Gauss and Legendre's rule integrates their products exactly; degree 1 is y, z and x."""
    degree, count = 8, 24
    steps = torch.arange(1, count, dtype=torch.float64)
    off = steps / (4 * steps * steps - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    weights = 2 * vectors[0] ** 2
    phi = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    rim = (1 - nodes**2).sqrt().unsqueeze(1)
    points = torch.stack((rim * phi.cos(), rim * phi.sin(), nodes.unsqueeze(1).expand(-1, count)), -1)
    values = real_harmonics(points, degree)
    gram = torch.einsum("tpi,tpj,t->ij", values, values, weights * (2 * math.pi / count))
    assert (gram - torch.eye((degree + 1) ** 2, dtype=torch.float64)).abs().max() < 100 * EPS
    x, y, z = points.unbind(-1)
    want = math.sqrt(3 / (4 * math.pi)) * torch.stack((y, z, x), -1)
    torch.testing.assert_close(values[..., 1:4], want, rtol=0, atol=20 * EPS)
    torch.testing.assert_close(real_harmonics(7 * points, 2), values[..., :9], rtol=0, atol=20 * EPS)


def test_3j_symbols_are_known_ones_and_orthogonal():
    assert wigner_3j(1, 1, 0, 0, 0, 0) == -math.sqrt(1 / 3)
    assert wigner_3j(2, 1, 1, 0, 0, 0) == math.sqrt(2 / 15)
    assert wigner_3j(1, 1, 1, 1, -1, 0) == math.sqrt(1 / 6)
    assert wigner_3j(2, 2, 3, 1, 1, -2) == 0 and wigner_3j(1, 1, 3, 0, 0, 0) == 0
    for l3 in range(2, 7):  # of degrees 4 and 2
        block = real_3j(4, 2, l3)
        kept = torch.einsum("ijk,ijl->kl", block, block) * (2 * l3 + 1)
        torch.testing.assert_close(kept, torch.eye(2 * l3 + 1, dtype=torch.float64), rtol=0, atol=50 * EPS)
    assert not real_3j(4, 2, 7).any()
    cross = real_3j(1, 1, 1) * math.sqrt(6)  # the cross product
    torch.testing.assert_close(cross, -cross.mT, rtol=0, atol=5 * EPS)


@pytest.mark.evidence
@pytest.mark.parametrize("engine", ["fft", "matrix"])
def test_it_is_the_exact_table_of_integrals(engine):
    """Every pair of degrees up to 6 and every cut: float64, to a few hundred roundings. What Clebsch-Gordan
    coefficients give differs by one factor for each triple of degrees, which the table has from 3j symbols
    alone.

    Controls: a sine where a cosine belongs (wrong parity), harmonics that are not normalised, and a spectrum
    cut by one frequency each miss by far.
    """
    worst = 0.0
    for left, right, degree in [
        (0, 0, None),
        (1, 1, 1),
        (2, 3, None),
        (3, 3, 2),
        (4, 4, 4),
        (6, 6, None),
        (6, 1, 7),
    ]:
        x, y = draw(5, (left + 1) ** 2), draw(5, (right + 1) ** 2)
        got, want = gaunt_product(x, y, degree=degree, engine=engine), by_table(x, y, degree)
        worst = max(worst, float((got - want).norm() / want.norm()))
    assert worst < 200 * EPS, worst
    x, y = draw(5, 25), draw(5, 25)
    want = by_table(x, y)
    flipped = to_fourier(x).roll(1, -1)  # a coefficient of cos(u theta) as that of cos((u + 1) theta)
    scales = torch.tensor([math.sqrt(2 * n + 1) for n in range(5) for _ in range(2 * n + 1)])
    cut = to_fourier(x)
    cut[..., -1] = 0
    for wrong in (from_fourier(flipped), x * scales, from_fourier(cut)):
        missed = (gaunt_product(wrong, y, engine=engine) - want).norm() / want.norm()
        assert missed > 0.01, missed


@pytest.mark.evidence
def test_each_path_is_a_multiple_of_clebsch_and_gordans():
    """Inputs of one degree each: the output of degree c is a constant times the real 3j symbols' contraction
    where a + b + c is even, and nothing where it is odd, which no multiple of them can be."""
    for a, b in ((1, 1), (2, 1), (2, 3), (4, 4)):
        x, y = draw(7, (a + 1) ** 2), draw(7, (b + 1) ** 2)
        x[:, : a * a], y[:, : b * b] = 0, 0
        z = gaunt_product(x, y)
        for c in range(a + b + 1):
            part = z[:, c * c : (c + 1) ** 2]
            coupled = torch.einsum("ni,nj,ijk->nk", x[:, a * a :], y[:, b * b :], real_3j(a, b, c))
            if c < abs(a - b) or (a + b + c) % 2:
                assert part.abs().max() < 100 * EPS
                continue
            ratio = (part * coupled).sum() / coupled.square().sum()
            want = math.sqrt((2 * a + 1) * (2 * b + 1) * (2 * c + 1) / (4 * math.pi)) * wigner_3j(
                a, b, c, 0, 0, 0
            )
            assert abs(ratio - want) < 100 * EPS * abs(want)
            torch.testing.assert_close(part, ratio * coupled, rtol=0, atol=100 * EPS)
    antisymmetric = torch.einsum("ni,nj,ijk->nk", draw(7, 3), draw(7, 3), real_3j(1, 1, 1))
    assert antisymmetric.norm() > 0.1  # what a Gaunt product leaves out


@pytest.mark.evidence
@pytest.mark.parametrize("engine", ["fft", "matrix"])
def test_rotating_the_inputs_rotates_the_output(engine):
    """By Wigner matrices summed from their definition, weights in every degree and channel. Controls: orders
    taken in another order, and weights that differ inside a degree, are not equivariant."""
    turn, angles = rotation()
    points = draw(40, 3)
    seen = real_harmonics(points @ turn, 4)  # the function at turned-back places
    torch.testing.assert_close(
        seen, rotated(real_harmonics(points, 4), inverse(angles)), rtol=0, atol=1e3 * EPS
    )
    layer = GauntTensorProduct(4, 3, 5, channels=2, engine=engine).double()
    with torch.no_grad():
        for weight in layer.weights:
            weight.normal_()
    x, y = draw(6, 2, 25), draw(6, 2, 16)
    want = rotated(layer(x, y), angles)
    got = layer(rotated(x, angles), rotated(y, angles))
    assert (got - want).norm() < 1e3 * EPS * want.norm()

    def swapped(x: Tensor) -> Tensor:
        return torch.cat(
            [x[..., n * n : (n + 1) ** 2].roll(1, -1) for n in range(math.isqrt(x.shape[-1]))], -1
        )

    def uneven(x: Tensor) -> Tensor:
        return x * torch.linspace(1, 2, x.shape[-1], dtype=torch.float64)

    for wrong in (swapped, uneven):
        got = gaunt_product(wrong(rotated(x, angles)), rotated(y, angles), engine=engine)
        want = rotated(gaunt_product(wrong(x), y, engine=engine), angles)
        assert (got - want).norm() > 0.05 * want.norm(), wrong.__name__


def inverse(angles: tuple[float, float, float]) -> tuple[float, float, float]:
    alpha, beta, gamma = angles
    return -gamma, -beta, -alpha


@pytest.mark.evidence
@pytest.mark.timed
def test_its_cost_grows_with_the_third_power():
    """Multiplications of matrices between degrees 16 and 64 grow with less than the power 3.2, those of the
    table between 4 and 8 with more than 5. And time: at degree 8 it takes less than a third of the
    table's."""

    def operations(degree: int) -> int:
        x = torch.randn(4, (degree + 1) ** 2)
        gaunt_product(x, x, engine="matrix")  # the matrices of a degree are made once
        with FlopCounterMode(display=False) as counted:
            gaunt_product(x, x, engine="matrix")
        return counted.get_total_flops()

    def power(few: float, many: float, doublings: int) -> float:
        return math.log2(many / few) / doublings

    grown = power(operations(16), operations(64), 2)
    assert 2.5 < grown < 3.2, grown
    tables = {degree: gaunt_table(degree, degree).float() for degree in (4, 8)}
    assert power(tables[4].numel(), tables[8].numel(), 1) > 5
    x = torch.randn(256, 81)
    flat = tables[8].flatten(1)

    def contracted() -> Tensor:  # the quickest of plain ways: one large product, then one of each row
        return torch.bmm(y.unsqueeze(1), (x @ flat).view(256, 81, -1)).squeeze(1)

    y = torch.randn(256, 81)
    torch.testing.assert_close(contracted(), gaunt_product(x, y), rtol=1e-3, atol=1e-3)
    spent = least_times({"table": contracted, "product": lambda: gaunt_product(x, y)}, rounds=7)
    assert spent["product"] < spent["table"] / 3, spent


@pytest.mark.evidence
@pytest.mark.parametrize("engine", ["fft", "matrix"])
def test_many_factors_are_one_product(engine):
    """Four functions on one grid: two by two, and at random points their values multiplied."""
    factors = [draw(3, (degree + 1) ** 2) for degree in (2, 3, 1, 2)]
    got = gaunt_product(*factors, engine=engine)
    pairs = gaunt_product(gaunt_product(*factors[:2]), gaunt_product(*factors[2:]))
    torch.testing.assert_close(got, pairs, rtol=0, atol=1e3 * EPS)
    points = draw(20, 3)
    values = [x @ real_harmonics(points, math.isqrt(x.shape[1]) - 1).mT for x in factors]
    want = values[0] * values[1] * values[2] * values[3]
    torch.testing.assert_close(got @ real_harmonics(points, 8).mT, want, rtol=0, atol=1e3 * EPS)


@pytest.mark.parametrize("engine", ["fft", "matrix"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_errs_no_more_than_the_table_does(engine, dtype):
    for degree in (2, 5):
        x, y = draw(64, (degree + 1) ** 2, dtype=dtype), draw(64, (degree + 1) ** 2, dtype=dtype)
        want = by_table(x.double(), y.double())
        naive = (by_table(x, y).double() - want).norm()
        got = (gaunt_product(x, y, engine=engine).double() - want).norm()
        assert got <= 2 * naive, (float(got / naive), degree)
        assert want.norm() > 2 * naive and (want.roll(1, -1) - want).norm() > 2 * naive


@pytest.mark.parametrize("engine", ["fft", "matrix"])
def test_shapes_gradients_and_strides(engine):
    x, y = draw(2, 1, 9).requires_grad_(), draw(3, 16).requires_grad_()
    assert gaunt_product(x, y, engine=engine).shape == (2, 3, 36)
    assert torch.autograd.gradcheck(lambda a, b: gaunt_product(a, b, degree=2, engine=engine), (x, y))
    assert gaunt_product(draw(0, 9), draw(0, 4), engine=engine).shape == (0, 16)
    assert gaunt_product(draw(9), draw(4), degree=6, engine=engine).shape == (49,)
    wide = gaunt_product(draw(9), draw(4), degree=6, engine=engine)
    assert not wide[16:].any() and wide[:16].all()
    turned = draw(9, 5).mT
    torch.testing.assert_close(
        gaunt_product(turned, y.detach()[:1], engine=engine),
        gaunt_product(turned.contiguous(), y.detach()[:1], engine=engine),
    )
    with torch.inference_mode():
        kept = gaunt_product(draw(2, 81), draw(2, 81), engine=engine)
    assert kept.shape == (2, 289)
    z = draw(2, 81).requires_grad_()
    gaunt_product(z, z, engine=engine).sum().backward()  # constants made in inference mode serve here too
    assert z.grad is not None and z.grad.abs().sum() > 0
    layer = GauntTensorProduct(2, 2, 2, channels=3, engine=engine)
    layer(torch.randn(4, 3, 9), torch.randn(4, 3, 9)).square().sum().backward()
    assert all(weight.grad.abs().min() > 0 for weight in layer.weights)


def test_fourier_coefficients_and_back():
    """Whole and cut; what no function on a sphere has is dropped."""
    x = draw(2, 3, 36)
    there = to_fourier(x)
    assert there.shape == (2, 3, 11, 6)
    torch.testing.assert_close(from_fourier(there), x, rtol=0, atol=100 * EPS)
    torch.testing.assert_close(from_fourier(there, 3), x[..., :16], rtol=0, atol=100 * EPS)
    theta, phi = torch.rand(2, 9, dtype=torch.float64) * 3
    rim = theta.sin()
    points = torch.stack((rim * phi.cos(), rim * phi.sin(), theta.cos()), 1)
    m, u = torch.arange(-5, 6).view(-1, 1, 1), torch.arange(6).view(1, -1, 1)
    along = torch.where(m % 2 == 1, (u * theta).sin(), (u * theta).cos())
    around = torch.where(m < 0, (-m * phi).sin(), (m * phi).cos())
    want = torch.einsum("mu,mup->p", there[0, 0], along * around)
    torch.testing.assert_close(real_harmonics(points, 5) @ x[0, 0], want, rtol=0, atol=100 * EPS)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gaunt_product(torch.ones(9)), ValueError, "at least two tensors, got 1"),
        (
            lambda: gaunt_product(torch.ones(8), torch.ones(9)),
            ValueError,
            r"factors\[0\] must have \(L \+ 1\)\^2.*got 8",
        ),
        (lambda: gaunt_product(torch.ones(9), 3.0), TypeError, r"factors\[1\] must be a tensor.*got float"),
        (
            lambda: gaunt_product(torch.ones(9), torch.ones(9).double()),
            TypeError,
            r"factors\[1\] is torch.float64",
        ),
        (lambda: gaunt_product(torch.ones(9).int(), torch.ones(9).int()), TypeError, "is torch.int32"),
        (
            lambda: gaunt_product(torch.ones(2, 9), torch.ones(3, 9)),
            ValueError,
            r"broadcast, got \[\[2\], \[3\]\]",
        ),
        (
            lambda: gaunt_product(torch.ones(9), torch.ones(9), degree=-1),
            ValueError,
            "degree must be an integer >= 0",
        ),
        (
            lambda: gaunt_product(torch.ones(9), torch.ones(9), engine="fast"),
            ValueError,
            "engine must be one of 'auto'",
        ),
        (lambda: GauntTensorProduct(2, 2.0), ValueError, "right must be an integer >= 0, got 2.0"),
        (
            lambda: GauntTensorProduct(2, 2, channels=0),
            ValueError,
            "channels must be an integer >= 1 or None",
        ),
        (
            lambda: GauntTensorProduct(2, 2)(torch.ones(9), torch.ones(4)),
            ValueError,
            "y must have 9 coefficients",
        ),
        (
            lambda: GauntTensorProduct(1, 1, channels=2)(torch.ones(4), torch.ones(2, 4)),
            ValueError,
            r"\[..., 2, 4\]",
        ),
        (lambda: wigner_3j(1, -1, 0, 0, 0, 0), ValueError, "l2 must be an integer >= 0, got -1"),
        (lambda: real_harmonics(torch.ones(2), 1), ValueError, r"directions must be \[..., 3\], got \[2\]"),
        (
            lambda: from_fourier(torch.ones(4, 3)),
            ValueError,
            r"must be \[..., 2 L \+ 1, band \+ 1\], got \[4, 3\]",
        ),
        (lambda: from_fourier(torch.ones(5, 3), 3), ValueError, "degree must be <= 2"),
    ],
)
def test_what_does_not_fit_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()
