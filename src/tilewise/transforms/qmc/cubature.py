"""Integrals to a tolerance: points are doubled until an estimate of the error is small enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.transforms.qmc.gram import Basis
from tilewise.transforms.qmc.lattice import Lattice
from tilewise.transforms.qmc.measures import PERIODIZERS
from tilewise.transforms.qmc.nets import DigitalNet
from tilewise.transforms.qmc.sequence import PointSequence, power_of_two
from tilewise.transforms.qmc.student import two_sided_t

LAG = 4  # the error is read from coefficients this many octaves below the highest


@dataclass(frozen=True)
class Estimate:
    """An integral: `value`, a bound on its `error`, `n` evaluations, and whether the tolerance was met.

    `in_cone` is False where coefficients were seen that contradict what the bound assumes. It is then no
    guarantee any more, though often still right: sums that fall slowly, as of Keister's integrand, do it.
    """

    value: float
    error: float
    n: int
    converged: bool
    in_cone: bool = True


def integrate(
    f: Callable[[Tensor], Tensor],
    sequence: PointSequence,
    *,
    tolerance: float = 1e-3,
    relative: float = 0.0,
    measure: Callable[[Tensor], Tensor] | None = None,
    periodize: str | None = None,
    confidence: float = 0.99,
    first: int = 256,
    most: int = 1 << 20,
) -> Estimate:
    """The mean of f over the unit cube, or of a variable made from it, to a tolerance.

    The number of points is doubled from `first` on, and none is evaluated twice, until the error is
    estimated to be at most `max(tolerance, relative |value|)`. Two estimates:

    - a sequence with replications (2 and more): every replication gives an unbiased value, and the error is
    the
      half-width of Student's interval of their mean at `confidence` (any sequence that is randomised);
    - a `Lattice` or `DigitalNet` without replications: the Fourier or Walsh coefficients that n points give
    are put in an
      order in which they fall, and those 16 times below the highest bound what is left out (Hickernell and
      Jimenez Rugama, 2016). The bound holds for all integrands whose coefficients fall steadily, in a cone
      of functions, and `in_cone` tells where they were seen not to. A fifth of the evaluations of the
      other, or fewer.

    Args:
        f: takes points `[..., n, dim]` and gives `[..., n]`.
        sequence: the points; for coefficients of order "bit-reversed" (lattices) or "natural" (nets), not
            scrambled by "nus".
        tolerance: absolute, >= 0.
        relative: to the integral's absolute value, 0 to less than 1; one of the two must be above 0.
        measure: `Uniform`, `Normal` or any function from the cube's points to those of f. None: the cube
            itself.
        periodize: "tent" or "sine" make a smooth f periodic, which lattices want; None leaves it.
        confidence: of the interval, with replications.
        first, most: numbers of points, powers of two; `most` of one replication.

    Returns:
        An `Estimate`; where `most` points did not do, it says so in `converged`.

    Raises:
        ValueError, TypeError: arguments that do not fit, values of f that are not finite or not of the
            points' shape.

    After CubQMCRepStudentT, CubQMCLatticeG and CubQMCNetG of QMCPy (Sorokin, 2025, arXiv 2502.14256).
    """
    _check(tolerance, relative, periodize)
    m, last = power_of_two("first", first), power_of_two("most", most)
    if last < m:
        raise ValueError(f"most must be at least first={first}, got {most}")
    many = sequence.replications is not None and sequence.replications > 1
    bound: _Replications | _Coefficients
    if many:
        bound = _Replications(sequence, confidence)
    else:
        bound = _Coefficients(sequence, m)
    made = 0
    while True:
        values = _values(f, sequence[made : 1 << m], measure, periodize)
        made = 1 << m
        value, error = bound.add(values)
        low, high = value - error, value + error
        allowed = [max(tolerance, relative * abs(end)) for end in (low, high)]
        done = high - low <= sum(allowed)
        if done or m == last:
            # Where the tolerance depends on the value, the middle of what it allows rather than of the
            # interval.
            middle = 0.5 * (low + high + allowed[0] - allowed[1])
            return Estimate(middle, error, made * sequence.copies, done, bound.in_cone)
        m += 1


class _Replications:
    """Student's interval of the means of replications."""

    in_cone = True

    def __init__(self, sequence: PointSequence, confidence: float) -> None:
        self.copies = sequence.copies
        self.factor = two_sided_t(confidence, self.copies - 1) / math.sqrt(self.copies)
        self.sums, self.n = torch.zeros(self.copies, dtype=torch.float64, device=sequence.device), 0

    def add(self, values: Tensor) -> tuple[float, float]:
        """Value and error with more values, `[copies, n]`."""
        self.sums, self.n = self.sums + values.sum(-1), self.n + values.shape[-1]
        means = self.sums / self.n
        return means.mean().item(), self.factor * means.std().item()


