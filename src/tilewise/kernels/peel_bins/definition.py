"""The meaning of the peeling decoder: bin by bin, in Python's integers and floats."""

from __future__ import annotations

import torch

from tilewise.kernels.peel_bins.call import Call, Peeled


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> Peeled:
    """Places and values of the coefficients found."""
    left = [[list(seen) for seen in zip(*group)] for group in call.left.tolist()]  # [C][B][P]
    totals: dict[int, float] = {}
    taken = 0
    while taken < call.rounds:
        found: dict[int, list[float]] = {}
        for group, bins in enumerate(left):
            for number, seen in enumerate(bins):
                if (single := _single(call, group, number, seen)) is not None:
                    found.setdefault(single[0], []).append(single[1])
        if not found:
            break
        taken += 1
        for place, values in found.items():
            value = sum(values) / len(values)
            totals[place] = totals.get(place, 0.0) + value
            _take_out(call, left, place, value)
    explained = all(_power(seen) <= call.allowed for bins in left for seen in bins)
    places = [place for place in sorted(totals) if _counts(call, totals[place])]
    index = torch.tensor(places, dtype=torch.int64)
    value = torch.tensor([totals[place] for place in places], dtype=torch.float64)
    return Peeled(index, value, explained, taken)


def _power(seen: list[float]) -> float:
    return sum(x * x for x in seen) / len(seen)


def _counts(call: Call, value: float) -> bool:
    return call.left.shape[1] * value * value > 12 * call.allowed


def _odd(bits: int) -> int:
    return bin(bits).count("1") & 1


def _single(call: Call, group: int, number: int, seen: list[float]) -> tuple[int, float] | None:
    """Place and value of the coefficient that is alone in a bin, if one is."""
    if not _power(seen) > call.allowed:
        return None
    offsets, b = call.offsets[group].tolist(), call.hashes.shape[1]
    for columns, chosen in zip(call.decoders[group].tolist(), call.chosen[group].tolist()):
        equations = [number >> i & 1 for i in range(b)] + [int(seen[p] < 0) for p in chosen]
        solved = 0
        for column, holds in zip(columns, equations):
            solved ^= column * holds
        place = solved & (1 << call.n) - 1
        value = sum(x * (1 - 2 * _odd(d & place)) for x, d in zip(seen, offsets)) / len(seen)
        rest = _power([x - value * (1 - 2 * _odd(d & place)) for x, d in zip(seen, offsets)])
        if rest <= call.allowed and _counts(call, value):
            return place, value
    return None


def _take_out(call: Call, left: list[list[list[float]]], place: int, value: float) -> None:
    for group, bins in enumerate(left):
        number = sum(_odd(row & place) << i for i, row in enumerate(call.hashes[group].tolist()))
        for p, d in enumerate(call.offsets[group].tolist()):
            bins[number][p] -= value * (1 - 2 * _odd(d & place))
