"""Sparse Walsh-Hadamard spectra: exact from few samples, noisy ones, and what fails without."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tilewise.transforms import SparseSpectrum, fwht, sparse_fwht
from tilewise.transforms.sparse.binary import Basis, independent, inverse, span, transposed


def spectrum(n: int, sparsity: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random places among 2^n, ascending, with -1 or 1 at each, float64."""
    g = torch.Generator().manual_seed(seed)
    index = torch.randperm(1 << n, generator=g)[:sparsity].sort().values
    return index, torch.where(torch.rand(sparsity, generator=g) < 0.5, -1.0, 1.0).double()


def noise_of(n: int, sparsity: int, decibels: float) -> float:
    """Standard deviation of noise on the samples, for coefficients of size 1."""
    return math.sqrt(sparsity / (1 << n) / 10 ** (decibels / 10))


def signal(n: int, index: Tensor, value: Tensor, noise: float = 0.0, seed: int = 0) -> Tensor:
    dense = torch.zeros(1 << n, dtype=torch.float64).index_put((index,), value)
    return fwht(dense) + noise * torch.randn(1 << n, generator=torch.Generator().manual_seed(seed)).double()


class Sampled:
    """The same signal, made only where it is read."""

    def __init__(self, n: int, index: Tensor, value: Tensor, noise: float = 0.0, seed: int = 0) -> None:
        self.n, self.index, self.value, self.noise, self.read = n, index, value, noise, 0
        self.g = torch.Generator().manual_seed(seed)

    def __call__(self, at: Tensor) -> Tensor:
        common, parity = at.unsqueeze(-1) & self.index, torch.zeros(1, dtype=torch.int64)
        for _ in range(self.n):
            parity, common = parity ^ (common & 1), common >> 1
        self.read += at.numel()
        clean = ((1 - 2 * parity) * self.value).sum(-1) / math.sqrt(1 << self.n)
        return clean + self.noise * torch.randn(at.shape, generator=self.g).double()


def found(got: SparseSpectrum, index: Tensor) -> bool:
    return torch.equal(got.index, index)


@pytest.mark.evidence
@pytest.mark.parametrize("n", [10, 14, 18])
def test_exact_without_noise_from_few_samples(n):
    """Cube root of N coefficients: places right and values exact in all but rare draws, and these are told.

    Controls: one group instead of four leaves collisions that nothing resolves; a dense transform that is
    given the same samples, and zeros for the rest, has every value wrong by several percent.
    """
    sparsity, draws = round(2 ** (n / 3)), 40
    right = alone = 0
    for seed in range(draws):
        index, value = spectrum(n, sparsity, seed)
        x = signal(n, index, value)
        got = sparse_fwht(x, sparsity, seed=seed)
        assert got.complete == found(got, index)
        right += got.complete
        if got.complete:
            torch.testing.assert_close(got.value, value, rtol=0, atol=1e-12)
        alone += found(sparse_fwht(x, sparsity, groups=1, seed=seed), index)
        bins = 1 << (sparsity - 1).bit_length()
        assert got.samples <= 4 * bins * (math.log2((1 << n) / bins) + 1)
    assert right >= 0.97 * draws and alone <= 0.2 * draws
    kept = torch.zeros(1 << n, dtype=torch.bool)
    kept[torch.randperm(1 << n, generator=torch.Generator().manual_seed(0))[: got.samples]] = True
    dense = fwht(x * kept) * ((1 << n) / got.samples)
    assert float((dense[index] - value).abs().mean()) > 0.02


@pytest.mark.evidence
def test_recovery_against_noise():
    """From 3 log2 N offsets a group: nearly always from 5 dB up, hardly ever at -10 dB.

    Control: the noiseless form, told of no noise, finds no spectrum even at 20 dB.
    """
    n, sparsity, draws = 12, 16, 25
    rates = {}
    for decibels in (-10, -5, 0, 5, 10, 20):
        noise, right = noise_of(n, sparsity, decibels), 0
        for seed in range(draws):
            index, value = spectrum(n, sparsity, seed)
            x = signal(n, index, value, noise, seed)
            got = sparse_fwht(x, sparsity, noise=noise, seed=seed)
            right += found(got, index) and bool((got.value.sign() == value).all())
        rates[decibels] = right / draws
    assert rates[-10] <= 0.1 and min(rates[5], rates[10], rates[20]) >= 0.9, rates
    assert sum(found(sparse_fwht(x, sparsity, seed=seed), index) for seed in range(5)) == 0


@pytest.mark.evidence
def test_samples_grow_as_k_log_n():
    """At 5 dB, N from 2^10 to 2^20: at most 24 K log2 N samples, which is less and less of N.

    Control: as few offsets as there are bits to find, with no equation to spare.
    """
    shares = []
    for n in (10, 15, 20):
        sparsity = round(2 ** (n / 3))
        noise, right, draws = noise_of(n, sparsity, 5), 0, 10
        for seed in range(draws):
            index, value = spectrum(n, sparsity, seed)
            x = Sampled(n, index, value, noise, seed)
            got = sparse_fwht(x, sparsity, size=1 << n, noise=noise, seed=seed)
            right += found(got, index)
        assert right >= 0.9 * draws, (n, right)
        assert got.samples <= x.read and got.samples <= 24 * sparsity * n
        shares.append(got.samples / (1 << n))
    assert shares[0] > 4 * shares[1] > 16 * shares[2]
    few = sparse_fwht(x, sparsity, size=1 << n, noise=noise, offsets=n - 7 + 1, seed=0)
    assert few.samples < got.samples and not found(few, index)


