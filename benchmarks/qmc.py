"""Quasi-Monte Carlo side by side: points against SciPy, QMCPy and PyTorch, fast Gram solves against QMCPy's
and a dense Cholesky factor.

    python benchmarks/qmc.py [--quick] [points scrambled solve growth fit]

Everything is float64. Points are made from the construction of the sequence on, with a seed, as a user
would; a rate is million coordinates a second. Solves start from points on QMCPy's side and from nothing on
ours, and end with the solution. Packages that are not there are said and left out.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import sys
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType

import harness
import torch

from tilewise.transforms.qmc import (
    DigitallyShiftInvariant,
    DigitalNet,
    FastGP,
    Gram,
    Halton,
    Lattice,
    ShiftInvariant,
)

Contenders = dict[str, Callable[[], object]]
DIM, NOISE = 32, 1e-3
SEEDS = itertools.count(1)  # a new one for every call: nothing can be kept from the last


def package(name: str) -> ModuleType | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: not raced ({error})", flush=True)
        return None


def race(setting: str, own: Contenders, others: Contenders, numbers: int, rounds: int) -> list[harness.Row]:
    """One race against each other package, which is the first of it; alone where there is none."""
    rows = []
    for name, run in others.items() or [("", None)]:
        contenders = own if run is None else {name: run, **own}
        given = dict.fromkeys(contenders, 1e9 * numbers / 1e6)
        rows += harness.race(setting, contenders, given, rounds, unit="M/s")
    return rows


def of_scipy(kind: str, dim: int, n: int, **given: object) -> Contenders:
    found = package("scipy.stats.qmc")
    return (
        {}
        if found is None
        else {"scipy": lambda: getattr(found, kind)(dim, rng=next(SEEDS), **given).random(n)}
    )


def of_qmcpy(kind: str, dim: int, n: int, **given: object) -> Contenders:
    found = package("qmcpy")
    if found is None:
        return {}
    make = getattr(found, kind)

    def run() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(dim, seed=next(SEEDS), **given)(n)

    return {"qmcpy": run}


def own(kind: type, dim: int, n: int, **given: object) -> Contenders:
    return {"tilewise": lambda: kind(dim, seed=next(SEEDS), **given).points(n)}


def points(quick: bool) -> list[harness.Row]:
    n, rounds = 1 << (16 if quick else 20), 3 if quick else 5
    size = n * DIM
    engine: Contenders = {
        "torch SobolEngine": lambda: torch.quasirandom.SobolEngine(DIM, scramble=True, seed=next(SEEDS)).draw(
            n, dtype=torch.float64
        )
    }
    net = of_scipy("Sobol", DIM, n) | of_qmcpy("DigitalNetB2", DIM, n, randomize="LMS_DS") | engine
    rows = race(f"net, LMS and shift, {n:,} x {DIM}", own(DigitalNet, DIM, n), net, size, rounds)
    lattice = of_qmcpy("Lattice", DIM, n, randomize="SHIFT")
    rows += race(f"lattice, shift, {n:,} x {DIM}", own(Lattice, DIM, n), lattice, size, rounds)
    few = n >> 4
    halton = of_scipy("Halton", DIM, few) | of_qmcpy("Halton", DIM, few, randomize="PERM")
    rows += race(f"halton, permutations, {few:,} x {DIM}", own(Halton, DIM, few), halton, few * DIM, rounds)
    return rows


def scrambled(quick: bool) -> list[harness.Row]:
    n, rounds = 1 << (10 if quick else 14), 3
    size, dim = n * 8, 8
    rows = []
    for name, ours, theirs in (
        ("net, NUS", {"randomize": "nus"}, {"randomize": "NUS"}),
        ("order 2 net, LMS", {"interlace": 2}, {"randomize": "LMS_DS", "alpha": 2, "t": 52}),
        ("order 2 net, NUS", {"interlace": 2, "randomize": "nus"}, {"randomize": "NUS", "alpha": 2}),
    ):
        peer = of_qmcpy("DigitalNetB2", dim, n, **theirs)
        rows += race(f"{name}, {n:,} x {dim}", own(DigitalNet, dim, n, **ours), peer, size, rounds)
    for name, ours, theirs in (("LMS", "lms", "LMS_DS"), ("NUS", "nus", "NUS")):
        peer = of_qmcpy("Halton", dim, n, randomize=theirs)
        given = own(Halton, dim, n, randomize=ours)
        rows += race(f"halton, {name}, {n:,} x {dim}", given, peer, size, rounds)
    many = 1 << (12 if quick else 18)
    rows += race(
        f"net, NUS, {many:,} x {DIM}", own(DigitalNet, DIM, many, randomize="nus"), {}, many * DIM, rounds
    )
    return rows


def fast(kind: str, n: int, dim: int, y: torch.Tensor) -> torch.Tensor:
    weights = [1 / j**2 for j in range(1, dim + 1)]
    if kind == "SI":
        return Gram(ShiftInvariant(dim, 2, weights), Lattice(dim, seed=7), n, noise=NOISE).solve(y)
    return Gram(DigitallyShiftInvariant(dim, 2, weights), DigitalNet(dim, seed=7), n, noise=NOISE).solve(y)


def of_qmcpy_solve(kind: str, n: int, dim: int, y: torch.Tensor) -> Contenders:
    """As QMCPy's own examples do it: a row of the kernel, its transform, and the vector's."""
    found = package("qmcpy")
    if found is None:
        return {}
    weights = [1 / j**2 for j in range(1, dim + 1)]
    if kind == "SI":
        x = found.Lattice(dim, seed=7)(n)
        kernel = found.KernelShiftInvar(d=dim, alpha=2, lengthscales=weights)
        there, back = found.fftbr, found.ifftbr
    else:
        net = found.DigitalNetB2(dim, seed=7)
        x = net(n, return_binary=True)
        kernel = found.KernelDigShiftInvar(d=dim, t=net.t, alpha=2, lengthscales=weights)
        there = back = found.fwht
    values = y.numpy()

    def run() -> object:
        eigenvalues = math.sqrt(n) * there(kernel(x, x[0])) + NOISE
        return back(there(values) / eigenvalues)

    return {"qmcpy": run}


def solve(quick: bool) -> list[harness.Row]:
    n, dim, rounds = 1 << (12 if quick else 16), 4, 5
    y = torch.randn(n, dtype=torch.float64)
    rows = []
    for kind in ("SI", "DSI"):
        ours: Contenders = {"tilewise": partial(fast, kind, n, dim, y)}
        rows += race(f"{kind} solve, n={n:,}, d={dim}", ours, of_qmcpy_solve(kind, n, dim, y), n, rounds)
    most = 1 << (10 if quick else 13)
    few = y[:most].contiguous()
    for kind in ("SI", "DSI"):
        weights = [1 / j**2 for j in range(1, dim + 1)]
        family = ShiftInvariant if kind == "SI" else DigitallyShiftInvariant
        sequence = Lattice(dim, seed=7) if kind == "SI" else DigitalNet(dim, seed=7)
        matrix = Gram(family(dim, 2, weights), sequence, most, noise=NOISE).dense()
        dense: Contenders = {
            "dense cholesky": lambda matrix=matrix: torch.cholesky_solve(
                few[:, None], torch.linalg.cholesky(matrix)
            ),
            "tilewise": partial(fast, kind, most, dim, few),
        }
        rows += harness.race(f"{kind} solve, n={most:,}, d={dim}", dense, {}, 2)
    return rows


def growth(quick: bool) -> list[harness.Row]:
    """One setting for each kernel: every n is a contender, its rate n log2 n a second."""
    rows = []
    for kind in ("SI", "DSI"):
        contenders: Contenders = {}
        rates = {}
        for m in range(10, 16 if quick else 21, 2):
            n = 1 << m
            contenders[f"n=2^{m}"] = partial(fast, kind, n, 4, torch.randn(n, dtype=torch.float64))
            rates[f"n=2^{m}"] = 1e9 * n * m / 1e6
        rows += harness.race(f"{kind} solve, million n log n a second", contenders, rates, 5, unit="M/s")
    return rows


def fit(quick: bool) -> list[harness.Row]:
    """A whole fit, 20 steps of L-BFGS."""
    n = 1 << (10 if quick else 14)

    def run(kind: str) -> object:
        if kind == "SI":
            gp = FastGP(ShiftInvariant(4), Lattice(4, seed=7), n)
        else:
            gp = FastGP(DigitallyShiftInvariant(4), DigitalNet(4, seed=7), n)
        return gp.fit(gp.x.prod(-1).sin(), steps=20)

    return harness.race(
        f"process fitted, n={n:,}, d=4", {kind: partial(run, kind) for kind in ("SI", "DSI")}, {}, 3
    )


SECTIONS = {"points": points, "scrambled": scrambled, "solve": solve, "growth": growth, "fit": fit}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few points; nothing is kept")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}")
    options = parser.parse_args()
    chosen = options.sections or list(SECTIONS)
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    tests = (
        "tests/transforms/test_qmc_points.py",
        "tests/transforms/test_qmc_kernels.py",
        "-m",
        "not evidence",
    )
    if not options.quick and not harness.tests_pass(*tests):
        print("the tests of points and kernels fail: no figures")
        return 1
    rows = [row for name in chosen for row in SECTIONS[name](options.quick)]
    if not options.quick and chosen == list(SECTIONS):
        harness.save("qmc", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
