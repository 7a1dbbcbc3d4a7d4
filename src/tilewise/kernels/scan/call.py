"""What an engine of the scan receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RULES = ("add", "delta")


@dataclass(frozen=True, eq=False)
class Call:
    """A linear recurrence over tokens, whose state is a matrix for each head.

    With D_t = diag(exp(decay_t)), rule "add" is `S_t = D_t S_{t-1} + beta_t k_t v_t^T`; rule "delta" is
    `S_t = S' + beta_t k_t (v_t - S'^T k_t)^T` with `S' = D_t S_{t-1}`. The output is `scale * S_t^T q_t`.

    Args:
        q: `[B, H_q, N, D_k]`; k: `[B, H, N, D_k]`; v: `[B, H, N, D_v]`, any strides, one floating dtype. Query head
            h reads the state of head h // (H_q // H).
        decay: log decay in [-inf, 0], `[B, H, N]` or per channel of the keys `[B, H, N, D_k]`; None decays nothing.
        beta: `[B, H, N]`; None = 1.
        state: `[S, H, D_k, D_v]` before the first token, for each of S sequences; None = zeros.
        offsets: int64 `[S + 1]` for packed sequences (B is then 1): sequence i is tokens offsets[i] to
            offsets[i + 1] - 1. None: every batch entry is a sequence, S = B.
        rule: one of RULES. scale: factor of the outputs.
        chunk: tokens between two states that are kept for the backward pass; None leaves it to the engine.

    decay, beta and state are float32, float64 when q is.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None = None
    beta: Tensor | None = None
    state: Tensor | None = None
    offsets: Tensor | None = None
    rule: str = "add"
    scale: float = 1.0
    chunk: int | None = None

    @property
    def sequences(self) -> int:
        """How many there are."""
        return self.q.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def by_channel(self) -> bool:
        """Whether each channel of the keys decays by itself."""
        return self.decay is not None and self.decay.ndim == 4

    @property
    def wide(self) -> torch.dtype:
        """What is accumulated in."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def state_shape(self) -> tuple[int, int, int, int]:
        """Of the state, `(S, H, D_k, D_v)`."""
        return self.sequences, self.k.shape[1], self.k.shape[3], self.v.shape[3]

    def spans(self) -> list[tuple[int, int, int]]:
        """Each sequence as (batch entry, first token, last token + 1)."""
        if self.offsets is None:
            return [(b, 0, self.q.shape[2]) for b in range(self.q.shape[0])]
        ends = self.offsets.tolist()
        return [(0, start, end) for start, end in zip(ends, ends[1:])]
