"""SPRIGHT: the Walsh-Hadamard spectrum of few coefficients from few samples, noisy or not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.transforms.sparse.plan import Plan, make_plan
from tilewise.transforms.walsh import fwht

ROUNDING = 16  # noise of a noiseless signal, in units of its samples' rounding; sums and peeling add up more of it


@dataclass(frozen=True, eq=False)
class SparseSpectrum:
    """A spectrum of few coefficients, and what it took.

    Args:
        index: int64 `[found]`, ascending. value: `[found]` in the samples' dtype; `fwht(x)[index]` without noise.
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
    groups: int = 3,
    bins: int | None = None,
    offsets: int | None = None,
    decoders: int = 24,
    rounds: int = 30,
    seed: int = 0,
) -> SparseSpectrum:
    """The orthonormal Walsh-Hadamard transform of N numbers of which about K are not zero, from O(K log N) samples.

    SPRIGHT (Li, Bradley, Pawar, Ramchandran, 2015, arXiv 1508.06336). Each of C `groups` hashes the spectrum into B
    >= K bins by a transform of B samples, at P offsets. A bin with nothing in it is known by its energy; from one
    with a single coefficient its place follows by linear equations over two elements, whose right sides are the
    bin's number and the signs at the offsets; what the coefficient accounts for is then taken out of its bins in all
    groups, which leaves others single. Without `noise` this is SparseFHT (Scheibler, Haghighatshoar, Vetterli, 2015)
    with P = log2(N / B) + 1; with it offsets are random, P = 3 log2 N by default, and errors of signs are corrected.

    Where we differ: the paper reads places off a code with a decoder of its own (its sample-optimal form); our offsets
    are a random linear code, and `decoders` sets of equations are solved for each bin, of which the answer that
    explains the bin best is taken. Hashes are random matrices, so that no spectrum is bad for all seeds. Values may be
    any real numbers.

    Args:
        x: `[N]` floating, or a function from int64 positions of any shape to samples there; then `size` is N.
        sparsity: K, the coefficients to expect. More or larger bins find more: about 2 C B / 3 at three groups.
        size: N, a power of two, for a function. noise: standard deviation of white noise on the samples.
        groups: C. bins: B, a power of two; None is the one at or above K. offsets: P for noisy samples.
        decoders: sets of equations tried. rounds: of peeling at most. seed: of hashes and offsets.

    Returns:
        A `SparseSpectrum`; its `complete` says whether the bins are explained. Not differentiable.

    Raises:
        ValueError, TypeError: an argument that does not fit.
    """
    n, read = _check(x, size, sparsity, noise, groups, bins, offsets, decoders, rounds)
    b = min(n, (sparsity - 1).bit_length() if bins is None else bins.bit_length() - 1)
    if noise and offsets is None:
        offsets = max(2, 3 * n)
    plan = make_plan(n, b, groups, offsets if noise else None, decoders, seed)
    seen = read(plan.positions)
    level = max(noise, ROUNDING * torch.finfo(seen.dtype).eps * float(seen.double().square().mean().sqrt()))
    bins_ = _Bins.of(plan, seen, level)
    found = _peel(bins_, rounds)
    index, value = _sums([one[0] for one in found], [one[1] for one in found])
    return SparseSpectrum(
        index, value.to(seen.dtype), 1 << n, plan.samples, not bool(bins_.active().any()), len(found)
    )


