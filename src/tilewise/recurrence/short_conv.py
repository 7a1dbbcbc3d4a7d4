"""A short causal convolution over tokens, whose last inputs are carried on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class ShortConv(nn.Module):
    """Each channel's weighted sum over its last `width` tokens, the token itself included.

    Args:
        channels, width: sizes; a width of 1 only scales. bias: whether to add one.

    `forward` takes `x [B, N, C]` and what was carried, `tail [S, width - 1, C]` (None: nothing came before), and
    gives `[B, N, C]` and the new tail. `mask` and `cu_seqlens` are as in `tilewise.recurrence.scan`: padding is
    passed over, as if it were not there, and packed sequences do not see each other.

    Raises ValueError for sizes below 1 and for a tail of another shape.
    """

    def __init__(self, channels: int, width: int = 4, bias: bool = False) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("width", width)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        self.channels, self.width = channels, width
        self.weight = nn.Parameter(torch.randn(width, channels) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(
        self,
        x: Tensor,
        tail: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = (sequences, self.width - 1, self.channels)
        if tail is None:
            tail = x.new_zeros(shape)
        elif tuple(tail.shape) != shape:
            raise ValueError(f"tail must be {list(shape)}, got {list(tail.shape)}")
        tail = tail.to(x.dtype)
        if cu_seqlens is not None:
            return self._packed(x, tail, cu_seqlens.to(x.device, torch.int64))
        if mask is not None:
            return self._padded(x, tail, mask)
        extended = torch.cat((tail, x), 1)
        return self._run(extended), extended[:, extended.shape[1] - self.width + 1 :]

    def _run(self, extended: Tensor) -> Tensor:
        """`[B, N + width - 1, C]` to `[B, N, C]`."""
        n, weight = extended.shape[1] - self.width + 1, self.weight.to(extended.dtype)
        out = extended[:, :n] * weight[0]
        for j in range(1, self.width):
            out = out + extended[:, j : n + j] * weight[j]
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _padded(self, x: Tensor, tail: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        # Tokens first, padding behind them, and back again.
        order = (~mask).long().argsort(dim=1, stable=True)
        moved = x.masked_fill(~mask.unsqueeze(2), 0).take_along_dim(order.unsqueeze(2), 1)
        extended = torch.cat((tail, moved), 1)
        out = self._run(extended).take_along_dim(order.argsort(1).unsqueeze(2), 1)
        last = mask.sum(1, keepdim=True) + torch.arange(self.width - 1, device=x.device)
        return out.masked_fill(~mask.unsqueeze(2), 0), extended.take_along_dim(last.unsqueeze(2), 1)

    def _packed(self, x: Tensor, tail: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        # Every sequence behind its own tail.
        n, lead = x.shape[1], self.width - 1
        owner = torch.searchsorted(offsets[1:].contiguous(), torch.arange(n, device=x.device), right=True)
        places = torch.arange(n, device=x.device) + lead * (owner + 1)
        starts = offsets[:-1] + lead * torch.arange(len(offsets) - 1, device=x.device)
        heads = starts.unsqueeze(1) + torch.arange(lead, device=x.device)
        extended = x.new_zeros(1, n + lead * (len(offsets) - 1), x.shape[2])
        extended = extended.index_copy(1, places, x).index_copy(
            1, heads.flatten(), tail.flatten(0, 1).unsqueeze(0)
        )
        out = self._run(extended).index_select(1, places - lead)
        return out, extended[0, heads + (offsets[1:] - offsets[:-1]).unsqueeze(1)]


def convolved(
    convs: Iterable[nn.Module], parts: Sequence[Tensor], tails: Sequence[Tensor] | None, **packing
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Each part through its own `ShortConv`, and their tails; the parts as they are where there are none."""
    convs = list(convs)
    if not convs:
        return list(parts), ()
    before = [None] * len(convs) if tails is None else tails
    made = [conv(part, tail, **packing) for conv, part, tail in zip(convs, parts, before)]
    return [part for part, _ in made], tuple(tail for _, tail in made)
