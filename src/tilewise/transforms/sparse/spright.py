"""SPRIGHT: the Walsh-Hadamard spectrum of few coefficients from few samples, noisy or not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.kernels import peel_bins as kernel
from tilewise.transforms.sparse.plan import make_plan
from tilewise.transforms.walsh import fwht

ROUNDING = (
    16  # noise of a noiseless signal, in units of its samples' rounding; sums and peeling add up more of it
)
MOST_BITS = 61  # of a place, so that integers of 64 bits hold it with a sign
MOST_ROUNDS = 100


@dataclass(frozen=True, eq=False)
class SparseSpectrum:
    """A spectrum of few coefficients, and what it took.

    Args:
        index: int64 `[found]`, ascending. value: `[found]` in the samples' dtype; `fwht(x)[index]` without
            noise.
        size: of the whole spectrum. samples: different samples that were read.
        complete: whether nothing but noise was left in any bin; False means that coefficients are missing.
        rounds: of peeling.
    """

    index: Tensor
    value: Tensor
    size: int
    samples: int
    complete: bool
    rounds: int

    def dense(self) -> Tensor:
        """The whole spectrum, `[size]`."""
        return self.value.new_zeros(self.size).index_put((self.index,), self.value)


def sparse_fwht(
    x: Tensor | Callable[[Tensor], Tensor],
    sparsity: int,
    *,
    size: int | None = None,
    noise: float = 0.0,
    groups: int = 4,
    bins: int | None = None,
    offsets: int | None = None,
    decoders: int = 24,
    rounds: int = 30,
    seed: int = 0,
    engine: str = "auto",
) -> SparseSpectrum:
    """The orthonormal Walsh-Hadamard spectrum of N numbers, if it has about K, from O(K log N) samples.

    SPRIGHT (Li, Bradley, Pawar, Ramchandran, 2015, arXiv 1508.06336). Each of C `groups` hashes the spectrum
    into B >= K bins by a transform of B samples, at P offsets. A bin with nothing in it is known by its
    energy; from one with a single coefficient its place follows by linear equations over two elements, whose
    right sides are the bin's number and the signs at the offsets; what the coefficient accounts for is then
    taken out of its bins in all groups, which leaves others single. Without `noise` this is SparseFHT
    (Scheibler, Haghighatshoar, Vetterli, 2015) with P = log2(N / B) + 1; with it offsets are random, P = 3
    log2 N by default, and errors of signs are corrected.

    Where we differ: the paper reads places off a code with a decoder of its own (its sample-optimal form);
    our offsets are a random linear code, and `decoders` sets of equations are solved for each bin, of which
    the first answer that explains the bin is taken. Hashes are random matrices, so that no spectrum is bad for
    all seeds. Values may be any real numbers.

    Args:
        x: `[N]` floating, or a function from int64 positions of any shape to samples there; then `size` is N.
        sparsity: K, the coefficients to expect. Larger `bins` and more groups find more.
        size: N, a power of two up to 2^61, for a function. noise: standard deviation of white noise on the
            samples.
        groups: C. bins: B, a power of two; None is the one at or above K. offsets: P for noisy samples.
        decoders: sets of equations tried. rounds: of peeling, at most 100. seed: of hashes and offsets.
        engine: of the peeling: "auto", or "native", "torch" or "definition", which then runs or raises.

    Returns:
        A `SparseSpectrum`; its `complete` says whether the bins are explained. Not differentiable.

    Raises:
        ValueError, TypeError: an argument that does not fit.
    """
    n, read = _check(x, size)
    _check_numbers(1 << n, sparsity, noise, groups, bins, offsets, decoders, rounds)
    b = min(n, (sparsity - 1).bit_length() if bins is None else bins.bit_length() - 1)
    if noise and offsets is None:
        offsets = max(3 * n, n - b + 1)
    if offsets is not None and offsets < n - b + 1:
        raise ValueError(f"offsets must be at least log2(N / B) + 1 = {n - b + 1}, got {offsets}")
    plan = make_plan(n, b, groups, offsets if noise else None, decoders, seed)
    with torch.no_grad():
        seen = read(plan.positions)
        samples = seen.double().cpu()
        level = max(noise, ROUNDING * torch.finfo(seen.dtype).eps * float(samples.square().mean().sqrt()))
        # A coefficient comes out of its bin as it is, noise multiplied by sqrt(N / B).
        left = fwht(samples, normalize=False) * (2.0 ** (n / 2 - b))
        variance = level**2 * 2.0 ** (n - b)
        # Noise alone hardly exceeds this mean square over the offsets: four deviations of a chi-square.
        allowed = variance * (1 + 4 * math.sqrt(2 / left.shape[1]))
        call = kernel.Call(left, plan.hashes, plan.offsets, plan.chosen, plan.decoders, n, allowed, rounds)
        found = kernel.peel_bins(call, engine)
    index, value = found.index.to(seen.device), found.value.to(seen)
    return SparseSpectrum(index, value, 1 << n, plan.samples, found.explained, found.rounds)


def _check(
    x: Tensor | Callable[[Tensor], Tensor], size: int | None
) -> tuple[int, Callable[[Tensor], Tensor]]:
    """log2 of the size, and how samples are read."""
    if isinstance(x, Tensor):
        if x.ndim != 1 or not x.is_floating_point():
            raise ValueError(f"x must be floating [N], got {x.dtype} {list(x.shape)}")
        if size not in (None, len(x)):
            raise ValueError(f"size must be None or {len(x)} for x of that length, got {size!r}")
        size = len(x)
    elif not callable(x):
        raise TypeError(f"x must be a tensor or a function of positions, got {type(x).__name__}")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be an integer >= 1, got {size!r}")
    if size & (size - 1) or size > 1 << MOST_BITS:
        raise ValueError(f"size must be a power of two, at most 2^{MOST_BITS}, got {size}")
    return size.bit_length() - 1, x.__getitem__ if isinstance(x, Tensor) else x


def _check_numbers(size, sparsity, noise, groups, bins, offsets, decoders, rounds) -> None:
    for name, value, least in (
        ("sparsity", sparsity, 1), ("groups", groups, 1), ("bins", bins, 1),
        ("offsets", offsets, 1), ("decoders", decoders, 1), ("rounds", rounds, 1),
    ):  # fmt: skip
        missing = value is None and name in ("bins", "offsets")
        if not missing and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    if bins is not None and bins & (bins - 1):
        raise ValueError(f"bins must be a power of two, got {bins}")
    if sparsity > size or (bins or 1) > size:
        raise ValueError(f"sparsity and bins must be at most the size {size}, got {sparsity} and {bins}")
    if rounds > MOST_ROUNDS:
        raise ValueError(f"rounds must be at most {MOST_ROUNDS}, got {rounds}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be >= 0 and finite, got {noise!r}")
    if offsets is not None and not noise:
        raise ValueError(f"offsets are for noisy samples (noise > 0), got {offsets}")