def _check(
    x, size, sparsity, noise, groups, bins, offsets, decoders, rounds
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
    for name, value, least in (
        ("size", size, 1), ("sparsity", sparsity, 1), ("groups", groups, 1), ("bins", bins, 1),
        ("offsets", offsets, 2), ("decoders", decoders, 1), ("rounds", rounds, 1),
    ):  # fmt: skip
        missing = value is None and name in ("bins", "offsets")
        if not missing and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if name in ("size", "bins") and not missing and value & (value - 1):
            raise ValueError(f"{name} must be a power of two, got {value}")
    if sparsity > size or (bins or 1) > size:
        raise ValueError(f"sparsity and bins must be at most the size {size}, got {sparsity} and {bins}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be >= 0 and finite, got {noise!r}")
    if offsets is not None and not noise:
        raise ValueError(f"offsets are for noisy samples (noise > 0), got {offsets}")
    return size.bit_length() - 1, x.__getitem__ if isinstance(x, Tensor) else x


@dataclass(frozen=True, eq=False)
class _Bins:
    """What is left in all bins, float64 `[C, P, B]`, and the variance of noise in one of them."""

    plan: Plan
    left: Tensor
    variance: float

    @classmethod
    def of(cls, plan: Plan, seen: Tensor, noise: float) -> _Bins:
        """From the samples at the plan's positions. A coefficient comes out as it is, noise multiplied by N / B."""
        size, bins = 1 << plan.n, 1 << plan.b
        left = fwht(seen.double(), normalize=False) * (math.sqrt(size) / bins)
        return cls(plan, left, noise**2 * size / bins)

    @property
    def allowed(self) -> float:
        """Mean square over offsets that noise alone hardly exceeds: four deviations of a chi-square."""
        return self.variance * (1 + 4 * math.sqrt(2 / self.left.shape[1]))

    def active(self) -> Tensor:
        """Bins with more than noise in them, bool `[C, B]`."""
        return self.left.square().mean(1) > self.allowed

    def singles(self, group: int) -> tuple[Tensor, Tensor]:
        """Places and values of the coefficients that are alone in their bins of a group."""
        plan = self.plan
        at = self.active()[group].nonzero().squeeze(1)
        if not len(at):
            return at, at.double()
        left = self.left[group][:, at]  # [P, bins]
        signs = (left < 0).double()[plan.chosen[group]]  # [T, n - b + 1, bins]
        known = plan.bins[:, at].expand(len(signs), -1, -1)
        solved = (plan.decoders[group] @ torch.cat((known, signs), 1)).remainder(2)
        places = solved[:, : plan.n]  # [T, n, bins]
        turned = 1 - 2 * (plan.offsets[group] @ places).remainder(2)  # [T, P, bins]
        values, best = (turned * left).mean(1).abs().max(0)
        own = turned[best, :, torch.arange(len(at))].T  # [P, bins]
        values = (own * left).mean(0)
        rest = (left - own * values).square().mean(0)
        alone = (rest <= self.allowed) & (values.square() > self.allowed)
        weights = 2.0 ** torch.arange(plan.n, dtype=torch.float64)
        index = torch.einsum("i,ij->j", weights, places[best, :, torch.arange(len(at))].T).long()
        return index[alone], values[alone]

    def take_out(self, index: Tensor, value: Tensor) -> None:
        """Subtract coefficients from their bins in all groups, in place."""
        plan = self.plan
        bits = (index.unsqueeze(0) >> torch.arange(plan.n).unsqueeze(1) & 1).double()  # [n, found]
        places = 2.0 ** torch.arange(plan.b, dtype=torch.float64)
        for group in range(len(self.left)):
            bins = ((plan.hashes[group] @ bits).remainder(2) * places.unsqueeze(1)).sum(0).long()
            turned = 1 - 2 * (plan.offsets[group] @ bits).remainder(2)
            self.left[group].index_add_(1, bins, turned * -value)


def _peel(bins: _Bins, rounds: int) -> list[tuple[Tensor, Tensor]]:
    """What was taken out in each round, until a round finds nothing."""
    taken = []
    for _ in range(rounds):
        found = [bins.singles(group) for group in range(len(bins.left))]
        index, inverse, counts = torch.cat([one[0] for one in found]).unique(
            return_inverse=True, return_counts=True
        )
        if not len(index):
            break
        sums = torch.zeros(len(index), dtype=torch.float64)
        sums.index_add_(0, inverse, torch.cat([one[1] for one in found]))
        bins.take_out(index, sums / counts)  # seen alone in several groups: the mean of what they say
        taken.append((index, sums / counts))
    return taken


def _sums(indices: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Places in rising order, with all that was taken out of each."""
    if not indices:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    index, inverse = torch.cat(indices).unique(return_inverse=True)
    return index, torch.zeros(len(index), dtype=torch.float64).index_add_(0, inverse, torch.cat(values))
