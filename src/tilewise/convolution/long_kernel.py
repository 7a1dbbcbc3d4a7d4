"""Long kernels learned directly, kept smooth by simple means, and the layer of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.convolution.api import long_conv
from tilewise.recurrence.mixer import Mixer, check_width
from tilewise.recurrence.model import mixer


def squash(kernel: Tensor, threshold: float) -> Tensor:
    """Each weight moved towards 0 by `threshold`, and 0 below it: `sign(k) * relu(|k| - threshold)`.

    Small weights, of which an unneeded tap's noise is made, vanish; so the kernel's transform becomes smooth.
    Raises ValueError for a threshold below 0.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold!r}")
    return F.softshrink(kernel, threshold) if threshold else kernel


def smooth(kernel: Tensor, width: int) -> Tensor:
    """The mean over `width` taps around each, of `[C, K]`; beyond the ends there are zeros.

    Raises ValueError for a width that is not odd.
    """
    if not isinstance(width, int) or width < 1 or width % 2 == 0:
        raise ValueError(f"width must be odd and at least 1, got {width!r}")
    return kernel if width == 1 else F.avg_pool1d(kernel.unsqueeze(0), width, 1, width // 2).squeeze(0)


@mixer("long-conv")
class LongConv(Mixer):
    """Each channel with a long kernel that is learned tap by tap (Fu et al., 2023, arXiv 2302.06646).

    `out(glu(gelu(conv(x) + skip * x)))`. The kernel is squashed, smoothed, and thinned by dropout before it
    is used; without any of them such kernels fit noise.

    Args:
        width: channels. taps: of a kernel; what lies further back is not read. squash: the threshold of
            `squash`.
        smooth: the width of `smooth`. dropout: share of taps left out in training.
        decay: kernels start as noise that fades to `exp(-decay)` at their end, at rates from 0 to it by
            channel ("geometric"); 0 starts all alike ("random").

    The state is what the kernel still reaches of the past, `taps - 1` tokens. Differs from the paper in one
    direction only (its classifiers also convolve backwards: see `two_sided_conv`). Raises ValueError for
    sizes below 1.
    """

    def __init__(
        self,
        width: int,
        taps: int = 1024,
        squash: float = 0.003,
        smooth: int = 1,
        dropout: float = 0.0,
        decay: float = 8.0,
    ) -> None:
        super().__init__()
        check_width(width, 1)
        check_width(taps, 1, "taps")
        self.squash, self.smooth, self.dropout = squash, smooth, nn.Dropout(dropout)
        fade = torch.exp(-torch.linspace(0, decay, width).unsqueeze(1) * torch.linspace(0, 1, taps))
        start = torch.randn(width, taps) * fade
        # Of length 1 once it is squashed, which leaves some of a short kernel at least.
        start = start / start.norm(dim=1, keepdim=True)
        self.taps = nn.Parameter(start + squash * start.sign())
        self.skip = nn.Parameter(torch.randn(width))
        self.out = nn.Linear(width, 2 * width)

    def kernel(self) -> Tensor:
        """As it is used, `[C, K]`."""
        return smooth(squash(self.dropout(self.taps), self.squash), self.smooth)

    def forward(self, x: Tensor, state=None, *, mask=None, cu_seqlens=None):
        made, after = long_conv(
            x.mT, self.kernel(), skip=self.skip, state=state, mask=mask, cu_seqlens=cu_seqlens,
            return_state=True,
        )  # fmt: skip
        y = F.glu(self.out(F.gelu(made.mT)), dim=-1)
        return (y if mask is None else y.masked_fill(~mask.unsqueeze(2), 0)), after
