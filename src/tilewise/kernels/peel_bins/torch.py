"""The torch engine: all bins of a group at once, equations as products of matrices of zeros and ones."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.kernels.peel_bins.call import Call, Peeled


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> Peeled:
    """Places and values of the coefficients found."""
    groups = [_Group(call, c) for c in range(len(call.left))]
    indices = [torch.zeros(0, dtype=torch.int64, device=call.left.device)]
    values = [indices[0].double()]
    taken = 0
    while taken < call.rounds:
        singles = [group.singles() for group in groups]
        index, value = _by_place([one[0] for one in singles], [one[1] for one in singles], mean=True)
        if not len(index):
            break
        taken += 1
        for group in groups:
            group.take_out(index, value)
        indices.append(index)
        values.append(value)
    explained = not any(bool(group.active().any()) for group in groups)
    index, value = _by_place(indices, values, mean=False)
    kept = call.left.shape[1] * value.square() > 12 * call.allowed
    return Peeled(index[kept], value[kept], explained, taken)


class _Group:
    """One group's bins, `left [P, B]`, which change, and its bits as float64 numbers."""

    def __init__(self, call: Call, group: int) -> None:
        self.n, self.allowed, self.left = call.n, call.allowed, call.left[group].clone()
        self.hashes, self.offsets = (_bits(x[group], call.n) for x in (call.hashes, call.offsets))
        self.chosen = call.chosen[group]  # [T, n - b + 1]
        self.decoders = _bits(call.decoders[group], call.n + 1).mT  # [T, n + 1, n + 1]
        self.bins = _bits(torch.arange(call.left.shape[2], device=call.left.device), call.hashes.shape[1])

    def active(self) -> Tensor:
        """Bins with more in them than is allowed, bool `[B]`."""
        return self.left.square().mean(0) > self.allowed

    def singles(self) -> tuple[Tensor, Tensor]:
        """Places and values of the coefficients that are alone."""
        at = self.active().nonzero().squeeze(1)
        left = self.left[:, at]  # [P, bins]
        signs = (left < 0).double()[self.chosen]  # [T, n - b + 1, bins]
        known = self.bins[at].T.expand(len(signs), -1, -1)
        places = (self.decoders @ torch.cat((known, signs), 1)).remainder(2)[:, : self.n]  # [T, n, bins]
        turned = 1 - 2 * (self.offsets @ places).remainder(2)  # [T, P, bins]
        value = (turned * left).mean(1)  # [T, bins]
        rest = (left - turned * value.unsqueeze(1)).square().mean(1)
        alone = (rest <= self.allowed) & (len(left) * value.square() > 12 * self.allowed)
        first = (alone & (alone.cumsum(0) == 1)).double()
        index, value = _number((places * first.unsqueeze(1)).sum(0).T), (value * first).sum(0)
        found = alone.any(0)
        return index[found], value[found]

    def take_out(self, index: Tensor, value: Tensor) -> None:
        """Subtract coefficients from their bins, in place."""
        places = _bits(index, self.n)  # [found, n]
        bins = _number((places @ self.hashes.T).remainder(2))
        turned = 1 - 2 * (self.offsets @ places.T).remainder(2)  # [P, found]
        self.left.index_add_(1, bins, turned * -value)


def _bits(x: Tensor, count: int) -> Tensor:
    """Bits of integers along a new last axis, lowest first, float64."""
    return (x.unsqueeze(-1) >> torch.arange(count, device=x.device) & 1).double()


def _number(bits: Tensor) -> Tensor:
    """Integers from bits along the last axis."""
    return (bits.long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def _by_place(indices: list[Tensor], values: list[Tensor], *, mean: bool) -> tuple[Tensor, Tensor]:
    """Every place once, in rising order, with the mean or the sum of its values."""
    index, inverse, counts = torch.cat(indices).unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(index), dtype=torch.float64, device=index.device)
    sums.index_add_(0, inverse, torch.cat(values))
    return index, sums / counts if mean else sums
