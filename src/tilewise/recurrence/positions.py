"""Where tokens stand in their sequences, padding and packing taken into account."""

from __future__ import annotations

import torch
from torch import Tensor


def positions(
    x: Tensor, seen: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Each token's place in its sequence, int64 `[B, N]`, and how many tokens each sequence has had then, `[S]`.

    `x [B, N, ...]` gives the shape; `seen [S]` is how many tokens came before, None for none. Padding (`mask`,
    `[B, N]`, False) has the place of the token before it, at least 0; with `cu_seqlens` places begin anew.
    """
    b, n = x.shape[:2]
    if cu_seqlens is not None:
        offsets = cu_seqlens.to(x.device, torch.int64)
        lengths = offsets[1:] - offsets[:-1]
        tokens = torch.arange(n, device=x.device)
        owner = torch.searchsorted(offsets[1:].contiguous(), tokens, right=True)
        before = torch.zeros_like(lengths) if seen is None else seen
        return (tokens - offsets[owner] + before[owner]).unsqueeze(0), before + lengths
    before = torch.zeros(b, dtype=torch.int64, device=x.device) if seen is None else seen
    if mask is None:
        return before.unsqueeze(1) + torch.arange(n, device=x.device), before + n
    counted = mask.long().cumsum(1)
    return before.unsqueeze(1) + (counted - 1).clamp(min=0), before + mask.sum(1)
