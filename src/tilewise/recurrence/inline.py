"""InLine attention: normalised by subtraction, so that no two queries read alike, and a local residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.recurrence.mixer import from_heads
from tilewise.recurrence.vision import Grid, VisionMixer, check_odd, features_of
from tilewise.recurrence.whole import whole_attention


class InLine(VisionMixer):
    """Injective linear attention (Han et al., 2024, arXiv 2412.06590).

    Divided by the sum of weights, all queries of one direction read alike: linear attention is not injective.
    Subtracting the mean weight and adding 1/N also gives a sum of 1, and then queries that differ read
    differently wherever the keys span the space. A residual adds each token's neighbours, by a convolution of
    values whose weights a small network makes of the mean token of each image.

    Args:
        width, heads, qk_norm, rope, extra, bias: as of `VisionMixer`.
        features: map of queries and keys, as in `LinearAttention`; None as in the authors' code.
        local: side of the residual's window, 0 for none.

    Raises ValueError for settings that do not fit. Differs from the paper: any grid and padding; frames of a
    video have one network and no window across time.
    """

    def __init__(
        self, width: int, heads: int = 8, *, features: str | None = None, local: int = 3, **options
    ) -> None:
        super().__init__(width, heads, **options)
        self.features, self.local = features_of(features), local
        if local:
            check_odd("local", local)
            # Each head's channels by themselves, as the authors have it.
            self.residual = nn.Sequential(
                nn.Conv1d(width, width, 1, groups=heads),
                nn.GELU(),
                nn.Conv1d(width, width * local**2, 1, groups=heads),
            )

    def forward(self, x: Tensor, grid: Grid | None = None, *, mask: Tensor | None = None) -> Tensor:
        x = self.check(x, grid, mask, needs_grid=bool(self.local))
        q, k, v = self.parts(x)
        q, k = (self.features(self.turned(part, grid)) for part in (q, k))
        out = from_heads(whole_attention(q, k, v, normalize="subtract", mask=mask))
        if self.local and grid is not None and out.numel():
            out = out + self._neighbours(x, from_heads(v), grid, mask)
        return self.finish(out, mask)

    def _neighbours(self, x: Tensor, v: Tensor, grid: Grid, mask: Tensor | None) -> Tensor:
        """Every token's window of values, weighed alike all over an image: `[B, N, width]`."""
        b, n, c = x.shape
        mean = x.sum(1) / (n if mask is None else mask.sum(1, keepdim=True).clamp(min=1))
        v = v if mask is None else v.masked_fill(~mask.unsqueeze(2), 0)
        weights = self.residual(mean.unsqueeze(2)).reshape(b * c, 1, self.local, self.local)
        frames = v[:, self.extra :].unflatten(1, (-1, *grid[-2:]))  # [b, t, h, w, c]
        frames = frames.permute(1, 0, 4, 2, 3).flatten(1, 2)  # [t, b * c, h, w]
        made = F.conv2d(frames, weights, padding=self.local // 2, groups=b * c)
        made = made.unflatten(1, (b, c)).permute(1, 0, 3, 4, 2).flatten(1, 3)
        return F.pad(made, (0, 0, self.extra, 0)) if self.extra else made


def spread(k: Tensor, scale: float | None = None) -> Tensor:
    """How far apart InLine keeps queries: `|weights(p) - weights(q)| >= spread(k) |p - q|`.

    Args:
        k: features of keys, `[..., N, D]`. scale: as in `whole_attention`.

    Returns `[...]`: the smallest singular value of the map from queries to weights, `scale / N` times that of
    the keys around their mean. It is 0 where these do not span the space, and there alone do two queries read
    alike.
    """
    if k.ndim < 2 or not k.shape[-1]:
        raise ValueError(f"k must be [..., N, D], got {list(k.shape)}")
    n, dim = k.shape[-2:]
    if n < dim:
        return torch.zeros(k.shape[:-2], dtype=k.dtype, device=k.device)
    scale = dim**-0.5 if scale is None else scale
    return abs(scale) / n * torch.linalg.svdvals(k - k.mean(-2, keepdim=True))[..., -1]
