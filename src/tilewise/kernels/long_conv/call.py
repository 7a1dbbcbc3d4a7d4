"""What an engine of the long convolution receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """A convolution along the last axis, each channel with its own kernel.

    With `u = gate_in * x` and `z_t = sum_k kernel_k u_{t-k}`, the output is `gate_out * (z + skip * u)`.
    Inputs before the first are `before` where `causal`, and otherwise those at the end: t - k counts modulo
    N.

    Args:
        x: `[B, C, N]`, any strides. kernel: `[C, K]`, K >= 1.
        gate_in, gate_out: like x; None is 1. skip: `[C]`; None is 0.
        before: `[B, C, K - 1]`, earlier values of u, the oldest first; None is zeros. Only where `causal`.
        transform: the kernel's transform as the native engine lays it out, `[C, 2, L]`; None computes it.
        causal: see above.
        rows, kept, band: which frequencies f of the kernel, of N in all, count: those of `kept` among the
            classes `f mod rows`, and of them those whose distance to a multiple of N is at most `band * N /
            2`. Others count as 0. Only where not `causal`.

    x and the gates have one dtype; kernel, skip and before are float32, float64 when x is.
    """

    x: Tensor
    kernel: Tensor
    gate_in: Tensor | None = None
    gate_out: Tensor | None = None
    skip: Tensor | None = None
    before: Tensor | None = None
    transform: Tensor | None = None
    causal: bool = True
    rows: int = 1
    kept: tuple[int, ...] = (0,)
    band: float = 1.0

    @property
    def wide(self) -> torch.dtype:
        """What is accumulated in."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def sparse(self) -> bool:
        """Whether some frequencies do not count."""
        return len(self.kept) < self.rows or self.band < 1

    @property
    def taps(self) -> int:
        """How much of the kernel can be reached."""
        n, size = self.x.shape[2], self.kernel.shape[1]
        return size if self.before is not None else max(1, min(size, n))

    def folded(self) -> Tensor:
        """The taps that can be reached, `[C, taps]`: beyond N a circular kernel begins anew."""
        n, size = self.x.shape[2], self.kernel.shape[1]
        if self.causal or size <= n or not n:
            return self.kernel[:, : self.taps]
        pad = torch.nn.functional.pad(self.kernel, (0, -size % n))
        return pad.unflatten(1, (-1, n)).sum(1)

    def cut(self) -> int:
        """The highest frequency that counts."""
        return int(self.band * self.x.shape[2] / 2)

    def counts(self) -> Tensor:
        """Bool `[N]`: the frequencies that count."""
        n = self.x.shape[2]
        f = torch.arange(n, device=self.x.device)
        own = torch.zeros(self.rows, dtype=torch.bool, device=self.x.device)
        own[list(self.kept)] = True
        return own[f % self.rows] & (torch.minimum(f, n - f) <= self.cut())
