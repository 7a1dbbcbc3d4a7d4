"""Partial results of attention, and their exact merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention over some of the keys, with what is needed to add the rest.

    Attributes:
        out: `[B, H, N_q, D_v]`, normalised over the keys it covers; 0 where it covers none.
        lse: float32 `[B, H, N_q]`, natural log of the sum of exponentiated scores; -inf where it covers none.
    """

    out: Tensor
    lse: Tensor


def merge(partials: Sequence[Partial]) -> Partial:
    """Attention over the union of disjoint key sets. Exact, associative and differentiable.

    Args:
        partials: at least one, all of the same shape.
    Returns:
        The merged `Partial`; rows that no part covers have out 0 and lse -inf, with gradient 0.
    """
    if not partials:
        raise ValueError("merge needs at least one partial result, got none")
    if len(partials) == 1:
        return partials[0]
    lse = torch.stack([p.lse for p in partials])  # [P, B, H, N]
    top = lse.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (lse - top).exp()
    total = weights.sum(0)
    empty = total == 0
    safe = total.masked_fill(empty, 1)
    out = sum(p.out * (w / safe).unsqueeze(-1) for p, w in zip(partials, weights))
    merged = (safe.log() + top).masked_fill(empty, -torch.inf)
    return Partial(out.to(partials[0].out.dtype), merged)
