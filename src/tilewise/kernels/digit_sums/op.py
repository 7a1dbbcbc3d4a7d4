"""The custom operator `tilewise::digit_sums`, shared by all engines. Whole numbers have no gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tilewise.kernels.digit_sums.call import Call

IMPLEMENTATIONS: dict[str, Callable[[Call], Tensor]] = {}


def run(call: Call, engine: str) -> Tensor:
    """Run `call` on the registered engine: through the custom operator where the compiler has to see it."""
    if torch.compiler.is_compiling() or type(call.shift) is not Tensor:
        return torch.ops.tilewise.digit_sums(
            call.columns, call.shift, call.start, call.n, call.add, call.dtype, engine
        )
    return IMPLEMENTATIONS[engine](call)


@torch.library.custom_op("tilewise::digit_sums", mutates_args=())
def digit_sums(
    columns: Tensor, shift: Tensor, start: int, n: int, add: bool, dtype: torch.dtype, engine: str
) -> Tensor:
    """`tilewise::digit_sums`: the points of the call, by the named engine."""
    return IMPLEMENTATIONS[engine](Call(columns, shift, start, n, add, dtype))


@digit_sums.register_fake
def _(columns, shift, start, n, add, dtype, engine):
    return shift.new_empty((shift.shape[0], n, shift.shape[1]), dtype=dtype)
