"""Solving (C + ridge I) x = b for each query of a tile, C the weighted covariance of the keys it sees."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(
    times: Callable[[Tensor], Tensor], rhs: Tensor, ridge: Tensor, limit: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """x with |b - A x| <= `limit` in each row, or as near as `steps` steps come; and |b - A x|.

    A = C + ridge I is known by its products: `times(p)` gives C p. `rhs [B, H, m, D]`; `ridge`, `limit` and the
    returned residual `[B, H, m, 1]`. Rows stop alone: what happens in one does not change a bit of another. The
    residual is the one that the recurrence carries, which differs from b - A x by rounding.
    """
    x, r, p = torch.zeros_like(rhs), rhs, rhs
    size = r.square().sum(-1, keepdim=True)
    # A residual below rounding of the right side cannot be told from none.
    limit = torch.maximum(limit.square(), torch.finfo(rhs.dtype).eps ** 2 * size)
    for _ in range(steps):
        live = size > limit
        if not live.any():
            break
        product = times(p) + ridge * p
        curve = (p * product).sum(-1, keepdim=True)
        live = live & (curve > 0)
        step = torch.where(live, size / curve.masked_fill(~live, 1), 0)
        x = x + step * p
        r = r - step * product
        after = r.square().sum(-1, keepdim=True)
        p = torch.where(live, r + after / size.masked_fill(~live, 1) * p, p)
        size = torch.where(live, after, size)
    return x, size.sqrt()


def cholesky(covariance: Tensor, rhs: Tensor, ridge: Tensor) -> Tensor:
    """x from the matrices themselves: `covariance [B, H, m, D, D]`, `rhs [B, H, m, D]`, `ridge [B, H, m, 1]`.

    Raises torch.linalg.LinAlgError where `ridge` is so small that rounding leaves a matrix indefinite.
    """
    eye = torch.eye(rhs.shape[3], dtype=rhs.dtype, device=rhs.device)
    factor = torch.linalg.cholesky(covariance + ridge.unsqueeze(-1) * eye)
    return torch.cholesky_solve(rhs.unsqueeze(-1), factor).squeeze(-1)