class _Coefficients:
    """The bound from coefficients, with the inflation 5 / 2^m of the published algorithms."""

    def __init__(self, sequence: PointSequence, m: int) -> None:
        orders = {Lattice: "bit-reversed", DigitalNet: "natural"}
        fits = isinstance(sequence, (Lattice, DigitalNet)) and sequence.randomize != "nus"
        if not fits or sequence.order != orders[type(sequence)]:  # type: ignore[attr-defined]
            raise ValueError(
                'sequence must have replications, or be a Lattice of order "bit-reversed" or a DigitalNet of order'
                f' "natural" not scrambled by "nus", got {sequence!r}'
            )
        if m <= LAG:
            raise ValueError(f"first must be at least {2 << LAG} without replications, got {1 << m}")
        self.basis, self.least = Basis(sequence), m - LAG  # type: ignore[arg-type]
        self.values = torch.zeros(0, dtype=torch.float64, device=sequence.device)
        self.order: Tensor | None = None
        self.bounds: dict[int, tuple[float, float]] = {}
        self.in_cone = True

    def add(self, values: Tensor) -> tuple[float, float]:
        """Value and error with more values, `[n]`."""
        self.values = torch.cat((self.values, values.flatten()))
        n = len(self.values)
        m = n.bit_length() - 1
        spectrum = self.basis.forward(self.values).abs() / math.sqrt(n)
        if not self.basis.digital:
            spectrum = torch.cat((spectrum, spectrum[1 : (n + 1) // 2].flip(0)))
        self.order = _falling(spectrum, self.order)
        falling = spectrum[self.order]
        self._check_cone(falling, m)
        low = 1 << m - LAG - 1
        return self.values.mean().item(), 5 * 2.0**-m * falling[low : 2 * low].sum().item()

    def _check_cone(self, falling: Tensor, m: int) -> None:
        """What sums of coefficients say of the true ones, now and before, must be possible at once."""
        for octave in range(self.least, m + 1):
            total = falling[1 << octave - 1 : 1 << octave].sum().item()
            share = 5 * 2.0 ** -(m - octave) / ((1 + 5 * 2.0**-LAG) * 2.0**-LAG) * 2.0 ** -(m - octave)
            low, high = self.bounds.get(octave, (0.0, math.inf))
            low = max(low, total / (1 + share))
            high = min(high, total / (1 - share)) if share < 1 else high
            self.bounds[octave] = low, high
            self.in_cone &= low <= high


def _falling(spectrum: Tensor, before: Tensor | None = None) -> Tensor:
    """An order of n = 2^m coefficients in which they tend to fall, and that keeps aliases apart.

    Coefficients k and k + 2^l look alike on 2^l points. From the highest l down, the larger of each two
    takes the place of the lower number, and all that alias with them on more points are exchanged as they
    are. With an order found at half as many points, `before`, only the LAG highest l are gone through: what
    comes first stays, so that sums of it can be compared.
    """
    n = len(spectrum)
    if before is None:
        order, least = torch.arange(n, device=spectrum.device), 1
    else:
        order, least = torch.cat((before, before + n // 2)), n >> LAG + 1
    half = n // 2
    while half > least:
        pairs = order.view(-1, 2, half)
        swap = spectrum[pairs[0, 1]] > spectrum[pairs[0, 0]]
        swap[0] = False  # the mean stays
        order = torch.where(swap, pairs.flip(1), pairs).flatten()
        half //= 2
    return order


def _values(
    f: Callable[[Tensor], Tensor],
    u: Tensor,
    measure: Callable[[Tensor], Tensor] | None,
    periodize: str | None,
) -> Tensor:
    """f at the points of the cube, weighted, float64."""
    weight: Tensor | float = 1.0
    if periodize is not None:
        u, weight = PERIODIZERS[periodize](u)
    found = f(u if measure is None else measure(u))
    if not isinstance(found, Tensor) or found.shape != u.shape[:-1]:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"f must give a tensor {tuple(u.shape[:-1])} for points {tuple(u.shape)}, got {shape}"
        )
    found = found.double() * weight
    if not found.isfinite().all():
        raise ValueError("f must be finite at all points, got NaN or infinity")
    return found


def _check(tolerance: float, relative: float, periodize: str | None) -> None:
    if not tolerance >= 0 or not 0 <= relative < 1 or tolerance == relative == 0:
        raise ValueError(
            f"tolerance must be >= 0 and relative in [0, 1), not both 0, got {tolerance} and {relative}"
        )
    if periodize is not None and periodize not in PERIODIZERS:
        raise ValueError(f"periodize must be None or one of {sorted(PERIODIZERS)}, got {periodize!r}")
