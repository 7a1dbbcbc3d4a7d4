"""Integration: how errors fall with n, estimates of them, and adaptive cubature to a tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tilewise.transforms.qmc import DigitalNet, Halton, Lattice, Normal, PointSequence, Uniform, integrate
from tilewise.transforms.qmc.cubature import _Coefficients, _falling
from tilewise.transforms.qmc.measures import sine, tent
from tilewise.transforms.qmc.student import two_sided_t


def product(x: Tensor) -> Tensor:
    """Smooth, of integral 1: a product over coordinates that matter less and less."""
    c = 1.0 / torch.arange(1, x.shape[-1] + 1, dtype=x.dtype) ** 2
    return (1 + c * (x.exp() - (math.e - 1))).prod(-1)


def periodic(x: Tensor) -> Tensor:
    """The same of a periodic function."""
    c = 1.0 / torch.arange(1, x.shape[-1] + 1, dtype=x.dtype) ** 2
    return (1 + c * torch.sin(2 * math.pi * x) * torch.cos(2 * math.pi * x).exp()).prod(-1)


def peak(x: Tensor) -> Tensor:
    """Genz's product peak, integral known."""
    return (1 / (1 / 9 + (x - 0.4) ** 2)).prod(-1)


PEAK = 3 * (math.atan(3 * 0.6) + math.atan(3 * 0.4))  # of one coordinate


def keister(x: Tensor) -> Tensor:
    """Of x normal with variance 1/2: Keister's physical integrand."""
    return math.pi ** (x.shape[-1] / 2) * x.square().sum(-1).sqrt().cos()


def keister_integral(dim: int) -> float:
    """By the radius alone, r^(d-1) cos(r) e^(-r^2) on a fine grid (the trapezoid rule, exact to rounding
    here)."""
    r = torch.linspace(0, 12, 200_001, dtype=torch.float64)
    inner = torch.trapezoid(r ** (dim - 1) * r.cos() * (-(r**2)).exp(), r).item()
    return 2 * math.pi ** (dim / 2) / math.gamma(dim / 2) * inner


# ------------------------------------------------------------------------------------ convergence

EXPONENTS = range(6, 14)


def rate(points: Callable[[int], Tensor], f: Callable[[Tensor], Tensor], exact: float) -> float:
    """The slope of log2 of the root mean square error over replications against log2 of n."""
    errors = [(f(points(1 << m)).mean(-1) - exact).square().mean().sqrt().log2() for m in EXPONENTS]
    given = torch.tensor([[1.0, m] for m in EXPONENTS], dtype=torch.float64)
    return torch.linalg.lstsq(given, torch.stack(errors)[:, None]).solution[1, 0].item()


@pytest.mark.evidence
@pytest.mark.parametrize(
    ("name", "dim", "at_most"),
    [
        ("lattice", 3, -0.9),
        ("net lms", 3, -1.2),
        ("net nus", 3, -1.35),
        ("net digital-shift", 3, -0.9),
        ("halton permutations", 3, -0.9),
        ("halton lms", 3, -0.9),
        ("order 2 lms", 2, -2.0),
        ("order 2 nus", 2, -2.0),
        ("order 2 nus", 1, -2.3),
        ("order 3 nus", 1, -3.1),
    ],
)
def test_errors_fall_faster_than_those_of_random_points(name, dim, at_most):
    """64 to 8,192 points, 32 replications. Scrambling gains half an order (Owen, 1997), interlacing one each."""
    kind, how = name.rpartition(" ")[::2] if " " in name else (name, "shift")
    given = {"randomize": how, "replications": 32, "seed": 1}
    sequence: PointSequence
    f = product
    if kind == "lattice":
        sequence = Lattice(dim, **given)
    elif kind == "halton":
        sequence = Halton(dim, **given)
    else:
        sequence = DigitalNet(dim, interlace=int(kind[-1]) if "order" in kind else 1, **given)
    assert rate(sequence.points, f, 1.0) <= at_most
    plain = rate(lambda n: torch.rand(32, n, dim, dtype=torch.float64), f, 1.0)
    assert -0.65 < plain < -0.35  # random points, which the bounds above would not let pass


@pytest.mark.evidence
def test_lattices_gain_from_periodic_functions():
    """Smooth and periodic, or made so: more than one order; the same function left as it is: one."""
    lattice = Lattice(3, replications=32, seed=1)
    assert rate(lattice.points, periodic, 1.0) < -3

    def folded(how: Callable) -> Callable[[Tensor], Tensor]:
        def f(u: Tensor) -> Tensor:
            x, weight = how(u)
            return product(x) * weight

        return f

    assert rate(lattice.points, folded(tent), 1.0) < -1.6
    assert rate(lattice.points, folded(sine), 1.0) < -2.5
    assert rate(lattice.points, product, 1.0) > -1.2


