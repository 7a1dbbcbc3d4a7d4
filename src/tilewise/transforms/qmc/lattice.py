"""Rank-1 lattices in base 2, extensible from each power of two to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewise.kernels.digit_sums import Call, digit_sums
from tilewise.kernels.digit_sums.digits import BITS, MASK, to_unit
from tilewise.transforms.qmc.digits import fold, gray, reverse, words
from tilewise.transforms.qmc.lattice_vector import LOG2_POINTS, VECTOR
from tilewise.transforms.qmc.sequence import PointSequence, power_of_two

ORDERS = ("bit-reversed", "natural", "gray")


class Lattice(PointSequence):
    """A rank-1 lattice: point i is `phi(i) z` modulo 1, with a generating vector z of odd numbers.

    Orders: in "bit-reversed", phi is van der Corput's sequence, so the first 2^m points are a lattice for
    every m and more can be added; "gray" is the same of the Gray code of i; "natural" is `i z / n`, for a
    power of two of points asked for at once.

    The default vector was constructed here (`search_lattice`, tools/make_lattice.py): fast component by
    component for smoothness 1 and weights 1/j^2, for 2^6 to 2^20 points at once, 256 dimensions.

    Args:
        dim: coordinates.
        vector: z of one's own, at least `dim` odd numbers; it goes to 2^32 points, whatever it was made
            for.
        order: as above.
        randomize: "shift" moves all points by one random vector modulo 1 (Cranley and Patterson, 1976);
            None has the origin as point 0.
        replications, seed, device, dtype: as for every `PointSequence`.

    After QMCPy (Sorokin, 2025, arXiv 2502.14256), whose "natural" order is "bit-reversed" here, and whose
    "linear" is "natural".

    Raises:
        ValueError: dimensions beyond the vector's, even numbers in a vector.
    """

    choices = ("shift", None)

    def __init__(
        self,
        dim: int,
        *,
        vector: Sequence[int] | Tensor | None = None,
        order: str = "bit-reversed",
        randomize: str | None = "shift",
        replications: int | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(
            dim, randomize=randomize, replications=replications, seed=seed, device=device, dtype=dtype
        )
        if order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
        own = vector is None
        z = torch.as_tensor(VECTOR if vector is None else vector)
        if z.dtype != torch.int64 or z.ndim != 1:
            raise TypeError(f"vector must be whole numbers in one row, got {vector!r}")
        if len(z) < dim:
            whose = "the table has" if own else "vector has"
            raise ValueError(
                f"dim must be at most {len(z)}, the numbers that {whose}, got {dim}; search_lattice makes more"
            )
        if not (z[:dim] % 2 == 1).all() or z[:dim].min() < 1:
            raise ValueError("vector must hold odd numbers above 0, or coordinates would repeat")
        self.order, self.vector = order, z[:dim].to(self.device)
        self.max_points = 1 << (LOG2_POINTS if own else 32)
        self._shift = torch.zeros(self.copies, dim, dtype=torch.int64, device=self.device)
        if randomize is not None:
            self._shift = words(fold(self.seed, 1), (self.copies, dim), self.device) & MASK

    def integers(self, start: int, end: int) -> Tensor:
        """Points start .. end - 1 as whole numbers of 52 digits, int64."""
        return self._rows(start, end, torch.int64)

    def _make(self, start: int, n: int, dtype: torch.dtype) -> Tensor:
        if self.order == "gray":
            index = reverse(gray(torch.arange(start, start + n, device=self.device)), BITS)
            x = (index[:, None] * self.vector + self._shift.unsqueeze(1)) & MASK  # what overflows is whole
            return x if dtype == torch.int64 else to_unit(x, dtype)
        if self.order == "natural" and n:
            if start:
                raise ValueError(f'order="natural" gives all of 2^m points at once, got a start of {start}')
            m = power_of_two("n", n)
            places = [BITS - m + k for k in range(m)]
        else:
            places = [BITS - 1 - k for k in range(32)]
        columns = [(self.vector & (1 << BITS - place) - 1) << place for place in places]
        stacked = torch.stack(columns, -1) if columns else self.vector.new_zeros(self.dim, 0)
        return digit_sums(Call(stacked.unsqueeze(0), self._shift, start, n, True, dtype))
