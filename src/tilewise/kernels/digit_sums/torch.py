"""The torch engine: points written block by block, on any device.

Point i of a digital net is a shift plus (exclusive or) the columns of the bits that are set in i; point i
of a lattice is the same with addition modulo 1. So the points of an aligned block of indices are those of
the first block, all joined with one offset: a block that stays in the processor's cache is made once by
doubling, and each further point costs one operation that joins and one that makes a float of it. No loop
runs over points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.kernels.digit_sums import op
from tilewise.kernels.digit_sums.call import Call
from tilewise.kernels.digit_sums.digits import BITS, MASK, ONE, to_unit
from tilewise.kernels.digit_sums.memory import empty

BLOCK = 1 << 19  # numbers of a block: 4 MB; half as many took 1.4 times as long, in more and shorter calls


def refuse(call: Call) -> str | None:
    """It can run every call."""
    return None


def run(call: Call) -> Tensor:
    """`[copies, n, d]` of the call's dtype."""
    return op.run(call, "torch")


def forward(call: Call) -> Tensor:
    """The operator on this engine."""
    out = empty(call.shape, call.dtype, call.shift.device)
    _fill(out, call.columns, call.shift, call.start, call.add)
    return out


def _fill(out: Tensor, columns: Tensor, shift: Tensor, start: int, add: bool) -> None:
    """Write points start, start + 1, ... into `out`, `[copies, n, d]`; the rest as in `Call`."""
    copies, n, d = out.shape
    if not out.numel():
        return
    end = start + n
    low = _rows(copies * d, n, columns.shape[2])
    first, last = start >> low, (end - 1 >> low) + 1
    if last == 1:
        offsets = shift.unsqueeze(1)
    else:
        offsets = torch.zeros(copies, last - first, d, dtype=torch.int64, device=out.device)
        _fill(offsets, columns[..., low:], shift, first, add)
    base = _doubled(columns[..., :low], add)
    if out.dtype == torch.float64:
        base, offsets = (to_unit(base), to_unit(offsets)) if add else (base | ONE, offsets)
    for i, block in enumerate(range(first, last)):
        begin, stop = max(start, block << low), min(end, block + 1 << low)
        rows = base[:, begin - (block << low) : stop - (block << low)]
        _join(rows, offsets[:, i : i + 1], out[:, begin - start : stop - start], add)


def _rows(wide: int, n: int, columns: int) -> int:
    """Logarithm of the rows of a block: few enough for the cache, no more than are asked for."""
    return min(columns, max(1, min((BLOCK // wide).bit_length() - 1, (n - 1).bit_length())))


def _doubled(columns: Tensor, add: bool) -> Tensor:
    """Digits of all indices below 2^m, `[copies, 2^m, d]`, without a shift."""
    rows = torch.zeros(columns.shape[0], 1, columns.shape[1], dtype=torch.int64, device=columns.device)
    for k in range(columns.shape[2]):
        column = columns[:, None, :, k]
        rows = torch.cat((rows, rows + column & MASK if add else rows ^ column), 1)
    return rows


def _join(rows: Tensor, offset: Tensor, out: Tensor, add: bool) -> None:
    if out.dtype == torch.float64 and add:
        torch.add(rows, offset, out=out).frac_()  # exact: a sum below 2 of multiples of 2^-52
    elif out.dtype == torch.float64:
        torch.bitwise_xor(rows, offset, out=out.view(torch.int64))  # digits of 1 + x; 1 is taken away exactly
        out.sub_(1)
    elif out.dtype == torch.int64 and add:
        torch.add(rows, offset, out=out).bitwise_and_(MASK)
    elif out.dtype == torch.int64:
        torch.bitwise_xor(rows, offset, out=out)
    else:
        digits = rows + offset & MASK if add else rows ^ offset
        out.copy_((digits >> BITS - 24).to(out.dtype)).mul_(2.0**-24)


op.IMPLEMENTATIONS["torch"] = forward
