"""Linear algebra over the field of two elements; a row is the bits of an integer."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Basis:
    """Independent rows, reduced so far that no two have their highest bit at one place."""

    def __init__(self, rows: Iterable[int] = ()) -> None:
        self._rows: dict[int, int] = {}  # by the place of the highest bit
        for row in rows:
            self.add(row)

    def add(self, row: int) -> bool:
        """Take a row in if it is independent of those held; whether it was."""
        while row:
            top = row.bit_length() - 1
            if top not in self._rows:
                self._rows[top] = row
                return True
            row ^= self._rows[top]
        return False

    def __len__(self) -> int:
        return len(self._rows)


def independent(start: Sequence[int], candidates: Iterable[int], size: int) -> list[int]:
    """Places of the first candidates that, with the rows of `start`, make up a basis of `size` bits.

    Fewer where the candidates do not suffice.
    """
    basis, taken = Basis(start), []
    for place, row in enumerate(candidates):
        if len(basis) == size:
            break
        if basis.add(row):
            taken.append(place)
    return taken


def random_rows(count: int, size: int, source: random.Random) -> list[int]:
    """Independent random rows of `size` bits; `count <= size`."""
    basis, rows = Basis(), []
    while len(rows) < count:
        row = source.getrandbits(size)
        if basis.add(row):
            rows.append(row)
    return rows


def inverse(rows: Sequence[int]) -> list[int]:
    """The rows of the inverse of a square invertible matrix. Raises ValueError where it has none."""
    size = len(rows)
    work = [row | 1 << (size + i) for i, row in enumerate(rows)]
    for column in range(size):
        pivot = next((i for i in range(column, size) if work[i] >> column & 1), None)
        if pivot is None:
            raise ValueError("the rows are dependent")
        work[column], work[pivot] = work[pivot], work[column]
        for i in range(size):
            if i != column and work[i] >> column & 1:
                work[i] ^= work[column]
    return [row >> size for row in work]


def transposed(rows: Sequence[int]) -> list[int]:
    """The columns of a square matrix, as rows."""
    return [sum((row >> i & 1) << j for j, row in enumerate(rows)) for i in range(len(rows))]


def span(columns: Sequence[int]) -> Tensor:
    """All sums of columns, int64 `[2 ** len(columns)]`: place l is the sum of those whose bit is set in l."""
    found = torch.zeros(1, dtype=torch.int64)
    for column in columns:
        found = torch.cat((found, found ^ column))
    return found
