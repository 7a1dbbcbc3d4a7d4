"""Digital nets in base 2: Sobol' points, nets of one's own, and higher-order nets by interlacing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from tilewise.kernels.digit_sums import Call, digit_sums
from tilewise.kernels.digit_sums.digits import BITS, MASK, to_unit
from tilewise.kernels.digit_sums.memory import empty
from tilewise.transforms.qmc import scrambling
from tilewise.transforms.qmc.digits import fold, words
from tilewise.transforms.qmc.sequence import PointSequence, power_of_two, whole_number

ORDERS = ("natural", "gray", "bit-reversed")
SHIFT, MATRIX, TREE = 1, 2, 3  # what random words are for
CACHED = 1 << 16  # numbers scrambled at a time, in some ten temporary tensors


class DigitalNet(PointSequence):
    """A digital net in base 2: coordinate j of point i is a matrix C_j times the binary digits of i.

    The default matrices are Sobol's with the direction numbers of Joe and Kuo (2008), which PyTorch ships
    for 21,201 dimensions and 2^30 points. `interlace=a` makes a higher-order net of a times as many
    coordinates (Dick, 2011): the digits of a neighbours take turns, and smooth integrands converge nearly
    like n^-a.

    Randomisations, each keeping every elementary interval's share of points:

    - "digital-shift": one random number is added to every coordinate, digit by digit without carry;
    - "lms": linear matrix scrambling, then a digital shift (Matousek, 1998); the default;
    - "nus": nested uniform scrambling (Owen, 1995), by a hash of the tree's nodes. The Gram matrices of
      `Gram` need one of the others;
    - None: point 0 is the origin.

    Higher-order nets are scrambled before they are interlaced, by "lms" and "nus".

    Orders: "natural", and "gray" (the index is Gray-coded: two neighbours differ in one column) can be
    extended; "bit-reversed" reverses the index within the power of two of points that `points(n)` asks for.
    The first 2^m points are the same set in each. Digits: 52, of which Sobol's matrices fill 30 and
    scrambling the rest.

    Args:
        dim: coordinates; `dim * interlace` of the matrices are used.
        interlace: 1, or the order of a higher-order net.
        columns: int64 `[dims, m]`, the matrices of one's own net: bit `digits - 1 - r` of `columns[j, k]`
            is row r, column k of C_j. None: Sobol's.
        digits: rows of `columns`.
        order: as above.
        randomize, replications, seed, device, dtype: as for every `PointSequence`.

    From QMCPy (Sorokin, 2025, arXiv 2502.14256) it differs in that NUS hashes instead of storing trees, and
    in that a coordinate has 52 digits instead of up to 64, so that float64 holds it.

    Raises:
        ValueError: dimensions beyond the matrices, points beyond their columns.
    """

    choices = ("lms", "digital-shift", "nus", None)

    def __init__(
        self,
        dim: int,
        *,
        interlace: int = 1,
        columns: Tensor | None = None,
        digits: int | None = None,
        order: str = "natural",
        randomize: str | None = "lms",
        replications: int | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(
            dim, randomize=randomize, replications=replications, seed=seed, device=device, dtype=dtype
        )
        whole_number("interlace", interlace, 1)
        if order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
        self.interlace, self.order = interlace, order
        if columns is None:
            columns, digits = sobol_columns(dim * interlace), SobolEngine.MAXBIT
        self._digits = _checked(columns, digits, dim * interlace)
        self._plain = (columns[: dim * interlace] << BITS - self._digits).to(self.device)
        self.max_points = 1 << columns.shape[1]
        self._made()

    def _made(self) -> None:
        """Columns `[copies or 1, d, m]`, shift `[copies, d]`; with NUS, the words of the trees' roots."""
        key, copies, wide = fold(self.seed, SHIFT), self.copies, self.dim * self.interlace
        if self.randomize == "nus":
            self._columns = _ordered(self._plain.unsqueeze(0), self.order)
            self._shift = torch.zeros(1, wide, dtype=torch.int64, device=self.device)
            self._roots = words(fold(self.seed, TREE), (copies, wide), self.device)
            return
        columns = self._plain.unsqueeze(0)
        if self.randomize == "lms":
            columns = scrambling.scrambled_columns(self._plain, self._digits, fold(self.seed, MATRIX), copies)
        if self.interlace > 1:
            columns = scrambling.interlaced(columns.mT, self.interlace).mT
        self._columns = _ordered(columns, self.order)
        self._shift = torch.zeros(copies, self.dim, dtype=torch.int64, device=self.device)
        if self.randomize is not None:
            self._shift = words(key, (copies, self.dim), self.device) & MASK

    def integers(self, start: int, end: int) -> Tensor:
        """Points start .. end - 1 as whole numbers of 52 digits, int64."""
        return self._rows(start, end, torch.int64)

    def _make(self, start: int, n: int, dtype: torch.dtype) -> Tensor:
        columns = self._columns
        if self.order == "bit-reversed" and n:
            columns = _reversed(columns, start, n)
        if self.randomize != "nus":
            return digit_sums(Call(columns, self._shift, start, n, False, dtype))
        out = empty((self.copies, n, self.dim), dtype, self.device)
        rows = max(1, CACHED // (self.copies * self.dim * self.interlace))
        for first in range(0, n, rows):
            part = out[:, first : first + rows]
            plain = Call(columns, self._shift, start + first, part.shape[1], False, torch.int64)
            x = scrambling.nested_uniform(digit_sums(plain), self._roots, self._digits)
            if self.interlace > 1:
                x = scrambling.interlaced(x, self.interlace)
            part.copy_(x if dtype == torch.int64 else to_unit(x, dtype))
        return out


def sobol_columns(dims: int) -> Tensor:
    """Direction numbers of Joe and Kuo as columns `[dims, 30]` of 30 digits, from PyTorch's own table."""
    if dims > SobolEngine.MAXDIM:
        raise ValueError(
            f"dim times interlace must be at most {SobolEngine.MAXDIM:,}, Sobol's table here, got {dims:,}"
        )
    return SobolEngine(dims).sobolstate


def _checked(columns: Tensor, digits: int | None, dims: int) -> int:
    """The number of digits of columns that fit together; raises where they do not."""
    if not isinstance(columns, Tensor) or columns.dtype != torch.int64 or columns.ndim != 2:
        raise TypeError("columns must be an int64 tensor [dims, m]")
    if columns.shape[0] < dims:
        raise ValueError(
            f"dim times interlace must be at most {columns.shape[0]}, as columns has, got {dims}"
        )
    if digits is None:
        raise ValueError("digits must say how many rows the matrices of columns have, got None")
    whole_number("digits", digits, 1)
    if digits > BITS:
        raise ValueError(f"digits must be at most {BITS}, got {digits}")
    if columns.min() < 0 or int(columns.max()) >> digits:
        raise ValueError(f"columns must hold numbers of {digits} digits, got up to {columns.max().item()}")
    return digits


def _ordered(columns: Tensor, order: str) -> Tensor:
    """Columns for which index i gives the point of the Gray code of i: bit k of i sets bits k and k - 1."""
    if order != "gray":
        return columns
    before = torch.nn.functional.pad(columns[..., :-1], (1, 0))
    return columns ^ before


def _reversed(columns: Tensor, start: int, n: int) -> Tensor:
    """Columns for which the index is reversed within n = 2^m."""
    if start:
        raise ValueError(f'order="bit-reversed" gives all of 2^m points at once, got a start of {start}')
    return columns[..., : power_of_two("n", n)].flip(-1)
