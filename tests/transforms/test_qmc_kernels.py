"""Invariant kernels against their series, Gram matrices against dense ones, and processes against dense
processes."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.clock import least_times
from tilewise.kernels.digit_sums.digits import BITS
from tilewise.transforms.qmc import (
    DigitallyShiftInvariant,
    DigitalNet,
    FastGP,
    Gram,
    Halton,
    Lattice,
    ShiftInvariant,
)
from tilewise.transforms.qmc.kernels import bernoulli

EPS = torch.finfo(torch.float64).eps
SIZES = [1, 2, 16, 32, 128, 512]
WEIGHTS = [1.0, 0.25, 0.1]


def pair(kind: str, smoothness=2, dim=3, **given):
    """A kernel with a sequence that fits it."""
    if kind == "lattice":
        return ShiftInvariant(dim, smoothness, WEIGHTS[:dim]), Lattice(dim, seed=5, **given)
    return DigitallyShiftInvariant(dim, smoothness, WEIGHTS[:dim]), DigitalNet(dim, seed=5, **given)


# --------------------------------------------------------------------------- kernels


def test_bernoulli_polynomials():
    assert bernoulli(1) == (Fraction(1, 6), -1)
    assert bernoulli(2) == (Fraction(-1, 30), 0, 1)  # x^4 - 2 x^3 + x^2 - 1/30
    x = Fraction(1, 3)
    b6 = x**6 - 3 * x**5 + Fraction(5, 2) * x**4 - x**2 / 2 + Fraction(1, 42)
    assert sum(c * (x * (1 - x)) ** k for k, c in enumerate(bernoulli(3))) == b6


@pytest.mark.parametrize("smoothness", [1, 2, 3, 4, 8])
def test_shift_invariant_kernels_are_their_fourier_series(smoothness):
    x = torch.arange(64).double() / 64
    got = ShiftInvariant(1, smoothness).feature(x, smoothness)
    terms = 100_000 if smoothness == 1 else 2_000
    h = torch.arange(1, terms + 1).double()
    want = (2 * (2 * math.pi * x[:, None] * h).cos() * h ** (-2.0 * smoothness)).flip(1).sum(1)
    left_out = 2 * terms ** (1 - 2 * smoothness) / (2 * smoothness - 1)
    # Rounding: that of the factor (2 pi)^2a / (2a)! times sums of as many terms as the smoothness.
    assert (got - want).abs().max() <= left_out + 16 * smoothness * EPS * want.abs().max() * 2**smoothness


def walsh_sum(digits: list[int], order: int, places: int = 60) -> float:
    """The sum of 2^(-mu(k)) wal_k(x) over k >= 1 below 2^places, from the highest place of k to the
    lowest."""
    taken = [1.0] + [0.0] * order  # by how many of the highest ones are chosen so far
    for place in range(places, 0, -1):
        sign = -1.0 if place <= len(digits) and digits[place - 1] else 1.0
        new = taken.copy()
        for count in range(order):
            new[count + 1] += taken[count] * sign * 2.0**-place
        new[order] += taken[order] * sign  # ones below the highest weigh nothing
        taken = new
    return sum(taken) - 1


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_digital_kernels_are_their_walsh_series(order):
    """All x of 6 digits against the sum over k < 2^16 as it stands in the docstring."""
    x, k = torch.arange(64), torch.arange(1, 1 << 16)
    signs = torch.ones(64, len(k), dtype=torch.float64)
    for place in range(1, 17):
        digit = x >> 6 - place & 1 if place <= 6 else torch.zeros_like(x)
        signs *= 1 - 2.0 * (digit[:, None] & k >> place - 1 & 1)

    def places(number: int) -> list[int]:
        return [p for p in range(16, 0, -1) if number >> p - 1 & 1]

    if order == 1:
        weight = torch.tensor(
            [2.0 ** (-2 * (n.bit_length() - 1) - 1) for n in k.tolist()], dtype=torch.float64
        )
        # The sum over k from 2^16 on of 2^(-2 floor(log2 k) - 1).
        left_out = 2.0**-16
    else:
        weight = torch.tensor([2.0 ** -sum(places(n)[:order]) for n in k.tolist()], dtype=torch.float64)
        zero = [0] * 60
        left_out = walsh_sum(zero, order) - walsh_sum(zero, order, 16)
    got = DigitallyShiftInvariant(1, order).feature(x << BITS - 6, order)
    assert (got - signs @ weight).abs().max() <= left_out + len(k) * EPS  # and the rounding of the sum


@pytest.mark.parametrize("order", [2, 3, 4])
def test_digital_kernels_to_the_last_digit(order):
    x = torch.randint(1 << BITS, (200,))
    x[:54] = torch.cat((torch.zeros(1).long(), 1 << torch.arange(BITS), torch.tensor([(1 << BITS) - 1])))
    want = [walsh_sum([int(d) for d in format(n, "052b")], order) for n in x.tolist()]
    got = DigitallyShiftInvariant(1, order).feature(x, order)
    # Sums of some ten terms below 6, and what places above 60 bring at x = 0, 2^-59.
    assert (got - torch.tensor(want, dtype=torch.float64)).abs().max() <= 60 * EPS


@pytest.mark.parametrize("kind", ["lattice", "net"])
def test_a_kernel_is_a_product_with_mean_its_scale(kind):
    kernel, sequence = pair(kind, [1, 2, 3])
    x, y = torch.rand(20, 3, dtype=torch.float64), torch.rand(5, 1, 3, dtype=torch.float64)
    got = kernel(x, y)
    one = [type(kernel)(1, a)(x[:, j : j + 1], y[..., j : j + 1]) - 1 for j, a in enumerate((1, 2, 3))]
    want = math.prod(1 + w * k for w, k in zip(WEIGHTS, one))
    assert got.shape == (5, 20) and (got - want).abs().max() < 1e-13 * want.abs().max()
    assert torch.equal(kernel(x, y), kernel(y, x)) or (kernel(x, y) - kernel(y, x)).abs().max() < 1e-12
    # Shifting both points, in the kernel's own way, changes nothing.
    points = sequence.points(64)
    if kind == "lattice":
        moved = [(z + 0.3) % 1 for z in (points, points[:1])]
        assert (kernel(points, points[:1]) - kernel(*moved)).abs().max() < 1e-11
    mean = type(kernel)(3, 2, WEIGHTS, 2.5)(
        Lattice(3, seed=1).points(1 << 14), torch.zeros(3).double()
    ).mean()
    assert abs(mean.item() - 2.5) < 0.01


# ------------------------------------------------------------------------------------ Gram matrices


def exact_product(matrix: Tensor, vector: Tensor) -> Tensor:
    """In numbers of 64 bits of mantissa where the machine has them."""
    wide = matrix.numpy().astype(np.longdouble) @ vector.numpy().astype(np.longdouble)
    return torch.from_numpy(wide.astype(np.float64))


@pytest.mark.parametrize("kind", ["lattice", "net"])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("smoothness", [1, 2, 3, 4])
def test_products_and_solves_are_those_of_the_dense_matrix(kind, n, smoothness):
    kernel, sequence = pair(kind, smoothness)
    gram = Gram(kernel, sequence, n, noise=0.01)
    dense = gram.dense()
    x = torch.randn(n, dtype=torch.float64)
    want = exact_product(dense, x)
    naive = (dense @ x - want).norm()
    floor = (
        4 * EPS * dense.abs().max() * x.norm()
    )  # of the kernel's own rounding, which differs from row to row
    assert (gram.matmul(x) - want).norm() <= 2 * naive + floor * math.sqrt(n)
    # Solves are judged by what the matrix makes of them, as a Cholesky solve is.
    left = exact_product(dense, gram.solve(x)) - x
    cholesky = exact_product(dense, torch.cholesky_solve(x[:, None], torch.linalg.cholesky(dense))[:, 0]) - x
    assert left.norm() <= 2 * cholesky.norm() + EPS * math.sqrt(n) * dense.norm() * gram.solve(x).norm()
    want = torch.linalg.slogdet(dense)
    assert want.sign == 1 and abs(gram.logdet() - want.logabsdet) <= 1e-9 * max(1, n)
    assert (gram.eigenvalues.sort().values - torch.linalg.eigvalsh(dense)).abs().max() <= 1e-11 * n


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("lattice", {"order": "natural"}),
        ("lattice", {"randomize": None}),
        ("lattice", {"replications": 2}),
        ("net", {"order": "gray"}),
        ("net", {"order": "bit-reversed"}),
        ("net", {"interlace": 2}),
        ("net", {"randomize": "digital-shift"}),
        ("net", {"randomize": None}),
        ("net", {"replications": 2}),
    ],
)
def test_sequences_that_have_a_fast_gram(kind, given):
    kernel, sequence = pair(kind, **given)
    gram = Gram(kernel, sequence, 64, noise=0.1)
    x = torch.randn(4, 2, 64, dtype=torch.float64) if "replications" in given else torch.randn(64).double()
    want = (gram.dense() @ x.unsqueeze(-1)).squeeze(-1)
    assert (gram.matmul(x) - want).abs().max() <= 1e-12 * want.abs().max()
    assert (gram.solve(want) - x).abs().max() <= 1e-10 * x.abs().max()


@pytest.mark.parametrize("kind", ["lattice", "net"])
def test_the_gram_is_differentiated_through(kind):
    _, sequence = pair(kind)
    family = ShiftInvariant if kind == "lattice" else DigitallyShiftInvariant
    x = torch.randn(16, dtype=torch.float64)

    def all_of_it(weights: Tensor, scale: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gram = Gram(family(3, 2, weights, scale), sequence, 16, noise=noise)
        return gram.matmul(x), gram.solve(x), gram.logdet()

    given = (torch.tensor(WEIGHTS), torch.tensor(1.5), torch.tensor(0.3))
    torch.autograd.gradcheck(all_of_it, [g.double().requires_grad_() for g in given])


@pytest.mark.evidence
@pytest.mark.parametrize("kind", ["lattice", "net"])
def test_the_fast_gram_is_the_dense_one_and_needs_its_order(kind):
    """Equal to rounding at 2,048 points; with points in another order, or of another sequence, nothing is
    equal."""
    n = 2048
    kernel, sequence = pair(kind, 2, randomize="shift" if kind == "lattice" else "lms")
    gram = Gram(kernel, sequence, n, noise=1e-4)
    dense, x = gram.dense(), torch.randn(n, dtype=torch.float64)
    exact = exact_product(dense, x)
    assert (gram.matmul(x) - exact).norm() <= 2 * (dense @ x - exact).norm() + 4 * EPS * math.sqrt(
        n
    ) * exact.norm()
    residual = (exact_product(dense, gram.solve(x)) - x).norm() / x.norm()
    cholesky = torch.cholesky_solve(x[:, None], torch.linalg.cholesky(dense))[:, 0]
    assert residual <= 2 * (exact_product(dense, cholesky) - x).norm() / x.norm() + EPS * dense.norm() * 1e4
    points = sequence.points(n)
    other = {"shuffled": points[torch.randperm(n)], "halton": Halton(3, seed=5).points(n)}
    if kind == "lattice":
        other["natural order"] = Lattice(3, seed=5, order="natural").points(n)
    else:
        other |= {"rolled": points.roll(1, 0), "nus": DigitalNet(3, seed=5, randomize="nus").points(n)}
    for name, wrong in other.items():
        false = kernel(wrong[:, None], wrong[None]) + 1e-4 * torch.eye(n, dtype=torch.float64)
        assert (false @ gram.solve(x) - x).norm() > 0.1 * x.norm(), name


@pytest.mark.evidence
@pytest.mark.timed
@pytest.mark.parametrize("kind", ["lattice", "net"])
def test_cost_grows_as_n_log_n(kind):
    """Kernel row, product and solve from 2^13 to 2^17 points, 16 times as many; a dense product grows as
    n^2."""

    def fast(n: int) -> Callable[[], object]:
        kernel, sequence = pair(kind)
        x = torch.randn(n, dtype=torch.float64)
        return lambda: Gram(kernel, sequence, n, noise=0.1).solve(x)

    def dense(n: int) -> Callable[[], object]:
        matrix, x = torch.randn(n, n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
        return lambda: matrix @ x

    spent = least_times({n: fast(n) for n in (1 << 13, 1 << 17)})
    assert spent[1 << 17] / spent[1 << 13] < 2.5 * 16 * 17 / 13, spent  # 21 by the formula, 256 for n^2
    spent = least_times({n: dense(n) for n in (1 << 9, 1 << 12)})
    assert spent[1 << 12] / spent[1 << 9] > 2.5 * 8 * 12 / 9, spent  # the bound tells the two apart


# ------------------------------------------------------------------------------------ processes


def smooth(x: Tensor) -> Tensor:
    """Periodic and smooth, of three coordinates."""
    turned = 2 * math.pi * x
    return (turned[..., 0].cos() + 0.5 * turned[..., 1].sin()).exp() * (1 + 0.2 * turned[..., 2].cos())


@pytest.mark.parametrize("kind", ["lattice", "net"])
def test_a_process_is_the_dense_process(kind):
    n = 128
    kernel, sequence = pair(kind)
    gp = FastGP(kernel, sequence, n, noise=1e-3)
    y = smooth(gp.x) + 0.1 * torch.randn(n, dtype=torch.float64)
    gp.fit(y, steps=0)
    full = kernel(gp.x[:, None], gp.x[None]) + gp.noise.detach() * torch.eye(n, dtype=torch.float64)
    inverse = torch.linalg.inv(full)
    mean = (inverse @ y).sum() / inverse.sum()  # the best constant
    scale = (y - mean) @ inverse @ (y - mean) / n
    want = torch.distributions.MultivariateNormal(mean.expand(n), scale * full).log_prob(y)
    assert abs(gp.log_likelihood(y).item() - want.item()) < 1e-9 * abs(want.item())
    new = torch.rand(40, 3, dtype=torch.float64)
    cross = kernel(new[:, None], gp.x[None])
    means, variances = gp.predict(new)
    assert (means - mean - cross @ inverse @ (y - mean)).abs().max() < 1e-9
    own = kernel(new, new) - (cross @ inverse * cross).sum(1)
    assert (variances - scale * own).abs().max() < 1e-9
    value, spread = gp.integral()
    assert abs(value - mean - inverse.sum(0) @ (y - mean)) < 1e-9
    assert abs(spread - scale * (1 - inverse.sum())) < 1e-9


@pytest.mark.evidence
@pytest.mark.timed
@pytest.mark.parametrize("kind", ["lattice", "net"])
def test_a_process_fitted_on_many_points_predicts(kind):
    """4,096 points, 50 steps of likelihood: error and intervals on new points, against values shuffled.

    A lattice's kernel, smooth as the function is, gains from fitting. A net's functions have jumps: it predicts,
    but its likelihood takes noise for jumps (fitted noise 1e-9), so fitting does not help it.
    """
    n = 4096
    kernel, sequence = pair(kind)
    gp = FastGP(kernel, sequence, n)
    y = smooth(gp.x) + 0.05 * torch.randn(n, dtype=torch.float64)
    new = torch.rand(500, 3, dtype=torch.float64)
    unfitted = gp.fit(y, steps=0).predict(new)[0] - smooth(new)
    start = time.perf_counter()
    gp.fit(y)
    took = time.perf_counter() - start
    means, variances = gp.predict(new)
    error = means - smooth(new)
    rmse, first = error.square().mean().sqrt(), unfitted.square().mean().sqrt()
    assert rmse < 0.1 * smooth(new).std()
    assert kind == "net" or (rmse < 0.5 * first and rmse < 0.5 * 0.05)  # of the noise of a single value
    inside = (error.abs() < 1.96 * variances.sqrt()).double().mean()
    assert inside > 0.85
    lost = FastGP(kernel, sequence, n).fit(y[torch.randperm(n)]).predict(new)[0] - smooth(new)
    assert lost.square().mean().sqrt() > 0.5 * smooth(new).std()
    # One dense Cholesky factor of half the points takes longer than a step.
    half = Gram(kernel, sequence, n // 2, noise=1e-3).dense()
    assert least_times({"dense": lambda: torch.linalg.cholesky(half)}, 2)["dense"] > took / 50


# ------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: ShiftInvariant(2, 0), ValueError, "smoothness must be at least 1, got 0"),
        (lambda: ShiftInvariant(2, -1), ValueError, "smoothness must be at least 1"),
        (lambda: ShiftInvariant(2, 17), ValueError, "at most 16"),
        (lambda: ShiftInvariant(2, [1.5, 2]), TypeError, "smoothness must be a whole number"),
        (lambda: ShiftInvariant(2, [1, 2, 3]), ValueError, "one number or 2, got 3"),
        (lambda: DigitallyShiftInvariant(2, 5), ValueError, "1 to 4"),
        (lambda: ShiftInvariant(2, weights=[1.0]), ValueError, "weights must be one number or 2"),
        (lambda: ShiftInvariant(2, weights=[1.0, 0.0]), ValueError, "must be positive"),
        (lambda: ShiftInvariant(2, scale=0.0), ValueError, "must be positive"),
        (lambda: ShiftInvariant(2)(torch.ones(4, 2), torch.zeros(2)), ValueError, r"x must lie in \[0, 1\)"),
        (lambda: DigitallyShiftInvariant(2)(torch.zeros(2), -torch.ones(2)), ValueError, r"y must lie in"),
        (lambda: ShiftInvariant(2)(torch.zeros(3), torch.zeros(2)), ValueError, r"x must be \[..., 2\]"),
        (lambda: ShiftInvariant(2)(torch.zeros(2).long(), torch.zeros(2)), TypeError, "floating-point"),
        (lambda: Gram(*pair("net"), 48), ValueError, "power of two, got 48; the nearest are 32 and 64"),
        (lambda: Gram(*pair("net"), 0), ValueError, "n must be at least 1"),
        (lambda: Gram(pair("net")[0], pair("lattice")[1], 8), TypeError, "ShiftInvariant with Lattice"),
        (lambda: Gram(pair("net")[0], Halton(3), 8), TypeError, "with Halton"),
        (lambda: Gram(pair("net")[0], DigitalNet(2), 8), ValueError, "dimension 3, got 2"),
        (lambda: Gram(*pair("net", randomize="nus"), 8), ValueError, "no group"),
        (lambda: Gram(*pair("lattice", order="gray"), 8), ValueError, 'got "gray"'),
        (lambda: Gram(*pair("net"), 8, noise=-1.0), ValueError, "noise must be one number >= 0"),
        (lambda: Gram(*pair("net"), 8).matmul(torch.ones(9)), ValueError, r"\[..., 8\]"),
        (lambda: Gram(*pair("lattice", 4), 4096).solve(torch.ones(4096)), ValueError, "singular to float64"),
        (lambda: FastGP(*pair("net", replications=2), 8), ValueError, "no replications"),
        (lambda: FastGP(*pair("net"), 8, noise=0.0), ValueError, "noise must be at least"),
        (lambda: FastGP(*pair("net"), 8).predict(torch.zeros(1, 3)), ValueError, r"call fit\(y\) first"),
        (lambda: FastGP(*pair("net"), 8).fit(torch.zeros(9)), ValueError, "y must be 8"),
        (
            lambda: FastGP(*pair("net"), 8).fit(torch.rand(8)).predict(torch.ones(1, 3)),
            ValueError,
            "must lie in",
        ),
    ],
)
def test_wrong_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_itertools_of_smoothness():
    """Different smoothness in each coordinate is the product of the single kernels, in every order."""
    for each in itertools.permutations([1, 2, 3]):
        kernel = DigitallyShiftInvariant(3, each)
        x, y = torch.rand(2, 7, 3, dtype=torch.float64)
        single = [DigitallyShiftInvariant(1, a)(x[:, [j]], y[:, [j]]) for j, a in enumerate(each)]
        assert (kernel(x, y) - math.prod(single)).abs().max() < 1e-12
