"""Local linear attention as a function and a module."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tilewise.attention.api import bind
from tilewise.attention.local_linear import op
from tilewise.attention.local_linear.blockwise import Problem
from tilewise.tiles import Mask

SOLVERS = ("cg", "cholesky")


class LocalLinear(NamedTuple):
    """Outputs `[B, H, N_q, D_v]`, and how far each may lie from a solve carried to its end, `[B, H, N_q]`.

    The bound is in standard deviations of the values that the query sees, by its softmax weights: a channel of the
    output with standard deviation s is off by at most bound * s, and by rounding. It is 0 for Cholesky factors.
    """

    out: Tensor
    bound: Tensor


def local_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    mask: Mask | Tensor | str | None = None, ridge: float | Tensor = 1.0, scale: float | None = None,
    solver: str = "cg", tolerance: float | None = None, steps: int | None = None,
    tile: tuple[int, int] = (128, 128), return_bound: bool = False,
) -> Tensor | LocalLinear:  # fmt: skip
    """Local linear attention (Zuo et al., 2025, arXiv 2510.01450): each query regresses values on the keys near it.

    Softmax attention is a weighted mean of values, a local constant. Here query i fits v_j ~ b + W (k_j - q_i) by
    least squares with the weights exp(scale q_i . k_j) and a ridge on W, and gives out b, the fit at k = q_i. Large
    `ridge` gives softmax attention; `scale` 0 a ridge regression with intercept, the same for all queries that see
    the same keys. `definition` writes the formula out.

    Args:
        q `[B, H, N_q, D]`; k `[B, H_kv, N_k, D]`; v `[B, H_kv, N_k, D_v]`: float16, bfloat16, float32, float64;
            any strides; H is a multiple of H_kv. Fewer queries than keys are the last ones (decoding, chunks): the
            keys and values are the only state.
        mask: None, "causal", a mask object, or a boolean tensor, as for `attend`.
        ridge: penalty on W, > 0, in squared units of keys, relative to the sum of the weights: compare it with the
            variance of keys along a direction. A number, or a floating tensor broadcastable to `[B, H, N_q]`, which
            gets a gradient.
        scale: factor of the scores; None is 1/sqrt(D). Weights fall with distance only for keys of one norm.
        solver: "cg", conjugate gradients without a matrix; or "cholesky", D x D factors made tile by tile.
        tolerance: `bound` at which conjugate gradients stop, for the output and alike for the solve of the backward
            pass; None is 8 times the precision of the arithmetic.
        steps: most steps of conjugate gradients; None is 2 D.
        tile: (queries, keys) computed at once; it changes nothing but rounding.
        return_bound: return `LocalLinear(out, bound)`; the bound has no gradient.

    Returns:
        `[B, H, N_q, D_v]` in v's dtype. A query that sees nothing gets out 0 and gradients 0.

    Arithmetic is float32, or float64 for float64 inputs. Memory is O(B H N (D + D_v)) and a few tiles of scores;
    with "cholesky" also D^2 numbers for each query and key of a tile. A solve costs 3 D multiplications per visible
    score and step, with "cholesky" D^2 once; there is one forward and one backward. Differentiable once.

    Where it differs from the paper: statistics are taken about the mean key, not about the query, which is the same
    answer from a better conditioned system; conjugate gradients stop at a bound on the output, the authors' code at
    32 steps; "cholesky", masks other than causal, grouped heads, and the gradient of `ridge` are added; the Jacobi
    preconditioner of the authors' code is left out.

    Raises ValueError or TypeError for arguments that do not fit, and torch.linalg.LinAlgError with "cholesky" where
    `ridge` drowns in rounding.
    """
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        raise TypeError(f"a mask tensor must be boolean, got {mask.dtype}")
    view, _, factor = bind(q, k, v, mask, None, scale, None)
    _check_settings(solver, tolerance, steps, tile)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if tolerance is None:
        tolerance = 8 * torch.finfo(wide).eps
    steps = 0 if solver == "cholesky" else 2 * q.shape[3] if steps is None else steps
    penalty = _penalty(ridge, q, wide)
    problem = Problem(q, k, v, penalty.unsqueeze(3), view, factor, tolerance, steps, (tile[0], tile[1]))
    out, residual = op.run(problem)
    if not return_bound:
        return out
    return LocalLinear(out, (residual.detach() / problem.ridge.detach().sqrt()).squeeze(3))


class LocalLinearAttention(nn.Module):
    """Local linear attention between given queries, keys and values (Zuo et al., 2025, arXiv 2510.01450).

    Args:
        ridge: penalty on slopes, > 0; with `heads` where each head starts.
        heads: query heads; given, the ridge of each is learned, as `log_ridge [heads]`. None keeps it fixed.
        scale, solver, tolerance, steps, tile: see `local_linear_attention`, which says what is computed and where
            it differs from the paper.
    """

    def __init__(
        self, ridge: float = 1.0, *, heads: int | None = None, scale: float | None = None, solver: str = "cg",
        tolerance: float | None = None, steps: int | None = None, tile: tuple[int, int] = (128, 128),
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(ridge, (int, float)) or not 0 < ridge < math.inf:
            raise ValueError(f"ridge must be a finite number > 0, got {ridge!r}")
        if heads is not None and heads < 1:
            raise ValueError(f"heads must be None or >= 1, got {heads!r}")
        _check_settings(solver, tolerance, steps, tile)
        self.ridge, self.heads, self.scale, self.solver = float(ridge), heads, scale, solver
        self.tolerance, self.steps, self.tile = tolerance, steps, tile
        start = None if heads is None else nn.Parameter(torch.full((heads,), math.log(ridge)))
        self.log_ridge: nn.Parameter | None
        self.register_parameter("log_ridge", start)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | str | None = None) -> Tensor:
        """`q [B, H, N_q, D]`, `k [B, H_kv, N_k, D]`, `v [B, H_kv, N_k, D_v]` to `[B, H, N_q, D_v]`."""
        ridge = self.ridge if self.log_ridge is None else self.log_ridge.exp()[:, None]
        out = local_linear_attention(
            q, k, v, mask=mask, ridge=ridge, scale=self.scale, solver=self.solver, tolerance=self.tolerance,
            steps=self.steps, tile=self.tile,
        )  # fmt: skip
        return out.out if isinstance(out, LocalLinear) else out


def _penalty(ridge: float | Tensor, q: Tensor, wide: torch.dtype) -> Tensor:
    """The ridge of every query, `[B, H, N_q]`."""
    if not isinstance(ridge, Tensor):
        if not isinstance(ridge, (int, float)) or not 0 < ridge < math.inf:
            raise ValueError(f"ridge must be a finite number > 0 or a tensor, got {ridge!r}")
        return torch.full(q.shape[:3], float(ridge), dtype=wide, device=q.device)
    if not ridge.is_floating_point():
        raise TypeError(f"a ridge tensor must be floating, got {ridge.dtype}")
    shape = tuple(q.shape[:3])
    if ridge.ndim > 3 or any(have not in (1, want) for have, want in zip(ridge.shape[::-1], shape[::-1])):
        raise ValueError(f"ridge must broadcast to [B, H, N_q] = {list(shape)}, got {list(ridge.shape)}")
    if not torch.compiler.is_compiling() and not bool(((ridge > 0) & (ridge < math.inf)).all()):
        raise ValueError("ridge must be finite and > 0 everywhere")
    return ridge.to(device=q.device, dtype=wide).expand(shape)


def _check_settings(solver: str, tolerance: float | None, steps: int | None, tile: tuple[int, int]) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be None or a finite number >= 0, got {tolerance!r}")
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps must be None or an integer >= 1, got {steps!r}")
    if len(tile) != 2 or not all(isinstance(size, int) and size >= 1 for size in tile):
        raise ValueError(f"tile must be two integers >= 1, (queries, keys), got {tile!r}")