@pytest.mark.evidence
def test_the_default_lattice_is_better_than_one_of_random_numbers():
    """Its vector's worst-case error in 16 dimensions at every size, against the median of random odd
    vectors."""
    dim = 16
    gamma = 1.0 / torch.arange(1, dim + 1).double() ** 2

    def worst_case(vector: Tensor, n: int) -> float:
        x = torch.arange(n)[:, None] * vector % n / n
        omega = 2 * math.pi**2 * (x.double() ** 2 - x + 1 / 6)
        return math.sqrt((1 + gamma * omega).prod(1).mean().item() - 1)

    own = Lattice(dim).vector
    for m in (8, 12, 16):
        n = 1 << m
        random = sorted(worst_case(2 * torch.randint(n // 2, (dim,)) + 1, n) for _ in range(11))
        assert worst_case(own, n) < 0.8 * random[5]


# ------------------------------------------------------------------------------------ to a tolerance

SEQUENCES = {
    "lattice": lambda dim, **given: Lattice(dim, **given),
    "net": lambda dim, **given: DigitalNet(dim, **given),
}


@pytest.mark.evidence
@pytest.mark.parametrize("kind", ["lattice", "net", "replications"])
def test_true_errors_stay_within_the_tolerance(kind):
    """300 integrals: three integrands, 100 seeds. At least 95 % are within the tolerance, at fewer points
    than random ones would need; with the tolerance ignored, a fixed 256 points, most are not."""
    settings = [
        (product, 1.0, {"tolerance": 1e-4}, 4, None),
        (peak, PEAK**3, {"tolerance": 0.0, "relative": 2e-4}, 3, None),
        (keister, keister_integral(3), {"tolerance": 2e-3}, 3, Normal(0.0, 0.5)),
    ]
    within, fixed, runs = 0, 0, 0
    for f, exact, given, dim, measure in settings:
        allowed = max(given["tolerance"], given.get("relative", 0.0) * abs(exact))
        used = []
        for seed in range(100):
            if kind == "replications":
                sequence: PointSequence = DigitalNet(dim, seed=seed, replications=16)
            else:
                sequence = SEQUENCES[kind](dim, seed=seed)
            fold = "tent" if kind == "lattice" else None
            found = integrate(f, sequence, measure=measure, periodize=fold, **given)
            assert found.converged
            within += abs(found.value - exact) <= allowed
            used.append(found.n)
            few = integrate(f, SEQUENCES["net"](dim, seed=seed), measure=measure, first=64, most=64, **given)
            fixed += abs(few.value - exact) <= allowed
            runs += 1
        # Random points: 2.58 standard deviations of their mean, at 99 %.
        u = torch.rand(1 << 16, dim, dtype=torch.float64)
        spread = f(u if measure is None else measure(u)).std().item()
        assert sum(used) / len(used) < 0.25 * (2.58 * spread / allowed) ** 2
    assert within >= 0.95 * runs
    assert fixed < 0.6 * runs


@pytest.mark.evidence
def test_an_integrand_outside_the_cone_is_told():
    """A frequency that the first points cannot see, and then do."""
    hidden = integrate(
        lambda x: product(x) + 0.5 * torch.cos(2 * math.pi * 512 * x[..., 0]) * (x[..., 1] > 0.3),
        DigitalNet(2, seed=4),
        tolerance=1e-7,
        first=256,
        most=1 << 14,
    )
    assert not hidden.in_cone
    assert integrate(product, DigitalNet(2, seed=4), tolerance=1e-7, most=1 << 18).in_cone


def test_coefficients_fall_in_the_order_found():
    torch.manual_seed(3)
    spectrum = torch.rand(256, dtype=torch.float64)
    order = _falling(spectrum)
    assert order.sort().values.tolist() == list(range(256)) and order[0] == 0
    for octave in range(1, 8):  # every coefficient of the lower half is at least its partner
        low, high = order[1 : 1 << octave], order[(1 << octave) + 1 : 2 << octave]
        assert (spectrum[low] >= spectrum[high]).all()
        # Partners are aliases: on 2^octave points nobody can tell them apart.
        assert (low % (1 << octave)).sort().values.tolist() == list(range(1, 1 << octave))


def test_no_point_is_evaluated_twice():
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(len(x))
        return peak(x)

    found = integrate(f, DigitalNet(3, seed=1), tolerance=1e-3)
    assert sum(seen) == found.n and seen[0] == 256 and seen[1:] == [256 << k for k in range(len(seen) - 1)]


def test_what_did_not_converge_says_so():
    found = integrate(peak, DigitalNet(3, seed=1), tolerance=1e-12, most=1024)
    assert not found.converged and found.n == 1024 and found.error > 1e-12
    many = integrate(peak, Halton(3, seed=1, replications=8), tolerance=1e-12, most=1024)
    assert not many.converged and many.n == 8 * 1024


@pytest.mark.parametrize(
    ("confidence", "freedom", "want"),
    [(0.95, 1, 12.7062), (0.95, 2, 4.30265), (0.99, 15, 2.94671), (0.99, 31, 2.74404), (0.9, 10, 1.81246)],
)
def test_student_quantiles(confidence, freedom, want):
    assert abs(two_sided_t(confidence, freedom) - want) < 1e-5 * want


# --------------------------------------------------------------------------- measures


def test_normal_variables_have_their_moments():
    covariance = torch.tensor([[1.0, 0.6, 0.2], [0.6, 2.0, 0.3], [0.2, 0.3, 0.5]], dtype=torch.float64)
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for by in ("pca", "cholesky"):
        x = Normal(mean, covariance, by=by)(DigitalNet(3, seed=2).points(1 << 15))
        assert (x.mean(0) - mean).abs().max() < 1e-3
        assert (x.T.cov() - covariance).abs().max() < 2e-3
    first = Normal(mean, covariance).factor.square().sum(0)
    assert (first[:-1] >= first[1:]).all()  # the largest variance on the first coordinate
    ends = Normal()(torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64))
    assert ends.isfinite().all() and abs(ends.sum()) < 1e-9


def test_a_box():
    x = Uniform([-1.0, 2.0], [1.0, 5.0])(torch.tensor([[0.0, 0.0], [0.5, 0.5]]))
    assert torch.equal(x, torch.tensor([[-1.0, 2.0], [0.0, 3.5]]))
    found = integrate(
        lambda x: x[..., 1] ** 2, DigitalNet(2, seed=1), measure=Uniform(0.0, 3.0), tolerance=1e-5
    )
    assert abs(found.value - 3) < 1e-5


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: integrate(product, DigitalNet(2), tolerance=-1.0), ValueError, "tolerance must be >= 0"),
        (lambda: integrate(product, DigitalNet(2), tolerance=0.0), ValueError, "not both 0"),
        (lambda: integrate(product, DigitalNet(2), relative=1.0), ValueError, r"relative in \[0, 1\)"),
        (lambda: integrate(product, DigitalNet(2), first=100), ValueError, "nearest are 64 and 128"),
        (lambda: integrate(product, DigitalNet(2), most=128), ValueError, "most must be at least first=256"),
        (lambda: integrate(product, DigitalNet(2), first=16), ValueError, "first must be at least 32"),
        (
            lambda: integrate(product, DigitalNet(2), periodize="baker"),
            ValueError,
            "periodize must be None or one",
        ),
        (lambda: integrate(product, Halton(2)), ValueError, "sequence must have replications"),
        (lambda: integrate(product, DigitalNet(2, randomize="nus")), ValueError, "must have replications"),
        (lambda: integrate(product, DigitalNet(2, order="gray")), ValueError, "must have replications"),
        (lambda: integrate(lambda x: x, DigitalNet(2)), ValueError, r"f must give a tensor \(256,\)"),
        (lambda: integrate(lambda x: 1.0, DigitalNet(2)), ValueError, "got float"),
        (lambda: integrate(lambda x: x[..., 0].log(), DigitalNet(2, randomize=None)), ValueError, "finite"),
        (
            lambda: integrate(product, DigitalNet(2, replications=4), confidence=1.0),
            ValueError,
            "confidence must lie between",
        ),
        (lambda: Uniform(1.0, 0.0), ValueError, "low must lie below high"),
        (lambda: Uniform(0.0, 1.0)(torch.tensor([1.0])), ValueError, r"points must lie in \[0, 1\)"),
        (lambda: Normal()(torch.tensor([-0.1])), ValueError, r"points must lie in \[0, 1\)"),
        (lambda: Normal(0.0, -1.0), ValueError, "covariance must be positive"),
        (lambda: Normal(0.0, [[1.0, 2.0], [2.0, 1.0]]), ValueError, "positive definite"),
        (lambda: Normal(0.0, [[1.0, 2.0], [0.0, 1.0]]), ValueError, "symmetric"),
        (lambda: Normal(by="svd"), ValueError, 'by must be "pca" or "cholesky"'),
    ],
)
def test_wrong_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_the_bound_is_kept_for_a_constant():
    bound = _Coefficients(DigitalNet(2), 8)
    assert bound.add(torch.full((256,), 2.0, dtype=torch.float64)) == (2.0, pytest.approx(0.0, abs=1e-15))
