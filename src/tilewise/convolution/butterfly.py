"""Circular convolution through a transform whose own coefficients are learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tilewise.convolution.long_kernel import smooth, squash
from tilewise.kernels.long_conv.monarch import Monarch, factor
from tilewise.recurrence.mixer import check_width


class LearnedButterfly(nn.Module):
    """Long kernels over a learned transform (FlashButterfly's extension, Fu et al., 2023, arXiv 2302.06646).

    `y = M^-1 (M k * M u) + skip * u`, where M is a DFT in block-butterfly form: a product along the columns
    of a matrix of the numbers, factors, and a product along its rows. As it starts, this is the circular
    convolution of `long_conv(..., causal=False)`. All coefficients of M are learned, so the layer goes on to
    compute more than convolutions, in as many operations.

    Args:
        channels, length: sizes. Inputs are `[B, channels, N]`, N up to the length, with zeros behind; give
            twice the longest N for what starts as a causal convolution.
        block: length of the first of the two products, a divisor of the length; None takes one near its root.
        learn: whether the coefficients are; False leaves a convolution. squash_at, smooth_over: as in
            `LongConv`.

    Nothing keeps a learned transform causal: later tokens reach earlier outputs as soon as it has moved, so
    it is no `Mixer` and has no state. Differs from the paper in that the way back is the adjoint, its values
    conjugated and turned over, which needs no order of frequencies. Raises ValueError for sizes that do not
    fit.
    """

    frequencies: Tensor

    def __init__(
        self,
        channels: int,
        length: int,
        block: int | None = None,
        learn: bool = True,
        squash_at: float = 0.0,
        smooth_over: int = 1,
    ) -> None:
        super().__init__()
        check_width(channels, 1, "channels")
        check_width(length, 1, "length")
        a = factor(length) if block is None else block
        if not isinstance(a, int) or a < 1 or length % a:
            raise ValueError(f"block must divide the length {length}, got {block!r}")
        start = Monarch.of(
            length, a, list(range(a)), list(range(length // a)), torch.complex64, torch.device("cpu")
        )
        self.length, self.squash_at, self.smooth_over = length, squash_at, smooth_over
        self.first, self.between, self.second = (
            nn.Parameter(torch.view_as_real(part).clone(), requires_grad=learn)
            for part in (start.first, start.between, start.second)
        )
        self.register_buffer("frequencies", start.frequencies, persistent=False)
        fade = torch.exp(-8 * torch.linspace(0, 1, length))
        self.kernel = nn.Parameter(torch.randn(channels, length) * fade / fade.norm())
        self.skip = nn.Parameter(torch.zeros(channels))

    @property
    def transform(self) -> Monarch:
        """M as it is now."""
        first, between, second = map(torch.view_as_complex, (self.first, self.between, self.second))
        return Monarch(first, between, second, self.frequencies)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[1] != self.kernel.shape[0] or x.shape[2] > self.length:
            raise ValueError(
                f"x must be [B, {self.kernel.shape[0]}, N] with N up to {self.length}, got shape"
                f" {tuple(x.shape)}"
            )
        n, transform = x.shape[2], self.transform
        u = torch.nn.functional.pad(x.to(self.kernel.dtype), (0, self.length - n))
        kernel = smooth(squash(self.kernel, self.squash_at), self.smooth_over)
        made = transform.inverse(transform.forward(u) * transform.forward(kernel), self.length)[..., :n]
        return (made + self.skip.unsqueeze(1) * u[..., :n]).to(x.dtype)
