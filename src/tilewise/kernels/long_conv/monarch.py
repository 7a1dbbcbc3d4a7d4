"""The monarch engine: the discrete Fourier transform as two products of matrices, any device and dtype.

After FlashFFTConv (Fu et al., 2023, arXiv 2311.05908): numbers are laid out as a matrix `[A, L / A]`, a DFT
of length A runs along its columns as a matrix product, then factors, then one along its rows. Frequency `r +
A c` comes to stand in row r and column c, in the same place for inputs and kernel, so nothing is ever put in
order. Rows and
columns that hold nothing that counts are left out of both matrices: that is what sparsity in frequency saves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.kernels.long_conv import op
from tilewise.kernels.long_conv.call import Call
from tilewise.kernels.long_conv.plan import Plan, plan
from tilewise.kernels.long_conv.windows import Transform, backward, forward

UNEVEN = 8  # a circular length in one piece has two factors within this quotient, unless it is short


def refuse(call: Call) -> str | None:
    """Why it cannot run the call."""
    n = call.x.shape[2]
    if call.sparse and n % call.rows:
        return f"{call.rows} rows of frequencies must divide the length, got {n}"
    return None


def run(call: Call) -> Tensor:
    """Outputs of `call`."""
    return op.run(call, "monarch")


def factor(n: int, most: int | None = None) -> int:
    """The largest divisor of n up to `most`; None is its root."""
    return max(a for a in range(1, (math.isqrt(n) if most is None else most) + 1) if n % a == 0)


@dataclass(frozen=True, eq=False)
class Monarch:
    """The two matrices of a DFT, and the factors between them, of the rows and columns that are wanted.

    Attributes:
        first: `[rows, A]`. between: `[rows, L / A]`. second: `[L / A, columns]`. frequencies: `[rows,
            columns]`.
    """

    first: Tensor
    between: Tensor
    second: Tensor
    frequencies: Tensor

    @classmethod
    def of(
        cls,
        length: int,
        a: int,
        rows: list[int],
        columns: list[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Monarch:
        b = length // a
        r, c = (torch.tensor(one, device=device) for one in (rows, columns))
        n1, n2 = torch.arange(a, device=device), torch.arange(b, device=device)

        def turns(numbers: Tensor, of: int) -> Tensor:
            angle = (-2 * math.pi / of) * (numbers % of).double()  # reduced first: exact for any length
            return torch.polar(torch.ones_like(angle), angle).to(dtype)

        return cls(
            turns(r.unsqueeze(1) * n1, a),
            turns(r.unsqueeze(1) * n2, length),
            turns(n2.unsqueeze(1) * c, b),
            r.unsqueeze(1) + a * c,
        )

    @property
    def products(self) -> int:
        """Complex products of numbers in one transform."""
        rows, a = self.first.shape
        b, columns = self.second.shape
        return rows * b * (a + 1 + columns)

    def forward(self, x: Tensor) -> Tensor:
        made = self.first @ x.unflatten(-1, (self.first.shape[1], -1)).to(self.first.dtype)
        return (made * self.between) @ self.second

    def inverse(self, made: Tensor, length: int) -> Tensor:
        # Conjugates are made, not marked: marks are lost where a compiled graph calls the operator.
        first, between, second = (part.conj_physical() for part in (self.first, self.between, self.second))
        rows = (made @ second.mT) * between
        return (first.mT @ rows).real.flatten(-2) / length

    def transform(self) -> Transform:
        """As windows want it."""
        return Transform(self.forward, self.inverse, lambda counts: counts[self.frequencies])


def matrices(call: Call, length: int) -> Monarch:
    """Those of a call whose transforms have this length."""
    complex_dtype = torch.complex128 if call.wide == torch.float64 else torch.complex64
    if not call.sparse:
        return whole(length, complex_dtype, call.x.device)
    a = call.rows * factor(length // call.rows, max(1, math.isqrt(length) // call.rows))
    rows = [r for r in range(a) if r % call.rows in call.kept]
    grid = call.counts().view(length // a, a).T[rows]  # [rows, columns]
    return Monarch.of(length, a, rows, grid.any(0).nonzero().flatten().tolist(), complex_dtype, call.x.device)


def whole(length: int, dtype: torch.dtype, device: torch.device) -> Monarch:
    """Of a transform of which nothing is left out."""
    a = factor(length)
    return Monarch.of(length, a, list(range(a)), list(range(length // a)), dtype, device)


def _plan(call: Call) -> Plan:
    def exact(n: int) -> bool:
        return call.sparse or n // factor(n) <= max(64, UNEVEN * factor(n))

    return plan(call, shortest=64, exact=exact)


def _forward(call: Call) -> Tensor:
    if not call.x.numel():
        return call.x.new_empty(call.x.shape)
    cut = _plan(call)
    return forward(call, cut, matrices(call, cut.length).transform())


def _backward(call: Call, d_out: Tensor, for_kernel: bool) -> op.Gradients:
    cut = _plan(call)
    return backward(call, cut, matrices(call, cut.length).transform(), d_out, for_kernel)


op.IMPLEMENTATIONS["monarch"] = op.Implementation(_forward, _backward)
