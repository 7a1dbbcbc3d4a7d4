"""Rotary positions and linear biases in one score, the biases' slopes a harmonic series over heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.attention.api import attend
from tilewise.attention.biases import LowRankBias, alibi_slopes
from tilewise.attention.method import Method
from tilewise.tiles import Mask, Partial, as_mask

PAIRS = ("halves", "neighbours")


def harmonic_slopes(heads: int, first: float | None = None) -> Tensor:
    """The slopes `first / h` for heads h = 1, 2, ..., float32 `[heads]`; `first` is by default ALiBi's steepest.

    ALiBi's own (`alibi_slopes`) are a geometric series: their sizes span a factor of 2^8, these span `heads`.
    """
    steepest = alibi_slopes(heads)[0] if first is None else torch.tensor(float(first))
    if not 0 <= float(steepest) < math.inf:
        raise ValueError(f"first must be None or a finite number >= 0, got {first!r}")
    return steepest / torch.arange(1, heads + 1)


@dataclass(frozen=True)
class HarmonicPositions:
    """RoPE and ALiBi combined as factors of one product (Li, 2024, arXiv 2410.18441).

    The score of query i and key j in head h is `scale * (R_i q)(R_j k) - (i - j) first / h`: both parts depend on
    i - j alone, the rotation by direction, the linear part by distance. Rotations act on queries and keys, and the
    linear part is a `LowRankBias` whose factors are set beside them, so nothing N x N is made, and every method,
    engine and mask takes it. Positions may start anywhere; decoding continues them.

    This is one reading of the paper's "factored combination with a harmonic series": that 1, 1/2, 1/3, ... are
    the factors between heads. Other slopes can be given to `LowRankBias.alibi` in the same way.

    Args:
        heads: query heads; grouped heads share rotated keys, and slopes are on the side of the queries.
        first: slope of the first head, >= 0; None is ALiBi's steepest for so many heads, 0 leaves RoPE alone.
        base: of the rotation's frequencies, `base^(-2 p / D)` for pair p.
        pairs: which features turn together: "halves" (p and p + D/2, as in Llama) or "neighbours" (2p and 2p + 1).
    """

    heads: int
    first: float | None = None
    base: float = 10_000.0
    pairs: str = "halves"

    def __post_init__(self) -> None:
        if not isinstance(self.heads, int) or self.heads < 1:
            raise ValueError(f"heads must be an integer >= 1, got {self.heads!r}")
        harmonic_slopes(self.heads, self.first)
        if not 1 < self.base < math.inf:
            raise ValueError(f"base must be a finite number > 1, got {self.base!r}")
        if self.pairs not in PAIRS:
            raise ValueError(f"pairs must be one of {', '.join(map(repr, PAIRS))}, got {self.pairs!r}")

    def rotate(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """Queries or keys `[B, H, N, D]` turned by their positions: integers `[N]` or `[B|1, 1, N]`, or 0, 1, ...

        Angles in float64, products in at least float32; the result is in x's dtype. Differentiable.
        """
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[3] % 2 or not x.is_floating_point():
            given = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a floating tensor [B, H, N, D] with D even, got {given}")
        (n, d), wide = x.shape[2:], torch.promote_types(x.dtype, torch.float32)
        pos = torch.arange(n, device=x.device) if pos is None else pos
        if pos.is_floating_point() or pos.ndim not in (1, 3) or pos.shape[-1] != n:
            raise ValueError(f"pos must be integers [{n}] or [B, 1, {n}], got {pos.dtype} {list(pos.shape)}")
        speed = self.base ** (-torch.arange(0, d, 2, dtype=torch.float64, device=x.device) / max(d, 1))
        angle = pos.to(x.device).double().unsqueeze(-1) * speed  # [(B, 1,) N, D / 2]
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)
        split = (2, d // 2) if self.pairs == "halves" else (d // 2, 2)
        first, second = x.to(wide).unflatten(-1, split).unbind(-2 if self.pairs == "halves" else -1)
        turned = (first * cos - second * sin, first * sin + second * cos)
        return (torch.cat(turned, -1) if self.pairs == "halves" else torch.stack(turned, -1).flatten(-2)).to(
            x.dtype
        )

    def bias(
        self,
        n_q: int,
        n_k: int | None = None,
        *,
        q_pos: Tensor | None = None,
        k_pos: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> LowRankBias:
        """The linear part, `-first / h * (query position - key position)`; arguments as for `LowRankBias.alibi`."""
        slopes = harmonic_slopes(self.heads, self.first).to(device)
        return LowRankBias.alibi(slopes, n_q, n_k, q_pos=q_pos, k_pos=k_pos)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        method: Method | str | None = None,
        *,
        mask: Mask | Tensor | str | None = "causal",
        q_pos: Tensor | None = None,
        k_pos: Tensor | None = None,
        scale: float | None = None,
        engine: str = "auto",
        return_lse: bool = False,
    ) -> Tensor | Partial:
        """`tilewise.attend` of q and k that have no positions yet; methods choose tiles from rotated q and k.

        Args:
            q_pos, k_pos: integers `[N]` or `[B|1, 1, N]`, for mask, rotation and bias alike; by default 0, 1, ...
                for keys and the last of these for queries. Others as for `tilewise.attend`.
        """
        for name, x in (("q", q), ("k", k)):
            if not isinstance(x, Tensor) or x.ndim != 4:
                raise ValueError(f"{name} must be a tensor [B, H, N, D]")
        if q.shape[1] != self.heads:
            raise ValueError(f"these positions are for {self.heads} query heads, q has {q.shape[1]}")
        n_q, n_k = q.shape[2], k.shape[2]
        bias = self.bias(n_q, n_k, q_pos=q_pos, k_pos=k_pos, device=q.device)
        if q_pos is not None or k_pos is not None:
            mask = as_mask(mask).at(q_pos, k_pos)
        q_pos = torch.arange(n_k - n_q, n_k, device=q.device) if q_pos is None else q_pos
        q, k = self.rotate(q, q_pos), self.rotate(k, k_pos)
        return attend(
            q, k, v, method, mask=mask, bias=bias, scale=scale, engine=engine, return_lse=return_lse
        )
