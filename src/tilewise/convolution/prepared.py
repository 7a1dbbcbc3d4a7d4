"""A kernel that stays as it is, with what engines can compute of it once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.convolution.checks import check_kernel, check_sparsity
from tilewise.convolution.frequency import FrequencySparsity
from tilewise.kernels import long_conv as kernel_op
from tilewise.kernels.long_conv import native


@dataclass(frozen=True, eq=False)
class PreparedKernel:
    """A kernel for inference, from `prepare`; `long_conv` takes it as `kernel`.

    Attributes:
        kernel: `[C, K]`. n: the length of sequences it was prepared for; others work, but may compute
            transforms anew. causal, sparsity: calls must say the same.
        transform: of the native engine, or None where that cannot run.
    """

    kernel: Tensor
    n: int
    causal: bool
    sparsity: FrequencySparsity | None
    transform: Tensor | None

    @property
    def bytes(self) -> int:
        """What it holds."""
        parts = [self.kernel, *([] if self.transform is None else [self.transform])]
        return sum(part.numel() * part.element_size() for part in parts)

    def of(self, n: int, before: bool) -> Tensor | None:
        """The transform, where it is that of a call over n tokens, with or without earlier ones."""
        size = self.kernel.shape[1]
        reached = size if before else min(size, n)
        same = n == self.n if not self.causal else reached == min(size, self.n)
        return self.transform if same else None


def prepare(
    kernel: Tensor, n: int, *, causal: bool = True, sparsity: FrequencySparsity | None = None
) -> PreparedKernel:
    """A fixed kernel with its transform, which `long_conv` then need not compute for every call.

    Args:
        kernel: `[C, K]`, floating. n: length of the sequences, at least 1. causal, sparsity: as for
            `long_conv`.

    The transform of a channel is `8 L` bytes, L the next power of 2 of `n + K`. A prepared kernel learns
    nothing.
    Raises ValueError and TypeError for arguments that do not fit.
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n must be an integer >= 1, got {n!r}")
    check_kernel(kernel)
    rows, kept, band = check_sparsity(sparsity, causal, n)
    fixed = kernel.detach().to(torch.float64 if kernel.dtype == torch.float64 else torch.float32)
    call = kernel_op.Call(
        fixed.new_empty(1, 1, n).expand(1, fixed.shape[0], n),
        fixed,
        causal=causal,
        rows=rows,
        kept=kept,
        band=band,
    )
    transform = None if native.refuse(call) else native.prepare(call)
    return PreparedKernel(fixed, n, causal, sparsity, transform)