def test_values_of_all_sizes():
    """Real values over three decades, in float32 and float64, a few more than were expected."""
    n = 13
    g = torch.Generator().manual_seed(5)
    index = torch.randperm(1 << n, generator=g)[:40].sort().values
    value = 10 ** (3 * torch.rand(40, generator=g).double()) * torch.where(
        torch.rand(40, generator=g) < 0.5, -1, 1
    )
    x = signal(n, index, value)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        got = sparse_fwht(x.to(dtype), sparsity=32)
        assert got.complete and found(got, index) and got.value.dtype == dtype
        assert float((got.value.double() - value).abs().max()) < tolerance
    torch.testing.assert_close(got.dense().double(), fwht(x), rtol=1e-5, atol=1e-3)


def test_the_same_from_a_function():
    n = 12
    index, value = spectrum(n, 10, 1)
    sampled = Sampled(n, index, value)
    got = sparse_fwht(sampled, 10, size=1 << n, groups=4, bins=16, rounds=20)
    whole = sparse_fwht(signal(n, index, value), 10)
    assert (
        found(got, index)
        and torch.equal(got.index, whole.index)
        and got.samples == whole.samples <= sampled.read
    )
    assert got.size == 1 << n and 1 <= got.rounds <= 20


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_tiny_and_empty(size):
    zero = sparse_fwht(torch.zeros(size), 1)
    assert zero.complete and len(zero.index) == 0 and torch.equal(zero.dense(), torch.zeros(size))
    x = fwht(torch.eye(size, dtype=torch.float64)[size - 1] * 3)
    got = sparse_fwht(x, 1)
    assert got.complete and got.index.tolist() == [size - 1]
    torch.testing.assert_close(got.value, torch.tensor([3.0], dtype=torch.float64))


def test_a_full_spectrum_is_told_to_be_incomplete():
    got = sparse_fwht(torch.randn(1024), 8)
    assert not got.complete


def test_noisy_options():
    n = 10
    index, value = spectrum(n, 8, 0)
    noise = noise_of(n, 8, 10)
    x = signal(n, index, value, noise)
    got = sparse_fwht(x, 8, noise=noise, offsets=40, decoders=10, bins=16, seed=3, engine="torch")
    assert found(got, index) and got.samples <= 4 * 16 * 40


def test_linear_algebra_over_bits():
    rows = [0b0111, 0b1010, 0b0100, 0b1000]
    back = inverse(rows)
    columns = transposed(rows)
    product = [[bin(a & c).count("1") % 2 for c in columns] for a in back]
    assert product == torch.eye(4, dtype=torch.int64).tolist()
    assert transposed(columns) == rows
    with pytest.raises(ValueError, match="dependent"):
        inverse([0b01, 0b01])
    assert independent([0b001], [0b001, 0b010, 0b011, 0b100, 0b111], 3) == [1, 3]
    assert len(Basis([0b11, 0b01, 0b10])) == 2
    assert span([0b001, 0b110]).tolist() == [0, 1, 6, 7]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: sparse_fwht([1.0], 1), TypeError, "x must be a tensor or a function of positions, got list"),
        (lambda: sparse_fwht(torch.randn(2, 4), 1), ValueError, r"x must be floating \[N\]"),
        (lambda: sparse_fwht(torch.arange(4), 1), ValueError, r"x must be floating \[N\]"),
        (
            lambda: sparse_fwht(torch.randn(12), 1),
            ValueError,
            "size must be a power of two, at most 2.61, got 12",
        ),
        (lambda: sparse_fwht(torch.randn(8), 1, size=4), ValueError, "size must be None or 8"),
        (lambda: sparse_fwht(torch.randn, 1), ValueError, "size must be an integer >= 1, got None"),
        (lambda: sparse_fwht(torch.randn(8), 0), ValueError, "sparsity must be an integer >= 1, got 0"),
        (lambda: sparse_fwht(torch.randn(8), 9), ValueError, "must be at most the size 8, got 9 and None"),
        (lambda: sparse_fwht(torch.randn(8), 1, bins=3), ValueError, "bins must be a power of two, got 3"),
        (
            lambda: sparse_fwht(torch.randn(8), 1, rounds=101),
            ValueError,
            "rounds must be at most 100, got 101",
        ),
        (
            lambda: sparse_fwht(torch.randn(8), 1, groups=0),
            ValueError,
            "groups must be an integer >= 1, got 0",
        ),
        (
            lambda: sparse_fwht(torch.randn(8), 1, noise=-1.0),
            ValueError,
            "noise must be >= 0 and finite, got -1.0",
        ),
        (
            lambda: sparse_fwht(torch.randn(8), 1, noise=0.1, offsets=3),
            ValueError,
            "offsets must be at least .* 4",
        ),
        (
            lambda: sparse_fwht(torch.randn(8), 1, offsets=9),
            ValueError,
            r"offsets are for noisy samples \(noise > 0\)",
        ),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
