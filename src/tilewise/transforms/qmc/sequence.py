"""What lattices, digital nets and Halton points have in common: rows by number, replications, a seed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

import torch
from torch import Tensor


class PointSequence(ABC):
    """Points of the unit cube, numbered from 0; any run of them is made without those before it.

    `sequence[a:b]` and `sequence.points(n)` (the same as `sequence[0:n]`) are `[b - a, dim]`, or
    `[replications, b - a, dim]` where replications were asked for. Every replication is randomised on its
    own; replication r is the same whatever their number. The same arguments give the same points on every
    device.

    Args:
        dim: coordinates of a point.
        randomize: how, or None for the points as constructed. Which there are is said by each sequence.
        replications: None for one set of points.
        seed: a whole number; None takes one from PyTorch's generator, so `torch.manual_seed` decides.
        device: of the points.
        dtype: float64, or float32, which holds the first 24 binary digits.
    """

    choices: Collection[str | None] = ()
    max_points: int = 1 << 32

    def __init__(
        self,
        dim: int,
        *,
        randomize: str | None,
        replications: int | None,
        seed: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        whole_number("dim", dim, 1)
        if randomize not in self.choices:
            known = ", ".join(repr(choice) for choice in self.choices)
            raise ValueError(f"randomize must be one of {known}, got {randomize!r}")
        if replications is not None:
            whole_number("replications", replications, 1)
            if randomize is None and replications > 1:
                raise ValueError(
                    f"replications must be None or 1 with randomize=None, got {replications}: they would be alike"
                )
        if seed is not None:
            whole_number("seed", seed, 0)
        if dtype not in (torch.float64, torch.float32):
            raise TypeError(f"dtype must be torch.float64 or torch.float32, got {dtype}")
        self.dim, self.randomize, self.replications, self.dtype = dim, randomize, replications, dtype
        self.seed = int(torch.randint(1 << 62, ()).item()) if seed is None else seed
        self.device = torch.device("cpu" if device is None else device)

    @property
    def copies(self) -> int:
        """Sets of points: the replications, or 1."""
        return 1 if self.replications is None else self.replications

    def points(self, n: int) -> Tensor:
        """The first n points."""
        return self._rows(0, n, self.dtype)

    def __getitem__(self, rows: slice) -> Tensor:
        """Points `rows.start` to `rows.stop - 1`."""
        if not isinstance(rows, slice) or rows.step not in (None, 1) or rows.stop is None:
            raise TypeError(f"points are taken by a slice with an end, as in [0:1024], got {rows!r}")
        return self._rows(rows.start or 0, rows.stop, self.dtype)

    def _rows(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        whole_number("start", start, 0)
        whole_number("n (the end)", end, start)
        if end > self.max_points:
            raise ValueError(f"n must be at most {self.max_points:,} for {self!r}, got {end:,}")
        out = self._make(start, end - start, dtype)
        return out[0] if self.replications is None else out

    @abstractmethod
    def _make(self, start: int, n: int, dtype: torch.dtype) -> Tensor:
        """Points from `start` on, `[copies, n, dim]` of floats; where there are 52 digits, of these as int64."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(dim={self.dim}, randomize={self.randomize!r})"


def whole_number(name: str, given: object, least: int) -> None:
    """Raise where an argument is no whole number or too small."""
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{name} must be a whole number, got {given!r}")
    if given < least:
        raise ValueError(f"{name} must be at least {least}, got {given}")


def power_of_two(name: str, n: int) -> int:
    """Its logarithm; raises where `n` is not a power of two."""
    whole_number(name, n, 1)
    if n & n - 1:
        lower = 1 << n.bit_length() - 1
        raise ValueError(f"{name} must be a power of two, got {n}; the nearest are {lower} and {2 * lower}")
    return n.bit_length() - 1
