"""Fast transforms side by side: against products of Kronecker factors, real FFTs, and other packages.

    python benchmarks/transforms.py [--quick] [fwht blocks sparse]

Plain PyTorch's best Walsh-Hadamard transform here is a product with each of three Kronecker factors; a real
FFT of the same size computes something else and says what such a transform may cost. qmcpy is raced where it
is installed. Rates count n log2(n) additions, whatever a contender does.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import torch
from torch import Tensor

from tilewise.transforms import fwht, hadamard, sparse_fwht


def kronecker(x: Tensor, factors: list[Tensor]) -> Tensor:
    """The transform of rows as one matrix product for each factor, in PyTorch alone."""
    shape = x.shape
    after = 1
    for factor in reversed(factors):
        n = len(factor)
        x = x.reshape(-1, n) @ factor if after == 1 else factor @ x.reshape(-1, n, after)
        after *= n
    return x.view(shape)


def three_factors(n: int) -> list[Tensor]:
    """Orthonormal matrices of three powers of two, as equal as can be, whose product is n."""
    levels = n.bit_length() - 1
    return [hadamard(1 << (levels + i) // 3) for i in range(3)]


def qmcpy_fwht() -> Callable[[Any], Any] | None:
    """That package's transform of the last axis of NumPy arrays, where it is installed."""
    try:
        return importlib.import_module("qmcpy").fwht
    except (ImportError, AttributeError) as error:
        print(f"qmcpy: not raced ({type(error).__name__}: {error})", flush=True)
        return None


def walsh(sizes: list[int], batch: int = 64) -> list[harness.Row]:
    rows, other = [], qmcpy_fwht()
    for n in sizes:
        torch.manual_seed(0)
        x = torch.randn(batch, n)
        factors = three_factors(n)
        want = fwht(x)
        torch.testing.assert_close(kronecker(x, factors), want, rtol=1e-3, atol=1e-4)
        contenders: dict[str, Callable[[], object]] = {
            "three Kronecker factors": partial(kronecker, x, factors),
            "torch.fft.rfft": partial(torch.fft.rfft, x),
            "torch": partial(fwht, x, engine="torch"),
            "native": partial(fwht, x, engine="native"),
        }
        if other is not None:
            array = x.numpy()
            torch.testing.assert_close(torch.from_numpy(other(array)).float(), want, rtol=1e-3, atol=1e-4)
            contenders["qmcpy"] = partial(other, array)
        repeat = max(1, (1 << 18) // (batch * n))  # so that a round is longer than the clock's grain
        contenders = {name: repeated(run, repeat) for name, run in contenders.items()}
        work = repeat * batch * n * math.log2(n)
        title = f"fwht, {batch} rows of {n:,}" + (f", {repeat} times" if repeat > 1 else "")
        rows += harness.race(title, contenders, dict.fromkeys(contenders, work), rounds=9)
    return rows


def repeated(run: Callable[[], object], times: int) -> Callable[[], object]:
    def all_of_them() -> None:
        for _ in range(times):
            run()

    return all_of_them


def blocks(sizes: list[int], batch: int = 256) -> list[harness.Row]:
    """Sizes that are not powers of two, against a product with the whole matrix."""
    rows = []
    for n in sizes:
        torch.manual_seed(0)
        x, matrix = torch.randn(batch, n), hadamard(n)
        contenders: dict[str, Callable[[], object]] = {
            "dense matrix": partial(torch.matmul, x, matrix),
            "torch": partial(fwht, x, engine="torch"),
            "native": partial(fwht, x, engine="native"),
        }
        rows += harness.race(f"fwht, {batch} rows of {n:,}", contenders, {}, rounds=5)
    return rows


def sparse(levels: list[int]) -> list[harness.Row]:
    """N^(1/3) coefficients, without noise and at 10 dB; names say how many of 50 draws are found."""
    rows = []
    for level in levels:
        n, sparsity = 1 << level, round(2 ** (level / 3))
        kinds = {"noiseless": 0.0, "10 dB": math.sqrt(sparsity / n / 10)}
        for name, noise in kinds.items():
            found, x = 0, torch.empty(0)
            for seed in range(50):
                torch.manual_seed(seed)
                index = torch.randperm(n)[:sparsity].sort().values
                value = torch.where(torch.rand(sparsity) < 0.5, -1.0, 1.0)
                x = fwht(torch.zeros(n).index_put((index,), value)) + noise * torch.randn(n)
                found += torch.equal(sparse_fwht(x, sparsity, noise=noise, seed=seed).index, index)
            got = sparse_fwht(x, sparsity, noise=noise)
            contenders: dict[str, Callable[[], object]] = {
                "own fwht": partial(fwht, x),
                "sparse_fwht": partial(sparse_fwht, x, sparsity, noise=noise),
            }
            title = f"{sparsity} of 2^{level}, {name}: {found} of 50 found, {got.samples:,} samples"
            rows += harness.race(title, contenders, {}, rounds=15)
    return rows


GROUPS = {"fwht": walsh, "blocks": blocks, "sparse": sparse}
SIZES: dict[str, list[int]] = {
    "fwht": [1 << level for level in (8, 10, 12, 14, 16)],
    "blocks": [96, 1536, 13_696],
    "sparse": [20],
}
QUICK: dict[str, list[int]] = {"fwht": [1 << 8, 1 << 12], "blocks": [96], "sparse": [16]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing saved")
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; all if none is given")
    options = parser.parse_args()
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"unknown groups {sorted(unknown)}")
    if not harness.tests_pass("tests/kernels/test_fwht.py", "tests/transforms", "-m", "not evidence"):
        print("the transforms' tests fail: no figures for wrong results", file=sys.stderr)
        return 1
    rows: list[harness.Row] = []
    for name, run in GROUPS.items():
        if not options.groups or name in options.groups:
            rows += run((QUICK if options.quick else SIZES)[name])
    if not options.quick and not options.groups:
        harness.save("transforms", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
