"""LiT: few heads of linear attention beside a convolution, and distillation of noise and variance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from tilewise.recurrence.distil import Loss, Pairs
from tilewise.recurrence.mixer import from_heads
from tilewise.recurrence.vision import Grid, LocalConv, VisionMixer, features_of
from tilewise.recurrence.whole import whole_attention


class LiT(VisionMixer):
    """Linear attention of a linear diffusion transformer (Wang et al., 2025, arXiv 2501.12976).

    ReLU features, few heads (the state of a head is the square of its size, and so is what it can tell apart;
    the product of all heads' sizes is the same), and a depthwise convolution of the values that is added to
    what attention gives.

    Args:
        width, qk_norm, rope, extra, bias: as of `VisionMixer`. heads: few.
        conv: side of the convolution's window, 0 for none. features: map of queries and keys.

    Raises ValueError for settings that do not fit. Differs from the paper, whose code is not published: the
    convolution is of values, as in focused linear attention; 1e-6 keeps denominators off 0; padding.
    """

    def __init__(
        self, width: int, heads: int = 2, *, conv: int = 5, features: str | None = "relu", **options
    ) -> None:
        super().__init__(width, heads, **options)
        self.features = features_of(features)
        self.conv = LocalConv(width, conv, self.extra) if conv else None

    def forward(self, x: Tensor, grid: Grid | None = None, *, mask: Tensor | None = None) -> Tensor:
        x = self.check(x, grid, mask, needs_grid=self.conv is not None)
        q, k, v = self.parts(x)
        plain = self.features(q), self.features(k)
        q, k = (self.turned(part, grid) for part in plain)
        # Features turned after the map may make denominators negative; those that are not turned cannot.
        out = from_heads(whole_attention(q, k, v, eps=1e-6, weigh=plain, mask=mask))
        if self.conv is not None and grid is not None:
            values = from_heads(v)
            out = out + self.conv(values if mask is None else values.masked_fill(~mask.unsqueeze(2), 0), grid)
        return self.finish(out, mask)


def hybrid_loss(
    task: Callable[[Tensor, Any], Tensor], noise: float = 0.5, variance: float | None = 0.05
) -> Loss:
    """LiT's loss for `distil`: the task's own, and squared distances from the teacher's noise and variance.

    Args:
        task: `task(the student's output, batch)`, a scalar.
        noise, variance: weights of the two distances, the defaults ours. The first half of an output's last
            axis is noise and the second half variance; with `variance=None` all of it is noise.

    Raises ValueError for outputs whose last axis has no halves.
    """

    def loss(pairs: Pairs, batch: Any) -> Tensor:
        told, found = pairs[""]
        total = task(found, batch)
        if variance is None:
            return total + noise * F.mse_loss(found, told)
        if told.shape[-1] % 2:
            raise ValueError(f"outputs must end in noise and variance, halves, got {list(told.shape)}")
        (told_noise, told_var), (own_noise, own_var) = told.chunk(2, -1), found.chunk(2, -1)
        return total + noise * F.mse_loss(own_noise, told_noise) + variance * F.mse_loss(own_var, told_var)

    return loss
